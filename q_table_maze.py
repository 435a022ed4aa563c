# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,!=0.11.1", "numpy>=2.4", "tyro>=1.0.17", "matplotlib>=3.11"]
# ///
"""Q-learning in a maze: on a table, then as a network on one-hot states, both compiled and checked against the exact answer.

What it teaches: the Bellman update with nothing around it. DQN is this with a larger network, a memory, and a slower copy of
the network for the targets.

Q(s, a) is the discounted sum of rewards to expect after action a in cell s if all later actions are the best ones. After a
step from s to s' with reward r, Q-learning (Watkins 1989; Watkins and Dayan 1992, https://doi.org/10.1007/BF00992698) moves it
toward what that step says it should have been:

    Q(s, a) <- Q(s, a) + alpha (y - Q(s, a))    with the target  y = r + gamma max_a' Q(s', a'),   y = r where s' is terminal.

Running out of time does not end the maze: a truncated step still adds the value of the cell it reached.

    python q_table_maze.py                                 a board of two rows
    python q_table_maze.py --board 8x8 --slip-prob 0.6667  FrozenLake's large map, on its ice
    python q_table_maze.py --board SFF/FHF/FFG             your own: S start, F free, H hole, G goal
    python q_table_maze.py --method network                a network for the table
    python q_table_maze.py --output-dir runs/1             keep model.npz, returns.csv, curve.png and summary.json
    python q_table_maze.py --load-model runs/1/model.npz   evaluate a kept model
    JAX_DISABLE_JIT=1 python q_table_maze.py --total-timesteps 200  slow, but breakpoint() stops at every step

Measured by tests/benchmark.py: optimal for 20 of 20 seeds, all boards, without ice and on FrozenLake's, in up to 11 s.

Because targets are noisy on ice, alpha falls with the visits of a pair (s, a), the values are averaged over the second half of
the run (Polyak and Juditsky 1992), and episodes start in any free cell (exploring starts, Sutton and Barto 2018).

Letters in shapes: S cells, A actions, T steps. The observation obs is the number of the cell, s. If you are new to JAX:
`jax.jit` compiles a function of arrays, so branch on array values with `jnp.where`, not `if`; `x.at[i].add(1)` is x with one
entry changed, in place once compiled.
"""

import importlib.util
import json
import sys
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro


# ---------- Arguments
@dataclass(frozen=True)
class Args:
    """Tabular Q-learning in a maze."""

    seed: int = 1  # same seed, same machine: the same bits
    board: str = "2x3"  # 2x3, 4x5, 4x4, 8x8 (the last two: FrozenLake) or rows, like SFH/HFG
    slip_prob: float = 0.0  # chance that a move goes to a side instead; FrozenLake's ice is 2/3
    total_timesteps: int | None = None  # most steps of the run; default: as many as the board needs
    max_episode_steps: int = 100  # the time limit, which truncates an episode
    method: Literal["table", "network"] = "table"  # a table, or a linear network on one-hot states
    learning_rate: float = 1.0  # alpha at the first visit of a pair (s, a)
    decay_power: float = 0.7  # on ice, alpha at visit n is learning_rate / n^decay_power
    gamma: float = 0.95  # discount per step
    epsilon: float = 0.5  # fraction of random actions
    eval_episodes: int = 100  # greedy episodes at the end
    output_dir: str | None = None  # a new folder for the run
    load_model: str | None = None  # evaluate this model.npz instead of training


# ---------- Environment
# Like https://gymnasium.farama.org/environments/toy_text/frozen_lake/, but a hole costs 1 and the actions have another order.
# For your own maze change this section and keep the fields of Maze.

BOARDS = {
    "2x3": "SFH/HFG",
    "4x5": "SFHHH/HFFFH/HHHFH/FHHFG",
    "4x4": "SFFF/FHFH/FFFH/HFFG",
    "8x8": "SFFFFFFF/FFFFFFFF/FFFHFFFF/FFFFFHFF/FFFHFFFF/FHHFFFHF/FHFFHFHF/FFFHFFFG",
}
ACTIONS = 4
MOVES = ((0, -1), (0, 1), (-1, 0), (1, 0))  # left, right, up, down: change of row and column
TURNS = np.array([[0, 2, 3], [1, 2, 3], [2, 0, 1], [3, 0, 1]])  # (A, 3) straight on, or to either side


class Maze(NamedTuple):
    start: int
    free: np.ndarray  # the cells that can be reached from the start and in which the episode goes on
    neighbor: np.ndarray  # (S, A) the cell that lies there; at the border the cell itself
    reward: np.ndarray  # (S,) for entering a cell
    terminal: np.ndarray  # (S,) it ends the episode


class EnvState(NamedTuple):
    cell: jax.Array  # its number
    time: jax.Array  # steps since the start of the episode


def read_board(board):
    """The Maze of a board's name or rows. Raises ValueError on an invalid board."""
    rows = BOARDS.get(board, board).split("/")
    cells, width = "".join(rows), len(rows[0])
    if any(len(row) != width for row in rows) or not set(cells) <= set("SFHG") or cells.count("S") != 1:
        raise ValueError(f"board must be one of {', '.join(BOARDS)} or equal rows of S, F, H and G with one S, not {board!r}")
    row, column = np.divmod(np.arange(len(cells)), width)
    moves = [np.clip(row + down, 0, len(rows) - 1) * width + np.clip(column + right, 0, width - 1) for down, right in MOVES]
    neighbor = np.stack(moves, axis=1).astype(np.int32)
    reward = np.array([{"G": 1, "H": -1}.get(cell, 0) for cell in cells], np.float32)
    terminal = np.isin(list(cells), ["G", "H"])
    reached = np.arange(len(cells)) == cells.index("S")
    for _ in cells:  # one move further each time
        reached[neighbor[reached & ~terminal]] = True
    if not any(reached & (reward > 0)):
        raise ValueError(f"board must have a path from S to G that avoids the holes, unlike {board!r}")
    free = np.flatnonzero(reached & ~terminal).astype(np.int32)
    return Maze(cells.index("S"), free, neighbor, reward, terminal)


def step(args, maze, state, action, noise):
    """One step. Returns the next EnvState, reward, terminated and truncated; it does not reset.

    noise: uniform in [0, 1). Below slip_prob the move slips: to one side in the lower half, to the other in the upper.
    """
    turn = jnp.where(noise < args.slip_prob, jnp.where(noise < args.slip_prob / 2, 1, 2), 0)
    cell = jnp.asarray(maze.neighbor)[state.cell, jnp.asarray(TURNS)[action, turn]]
    terminated, truncated = jnp.asarray(maze.terminal)[cell], state.time + 1 >= args.max_episode_steps
    return EnvState(cell, state.time + 1), jnp.asarray(maze.reward)[cell], terminated, truncated


def exact_q(args, maze, policy=None):
    """Q (S, A) of the best policy, or of `policy` (S,): value iteration (Bellman 1957)."""
    q, change = np.zeros(maze.neighbor.shape), 1.0
    while change > 1e-10:
        value = q.max(axis=1) if policy is None else q[np.arange(len(q)), policy]
        entered = (maze.reward + args.gamma * np.where(maze.terminal, 0, value))[maze.neighbor]  # (S, A) r + gamma max Q there
        new = (1 - args.slip_prob) * entered + args.slip_prob * entered[:, TURNS[:, 1:]].mean(axis=2)
        change, q = np.abs(new - q).max(), new
    return q


# ---------- Q-network
def init_params(method, sizes):
    """All values 0; sizes (S, A). A network with hidden layers would need a random start."""
    return {"q_table" if method == "table" else "w0": np.zeros(sizes, np.float32)}


def q_values(params, obs):
    """Q(s, a) of every action: obs, the numbers of cells (B,) or of one, -> (B, A) or (A,)."""
    if "q_table" in params:
        return params["q_table"][obs]
    # The product with a one-hot row picks one row of w0: a table is a linear network on one-hot states.
    return jax.nn.one_hot(obs, len(params["w0"])) @ params["w0"]


# ---------- Learning
def update(args, params, obs, action, reward, next_obs, terminated, alpha):
    """One step of Q-learning at the pair (obs, action). Returns the new params; both branches compute the same numbers."""
    # y = r + gamma max_a' Q(s', a'),   y = r where s' ends the episode
    target = reward + args.gamma * jnp.where(terminated, 0, jnp.max(q_values(params, next_obs)))
    if "q_table" in params:
        # Q(s, a) <- Q(s, a) + alpha (y - Q(s, a))
        q_table = params["q_table"]
        return {"q_table": q_table.at[obs, action].add(alpha * (target - q_table[obs, action]))}

    def loss_fn(params):  # its gradient is -(y - Q(s, a)) at the pair and 0 elsewhere
        return 0.5 * (target - q_values(params, obs)[action]) ** 2

    return jax.tree.map(lambda w, gradient: w - alpha * gradient, params, jax.grad(loss_fn)(params))


# ---------- Training
class Agent(NamedTuple):  # all that changes while an agent trains
    params: dict
    visits: jax.Array  # (S, A) how often each pair was updated
    env_state: EnvState
    episode_return: jax.Array


def act_and_learn(args, maze, agent, noise):
    """One epsilon-greedy step and one update. noise (3,) in [0, 1): which action, slip or not, where to start again.

    Returns the Agent, whether the episode ended, and its return so far.
    """
    # Act. Below epsilon, noise[0] / epsilon is again uniform in [0, 1).
    obs = agent.env_state.cell
    greedy = jnp.argmax(q_values(agent.params, obs))  # the first of equals
    action = jnp.where(noise[0] < args.epsilon, (noise[0] / args.epsilon * ACTIONS).astype(jnp.int32), greedy)

    # Step.
    env_state, reward, terminated, truncated = step(args, maze, agent.env_state, action, noise[1])

    # Learn. Count, then read the count: in the other order XLA copies visits at every step.
    visits = agent.visits.at[obs, action].add(1)
    power = args.decay_power if args.slip_prob else 0
    alpha = args.learning_rate * visits[obs, action].astype(jnp.float32) ** -power
    params = update(args, agent.params, obs, action, reward, env_state.cell, terminated, alpha)

    # Start again in any free cell where the episode ended.
    ended, episode_return = terminated | truncated, agent.episode_return + reward
    start = jnp.asarray(maze.free)[(noise[2] * len(maze.free)).astype(jnp.int32)]
    env_state = EnvState(jnp.where(ended, start, env_state.cell), jnp.where(ended, 0, env_state.time))
    return Agent(params, visits, env_state, jnp.where(ended, 0, episode_return)), ended, episode_return


def train_chunk(args, maze, agent, noise):
    """One step for each row of noise (T, 3). Returns the Agent, how many episodes ended and the sum of their returns.

    `jax.lax.fori_loop(0, n, f, carry)` is the loop `for i in range(n): carry = f(i, carry)`, compiled.
    """

    def one_step(i, carry):
        agent, episodes, total = carry
        agent, ended, episode_return = act_and_learn(args, maze, agent, noise[i])
        return agent, episodes + ended, total + jnp.where(ended, episode_return, 0)

    return jax.lax.fori_loop(0, len(noise), one_step, (agent, 0, 0.0))


def train(args):
    """Train one agent, printing a line a second. Returns params, windows and a dict of counts.

    A row of windows is (env step, mean return of the episodes that ended, largest error of a value before averaging). Ctrl-C
    ends the training early.
    """
    started = time.perf_counter()
    maze, rng = read_board(args.board), np.random.default_rng(args.seed)
    exact, cells, long_run = exact_q(args, maze), len(maze.reward), args.slip_prob > 0 and args.method == "table"
    total_timesteps = args.total_timesteps or (50_000 * cells**2 if long_run else 20_000 * cells)
    chunks = min(total_timesteps, max(64, total_timesteps // 2**16))  # each gives a point of the curve
    start = EnvState(np.int32(maze.start), np.int32(0))
    params, visits = init_params(args.method, maze.neighbor.shape), np.zeros(maze.neighbor.shape, np.int32)
    agent = jax.tree.map(jnp.asarray, Agent(params, visits, start, np.float32(0)))
    noise = rng.random((total_timesteps // chunks, 3), np.float32)
    run_chunk = jax.jit(partial(train_chunk, args, maze), donate_argnums=0)  # donated: the next Agent is written over it
    if not jax.config.jax_disable_jit:
        run_chunk = run_chunk.lower(agent, noise).compile()
    compiled = printed = time.perf_counter()

    env_steps, windows, average, averaged, interrupted = 0, [], 0, 0, False
    try:
        for chunk in range(chunks):
            agent, episodes, total = run_chunk(agent, noise)  # returns at once (asynchronous dispatch)
            env_steps += len(noise)
            noise = rng.random(noise.shape, np.float32)  # while the chunk runs
            params = jax.device_get(agent.params)
            (values,) = params.values()  # q_table or w0: either holds Q(s, a)
            windows.append((env_steps, total / episodes if episodes else np.nan, np.abs(values - exact)[maze.free].max()))
            if 2 * chunk >= chunks:
                average, averaged = average + values.astype(float), averaged + 1
            now = time.perf_counter()
            if now - printed > 1 or chunk == chunks - 1:
                printed, speed = now, env_steps / (now - compiled)
                progress = f"{env_steps:,} steps, recent return {windows[-1][1]:.2f}, largest error {windows[-1][2]:.2g}"
                print(f"{progress}, {speed:,.0f} steps/s, {(total_timesteps - env_steps) / speed:.0f} s left", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    if averaged:
        params = {name: (average / averaged).astype(np.float32) for name in params}
    seconds = time.perf_counter() - compiled
    counts = {"env_steps": env_steps, "interrupted": interrupted, "compile_seconds": compiled - started}
    counts |= {"train_seconds": seconds, "steps_per_second": env_steps / seconds}
    return params, np.array(windows, float).reshape(-1, 3), counts


# ---------- Evaluation
def evaluate(args, params):
    """The returns (1, eval_episodes) of greedy episodes from the start, with slips that no training uses."""
    maze, rng, n = read_board(args.board), np.random.default_rng(2**31), args.eval_episodes
    state, running, total = EnvState(np.full(n, maze.start), np.zeros(n, np.int32)), np.ones(n, bool), np.zeros(n)
    params = jax.tree.map(jnp.asarray, params)
    greedy_step = jax.jit(lambda state, noise: step(args, maze, state, q_values(params, state.cell).argmax(axis=1), noise))
    while running.any():
        state, reward, terminated, truncated = greedy_step(state, rng.random(n, np.float32))
        total += np.where(running, reward, 0)
        running &= ~np.asarray(terminated | truncated)
    return total[None]


def lost_value(args, params):
    """How far the greedy policy's value is below the best possible one, at the worst of the reachable cells."""
    maze, (values,) = read_board(args.board), params.values()
    policy = values.argmax(axis=1)
    loss = exact_q(args, maze).max(axis=1) - exact_q(args, maze, policy)[np.arange(len(policy)), policy]
    return float(loss[maze.free].max())


# ---------- Command line
SCRIPT = "q_table_maze.py"


def check(args):
    """Raise ValueError, naming the flag, on settings that cannot work."""
    for field in fields(args):
        value, least = getattr(args, field.name), 0 if field.name == "seed" else 1
        if field.type in (int, int | None) and value is not None and not least <= value < 2**31:
            raise ValueError(f"{field.name} must be at least {least} and below 2^31")
        if field.type is float and not 0 <= value <= 1:
            raise ValueError(f"{field.name} must be between 0 and 1")
    read_board(args.board)
    if args.output_dir and not importlib.util.find_spec("matplotlib"):
        raise ValueError("output_dir needs matplotlib: pip install matplotlib")


def load_model(path, maze=None):
    """The params that a run kept as model.npz. Raises ValueError if it is damaged, from another script or for another maze."""
    try:
        with np.load(path, allow_pickle=False) as file:
            params = dict(file)
        script, (values,) = params.pop("script"), params.values()
        if script != SCRIPT or maze and values.shape != maze.neighbor.shape:
            raise ValueError(f"it is from {script}, for a board of {len(values)} cells")
    except Exception as error:
        raise ValueError(f"load_model: {path}: {error}") from None
    return params


def keep(args, params, windows):
    """Write model.npz, returns.csv and curve.png into output_dir."""
    from matplotlib.figure import Figure  # slow to import

    folder, header = Path(args.output_dir), "env_step,episode_return,largest_error"
    np.savez(folder / "model.npz", script=SCRIPT, **params)
    np.savetxt(folder / "returns.csv", windows, ("%d", "%g", "%g"), ",", header=header, comments="")
    figure = Figure()
    axes = figure.add_subplot(
        xlabel="environment steps", ylabel="largest error of a value", title=f"Q-learning on {args.board}"
    )
    axes.semilogy(windows[:, 0], windows[:, 2])
    figure.savefig(folder / "curve.png", dpi=150)


def summarize(args, returns, counts, lost):
    """Print how the evaluation went, returns (1, eval_episodes), and give what summary.json holds."""
    solved = lost <= 1e-3
    statistics = f"mean {returns.mean():.2f}, standard deviation {returns.std():.2f}, worst {returns.min():.0f}"
    print(f"{returns.size} greedy episodes: {statistics}")
    print(f"the greedy policy is within {lost:.2g} of the best value in every cell: {'' if solved else 'not '}solved")
    names = "seed", "eval_return_mean", "eval_return_std", "eval_return_min", "eval_episodes", "lost_value", "solved"
    row = args.seed, returns.mean(), returns.std(), returns.min(), returns.size, lost, solved
    versions = {m.__name__: m.__version__ for m in (jax, np, tyro)}
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    summary = {"script": SCRIPT, "args": asdict(args), "versions": versions, "device": device, **counts}
    return summary | {"seeds": [dict(zip(names, row, strict=True))]}


def main(args):
    """Run the script. Exit status: 0, 2 on bad input, 130 after Ctrl-C."""
    try:
        check(args)
        params, counts = load_model(args.load_model, read_board(args.board)) if args.load_model else None, {}
        if args.output_dir:
            Path(args.output_dir).mkdir(parents=True)
    except (ValueError, OSError) as error:
        print(f"error: {'output_dir: ' if isinstance(error, OSError) else ''}{error}", file=sys.stderr)
        return 2
    try:
        if not args.load_model:
            params, windows, counts = train(args)
            if args.output_dir:
                keep(args, params, windows)
        summary = summarize(args, evaluate(args, params), counts, lost_value(args, params))
    except KeyboardInterrupt:
        return 130
    if args.output_dir:
        Path(args.output_dir, "summary.json").write_text(json.dumps(summary, indent=2))
    return 130 if counts.get("interrupted") else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))

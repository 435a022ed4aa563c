# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,!=0.11.1", "numpy>=2.4", "tyro>=1.0.17", "matplotlib>=3.11"]
# ///
"""Q-learning in a maze, on a table or with a linear network, checked against the exact values.

What it teaches: the update on which Deep Q-learning (DQN) rests. DQN adds a deep network, a replay
buffer and a target network; see dqn_cartpole_jax.py. The network here has one layer and computes
what the table does: it shows the step from a table to weights and gradients.

The maze is a board of cells: S is the start, F is free, H is a hole and G is the goal. The agent
moves left, right, up or down. Entering the goal pays 1, falling into a hole costs 1, and both are
terminal: they end the episode. Any other step pays 0. An episode that is too long is cut off. If
the maze is icy (--slip-prob), the agent sometimes slips: it moves at right angles to the way it
chose, to either side equally often.

Q(s, a) is the expected sum of rewards after action a in cell s, if every later action is optimal.
It is discounted: a reward that comes k steps later counts gamma^k times as much. After a step from
s to s' with reward r, Q-learning (Watkins and Dayan 1992, https://doi.org/10.1007/BF00992698) moves
its estimate of Q(s, a) toward the target y, by a part alpha of the way:

    Q(s, a) <- Q(s, a) + alpha (y - Q(s, a))   with   y = r + gamma max_a' Q(s', a'),
                                               or     y = r if s' is terminal.

The agent explores: with probability epsilon, its action is random, since it can't learn what an
action is worth that it never tries. Q-learning is off-policy: the target takes the best next
action, even if the agent then takes a random one. So it learns the values of the best policy while
it explores.

A step after which the episode is cut off does not reach a terminal state. Its target still adds
gamma max_a' Q(s', a'): the agent could have gone on from s'; only the clock stopped it.

    python q_table_maze.py --board 8x8 --slip-prob 0.6667 --output-dir runs/1
    python q_table_maze.py --method network

(The first takes ten seconds or more, for its 205 million steps; on boards without ice, about one.
`uv run` in place of `python` installs what the first lines of this file name.)

A policy says which action to take in each cell. The learned policy is greedy: it takes the action
with the largest Q. A maze is small enough to compute exactly what a policy is worth, its expected
discounted sum of rewards (`exact_q`). An agent has solved a board if its greedy policy is worth
almost as much as the best policy, at most 0.001 less, from whichever of the cells S and F it
starts.

To learn Q-learning, read `Maze`, `step`, `q_values`, `update` and `act_and_learn`, in this order.
The section *Command line* has nothing about learning.

What this file does beyond the update, so that the table finds the best policy by default:
- The first episode starts at S, all others in random cells (S or F), so that all are visited (like
  the exploring starts of Sutton and Barto 2018, chapter 5).
- A run is cut into chunks of steps. The result is the average of the values after each chunk in the
  second half of the run (Polyak and Juditsky 1992). The last values alone still move with each
  random slip. The agent acts with its newest values, not with the average.
- In an icy maze, targets are random, so alpha falls with the number of visits to (s, a). In others,
  a step always has the same r and s'. No noise has to be averaged out, so alpha does not fall.

JAX in short. `jax.jit(f)` compiles f: the first call runs f once with placeholders for its
arguments, which have shapes but no values, and records the operations ("tracing"). Later calls only
run what was recorded; a call with other shapes records anew. A compiled function returns at once,
with arrays that are still being computed; `jax.device_get` waits for them and gives NumPy's arrays.
Every argument becomes a placeholder, plain numbers too. `if` on a placeholder is an error: where
the values of arrays decide, use `jnp.where`. The settings are one object, `args` of class Args.
Settings and maze are not passed to the compiled function: `partial(f, args, maze)` fills them in as
the first arguments of f before f is compiled. So both are constants, and `if` works on settings. In
a dict that is an argument, only the arrays become placeholders; its names stay strings. Outside of
compiled functions there are no placeholders: `jnp` computes at once, like NumPy. JAX's arrays never
change: `x.at[i].add(1)` is a new array, with x[i] one larger; compiled, it is usually done in
place. `jax.tree.map(f, tree)` calls f on each array in a named tuple or dict, and returns one of
the same form. `jax.grad(f)` is a function: it computes the gradient of f with respect to its first
argument, and if that is a dict, the gradient is a dict too.

Letters in shapes: C cells of the board, A actions, B several cells at once.
"""

import contextlib
import importlib
import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array


# ---------- Arguments
@dataclass(frozen=True)
class Args:
    """Q-learning in a maze."""

    seed: int = 1  # the same seed, machine and versions give the same result
    board: str = "2x3"  # 2x3, 4x5, 4x4, 8x8, or rows like SFH/HFG: S start, F free, H hole, G goal
    slip_prob: float = 0.0  # chance to slip sideways, as on ice; FrozenLake's is 2/3
    total_timesteps: int = 0  # environment steps; 0: a number that depends on board and ice
    max_episode_steps: int = 100  # the time limit
    method: Literal["table", "network"] = "table"  # network: linear, on one-hot states
    learning_rate: float = 1.0  # alpha, or the first alpha on ice
    decay_power: float = 0.7  # on ice, alpha at visit n is learning_rate / n^decay_power
    gamma: float = 0.95  # discount per step
    epsilon: float = 0.5  # the probability of a random action
    eval_episodes: int = 100  # greedy episodes at the end
    output_dir: str | None = None  # new folder for the results
    load_model: str | None = None  # evaluate this model.npz instead of training


SCRIPT = "q_table_maze.py"


class BadInput(ValueError):
    """Settings or a file that can't be used: an error line, and exit status 2."""


# ---------- Environment
# Like https://gymnasium.farama.org/environments/toy_text/frozen_lake/, but a fall into a hole costs
# 1, and the actions have another order. Another board needs no code: --board SFH/HFG. For other
# rules, rewrite this section, and keep the names that the rest of the file uses.

BOARDS = {
    "2x3": "SFH/HFG",
    "4x5": "SFHHH/HFFFH/HHHFH/FHHFG",
    "4x4": "SFFF/FHFH/FFFH/HFFG",
    "8x8": "SFFFFFFF/FFFFFFFF/FFFHFFFF/FFFFFHFF/FFFHFFFF/FHHFFFHF/FHFFHFHF/FFFHFFFG",
}
ACTIONS = 4
MOVES = ((0, -1), (0, 1), (-1, 0), (1, 0))  # left, right, up, down: change of row and column
# For each action, the move that happens: the same, or a slip to either side.
TURNS = [[0, 2, 3], [1, 2, 3], [2, 0, 1], [3, 0, 1]]


class Maze(NamedTuple):  # NumPy's arrays; train makes JAX's arrays of them
    start: int
    free: np.ndarray  # the numbers of the cells S and F, counted row by row from 0
    neighbor: np.ndarray  # (C, A, 3) the cell that a move reaches: straight on, or to either side
    reward: np.ndarray  # (C,) for entering a cell
    terminal: np.ndarray  # (C,) whether that ends the episode


class EnvState(NamedTuple):
    cell: Array  # its number
    time: Array  # steps since the start


def read_board(board):
    """The Maze of a board's name or rows. Raises BadInput."""
    rows = BOARDS.get(board, board).split("/")
    shape = (len(rows), len(rows[0]))
    cells = np.array(list("".join(rows)))
    start = cells == "S"
    if {len(row) for row in rows} != {shape[1]} or start.sum() != 1 or set(cells) - set("SFHG"):
        raise BadInput("board must be equally long rows of S, F, H and G, with one S")
    places = np.indices(shape).reshape(2, -1).T  # (C, 2) row and column
    # At the edge of the board, a move stays where it is.
    moved = np.clip(places[:, None] + MOVES, 0, np.array(shape) - 1)  # (C, A, 2)
    numbers = moved @ [shape[1], 1]  # (C, A) row * columns + column
    neighbor = numbers[:, TURNS]  # (C, A, 3)
    terminal = (cells == "G") | (cells == "H")
    reward = (cells == "G").astype(np.float32) - (cells == "H")
    return Maze(int(start.argmax()), np.flatnonzero(~terminal), neighbor, reward, terminal)


def step(args, maze, state, action, noise):
    """The next EnvState, the reward, terminated and truncated. noise is uniform in [0, 1).

    For one cell, or for many: evaluate calls it with arrays (B,).
    """
    side = jnp.where(noise < args.slip_prob / 2, 1, 2)
    turn = jnp.where(noise < args.slip_prob, side, 0)  # 0 is straight on, 1 and 2 are the sides
    cell = maze.neighbor[state.cell, action, turn]
    truncated = state.time + 1 >= args.max_episode_steps
    return EnvState(cell, state.time + 1), maze.reward[cell], maze.terminal[cell], truncated


def exact_q(args, maze, policy=None):
    """Q (C, A) of the best policy, or of a policy (C,) that is given, without a time limit.

    Value iteration (Bellman 1957): replace each Q(s, a) by its expected target y, all at once, and
    repeat until nothing changes. For a given policy, y takes its action in s', not the best one.
    Rows of cells that end the episode mean nothing.
    """
    q = np.zeros(maze.neighbor.shape[:2])
    change = 1.0
    while change > 1e-10:
        value = q.max(axis=1) if policy is None else q[np.arange(len(q)), policy]  # (C,)
        # The target y of a step into each cell; `new` averages over slips.
        entering = maze.reward + args.gamma * np.where(maze.terminal, 0, value)  # (C,)
        moves = entering[maze.neighbor]  # (C, A, 3)
        new = (1 - args.slip_prob) * moves[..., 0] + args.slip_prob * moves[..., 1:].mean(axis=2)
        change = np.abs(new - q).max()
        q = new
    return q


# ---------- Q-network
def init_params(method, sizes):
    """All values start at 0. sizes are (C, A)."""
    name = "q_table" if method == "table" else "w0"
    return {name: np.zeros(sizes, np.float32)}


def q_values(params, obs):
    """Q(s, a) of every action. obs, the observation, is a cell's number: () -> (A,).

    Or the numbers of several cells: (B,) -> (B, A).
    """
    if "q_table" in params:  # names are known while compiling, so `if` works
        return params["q_table"][obs]
    # The product picks a row of w0: a table is a network on one-hot states.
    return jax.nn.one_hot(obs, len(params["w0"])) @ params["w0"]


# ---------- Learning
def update(args, params, obs, action, reward, next_obs, terminated, alpha):
    """One step of Q-learning at (obs, action). Table and network get the same new values."""
    # y = r + gamma max_a' Q(s', a'),   or y = r if s' is terminal
    target = reward + args.gamma * jnp.where(terminated, 0, jnp.max(q_values(params, next_obs)))
    if "q_table" in params:
        # Q(s, a) <- Q(s, a) + alpha (y - Q(s, a))
        q_table = params["q_table"]
        return {"q_table": q_table.at[obs, action].add(alpha * (target - q_table[obs, action]))}

    # y depends on the weights too, by Q(s', a'), but Q-learning only moves Q(s, a) toward it. So y
    # must be a constant here. It is one for jax.grad, because it was computed outside of loss_fn.
    # The gradient is a dict like params. Its w0 is -(y - Q(s, a)) at (obs, action), else 0.
    def loss_fn(params):
        return 0.5 * (target - q_values(params, obs)[action]) ** 2

    gradient = jax.grad(loss_fn)(params)["w0"]
    return {"w0": params["w0"] - alpha * gradient}


# ---------- Training
class Agent(NamedTuple):  # everything that changes in training
    params: dict
    visits: Array  # (C, A) how often each pair was updated
    state: EnvState
    returns: Array  # the return so far: the sum of rewards in the current episode


def act_and_learn(args, maze, agent, noise):
    """A step and an update. noise is four numbers, uniform in [0, 1).

    Returns the Agent, whether the episode ended, and the sum of its rewards so far.
    """
    explore, pick, slip, place = noise

    # Act: epsilon-greedy.
    obs = agent.state.cell
    greedy = jnp.argmax(q_values(agent.params, obs))
    action = jnp.where(explore < args.epsilon, (pick * ACTIONS).astype(int), greedy)

    # Step.
    state, reward, terminated, truncated = step(args, maze, agent.state, action, slip)

    # Learn.
    visits = agent.visits.at[obs, action].add(1)
    power = args.decay_power if args.slip_prob > 0 else 0  # `if` works: args is a constant
    alpha = args.learning_rate * visits[obs, action].astype(np.float32) ** -power
    # The end by the time limit, truncated, does not count here.
    params = update(args, agent.params, obs, action, reward, state.cell, terminated, alpha)

    # After an end, start in any free cell.
    ended = terminated | truncated
    returns = agent.returns + reward
    start = maze.free[(place * len(maze.free)).astype(int)]
    state = EnvState(jnp.where(ended, start, state.cell), jnp.where(ended, 0, state.time))
    agent = Agent(params, visits, state, jnp.where(ended, 0, returns))
    return agent, ended, returns


def train_chunk(args, maze, agent, noise, steps):
    """A chunk of steps. Returns the Agent, how many episodes ended, and the sum of their returns.

    noise has four random numbers in a row for each step. It may have more rows than steps, because
    the last chunk may be shorter, and noise of another shape would be compiled anew.
    """

    def one_step(i, carry):
        agent, episodes, total = carry
        agent, ended, returns = act_and_learn(args, maze, agent, noise[i])
        return agent, episodes + ended, total + jnp.where(ended, returns, 0)

    # A compiled loop: for i in range(steps): carry = one_step(i, carry)
    # (Python's `for` can't count to a placeholder.)
    return jax.lax.fori_loop(0, steps, one_step, (agent, 0, 0.0))


def train(args):
    """Returns params, progress (one row for each chunk of steps), and a dict of counts and times.

    The columns of progress: the environment step; the mean return of the episodes that ended in the
    chunk (nan if none did), random actions and random starts included; and the largest distance
    from Q to the exact Q, over all free cells and actions, where Q is the average that train would
    return if it stopped there. Ctrl-C ends the run early. Raises BadInput on bad settings.
    """
    check(args)
    started = time.time()
    maze = read_board(args.board)
    exact = exact_q(args, maze)
    timesteps = run_length(args, len(exact))
    chunk = min(2**16, 1 + timesteps // 64)  # steps in a compiled call
    # NumPy draws the random numbers: with jax.random, a step takes 1.9 times as long.
    rng = np.random.default_rng(args.seed)
    noise = rng.random((chunk, 4), np.float32)
    agent = init_agent(args, maze)
    world = jax.tree.map(jnp.asarray, maze)  # in `step`, placeholders can't index NumPy's arrays
    # `partial` fills in the first arguments, as constants. Donated: the new agent overwrites the
    # old one in memory, which can't be used any more.
    run_chunk = jax.jit(partial(train_chunk, args, world), donate_argnames="agent")
    # Compile by a first call, of 0 steps. (`steps` is a placeholder, so later calls may make more.)
    agent, _, _ = run_chunk(agent, noise, 0)
    compiled = printed = time.time()
    env_steps = 0
    progress = []
    # sums[n] adds up the values after each of the first n chunks. The difference of two of them
    # gives the average over the second half, wherever the run stops (`average`).
    sums = [np.zeros(exact.shape)]
    with contextlib.suppress(KeyboardInterrupt):
        while env_steps < timesteps:
            steps = min(chunk, timesteps - env_steps)
            # The call returns at once. While JAX works with this noise, NumPy draws the next.
            agent, episodes, total = run_chunk(agent, noise, steps)
            noise = rng.random(noise.shape, np.float32)
            params, episodes, total = jax.device_get((agent.params, episodes, total))
            (values,) = params.values()  # one array: the table, or w0
            sums.append(sums[-1] + values)
            env_steps += steps
            # From here on, only measuring and printing.
            error = np.abs(average(sums) - exact)[maze.free].max()
            recent = total / episodes if episodes else np.nan
            progress.append((env_steps, recent, error))
            if time.time() - printed > 1 or env_steps == timesteps:
                printed = time.time()
                report(timesteps, progress, printed - compiled)
    seconds = time.time() - compiled
    counts = {"env_steps": env_steps, "interrupted": env_steps < timesteps}
    counts |= {"compile_seconds": compiled - started, "train_seconds": seconds}
    counts["steps_per_second"] = env_steps / seconds
    params = {name: average(sums).astype(np.float32) for name in agent.params}
    return params, np.array(progress, float).reshape(-1, 3), counts


def run_length(args, cells):
    """total_timesteps, or enough for the table to solve the board: on ice it needs more.

    The network is slow, because it multiplies by all of w0. So on ice it gets as few steps as
    elsewhere, and may not solve the board.
    """
    if args.total_timesteps:
        return args.total_timesteps
    if args.slip_prob and args.method == "table":
        return 50_000 * cells**2
    return 20_000 * cells


def init_agent(args, maze):
    """All values 0, no visits, in the start cell."""
    shape = maze.neighbor.shape[:2]
    state = EnvState(np.array(maze.start), np.array(0))
    agent = Agent(init_params(args.method, shape), np.zeros(shape, int), state, np.array(0.0))
    return jax.tree.map(jnp.asarray, agent)


def average(sums):
    """The mean of the values after each chunk of the second half of the run."""
    half = (len(sums) - 1) // 2
    return (sums[-1] - sums[half]) / max(1, len(sums) - 1 - half)


def report(timesteps, progress, seconds):
    """Print the progress."""
    env_steps, recent, error = progress[-1]
    left = seconds * (timesteps / env_steps - 1)
    print(f"{env_steps:,} steps, recent return {recent:.4g}, largest error {error:.2g}", end=", ")
    print(f"{env_steps / seconds:,.0f} steps/s, {left:.0f} s left", flush=True)


# ---------- Evaluation
def evaluate(args, params):
    """The returns (eval_episodes,) of greedy episodes from the start: plain sums of rewards."""
    maze = read_board(args.board)
    rng = np.random.default_rng(2**31)  # training seeds are smaller
    n = args.eval_episodes
    state = EnvState(np.full(n, maze.start), np.zeros(n, int))
    returns = np.zeros(n)
    running = np.ones(n, bool)
    while running.any():
        action = q_values(params, state.cell).argmax(axis=1)
        noise = rng.random(n, np.float32)
        outputs = step(args, maze, state, action, noise)  # not compiled: NumPy's maze will do
        state, reward, terminated, truncated = jax.device_get(outputs)
        returns += np.where(running, reward, 0)
        running &= ~(terminated | truncated)
    return returns


def lost_value(args, params):
    """How much less the greedy policy is worth than the best one, from the worst cell to start in.

    Unlike a return, worth is discounted and has no time limit.
    """
    maze = read_board(args.board)
    (values,) = params.values()
    policy = values.argmax(axis=1)
    worth = exact_q(args, maze, policy)[np.arange(len(policy)), policy]
    return float((exact_q(args, maze).max(axis=1) - worth)[maze.free].max())


def summarize(args, returns, lost):
    """Print the result, and return statistics of the agent."""
    solved = lost <= 1e-3
    print(f"{returns.size} greedy episodes: mean {returns.mean():.4g}", end=", ")
    print(f"std {returns.std():.4g}, worst {returns.min():.4g}", end="; ")
    print(f"solved: {solved} (within {lost:.2g} of the best policy, threshold 0.001)")
    agent = {"seed": None if args.load_model else args.seed, "solved": solved}
    agent |= {"eval_return_mean": returns.mean(), "eval_return_std": returns.std()}
    return agent | {"eval_return_min": returns.min(), "eval_episodes": returns.size}


# ---------- Command line
def check(args):
    """Raise BadInput, naming the flag, on bad settings."""
    limits = dict.fromkeys(("gamma", "epsilon", "slip_prob", "learning_rate"), (0, 1))
    limits |= dict.fromkeys(("seed", "total_timesteps"), (0, 2**31 - 1))
    limits |= dict.fromkeys(("max_episode_steps", "eval_episodes"), (1, 2**31 - 1))
    limits |= {"decay_power": (0, 10)}
    for name, (least, most) in limits.items():
        if not least <= getattr(args, name) <= most:
            raise BadInput(f"{name} must be between {least} and {most}")
    if args.method not in ("table", "network"):
        raise BadInput("method must be table or network")
    read_board(args.board)


def load_model(path, args=None):
    """The params of a saved model.npz, which must fit the board of args, if given.

    `run` gives args; a program that imports this file need not.
    """
    try:
        params = dict(np.load(path, allow_pickle=False))
        script = params.pop("script")
        if script != SCRIPT:
            raise ValueError(f"{script} saved it")
        board = str(params.pop("board"))
    except Exception as error:  # damaged files raise errors of many kinds
        raise BadInput(f"load_model: {type(error).__name__}: {error}") from error
    if args and BOARDS.get(board, board) != BOARDS.get(args.board, args.board):
        raise BadInput(f"load_model: it is for the board {board}")
    return params


def make_output_dir(args):
    """Make output_dir, a new folder. If that or a package fails, it should be before training."""
    try:
        importlib.import_module("matplotlib")
        Path(args.output_dir).mkdir(parents=True)
    except (ImportError, OSError) as error:
        raise BadInput(f"output_dir: {error}") from error


def keep(args, params, progress):
    """Save the model, the progress, and a plot of its errors."""
    from matplotlib.figure import Figure  # slow to import

    np.savez(f"{args.output_dir}/model.npz", script=SCRIPT, board=args.board, **params)
    names = "env_step,episode_return,largest_error"
    np.savetxt(f"{args.output_dir}/returns.csv", progress, "%.10g", ",", header=names, comments="")
    axes = Figure().add_subplot(xlabel="environment steps", ylabel="largest error of a value")
    axes.semilogy(progress[:, 0], progress[:, 2])
    axes.figure.savefig(f"{args.output_dir}/curve.png", dpi=150)


def run(args):
    """Train or load, evaluate, save. Returns the exit status: 0, or 130 after Ctrl-C."""
    check(args)
    if args.load_model:
        params = load_model(args.load_model, args)
    if args.output_dir:
        make_output_dir(args)
    summary = {"script": SCRIPT, "args": vars(args), "versions": {"jax": jax.__version__}}
    summary["device"] = jax.devices()[0].device_kind
    if not args.load_model:
        params, progress, counts = train(args)
        summary |= counts
        if args.output_dir:
            keep(args, params, progress)
    summary["seeds"] = [summarize(args, evaluate(args, params), lost_value(args, params))]
    if args.output_dir:
        Path(args.output_dir, "summary.json").write_text(json.dumps(summary, indent=2))
    return 130 if summary.get("interrupted") else 0


def main(args):
    """Run the script. Exit status: 0, 2 on bad input, 130 after Ctrl-C."""
    try:
        return run(args)
    except BadInput as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))

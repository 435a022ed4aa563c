# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,!=0.11.1", "optax>=0.2.8", "numpy>=2.4", "tyro>=1.0.17", "matplotlib>=3.11"]
# ///
"""Q-learning in a maze: on a table, then as a network on one-hot states, both compiled and checked against the exact answer.

What it teaches: the Bellman update with nothing around it. A DQN is this with a larger network, a memory and a slower copy of
the network for the targets.

Q(s, a) is the discounted sum of rewards to expect after action a in cell s, when all later actions are the best ones. After
a step from s to s' with reward r, Q-learning (Watkins 1989; Watkins and Dayan 1992, https://doi.org/10.1007/BF00992698)
moves it towards what that step says it should have been:

    Q(s, a) <- Q(s, a) + alpha (y - Q(s, a))    with the target  y = r + gamma max_a' Q(s', a'),   y = r where s' is terminal.

(A published tutorial leaves that last case out and bootstraps from the start after the reset: its values blow up, to 6 and 7
where the true ones are below 1.) A time limit is no end of the maze: a truncated step bootstraps from the cell it reached.

    python q_table_maze.py                                      a board of two rows, solved before you look up
    python q_table_maze.py --board 8x8 --slip-prob 0.6667       FrozenLake's large map, on its ice
    python q_table_maze.py --board SFF/FHF/FFG                  your own: S start, F free, H hole, G goal
    python q_table_maze.py --method network                     the same run with a network for the table
    python q_table_maze.py --num-seeds 16                       sixteen agents at once, over all cores or GPUs
    python q_table_maze.py --output-dir runs/1                  keep model.npz, returns.csv, curve.png and summary.json
    JAX_DISABLE_JIT=1 python q_table_maze.py                    plain, slow Python: breakpoint() stops at every step

Measured by tests/benchmark.py on two cores of an AMD EPYC (Zen 5), jax 0.10.2: on each of the four boards, without ice and
on FrozenLake's ice, the greedy policy was optimal in every reachable cell for 20 of 20 seeds (2000 to 2019, none tuned on),
and the largest error of a value was 9.4e-05 without ice, 1.8e-01 on it, at pairs seldom visited. One core takes 27 million
steps a second (20 on ice); the first command takes 1.08 s, of which importing JAX takes 0.51 s.

On ice every update is noisy, so alpha falls with the visits n of a pair, as (H + 1) / (H + n) with the horizon
H = 1 / (1 - gamma) = 20 (Jin et al. 2018, https://arxiv.org/abs/1807.03765). Values of seldom visited pairs stay rough there,
off by 0.2 at most; where the two best actions differ by 0.001, as with --slip-prob 0.2 on the 8x8 board, a run can end with
the second best.

Letters in shapes: S cells, A actions, B batch, K seeds. The observation obs is the number of the cell, s. In JAX: `jax.jit`
compiles a function of arrays once, so values choose by `jnp.where`, not by `if`; arrays do not change, `x.at[i].add(1)` gives
a new one (in place, once compiled); `jax.vmap` maps a function over a new first axis; `jax.tree.map` over every array of a dict
or NamedTuple; and a random key is used once, `jax.random.fold_in(key, n)` makes the n-th from it.
"""

import csv
import gc
import importlib.util
import io
import json
import math
import os
import platform
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

# ------------------------------------------------------------------------------------------------------------ Arguments


@dataclass(frozen=True)
class Args:
    """Tabular Q-learning in a maze. Every period and every schedule counts environment steps."""

    seed: int = 1
    """seed of actions and slips: the same seed gives the same bits on the same machine"""
    num_seeds: int = 1
    """train this many agents at once, with seeds seed, seed + 1, ..."""
    total_timesteps: int | None = None
    """environment steps of the whole run; unless given, 1,000 times the cube of the number of cells"""
    board: str = "2x3"
    """2x3, 4x5, 4x4, 8x8 (the last two are FrozenLake's) or the rows themselves, such as SFH/HFG"""
    slip_prob: float = 0.0
    """chance that a move goes to one of the two sides instead, each equally likely; FrozenLake's ice is 2/3"""
    max_episode_steps: int = 200
    """the time limit, which truncates an episode"""
    method: Literal["table", "network"] = "table"
    """what holds the values: a table, or a linear network on one-hot states"""
    learning_rate: float = 1.0
    """alpha at the first visit of a pair (s, a)"""
    halving_visits: float = 21.0
    """visits until alpha is half, learning_rate / (1 + (n - 1) / this) at visit n; inf keeps it, which is fine without ice"""
    gamma: float = 0.95
    """discount per step"""
    start_e: float = 1.0
    """epsilon, the share of random actions, at the start"""
    end_e: float = 0.2
    """epsilon at the end; high, so that cells off the best path are learned too"""
    exploration_fraction: float = 0.2
    """share of total_timesteps over which epsilon falls linearly from start_e to end_e"""
    eval_episodes: int = 100
    """greedy episodes at the end"""
    output_dir: str | None = None
    """keep the run here: model.npz, returns.csv, curve.png, summary.json"""
    load_model: str | None = None
    """start from the values of this model.npz; with --total-timesteps 0 evaluate them"""


# ---------------------------------------------------------------------------------------------------------- Environment
# A grid of cells like Gymnasium's FrozenLake, https://gymnasium.farama.org/environments/toy_text/frozen_lake/, with a hole
# costing 1 and actions in another order. For your own environment change this section; the rest knows only cells.

BOARDS = {
    "2x3": "SFH/HFG",
    "4x5": "SFHHH/HFFFH/HHHFH/FHHFG",
    "4x4": "SFFF/FHFH/FFFH/HFFG",
    "8x8": "SFFFFFFF/FFFFFFFF/FFFHFFFF/FFFFFHFF/FFFHFFFF/FHHFFFHF/FHFFHFHF/FFFHFFFG",
}
ACTIONS = 4
MOVES = ((0, -1), (0, 1), (-1, 0), (1, 0))  # left, right, up, down: change of row and column
SIDES = np.array([[2, 3], [2, 3], [0, 1], [0, 1]], np.int32)  # the two directions across each action


class Maze(NamedTuple):
    rows: list[str]
    start: int
    neighbor: np.ndarray  # (S, A) the cell that lies there; at the border the cell itself
    reward: np.ndarray  # (S,) for entering a cell
    terminal: np.ndarray  # (S,) entering it ends the episode
    reachable: np.ndarray  # (S,) some path from the start leads here, and the episode goes on


class EnvState(NamedTuple):
    cell: jax.Array  # its number, row by row
    time: jax.Array  # steps since the start of the episode


def read_board(board):
    """The Maze of a board's name or rows. Raises ValueError, in one line, on a board that is none."""
    rows = BOARDS.get(board, board).split("/")
    width, cells = len(rows[0]), "".join(rows)
    if any(len(row) != width for row in rows) or not cells:
        raise ValueError(f"board must have rows of equal length, such as SFH/HFG ({board!r} has {[len(r) for r in rows]})")
    if not set(cells) <= set("SFHG"):
        raise ValueError(f"board must be {', '.join(BOARDS)} or rows of the letters S, F, H and G (board is {board!r})")
    if cells.count("S") != 1 or "G" not in cells:
        raise ValueError(f"board must have one S and at least one G (board is {board!r})")
    row, column = np.divmod(np.arange(len(cells)), width)
    neighbor = np.stack(
        [np.clip(row + dr, 0, len(rows) - 1) * width + np.clip(column + dc, 0, width - 1) for dr, dc in MOVES], axis=1
    ).astype(np.int32)
    reward = np.array([{"G": 1, "H": -1}.get(cell, 0) for cell in cells], np.float32)
    terminal = reward != 0
    reached = np.arange(len(cells)) == cells.index("S")
    for _ in cells:
        reached[neighbor[reached & ~terminal]] = True
    if not any(reached & (reward > 0)):
        raise ValueError(f"board must have a path from S to G that avoids the holes (board is {board!r})")
    return Maze(rows, cells.index("S"), neighbor, reward, terminal, reached & ~terminal)


def step(args, maze, state, action, noise):
    """One step. Returns the next EnvState, reward, terminated and truncated; it does not reset.

    noise: uniform in [0, 1). Below slip_prob the move slips: to one side in the lower half, to the other in the upper.
    """
    slip = jnp.where(noise < args.slip_prob / 2, jnp.asarray(SIDES)[action, 0], jnp.asarray(SIDES)[action, 1])
    direction = jnp.where(noise < args.slip_prob, slip, action)
    cell = jnp.asarray(maze.neighbor)[state.cell, direction]
    time = state.time + 1
    reward, terminated = jnp.asarray(maze.reward)[cell], jnp.asarray(maze.terminal)[cell]
    return EnvState(cell, time), reward, terminated, time >= args.max_episode_steps


def exact_q(args, maze):
    """Q* (S, A) by value iteration (Bellman 1957): apply the Bellman equation to a whole table until it no longer moves."""

    def sweep(q):
        value = jnp.where(maze.terminal, 0, q.max(axis=1))
        going = (maze.reward + args.gamma * value)[maze.neighbor]  # (S, A) what a move there is worth
        return (1 - args.slip_prob) * going + args.slip_prob * going[:, SIDES].mean(axis=2)

    def moved(carry):
        sweeps, q, change = carry
        return (change > 1e-7) & (sweeps < 100_000)  # float32 may never come to rest

    def body(carry):
        sweeps, q, _ = carry
        new = sweep(q)
        return sweeps + 1, new, jnp.abs(new - q).max()

    return jax.lax.while_loop(moved, body, (0, jnp.zeros(maze.neighbor.shape), jnp.float32(1)))[1]


# ------------------------------------------------------------------------------------------------------------ Q-network


def init_params(method, sizes):
    """The values of a fresh agent, all 0, as a dict: q_table for the table, w0 for the network; sizes (S, A).

    A network with hidden layers would need a random start; a single layer does not.
    """
    return {"q_table" if method == "table" else "w0": np.zeros(sizes, np.float32)}


def q_values(params, obs):
    """Q(s, a) of every action: obs, the numbers of cells (B,) or of one, -> (B, A) or (A,)."""
    if "q_table" in params:
        return params["q_table"][obs]
    # The product with a one-hot row picks one row of w0: a table is a linear network on one-hot states.
    return jax.nn.one_hot(obs, len(params["w0"])) @ params["w0"]


# ------------------------------------------------------------------------------------------------------------- Learning

optimizer = optax.identity()  # plain gradient descent: the direction is the gradient; the step size is applied in update()


def linear_schedule(start, end, fraction):
    """From start to end while fraction, a NumPy or JAX number, goes from 0 to 1, and end from there on."""
    return start + (end - start) * fraction.clip(max=1)


def td_target(params, gamma, reward, next_obs, terminated):
    """What Q(s, a) should have been, after one step."""
    # y = r + gamma max_a' Q(s', a'),   y = r where s' ends the episode
    return reward + gamma * jnp.where(terminated, 0, jnp.max(q_values(params, next_obs)))


def loss_fn(params, obs, action, target):
    """Half the squared error of Q(s, a) against the target: a step of alpha against its gradient is the table's update."""
    return 0.5 * (target - q_values(params, obs)[action]) ** 2


def update(params, opt_state, obs, action, target, learning_rate):
    """One step of Q-learning at the pair (obs, action). Returns the new params and opt_state.

    Both branches compute the same numbers: the gradient of loss_fn is -(y - Q(s, a)) at the pair and 0 elsewhere.
    """
    if "q_table" in params:
        q_table = params["q_table"]
        # Q(s, a) <- Q(s, a) + alpha (y - Q(s, a))
        return {"q_table": q_table.at[obs, action].add(learning_rate * (target - q_table[obs, action]))}, opt_state
    grads = jax.grad(loss_fn)(params, obs, action, target)
    direction, opt_state = optimizer.update(grads, opt_state)
    return jax.tree.map(lambda p, d: p - learning_rate * d, params, direction), opt_state


# ------------------------------------------------------------------------------------------------------------- Training


class Agent(NamedTuple):
    """All that changes while an agent trains."""

    seed: jax.Array
    params: dict
    opt_state: tuple
    visits: jax.Array  # (S, A) how often each pair was updated
    env_state: EnvState
    episode_return: jax.Array  # of the running episode


class Result(NamedTuple):
    params: dict  # with num_seeds > 1 every array has a first axis K
    visits: np.ndarray  # (S, A), or (K, S, A)
    exact: np.ndarray  # (S, A) what the values should be
    env_steps: int
    windows: np.ndarray  # rows: env step, mean return of the episodes that ended, seed, how many, largest error if visited
    compile_seconds: float
    train_seconds: float
    interrupted: bool


def layer_sizes(args):
    """Units of every layer, from the observation to the actions."""
    return (len(read_board(args.board).reward), ACTIONS)


def init_agent(args, maze, seed):
    """A new Agent from an integer seed. In NumPy: there is nothing to compile."""
    params = init_params(args.method, maze.neighbor.shape)
    start = EnvState(np.int32(maze.start), np.int32(0))
    visits = np.zeros(maze.neighbor.shape, np.int32)
    return Agent(np.uint32(seed), params, optimizer.init(params), visits, start, np.float32(0))


def act_and_learn(args, maze, agent, t, noise):
    """One epsilon-greedy step, counted t, and one update. noise (3,) in [0, 1): explore or not, which action, slip or not.

    Returns the Agent, whether the episode ended, and its return so far.
    """
    obs = agent.env_state.cell
    epsilon = linear_schedule(args.start_e, args.end_e, t / (args.exploration_fraction * args.total_timesteps))
    greedy = jnp.argmax(q_values(agent.params, obs))  # among equals the first: left, right, up, down
    action = jnp.where(noise[0] < epsilon, (noise[1] * ACTIONS).astype(jnp.int32), greedy)

    env_state, reward, terminated, truncated = step(args, maze, agent.env_state, action, noise[2])
    target = td_target(agent.params, args.gamma, reward, env_state.cell, terminated)
    # Count first and read the count after: the other way round XLA copies the table at every step, 20 times as slow.
    visits = agent.visits.at[obs, action].add(1)
    learning_rate = args.learning_rate / (1 + (visits[obs, action] - 1) / args.halving_visits)
    params, opt_state = update(agent.params, agent.opt_state, obs, action, target, learning_rate)

    ended = terminated | truncated
    episode_return = agent.episode_return + reward
    agent = agent._replace(
        params=params,
        opt_state=opt_state,
        visits=visits,
        env_state=EnvState(jnp.where(ended, maze.start, env_state.cell), jnp.where(ended, 0, env_state.time)),
        episode_return=jnp.where(ended, 0, episode_return),
    )
    return agent, ended, episode_return


WINDOWS = 8  # per chunk: each gives one point of the curve
MOST_STEPS = 2_000_000_000  # the clock is an int32


def train_chunk(args, maze, steps, agent, first_step):
    """From first_step on, WINDOWS times `steps` environment steps (fewer at the end of the run), an update after each.

    `jax.lax.scan(f, state, xs)` is `for x in xs: state, y = f(state, x)`, compiled, with the ys stacked;
    `jax.lax.fori_loop(0, n, f, carry)` is `for i in range(n): carry = f(i, carry)`.
    Returns the Agent and, with a first axis WINDOWS: the number of episodes that ended, the sum of their returns, and the
    params and visits at the end of the window.
    """
    chunk_key = jax.random.fold_in(jax.random.key(agent.seed), first_step)  # a key of its own for every chunk
    noise = jax.random.uniform(chunk_key, (WINDOWS, steps, 3))  # all at once: drawing inside the loop would take longer than it

    def window(agent, inputs):
        t, noise = inputs

        def one_step(i, carry):
            agent, episodes, total = carry
            agent, ended, episode_return = act_and_learn(args, maze, agent, t + i, noise[i])
            return agent, episodes + ended, total + jnp.where(ended, episode_return, 0)

        remaining = jnp.clip(args.total_timesteps - t, 0, steps)
        agent, episodes, total = jax.lax.fori_loop(0, remaining, one_step, (agent, 0, 0.0))
        return agent, (episodes, total, agent.params, agent.visits)

    clock = first_step + steps * jnp.arange(WINDOWS)
    return jax.lax.scan(window, agent, (clock, noise))


def largest_error(params, exact, where):
    """The largest |Q(s, a) - Q*(s, a)| (...,) over the pairs where `where` (..., S, A) holds; 0 if there is none."""
    (values,) = params.values()  # q_table or w0: either holds Q(s, a)
    return np.max(np.abs(np.asarray(values) - exact), axis=(-2, -1), where=where, initial=0)


def jit(args, function, in_axes, mesh=None, **options):
    """jax.jit of a function of one agent; with num_seeds > 1 of K agents, along axis 0 where in_axes says 0.

    With a mesh every device gets an equal share of the agents.
    """
    on_cpu = jax.default_backend() == "cpu"
    if args.num_seeds > 1:
        if on_cpu:  # one agent after the other: side by side, XLA's gathers and scatters take 3 times as long per agent
            function = jax.custom_batching.sequential_vmap(function)
        function = jax.vmap(function, in_axes)
        if mesh:
            specs = tuple(jax.P("seed") if axis == 0 else jax.P() for axis in in_axes)
            function = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=jax.P("seed"), check_vma=False)
    # Level 1 of 3 saves 0.1 s of XLA's compile time on the CPU and leaves these small loops as fast.
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 1} if on_cpu else None, **options)


def one_agent(args, arrays, i):
    """Of arrays that have an axis K with num_seeds > 1, those of agent i."""
    return jax.tree.map(lambda x: x[i], arrays) if args.num_seeds > 1 else arrays


def fill_in(args):
    """The Args with the default of total_timesteps filled in, which depends on the board."""
    if args.total_timesteps is not None:
        return args
    return replace(args, total_timesteps=min(1_000 * len(read_board(args.board).reward) ** 3, MOST_STEPS))


def train(args, params=None, report=lambda env_steps, seconds, windows, error: None):
    """Train num_seeds agents and return a Result.

    params: start from these values instead of 0. report: called between chunks with the environment steps done, the seconds
    they took, its rows of Result.windows and the largest error (K,) of a visited pair. A KeyboardInterrupt, from
    there or from the user, ends the training early and is no error. Raises ValueError on a bad board.
    """
    started = time.perf_counter()
    args, maze = fill_in(args), read_board(args.board)
    exact = np.asarray(jit(replace(args, num_seeds=1), partial(exact_q, args, maze), ())())
    agent, mesh = init_agent(args, maze, args.seed), None
    if args.num_seeds > 1:
        mesh = jax.sharding.Mesh(jax.devices()[: args.num_seeds], ("seed",))
        # Every device gets equally many agents; what is too many trains along and is dropped at the end.
        padded = -(-args.num_seeds // mesh.size) * mesh.size
        agents = [init_agent(args, maze, args.seed + i) for i in range(padded)]
        agent = jax.tree.map(lambda *x: np.stack(x), *agents)
    if params is not None:
        agent = agent._replace(params=jax.tree.map(lambda old, new: np.resize(new, old.shape), agent.params, params))

    agent = jax.tree.map(jnp.asarray, agent)

    steps = min(2**15, -(-args.total_timesteps // 64))  # a window: at least 64 of them make the curve
    run_chunk = jit(args, partial(train_chunk, args, maze, steps), (0, None), mesh, donate_argnums=0)
    if steps and not jax.config.jax_disable_jit:
        run_chunk = run_chunk.lower(agent, np.int32(0)).compile()
    compiled = time.perf_counter()

    env_steps, rows, interrupted = 0, [np.empty((0, 5))], False
    try:
        while env_steps < args.total_timesteps:
            agent, windows = run_chunk(agent, np.int32(env_steps))
            windows = jax.tree.map(np.asarray, windows)
            if args.num_seeds == 1:
                windows = jax.tree.map(lambda x: x[None], windows)
            count, total, values, visits = windows  # (K, WINDOWS, ...) each
            mean = np.divide(total, count, where=count > 0, out=np.full(total.shape, np.nan))
            error = largest_error(values, exact, visits > 0)
            ends = np.minimum(env_steps + steps * np.arange(1, WINDOWS + 1), args.total_timesteps)
            seed = args.seed + np.arange(len(count))[:, None]
            chunk = np.stack(np.broadcast_arrays(ends, mean, seed, count, error), axis=-1)
            used = len(np.unique(ends))  # the last chunk may end before its last window
            rows.append(chunk[: args.num_seeds, :used].reshape(-1, 5))
            env_steps = int(ends[-1])
            report(env_steps, time.perf_counter() - compiled, rows[-1], error[: args.num_seeds, -1])
    except KeyboardInterrupt:
        interrupted = True
    params, visits = jax.device_get((agent.params, agent.visits))
    if args.num_seeds > 1:
        params, visits = jax.tree.map(lambda values: values[: args.num_seeds], (params, visits))
    finished = time.perf_counter()
    seconds = compiled - started, finished - compiled
    return Result(params, visits, exact, env_steps, np.concatenate(rows), *seconds, interrupted)


# ----------------------------------------------------------------------------------------------------------- Evaluation


def evaluate(args, params):
    """Returns of eval_episodes greedy episodes under the maze's own rules, with slips that no training saw.

    Gives (eval_episodes,), or (K, eval_episodes) with num_seeds > 1. Nothing here is mixed with the training returns.
    """
    maze = read_board(args.board)

    def evaluate_step(params, episodes, noise):
        env_state, running, total = episodes
        action = jnp.argmax(q_values(params, env_state.cell), axis=1)
        env_state, reward, terminated, truncated = step(args, maze, env_state, action, noise)
        return env_state, running & ~(terminated | truncated), total + jnp.where(running, reward, 0)

    evaluate_step = jit(replace(args, num_seeds=1), evaluate_step, ())

    def episodes_of(params, seed):
        rng, n = np.random.default_rng([seed, 1]), args.eval_episodes
        start = EnvState(np.full(n, maze.start, np.int32), np.zeros(n, np.int32))
        episodes = start, np.ones(n, bool), np.zeros(n, np.float32)
        while np.any(episodes[1]):
            episodes = evaluate_step(params, episodes, rng.random(n, np.float32))
        return np.asarray(episodes[2])

    returns = [episodes_of(one_agent(args, params, i), args.seed + i) for i in range(args.num_seeds)]
    return np.stack(returns) if args.num_seeds > 1 else returns[0]


def judge(args, params, visits, exact):
    """How close one agent comes to Q*: a dict that goes into summary.json.

    error_visited and error_all: the largest error over the pairs that were visited, and over all pairs of reachable cells.
    optimal_cells of reachable_cells: where the greedy action is a best one; regret: the most that it loses in any of them.
    """
    (q,), cells = params.values(), read_board(args.board).reachable
    regret = exact.max(axis=1) - exact[np.arange(len(exact)), q.argmax(axis=1)]
    return {
        "error_visited": float(largest_error(params, exact, visits > 0)),
        "error_all": float(largest_error(params, exact, cells[:, None])),
        "reachable_cells": int(cells.sum()),
        "optimal_cells": int((regret[cells] < 1e-5).sum()),  # value iteration in float32 is that exact
        "regret": float(regret[cells].max()),
    }


# --------------------------------------------------------------------------------------------------------- Command line
# Not the lesson: checks, progress, saving, drawing.


def check(args):
    """Raise ValueError, in one line, on settings that cannot work."""
    rules = [
        (args.num_seeds >= 1, "num_seeds must be at least 1"),
        (0 <= args.seed <= 2**31 - args.num_seeds, "seed must be at least 0, and every seed below 2^31"),
        (0 <= args.total_timesteps <= MOST_STEPS, f"total_timesteps must be between 0 and {MOST_STEPS:,}"),
        (0 <= args.slip_prob <= 1, "slip_prob must be between 0 and 1"),
        (args.max_episode_steps >= 1, "max_episode_steps must be at least 1"),
        (0 < args.learning_rate <= 1, "learning_rate must be above 0 and at most 1"),
        (args.halving_visits > 0, "halving_visits must be above 0"),
        (0 <= args.gamma <= 1, "gamma must be between 0 and 1"),
        (0 <= args.start_e <= 1 and 0 <= args.end_e <= 1, "start_e and end_e must be between 0 and 1"),
        (0 < args.exploration_fraction <= 1, "exploration_fraction must be above 0 and at most 1"),
        (args.eval_episodes >= 1, "eval_episodes must be at least 1"),
    ]
    enforce(args, rules)


def enforce(args, rules):
    """Raise ValueError at the first of the (holds, message) that does not hold, with the values of the flags it names."""
    for holds, message in rules:
        if not holds:
            names = [name for name in asdict(args) if name in message.replace(",", "").split()]
            raise ValueError(f"{message} ({', '.join(f'{name} is {getattr(args, name)}' for name in names)})")


FILES = ("model.npz", "returns.csv", "curve.png", "summary.json")


def claim_output_dir(path):
    """Make the folder, or raise ValueError where a run would overwrite another or could not be kept."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--output-dir draws curve.png and needs matplotlib: pip install matplotlib")
    for name in FILES:
        if os.path.exists(os.path.join(path, name)):
            raise ValueError(f"{path} already holds a run ({name}); name another --output-dir")
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make --output-dir {path}: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise ValueError(f"cannot write to --output-dir {path}")


def load_model(path):
    """The parameter dict that a run kept as model.npz. Raises ValueError if the file is missing, damaged or no npz."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise ValueError(f"there is no model file {path}") from None
    except Exception as error:  # np.load raises half a dozen kinds: zip, zlib, EOF, value, key, attribute
        raise ValueError(f"{path} is not a whole npz file of arrays: {error}") from None


def check_model(params, expected, path):
    """Raise ValueError if the arrays do not have the expected shapes, a dict like params."""
    found = {name: array.shape for name, array in params.items()}
    if found != expected:
        raise ValueError(f"{path} holds {found}, but these settings ask for {expected}")
    if not all(array.dtype == np.float32 and np.isfinite(array).all() for array in params.values()):
        raise ValueError(f"{path} must hold finite float32 numbers")


def model_shapes(args):
    """The shape of every array of model.npz under these settings."""
    seeds = (args.num_seeds,) if args.num_seeds > 1 else ()
    arrays = jax.eval_shape(lambda: init_params(args.method, layer_sizes(args)))
    return {name: seeds + array.shape for name, array in arrays.items()}


class Progress:
    """Prints a line once a second and at every quarter of the run; raises KeyboardInterrupt there after a Ctrl-C."""

    def __init__(self, args):
        self.args = args
        self.stop = False
        self.printed = self.quarters = 0

    def on_interrupt(self, *_):
        """The first Ctrl-C waits for the next report; the next one is Python's own."""
        self.stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __call__(self, env_steps, seconds, windows, error):
        args = self.args
        quarter = 4 * env_steps // args.total_timesteps
        if seconds - self.printed >= 1 or quarter > self.quarters:
            self.printed, self.quarters = seconds, quarter
            speed = env_steps / seconds
            epsilon = linear_schedule(
                args.start_e, args.end_e, np.float32(env_steps / (args.exploration_fraction * args.total_timesteps))
            )
            count = windows[:, 3]
            recent = f"{np.nansum(windows[:, 1] * count) / count.sum():.2f}" if count.any() else "none yet"
            print(
                f"{env_steps:>11,} of {args.total_timesteps:,} steps {env_steps / args.total_timesteps:4.0%}"
                f"  recent return {recent}  error {error.max():.1e}  epsilon {epsilon:.2f}"
                f"  {speed * args.num_seeds:,.0f} steps/s  {(args.total_timesteps - env_steps) / speed:.0f} s left",
                flush=True,
            )
        if self.stop:
            raise KeyboardInterrupt


def write_whole(path, write):
    """Call write(binary file) so that `path` ends up with all of it or stays as it was."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def draw_curve(file, windows, title):
    """Mean return of the training episodes, and largest error of a visited pair, over environment steps; a line a seed."""
    from matplotlib.figure import Figure  # only here: importing it takes as long as training

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots(2, sharex=True)
    for seed in np.unique(windows[:, 2]):
        steps, returns, _, _, error = windows[windows[:, 2] == seed].T
        axes[0].plot(steps, returns, linewidth=1)
        axes[1].plot(steps, np.maximum(error, 1e-8), linewidth=1)
    axes[0].set(ylabel="mean return while exploring", title=title)
    axes[1].set(yscale="log", ylabel="largest |Q - Q*|, visited pairs", xlabel="environment steps")
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, format="png", dpi=150)


def save(args, result, summary):
    """Write the four files of a run into output_dir, summary.json last."""

    def returns_csv(file):
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.writer(text)
        # Millions of episodes end: a row is the mean over a window of steps.
        writer.writerow(["env_step", "episode_return", "seed", "episodes", "error"])
        for step, mean, seed, count, error in result.windows:
            writer.writerow((int(step), f"{mean:g}" if count else "", int(seed), int(count), f"{error:g}"))
        text.detach()

    title = f"Q-learning in the maze {args.board}, {args.num_seeds} seed{'s' * (args.num_seeds > 1)}"
    writers = (
        lambda file: np.savez(file, **result.params),
        returns_csv,
        lambda file: draw_curve(file, result.windows, title),
        lambda file: file.write(json.dumps(summary, indent=2).encode()),
    )
    for name, write in zip(FILES, writers, strict=True):
        write_whole(os.path.join(args.output_dir, name), write)


def summarize(args, result, returns):
    """What summary.json holds; returns (K, eval_episodes). A seed is solved where its greedy policy is optimal."""
    agents = [one_agent(args, (result.params, result.visits), i) for i in range(args.num_seeds)]
    verdicts = [judge(args, params, visits, result.exact) for params, visits in agents]
    mean, std, least = returns.mean(axis=1), returns.std(axis=1), returns.min(axis=1)
    return {
        "script": os.path.basename(__file__),
        "args": asdict(args),
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (jax, optax, np, tyro)},
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "env_steps": result.env_steps,
        "interrupted": result.interrupted,
        "compile_seconds": result.compile_seconds,
        "train_seconds": result.train_seconds,
        "steps_per_second": args.num_seeds * result.env_steps / result.train_seconds,
        "seeds": [
            {
                "seed": args.seed + i,
                "eval_return_mean": float(mean[i]),
                "eval_return_std": float(std[i]),
                "eval_return_min": float(least[i]),
                "eval_episodes": args.eval_episodes,
                "solved": verdicts[i]["optimal_cells"] == verdicts[i]["reachable_cells"],
            }
            | verdicts[i]
            for i in range(args.num_seeds)
        ],
    }


def print_summary(summary):
    seeds = summary["seeds"]
    means = np.array([seed["eval_return_mean"] for seed in seeds])
    solved = sum(seed["solved"] for seed in seeds)
    worst = max(seeds, key=lambda seed: seed["regret"])
    if summary["env_steps"]:
        print(
            f"trained {summary['env_steps']:,} steps in {summary['train_seconds']:.2f} s"
            f" ({summary['steps_per_second']:,.0f} steps/s, compiling {summary['compile_seconds']:.2f} s before)"
        )
        visited, everywhere = (max(seed[name] for seed in seeds) for name in ("error_visited", "error_all"))
        print(f"largest |Q - Q*|: {visited:.1e} over visited pairs, {everywhere:.1e} over all pairs of reachable cells")
    if len(seeds) == 1:
        one = seeds[0]
        print(
            f"evaluation, {one['eval_episodes']} greedy episodes: mean {means[0]:.2f}, standard deviation"
            f" {one['eval_return_std']:.2f}, worst {one['eval_return_min']:.0f}"
        )
    else:
        interval = 1.96 * means.std(ddof=1) / math.sqrt(len(means))
        print(
            f"evaluation, {seeds[0]['eval_episodes']} greedy episodes each: mean {means.mean():.2f}, 95 % interval"
            f" {means.mean() - interval:.2f} to {means.mean() + interval:.2f}, worst seed {means.min():.2f}"
        )
        print(f"solved {solved} of {len(seeds)} (an optimal greedy policy); the worst:")
    print(
        f"the greedy policy is optimal in {worst['optimal_cells']} of {worst['reachable_cells']} reachable cells"
        + (f" and loses at most {worst['regret']:.2g} in the others" if not worst["solved"] else "; solved")
    )


def print_maze(args, params, exact):
    """The board, the greedy policy as arrows on it, and the Q table of one agent; `!` where an arrow is no best action."""
    maze, (q,) = read_board(args.board), params.values()
    arrows = "←→↑↓" if (sys.stdout.encoding or "").lower().startswith("utf") else "<>^v"
    best = exact.max(axis=1) - exact[np.arange(len(q)), q.argmax(axis=1)] < 1e-5
    cells = "".join(maze.rows)
    policy = [arrows[q[s].argmax()] + " !"[not best[s]] if maze.reachable[s] else cells[s] + " " for s in range(len(cells))]
    width = len(maze.rows[0])
    print(f"{'board':<{max(2 * width, 5)}}   greedy policy")
    for i, row in enumerate(maze.rows):
        print(f"{' '.join(row):<{max(2 * width, 5)}}   {' '.join(policy[i * width : (i + 1) * width])}".rstrip())
    print("\nQ(s, a)     left    right       up     down")
    for s in np.flatnonzero(maze.reachable):
        print(f"{cells[s]} {s // width:>2},{s % width:>2} " + "".join(f"{value:9.4f}" for value in q[s]))
    print()


def main(args):
    """Run the script. Returns the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    gc.freeze()  # the collector would search all imported modules again and again: 0.3 s of the whole command
    try:
        args = fill_in(args)
        check(args)
        params = load_model(args.load_model) if args.load_model else None
        if args.num_seeds > 1:  # one CPU device per core; on a machine with GPUs JAX uses those, and this changes nothing
            jax.config.update("jax_num_cpu_devices", min(os.cpu_count(), args.num_seeds))
        if params is not None:
            check_model(params, model_shapes(args), args.load_model)
        if args.output_dir:
            claim_output_dir(args.output_dir)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    progress = Progress(args)
    signal.signal(signal.SIGINT, progress.on_interrupt)
    try:
        result = train(args, params, progress)
        if result.interrupted:
            print(f"interrupted after {result.env_steps:,} of {args.total_timesteps:,} steps", flush=True)
        summary = summarize(args, result, evaluate(args, result.params).reshape(args.num_seeds, -1))
        print_maze(args, one_agent(args, result.params, 0), result.exact)
        print_summary(summary)
        if args.output_dir:
            save(args, result, summary)
            print(f"kept in {args.output_dir}: {', '.join(FILES)}")
        return 130 if result.interrupted else 0
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:  # a second Ctrl-C
        print("interrupted again: stopped at once", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))

# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,!=0.11.1", "optax>=0.2.8", "numpy>=2.4", "tyro>=1.0.17", "matplotlib>=3.11"]
# ///
"""DQN on CartPole-v1 with everything compiled: environment, replay buffer, exploration and learning in one JAX program.

What it teaches: an agent is a few arrays and a few pure functions over them. Write those, and `jax.jit` makes the whole
training loop one fast program, `jax.vmap` turns one agent into many, and a sharding lays them over all devices.

Deep Q-learning (Mnih et al. 2015, https://doi.org/10.1038/nature14236) keeps a network Q(s, a; w), the online network, an
older copy w' of its weights, the target network (here it follows slowly), and a replay buffer of past steps (s, a, r, s').
It lowers the mean over a random batch of

    (y - Q(s, a; w))^2        with the target  y = r + gamma * max_a' Q(s', a'; w'),   y = r where s' is terminal.

    python dqn_cartpole_jax.py --seed 1                    one agent
    python dqn_cartpole_jax.py --num-seeds 16              sixteen agents at once, over all cores or GPUs
    python dqn_cartpole_jax.py --output-dir runs/1         keep model.npz, returns.csv, curve.png and summary.json
    python dqn_cartpole_jax.py --load-model runs/1/model.npz --total-timesteps 0        evaluate a kept model

Measured by tests/benchmark.py on two cores of an AMD EPYC (Zen 5), jax 0.10.2: of seeds 2000 to 2099, on which nothing was
tuned, 99 were solved (mean of 100 greedy episodes of the last weights at 475 or more), mean 498.8 of 500, worst 398.1.
Training takes 0.20 s a seed on one core, compiling before it 1.89 s; 16 seeds at once take 1.38 s on two cores, 2.77 s on
one.

What the defaults do beyond the paper, the flag that turns each off, and how many of 20 agents are solved without it
(seeds 1 to 20, of which the defaults solve 20, with a mean of 500.0):

    --n-step 1          1   targets sum ten rewards, then bootstrap (Sutton 1988), so that news of a fall travels fast
    --no-scale-obs     12   observations are divided by their natural size
    --no-anneal-lr     18   the step size falls linearly to 0, so that the last weights are also good ones
    --num-envs 1       20   64 environments step side by side between two updates; one alone takes twice as long
    --tau 1            20   the target network moves 5 % of the way after every update instead of being copied now and then
                            (measured with --target-network-frequency 512)
    (no flag)               Adam and the plain squared error, instead of RMSProp and clipped errors

Double DQN (van Hasselt et al. 2016, https://arxiv.org/abs/1509.06461) is off, as in the paper: --double-dqn.

Letters in shapes: N environments, B batch, A actions, O observation, n steps of an n-step target, K seeds.
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
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

# ------------------------------------------------------------------------------------------------------------ Arguments


@dataclass(frozen=True)
class Args:
    """DQN on CartPole-v1. Every period and every schedule counts environment steps, summed over the environments."""

    seed: int = 1
    """seed of weights, resets, actions and batches: the same seed gives the same bits on the same machine"""
    num_seeds: int = 1
    """train this many agents at once, with seeds seed, seed + 1, ..."""
    total_timesteps: int = 256_000
    """environment steps of the whole run (a little less where they do not divide into equal chunks)"""
    num_envs: int = 64
    """environments that step in parallel"""
    train_frequency: int = 64
    """environment steps between updates; a multiple of num_envs"""
    gradient_steps: int = 1
    """updates each time"""
    learning_starts: int = 6_400
    """environment steps before the first update; n_step * num_envs at least"""
    buffer_size: int = 256_000
    """steps that the replay buffer holds; a multiple of num_envs. As large as the run: forgetting early mistakes hurts"""
    batch_size: int = 64
    """steps drawn from the buffer for one update"""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """units of each hidden layer"""
    learning_rate: float = 5e-3
    """Adam's step size"""
    anneal_lr: bool = True
    """let the step size fall linearly to 0 at the end of the run"""
    gamma: float = 0.99
    """discount per step"""
    n_step: int = 10
    """discounted rewards summed before the target adds Q of the state reached; 1 is the paper's"""
    tau: float = 0.05
    """share of the online weights that one target update mixes in; 1 copies them"""
    target_network_frequency: int = 64
    """environment steps between target updates"""
    double_dqn: bool = False
    """let the online network choose the target's action and the target network value it"""
    start_e: float = 1.0
    """epsilon, the share of random actions, at the start"""
    end_e: float = 0.15
    """epsilon at the end; high, so that the buffer also shows how to recover"""
    exploration_fraction: float = 0.5
    """share of total_timesteps over which epsilon falls linearly from start_e to end_e"""
    scale_obs: bool = True
    """divide observations by their natural size before the network sees them"""
    eval_episodes: int = 100
    """greedy episodes at the end"""
    output_dir: str | None = None
    """keep the run here: model.npz, returns.csv, curve.png, summary.json"""
    load_model: str | None = None
    """start from the weights of this model.npz; with --total-timesteps 0 evaluate them"""


# ---------------------------------------------------------------------------------------------------------- Environment
# CartPole-v1 as gymnasium.make builds it: https://gymnasium.farama.org/environments/classic_control/cart_pole/
# For your own environment change the five names and two functions of this section. What follows relies on this much: the state
# is the observation and the time, a step draws no random numbers, and a reset draws one per entry of the observation.

OBS_SIZE = 4  # cart position (m) and velocity (m/s), pole angle (rad) and angular velocity (rad/s)
ACTIONS = 2  # push left, push right
MAX_STEPS = 500  # the time limit, which truncates
SOLVED_RETURN = 475.0  # Gymnasium's reward threshold: a mean over 100 episodes
OBS_SCALE = np.array([2.4, 2.0, 0.2095, 2.0], np.float32)  # where position and angle end the episode; usual velocities


class EnvState(NamedTuple):
    obs: jax.Array  # (N, O)
    time: jax.Array  # (N,) steps since the reset


def reset(noise):
    """Start states, each number uniform in +-0.05, from noise (N, O) uniform in [0, 1)."""
    return EnvState(0.1 * noise - 0.05, np.zeros(len(noise), np.int32))


def step(state, action):
    """One step of N carts, 20 ms of Euler integration (Barto, Sutton and Anderson 1983; Florian 2007).

    Takes action (N,) of 0 or 1; returns the next EnvState, reward (N,), terminated (N,) and truncated (N,). It does not
    reset: the next observation of an ended episode is the one it ended with.
    """
    _, x_dot, theta, theta_dot = state.obs.T
    force = jnp.where(action == 1, 10.0, -10.0)  # N; cart 1 kg, pole 0.1 kg with its centre at 0.5 m
    sin, cos = jnp.sin(theta), jnp.cos(theta)
    push = (force + 0.1 * 0.5 * theta_dot**2 * sin) / 1.1
    theta_acc = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    x_acc = push - 0.1 * 0.5 * theta_acc * cos / 1.1
    obs = state.obs + 0.02 * jnp.stack([x_dot, x_acc, theta_dot, theta_acc], axis=1)
    terminated = (jnp.abs(obs[:, 0]) > 2.4) | (jnp.abs(obs[:, 2]) > math.radians(12))
    reward = jnp.ones(len(obs))  # on the last step too
    return EnvState(obs, state.time + 1), reward, terminated, state.time + 1 >= MAX_STEPS


# ------------------------------------------------------------------------------------------------------------ Q-network


def init_params(key, sizes):
    """Weights of a multilayer perceptron as a dict w0, b0, w1, ...: uniform after He et al. 2015 (eq. 10), biases 0.

    sizes: units of every layer, the observation first, the actions last.
    """
    counts = [n_in * n_out for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True)]
    noise = jax.random.uniform(key, (sum(counts),), minval=-1)  # one draw: compiling a draw for every layer took 0.15 s more
    params = {}
    for i, weights in enumerate(jnp.split(noise, np.cumsum(counts)[:-1])):
        params[f"w{i}"] = math.sqrt(6 / sizes[i]) * weights.reshape(sizes[i], sizes[i + 1])
        params[f"b{i}"] = jnp.zeros(sizes[i + 1])
    return params


def q_values(params, obs):
    """Q(s, a) of every action: obs (B, O) -> (B, A). ReLU between the layers, none after the last."""
    last = len(params) // 2 - 1
    for i in range(last):
        obs = jnp.maximum(obs @ params[f"w{i}"] + params[f"b{i}"], 0)
    return obs @ params[f"w{last}"] + params[f"b{last}"]


# -------------------------------------------------------------------------------------------------------- Replay buffer
# A ring: environment step t lies at t % buffer_size. The N environments step together, so the next step of the same
# environment lies N places on.


class Transition(NamedTuple):
    obs: jax.Array  # (..., O)
    action: jax.Array  # (...,)
    reward: jax.Array  # (...,)
    next_obs: jax.Array  # (..., O) from before the reset
    terminated: jax.Array  # (...,) the episode reached an end: nothing follows, its value is 0
    truncated: jax.Array  # (...,) the time limit cut the episode: the value goes on


class Batch(NamedTuple):
    obs: jax.Array  # (B, O)
    action: jax.Array  # (B,)
    reward: jax.Array  # (B,) discounted sum of up to n rewards
    discount: jax.Array  # (B,) what the value of next_obs counts: gamma^(number of rewards), 0 where terminated
    next_obs: jax.Array  # (B, O)


def add(buffer, t, transition):
    """Write the N transitions of environment steps t .. t + N - 1 over the oldest ones; in place, once compiled."""
    start = t % len(buffer.action)
    return jax.tree.map(lambda ring, new: jax.lax.dynamic_update_slice_in_dim(ring, new, start, 0), buffer, transition)


def sample(buffer, t, noise, num_envs, n_step, gamma):
    """Draw a Batch uniformly, with replacement, from a buffer filled up to environment step t; noise (B,) in [0, 1).

    Each element is a run of n_step steps of one environment, cut short where its episode ends; the later actions of a run are
    those that were taken, whether greedy or not.
    """
    size = len(buffer.action)
    filled = jnp.minimum(t, size)
    # A run starts n - 1 joint steps of all environments before the newest at the latest, or it would reach into the oldest.
    first = t - filled + (noise * (filled - (n_step - 1) * num_envs)).astype(jnp.int32)
    run = (first[:, None] + num_envs * np.arange(n_step)) % size  # (B, n)
    count = np.arange(1, n_step + 1)
    ended = buffer.terminated[run] | buffer.truncated[run]
    length = jnp.min(jnp.where(ended, count, n_step), axis=1)
    discounts = np.float32(gamma) ** (count - 1)
    reward = jnp.sum(jnp.where(count <= length[:, None], discounts * buffer.reward[run], 0), axis=1)
    last = (first + num_envs * (length - 1)) % size
    discount = jnp.where(buffer.terminated[last], 0, np.float32(gamma) ** length)
    return Batch(buffer.obs[run[:, 0]], buffer.action[run[:, 0]], reward, discount, buffer.next_obs[last])


# ------------------------------------------------------------------------------------------------------------- Learning

optimizer = optax.scale_by_adam()  # gives the direction; the step size is applied in update()


def linear_schedule(start, end, fraction):
    """From start to end while fraction, a NumPy or JAX number, goes from 0 to 1, and end from there on."""
    return start + (end - start) * fraction.clip(max=1)


def select_action(q, action):
    """Q(s, a) of one action per row: (B, A), (B,) -> (B,)."""
    return jnp.take_along_axis(q, action[:, None], axis=1)[:, 0]


def td_target(params, target_params, batch, double_dqn):
    """What the network should have said: (B,)."""
    next_q = q_values(target_params, batch.next_obs)
    choice = q_values(params, batch.next_obs) if double_dqn else next_q
    best = jnp.argmax(choice, axis=1)
    # y = r + gamma max_a' Q(s', a'; w')    with n steps: y = r_1 + ... + gamma^(n-1) r_n + gamma^n max_a' Q(s_n, a'; w')
    # Double DQN (van Hasselt et al. 2016) takes Q(s_n, a*; w') with a* = argmax_a' Q(s_n, a'; w) for that maximum.
    return batch.reward + batch.discount * select_action(next_q, best)


def loss_fn(params, batch, target):
    """Mean squared error of Q(s, a; w) against the target."""
    return jnp.mean((target - select_action(q_values(params, batch.obs), batch.action)) ** 2)


def update(params, target_params, opt_state, batch, learning_rate, double_dqn):
    """One gradient step. Returns the new params, the new opt_state and the loss."""
    target = td_target(params, target_params, batch, double_dqn)  # outside loss_fn: no gradient flows through it
    loss, grads = jax.value_and_grad(loss_fn)(params, batch, target)
    direction, opt_state = optimizer.update(grads, opt_state)
    params = jax.tree.map(lambda p, d: p - learning_rate * d, params, direction)
    return params, opt_state, loss


# ------------------------------------------------------------------------------------------------------------- Training


class Agent(NamedTuple):
    """All that changes while an agent trains."""

    key: jax.Array
    params: dict
    target_params: dict
    opt_state: tuple
    env_state: EnvState
    episode_return: jax.Array  # (N,) of the running episodes
    buffer: Transition  # arrays of length buffer_size


class Result(NamedTuple):
    params: dict  # with num_seeds > 1 every array has a first axis K
    env_steps: int
    episodes: np.ndarray  # (number of ended episodes, 3): env step, return, seed
    compile_seconds: float
    train_seconds: float
    interrupted: bool


def layer_sizes(args):
    """Units of every layer, from the observation to the actions."""
    return (OBS_SIZE, *args.hidden_sizes, ACTIONS)


def init_agent(args, seed):
    """A new Agent from an integer seed: three subkeys of one root key, each for one use."""
    key, params_key, reset_key = jax.random.split(jax.random.key(seed), 3)
    params = init_params(params_key, layer_sizes(args))
    env_state = reset(jax.random.uniform(reset_key, (args.num_envs, OBS_SIZE)))
    size = args.buffer_size
    buffer = Transition(
        obs=jnp.zeros((size, OBS_SIZE)),
        action=jnp.zeros(size, jnp.int32),
        reward=jnp.zeros(size),
        next_obs=jnp.zeros((size, OBS_SIZE)),
        terminated=jnp.zeros(size, bool),
        truncated=jnp.zeros(size, bool),
    )
    return Agent(key, params, params, optimizer.init(params), env_state, jnp.zeros(args.num_envs), buffer)


def scale(args, obs):
    """The observation as network and buffer see it."""
    return obs / OBS_SCALE if args.scale_obs else obs


def act_and_store(args, agent, t, noise):
    """All N environments take one epsilon-greedy step, counted t .. t + N - 1, and the buffer keeps it.

    noise: (N, 2 + O) uniform in [0, 1): explore or not, which random action, where a new episode starts.
    Returns the Agent and the returns (N,) of the episodes that ended, nan for those that go on.
    """
    epsilon = linear_schedule(args.start_e, args.end_e, t / (args.exploration_fraction * args.total_timesteps))
    obs = scale(args, agent.env_state.obs)
    greedy = jnp.argmax(q_values(agent.params, obs), axis=1)
    random = (noise[:, 1] * ACTIONS).astype(jnp.int32)
    action = jnp.where(noise[:, 0] < epsilon, random, greedy)

    env_state, reward, terminated, truncated = step(agent.env_state, action)
    transition = Transition(obs, action, reward, scale(args, env_state.obs), terminated, truncated)

    ended = terminated | truncated
    fresh = reset(noise[:, 2:])
    env_state = EnvState(jnp.where(ended[:, None], fresh.obs, env_state.obs), jnp.where(ended, 0, env_state.time))
    episode_return = agent.episode_return + reward
    agent = agent._replace(
        env_state=env_state,
        episode_return=jnp.where(ended, 0, episode_return),
        buffer=add(agent.buffer, t, transition),
    )
    return agent, jnp.where(ended, episode_return, jnp.nan)


def learn(args, agent, t, noise):
    """gradient_steps updates and, if it is due, a target update, at environment step t; noise (gradient_steps, B)."""
    remaining = 1 - t / args.total_timesteps if args.anneal_lr else 1.0
    learning_rate = args.learning_rate * remaining

    def one_update(i, carry):
        params, opt_state, _ = carry
        batch = sample(agent.buffer, t, noise[i], args.num_envs, args.n_step, args.gamma)
        return update(params, agent.target_params, opt_state, batch, learning_rate, args.double_dqn)

    # `jax.lax.fori_loop(0, n, f, carry)` is `for i in range(n): carry = f(i, carry)`, compiled. Before learning_starts it runs
    # zero times: a branch, jax.lax.cond, would copy the buffer.
    updates = jnp.where(t >= args.learning_starts, args.gradient_steps, 0)
    carry = (agent.params, agent.opt_state, jnp.float32(0))
    params, opt_state, loss = jax.lax.fori_loop(0, updates, one_update, carry)

    due = t % args.target_network_frequency < args.train_frequency  # a multiple of it lies in the steps since the last call
    # w' <- w' + tau (w - w')
    mixed = jax.tree.map(lambda old, new: (1 - args.tau) * old + args.tau * new, agent.target_params, params)
    target_params = jax.tree.map(lambda old, new: jnp.where(due, new, old), agent.target_params, mixed)
    return agent._replace(params=params, target_params=target_params, opt_state=opt_state), loss


def noise_sizes(args):
    """How many random numbers one period takes, acting and learning."""
    return args.train_frequency * (2 + OBS_SIZE), args.gradient_steps * args.batch_size


def train_chunk(args, periods, agent, first_step):
    """`periods` times: train_frequency environment steps, then learn. The clock starts at first_step, for all agents the same.

    `jax.lax.scan(f, state, xs)` is `for x in xs: state, y = f(state, x)`, compiled, with the ys stacked.
    Returns the Agent, the episode returns (periods, train_frequency) with nan for "none", and the losses (periods,).
    """
    key, chunk_key = jax.random.split(agent.key)
    acting, learning = noise_sizes(args)
    # One draw for the whole chunk: each draw in the code takes 70 ms to compile, and one in the loop would be run every period.
    noise = jax.random.uniform(chunk_key, (periods, acting + learning))

    def period(agent, inputs):
        t, noise = inputs
        act_noise = noise[:acting].reshape(-1, args.num_envs, 2 + OBS_SIZE)
        learn_noise = noise[acting:].reshape(args.gradient_steps, args.batch_size)

        def joint_step(i, carry):
            agent, returns = carry
            agent, ended = act_and_store(args, agent, t + i * args.num_envs, act_noise[i])
            return agent, returns.at[i].set(ended)

        # The bound is computed from t so that XLA cannot unroll a loop of one step: it would fuse the write into the buffer
        # with the reads that follow, and copy the whole buffer each time.
        steps = (t + args.train_frequency) // args.num_envs - t // args.num_envs
        carry = (agent, jnp.zeros((len(act_noise), args.num_envs)))
        agent, returns = jax.lax.fori_loop(0, steps, joint_step, carry)
        agent, loss = learn(args, agent, t + args.train_frequency, learn_noise)
        return agent, (returns.reshape(-1), loss)

    clock = first_step + args.train_frequency * jnp.arange(periods)
    agent, (returns, losses) = jax.lax.scan(period, agent._replace(key=key), (clock, noise))
    return agent, returns, losses


def chunking(args):
    """Periods per chunk and number of chunks. A chunk draws at most 2^18 random numbers (1 MB), or those of one period."""
    periods = args.total_timesteps // args.train_frequency
    fewest = min(max(1, -(-periods * sum(noise_sizes(args)) // 2**18)), max(periods, 1))
    chunks = max(range(fewest, 2 * fewest), key=lambda c: periods // c * c)  # the number that leaves the fewest periods over
    return periods // chunks, chunks


def jit(args, function, in_axes, **options):
    """jax.jit of a function of one agent; with num_seeds > 1 of K agents, along axis 0 where in_axes says 0."""
    if args.num_seeds > 1:
        function = jax.vmap(function, in_axes)
    # Level 1 of 3 nearly halves XLA's compile time on the CPU (1.0 to 0.55 s) and leaves these small loops as fast.
    cpu_options = {"xla_backend_optimization_level": 1}
    return jax.jit(function, compiler_options=cpu_options if jax.default_backend() == "cpu" else None, **options)


def train(args, params=None, report=lambda env_steps, seconds, episodes, loss: None):
    """Train num_seeds agents and return a Result.

    params: start from these weights instead of random ones. report: called between chunks with the environment steps done,
    the seconds they took, the chunk's ended episodes (rows of env step, return, seed) and its last loss (K,). A
    KeyboardInterrupt, from there or from the user, ends the training early and is no error. Raises FloatingPointError once
    a loss is not finite.
    """
    started = time.perf_counter()
    seeds, sharding = np.uint32(args.seed), None
    if args.num_seeds > 1:
        devices = jax.devices()[: args.num_seeds]
        # Every device gets equally many agents; what is too many trains along and is dropped at the end.
        padded = -(-args.num_seeds // len(devices)) * len(devices)
        sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(devices, ("seed",)), jax.sharding.PartitionSpec("seed"))
        seeds = jax.device_put(args.seed + np.arange(padded, dtype=np.uint32), sharding)
    agent = jit(args, partial(init_agent, args), 0, out_shardings=sharding)(seeds)
    if params is not None:
        copy = partial(jax.tree.map, lambda old, new: jax.device_put(np.resize(new, old.shape), old.sharding), agent.params)
        agent = agent._replace(params=copy(params), target_params=copy(params))

    periods, chunks = chunking(args)
    run_chunk = jit(args, partial(train_chunk, args, periods), (0, None), out_shardings=sharding, donate_argnums=0)
    if periods:
        run_chunk = run_chunk.lower(agent, np.int32(0)).compile()
    compiled = time.perf_counter()

    env_steps, episodes, interrupted = 0, [np.empty((0, 3))], False
    try:
        for _ in range(chunks if periods else 0):
            agent, returns, losses = run_chunk(agent, np.int32(env_steps))
            returns = np.asarray(returns).reshape(-1, periods * args.train_frequency)[: args.num_seeds]
            losses = np.asarray(losses).reshape(-1, periods)[: args.num_seeds]
            which, when = np.nonzero(~np.isnan(returns))
            episodes.append(np.stack([env_steps + when + 1, returns[which, when], args.seed + which], axis=1))
            env_steps += returns.shape[1]
            if not np.isfinite(losses).all():
                raise FloatingPointError(f"the loss is not finite after {env_steps:,} steps; try a smaller learning_rate")
            report(env_steps, time.perf_counter() - compiled, episodes[-1], losses[:, -1])
    except KeyboardInterrupt:
        interrupted = True
    params = jax.device_get(agent.params)
    if args.num_seeds > 1:
        params = {name: values[: args.num_seeds] for name, values in params.items()}
    finished = time.perf_counter()
    return Result(params, env_steps, np.concatenate(episodes), compiled - started, finished - compiled, interrupted)


# ----------------------------------------------------------------------------------------------------------- Evaluation


def evaluate(args, params):
    """Returns of eval_episodes greedy episodes under the environment's own rules, from starts no training saw.

    Gives (eval_episodes,), or (K, eval_episodes) with num_seeds > 1. Nothing here is mixed with the training returns.
    """

    def evaluate_step(params, episodes):
        env_state, running, total = episodes
        action = jnp.argmax(q_values(params, scale(args, env_state.obs)), axis=1)
        env_state, reward, terminated, truncated = step(env_state, action)
        return env_state, running & ~(terminated | truncated), total + jnp.where(running, reward, 0)

    def start(seed):
        noise = np.random.default_rng([seed, 1]).random((args.eval_episodes, OBS_SIZE), dtype=np.float32)
        return reset(noise), np.ones(args.eval_episodes, bool), np.zeros(args.eval_episodes, np.float32)

    episodes = start(args.seed)
    if args.num_seeds > 1:
        episodes = jax.tree.map(lambda *x: np.stack(x), *(start(args.seed + i) for i in range(args.num_seeds)))
    # A Python loop: 500 calls take 10 ms, compiling the loop as a scan took 70 ms longer than compiling its body.
    evaluate_step = jit(args, evaluate_step, 0)
    for _ in range(MAX_STEPS):
        episodes = evaluate_step(params, episodes)
    return np.asarray(episodes[2])


# --------------------------------------------------------------------------------------------------------- Command line
# Not the lesson: checks, progress, saving, drawing.


def check(args):
    """Raise ValueError, in one line, on settings that cannot work."""
    steps = args.num_envs
    rules = [
        (args.num_seeds >= 1, "num_seeds must be at least 1"),
        (0 <= args.seed <= 2**31 - args.num_seeds, "seed must be at least 0, and every seed below 2^31"),
        (0 <= args.total_timesteps < 2**31, "total_timesteps must be between 0 and 2^31 - 1"),
        (args.num_envs >= 1, "num_envs must be at least 1"),
        (args.train_frequency >= 1, "train_frequency must be at least 1"),
        (args.train_frequency % max(steps, 1) == 0, "train_frequency must be a multiple of num_envs"),
        (args.gradient_steps >= 1, "gradient_steps must be at least 1"),
        (args.batch_size >= 1, "batch_size must be at least 1"),
        (args.n_step >= 1, "n_step must be at least 1"),
        (args.buffer_size % max(steps, 1) == 0, "buffer_size must be a multiple of num_envs"),
        (args.buffer_size >= args.n_step * steps, "buffer_size must be at least n_step * num_envs"),
        (args.buffer_size >= args.batch_size, "buffer_size must be at least batch_size"),
        (args.buffer_size <= 2**23, "buffer_size must be at most 2^23, beyond which float32 noise misses places"),
        (args.learning_starts >= args.n_step * steps, "learning_starts must be at least n_step * num_envs"),
        (
            args.total_timesteps == 0 or args.learning_starts <= args.total_timesteps,
            "learning_starts must be at most total_timesteps, or nothing is ever learned",
        ),
        (
            args.total_timesteps == 0 or args.total_timesteps >= args.train_frequency,
            "total_timesteps must be 0 or at least train_frequency",
        ),
        (all(size >= 1 for size in args.hidden_sizes), "hidden_sizes must all be at least 1"),
        (0 < args.learning_rate < math.inf, "learning_rate must be above 0 and finite"),
        (0 <= args.gamma <= 1, "gamma must be between 0 and 1"),
        (0 < args.tau <= 1, "tau must be above 0 and at most 1"),
        (args.target_network_frequency >= 1, "target_network_frequency must be at least 1"),
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
    arrays = jax.eval_shape(lambda: init_params(jax.random.key(0), layer_sizes(args)))
    return {name: seeds + array.shape for name, array in arrays.items()}


class Progress:
    """Prints a line once a second and at every quarter of the run; raises KeyboardInterrupt there after a Ctrl-C."""

    def __init__(self, args):
        self.args = args
        self.returns = np.empty(0)
        self.stop = False
        self.printed = self.quarters = 0

    def on_interrupt(self, *_):
        """The first Ctrl-C waits for the next report; the next one is Python's own."""
        self.stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __call__(self, env_steps, seconds, episodes, loss):
        args = self.args
        self.returns = np.concatenate([self.returns, episodes[:, 1]])[-100 * args.num_seeds :]
        quarter = 4 * env_steps // args.total_timesteps
        if seconds - self.printed >= 1 or quarter > self.quarters:
            self.printed, self.quarters = seconds, quarter
            speed = env_steps / seconds
            epsilon = linear_schedule(
                args.start_e, args.end_e, np.float32(env_steps / (args.exploration_fraction * args.total_timesteps))
            )
            recent = f"{self.returns.mean():.1f}" if len(self.returns) else "none yet"
            print(
                f"{env_steps:>11,} of {args.total_timesteps:,} steps {env_steps / args.total_timesteps:4.0%}"
                f"  recent return {recent}  loss {loss.mean():.3g}  epsilon {epsilon:.2f}"
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


def draw_curve(file, episodes, title):
    """Training returns over environment steps: every episode a dot, and each seed's mean of its last 100."""
    from matplotlib.figure import Figure  # only here: importing it takes as long as training

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(episodes[:, 0], episodes[:, 1], ".", markersize=1, color="0.75", rasterized=True)
    for seed in np.unique(episodes[:, 2]):
        steps, returns = episodes[episodes[:, 2] == seed, :2].T
        window = min(100, len(returns))
        mean = np.convolve(returns, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], mean, linewidth=1.5 if len(np.unique(episodes[:, 2])) == 1 else 0.8)
    axes.set(xlabel="environment steps", ylabel="return of training episodes", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, format="png", dpi=150)


def save(args, result, summary):
    """Write the four files of a run into output_dir, summary.json last."""

    def returns_csv(file):
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.writer(text)
        writer.writerow(["env_step", "episode_return", "seed"])
        writer.writerows((int(step), f"{value:g}", int(seed)) for step, value, seed in result.episodes)
        text.detach()

    title = f"DQN on CartPole-v1, {args.num_seeds} seed{'s' * (args.num_seeds > 1)}"
    writers = (
        lambda file: np.savez(file, **result.params),
        returns_csv,
        lambda file: draw_curve(file, result.episodes, title),
        lambda file: file.write(json.dumps(summary, indent=2).encode()),
    )
    for name, write in zip(FILES, writers, strict=True):
        write_whole(os.path.join(args.output_dir, name), write)


def summarize(args, result, returns):
    """What summary.json holds; returns (K, eval_episodes)."""
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
                "solved": bool(mean[i] >= SOLVED_RETURN),
            }
            for i in range(args.num_seeds)
        ],
    }


def print_summary(summary):
    seeds = summary["seeds"]
    means = np.array([seed["eval_return_mean"] for seed in seeds])
    solved = sum(seed["solved"] for seed in seeds)
    if summary["env_steps"]:
        print(
            f"trained {summary['env_steps']:,} steps in {summary['train_seconds']:.2f} s"
            f" ({summary['steps_per_second']:,.0f} steps/s, compiling {summary['compile_seconds']:.2f} s before)"
        )
    if len(seeds) == 1:
        one = seeds[0]
        print(
            f"evaluation, {one['eval_episodes']} greedy episodes: mean {means[0]:.1f}, standard deviation"
            f" {one['eval_return_std']:.1f}, worst {one['eval_return_min']:.0f};"
            f" {'solved' if solved else 'not solved'} (threshold {SOLVED_RETURN:g})"
        )
    else:
        interval = 1.96 * means.std(ddof=1) / math.sqrt(len(means))
        print(
            f"evaluation, {seeds[0]['eval_episodes']} greedy episodes each: solved {solved} of {len(seeds)} (threshold"
            f" {SOLVED_RETURN:g}), mean {means.mean():.1f}, 95 % interval {means.mean() - interval:.1f} to"
            f" {means.mean() + interval:.1f}, worst seed {means.min():.1f}"
        )


def main(args):
    """Run the script. Returns the exit status: 0, 1 for a diverged loss, 2 for bad input, 130 after Ctrl-C."""
    gc.freeze()  # the collector would search all imported modules again and again: 0.3 s of the whole command
    try:
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
        print_summary(summary)
        if args.output_dir:
            save(args, result, summary)
            print(f"kept in {args.output_dir}: {', '.join(FILES)}")
        return 130 if result.interrupted else 0
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:  # a second Ctrl-C
        print("interrupted again: stopped at once", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "jax>=0.10.2,!=0.11.1", "optax>=0.2.8", "gymnasium[box2d]>=1.4.0", "numpy>=2.4", "tyro>=1.0.17", "matplotlib>=3.11",
#     "imageio>=2.38",
# ]
# ///
"""DQN on LunarLander-v3, or on any Gymnasium environment with a flat Box observation and Discrete actions.

What it teaches: the environment is not yours and not JAX. So the replay buffer lives in NumPy, the agent acts with NumPy,
and many updates are one compiled call that JAX runs in the background: while it learns, the agent already takes the next
steps, with the weights from before. The order of both is fixed, so a seed still gives the same bits.

Deep Q-learning (Mnih et al. 2015, https://doi.org/10.1038/nature14236) keeps a network Q(s, a; w), the online network, an
older copy w' of its weights, the target network (here it follows slowly), and a replay buffer of past steps (s, a, r, s').
It lowers the mean over a random batch of

    (y - Q(s, a; w))^2        with the target  y = r + gamma * max_a' Q(s', a'; w'),   y = r where s' is terminal.

    python dqn_lunarlander.py --seed 1                                  one agent
    python dqn_lunarlander.py --output-dir runs/1 --eval-frequency 20000 --capture-video      watch it learn, as GIFs
    python dqn_lunarlander.py --load-model runs/1/model.npz --total-timesteps 0               evaluate a kept model
    python dqn_lunarlander.py --env-id Acrobot-v1                       another environment, with the same settings

Measured by tests/benchmark.py on two cores of an AMD EPYC (Zen 5), jax 0.10.2, 100 greedy episodes of the last, averaged
weights, seeds from 2000 on, on which nothing was tuned: LunarLander-v3 solved (200) by 10 of 10 agents, mean 274.9 ± 3.2,
worst 266.8, in 38.44 s of training; CartPole-v1 5 of 5 (475), worst 496.5; Acrobot-v1 5 of 5 (-100), worst -74.5. At the
settings of CleanRL's dqn_jax.py (one update every 4 steps) 15 thousand steps a second, 36 % of the bare environment's
speed; with 4 updates in one call every 16 steps 22 thousand, 54 %.

What the defaults do beyond the paper, and what some of it is worth: the mean return of 4 to 10 agents with the flag on the
left, and in brackets without it, measured on tuning seeds while the defaults were being chosen:

    --n-step 1               156 (228)   targets sum three rewards, then bootstrap (Sutton 1988)
    --buffer-size 200000     248 (265)   a small buffer soon forgets the crashes of the beginning
    --hidden-sizes 128 128   228 (254)   wide layers,
    --no-layer-norm          244 (254)   each of them normalised
    --gamma 0.995            184 (228)   and 0.98: 222 (248)
    (not measured singly)                Double DQN (van Hasselt et al. 2016), a soft target, a step size that falls to 0,
                                         small rewards, averaged weights, Adam and the plain squared error

Letters in shapes: B batch, A actions, O observation, n steps of an n-step target, G updates in one call.
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
from typing import NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

# ------------------------------------------------------------------------------------------------------------ Arguments


@dataclass(frozen=True)
class Args:
    """DQN on a Gymnasium environment with discrete actions. Every period and every schedule counts environment steps."""

    seed: int = 1
    """seed of weights, resets, actions and batches: the same seed gives the same bits on the same machine"""
    env_id: str = "LunarLander-v3"
    """a Gymnasium environment with a flat Box observation and Discrete actions"""
    total_timesteps: int = 200_000
    """environment steps of the whole run"""
    train_frequency: int = 16
    """environment steps between two calls of the learner"""
    gradient_steps: int = 8
    """updates in each call"""
    learning_starts: int = 2_000
    """environment steps before the first update"""
    buffer_size: int = 50_000
    """steps that the replay buffer holds"""
    batch_size: int = 64
    """steps drawn from the buffer for one update"""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """units of each hidden layer"""
    layer_norm: bool = True
    """normalise each hidden layer before its ReLU (Ba et al. 2016)"""
    learning_rate: float = 1e-3
    """Adam's step size"""
    anneal_lr: bool = True
    """let the step size fall linearly to 0 at the end of the run"""
    gamma: float = 0.99
    """discount per step"""
    n_step: int = 3
    """discounted rewards summed before the target adds Q of the state reached; 1 is the paper's"""
    tau: float = 0.05
    """share of the online weights that one target update mixes in; 1 copies them"""
    target_network_frequency: int = 16
    """environment steps between target updates, which come after a call of the learner, so at most one with each"""
    double_dqn: bool = True
    """let the online network choose the target's action and the target network value it"""
    reward_scale: float = 0.03
    """rewards are multiplied by this for learning, to bring Q near 1; what is reported is the environment's own return"""
    average_rate: float = 0.001
    """share of the online weights that each update mixes into the averaged ones, used for evaluation only; 1: no averaging"""
    start_e: float = 1.0
    """epsilon, the share of random actions, at the start"""
    end_e: float = 0.02
    """epsilon at the end"""
    exploration_fraction: float = 0.2
    """share of total_timesteps over which epsilon falls linearly from start_e to end_e"""
    early_stop: bool = False
    """stop once the mean return of the last 100 training episodes reaches the environment's threshold"""
    eval_frequency: int = 0
    """environment steps between snapshots, model_STEP.npz in output_dir, each evaluated over snapshot_episodes; 0: none"""
    snapshot_episodes: int = 5
    """greedy episodes at a snapshot"""
    capture_video: bool = False
    """render one greedy episode per snapshot and one at the end to GIFs in output_dir"""
    eval_episodes: int = 100
    """greedy episodes at the end"""
    output_dir: str | None = None
    """keep the run here: model.npz, returns.csv, curve.png, summary.json"""
    load_model: str | None = None
    """start from the weights of this model.npz; with --total-timesteps 0 evaluate them"""


# ---------------------------------------------------------------------------------------------------------- Environment


class Environment:
    """A Gymnasium environment, with the return and the length of the running episode. Raises ValueError if it is unsuitable."""

    def __init__(self, args, **options):
        self.env = make_env(args.env_id, **options)
        obs_space, action_space = self.env.observation_space, self.env.action_space
        if not (isinstance(obs_space, gymnasium.spaces.Box) and len(obs_space.shape) == 1):
            raise ValueError(f"env_id must have a flat Box observation, but {args.env_id} has {obs_space}")
        if not isinstance(action_space, gymnasium.spaces.Discrete):
            raise ValueError(f"env_id must have Discrete actions, but {args.env_id} has {action_space}")
        self.obs_size, self.actions = obs_space.shape[0], int(action_space.n)
        self.first_action = int(action_space.start)
        self.solved_return = self.env.spec.reward_threshold  # Gymnasium's; None where it names none

    def reset(self, seed=None):
        """The first observation (O,) of a new episode."""
        self.episode_return, self.episode_length = 0.0, 0
        return self.env.reset(seed=seed)[0].astype(np.float32)

    def step(self, action):
        """Take action 0 .. A - 1. Returns next_obs (O,), reward, terminated and truncated; it does not reset."""
        obs, reward, terminated, truncated, _ = self.env.step(self.first_action + action)
        self.episode_return += float(reward)
        self.episode_length += 1
        return obs.astype(np.float32), reward, terminated, truncated


def make_env(env_id, **options):
    """gymnasium.make, with a ValueError of one line where it fails."""
    try:
        return gymnasium.make(env_id, **options)
    except gymnasium.error.DependencyNotInstalled as error:
        raise ValueError(f"{env_id} needs a package: {' '.join(str(error).split())}") from None
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        raise ValueError(f"env_id must name a Gymnasium environment: {' '.join(str(error).split())}") from None


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


def q_values(params, obs, layer_norm=False):
    """Q(s, a) of every action: obs (B, O) -> (B, A), or (O,) -> (A,). ReLU between the layers, none after the last.

    In operators that NumPy and JAX share: one observation takes 6 us in NumPy and 40 us through a compiled call.
    """
    last = len(params) // 2 - 1
    for i in range(last):
        obs = obs @ params[f"w{i}"] + params[f"b{i}"]
        if layer_norm:
            obs = normalize(obs)
        obs = obs * (obs > 0)
    return obs @ params[f"w{last}"] + params[f"b{last}"]


def normalize(x):
    """Each row of x with mean 0 and variance 1: layer normalisation (Ba et al. 2016, eq. 3) without gain and bias."""
    x = x - x.sum(axis=-1, keepdims=True) / x.shape[-1]  # NumPy's mean would take twice as long
    return x / ((x * x).sum(axis=-1, keepdims=True) / x.shape[-1] + 1e-5) ** 0.5  # 1e-5: no division by 0


# -------------------------------------------------------------------------------------------------------- Replay buffer
# A ring of preallocated NumPy arrays: environment step t lies at t % buffer_size.


class Transition(NamedTuple):  # one step, or with a first axis the whole ring
    obs: np.ndarray  # (..., O)
    action: np.ndarray  # (...,)
    reward: np.ndarray  # (...,) times reward_scale
    next_obs: np.ndarray  # (..., O) from before the reset
    terminated: np.ndarray  # (...,) the episode reached an end: nothing follows, the value of next_obs is 0
    truncated: np.ndarray  # (...,) the time limit cut the episode: next_obs keeps its value


class Batch(NamedTuple):
    obs: np.ndarray  # (G, B, O)
    action: np.ndarray  # (G, B)
    reward: np.ndarray  # (G, B) discounted sum of up to n rewards
    discount: np.ndarray  # (G, B) weight of the value of next_obs: gamma^(number of rewards), 0 where terminated
    next_obs: np.ndarray  # (G, B, O)


def add(buffer, t, transition):
    """Write environment step t over the oldest one."""
    i = t % len(buffer.action)
    for ring, new in zip(buffer, transition, strict=True):
        ring[i] = new


def sample(buffer, t, rng, shape, n_step, gamma):
    """Draw a Batch of this shape uniformly, with replacement, from a buffer that holds the steps before t, or the newest.

    Each element is a run of n_step steps, cut short where its episode ends; the later actions of a run are those that were
    taken, whether greedy or not. Indexing by arrays copies: JAX still reads the Batch when the next steps are written.
    """
    size = len(buffer.action)
    filled = min(t, size)
    # A run starts at step t - n at the latest: a later one would reach into the oldest steps, or into none.
    first = t - filled + rng.integers(filled - (n_step - 1), size=shape)
    run = (first[..., None] + np.arange(n_step)) % size  # (G, B, n)
    count = np.arange(1, n_step + 1)
    ended = buffer.terminated[run] | buffer.truncated[run]
    length = np.min(np.where(ended, count, n_step), axis=-1)  # steps up to the first end, that one included
    discounts = np.float32(gamma) ** (count - 1)
    reward = np.sum(np.where(count <= length[..., None], discounts * buffer.reward[run], 0), axis=-1, dtype=np.float32)
    last = (first + length - 1) % size
    discount = np.where(buffer.terminated[last], 0, np.float32(gamma) ** length).astype(np.float32)
    return Batch(buffer.obs[run[..., 0]], buffer.action[run[..., 0]], reward, discount, buffer.next_obs[last])


# ------------------------------------------------------------------------------------------------------------- Learning

optimizer = optax.scale_by_adam()  # gives the direction; the step size is applied in update()


def linear_schedule(start, end, fraction):
    """From start to end while fraction, a Python number, goes from 0 to 1, and end from there on."""
    return start + (end - start) * min(fraction, 1)


def select_action(q, action):
    """Q(s, a) of one action per row: (B, A), (B,) -> (B,)."""
    return jnp.take_along_axis(q, action[:, None], axis=1)[:, 0]


def td_target(params, target_params, batch, double_dqn, layer_norm):
    """What the network should have said: (B,)."""
    next_q = q_values(target_params, batch.next_obs, layer_norm)
    choice = q_values(params, batch.next_obs, layer_norm) if double_dqn else next_q
    best = jnp.argmax(choice, axis=1)
    # y = r + gamma max_a' Q(s', a'; w')    with n steps: y = r_1 + ... + gamma^(n-1) r_n + gamma^n max_a' Q(s_n, a'; w')
    # Double DQN (van Hasselt et al. 2016) takes Q(s_n, a*; w') with a* = argmax_a' Q(s_n, a'; w) for that maximum.
    return batch.reward + batch.discount * select_action(next_q, best)


def loss_fn(params, batch, target, layer_norm):
    """Mean squared error of Q(s, a; w) against the target."""
    return jnp.mean((target - select_action(q_values(params, batch.obs, layer_norm), batch.action)) ** 2)


def update(params, target_params, opt_state, batch, learning_rate, double_dqn, layer_norm):
    """One gradient step. Returns the new params, the new opt_state and the loss."""
    target = td_target(params, target_params, batch, double_dqn, layer_norm)  # outside loss_fn: no gradient flows through it
    loss, grads = jax.value_and_grad(loss_fn)(params, batch, target, layer_norm)
    direction, opt_state = optimizer.update(grads, opt_state)
    params = jax.tree.map(lambda p, d: p - learning_rate * d, params, direction)
    return params, opt_state, loss


# ------------------------------------------------------------------------------------------------------------- Training


class Learner(NamedTuple):
    """What a call of the learner changes."""

    params: dict
    target_params: dict
    average_params: dict  # a moving average of params, for evaluation
    opt_state: tuple


def learn(args, learner, batches, t):
    """gradient_steps updates and, if it is due, a target update, at environment step t. Returns the Learner and the last loss.

    `jax.lax.scan(f, carry, xs)` is `for x in xs: carry, y = f(carry, x)`, compiled, with the ys stacked.
    """
    remaining = 1 - t / args.total_timesteps if args.anneal_lr else 1.0
    learning_rate = args.learning_rate * remaining

    def one_update(carry, batch):
        params, average_params, opt_state = carry
        params, opt_state, loss = update(
            params, learner.target_params, opt_state, batch, learning_rate, args.double_dqn, args.layer_norm
        )
        average_params = mix(average_params, params, args.average_rate)
        return (params, average_params, opt_state), loss

    carry = (learner.params, learner.average_params, learner.opt_state)
    (params, average_params, opt_state), losses = jax.lax.scan(one_update, carry, batches)
    due = t % args.target_network_frequency < args.train_frequency  # a multiple of it lies in the steps since the last call
    # w' <- w' + tau (w - w')
    target_params = mix(learner.target_params, params, jnp.where(due, args.tau, 0))
    return Learner(params, target_params, average_params, opt_state), losses[-1]


def mix(old, new, share):
    """Every array of the dict `old`, moved this share of the way to that of `new`."""
    return jax.tree.map(lambda a, b: a + share * (b - a), old, new)


class Result(NamedTuple):
    params: dict  # the averaged weights
    env_steps: int
    episodes: np.ndarray  # (number of ended episodes, 3): env step, return, length
    compile_seconds: float
    train_seconds: float  # without the snapshots
    interrupted: bool


def layer_sizes(args, env):
    """Units of every layer, from the observation to the actions."""
    return (env.obs_size, *args.hidden_sizes, env.actions)


def init_network(args, env):
    """The random weights that these settings start from."""
    return init_params(jax.random.key(args.seed), layer_sizes(args, env))


REPORT_EVERY = 1_000  # environment steps


def batch_shape(args):
    """The first two axes of what one call of the learner takes."""
    return args.gradient_steps, args.batch_size


def train(args, params=None, report=lambda env_steps, seconds, episodes, loss: None, snapshot=lambda env_steps, params: None):
    """Train one agent and return a Result.

    params: start from these weights instead of random ones. report: called every REPORT_EVERY steps with the environment
    steps done, the seconds they took, the episodes that ended since (rows of env step, return, length) and the last loss.
    snapshot: called every eval_frequency steps with the averaged weights. A KeyboardInterrupt, from report or from the user,
    ends the training early and is no error. Raises ValueError on an unsuitable env_id, FloatingPointError once a loss is not
    finite.
    """
    started = time.perf_counter()
    env = Environment(args)
    rng = np.random.default_rng(args.seed)
    if params is None:
        params = jax.jit(partial(init_network, args, env))()
    learner = Learner(params, params, params, optimizer.init(params))
    size, obs_size = args.buffer_size, env.obs_size
    buffer = Transition(
        obs=np.zeros((size, obs_size), np.float32),
        action=np.zeros(size, np.int32),
        reward=np.zeros(size, np.float32),
        next_obs=np.zeros((size, obs_size), np.float32),
        terminated=np.zeros(size, bool),
        truncated=np.zeros(size, bool),
    )
    batches = jax.eval_shape(lambda: sample(buffer, size, np.random.default_rng(0), batch_shape(args), args.n_step, args.gamma))
    run_learn = jax.jit(partial(learn, args)).lower(learner, batches, np.int32(0)).compile()
    acting = jax.device_get(params)
    compiled, paused = time.perf_counter(), 0.0

    env_steps, episodes, new, loss, interrupted = 0, [], [], np.float32(0), False
    obs = env.reset(seed=int(rng.integers(2**31)))
    try:
        for t in range(args.total_timesteps):
            # Act: epsilon-greedy.
            epsilon = linear_schedule(args.start_e, args.end_e, t / (args.exploration_fraction * args.total_timesteps))
            if rng.random() < epsilon:
                action = int(rng.integers(env.actions))
            else:
                action = int(q_values(acting, obs, args.layer_norm).argmax())

            # Step.
            next_obs, reward, terminated, truncated = env.step(action)

            # Store.
            add(buffer, t, Transition(obs, action, args.reward_scale * reward, next_obs, terminated, truncated))
            obs = next_obs
            env_steps = t + 1
            if terminated or truncated:
                new.append((env_steps, env.episode_return, env.episode_length))
                obs = env.reset()

            # Learn.
            if env_steps >= args.learning_starts and env_steps % args.train_frequency == 0:
                # Act with what the call before gave, not with what this one will give: it waits for that one at most.
                acting = jax.tree.map(np.asarray, learner.params)
                batches = sample(buffer, env_steps, rng, batch_shape(args), args.n_step, args.gamma)
                learner, loss = run_learn(learner, batches, np.int32(env_steps))  # comes back at once and runs on

            if env_steps % REPORT_EVERY == 0 or env_steps == args.total_timesteps:
                if not np.isfinite(loss):
                    raise FloatingPointError(f"the loss is not finite after {env_steps:,} steps; try a smaller learning_rate")
                episodes, ended, new = episodes + new, np.array(new).reshape(-1, 3), []
                report(env_steps, time.perf_counter() - compiled - paused, ended, loss)
            if args.eval_frequency and env_steps % args.eval_frequency == 0:
                average_params = jax.device_get(learner.average_params)
                pause = time.perf_counter()
                snapshot(env_steps, average_params)
                paused += time.perf_counter() - pause
            if args.early_stop and (terminated or truncated):
                recent = [one[1] for one in (episodes + new)[-100:]]
                if len(recent) == 100 and np.mean(recent) >= env.solved_return:
                    break
    except KeyboardInterrupt:
        interrupted = True
    params = jax.device_get(learner.average_params)
    finished = time.perf_counter()
    episodes = np.array(episodes + new).reshape(-1, 3)
    return Result(params, env_steps, episodes, compiled - started, finished - compiled - paused, interrupted)


# ----------------------------------------------------------------------------------------------------------- Evaluation


def evaluate(args, params):
    """The environment's own returns (eval_episodes,) of greedy episodes, from seeds that training does not use."""
    env, rng = Environment(args), np.random.default_rng([args.seed, 1])
    return np.array([greedy_episode(args, env, params, int(rng.integers(2**31))) for _ in range(args.eval_episodes)])


def greedy_episode(args, env, params, seed, look=lambda: None):
    """The return of one greedy episode; calls look before every step."""
    obs, ended = env.reset(seed), False
    while not ended:
        look()
        obs, _, terminated, truncated = env.step(int(q_values(params, obs, args.layer_norm).argmax()))
        ended = terminated or truncated
    return env.episode_return


# --------------------------------------------------------------------------------------------------------- Command line
# Not the lesson: checks, progress, saving, drawing.


def check(args):
    """Raise ValueError, in one line, on settings that cannot work."""
    rules = [
        (0 <= args.seed < 2**31, "seed must be between 0 and 2^31 - 1"),
        (0 <= args.total_timesteps < 2**31, "total_timesteps must be between 0 and 2^31 - 1"),
        (args.train_frequency >= 1, "train_frequency must be at least 1"),
        (args.gradient_steps >= 1, "gradient_steps must be at least 1"),
        (args.batch_size >= 1, "batch_size must be at least 1"),
        (args.n_step >= 1, "n_step must be at least 1"),
        (args.buffer_size >= args.n_step, "buffer_size must be at least n_step"),
        (args.buffer_size >= args.batch_size, "buffer_size must be at least batch_size"),
        (args.learning_starts >= args.n_step, "learning_starts must be at least n_step"),
        (
            args.total_timesteps == 0 or args.learning_starts <= args.total_timesteps,
            "learning_starts must be at most total_timesteps, or nothing is ever learned",
        ),
        (
            args.total_timesteps == 0 or args.train_frequency <= args.total_timesteps,
            "train_frequency must be at most total_timesteps, or nothing is ever learned",
        ),
        (all(size >= 1 for size in args.hidden_sizes), "hidden_sizes must all be at least 1"),
        (0 < args.learning_rate < math.inf, "learning_rate must be above 0 and finite"),
        (0 <= args.gamma <= 1, "gamma must be between 0 and 1"),
        (0 < args.tau <= 1, "tau must be above 0 and at most 1"),
        (args.target_network_frequency >= 1, "target_network_frequency must be at least 1"),
        (0 < args.reward_scale < math.inf, "reward_scale must be above 0 and finite"),
        (0 < args.average_rate <= 1, "average_rate must be above 0 and at most 1"),
        (0 <= args.start_e <= 1 and 0 <= args.end_e <= 1, "start_e and end_e must be between 0 and 1"),
        (0 < args.exploration_fraction <= 1, "exploration_fraction must be above 0 and at most 1"),
        (args.eval_frequency >= 0, "eval_frequency must be at least 0"),
        (args.eval_frequency == 0 or args.output_dir is not None, "eval_frequency keeps models and needs an output_dir"),
        (args.snapshot_episodes >= 1, "snapshot_episodes must be at least 1"),
        (not args.capture_video or args.output_dir is not None, "capture_video keeps GIFs and needs an output_dir"),
        (args.eval_episodes >= 1, "eval_episodes must be at least 1"),
    ]
    enforce(args, rules)
    env = Environment(args)
    if args.early_stop and env.solved_return is None:
        raise ValueError(f"early_stop needs a reward threshold, and {args.env_id} has none")
    if args.capture_video:
        check_video(args)


def check_video(args):
    """Raise ValueError if no frame of the environment can be rendered and kept."""
    if importlib.util.find_spec("imageio") is None:
        raise ValueError("--capture-video writes GIFs and needs imageio: pip install imageio")
    try:
        env = Environment(args, render_mode="rgb_array")
        env.reset(seed=0)
        frame = env.env.render()
    except Exception as error:  # a missing renderer raises what it likes
        raise ValueError(f"--capture-video cannot render {args.env_id}: {' '.join(str(error).split())}") from None
    if not (isinstance(frame, np.ndarray) and frame.ndim == 3):
        raise ValueError(f"--capture-video cannot render {args.env_id}: it gives no frames")


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
    arrays = jax.eval_shape(partial(init_network, args, Environment(args)))
    return {name: array.shape for name, array in arrays.items()}


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
        self.returns = np.concatenate([self.returns, episodes[:, 1]])[-100:]
        quarter = 4 * env_steps // args.total_timesteps
        if seconds - self.printed >= 1 or quarter > self.quarters:
            self.printed, self.quarters = seconds, quarter
            speed = env_steps / seconds
            epsilon = linear_schedule(args.start_e, args.end_e, env_steps / (args.exploration_fraction * args.total_timesteps))
            recent = f"{self.returns.mean():.1f}" if len(self.returns) else "none yet"
            print(
                f"{env_steps:>11,} of {args.total_timesteps:,} steps {env_steps / args.total_timesteps:4.0%}"
                f"  recent return {recent}  loss {float(loss):.3g}  epsilon {epsilon:.2f}"
                f"  {speed:,.0f} steps/s  {(args.total_timesteps - env_steps) / speed:.0f} s left",
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
    """Training returns over environment steps: every episode a dot, and the mean of the last 100."""
    from matplotlib.figure import Figure  # only here: importing it takes long

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps, returns, _ = episodes.T
    axes.plot(steps, returns, ".", markersize=2, color="0.7", rasterized=True)
    window = min(100, len(returns))
    if window:
        mean = np.convolve(returns, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], mean, linewidth=1.5)
    axes.set(xlabel="environment steps", ylabel="return of training episodes", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, format="png", dpi=150)


def record(args, params, path):
    """Render one greedy episode to a GIF at half size, in the environment's own time, with at most 25 frames a second."""
    import imageio.v3  # only here: most runs need no pictures

    env, frames = Environment(args, render_mode="rgb_array"), []
    per_second = env.env.metadata.get("render_fps", 50)
    every = math.ceil(per_second / 25)

    def look():
        if env.episode_length % every == 0:
            frames.append(env.env.render()[::2, ::2])

    total = greedy_episode(args, env, params, args.seed, look)
    images = np.stack(frames)
    write_whole(
        path, lambda file: imageio.v3.imwrite(file, images, extension=".gif", duration=1000 * every / per_second, loop=0)
    )
    return total


def keep_snapshot(args, env_steps, params):
    """Evaluate the weights over a few episodes, keep them as model_STEP.npz and, if asked, film them as video_STEP.gif."""
    returns = evaluate(replace(args, eval_episodes=args.snapshot_episodes), params)
    path = os.path.join(args.output_dir, f"model_{env_steps}.npz")
    write_whole(path, lambda file: np.savez(file, **params))
    print(f"{env_steps:>11,} snapshot: mean {returns.mean():.1f} of {len(returns)} greedy episodes, kept as {path}", flush=True)
    if args.capture_video:
        record(args, params, os.path.join(args.output_dir, f"video_{env_steps}.gif"))


def save(args, result, summary):
    """Write the four files of a run into output_dir, summary.json last."""

    def returns_csv(file):
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.writer(text)
        writer.writerow(["env_step", "episode_return", "episode_length"])
        writer.writerows((int(step), f"{value:g}", int(length)) for step, value, length in result.episodes)
        text.detach()

    title = f"DQN on {args.env_id}, seed {args.seed}"
    writers = (
        lambda file: np.savez(file, **result.params),
        returns_csv,
        lambda file: draw_curve(file, result.episodes, title),
        lambda file: file.write(json.dumps(summary, indent=2).encode()),
    )
    for name, write in zip(FILES, writers, strict=True):
        write_whole(os.path.join(args.output_dir, name), write)
    if args.capture_video:
        record(args, result.params, os.path.join(args.output_dir, "video.gif"))


def summarize(args, result, returns):
    """What summary.json holds; returns (eval_episodes,). solved is None where the environment names no threshold."""
    threshold = Environment(args).solved_return
    return {
        "script": os.path.basename(__file__),
        "args": asdict(args),
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (jax, optax, gymnasium, np, tyro)},
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "env_steps": result.env_steps,
        "interrupted": result.interrupted,
        "compile_seconds": result.compile_seconds,
        "train_seconds": result.train_seconds,
        "steps_per_second": result.env_steps / result.train_seconds,
        "threshold": threshold,
        "seeds": [
            {
                "seed": args.seed,
                "eval_return_mean": float(returns.mean()),
                "eval_return_std": float(returns.std()),
                "eval_return_min": float(returns.min()),
                "eval_episodes": args.eval_episodes,
                "solved": None if threshold is None else bool(returns.mean() >= threshold),
            }
        ],
    }


def print_summary(summary):
    (one,), threshold = summary["seeds"], summary["threshold"]
    if summary["env_steps"]:
        print(
            f"trained {summary['env_steps']:,} steps in {summary['train_seconds']:.2f} s"
            f" ({summary['steps_per_second']:,.0f} steps/s, compiling {summary['compile_seconds']:.2f} s before)"
        )
    verdict = "no threshold" if threshold is None else f"{'' if one['solved'] else 'not '}solved (threshold {threshold:g})"
    print(
        f"evaluation, {one['eval_episodes']} greedy episodes: mean {one['eval_return_mean']:.1f}, standard deviation"
        f" {one['eval_return_std']:.1f}, worst {one['eval_return_min']:.0f}; {verdict}"
    )


def main(args):
    """Run the script. Returns the exit status: 0, 1 for a diverged loss, 2 for bad input, 130 after Ctrl-C."""
    gc.freeze()  # the collector would search all imported modules again and again: 0.3 s of the whole command
    try:
        check(args)
        params = load_model(args.load_model) if args.load_model else None
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
        result = train(args, params, progress, partial(keep_snapshot, args))
        if result.interrupted:
            print(f"interrupted after {result.env_steps:,} of {args.total_timesteps:,} steps", flush=True)
        elif result.env_steps < args.total_timesteps:
            print(f"stopped early after {result.env_steps:,} of {args.total_timesteps:,} steps", flush=True)
        summary = summarize(args, result, evaluate(args, result.params))
        print_summary(summary)
        if args.output_dir:
            save(args, result, summary)
            print(f"kept in {args.output_dir}: {', '.join(FILES)}{', video.gif' * args.capture_video}")
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

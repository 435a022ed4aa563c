# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,!=0.11.1", "optax>=0.2.8", "numpy>=2.4", "tyro>=1.0.17", "matplotlib>=3.11"]
# ///
"""DQN on CartPole-v1 with everything compiled: environment, replay buffer, exploration and learning in one JAX program.

What it teaches: an agent is a few arrays and a few pure functions over them, so that `jax.jit` can compile its whole training
loop and `jax.vmap` can train many at once.

Q(s, a) is the discounted sum of rewards to expect after action a in state s. Deep Q-learning (Mnih et al. 2015,
https://doi.org/10.1038/nature14236) trains a network Q(s, a; w) with weights w. It keeps a replay buffer of past steps
(s, a, r, s'), because consecutive steps are alike, and a slower copy w- of the weights, the target network, so that the target
does not move with each update. An update lowers the mean over a random batch of

    (y - Q(s, a; w))^2        with the target  y = r + gamma max_a' Q(s', a'; w-),   y = r where s' is terminal.

    python dqn_cartpole_jax.py --seed 1                       train one agent
    python dqn_cartpole_jax.py --num-seeds 16                 train sixteen at once, on all cores or GPUs
    python dqn_cartpole_jax.py --output-dir runs/1            keep model.npz, returns.csv, curve.png and summary.json
    python dqn_cartpole_jax.py --load-model runs/1/model.npz  evaluate a kept model

Measured by tests/benchmark.py: 998 of 1,000 fresh seeds solved, 0.13 s of training each.

Unlike Mnih et al., a target sums n_step rewards before it adds Q (Sutton 1988), 64 environments take a joint step between two
updates, the target network moves a little each time (tau), and errors are not clipped; Adam's step size falls to 0.

Letters in shapes: N environments, B batch, A actions, O observation, n steps of an n-step target, K seeds.
"""

import importlib.util
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro


# ---------- Arguments
@dataclass(frozen=True)
class Args:
    """DQN on CartPole-v1. Periods and schedules count the steps of all environments of an agent."""

    seed: int = 1  # same seed, same machine: the same bits
    num_seeds: int = 1  # agents trained at once, from seed on
    total_timesteps: int = 256_000  # environment steps of the run
    num_envs: int = 64  # environments that take a joint step before each update
    learning_starts: int = 6_400  # environment steps before the weights change
    buffer_size: int = 96_000  # transitions in the replay buffer
    batch_size: int = 64  # transitions in one update
    hidden_sizes: tuple[int, ...] = (96,)  # units in each hidden layer
    learning_rate: float = 1e-2  # Adam's step size at the start
    end_learning_rate: float = 0.0  # and at the end; it falls linearly
    gamma: float = 0.99  # discount per step
    n_step: int = 5  # rewards in a target before it adds Q; plain DQN: 1
    tau: float = 0.05  # how far a target update moves to the online weights; 1 copies them
    target_network_frequency: int = 64  # environment steps between target updates
    start_e: float = 1.0  # epsilon, the fraction of random actions, at the start
    end_e: float = 0.15  # epsilon at the end; high, to store recoveries too
    exploration_fraction: float = 0.5  # fraction of the run in which epsilon falls
    eval_episodes: int = 100  # greedy episodes at the end
    output_dir: str | None = None  # a new folder for the run
    load_model: str | None = None  # evaluate this model.npz instead of training


# ---------- Environment
# CartPole-v1 as gymnasium.make builds it: https://gymnasium.farama.org/environments/classic_control/cart_pole/
# For your own environment change this section and SCRIPT, and scale rewards for Q-values near 50. The rest assumes that
# a step draws no random numbers, a reset takes one for each entry of obs, and no episode exceeds MAX_STEPS.

OBS_SIZE = 4  # cart position (m) and velocity (m/s), pole angle (rad) and angular velocity (rad/s)
ACTIONS = 2  # push left, push right
MAX_STEPS = 500  # the time limit
SOLVED_RETURN = 475.0  # Gymnasium's threshold: a mean over 100 episodes
OBS_SCALE = np.array([2.4, 2.0, 0.2095, 2.0], np.float32)  # where position and angle end the episode; usual velocities


class EnvState(NamedTuple):
    obs: jax.Array  # (N, O)
    time: jax.Array  # (N,) steps taken


def reset(noise):
    """Start states from noise (..., O) in [0, 1): every number of obs uniform in +-0.05."""
    return EnvState(0.1 * noise - 0.05, np.zeros(noise.shape[:-1], np.int32))


def step(state, action):
    """One step of N carts: 20 ms of Euler integration (Barto, Sutton and Anderson 1983; Florian 2007). It does not reset.

    Takes action (N,), 0 or 1. Returns the next EnvState, reward (N,), terminated (N,), out of bounds: nothing follows, and
    truncated (N,), out of time: the value goes on.
    """
    _, x_dot, theta, theta_dot = state.obs.T
    force = jnp.where(action == 1, 10.0, -10.0)  # N; cart 1 kg, pole 0.1 kg with its center at 0.5 m
    sin, cos = jnp.sin(theta), jnp.cos(theta)
    push = (force + 0.1 * 0.5 * theta_dot**2 * sin) / 1.1
    theta_acc = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    x_acc = push - 0.1 * 0.5 * theta_acc * cos / 1.1
    obs = state.obs + 0.02 * jnp.stack([x_dot, x_acc, theta_dot, theta_acc], axis=1)
    terminated = (jnp.abs(obs[:, 0]) > 2.4) | (jnp.abs(obs[:, 2]) > math.radians(12))
    return EnvState(obs, state.time + 1), jnp.ones(len(obs)), terminated, state.time + 1 >= MAX_STEPS


# ---------- Q-network
def init_params(rng, sizes):
    """The layers of a perceptron as a dict w0 (out, in), b0 (out, 1), ...: weights uniform after He et al. 2015 (eq. 10)."""
    params = {}
    for i, (n_in, n_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        params[f"w{i}"] = math.sqrt(6 / n_in) * rng.uniform(-1, 1, (n_out, n_in)).astype(np.float32)
        params[f"b{i}"] = np.zeros((n_out, 1), np.float32)
    return params


def q_values(params, obs):
    """Q(s, a) of every action: obs (B, O), as the environment gives it, -> (B, A). ReLU between the layers.

    x has a column for each observation; with rows an update takes 30 % longer on a CPU.
    """
    x, last = (obs / OBS_SCALE).T, len(params) // 2 - 1
    for i in range(last):
        x = jax.nn.relu(params[f"w{i}"] @ x + params[f"b{i}"])
    return (params[f"w{last}"] @ x + params[f"b{last}"]).T


# ---------- Replay buffer
# A transition of n steps is complete with its n-th reward. Until then it waits in a queue.


class Transition(NamedTuple):
    obs: jax.Array  # (..., O)
    action: jax.Array  # (...,)
    reward: jax.Array  # (...,) r_1 + gamma r_2 + ... + gamma^(n-1) r_n, fewer terms if the episode ended
    discount: jax.Array  # (...,) weight of the value of next_obs: gamma^(number of rewards), 0 where terminated
    next_obs: jax.Array  # (..., O) the observation after the last reward, from before the reset
    ended: jax.Array  # (...,) the episode ended, so no reward is added; for the queue only


def extend(queue, obs, action, reward, next_obs, terminated, truncated, gamma):
    """Begin N transitions in the queue (n, N, ...) and add this step (N, ...) to all of it. Its row 0 is then complete."""
    begun = Transition(obs, action, jnp.zeros_like(reward), jnp.ones_like(reward), next_obs, jnp.zeros_like(terminated))
    # `jax.tree.map` applies a function to every field: here, drop row 0 and append a row.
    queue = jax.tree.map(lambda rows, new: jnp.concatenate([rows[1:], new[None]]), queue, begun)
    return queue._replace(
        reward=queue.reward + jnp.where(queue.ended, 0, queue.discount * reward),
        discount=queue.discount * jnp.where(queue.ended, 1, gamma * ~terminated),
        next_obs=jnp.where(queue.ended[..., None], queue.next_obs, next_obs),
        ended=queue.ended | terminated | truncated,
    )


def add(buffer, place, transition):
    """buffer[place : place + N] = transition, where place counts round and round the buffer."""
    start = place % len(buffer.action)
    return jax.tree.map(lambda rows, new: jax.lax.dynamic_update_slice_in_dim(rows, new, start, 0), buffer, transition)


def sample(buffer, added, noise):
    """Draw B transitions uniformly, with replacement, from a buffer that was given `added`; noise (B,) in [0, 1)."""
    rows = (noise * jnp.clip(added, 1, len(buffer.action))).astype(jnp.int32)
    return jax.tree.map(lambda field: field[rows], buffer)


# ---------- Learning
def make_optimizer(args):
    """Adam, whose step size is 0 before learning_starts and then falls linearly."""
    first, last = args.learning_starts / args.num_envs, args.total_timesteps / args.num_envs
    schedule = optax.linear_schedule(args.learning_rate, args.end_learning_rate, last)
    return optax.adam(lambda count: jnp.where(count < first, 0, schedule(count)))


def update(args, params, target_params, opt_state, batch):
    """One gradient step on the mean squared error. Returns the new params and opt_state, and the loss."""
    # With n steps: y = r_1 + gamma r_2 + ... + gamma^(n-1) r_n + gamma^n max_a' Q(s_n, a'; w-)
    target = batch.reward + batch.discount * jnp.max(q_values(target_params, batch.next_obs), axis=1)

    def loss_fn(params):
        q = jnp.take_along_axis(q_values(params, batch.obs), batch.action[:, None], axis=1)[:, 0]  # Q(s, a; w)
        return jnp.mean((target - q) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = make_optimizer(args).update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, loss


# ---------- Training
class Agent(NamedTuple):  # all that changes while an agent trains
    params: dict
    target_params: dict
    opt_state: tuple
    env_state: EnvState
    episode_return: jax.Array  # (N,) of the running episodes
    queue: Transition  # (n, N, ...)
    buffer: Transition  # (buffer_size, ...)


def init_agents(args, rngs):
    """The agents before training: an Agent whose arrays have a first axis K."""
    params = [init_params(rng, (OBS_SIZE, *args.hidden_sizes, ACTIONS)) for rng in rngs]
    env_state = reset(np.stack([rng.random((args.num_envs, OBS_SIZE), np.float32) for rng in rngs]))

    def zeros(like, *axes):
        return jax.tree.map(lambda x: np.zeros((len(rngs), *axes, *x.shape), x.dtype), like)

    opt_state = zeros(jax.eval_shape(make_optimizer(args).init, params[0]))  # Adam starts at 0
    params = jax.tree.map(lambda *arrays: np.stack(arrays), *params)
    obs, number = np.zeros(OBS_SIZE, np.float32), np.float32(0)
    empty = Transition(obs, np.int32(0), number, number, obs, np.bool_(False))
    queue, buffer = zeros(empty, args.n_step, args.num_envs), zeros(empty, args.buffer_size)
    return Agent(params, params, opt_state, env_state, zeros(number, args.num_envs), queue, buffer)


def train_chunk(args, agent, first_step, noise):
    """A joint step and an update for each row of noise (T, N * (2 + O) + B), from environment step first_step on.

    Returns the Agent, its params, the returns (T, N) of ended episodes, nan elsewhere, and the losses (T,).
    `jax.lax.scan(f, carry, xs)` is `for x in xs: carry, y = f(carry, x)`, compiled, with the ys stacked.
    """
    N = args.num_envs
    epsilon = optax.linear_schedule(args.start_e, args.end_e, max(1, args.exploration_fraction * args.total_timesteps))

    def joint_step(agent, inputs):
        t, row = inputs
        explore, random, reset_noise, batch_noise = jnp.split(row, np.array([1, 2, 2 + OBS_SIZE]) * N)

        # Act: epsilon-greedy.
        obs = agent.env_state.obs
        greedy = jnp.argmax(q_values(agent.params, obs), axis=1)
        action = jnp.where(explore < epsilon(t), (random * ACTIONS).astype(jnp.int32), greedy)

        # Step.
        env_state, reward, terminated, truncated = step(agent.env_state, action)
        queue = extend(agent.queue, obs, action, reward, env_state.obs, terminated, truncated, args.gamma)
        episode_return, ended = agent.episode_return + reward, terminated | truncated
        fresh = reset(reset_noise.reshape(N, OBS_SIZE))
        env_state = jax.tree.map(lambda new, old: jnp.where(ended, new.T, old.T).T, fresh, env_state)  # .T: ended is (N,)

        # Store. The first n_step - 1 times nothing is complete: what is stored lands at the buffer's end, unsampled.
        place = t - (args.n_step - 1) * N
        buffer = add(agent.buffer, place, jax.tree.map(lambda rows: rows[0], queue))

        # Learn. Before learning_starts the step size is 0: a branch around the update would copy the whole buffer.
        batch = sample(buffer, place + N, batch_noise)
        params, opt_state, loss = update(args, agent.params, agent.target_params, agent.opt_state, batch)
        due = (t + N) % args.target_network_frequency < N  # a multiple of it lies in these N steps
        # w- <- w- + tau (w - w-)
        target_params = optax.incremental_update(params, agent.target_params, jnp.where(due, args.tau, 0))

        returns, episode_return = jnp.where(ended, episode_return, jnp.nan), jnp.where(ended, 0, episode_return)
        agent = Agent(params, target_params, opt_state, env_state, episode_return, queue, buffer)
        return agent, (returns, loss)

    agent, (returns, losses) = jax.lax.scan(joint_step, agent, (first_step + N * jnp.arange(len(noise)), noise))
    return agent, agent.params, returns, losses


def train(args):
    """Train num_seeds agents, printing a line a second. Returns params, episodes and a dict of counts.

    params has a first axis K if num_seeds > 1; a row of episodes is (env step, return, seed). Ctrl-C ends the training early.
    Raises FloatingPointError if a loss is not finite.
    """
    started = time.perf_counter()
    # A chunk takes 1 MB of noise per agent; the run may end a few steps early.
    joint_steps, numbers = args.total_timesteps // args.num_envs, args.num_envs * (2 + OBS_SIZE) + args.batch_size
    chunks = math.ceil(joint_steps / max(1, 250_000 // numbers))
    devices = jax.devices()[: math.gcd(args.num_seeds, jax.device_count())]  # with equally many agents
    sharding = jax.NamedSharding(jax.sharding.Mesh(devices, "seed"), jax.P("seed"))
    rngs = [np.random.default_rng(args.seed + k) for k in range(args.num_seeds)]

    agent = init_agents(args, rngs)
    params, env_steps, episodes, interrupted = agent.params, 0, np.empty((0, 3)), False

    def draw():  # in NumPy: JAX's generator is slow to compile
        return np.stack([rng.random((joint_steps // chunks, numbers), np.float32) for rng in rngs])

    # `jax.vmap` maps a function of one agent over the axis K. Donated: the new Agent overwrites the old.
    run_chunk = jax.vmap(lambda *inputs: train_chunk(args, *inputs), (0, None, 0))
    run_chunk = jax.jit(run_chunk, donate_argnums=0, in_shardings=(sharding, None, sharding), out_shardings=sharding)
    # Level 1 of 3: 8 % faster.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    run_chunk = run_chunk.lower(agent, np.int32(0), draw()).compile(options)
    compiled = printed = time.perf_counter()
    try:
        for chunk in range(chunks):
            agent, params, returns, losses = run_chunk(agent, np.int32(env_steps), draw())
            returns = np.asarray(returns).reshape(args.num_seeds, -1).T  # (steps, K)
            when, which = np.nonzero(~np.isnan(returns))
            rows = np.stack([env_steps + when + 1, returns[when, which], args.seed + which], axis=1)
            episodes, env_steps = np.concatenate([episodes, rows]), env_steps + len(returns)
            loss = np.asarray(losses).mean()  # JAX would compile it
            if not np.isfinite(loss):
                raise FloatingPointError(f"the loss is not finite after {env_steps:,} steps; try a smaller learning_rate")
            now = time.perf_counter()
            if now - printed > 1 or chunk == chunks - 1:
                printed, speed = now, env_steps / (now - compiled)
                recent = np.mean(episodes[-100:, 1].tolist() or math.nan)
                progress = f"{env_steps:,} steps, recent return {recent:.1f}, loss {loss:.3g}, {speed:,.0f} steps/s"
                print(f"{progress}, {(args.total_timesteps - env_steps) / speed:.0f} s left", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    params = jax.device_get(params)  # not agent.params: an interrupted call has taken it
    if args.num_seeds == 1:
        params = jax.tree.map(lambda x: x[0], params)
    seconds = time.perf_counter() - compiled
    counts = {"env_steps": env_steps, "interrupted": interrupted, "compile_seconds": compiled - started}
    return params, episodes, counts | {"train_seconds": seconds, "steps_per_second": args.num_seeds * env_steps / seconds}


# ---------- Evaluation
def evaluate(args, params):
    """The returns (K, eval_episodes) of greedy episodes from starts that no training uses; params of one agent or K."""
    if params["b0"].ndim == 2:  # one agent
        params = jax.tree.map(lambda x: x[None], params)

    def play(params, noise):
        def one_step(carry, _):
            env_state, running, total = carry
            env_state, reward, terminated, truncated = step(env_state, jnp.argmax(q_values(params, env_state.obs), axis=1))
            return (env_state, running & ~(terminated | truncated), total + jnp.where(running, reward, 0)), None

        start = reset(noise), jnp.ones(args.eval_episodes, bool), jnp.zeros(args.eval_episodes)
        (_, _, total), _ = jax.lax.scan(one_step, start, length=MAX_STEPS)
        return total

    noise = np.random.default_rng(2**31).random((args.eval_episodes, OBS_SIZE), np.float32)
    return np.asarray(jax.jit(jax.vmap(play, (0, None)))(params, noise))


# ---------- Command line
SCRIPT = "dqn_cartpole_jax.py"


def check(args):
    """Raise ValueError, naming the flag, on settings that cannot work."""
    for field in fields(args):
        value, least = getattr(args, field.name), 0 if field.name == "seed" else 1
        if field.type is int and not least <= value < 2**31:
            raise ValueError(f"{field.name} must be at least {least} and below 2^31")
        if field.type is float and not 0 <= value <= 1:
            raise ValueError(f"{field.name} must be between 0 and 1")
    least = args.n_step * args.num_envs
    rules = [
        (min(args.hidden_sizes, default=1) > 0, "hidden_sizes must all be at least 1"),
        (args.total_timesteps >= args.num_envs, "total_timesteps must be at least num_envs"),
        (args.learning_starts >= least, "learning_starts must be at least n_step * num_envs"),
        (args.buffer_size >= least, "buffer_size must be at least n_step * num_envs"),
        (args.buffer_size % args.num_envs == 0, "buffer_size must be a multiple of num_envs"),
        (not args.output_dir or importlib.util.find_spec("matplotlib"), "output_dir needs matplotlib: pip install matplotlib"),
    ]
    for holds, message in rules:
        if not holds:
            raise ValueError(message)


def load_model(path):
    """The params that a run kept as model.npz. Raises ValueError if it is damaged or from another script."""
    try:
        with np.load(path, allow_pickle=False) as file:
            params = dict(file)
        script = params.pop("script")
        one = params if params["b0"].ndim == 2 else {name: x[0] for name, x in params.items()}
        if script != SCRIPT or q_values(one, np.zeros((1, OBS_SIZE))).shape != (1, ACTIONS):
            raise ValueError(f"it is from {script} or of other shapes")
    except Exception as error:
        raise ValueError(f"load_model: {path}: {error}") from None
    return params


def keep(args, params, episodes):
    """Write model.npz, returns.csv and curve.png into output_dir."""
    from matplotlib.figure import Figure  # slow to import

    folder, header = Path(args.output_dir), "env_step,episode_return,seed"
    np.savez(folder / "model.npz", script=SCRIPT, **params)
    np.savetxt(folder / "returns.csv", episodes, ("%d", "%g", "%d"), ",", header=header, comments="")
    figure = Figure()
    axes = figure.add_subplot(xlabel="environment steps", ylabel="return, and mean of 100", title="DQN on CartPole-v1")
    steps, returns, _ = episodes.T
    axes.plot(steps, returns, ".", markersize=1, color="0.75")
    if len(returns) >= 100:
        axes.plot(steps[99:], np.convolve(returns, np.ones(100) / 100, mode="valid"))
    figure.savefig(folder / "curve.png", dpi=150)


def summarize(args, returns, counts):
    """Print how the evaluation went, returns (K, eval_episodes), and give what summary.json holds."""
    solved = returns.mean(axis=1) >= SOLVED_RETURN
    statistics = f"mean {returns.mean():.1f}, standard deviation {returns.std():.1f}, worst {returns.min():.0f}"
    print(f"{returns.size} greedy episodes: {statistics}; {solved.sum()} of {len(solved)} solved (threshold {SOLVED_RETURN:g})")
    names = "seed", "eval_return_mean", "eval_return_std", "eval_return_min", "eval_episodes", "solved"
    rows = [(args.seed + k, x.mean(), x.std(), x.min(), len(x), bool(solved[k])) for k, x in enumerate(returns.astype(float))]
    versions = {m.__name__: m.__version__ for m in (jax, optax, np, tyro)}
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    summary = {"script": SCRIPT, "args": asdict(args), "versions": versions, "device": device, **counts}
    return summary | {"seeds": [dict(zip(names, row, strict=True)) for row in rows]}


def main(args):
    """Run the script. Exit status: 0, 1 if the loss diverged, 2 on bad input, 130 after Ctrl-C."""
    try:
        check(args)
        jax.config.update("jax_num_cpu_devices", min(os.cpu_count(), args.num_seeds))
        params, counts = load_model(args.load_model) if args.load_model else None, {}
        if args.output_dir:
            Path(args.output_dir).mkdir(parents=True)
    except (ValueError, OSError) as error:
        print(f"error: {'output_dir: ' if isinstance(error, OSError) else ''}{error}", file=sys.stderr)
        return 2
    try:
        if not args.load_model:
            if args.learning_starts >= args.total_timesteps:
                print("no update: total_timesteps is not above learning_starts")
            params, episodes, counts = train(args)
            if args.output_dir:
                keep(args, params, episodes)
        summary = summarize(args, evaluate(args, params), counts)
    except FloatingPointError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        return 130
    if args.output_dir:
        Path(args.output_dir, "summary.json").write_text(json.dumps(summary, indent=2))
    return 130 if counts.get("interrupted") else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))

# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,!=0.11.1", "optax>=0.2.8", "numpy>=2.4", "tyro>=1.0.17",
#     "matplotlib>=3.11"]  # not jax 0.11.1: its issue 40101
# ///
"""DQN on CartPole-v1, compiled as a whole by JAX.

What it teaches: environment, buffer and network are a few arrays, and training is a pure function
of them. So `jax.jit` compiles the training loop, and `jax.vmap` trains many agents at once.

Q(s, a) is the expected discounted sum of rewards after action a in state s, if every later action
is optimal. Deep Q-learning (Mnih et al. 2015, https://doi.org/10.1038/nature14236) learns
it as a network Q(s, a; w) with weights w. It trains on steps (s, a, r, s') drawn at random from a
replay buffer, because consecutive steps are too similar. A target network, whose weights w- follow
w slowly, keeps the targets steady. Each update takes a gradient step to reduce the mean of

    (y - Q(s, a; w))^2   with   y = r + gamma max_a' Q(s', a'; w-),   or y = r if s' is terminal.

    python dqn_cartpole_jax.py --seed 1                            train an agent
    python dqn_cartpole_jax.py --num-seeds 16 --output-dir runs/1  train sixteen, save the results

Measured on 1,000 unseen seeds: all solved, mean 500.0, 0.16 s each.

Differences from Mnih et al.:
- Targets sum n rewards, of random actions too, then add Q (Sutton 1988, --n-step).
- 64 environments step between two updates (--num-envs); learning starts at once.
- The target network moves a little at every update (--tau).
- More actions stay random, to learn recoveries (--end-e).
- Adam replaces RMSProp; observations are scaled (OBS_SCALE), errors are not clipped.

Letters in shapes: N environments, B batch, O observation, A actions, K agents, T steps.
"""

import importlib
import json
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import Array


# ---------- Arguments
@dataclass(frozen=True)
class Args:
    """DQN on CartPole-v1."""

    seed: int = 1  # same seed, machine, versions: same result
    num_seeds: int = 1  # agents to train at once
    total_timesteps: int = 256_000  # environment steps of each agent
    num_envs: int = 64  # environments that step together
    buffer_size: int = 96_000  # transitions in the buffer
    batch_size: int = 64  # transitions in an update
    hidden_sizes: tuple[int, ...] = (96,)  # units in each hidden layer
    learning_rate: float = 1e-2  # of Adam; 3e-3 for two layers
    gamma: float = 0.99  # discount per step
    n_step: int = 3  # rewards summed in a target
    tau: float = 0.05  # how far each update moves w- toward w; 1 copies w
    end_e: float = 0.15  # epsilon, the fraction of random actions, at the end
    exploration_fraction: float = 0.5  # part of the run in which epsilon falls from 1
    eval_episodes: int = 100  # greedy episodes at the end
    output_dir: str | None = None  # new folder for the results
    load_model: str | None = None  # evaluate this model.npz instead of training


SCRIPT = "dqn_cartpole_jax.py"


# ---------- Environment
# CartPole-v1 as in https://gymnasium.farama.org/environments/classic_control/cart_pole/
# For your own, rewrite this section: reset and step of one environment, which jax.vmap turns into
# N. EnvState needs obs, a vector of OBS_SIZE numbers; the rest is yours. The defaults suit a Q up
# to 1 / (1 - gamma) = 100. From gymnax, use reset_env and step_env (its step resets too), and keep
# its state in EnvState.

OBS_SIZE = 4  # cart position (m), velocity (m/s), pole angle (rad), angular velocity (rad/s)
ACTIONS = 2  # push left or right
MAX_STEPS = 500  # the time limit
SOLVED_RETURN = 475.0  # Gymnasium's threshold
OBS_SCALE = np.array([[2.4, 2.0, 0.2095, 2.0]], np.float32)  # (1, O) limits and usual velocities


class EnvState(NamedTuple):
    obs: Array  # (O,)
    time: Array  # steps since the reset


def reset(key):
    """An episode's start."""
    obs = jax.random.uniform(key, (OBS_SIZE,), minval=-0.05, maxval=0.05)
    return EnvState(obs, 0)


def step(key, state, action):
    """20 ms of Euler's method (Florian 2007). Random environments use the key.

    Returns the next EnvState, the reward, terminated (out of bounds) and truncated (out of time).
    """
    x, x_dot, theta, theta_dot = state.obs
    force = jnp.where(action == 1, 10.0, -10.0)  # N
    sin = jnp.sin(theta)
    cos = jnp.cos(theta)
    # The cart weighs 1 kg, the pole 0.1 kg; its center is 0.5 m from the joint.
    push = (force + 0.1 * 0.5 * theta_dot**2 * sin) / 1.1
    theta_acc = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    x_acc = push - 0.1 * 0.5 * theta_acc * cos / 1.1
    obs = state.obs + 0.02 * jnp.stack([x_dot, x_acc, theta_dot, theta_acc])
    terminated = (jnp.abs(obs[0]) > 2.4) | (jnp.abs(obs[2]) > np.radians(12))
    truncated = state.time + 1 >= MAX_STEPS
    return EnvState(obs, state.time + 1), 1.0, terminated, truncated


# ---------- Q-network
def init_params(rng, sizes):
    """The layers of a perceptron: w0 (out, in), b0 (out, 1), w1, ... (He et al. 2015, eq. 10)."""
    params = {}
    for i, (n_in, n_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        limit = np.sqrt(6 / n_in)
        params[f"w{i}"] = rng.uniform(-limit, limit, (n_out, n_in)).astype(np.float32)
        params[f"b{i}"] = np.zeros((n_out, 1), np.float32)
    return params


def q_values(params, obs):
    """Q(s, a) of every action: obs (B, O) -> (B, A)."""
    x = (obs / OBS_SCALE).T  # (O, B); with rows and x @ w, training takes 1.3 times as long
    last = len(params) // 2 - 1
    for i in range(last):
        x = jax.nn.relu(params[f"w{i}"] @ x + params[f"b{i}"])
    return (params[f"w{last}"] @ x + params[f"b{last}"]).T


# ---------- Replay buffer
class Transition(NamedTuple):  # each array has a first axis: buffer_size, N or B
    obs: Array
    action: Array
    reward: Array
    discount: Array  # of the value of next_obs: gamma, 0 if terminated
    next_obs: Array  # before any reset
    ended: Array  # terminated or truncated


def add(buffer, added, new):
    """Write N transitions, from number `added` on, over the oldest."""
    rows = (added + jnp.arange(len(new.action))) % len(buffer.action)
    # `jax.tree.map` calls a function on each array in nested structures ("pytrees").
    # `x.at[rows].set(y)` is x after x[rows] = y; compiled, it works in place.
    return jax.tree.map(lambda x, y: x.at[rows].set(y), buffer, new)


def sample(args, key, buffer, added):
    """Draw B transitions uniformly. Extend each to n steps if possible."""
    # Transition i, in the order added, is in row i % buffer_size; i + N is its environment's next.
    oldest = jnp.maximum(added - args.buffer_size, 0)
    start = oldest + (jax.random.uniform(key, (args.batch_size,)) * (added - oldest)).astype(int)
    first = last = start % args.buffer_size
    reward = buffer.reward[first]
    discount = buffer.discount[first]
    for k in range(1, args.n_step):
        later = start + k * args.num_envs  # k steps later in the same environment
        # An end or the newest step stops the sum for good: last stays, and later grows.
        stop = buffer.ended[last] | (later >= added)
        last = jnp.where(stop, last, later % args.buffer_size)
        reward += jnp.where(stop, 0, discount * buffer.reward[last])
        discount *= jnp.where(stop, 1, buffer.discount[last])
    batch = jax.tree.map(lambda x: x[first], buffer)
    return batch._replace(reward=reward, discount=discount, next_obs=buffer.next_obs[last])


# ---------- Learning
class Learner(NamedTuple):
    params: dict
    target_params: dict
    opt_state: tuple


def update(args, learner, batch):
    """One gradient step on the mean squared error. Returns the next Learner and the loss."""
    # With n steps: y = r_1 + gamma r_2 + ... + gamma^(n-1) r_n + gamma^n max_a' Q(s_n, a'; w-)
    next_q = jnp.max(q_values(learner.target_params, batch.next_obs), axis=1)
    target = batch.reward + batch.discount * next_q

    # JAX differentiates with respect to loss_fn's argument; target is a constant inside it.
    def loss_fn(params):
        q = q_values(params, batch.obs)[jnp.arange(args.batch_size), batch.action]  # Q(s, a; w)
        return jnp.mean((target - q) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(learner.params)
    # An optax optimizer is two pure functions: all of Adam's memory is in opt_state.
    updates, opt_state = optax.adam(args.learning_rate).update(grads, learner.opt_state)
    params = optax.apply_updates(learner.params, updates)
    # w- <- (1 - tau) w- + tau w
    target_params = optax.incremental_update(params, learner.target_params, args.tau)
    return Learner(params, target_params, opt_state), loss


# ---------- Training
class Agent(NamedTuple):  # all that training changes
    key: Array
    env_steps: Array
    state: EnvState  # each array has a first axis N
    ended: Array  # (N,) the next step resets
    returns: Array  # (N,) of current episodes
    buffer: Transition
    learner: Learner


def init_agents(args):
    """The agents of all seeds: arrays with a first axis K, divided among devices."""
    N = args.num_envs
    seeds = args.seed + np.arange(args.num_seeds)
    sizes = (OBS_SIZE, *args.hidden_sizes, ACTIONS)
    # NumPy draws the weights: JAX would compile for 0.5 s.
    params = [init_params(np.random.default_rng(seed), sizes) for seed in seeds]
    params = jax.tree.map(lambda *x: np.stack(x), *params)

    def init_agent(seed, params):
        key = jax.random.key(seed)
        # Zeros will do: the first step resets.
        shapes = jax.eval_shape(jax.vmap(reset), jax.random.split(key, N))
        state = jax.tree.map(jnp.zeros_like, shapes)
        obs = jnp.zeros((args.buffer_size, OBS_SIZE))
        zeros = jnp.zeros(args.buffer_size)
        buffer = Transition(obs, zeros.astype(int), zeros, zeros, obs, zeros.astype(bool))
        learner = Learner(params, params, optax.adam(args.learning_rate).init(params))
        return Agent(key, 0, state, jnp.ones(N, bool), jnp.zeros(N), buffer, learner)

    # Devices share the agents equally.
    devices = max(n for n in range(1, jax.device_count() + 1) if args.num_seeds % n == 0)
    sharding = jax.NamedSharding(jax.sharding.Mesh(jax.devices()[:devices], "K"), jax.P("K"))
    return jax.jit(jax.vmap(init_agent), out_shardings=sharding)(seeds, params)


def joint_step(args, agent, _):
    """For scan: a step of N environments, an update. Returns the Agent, (ended, returns, loss)."""
    N = args.num_envs
    # A key always gives the same numbers: each use gets its own.
    key, reset_key, explore_key, step_key, sample_key = jax.random.split(agent.key, 5)

    # Reset where an episode has ended. `jit` compiles before arrays have values: no `if` on them.
    def restart(key, ended, state):
        return jax.tree.map(partial(jnp.where, ended), reset(key), state)

    keys = jax.random.split(reset_key, N)
    state = jax.vmap(restart)(keys, agent.ended, agent.state)
    obs = state.obs

    # Act: epsilon-greedy.
    falling = max(1, args.exploration_fraction * args.total_timesteps)
    epsilon = optax.linear_schedule(1, args.end_e, falling)(agent.env_steps)
    coin, pick = jax.random.uniform(explore_key, (2, N))
    greedy = jnp.argmax(q_values(agent.learner.params, obs), axis=1)
    action = jnp.where(coin < epsilon, (pick * ACTIONS).astype(int), greedy)

    # Step.
    keys = jax.random.split(step_key, N)
    state, reward, terminated, truncated = jax.vmap(step)(keys, state, action)
    reward = reward.reshape(N)  # yours may be (1,)
    ended = terminated | truncated
    returns = jnp.where(agent.ended, 0, agent.returns) + reward

    # Store. Only termination makes the value of next_obs 0: a truncated episode could go on.
    new = Transition(obs, action, reward, args.gamma * ~terminated, state.obs, ended)
    buffer = add(agent.buffer, agent.env_steps, new)
    env_steps = agent.env_steps + N

    # Learn.
    learner, loss = update(args, agent.learner, sample(args, sample_key, buffer, env_steps))
    agent = Agent(key, env_steps, state, ended, returns, buffer, learner)
    return agent, (ended, returns, loss)


def train(args):
    """Returns params (first axis K), episodes (environment step, return, seed) and counts.

    Ctrl-C ends it early. Raises ValueError on bad settings, FloatingPointError on a bad loss.
    """
    check(args)
    started = time.time()
    agents = init_agents(args)
    joint_steps = args.total_timesteps // args.num_envs
    chunks = max(1, joint_steps // 500)  # in between, Python prints

    # `scan` is `for _ in range(length): agent, output = joint_step(args, agent, None)`, compiled.
    # It stacks the outputs: ended (T, N), by vmap (K, T, N).
    def run_chunk(agent):
        return jax.lax.scan(partial(joint_step, args), agent, length=joint_steps // chunks)

    # Donated: the new agents overwrite the old. Compiled, then timed.
    run_chunks = jax.jit(jax.vmap(run_chunk), donate_argnums=0).lower(agents).compile()
    compiled = printed = time.time()
    history = []
    try:
        for chunk in range(chunks):
            agents, outputs = run_chunks(agents)
            # Params too: Ctrl-C in a call loses its agents.
            history.append(jax.device_get((agents.learner.params, *outputs)))
            if time.time() - printed > 1 or chunk == chunks - 1:
                printed = time.time()
                report(args, history, printed - compiled)
    except KeyboardInterrupt:
        if not history:
            raise
    seconds = time.time() - compiled
    params, ended, returns, _ = zip(*history, strict=True)
    ended = np.concatenate(ended, axis=1)
    returns = np.concatenate(returns, axis=1)[ended]
    k, t, _ = np.nonzero(ended)
    episodes = np.stack([(t + 1) * args.num_envs, returns, args.seed + k], axis=1)
    env_steps = ended.shape[1] * args.num_envs
    counts = {"env_steps": env_steps, "interrupted": len(history) < chunks}
    counts |= {"compile_seconds": compiled - started, "train_seconds": seconds}
    counts["steps_per_second"] = args.num_seeds * env_steps / seconds
    return params[-1], episodes, counts


def report(args, history, seconds):
    """Print the progress."""
    _, ended, returns, losses = history[-1]
    if not np.isfinite(losses).all():
        raise FloatingPointError("the loss is not finite")
    steps = len(history) * ended.shape[1] * args.num_envs
    recent = returns[ended].mean() if ended.any() else np.nan
    left = seconds * (args.total_timesteps / steps - 1)
    print(f"{steps:,} steps, recent return {recent:.1f}, loss {losses.mean():.3g}", end=", ")
    print(f"{args.num_seeds * steps / seconds:,.0f} steps/s, {left:.0f} s left", flush=True)


# ---------- Evaluation
def evaluate(args, params):
    """The returns (K, eval_episodes) of greedy episodes, the same starts for every agent."""

    def play(params, seed):
        def one_step(carry, key):
            state, total, running = carry
            action = jnp.argmax(q_values(params, state.obs[None]))
            state, reward, terminated, truncated = step(key, state, action)
            total += jnp.where(running, jnp.sum(reward), 0)
            return (state, total, running & ~(terminated | truncated)), None

        reset_key, steps_key = jax.random.split(jax.random.key(seed))
        keys = jax.random.split(steps_key, MAX_STEPS)
        (_, total, _), _ = jax.lax.scan(one_step, (reset(reset_key), 0.0, True), keys)
        return total

    play_all = jax.jit(jax.vmap(play, (0, None)))  # all agents, one seed
    seeds = 2**31 + np.arange(args.eval_episodes, dtype=np.uint32)  # training's are lower
    return np.stack([play_all(params, seed) for seed in seeds], axis=1).astype(float)


def summarize(args, returns):
    """Print the result, and return statistics of each agent."""
    solved = returns.mean(axis=1) >= SOLVED_RETURN
    print(f"{returns.size} greedy episodes: mean {returns.mean():.1f}", end=", ")
    print(f"std {returns.std():.1f}, worst {returns.min():.0f}", end="; ")
    print(f"{solved.sum()} of {len(solved)} solved (threshold {SOLVED_RETURN:g})")
    agents = []
    for k, x in enumerate(returns):
        agent = {"eval_return_mean": x.mean(), "eval_return_std": x.std()}
        agent |= {"eval_return_min": x.min(), "eval_episodes": len(x), "solved": bool(solved[k])}
        agents.append(agent | {"seed": None if args.load_model else args.seed + k})
    return agents


# ---------- Command line
def check(args):
    """Raise ValueError, naming the flag, on bad settings."""
    counts = "num_seeds", "num_envs", "batch_size", "n_step", "hidden_sizes", "eval_episodes"
    limits = dict.fromkeys(counts, (1, np.inf))
    limits |= dict.fromkeys(("total_timesteps", "buffer_size"), (args.num_envs, 2**31))
    limits |= dict.fromkeys(("gamma", "end_e", "exploration_fraction"), (0, 1))
    limits |= {"seed": (0, 2**31 - args.num_seeds), "learning_rate": (0, 1e9), "tau": (1e-6, 1)}
    for name, (least, most) in limits.items():
        value = getattr(args, name)
        if not np.array_equal(np.clip(value, least, most), value):
            raise ValueError(f"{name} must be between {least} and {most}")


def load_model(path):
    """The params of a saved model.npz. To play with agent 0:

    params = {name: array[0] for name, array in load_model(path).items()}
    action = int(q_values(params, obs[None]).argmax())
    """
    params = dict(np.load(path, allow_pickle=False))
    if params.pop("script") != SCRIPT:
        raise ValueError("another script saved it")
    if jax.vmap(q_values, (0, None))(params, np.zeros((1, OBS_SIZE))).shape[1:] != (1, ACTIONS):
        raise ValueError("wrong shapes")
    return params


def keep(args, params, episodes):
    """Save the model, the returns, and a plot of them."""
    from matplotlib.figure import Figure  # slow to import

    np.savez(f"{args.output_dir}/model.npz", script=SCRIPT, **params)
    names = "env_step,episode_return,seed"
    np.savetxt(f"{args.output_dir}/returns.csv", episodes, "%.10g", ",", header=names, comments="")
    axes = Figure().add_subplot(xlabel="environment steps", ylabel="episode return")
    axes.plot(*episodes[:, :2].T, ".", markersize=1)
    axes.figure.savefig(f"{args.output_dir}/curve.png", dpi=150)


def main(args):
    """Run the script. Exit status: 0, 1 on failure, 2 on bad input, 130 after Ctrl-C."""
    flag = "settings"
    try:
        check(args)
        if args.num_seeds > 1:  # devices, one per core
            jax.config.update("jax_num_cpu_devices", min(os.cpu_count(), args.num_seeds))
        flag = "load_model"
        if args.load_model:
            params = load_model(args.load_model)
        flag = "output_dir"
        if args.output_dir:
            importlib.import_module("matplotlib")  # or fail early
            Path(args.output_dir).mkdir(parents=True)
    except Exception as error:
        print(f"error: {flag}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    summary = {"script": SCRIPT, "versions": {"jax": jax.__version__}}
    try:
        if not args.load_model:
            params, episodes, counts = train(args)
            summary |= counts | {"args": vars(args)}
            if args.output_dir:
                keep(args, params, episodes)
        summary["seeds"] = summarize(args, evaluate(args, params))
    except FloatingPointError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        return 130
    if args.output_dir:
        summary["device"] = jax.devices()[0].device_kind
        Path(args.output_dir, "summary.json").write_text(json.dumps(summary, indent=2))
    return 130 if summary.get("interrupted") else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))

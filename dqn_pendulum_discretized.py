# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,!=0.11.1", "optax>=0.2.8", "gymnasium[mujoco]>=1.4.0", "numpy>=2.4",
#     "tyro>=1.0.17", "matplotlib>=3.11"]  # not jax 0.11.1: its issue 40101
# ///
"""DQN on InvertedPendulum-v5, or on any Gymnasium environment with one bounded, continuous action.

What it teaches: a maximum over actions is easy for a list and hard for an interval. So the agent
chooses from a list of evenly spaced actions, here called torques. Its network is one of two:
- It takes the state, and has an output for each torque (--q-input state).
- It takes the state and a torque, and has one output (--q-input state-action). Because neighboring
  torques share what is learned, the list can hold thousands. In training, a maximum is over
  --max-samples random torques, which lowers Q a little (Fourati et al. 2024, arXiv 2405.10310).

Q(s, a) is the expected discounted sum of rewards after action a in state s, if every later action
is optimal. Deep Q-learning (Mnih et al. 2015, https://doi.org/10.1038/nature14236) learns
it as a network Q(s, a; w) with weights w. It trains on steps (s, a, r, s') drawn at random from a
replay buffer, because consecutive steps are too similar. A target network, whose weights w- follow
w slowly, keeps the targets steady. Each update takes a gradient step to reduce the mean of

    (y - Q(s, a; w))^2   with   y = r + gamma max_a' Q(s', a'; w-),   or y = r if s' is terminal.

    python dqn_pendulum_discretized.py --q-input state-action --num-bins 1000
    python dqn_pendulum_discretized.py --env-id Pendulum-v1 --output-dir runs/1

Measured on ten unseen seeds: InvertedPendulum-v5 all solved, with 1000 torques too;
Pendulum-v1 mean -149; with five torques, -136 is optimal.

Differences from Mnih et al.:
- The target network moves a little at every update (--tau).
- Learning starts at once; the agent acts with weights one group of updates old.
- Adam replaces RMSProp; its learning rate falls to 0 (--learning-rate); errors are not clipped.
- Hidden layers are normalized; rewards are scaled, not clipped (--reward-scale).

Letters in shapes: B batch, G updates in a group, O observation, A torques.
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

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from gymnasium.spaces import Box


# ---------- Arguments
@dataclass(frozen=True)
class Args:
    """DQN on a Gymnasium environment with one continuous action."""

    seed: int = 1  # same seed, machine, versions: same result
    env_id: str = "InvertedPendulum-v5"  # or another id, or my_module:MyEnv-v0
    num_bins: int = 5  # torques, from the lowest to the highest
    q_input: Literal["state", "state-action"] = "state"  # of the network
    max_samples: int = 32  # torques for a maximum, if q_input is state-action
    total_timesteps: int = 30_000  # environment steps
    train_frequency: int = 16  # environment steps between groups of updates
    gradient_steps: int = 8  # updates in a group
    buffer_size: int = 15_000  # transitions in the replay buffer
    batch_size: int = 64  # transitions in an update
    hidden_sizes: tuple[int, ...] = (64, 64)  # units in each hidden layer
    learning_rate: float = 3e-3  # of Adam at the start; it falls to 0
    gamma: float = 0.98  # discount per step
    tau: float = 0.0064  # how far each update moves w- toward w; 1 copies w
    reward_scale: float = 0.03  # factor of rewards in targets, to keep Q near 1
    end_e: float = 0.02  # epsilon, the fraction of random actions, at the end
    exploration_fraction: float = 0.2  # part of the run in which epsilon falls from 1
    eval_episodes: int = 100  # greedy episodes at the end
    output_dir: str | None = None  # new folder for the results
    load_model: str | None = None  # evaluate this model.npz instead of training


SCRIPT = "dqn_pendulum_discretized.py"


# ---------- Environment
def prepare(env):
    """Turn observations into vectors (Discrete: one-hot; Dict: joined) and rewards into numbers."""
    env = gymnasium.wrappers.FlattenObservation(env)
    space = env.action_space
    bounded = isinstance(space, Box) and space.shape == (1,) and space.is_bounded()
    if not isinstance(env.observation_space, Box) or not bounded:
        spaces = f"{env.observation_space} and {space}"
        raise ValueError(f"observations must be numbers and actions a Box (1,), not {spaces}")
    env = gymnasium.wrappers.TransformReward(env, lambda reward: np.asarray(reward).item())
    try:
        env.reset(seed=0)
        env.step(space.low)
    except Exception as error:
        api = "reset(seed) -> obs, info; step(action) -> obs, reward, terminated, truncated, info"
        raise ValueError(f"Gymnasium's API is {api}: {error}") from error
    # A key of its own: your env may be wrapped like this.
    return gymnasium.wrappers.RecordEpisodeStatistics(env, buffer_length=10**9, stats_key=SCRIPT)


def make_torques(args, env):
    """The torques (A,), evenly spaced over the range."""
    space = env.action_space
    return np.linspace(space.low[0], space.high[0], args.num_bins, dtype=np.float32)


# ---------- Q-network
def init_params(rng, sizes):
    """The layers of a perceptron: w0 (in, out), b0 (1, out), w1, ... (He et al. 2015, eq. 10)."""
    params = {}
    for i, (n_in, n_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        limit = np.sqrt(6 / n_in)  # variance 2 / n_in
        params[f"w{i}"] = rng.uniform(-limit, limit, (n_in, n_out)).astype(np.float32)
        params[f"b{i}"] = np.zeros((1, n_out), np.float32)
    return params


def perceptron(params, x):
    """The layers: x (B, in) -> (B, out)."""
    # Operators and methods only: it runs in NumPy to act, in JAX to learn.
    x = x.astype(np.float32)
    last = len(params) // 2 - 1
    for i in range(last):
        x = normalize(x @ params[f"w{i}"] + params[f"b{i}"])
        x = x * (x > 0)  # ReLU
    return x @ params[f"w{last}"] + params[f"b{last}"]


def normalize(x):
    """Rows with mean 0 and variance 1: layer normalization (Ba et al. 2016, eq. 3)."""
    n = x.shape[1]
    x = x - x.sum(axis=1, keepdims=True) / n  # mean() makes acting 1.3 times as long
    return x / ((x * x).sum(axis=1, keepdims=True) / n + 1e-5) ** 0.5


def q_of_state(params, obs, torques):
    """Q(s, a) of all torques: obs (B, O) -> (B, A). It ignores torques."""
    return perceptron(params, obs)


def q_of_state_action(params, obs, torques):
    """Q(s, a) of the given torques, (A,) or (B, A): obs (B, O) -> (B, A)."""
    xp = np if isinstance(obs, np.ndarray) else jnp
    torques = xp.broadcast_to(torques, (len(obs), torques.shape[-1]))
    states = obs.repeat(torques.shape[1], axis=0)
    rows = xp.concatenate([states, torques.reshape(-1, 1)], axis=1)  # (B * A, O + 1)
    return perceptron(params, rows).reshape(torques.shape)


Q_VALUES = {"state": q_of_state, "state-action": q_of_state_action}


# ---------- Replay buffer
class Transition(NamedTuple):  # one; or arrays of many: (buffer_size, ...), (B, ...)
    obs: np.ndarray
    action: np.ndarray  # the index of its torque
    reward: np.ndarray  # scaled
    discount: np.ndarray  # of the value of next_obs: gamma, 0 if terminated
    next_obs: np.ndarray  # before a reset


def add(buffer, added, new):
    """Write transition number `added`, from 0, over the oldest."""
    for field, value in zip(buffer, new, strict=True):
        field[added % len(field)] = value


def sample(args, rng, buffer, added, torques):
    """Draw the batches of a group (G, B, ...), each with torques for maxima (G, max_samples)."""
    filled = min(added, args.buffer_size)
    rows = rng.integers(filled, size=(args.gradient_steps, args.batch_size))
    drawn = rng.choice(torques, (args.gradient_steps, args.max_samples))
    return Transition(*(field[rows] for field in buffer)), drawn


# ---------- Learning
class Learner(NamedTuple):
    params: dict
    target_params: dict
    opt_state: tuple


def make_optimizer(args):
    """Adam with a learning rate that falls linearly to 0."""
    updates = args.total_timesteps * args.gradient_steps / args.train_frequency
    return optax.adam(optax.linear_schedule(args.learning_rate, 0, updates))


def update(args, torques, learner, inputs):
    """One gradient step on the mean squared error. Returns the next Learner and the loss."""
    batch, drawn = inputs  # drawn is (max_samples,)
    q_values = Q_VALUES[args.q_input]
    # y = r + gamma max_a' Q(s', a'; w-),   or y = r if s' is terminal
    next_q = jnp.max(q_values(learner.target_params, batch.next_obs, drawn), axis=1)
    target = batch.reward + batch.discount * next_q

    # JAX differentiates with respect to loss_fn's argument; target is a constant inside it.
    def loss_fn(params):
        if args.q_input == "state":  # a setting, so `if` works
            q = q_of_state(params, batch.obs, torques)[jnp.arange(args.batch_size), batch.action]
        else:
            q = q_of_state_action(params, batch.obs, torques[batch.action, None])[:, 0]
        return jnp.mean((target - q) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(learner.params)
    # An optax optimizer is two pure functions: all of Adam's memory is in opt_state.
    updates, opt_state = make_optimizer(args).update(grads, learner.opt_state)
    params = optax.apply_updates(learner.params, updates)
    # w- <- (1 - tau) w- + tau w
    target_params = optax.incremental_update(params, learner.target_params, args.tau)
    return Learner(params, target_params, opt_state), loss


def learn(args, torques, learner, inputs):
    """A group of updates. Returns the Learner and the last loss."""
    # `scan` compiles a loop: for i in range(G): learner, loss = update(..., learner, inputs i).
    learner, losses = jax.lax.scan(partial(update, args, torques), learner, inputs)
    return learner, losses[-1]


# ---------- Training
def run_steps(args, env, rng, learner, learn_group, buffer):
    """Yields the Learner and the latest loss after each step. learn_group is compiled."""
    torques = make_torques(args, env)
    falling = max(1, args.exploration_fraction * args.total_timesteps)
    acting_params = learner.params
    loss = 0.0
    obs, _ = env.reset(seed=int(rng.integers(2**30)))
    for env_steps in range(1, args.total_timesteps + 1):
        # Act: epsilon-greedy.
        epsilon = max(args.end_e, 1 - (1 - args.end_e) * env_steps / falling)
        if rng.random() < epsilon:
            action = rng.integers(args.num_bins)
        elif args.q_input == "state":
            action = q_of_state(acting_params, obs[None], torques).argmax()
        else:
            some = rng.integers(args.num_bins, size=args.max_samples)
            action = some[q_of_state_action(acting_params, obs[None], torques[some]).argmax()]

        # Step.
        next_obs, reward, terminated, truncated, _ = env.step(torques[action, None])

        # Store. Only termination makes the value of next_obs 0: a truncated episode could go on.
        discount = 0.0 if terminated else args.gamma
        new = Transition(obs, action, args.reward_scale * reward, discount, next_obs)
        add(buffer, env_steps - 1, new)
        obs = next_obs
        if terminated or truncated:
            obs, _ = env.reset()

        # Learn.
        if env_steps % args.train_frequency == 0:
            # np.asarray waits for the previous group. The agent acts with that group's weights ...
            acting_params = jax.tree.map(np.asarray, learner.params)
            # ... while JAX works on the next group in the background: this returns at once.
            learner, loss = learn_group(learner, sample(args, rng, buffer, env_steps, torques))
        yield learner, loss


def train(args, env):
    """Returns params, episodes (environment step, return) and counts.

    Ctrl-C ends it early. Raises ValueError on bad settings or environments, NotImplementedError on
    spaces unknown to Gymnasium, FloatingPointError on numbers that are not finite.
    """
    check(args)
    started = time.time()
    env = prepare(env)
    torques = make_torques(args, env)
    rng = np.random.default_rng(args.seed)
    (obs_size,) = env.observation_space.shape
    sizes = (obs_size, *args.hidden_sizes, args.num_bins)
    if args.q_input == "state-action":
        sizes = (obs_size + 1, *args.hidden_sizes, 1)
    params = init_params(rng, sizes)
    learner = Learner(params, params, make_optimizer(args).init(params))
    obs = np.zeros((args.buffer_size, obs_size), np.float32)
    zeros = np.zeros(args.buffer_size, np.float32)
    buffer = Transition(obs, zeros.astype(int), zeros.copy(), zeros, obs.copy())
    # `jit` compiles learn at its first call, on zeros; the result is dropped.
    learn_group = jax.jit(partial(learn, args, jnp.asarray(torques)))
    learn_group(learner, sample(args, rng, buffer, 1, torques))
    compiled = printed = time.time()
    run = run_steps(args, env, rng, learner, learn_group, buffer)
    with contextlib.suppress(KeyboardInterrupt):
        for env_steps in range(1, args.total_timesteps + 1):
            learner, loss = next(run)
            if time.time() - printed > 1 or env_steps == args.total_timesteps:
                printed = time.time()
                report(args, env_steps, env, buffer, loss, printed - compiled)
    seconds = time.time() - compiled
    counts = {"env_steps": env_steps, "interrupted": env_steps < args.total_timesteps}
    counts |= {"compile_seconds": compiled - started, "train_seconds": seconds}
    counts["steps_per_second"] = env_steps / seconds
    episodes = np.column_stack([np.cumsum(env.length_queue), env.return_queue])
    return jax.device_get(learner.params), episodes, counts


def report(args, env_steps, env, buffer, loss, seconds):
    """Print the progress."""
    for name, values in (("observation", buffer.obs), ("reward", buffer.reward), ("loss", loss)):
        if not np.isfinite(values).all():
            raise FloatingPointError(f"{name} is not finite")
    recent = np.mean(list(env.return_queue)[-100:] or np.nan)
    left = seconds * (args.total_timesteps / env_steps - 1)
    print(f"{env_steps:,} steps, recent return {recent:.1f}, loss {loss:.3g}", end=", ")
    print(f"{env_steps / seconds:,.0f} steps/s, {left:.0f} s left", flush=True)


# ---------- Evaluation
def play(args, params, env, seed):
    """The return of a greedy episode."""
    torques = make_torques(args, env)
    q_values = Q_VALUES[args.q_input]
    obs, _ = env.reset(seed=seed)
    for _ in range(100_000):
        action = q_values(params, obs[None], torques).argmax()
        obs, _, terminated, truncated, _ = env.step(torques[action, None])
        if terminated or truncated:
            return env.return_queue[-1]
    raise TimeoutError("an episode exceeded 100,000 steps; use gymnasium.wrappers.TimeLimit")


def evaluate(args, params, env):
    """The returns (eval_episodes,) of greedy episodes. Training's seeds are below 2^30."""
    env = prepare(env)
    first = 2**30 + args.seed * args.eval_episodes
    return np.array([play(args, params, env, first + k) for k in range(args.eval_episodes)])


def summarize(args, env, returns):
    """Print the result, and return statistics of the agent."""
    threshold = env.spec.reward_threshold
    solved = None if threshold is None else bool(returns.mean() >= threshold)
    print(f"{returns.size} greedy episodes: mean {returns.mean():.1f}", end=", ")
    print(f"std {returns.std():.1f}, worst {returns.min():.0f}", end="; ")
    print(f"solved: {solved} (threshold {threshold})")
    agent = {"eval_return_mean": returns.mean(), "eval_return_std": returns.std()}
    agent |= {"eval_return_min": returns.min(), "eval_episodes": returns.size, "solved": solved}
    return agent | {"seed": None if args.load_model else args.seed}


# ---------- Command line
def check(args):
    """Raise ValueError, naming the flag, on bad settings."""
    counts = "total_timesteps", "train_frequency", "gradient_steps", "buffer_size"
    counts += "batch_size", "hidden_sizes", "eval_episodes", "max_samples"
    limits = dict.fromkeys(counts, (1, np.inf)) | {"num_bins": (2, np.inf)}
    limits |= dict.fromkeys(("gamma", "end_e", "exploration_fraction"), (0, 1))
    limits |= dict.fromkeys(("learning_rate", "reward_scale"), (1e-9, 1e9))
    limits |= {"seed": (0, 2**20), "tau": (1e-6, 1)}
    for name, (least, most) in limits.items():
        value = getattr(args, name)
        if not np.array_equal(np.clip(value, least, most), value):
            raise ValueError(f"{name} must be between {least} and {most}")


def load_model(path, args=None, env=None):
    """The params of a saved model.npz, which must fit args and env, if given."""
    params = dict(np.load(path, allow_pickle=False))
    if params.pop("script") != SCRIPT:
        raise ValueError("another script saved it")
    torques = params.pop("torques")
    if args and not np.array_equal(torques, make_torques(args, env)):
        raise ValueError(f"it is for {len(torques)} torques from {torques[0]} to {torques[-1]}")
    if args:
        Q_VALUES[args.q_input](params, env.reset()[0][None], torques)
    return params


def keep(args, params, episodes, torques):
    """Save the model, the returns, and a plot of them."""
    from matplotlib.figure import Figure  # slow to import

    np.savez(f"{args.output_dir}/model.npz", script=SCRIPT, torques=torques, **params)
    names = "env_step,episode_return"
    np.savetxt(f"{args.output_dir}/returns.csv", episodes, "%.10g", ",", header=names, comments="")
    axes = Figure().add_subplot(xlabel="environment steps", ylabel="episode return")
    axes.plot(*episodes.T, ".", markersize=1)
    axes.figure.savefig(f"{args.output_dir}/curve.png", dpi=150)


def main(args):
    """Run the script. Exit status: 0, 1 on failure, 2 on bad input, 130 after Ctrl-C."""
    flag = "settings"
    try:
        check(args)
        flag = "env_id"
        env = gymnasium.make(args.env_id)
        prepare(env)  # or fail early
        flag = "load_model"
        if args.load_model:
            params = load_model(args.load_model, args, prepare(env))
        flag = "output_dir"
        if args.output_dir:
            importlib.import_module("matplotlib")
            Path(args.output_dir).mkdir(parents=True)
    except Exception as error:
        print(f"error: {flag}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    summary = {"script": SCRIPT, "versions": {"jax": jax.__version__}}
    summary["device"] = jax.devices()[0].device_kind
    try:
        if not args.load_model:
            params, episodes, counts = train(args, env)
            summary |= counts | {"args": vars(args)}
            if args.output_dir:
                keep(args, params, episodes, make_torques(args, env))
        summary["seeds"] = [summarize(args, env, evaluate(args, params, env))]  # one agent
    except (FloatingPointError, TimeoutError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        return 130
    if args.output_dir:
        Path(args.output_dir, "summary.json").write_text(json.dumps(summary, indent=2))
    return 130 if summary.get("interrupted") else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))

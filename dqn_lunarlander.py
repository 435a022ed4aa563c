# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,!=0.11.1", "optax>=0.2.8", "gymnasium[box2d]>=1.4.0", "numpy>=2.4",
#     "tyro>=1.0.17", "matplotlib>=3.11", "imageio>=2.38"]  # not jax 0.11.1: its issue 40101
# ///
"""DQN on LunarLander-v3, or on any Gymnasium environment with Discrete actions.

What it teaches: the environment is ordinary Python, and calls of JAX at each step are slow. So the
agent acts in NumPy, while JAX updates the network in the background (asynchronous dispatch), a
group of updates in a call.

Q(s, a) is the expected discounted sum of rewards after action a in state s, if every later action
is optimal. Deep Q-learning (Mnih et al. 2015, https://doi.org/10.1038/nature14236) learns
it as a network Q(s, a; w) with weights w. It trains on steps (s, a, r, s') drawn at random from a
replay buffer, because consecutive steps are too similar. A target network, whose weights w- follow
w slowly, keeps the targets steady. Each update takes a gradient step to reduce the mean of

    h(y - Q(s, a; w))   with   y = r + gamma max_a' Q(s', a'; w-),   or y = r if s' is terminal,

and h(x) = x^2 / 2 if |x| < 1, else |x| - 1/2 (Huber 1964). Its slope is the error, clipped.

    python dqn_lunarlander.py --env-id Acrobot-v1
    python dqn_lunarlander.py --output-dir runs/1 --eval-frequency 25000 --capture-video

Measured on ten unseen seeds: all solved, mean 277, worst agent 254, 28 s each.

Differences from Mnih et al.:
- Targets sum n rewards, of random actions too, then add Q (Sutton 1988, --n-step).
- w picks the best next action, and w- values it (Double DQN, van Hasselt et al. 2016).
- The target network moves a little at every update (--tau).
- Learning starts at once; the agent acts with weights one group of updates old.
- Adam replaces RMSProp; its learning rate falls to 0 (--learning-rate).
- Hidden layers are normalized; rewards are scaled, not clipped (--reward-scale).

Letters in shapes: B batch, G updates in a group, O observation, A actions.
"""

import contextlib
import importlib
import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from gymnasium.spaces import Box, Discrete


# ---------- Arguments
@dataclass(frozen=True)
class Args:
    """DQN on a Gymnasium environment with Discrete actions."""

    seed: int = 1  # same seed, machine, versions: same result
    env_id: str = "LunarLander-v3"  # or another id, or my_module:MyEnv-v0
    total_timesteps: int = 200_000  # environment steps
    train_frequency: int = 32  # environment steps between groups of updates
    gradient_steps: int = 10  # updates in a group
    buffer_size: int = 50_000  # transitions in the replay buffer
    batch_size: int = 64  # transitions in an update
    hidden_sizes: tuple[int, ...] = (128, 128)  # units in each hidden layer
    learning_rate: float = 3e-3  # of Adam at the start; it falls to 0
    gamma: float = 0.995  # discount per step
    n_step: int = 3  # rewards summed in a target
    tau: float = 0.005  # how far each update moves w- toward w; 1 copies w
    reward_scale: float = 0.03  # factor of rewards in targets, to keep errors near 1
    end_e: float = 0.02  # epsilon, the fraction of random actions, at the end
    exploration_fraction: float = 0.2  # part of the run in which epsilon falls from 1
    eval_episodes: int = 100  # greedy episodes at the end
    eval_frequency: int = 0  # environment steps between snapshots; 0: none
    capture_video: bool = False  # film the snapshots and the agent, as GIFs
    output_dir: str | None = None  # new folder for the results
    load_model: str | None = None  # evaluate this model.npz instead of training


SCRIPT = "dqn_lunarlander.py"


# ---------- Environment
def prepare(env):
    """Turn observations into vectors (Discrete: one-hot; Dict: joined) and rewards into numbers."""
    env = gymnasium.wrappers.FlattenObservation(env)
    if not isinstance(env.observation_space, Box) or not isinstance(env.action_space, Discrete):
        spaces = f"{env.observation_space} and {env.action_space}"
        raise ValueError(f"observations must be numbers and actions Discrete, not {spaces}")
    env = gymnasium.wrappers.TransformReward(env, lambda reward: np.asarray(reward).item())
    try:
        env.reset(seed=0)
        env.step(env.action_space.start)
    except Exception as error:
        api = "reset(seed) -> obs, info; step(action) -> obs, reward, terminated, truncated, info"
        raise ValueError(f"Gymnasium's API is {api}: {error}") from error
    # A key of its own: your env may be wrapped like this.
    return gymnasium.wrappers.RecordEpisodeStatistics(env, buffer_length=10**9, stats_key=SCRIPT)


# ---------- Q-network
def init_params(rng, sizes):
    """The layers of a perceptron: w0 (in, out), b0 (1, out), w1, ... (He et al. 2015, eq. 10)."""
    params = {}
    for i, (n_in, n_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        limit = np.sqrt(6 / n_in)  # variance 2 / n_in
        params[f"w{i}"] = rng.uniform(-limit, limit, (n_in, n_out)).astype(np.float32)
        params[f"b{i}"] = np.zeros((1, n_out), np.float32)
    return params


def q_values(params, obs):
    """Q(s, a) of every action: obs (B, O) -> (B, A)."""
    # Operators and methods only: it runs in NumPy to act, in JAX to learn.
    x = obs.astype(np.float32)
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


# ---------- Replay buffer
class Transition(NamedTuple):  # one; or arrays of many: (buffer_size, ...), (B, ...)
    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray  # discounted sum of k scaled rewards: n, or fewer at an end
    discount: np.ndarray  # of the value of next_obs: gamma^k, or 0 if terminated
    next_obs: np.ndarray  # k steps after obs, before any reset


def extend(queue, new, ended, n_step):
    """Extend the queue's transitions by a step. Returns the complete ones and the others.

    With n_step=3, gamma=0.5, and rewards 1, 2, 4, their (reward, discount), a row after each step:
        (1, 0.5)
        (1 + 0.5 * 2, 0.25)              (2, 0.5)
        (1 + 0.5 * 2 + 0.25 * 4, 0.125)  (2 + 0.5 * 4, 0.25)  (4, 0.5)
    Now the first is complete; all are if the episode has ended (discount 0 if terminated).
    """
    longer = []
    for old in queue:
        reward = old.reward + old.discount * new.reward
        discount = old.discount * new.discount
        longer.append(old._replace(reward=reward, discount=discount, next_obs=new.next_obs))
    longer.append(new)
    complete = 1 if len(longer) == n_step else 0
    if ended:
        complete = len(longer)
    return longer[:complete], longer[complete:]


def add(buffer, added, new):
    """Write transition number `added`, from 0, over the oldest."""
    for field, value in zip(buffer, new, strict=True):
        field[added % len(field)] = value


def sample(args, rng, buffer, added):
    """Draw the batches of a group, uniformly: copies (G, B, ...)."""
    filled = min(added, args.buffer_size)
    rows = rng.integers(filled, size=(args.gradient_steps, args.batch_size))
    return Transition(*(field[rows] for field in buffer))


# ---------- Learning
class Learner(NamedTuple):
    params: dict
    target_params: dict
    opt_state: tuple


def make_optimizer(args):
    """Adam with a learning rate that falls linearly to 0."""
    updates = args.total_timesteps * args.gradient_steps / args.train_frequency
    return optax.adam(optax.linear_schedule(args.learning_rate, 0, updates))


def update(args, learner, batch):
    """One gradient step on the mean Huber loss. Returns the next Learner and the loss."""
    # With n steps: y = r_1 + gamma r_2 + ... + gamma^(n-1) r_n + gamma^n Q(s_n, a*; w-), where
    # a* = argmax_a Q(s_n, a; w): Double DQN, as the maximum of noisy values is too high.
    best = jnp.argmax(q_values(learner.params, batch.next_obs), axis=1)
    rows = jnp.arange(args.batch_size)
    next_q = q_values(learner.target_params, batch.next_obs)[rows, best]
    target = batch.reward + batch.discount * next_q

    # JAX differentiates with respect to loss_fn's argument; target is a constant inside it.
    def loss_fn(params):
        q = q_values(params, batch.obs)[rows, batch.action]  # Q(s, a; w)
        return jnp.mean(optax.huber_loss(q, target))  # squares: 269, not 281

    loss, grads = jax.value_and_grad(loss_fn)(learner.params)
    # An optax optimizer is two pure functions: all of Adam's memory is in opt_state.
    updates, opt_state = make_optimizer(args).update(grads, learner.opt_state)
    params = optax.apply_updates(learner.params, updates)
    # w- <- (1 - tau) w- + tau w
    target_params = optax.incremental_update(params, learner.target_params, args.tau)
    return Learner(params, target_params, opt_state), loss


def learn(args, learner, batches):
    """A group of updates. Returns the Learner and the last loss."""
    # `scan` compiles a loop: for i in range(G): learner, loss = update(args, learner, batch i).
    learner, losses = jax.lax.scan(partial(update, args), learner, batches)
    return learner, losses[-1]


# ---------- Training
def run_steps(args, env, rng, learner, learn_group, buffer):
    """Yields the Learner and the latest loss after each step. learn_group is compiled."""
    falling = max(1, args.exploration_fraction * args.total_timesteps)
    acting_params = learner.params
    loss = 0.0
    queue = []
    added = 0
    obs, _ = env.reset(seed=int(rng.integers(2**30)))
    for env_steps in range(1, args.total_timesteps + 1):
        # Act: epsilon-greedy.
        epsilon = max(args.end_e, 1 - (1 - args.end_e) * env_steps / falling)
        if rng.random() < epsilon:
            action = int(rng.integers(env.action_space.n))
        else:
            action = int(q_values(acting_params, obs[None]).argmax())

        # Step. Discrete actions count from start.
        next_obs, reward, terminated, truncated, _ = env.step(env.action_space.start + action)

        # Store. Only termination makes the value of next_obs 0: a truncated episode could go on.
        discount = 0.0 if terminated else args.gamma
        new = Transition(obs, action, args.reward_scale * reward, discount, next_obs)
        complete, queue = extend(queue, new, terminated or truncated, args.n_step)
        for transition in complete:
            add(buffer, added, transition)
            added += 1
        obs = next_obs
        if terminated or truncated:
            obs, _ = env.reset()

        # Learn.
        if added and env_steps % args.train_frequency == 0:
            # np.asarray waits for the previous group. The agent acts with that group's weights ...
            acting_params = jax.tree.map(np.asarray, learner.params)
            # ... while JAX works on the next group in the background: this returns at once.
            learner, loss = learn_group(learner, sample(args, rng, buffer, added))
        yield learner, loss


def train(args, env):
    """Returns params, episodes (environment step, return) and counts.

    Ctrl-C ends it early. Raises ValueError on bad settings or environments, NotImplementedError on
    spaces unknown to Gymnasium, FloatingPointError on numbers that are not finite.
    """
    check(args)
    started = time.time()
    env = prepare(env)
    rng = np.random.default_rng(args.seed)
    obs_shape = env.observation_space.shape
    params = init_params(rng, (*obs_shape, *args.hidden_sizes, int(env.action_space.n)))
    learner = Learner(params, params, make_optimizer(args).init(params))
    obs = np.zeros((args.buffer_size, *obs_shape), np.float32)
    zeros = np.zeros(args.buffer_size, np.float32)
    buffer = Transition(obs, zeros.astype(int), zeros.copy(), zeros, obs.copy())
    # `jit` compiles learn at its first call, on zeros; the result is dropped.
    learn_group = jax.jit(partial(learn, args))
    learn_group(learner, sample(args, rng, buffer, 1))
    compiled = printed = time.time()
    run = run_steps(args, env, rng, learner, learn_group, buffer)
    with contextlib.suppress(KeyboardInterrupt):
        for env_steps in range(1, args.total_timesteps + 1):
            learner, loss = next(run)
            if args.eval_frequency and env_steps % args.eval_frequency == 0:
                path = f"{args.output_dir}/model_{env_steps:08}.npz"
                np.savez(path, script=SCRIPT, **learner.params)
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
def play(params, env, seed, frames=None):
    """The return of a greedy episode, and in frames every second picture, at half size."""
    obs, _ = env.reset(seed=seed)
    for t in range(100_000):
        action = int(q_values(params, obs[None]).argmax())
        obs, _, terminated, truncated, _ = env.step(env.action_space.start + action)
        if frames is not None and t % 2 == 0:
            frames.append(env.render()[::2, ::2].copy())
        if terminated or truncated:
            return env.return_queue[-1]
    raise TimeoutError("an episode exceeded 100,000 steps; use gymnasium.wrappers.TimeLimit")


def evaluate(args, params, env):
    """The returns (eval_episodes,) of greedy episodes. Training's seeds are below 2^30."""
    env = prepare(env)
    first = 2**30 + args.seed * args.eval_episodes
    return np.array([play(params, env, first + k) for k in range(args.eval_episodes)])


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


def film(args, env, params):
    """Play an episode with each snapshot and with params; film if asked."""
    models = {path: load_model(path) for path in sorted(Path(args.output_dir).glob("model_*"))}
    models[Path(args.output_dir, "model.npz")] = params
    for path, params in models.items():
        frames = [] if args.capture_video else None
        print(f"{path.stem}: greedy return {play(params, prepare(env), 2**30, frames):.1f}")
        if frames:
            import imageio.v3

            imageio.v3.imwrite(path.with_suffix(".gif"), frames, duration=40, loop=0)


# ---------- Command line
def check(args):
    """Raise ValueError, naming the flag, on bad settings."""
    counts = "total_timesteps", "train_frequency", "gradient_steps", "n_step", "buffer_size"
    counts += "batch_size", "hidden_sizes", "eval_episodes"
    limits = dict.fromkeys(counts, (1, np.inf))
    limits |= dict.fromkeys(("gamma", "end_e", "exploration_fraction"), (0, 1))
    limits |= dict.fromkeys(("learning_rate", "reward_scale"), (1e-9, 1e9))
    limits |= {"seed": (0, 2**20), "eval_frequency": (0, np.inf), "tau": (1e-6, 1)}
    for name, (least, most) in limits.items():
        value = getattr(args, name)
        if not np.array_equal(np.clip(value, least, most), value):
            raise ValueError(f"{name} must be between {least} and {most}")
    if (args.eval_frequency or args.capture_video) and not args.output_dir:
        raise ValueError("eval_frequency and capture_video need output_dir")


def load_model(path, env=None):
    """The params of a saved model.npz, which must fit env, if given."""
    params = dict(np.load(path, allow_pickle=False))
    if params.pop("script") != SCRIPT:
        raise ValueError("another script saved it")
    if env and q_values(params, env.reset()[0][None]).size != env.action_space.n:
        raise ValueError("wrong number of actions")
    return params


def keep(args, params, episodes):
    """Save the model, the returns, and a plot of them."""
    from matplotlib.figure import Figure  # slow to import

    np.savez(f"{args.output_dir}/model.npz", script=SCRIPT, **params)
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
        env = gymnasium.make(args.env_id, render_mode="rgb_array" if args.capture_video else None)
        prepare(env)
        flag = "capture_video"
        if args.capture_video:
            importlib.import_module("imageio")
            env.render()[::2, ::2]
        flag = "load_model"
        if args.load_model:
            params = load_model(args.load_model, prepare(env))
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
                keep(args, params, episodes)
        if args.eval_frequency or args.capture_video:
            film(args, env, params)
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

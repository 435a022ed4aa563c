# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "jax>=0.10.2,!=0.11.1", "optax>=0.2.8", "gymnasium[box2d]>=1.4.0", "numpy>=2.4", "tyro>=1.0.17", "matplotlib>=3.11",
#     "imageio>=2.38",
# ]
# ///
"""DQN on LunarLander-v3, or on any Gymnasium environment with a flat Box observation and Discrete actions.

What it teaches: the environment is ordinary Python, not JAX. So the agent acts and stores in NumPy, and several updates are one
compiled call, which JAX runs in the background (asynchronous dispatch) while the agent takes the next steps.

Q(s, a) is the discounted sum of rewards to expect after action a in state s. Deep Q-learning (Mnih et al. 2015,
https://doi.org/10.1038/nature14236) trains a network Q(s, a; w) with weights w. It keeps a replay buffer of past steps
(s, a, r, s'), because consecutive steps are alike, and a slower copy w- of the weights, the target network, so that the target
does not move with each update. An update lowers the mean over a random batch of

    (y - Q(s, a; w))^2        with the target  y = r + gamma max_a' Q(s', a'; w-),   y = r where s' is terminal.

    python dqn_lunarlander.py --seed 1                       train one agent
    python dqn_lunarlander.py --env-id Acrobot-v1            another environment
    python dqn_lunarlander.py --output-dir runs/1            keep model.npz, returns.csv, curve.png and summary.json
    python dqn_lunarlander.py --load-model runs/1/model.npz  evaluate a kept model
    python dqn_lunarlander.py --output-dir runs/2 --eval-frequency 25000 --capture-video  watch it learn

Measured by tests/benchmark.py on one core: LunarLander-v3 10 of 10 solved, mean 281, worst 269, in 31 s of training;
CartPole-v1 5 of 5, mean 500; Acrobot-v1 5 of 5, mean -73.

Unlike Mnih et al., a target sums n_step rewards before it adds Q (Sutton 1988), the online network chooses the action that the
target network values (Double DQN, van Hasselt et al. 2016), values of actions are pushed apart (advantage learning, Bellemare
et al. 2016), the target network moves a little after each group (tau), hidden layers are normalized (Ba et al. 2016),
rewards are scaled so that values are near 1, and errors are not clipped; Adam's step size falls to 0.

Letters in shapes: B batch, A actions, O observation, G updates in one call.
"""

import importlib.util
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro


# ---------- Arguments
@dataclass(frozen=True)
class Args:
    """DQN on a Gymnasium environment with discrete actions. Periods and schedules count environment steps."""

    seed: int = 1  # same seed, same machine: the same bits
    env_id: str = "LunarLander-v3"  # one with a flat Box observation and Discrete actions
    total_timesteps: int = 200_000  # environment steps of the run
    train_frequency: int = 16  # environment steps between two calls of learn()
    gradient_steps: int = 4  # updates in one call
    learning_starts: int = 2_000  # environment steps before the first update
    buffer_size: int = 50_000  # transitions in the replay buffer
    batch_size: int = 64  # transitions in one update
    hidden_sizes: tuple[int, ...] = (128, 128)  # units in each hidden layer
    layer_norm: bool = True  # normalize each hidden layer before its ReLU
    learning_rate: float = 3e-3  # Adam's step size at the start
    end_learning_rate: float = 0.0  # and at the end; it falls linearly
    gamma: float = 0.995  # discount per step
    n_step: int = 3  # rewards in a target before it adds Q; plain DQN: 1
    tau: float = 0.05  # how far a target update moves to the online weights; 1 copies them
    target_network_frequency: int = 16  # environment steps between target updates, at most one a call
    double_dqn: bool = True  # the online network chooses the action, the target network values it
    action_gap: float = 0.8  # a target loses this times max_a' Q(s, a') - Q(s, a); plain DQN: 0
    reward_scale: float = 0.03  # factor of the rewards for learning, not in what is reported
    start_e: float = 1.0  # epsilon, the fraction of random actions, at the start
    end_e: float = 0.02  # epsilon at the end
    exploration_fraction: float = 0.2  # fraction of the run in which epsilon falls
    eval_episodes: int = 100  # greedy episodes at the end
    eval_frequency: int | None = None  # environment steps between snapshots, model_STEP.npz, evaluated at the end
    capture_video: bool = False  # film each snapshot and the final model, as GIFs
    output_dir: str | None = None  # a new folder for the run
    load_model: str | None = None  # evaluate this model.npz instead of training


# ---------- Environment
def make_env(args, **options):
    """The Gymnasium environment env_id, perhaps with a render_mode. Raises ValueError if it or its pictures fail."""
    try:
        env = gymnasium.make(args.env_id, **options)
        if options:
            env.reset()
            env.render()[::2, ::2]  # raises if it is not a picture
    except Exception as error:
        flag = f"capture_video, {args.env_id}" if options else f"env_id {args.env_id}"
        raise ValueError(f"{flag}: {' '.join(str(error).split())}") from None
    return env


def env_sizes(env):
    """O, the size of an observation, and A, the number of actions. Raises ValueError for spaces of other kinds."""
    obs_space, action_space = env.observation_space, env.action_space
    flat = isinstance(obs_space, gymnasium.spaces.Box) and len(obs_space.shape) == 1
    if not (flat and isinstance(action_space, gymnasium.spaces.Discrete)):
        spaces = " ".join(f"{obs_space} and {action_space}".split())
        raise ValueError(f"env_id must have a flat Box observation and Discrete actions, not {spaces}")
    return obs_space.shape[0], int(action_space.n)


# ---------- Q-network
def init_params(rng, sizes, layer_norm):
    """The layers of a perceptron as a dict w0, b0, w1, ...: weights uniform after He et al. 2015 (eq. 10), biases 0.

    The bias of a normalized layer is called n0, n1, ...: a kept model tells by its names how to use it.
    """
    params, last = {}, len(sizes) - 2
    for i, (n_in, n_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        params[f"w{i}"] = math.sqrt(6 / n_in) * rng.uniform(-1, 1, (n_in, n_out)).astype(np.float32)
        params[f"n{i}" if layer_norm and i < last else f"b{i}"] = np.zeros(n_out, np.float32)
    return params


def q_values(params, obs):
    """Q(s, a) of every action: obs (B, O) -> (B, A), or (O,) -> (A,). ReLU between the layers.

    NumPy arrays stay NumPy: one observation takes 25 us, and 48 us through a compiled call.
    """
    x, last = obs.astype(np.float32), len(params) // 2 - 1
    for i in range(last):
        x = x @ params[f"w{i}"]
        x = x + params[f"b{i}"] if f"b{i}" in params else normalize(x + params[f"n{i}"])
        x = x * (x > 0)
    return x @ params[f"w{last}"] + params[f"b{last}"]


def normalize(x):
    """Each row of x with mean 0 and variance 1: layer normalization (Ba et al. 2016, eq. 3) without gain and bias."""
    x = x - x.sum(axis=-1, keepdims=True) / x.shape[-1]  # NumPy's mean takes twice as long
    return x / ((x * x).sum(axis=-1, keepdims=True) / x.shape[-1] + 1e-5) ** 0.5


# ---------- Replay buffer
# A row of float32 for each transition: obs, action, reward, discount, next_obs. So JAX is handed a single array.


class Transition(NamedTuple):
    obs: jax.Array  # (..., O)
    action: jax.Array  # (...,)
    reward: jax.Array  # (...,) r_1 + gamma r_2 + ... + gamma^(n-1) r_n, fewer terms if the episode ended
    discount: jax.Array  # (...,) weight of the value of next_obs: gamma^(number of rewards), 0 where terminated
    next_obs: jax.Array  # (..., O) the observation after the last reward, from before the reset


def extend(queue, obs, action, reward, next_obs, terminated, truncated, n_step, gamma):
    """Append [obs, action, reward, discount], add this reward to all in the queue, remove and return the complete ones."""
    queue.append([obs, action, 0.0, 1.0])
    for begun in queue:
        begun[2] += begun[3] * reward
        begun[3] *= gamma
    complete = len(queue) if terminated or truncated else max(len(queue) - n_step + 1, 0)
    ready = [Transition(obs, a, r, 0.0 if terminated else discount, next_obs) for obs, a, r, discount in queue[:complete]]
    del queue[:complete]
    return ready


def add(buffer, place, transition):
    """Write a transition into row place % buffer_size."""
    row, size = buffer[place % len(buffer)], len(transition.obs)
    row[:size], row[size : size + 3], row[size + 3 :] = transition.obs, transition[1:4], transition.next_obs


def sample(buffer, added, rng, shape):
    """Draw rows (G, B, 2 O + 3) uniformly, with replacement, from a buffer to which `added` were added."""
    return buffer[rng.integers(min(added, len(buffer)), size=shape)]


def unpack(rows):
    """The Transition of rows (B, 2 O + 3)."""
    size = (rows.shape[1] - 3) // 2
    action, reward, discount = rows[:, size : size + 3].T
    return Transition(rows[:, :size], action.astype(int), reward, discount, rows[:, size + 3 :])


# ---------- Learning
class Learner(NamedTuple):  # all that learn() changes
    params: dict
    target_params: dict
    opt_state: tuple


def make_optimizer(args):
    """Adam, whose step size falls linearly."""
    calls = args.total_timesteps // args.train_frequency - args.learning_starts // args.train_frequency
    return optax.adam(optax.linear_schedule(args.learning_rate, args.end_learning_rate, max(1, calls * args.gradient_steps)))


def update(args, params, target_params, opt_state, batch):
    """One gradient step on the mean squared error. Returns the new params and opt_state, and the loss."""
    # With n steps: y = r_1 + gamma r_2 + ... + gamma^(n-1) r_n + gamma^n max_a' Q(s_n, a'; w-)
    # Double DQN: Q(s_n, a*; w-) with a* = argmax_a' Q(s_n, a'; w), as a maximum of noisy values is too high.
    next_q = q_values(target_params, batch.next_obs)
    best = jnp.argmax(q_values(params, batch.next_obs) if args.double_dqn else next_q, axis=1)
    target = batch.reward + batch.discount * jnp.take_along_axis(next_q, best[:, None], axis=1)[:, 0]

    def loss_fn(params):
        q_all = q_values(params, batch.obs)
        q = jnp.take_along_axis(q_all, batch.action[:, None], axis=1)[:, 0]  # Q(s, a; w)
        # Advantage learning lowers the target of all but the best action, so that close values come apart.
        gap = jax.lax.stop_gradient(jnp.max(q_all, axis=1) - q)
        return jnp.mean((target - args.action_gap * gap - q) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = make_optimizer(args).update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, loss


def learn(args, learner, rows, tau):
    """An update for each of the G batches in rows (G, B, 2 O + 3), then a target update.

    Returns the Learner and the last loss. `jax.lax.scan(f, carry, xs)` is `for x in xs: carry, y = f(carry, x)`, compiled.
    """

    def one_update(learner, rows):
        params, opt_state, loss = update(args, *learner, unpack(rows))
        return Learner(params, learner.target_params, opt_state), loss

    learner, losses = jax.lax.scan(one_update, learner, rows)
    # w- <- w- + tau (w - w-)
    target_params = optax.incremental_update(learner.params, learner.target_params, tau)
    return learner._replace(target_params=target_params), losses[-1]


# ---------- Training
def train(args, env):
    """Train one agent on a Gymnasium environment, printing a line a second. Returns params, episodes and a dict of counts.

    A row of episodes is (env step, return, length). Ctrl-C ends the training early. Raises FloatingPointError if the loss or
    an input is not finite, ValueError if the environment is unsuitable.
    """
    started = time.perf_counter()
    rng, (obs_size, actions) = np.random.default_rng(args.seed), env_sizes(env)
    params = init_params(rng, (obs_size, *args.hidden_sizes, actions), args.layer_norm)
    learner = Learner(params, params, make_optimizer(args).init(params))
    buffer, added, queue = np.zeros((args.buffer_size, 2 * obs_size + 3), np.float32), 0, []
    batches = args.gradient_steps, args.batch_size
    run_learn = jax.jit(lambda *inputs: learn(args, *inputs)).lower(learner, sample(buffer, 1, rng, batches), 0.0).compile()
    compiled = printed = time.perf_counter()
    env_steps, episodes, loss, interrupted = 0, [], 0.0, False
    obs, episode_return, episode_length = env.reset(seed=int(rng.integers(2**30)))[0], 0.0, 0
    try:
        for env_steps in range(1, args.total_timesteps + 1):
            # Act: epsilon-greedy.
            epsilon = np.interp(env_steps, (0, args.exploration_fraction * args.total_timesteps), (args.start_e, args.end_e))
            action = int(rng.integers(actions) if rng.random() < epsilon else q_values(params, obs).argmax())

            # Step.
            obs = obs.copy()  # the environment may overwrite it
            next_obs, reward, terminated, truncated, _ = env.step(env.action_space.start + action)
            episode_return, episode_length = episode_return + reward, episode_length + 1

            # Store.
            this_step = obs, action, args.reward_scale * reward, next_obs, terminated, truncated
            for transition in extend(queue, *this_step, args.n_step, args.gamma):
                add(buffer, added, transition)
                added += 1
            obs = next_obs
            if terminated or truncated:
                episodes.append((env_steps, episode_return, episode_length))
                obs, episode_return, episode_length = env.reset()[0], 0.0, 0

            # Learn.
            if env_steps > args.learning_starts and env_steps % args.train_frequency == 0:
                # Take the previous call's weights, waiting only for that call. The new one runs while the agent acts.
                params = jax.tree.map(np.asarray, learner.params)
                due = env_steps % args.target_network_frequency < args.train_frequency  # a multiple of it since the last call
                learner, loss = run_learn(learner, sample(buffer, added, rng, batches), args.tau if due else 0.0)
            if args.eval_frequency and env_steps % args.eval_frequency == 0:
                np.savez(Path(args.output_dir, f"model_{env_steps}.npz"), script=SCRIPT, **learner.params)
            if env_steps % 1000 == 0 or env_steps == args.total_timesteps:
                if not (np.isfinite(loss) and np.isfinite(buffer).all()):
                    raise FloatingPointError("a loss, observation or reward is not finite; try a smaller learning_rate")
                now = time.perf_counter()
                if now - printed > 1 or env_steps == args.total_timesteps:
                    printed, speed = now, env_steps / (now - compiled)
                    recent = np.mean([row[1] for row in episodes[-100:]] or math.nan)
                    progress = f"{env_steps:,} steps, recent return {recent:.1f}, loss {loss:.3g}, {speed:,.0f} steps/s"
                    print(f"{progress}, {(args.total_timesteps - env_steps) / speed:.0f} s left", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    params = jax.device_get(learner.params)
    seconds = time.perf_counter() - compiled
    counts = {"env_steps": env_steps, "interrupted": interrupted, "compile_seconds": compiled - started}
    counts |= {"train_seconds": seconds, "steps_per_second": env_steps / seconds}
    return params, np.array(episodes).reshape(-1, 3), counts


# ---------- Evaluation
def evaluate(args, params, env):
    """The returns (1, eval_episodes) of greedy episodes, with seeds that no training uses."""
    seeds = 2**30 + args.eval_episodes * args.seed + np.arange(args.eval_episodes)
    return np.array([[play(params, env, int(seed))[0] for seed in seeds]])


def play(params, env, seed, every=0):
    """One greedy episode: its return and, if every > 0, half-size pictures, one every `every` steps and the last."""
    obs, total, frames, t, ended = env.reset(seed=seed)[0], 0.0, [], 0, False
    while not ended:
        if every and t % every == 0:
            frames.append(env.render()[::2, ::2].copy())  # a view would keep the whole picture in memory
        obs, reward, terminated, truncated, _ = env.step(env.action_space.start + int(q_values(params, obs).argmax()))
        total, t, ended = total + float(reward), t + 1, terminated or truncated
    return total, ([*frames, env.render()[::2, ::2].copy()] if every else [])


def film(params, env, path):
    """Record a greedy episode as a GIF, in real time, at most 25 frames a second."""
    import imageio.v3  # slow to import

    per_second = env.metadata.get("render_fps", 50)
    every = math.ceil(per_second / 25)
    total, frames = play(params, env, 2**30, every)
    imageio.v3.imwrite(path, frames, duration=1000 * every / per_second, loop=0)
    print(f"{path}: an episode with return {total:.1f}")


# ---------- Command line
SCRIPT = "dqn_lunarlander.py"


def check(args):
    """Raise ValueError, naming the flag, on settings that cannot work."""
    for field in fields(args):
        value, least = getattr(args, field.name), 0 if field.name == "seed" else 1
        if field.type in (int, int | None) and value is not None and not least <= value < 2**31:
            raise ValueError(f"{field.name} must be at least {least} and below 2^31")
        if field.type is float and not 0 <= value <= 1:
            raise ValueError(f"{field.name} must be between 0 and 1")
    rules = [
        (min(args.hidden_sizes, default=1) > 0, "hidden_sizes must all be at least 1"),
        (args.learning_starts >= args.n_step, "learning_starts must be at least n_step"),
        (args.output_dir or not (args.eval_frequency or args.capture_video), "eval_frequency, capture_video need output_dir"),
        (not args.output_dir or importlib.util.find_spec("matplotlib"), "output_dir needs matplotlib: pip install matplotlib"),
        (not args.capture_video or importlib.util.find_spec("imageio"), "capture_video needs imageio: pip install imageio"),
    ]
    for holds, message in rules:
        if not holds:
            raise ValueError(message)


def load_model(path, env=None):
    """The params that a run kept as model.npz. Raises ValueError if it is damaged, from another script or unfit for env."""
    try:
        with np.load(path, allow_pickle=False) as file:
            params = dict(file)
        script = params.pop("script")
        sizes = len(params["w0"]), len(q_values(params, np.zeros(len(params["w0"]))))
        if script != SCRIPT or env and sizes != env_sizes(env):
            raise ValueError(f"it is from {script} or of other shapes")
    except Exception as error:
        raise ValueError(f"load_model: {path}: {error}") from None
    return params


def keep(args, params, episodes):
    """Write model.npz, returns.csv and curve.png into output_dir."""
    from matplotlib.figure import Figure  # slow to import

    folder, header = Path(args.output_dir), "env_step,episode_return,episode_length"
    np.savez(folder / "model.npz", script=SCRIPT, **params)
    np.savetxt(folder / "returns.csv", episodes, ("%d", "%g", "%d"), ",", header=header, comments="")
    figure = Figure()
    axes = figure.add_subplot(xlabel="environment steps", ylabel="return, and mean of 100", title=f"DQN on {args.env_id}")
    steps, returns, _ = episodes.T
    axes.plot(steps, returns, ".", markersize=1, color="0.75")
    if len(returns) >= 100:
        axes.plot(steps[99:], np.convolve(returns, np.ones(100) / 100, mode="valid"))
    figure.savefig(folder / "curve.png", dpi=150)


def summarize(args, returns, counts, threshold):
    """Print how the evaluation went, returns (1, eval_episodes), and return what summary.json holds. threshold may be None."""
    solved = None if threshold is None else bool(returns.mean() >= threshold)
    statistics = f"mean {returns.mean():.1f}, standard deviation {returns.std():.1f}, worst {returns.min():.0f}"
    verdict = "no threshold" if threshold is None else f"{'' if solved else 'not '}solved (threshold {threshold:g})"
    print(f"{returns.size} greedy episodes: {statistics}; {verdict}")
    names = "seed", "eval_return_mean", "eval_return_std", "eval_return_min", "eval_episodes", "solved"
    row = args.seed, returns.mean(), returns.std(), returns.min(), returns.size, solved
    versions = {m.__name__: m.__version__ for m in (jax, optax, gymnasium, np, tyro)}
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    summary = {"script": SCRIPT, "args": asdict(args), "versions": versions, "device": device, **counts}
    return summary | {"seeds": [dict(zip(names, row, strict=True))]}


def main(args):
    """Run the script. Exit status: 0, 1 if the loss diverged, 2 on bad input, 130 after Ctrl-C."""
    try:
        check(args)
        env, camera = make_env(args), make_env(args, render_mode="rgb_array") if args.capture_video else None
        env_sizes(env)
        params, counts = load_model(args.load_model, env) if args.load_model else None, {}
        if args.output_dir:
            Path(args.output_dir).mkdir(parents=True)
    except (ValueError, OSError) as error:
        print(f"error: {'output_dir: ' if isinstance(error, OSError) else ''}{error}", file=sys.stderr)
        return 2
    try:
        if not args.load_model:
            if args.learning_starts >= args.total_timesteps:
                print("no update: total_timesteps is not above learning_starts")
            params, episodes, counts = train(args, env)
            if args.output_dir:
                keep(args, params, episodes)
        if args.eval_frequency:
            for path in sorted(Path(args.output_dir).glob("model_*.npz"), key=lambda path: int(path.stem[6:])):
                returns = evaluate(replace(args, eval_episodes=5), load_model(path), env)
                print(f"{path}: mean of 5 greedy episodes {returns.mean():.1f}")
                if camera:
                    film(load_model(path), camera, path.with_suffix(".gif"))
        summary = summarize(args, evaluate(args, params, env), counts, env.spec and env.spec.reward_threshold)
        if camera:
            film(params, camera, Path(args.output_dir, "model.gif"))
            camera.close()
        env.close()
    except FloatingPointError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        return 130
    if args.output_dir:
        Path(args.output_dir, "summary.json").write_text(json.dumps(summary, indent=2))
    return 130 if counts.get("interrupted") else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))

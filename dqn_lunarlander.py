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

Deep Q-learning (Mnih et al. 2015, https://doi.org/10.1038/nature14236) trains a network Q(s, a; w), the online network, with
weights w. It keeps an older copy w' of them, the target network, and a replay buffer of past steps (s, a, r, s'). Each update
lowers the mean over a random batch of

    (y - Q(s, a; w))^2        with the target  y = r + gamma * max_a' Q(s', a'; w'),   y = r where s' is terminal.

    python dqn_lunarlander.py --seed 1                       train one agent
    python dqn_lunarlander.py --env-id Acrobot-v1            another environment, with the same settings
    python dqn_lunarlander.py --output-dir runs/1            keep model.npz, returns.csv, curve.png and summary.json
    python dqn_lunarlander.py --load-model runs/1/model.npz  evaluate a kept model
    python dqn_lunarlander.py --output-dir runs/2 --eval-frequency 25000 --capture-video      watch it learn, as GIFs

RESULT

What differs from the paper:
    --n-step 3               a target sums three rewards before it bootstraps (Sutton 1988)
    --double-dqn             the online network chooses the action that the target network values (van Hasselt et al. 2016)
    --layer-norm             each hidden layer is normalized (Ba et al. 2016)
    --tau 0.05               the target network moves a little after each call instead of being copied now and then
    --average-rate 0.001     what is evaluated is a moving average of the weights
    --end-learning-rate 0    the step size falls to 0
    --reward-scale 0.03      rewards are scaled, so that values are near 1
    (no flag)                Adam and the squared error, not RMSProp and the clipped error

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


SCRIPT = "dqn_lunarlander.py"  # a kept model names it


# ------------------------------ Arguments
@dataclass(frozen=True)
class Args:
    """DQN on a Gymnasium environment with discrete actions. Every period and every schedule counts environment steps."""

    seed: int = 1  # the same seed gives the same bits on the same machine
    env_id: str = "LunarLander-v3"  # a Gymnasium environment with a flat Box observation and Discrete actions
    total_timesteps: int = 150_000  # environment steps of the run
    train_frequency: int = 16  # environment steps between two calls of the learner
    gradient_steps: int = 4  # updates in one call
    learning_starts: int = 2_000  # environment steps before the first update
    buffer_size: int = 50_000  # transitions in the replay buffer
    batch_size: int = 64  # transitions drawn from the buffer for one update
    hidden_sizes: tuple[int, ...] = (128, 128)  # units of each hidden layer
    layer_norm: bool = True  # normalize each hidden layer before its ReLU
    learning_rate: float = 3e-3  # Adam's step size at the start
    end_learning_rate: float = 0.0  # and at the end; it falls linearly
    gamma: float = 0.99  # discount per step
    n_step: int = 3  # rewards summed before the target bootstraps; 1 is the paper's
    tau: float = 0.05  # share of the online weights that one target update mixes in; 1 copies them
    target_network_frequency: int = 16  # environment steps between target updates, at most one for each call
    double_dqn: bool = True  # let the online network choose the target's action
    reward_scale: float = 0.03  # rewards are multiplied by this for learning; what is reported is the environment's own return
    average_rate: float = 0.001  # share of the online weights that each update mixes into the averaged ones; 1: no averaging
    start_e: float = 1.0  # epsilon, the share of random actions, at the start
    end_e: float = 0.02  # epsilon at the end
    exploration_fraction: float = 0.2  # share of total_timesteps over which epsilon falls linearly
    eval_episodes: int = 100  # greedy episodes at the end
    eval_frequency: int | None = None  # environment steps between snapshots, kept as model_STEP.npz and evaluated at the end
    capture_video: bool = False  # film one greedy episode of each snapshot and of the final model, as GIFs in output_dir
    output_dir: str | None = None  # a new folder, in which to keep the run
    load_model: str | None = None  # evaluate this model.npz instead of training


# ------------------------------ Environment
def make_env(args):
    """The Gymnasium environment env_id, tried out with a picture if capture_video is set. Raises ValueError if that fails."""
    try:
        env = gymnasium.make(args.env_id, render_mode="rgb_array" if args.capture_video else None)
        if args.capture_video:
            env.reset()
            env.render()[::2, ::2]
    except Exception as error:  # a missing package raises what it likes
        film = " and filmed (capture_video)" if args.capture_video else ""
        raise ValueError(f"env_id {args.env_id} cannot be made{film}: {' '.join(str(error).split())}") from None
    return env


def env_sizes(env):
    """O and A, the entries of an observation and the number of actions. Raises ValueError if the spaces are of other kinds."""
    obs_space, action_space = env.observation_space, env.action_space
    flat = isinstance(obs_space, gymnasium.spaces.Box) and len(obs_space.shape) == 1
    if not (flat and isinstance(action_space, gymnasium.spaces.Discrete)):
        raise ValueError(f"env_id must have a flat Box observation and Discrete actions, not {obs_space} and {action_space}")
    return obs_space.shape[0], int(action_space.n)


# ------------------------------ Q-network
def init_params(rng, sizes, layer_norm):
    """The layers of a perceptron as a dict w0, b0, w1, ...: weights uniform after He et al. 2015 (eq. 10), biases 0.

    The bias of a layer that is to be normalized is called n0, n1, ... instead, so that the arrays tell.
    """
    params, last = {}, len(sizes) - 2
    for i, (n_in, n_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        params[f"w{i}"] = math.sqrt(6 / n_in) * rng.uniform(-1, 1, (n_in, n_out)).astype(np.float32)
        params[f"n{i}" if layer_norm and i < last else f"b{i}"] = np.zeros(n_out, np.float32)
    return params


def q_values(params, obs):
    """Q(s, a) of every action: obs (B, O) -> (B, A), or (O,) -> (A,). ReLU between the layers.

    It takes NumPy arrays as well: one observation takes 15 us in NumPy and 40 us through a compiled call.
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


# ------------------------------ Replay buffer
# One float32 row for each transition: drawing a batch is one indexing, and JAX is handed one array.


class Transition(NamedTuple):
    obs: jax.Array  # (B, O)
    action: jax.Array  # (B,)
    reward: jax.Array  # (B,) r_1 + gamma r_2 + ... + gamma^(n-1) r_n, or fewer where the episode ended
    discount: jax.Array  # (B,) weight of the value of next_obs: gamma^(number of rewards), 0 where terminated
    next_obs: jax.Array  # (B, O) the observation after the last reward, from before the reset


def extend(queue, obs, action, reward, next_obs, terminated, truncated, n_step, gamma):
    """Begin a transition at the end of the queue, a list, and add this step to all in it. Returns the rows of the complete ones."""
    queue.append([obs, action, 0.0, 1.0])
    for transition in queue:
        transition[2] += transition[3] * reward
        transition[3] *= gamma
    complete = len(queue) if terminated or truncated else max(len(queue) - n_step + 1, 0)
    rows = [
        np.hstack([obs, action, r, 0 if terminated else discount, next_obs]) for obs, action, r, discount in queue[:complete]
    ]
    del queue[:complete]
    return rows


def add(buffer, t, row):
    """Write a row into place t % buffer_size."""
    buffer[t % len(buffer)] = row


def sample(buffer, added, rng, shape):
    """Draw rows (G, B, 2 O + 3) of the last `added` ones uniformly, with replacement."""
    return buffer[rng.integers(min(added, len(buffer)), size=shape)]


def unpack(rows):
    """The Transition of rows (B, 2 O + 3)."""
    size = (rows.shape[1] - 3) // 2
    action, reward, discount = rows[:, size : size + 3].T
    return Transition(rows[:, :size], action.astype(int), reward, discount, rows[:, size + 3 :])


# ------------------------------ Learning
class Learner(NamedTuple):  # all that an update changes
    params: dict
    target_params: dict
    average_params: dict  # a moving average of params, for the evaluation
    opt_state: tuple


def make_optimizer(args):
    """Adam, whose step size falls linearly. Its schedule counts updates."""
    updates = (args.total_timesteps - args.learning_starts) // args.train_frequency * args.gradient_steps
    return optax.adam(optax.linear_schedule(args.learning_rate, args.end_learning_rate, max(updates, 1)))


def update(args, learner, batch):
    """One gradient step on the mean squared error. Returns the new Learner and the loss."""
    # y = r + gamma max_a' Q(s', a'; w')    with n steps: y = r_1 + ... + gamma^(n-1) r_n + gamma^n max_a' Q(s_n, a'; w')
    # Double DQN (van Hasselt et al. 2016) takes Q(s_n, a*; w') with a* = argmax_a' Q(s_n, a'; w) for that maximum.
    next_q = q_values(learner.target_params, batch.next_obs)
    best = jnp.argmax(q_values(learner.params, batch.next_obs) if args.double_dqn else next_q, axis=1)
    target = batch.reward + batch.discount * jnp.take_along_axis(next_q, best[:, None], axis=1)[:, 0]

    def loss_fn(params):
        q = jnp.take_along_axis(q_values(params, batch.obs), batch.action[:, None], axis=1)[:, 0]  # Q(s, a; w)
        return jnp.mean((target - q) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(learner.params)
    updates, opt_state = make_optimizer(args).update(grads, learner.opt_state)
    params = optax.apply_updates(learner.params, updates)
    average_params = optax.incremental_update(params, learner.average_params, args.average_rate)
    return Learner(params, learner.target_params, average_params, opt_state), loss


def learn(args, learner, rows, share):
    """An update for each of the G batches of rows (G, B, 2 O + 3), then a target update. Returns the Learner and the last loss.

    `jax.lax.scan(f, carry, xs)` is the loop `for x in xs: carry, y = f(carry, x)`, compiled; it stacks the ys.
    """
    learner, losses = jax.lax.scan(lambda learner, batch: update(args, learner, unpack(batch)), learner, rows)
    # w' <- w' + tau (w - w')
    target_params = optax.incremental_update(learner.params, learner.target_params, share)
    return learner._replace(target_params=target_params), losses[-1]


# ------------------------------ Training
def train(args, env):
    """Train one agent on a Gymnasium environment, printing a line a second. Returns params, episodes and a dict of counts.

    params: the averaged weights. episodes: a row for each that ended, (env step, return, length).
    Ctrl-C (KeyboardInterrupt) ends the training early. Raises FloatingPointError when a loss is not finite, ValueError if
    the environment is unsuitable.
    """
    started = time.perf_counter()
    rng, (obs_size, actions) = np.random.default_rng(args.seed), env_sizes(env)
    params = init_params(rng, (obs_size, *args.hidden_sizes, actions), args.layer_norm)
    learner = Learner(params, params, params, make_optimizer(args).init(params))
    buffer, added, queue = np.zeros((args.buffer_size, 2 * obs_size + 3), np.float32), 0, []
    batches = args.gradient_steps, args.batch_size
    run_learn = jax.jit(lambda *inputs: learn(args, *inputs)).lower(learner, sample(buffer, 1, rng, batches), 0.0).compile()
    compiled = printed = time.perf_counter()

    env_steps, episodes, loss, interrupted = 0, [], 0.0, False
    obs, episode_return, episode_length = env.reset(seed=int(rng.integers(2**30)))[0], 0.0, 0
    try:
        for env_steps in range(1, args.total_timesteps + 1):
            # Act: epsilon-greedy.
            epsilon = args.start_e + (args.end_e - args.start_e) * min(
                1, env_steps / args.total_timesteps / args.exploration_fraction
            )
            action = int(rng.integers(actions) if rng.random() < epsilon else q_values(params, obs).argmax())

            # Step.
            next_obs, reward, terminated, truncated, _ = env.step(env.action_space.start + action)
            episode_return, episode_length = episode_return + reward, episode_length + 1

            # Store.
            for row in extend(
                queue, obs, action, args.reward_scale * reward, next_obs, terminated, truncated, args.n_step, args.gamma
            ):
                add(buffer, added, row)
                added += 1
            obs = next_obs
            if terminated or truncated:
                episodes.append((env_steps, episode_return, episode_length))
                obs, episode_return, episode_length = env.reset()[0], 0.0, 0

            # Learn.
            if env_steps > args.learning_starts and env_steps % args.train_frequency == 0:
                # Act with the previous call's weights: this waits only for that call.
                params = jax.tree.map(np.asarray, learner.params)
                due = env_steps % args.target_network_frequency < args.train_frequency  # a multiple lies in the steps since
                learner, loss = run_learn(learner, sample(buffer, added, rng, batches), args.tau if due else 0.0)
            if args.eval_frequency and env_steps % args.eval_frequency == 0:
                np.savez(Path(args.output_dir, f"model_{env_steps}.npz"), script=SCRIPT, **learner.average_params)
            if env_steps % 1000 == 0 or env_steps == args.total_timesteps:
                if not np.isfinite(loss):
                    raise FloatingPointError(f"the loss is not finite after {env_steps:,} steps; try a smaller learning_rate")
                now = time.perf_counter()
                if now - printed > 1 or env_steps == args.total_timesteps:
                    printed, speed = now, env_steps / (now - compiled)
                    recent, left = np.mean([row[1] for row in episodes[-100:]] or 0), (args.total_timesteps - env_steps) / speed
                    progress = f"{env_steps:,} steps, recent return {recent:.1f}, loss {loss:.3g}"
                    print(f"{progress}, {speed:,.0f} steps/s, {left:.0f} s left", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    params = jax.device_get(learner.average_params)
    seconds = time.perf_counter() - compiled
    counts = {"env_steps": env_steps, "interrupted": interrupted, "compile_seconds": compiled - started}
    counts |= {"train_seconds": seconds, "steps_per_second": env_steps / seconds}
    return params, np.array(episodes).reshape(-1, 3), counts


# ------------------------------ Evaluation
def evaluate(args, params, env):
    """The environment's own returns (1, eval_episodes) of greedy episodes, with seeds that training does not use."""
    return np.array([[play(params, env, 2**30 + k)[0] for k in range(args.eval_episodes)]])


def play(params, env, seed, every=0):
    """One greedy episode. Returns its return and, if every > 0, a picture for each `every` steps and for the end, half the size."""
    obs, total, frames, t, ended = env.reset(seed=seed)[0], 0.0, [], 0, False
    while not ended:
        if every and t % every == 0:
            frames.append(env.render()[::2, ::2].copy())  # a view would keep the whole picture in memory
        obs, reward, terminated, truncated, _ = env.step(env.action_space.start + int(q_values(params, obs).argmax()))
        total, t, ended = total + float(reward), t + 1, terminated or truncated
    return total, [*frames, env.render()[::2, ::2].copy()] if every else frames


# ------------------------------ Command line
# Not the lesson: checks, saving, drawing.


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
        (args.exploration_fraction > 0, "exploration_fraction must be above 0"),
        (args.learning_starts >= args.n_step, "learning_starts must be at least n_step"),
        (
            args.output_dir or not (args.eval_frequency or args.capture_video),
            "eval_frequency and capture_video need output_dir",
        ),
        (not args.output_dir or importlib.util.find_spec("matplotlib"), "output_dir needs matplotlib: pip install matplotlib"),
        (not args.capture_video or importlib.util.find_spec("imageio"), "capture_video needs imageio: pip install imageio"),
    ]
    for holds, message in rules:
        if not holds:
            raise ValueError(message)


def load_model(path, env=None):
    """The params that a run kept as model.npz. Raises ValueError if the file is damaged, another script's, or unfit for env."""
    try:
        with np.load(path, allow_pickle=False) as file:
            params = dict(file)
        if (script := params.pop("script")) != SCRIPT:
            raise ValueError(f"it was made by {script}")
        obs_size, actions = env_sizes(env) if env else (len(params["w0"]), None)
        if q_values(params, np.zeros(obs_size)).shape != (actions,) and env:
            raise ValueError("it was made for another environment")
    except Exception as error:  # a damaged file raises one of half a dozen kinds
        raise ValueError(f"load_model cannot use {path}: {error}") from None
    return params


def keep(args, params, episodes):
    """Write model.npz, returns.csv and curve.png into output_dir."""
    from matplotlib.figure import Figure  # only here: importing it takes long

    folder, header = Path(args.output_dir), "env_step,episode_return,episode_length"
    np.savez(folder / "model.npz", script=SCRIPT, **params)
    np.savetxt(folder / "returns.csv", episodes, ("%d", "%g", "%d"), ",", header=header, comments="")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="environment steps", ylabel="return, and mean of 100", title=f"DQN on {args.env_id}")
    steps, returns, _ = episodes.T
    axes.plot(steps, returns, ".", markersize=1, color="0.75")
    if window := min(100, len(returns)):
        axes.plot(steps[window - 1 :], np.convolve(returns, np.ones(window) / window, mode="valid"))
    figure.savefig(folder / "curve.png", dpi=150)


def film(params, env, path):
    """Record one greedy episode as a GIF, in the environment's own time, with at most 25 frames a second."""
    import imageio.v3  # only here: most runs need no pictures

    per_second = env.metadata.get("render_fps", 50)
    every = math.ceil(per_second / 25)
    total, frames = play(params, env, 2**30, every)
    imageio.v3.imwrite(path, frames, duration=1000 * every / per_second, loop=0)
    print(f"{path}: an episode with return {total:.1f}")


def summarize(args, returns, counts, threshold):
    """Print how the evaluation went and return what summary.json holds; returns (K, eval_episodes), threshold may be None."""
    solved = [None if threshold is None else bool(mean >= threshold) for mean in returns.mean(axis=1)]
    statistics = f"mean {returns.mean():.1f}, standard deviation {returns.std():.1f}, worst {returns.min():.0f}"
    verdict = "no threshold" if threshold is None else f"{sum(solved)} of {len(solved)} solved (threshold {threshold:g})"
    print(f"{args.eval_episodes} greedy episodes: {statistics}; {verdict}")
    names = "seed", "eval_return_mean", "eval_return_std", "eval_return_min", "eval_episodes", "solved"
    rows = [(args.seed + k, x.mean(), x.std(), x.min(), len(x), solved[k]) for k, x in enumerate(returns.astype(float))]
    versions = {module.__name__: module.__version__ for module in (jax, optax, gymnasium, np, tyro)}
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    summary = {"script": SCRIPT, "args": asdict(args), "versions": versions, "device": device, **counts}
    return summary | {"seeds": [dict(zip(names, row, strict=True)) for row in rows]}


def main(args):
    """Run the script. Returns the exit status: 0, 1 if the loss diverged, 2 on bad input, 130 after Ctrl-C."""
    try:
        check(args)
        env = make_env(args)
        env_sizes(env)
        params, counts = load_model(args.load_model, env) if args.load_model else None, {}
        if args.output_dir:
            Path(args.output_dir).mkdir(parents=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        if not args.load_model:
            params, episodes, counts = train(args, env)
            if args.output_dir:
                keep(args, params, episodes)
            for path in sorted(Path(args.output_dir).glob("model_*.npz"), key=lambda path: int(path.stem[6:])):
                snapshot = load_model(path)
                returns = evaluate(replace(args, eval_episodes=5), snapshot, env)
                print(f"{path}: mean return of 5 greedy episodes {returns.mean():.1f}")
                if args.capture_video:
                    film(snapshot, env, path.with_suffix(".gif"))
        summary = summarize(args, evaluate(args, params, env), counts, getattr(env.spec, "reward_threshold", None))
        if args.capture_video:
            film(params, env, Path(args.output_dir, "model.gif"))
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if args.output_dir:
        Path(args.output_dir, "summary.json").write_text(json.dumps(summary, indent=2))
    return 130 if counts.get("interrupted") else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))

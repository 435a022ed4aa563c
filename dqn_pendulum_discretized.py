# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,!=0.11.1", "optax>=0.2.8", "gymnasium[classic-control]>=1.4.0",
#     "gymnasium[mujoco]>=1.4.0", "numpy>=2.4", "tyro>=1.0.17",
#     "matplotlib>=3.11"]  # not jax 0.11.1: its issue 40101 on GitHub
# ///
r"""DQN on InvertedPendulum-v5, or on any Gymnasium environment with one bounded, continuous action.

What it teaches: a maximum over actions is easy for a list and hard for an interval. So the agent
chooses from a list of evenly spaced actions, from the lowest to the highest. Its network is one of
two kinds:
- It takes the observation, and has an output for each listed action (--q-input state).
- It takes the observation and an action, and has one output (--q-input state-action). Neighboring
  actions share what is learned, so the list can hold thousands. A maximum over thousands is slow,
  so in training it is over --sampled-actions of them, drawn at random with replacement. The largest
  of some is at most the largest of all, so this lowers Q a little (Fourati et al. 2024,
  https://arxiv.org/abs/2405.10310).

JAX is a library with NumPy's functions (`jnp`) for arrays of its own. It compiles functions of such
arrays and computes their gradients (see *JAX in short*). The environment is ordinary Python, so the
training loop as a whole can't be compiled. Starting a compiled function takes longer than this
small network's arithmetic, so the agent acts in NumPy. JAX updates the network in the background,
since a call of a compiled function returns before its result is there ("asynchronous dispatch").
Each call makes a group of updates, so that the calls are few.

Q(s, a) is the expected sum of rewards after action a in state s, if every later action is optimal.
It is discounted: a reward that comes k steps later counts gamma^k times as much. So Q(s, a) is the
mean of r + gamma max_a' Q(s', a') over the reward r and next state s' of a step.

Deep Q-learning (DQN, Mnih et al. 2015, https://doi.org/10.1038/nature14236) learns it as a network
Q(s, a; w) with weights w. It explores by acting epsilon-greedily: at random with probability
epsilon, else by the largest Q. A replay buffer keeps the newest steps (s, a, r, s'), called
transitions. Each update draws a batch of them at random, because consecutive steps resemble each
other too much, and takes a gradient step to reduce, on average over the batch,

    (y - Q(s, a; w))^2   with   y = r + gamma max_a' Q(s', a'; w-),   or y = r if s' is terminal.

y is called the target. w- are the weights of a second network of the same shape, the target
network. They follow w with a delay: if y were computed from w itself, an update that raises
Q(s, a) could raise y at once too, and errors would feed on themselves. The paper copies w to w-
now and then; here, w- moves a small part of the way to w at every update (--tau), so it lags too.
s' is terminal if the episode ended for good, so that no reward can follow. A time limit is not
terminal: it only cuts the episode off (truncates it), so the value of s' still counts.

Q(s', a'; w-) is an estimate with errors, and the maximum prefers errors upward, so y is too high on
average. In Double DQN (see `update`), w chooses a' for y, and w- values it. That helps, but not
entirely: in InvertedPendulum-v5, which pays 1 for each step (see below), no sum of discounted
rewards can be larger than 1 / (1 - gamma) = 50. But of a cart and pole at rest, the network's
largest Q ends at 1.24 times that, and without Double DQN at 1.35 times (means of 10 agents with the
same seeds; results/overestimation.py).

    python dqn_pendulum_discretized.py --q-input state-action --num-actions 1000
    python dqn_pendulum_discretized.py --env-id Pendulum-v1 --num-actions 9 --gamma 0.99 \
        --reward-scale 0.03 --total-timesteps 200000 --output-dir runs/1

(`uv run` in place of `python` installs what the first lines of this file name.) From Python, an
environment `env` of your own is learned, and controlled, like this:

    from dqn_pendulum_discretized import Args, evaluate, list_actions, q_values, train, wrap_env

    args = Args(total_timesteps=50_000)
    params, episodes, counts = train(args, env)  # weights, returns of episodes, counts and times
    print(evaluate(args, params, env).mean())
    listed = list_actions(args, env)
    env = wrap_env(env)  # its observations are vectors, as the network needs them
    obs, _ = env.reset()
    action = listed[[q_values(params, obs[None]).argmax()]]  # with --q-input state

InvertedPendulum-v5 gives 4 numbers (a cart's position, the angle of a pole on it, and how fast both
change) and takes a force on the cart, from -3 to 3. Each step pays 1, until the pole leans too far
or the time limit of 1000 steps truncates the episode. Pendulum-v1 gives 3 numbers and takes a
torque from -2 to 2; rewards are from -16.3 to 0, and 0 only while the pendulum stands still at the
top without torque. (--reward-scale 0.03 makes that -0.5 to 0.) A return is the sum of the rewards
in an episode, not discounted. An agent has solved InvertedPendulum-v5 if its mean return in 100
episodes without random actions is at least 950 (Gymnasium's threshold); Pendulum-v1 has no
threshold. With the defaults, 88 of 90 agents solve InvertedPendulum-v5: mean 992.6, the worst agent
683.7. (30 of 30 with seeds that nobody had seen when the settings were chosen, and 29 of 30 in each
of two other sets. When an episode ends early, the cart has drifted to the end of its rail.) On
Pendulum-v1, with the command above, 20 agents reach -149.2 on average.

To learn DQN, read `init_params`, `q_values`, `Transition`, `sample`, `Learner`, `update`, `learn`,
`act` and `train`, in this order (for --q-input state-action, also `q_of_actions` and `draw_actions`
before `update`). What comes after `train` reports, evaluates, checks and saves.

JAX in short. `jax.jit(f)` compiles f: the first call runs f once with placeholders for its
arguments, which have shapes but no values, and records the operations ("tracing"). Later calls only
run what was recorded; a call with other shapes records anew. Every argument becomes a placeholder,
plain numbers too. `if` on a placeholder is an error: where the values of arrays decide, use
`jnp.where`. The settings are one object, `args` of class Args, which is not passed to the compiled
function: `partial(f, args)` fills it in as the first argument of f before f is compiled. So the
settings are constants, and `if` works on them. In a dict that is an argument, only the arrays
become placeholders; its names stay strings, and `if` works on them too (as in `q_values`).

JAX's arrays never change, unlike NumPy's. Nested dicts and named tuples of arrays are "pytrees",
and the functions of JAX take and return them. `jax.tree.map(f, tree)` calls f on each array of a
tree. `jax.lax.scan(f, carry, xs)` is a compiled loop: for each x of xs, `carry, y = f(carry, x)`;
it returns the last carry and the ys, stacked. `jax.value_and_grad(f)` is a function: it computes f
and the gradient of f with respect to its first argument.

A compiled function also takes NumPy's arrays, and converts them. What it returns are arrays of JAX:
`np.asarray` converts one back, `jax.device_get` a whole pytree, and both wait until it is computed.
Random functions take a key; the same key gives the same numbers.

Gymnasium in short. `env.reset()` returns an observation and a dict of extras ("info").
`env.step(action)` returns the next observation, the reward, whether the episode terminated, whether
it was truncated, and info. `env.observation_space` and `env.action_space` declare what is allowed:
a Box is an array of numbers, with bounds; Discrete is one of n whole numbers. A wrapper is an
environment that passes calls on to another one, and changes what comes back.

Departures from Mnih et al., each with the flag that undoes it. The last column says how many of 10
agents solve InvertedPendulum-v5 when only this departure is undone. With none undone, all 10 do. So
none is decisive alone, at these settings.

    departure                                     undone by                               solved by
    w- moves a little at every update             --tau 1 --target-network-frequency 500        10
    the learning rate falls to 0                  --no-anneal-lr                                10
    hidden layers are normalized                  --no-layer-norm                               10
    w chooses a' in y, w- values it: Double DQN   --no-double-dqn                               10
    learning starts at once                       --learning-starts 10000                        9
    updates come in groups, 8 after 16 steps      --train-frequency 2 --gradient-steps 1        10

No flag undoes these: Adam replaces RMSProp (both divide the step of each weight by a running
average of its gradients' size), the paper's clipping of errors y - Q and of rewards to between -1
and 1 is left out, epsilon falls from the first step on, not only once learning has started, and the
agent acts with weights that are one group of updates old. (Of the first weights, whose variance is
2 / in here, the paper says nothing.)

Plain DQN has all departures of the table undone. It also has other settings than the defaults, like
those of dqn_jax.py in CleanRL (single files of many algorithms,
https://github.com/vwxyzjn/cleanrl): a lower learning rate, other sizes of network, batch and
buffer, more exploration, and an update every 10 steps. So what it reaches does not tell what the
departures alone are worth.

    python dqn_pendulum_discretized.py --tau 1 --target-network-frequency 500 --no-anneal-lr \
        --no-layer-norm --no-double-dqn --learning-starts 10000 --train-frequency 10 \
        --gradient-steps 1 --learning-rate 2.5e-4 --batch-size 128 --hidden-sizes 120 84 \
        --buffer-size 10000 --gamma 0.99 --end-e 0.05 --exploration-fraction 0.5

Except for what no flag undoes, this is the algorithm of the paper. Of 10 agents, 0 solve
InvertedPendulum.

The defaults need little tuning: with one number of them doubled or halved, or with another number
of layers, at least 8 of 10 agents solve InvertedPendulum: 8 if rewards are doubled, 9 or 10
otherwise. (For gamma, what is doubled or halved is the horizon 1 / (1 - gamma), which is about how
many steps ahead Q looks.) With half the steps, 10 of 10 agents solve it; with twice the steps, 10
of 10 (results/knobs.md).

Letters in shapes: B batch, G updates in a group, O observation, A listed actions.
"""

import contextlib
import importlib
import json
import sys
import time
import traceback
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
from gymnasium import spaces


# ---------- Arguments
@dataclass(frozen=True)
class Args:
    """DQN on a Gymnasium environment with one continuous action."""

    seed: int = 1  # the same seed, machine and versions give the same result
    env_id: str = "InvertedPendulum-v5"  # or another id; my_module:MyEnv-v0 imports my_module first
    num_actions: int = 5  # listed actions, evenly spaced from the lowest to the highest
    q_input: Literal["state", "state-action"] = "state"  # what the network takes
    sampled_actions: int = 32  # drawn for a maximum in training, if q_input is state-action
    total_timesteps: int = 100_000  # environment steps
    train_frequency: int = 16  # environment steps between groups of updates
    gradient_steps: int = 8  # updates in a group
    buffer_size: int = 100_000  # transitions in the replay buffer
    batch_size: int = 64  # transitions in an update
    hidden_sizes: tuple[int, ...] = (128, 128)  # units in each hidden layer
    layer_norm: bool = True  # normalize hidden layers
    learning_rate: float = 2e-3  # of Adam, at the start
    anneal_lr: bool = True  # let the learning rate fall linearly to 0
    learning_starts: int = 0  # environment steps before the first update
    gamma: float = 0.98  # discount per step
    double_dqn: bool = True  # w chooses the next action, and w- values it
    tau: float = 0.005  # how far w- moves toward w; 1 makes it equal to w
    target_network_frequency: int = 0  # environment steps between moves of w-; 0: every update
    reward_scale: float = 1.0  # rewards are multiplied by this before they are stored
    end_e: float = 0.02  # the last epsilon, the probability of a random action
    exploration_fraction: float = 0.2  # the part of the run in which epsilon falls from 1
    eval_episodes: int = 100  # greedy episodes at the end
    output_dir: str | None = None  # new folder for the results
    load_model: str | None = None  # evaluate this model.npz instead of training


SCRIPT = "dqn_pendulum_discretized.py"


class BadInput(ValueError):
    """Settings, a file or an environment that can't be used: an error line, and exit status 2."""


class BadRun(RuntimeError):
    """Training or an evaluation that can't go on: an error line, and exit status 1."""


# ---------- Environment
# Any Gymnasium environment (--env-id). check_env, in *Command line*, refuses what does not fit.
def wrap_env(env):
    """Make observations vectors and rewards numbers, and record the episodes' returns."""
    space = env.observation_space
    env = gymnasium.wrappers.TransformReward(env, lambda reward: np.asarray(reward).item())
    flat_space = spaces.flatten_space(space)
    env = gymnasium.wrappers.TransformObservation(env, partial(flatten, space), flat_space)
    # Keeps the return and length of every episode in env.return_queue and env.length_queue. It also
    # writes them into info, under the name stats_key: the usual name, "episode", may be in use by
    # the environment.
    return gymnasium.wrappers.RecordEpisodeStatistics(env, buffer_length=10**9, stats_key=SCRIPT)


def flatten(space, obs):
    """An observation of the declared space as a vector of float32 (Discrete: one-hot)."""
    if not fits(space, obs):
        raise BadInput(f"env: the observation {obs!r} is not in the declared {space}")
    return spaces.flatten(space, obs).astype(np.float32)


def fits(space, obs):
    """Whether an observation fits the declared space.

    Values outside the bounds of a Box are allowed, since many environments exceed them.
    """
    if isinstance(space, spaces.Dict):
        named = isinstance(obs, dict)
        return named and all(fits(part, obs.get(name)) for name, part in space.items())
    if isinstance(space, spaces.Tuple):
        listed = isinstance(obs, tuple | list) and len(obs) == len(space)
        return listed and all(map(fits, space, obs))
    if not isinstance(space, spaces.Box):
        return space.contains(obs)
    x = np.asarray(obs)
    # A Box of floats takes any number, but a Box of integers would cut off fractions.
    kept = space.dtype.kind == "f" or np.array_equal(x, x.astype(space.dtype))
    return x.shape == space.shape and kept


def list_actions(args, env):
    """The listed actions (A,), in the environment's own type."""
    space = env.action_space
    return np.linspace(space.low[0], space.high[0], args.num_actions, dtype=space.dtype)


# ---------- Q-network
def init_params(key, sizes, layer_norm):
    """The weights of a multilayer perceptron, as a dict: w0 (in, out), b0 (out,), w1, b1, ...

    Weights are uniform with variance 2 / in (He et al. 2015, eq. 10); biases are 0.
    """
    shapes = list(zip(sizes[:-1], sizes[1:], strict=True))
    largest = max(n_in * n_out for n_in, n_out in shapes)
    # One draw serves all layers: this runs in a compiled function, and each draw adds 0.5 s to its
    # compiling. Each layer uses the first part of its row. (sizes and layer_norm are constants
    # there, no placeholders: `partial` has filled them in.)
    draws = jax.random.uniform(key, (len(shapes), largest), np.float32, -1, 1)
    params = {}
    for i, (n_in, n_out) in enumerate(shapes):
        layer = draws[i, : n_in * n_out].reshape(n_in, n_out)
        params[f"w{i}"] = (6 / n_in) ** 0.5 * layer  # uniform from -1 to 1 has variance 1 / 3
        params[f"b{i}"] = jnp.zeros(n_out, np.float32)
    if layer_norm:
        # A marker: q_values normalizes if this name is there. So a saved model remembers it. The
        # number is never used, and its gradient is 0.
        params["layer_norm"] = jnp.ones(1, np.float32)
    return params


def q_values(params, obs):
    """The network of --q-input state, Q(s, a) of every listed action: obs (B, O) -> (B, A).

    params holds w0, b0, w1, b1, ... and, if hidden layers are normalized, "layer_norm".
    """
    # The arrays of NumPy and JAX share the operators and methods used here, so the same code serves
    # to act (NumPy) and to learn (JAX).
    x = obs.astype(np.float32)
    # The number of the output layer: each layer has two arrays, and // ignores "layer_norm".
    last = len(params) // 2 - 1
    for i in range(last):
        x = x @ params[f"w{i}"] + params[f"b{i}"]
        if "layer_norm" in params:
            x = normalize(x)
        x = x * (x > 0)  # ReLU
    return x @ params[f"w{last}"] + params[f"b{last}"]


def normalize(x):
    """Give each row mean 0 and variance 1: layer normalization (Ba et al. 2016, eq. 3).

    No trained gain or bias follows it. The outputs of a layer keep their size, whatever the size of
    its weights, which makes large learning rates and several layers work (results/knobs.md).
    """
    n = x.shape[1]
    x = x - x.sum(axis=1, keepdims=True) / n  # not mean(), which is slower in NumPy
    return x / ((x * x).sum(axis=1, keepdims=True) / n + 1e-5) ** 0.5


def q_of_actions(params, obs, actions):
    """The network of --q-input state-action: obs (B, O), actions (M,) or (B, M) -> (B, M).

    The M actions are all that are listed, some that were drawn, or the one that was taken.
    """
    xp = np if isinstance(obs, np.ndarray) else jnp
    actions = xp.broadcast_to(actions, (len(obs), actions.shape[-1]))
    states = obs.repeat(actions.shape[1], axis=0)
    rows = xp.concatenate([states, actions.reshape(-1, 1)], axis=1)  # (B * M, O + 1)
    return q_values(params, rows).reshape(actions.shape)


# ---------- Replay buffer
# A Transition holds one transition, or arrays of many: of the whole buffer (buffer_size, ...), of a
# batch (B, ...), or of the batches of a group of updates (G, B, ...).
class Transition(NamedTuple):
    obs: np.ndarray
    action: np.ndarray  # its index in the list
    reward: np.ndarray  # scaled
    discount: np.ndarray  # what the value of next_obs is multiplied by: gamma, or 0 if terminated
    next_obs: np.ndarray  # one step after obs; at the end of an episode, its last observation


def add(buffer, added, new):
    """Write a transition over the oldest one. `added` is how many were written before."""
    for field, value in zip(buffer, new, strict=True):
        field[added % len(field)] = value


def sample(args, rng, buffer, added):
    """Draw the batches of a group uniformly: arrays (G, B, ...).

    NumPy copies what is indexed by an array. So JAX can learn from the batches in the background,
    while acting writes to the buffer.
    """
    filled = min(added, args.buffer_size)
    rows = rng.integers(filled, size=(args.gradient_steps, args.batch_size))
    return Transition(*(field[rows] for field in buffer))


def draw_actions(args, rng, listed):
    """Listed actions for the maximum in each update of a group (G, sampled_actions).

    None if the network has an output for each action: nothing has to be drawn then, and scan hands
    None on as it is.
    """
    if args.q_input == "state":
        return None
    return rng.choice(listed, (args.gradient_steps, args.sampled_actions)).astype(np.float32)


# ---------- Learning
class Learner(NamedTuple):
    params: dict  # w
    target_params: dict  # w-
    opt_state: tuple


def make_optimizer(args):
    """Adam (Kingma and Ba 2015). With anneal_lr, its rate is a function: falling linearly to 0."""
    rate = args.learning_rate
    if args.anneal_lr:
        groups = (args.total_timesteps - args.learning_starts) / args.train_frequency
        rate = optax.linear_schedule(rate, 0, groups * args.gradient_steps)
    return optax.adam(rate)


def update(args, listed, learner, batch, drawn, tau):
    """One gradient step. Returns the next Learner and the loss.

    listed are the listed actions (A,), drawn those of them that were drawn for this update's
    maximum (sampled_actions,), or None. tau says how far w- moves toward w: 0 not at all, 1 all the
    way.
    """

    # Q of the same actions for the whole batch: of all, or of those drawn.
    def next_q_values(params):
        if args.q_input == "state":  # a setting, so `if` works
            return q_values(params, batch.next_obs)
        return q_of_actions(params, batch.next_obs, drawn)

    # DQN: a* = argmax_a' Q(s', a'; w-), so that y = r + gamma max_a' Q(s', a'; w-). But the
    # maximum of noisy values is too high on average. Double DQN (van Hasselt et al. 2016):
    # a* = argmax_a' Q(s', a'; w). An action that w overrates is less often overrated by w- too.
    chooser = learner.params if args.double_dqn else learner.target_params
    best = jnp.argmax(next_q_values(chooser), axis=1)
    rows = jnp.arange(args.batch_size)
    next_q = next_q_values(learner.target_params)[rows, best]
    # y = r + gamma Q(s', a*; w-),   or y = r if s' is terminal: batch.discount is 0 there, and
    # gamma elsewhere.
    target = batch.reward + batch.discount * next_q

    # value_and_grad differentiates loss_fn with respect to its argument. target was computed
    # outside, so it counts as a constant.
    def loss_fn(params):  # q is Q(s, a; w)
        if args.q_input == "state":
            q = q_values(params, batch.obs)[rows, batch.action]
        else:
            taken = listed[batch.action, None]  # (B, 1)
            q = q_of_actions(params, batch.obs, taken)[:, 0]
        return jnp.mean((target - q) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(learner.params)
    # optax is JAX's usual library of optimizers. Such an optimizer is two pure functions, `init`
    # and `update`, so it may be made anew here; `apply_updates` adds the changes to the weights.
    # Adam's averages, and the number of updates for its schedule, are in opt_state.
    changes, opt_state = make_optimizer(args).update(grads, learner.opt_state)
    params = optax.apply_updates(learner.params, changes)
    # w- <- (1 - tau) w- + tau w
    target_params = optax.incremental_update(params, learner.target_params, tau)
    return Learner(params, target_params, opt_state), loss


def learn(args, listed, learner, batches, drawn, env_steps):
    """A group of updates. Returns the Learner and the last loss.

    `train` compiles `partial(learn, args, listed)`, which is learn with these arguments filled in,
    so that they are constants; listed is an array of JAX, because placeholders can't index NumPy's.
    The others are arguments of the compiled function, env_steps too.
    """
    tau = jnp.full(args.gradient_steps, args.tau)  # one for each update
    if args.target_network_frequency:
        # w- stays unless there was a multiple of the frequency in the last train_frequency steps.
        # With a frequency of 500, say, and groups every 16 steps: the group at step 512 follows
        # steps 497 to 512, and 500 is among them, because 512 % 500 = 12 < 16. So w- moves at the
        # first update of this group.
        due = env_steps % args.target_network_frequency < args.train_frequency
        first = jnp.arange(args.gradient_steps) == 0
        tau = jnp.where(due & first, args.tau, 0)

    # `scan` is a compiled loop: for g in range(G): learner, loss = one_update(learner, inputs_g).
    # inputs_g has entry g of each array, and the losses are stacked.
    def one_update(learner, inputs):
        return update(args, listed, learner, *inputs)

    learner, losses = jax.lax.scan(one_update, learner, (batches, drawn, tau))
    return learner, losses[-1]


# ---------- Training
def act(args, rng, params, obs, env_steps, listed):
    """The index of an epsilon-greedy action."""
    falling_steps = max(1, args.exploration_fraction * args.total_timesteps)
    progress = min(1, env_steps / falling_steps)
    epsilon = 1 + (args.end_e - 1) * progress
    if rng.random() < epsilon:
        return int(rng.integers(args.num_actions))
    if args.q_input == "state":
        return int(q_values(params, obs[None]).argmax())
    some = rng.integers(args.num_actions, size=args.sampled_actions)
    return int(some[q_of_actions(params, obs[None], listed[some]).argmax()])


def init_learner(args, obs_size):
    """New weights, the same for w and w-, and the optimizer's state before any update."""
    sizes = obs_size, *args.hidden_sizes, args.num_actions
    if args.q_input == "state-action":
        sizes = obs_size + 1, *args.hidden_sizes, 1
    params = init_params(jax.random.key(args.seed), sizes, args.layer_norm)
    return Learner(params, params, make_optimizer(args).init(params))


def init_buffer(args, obs_size):
    """An empty buffer: arrays of zeros, which add overwrites."""
    rows = args.buffer_size
    return Transition(
        obs=np.zeros((rows, obs_size), np.float32),
        action=np.zeros(rows, int),
        reward=np.zeros(rows, np.float32),
        discount=np.zeros(rows, np.float32),
        next_obs=np.zeros((rows, obs_size), np.float32),
    )


def train(args, env):
    """Returns params, episodes (environment step, return), and a dict of counts and times.

    Ctrl-C ends it early. Raises BadInput on bad settings or environments, and BadRun on numbers
    that are not finite. Errors of the environment's own code are not caught.

    What happens at the same time, by default (w_k are the weights after k groups of updates):

        steps in Python     1 to 16   17 to 32   33 to 48   49 to 64
        which act with      w_0       w_0        w_1        w_2
        JAX, meanwhile                group 1    group 2    group 3
    """
    check(args)
    check_env(env)
    started = time.time()
    env = wrap_env(env)  # now observations are vectors of float32
    rng = np.random.default_rng(args.seed)
    listed = list_actions(args, env)
    (obs_size,) = env.observation_space.shape
    learner = jax.jit(partial(init_learner, args, obs_size))()  # compiled as a whole: faster
    buffer = init_buffer(args, obs_size)
    learn_group = jax.jit(partial(learn, args, jnp.asarray(listed, np.float32)))
    # Compile by a first call. It learns from zeros, and its result is not used.
    drawn = draw_actions(args, rng, listed)
    learn_group(learner, sample(args, rng, buffer, added=1), drawn, 0)
    acting_params = jax.tree.map(np.asarray, learner.params)
    compiled = printed = time.time()
    loss = 0.0
    completed = 0
    obs, _ = env.reset(seed=int(rng.integers(2**30)))
    with contextlib.suppress(KeyboardInterrupt):
        for env_steps in range(1, args.total_timesteps + 1):
            # Act and step. An index that is a list gives an array of shape (1,), a copy.
            action = act(args, rng, acting_params, obs, env_steps, listed)
            next_obs, reward, terminated, truncated, _ = env.step(listed[[action]])

            # Store. next_obs is worth 0 after termination, but not if the episode was only cut off.
            discount = 0.0 if terminated else args.gamma
            new = Transition(obs, action, args.reward_scale * reward, discount, next_obs)
            add(buffer, env_steps - 1, new)
            obs = next_obs
            if terminated or truncated:
                obs, _ = env.reset()

            # Learn. np.asarray waits for the previous group of updates. Act with its weights, while
            # JAX works on the next group in the background: the call returns at once.
            if env_steps > args.learning_starts and env_steps % args.train_frequency == 0:
                acting_params = jax.tree.map(np.asarray, learner.params)
                batches = sample(args, rng, buffer, env_steps)
                drawn = draw_actions(args, rng, listed)
                learner, loss = learn_group(learner, batches, drawn, env_steps)

            completed = env_steps  # Ctrl-C may come in the middle of a step
            if time.time() - printed > 1 or completed == args.total_timesteps:
                printed = time.time()
                report(args, completed, env, buffer, loss, printed - compiled)
    return jax.device_get(learner.params), *statistics(args, env, completed, started, compiled)


def report(args, env_steps, env, buffer, loss, seconds):
    """Print the progress. Raises BadRun if a number is not finite."""
    seen = {"observation": buffer.obs, "next observation": buffer.next_obs}
    for name, values in (seen | {"reward": buffer.reward, "loss": loss}).items():
        if not np.isfinite(values).all():
            raise BadRun(f"{name} is not finite")
    recent = np.mean(list(env.return_queue)[-100:] or np.nan)
    left = seconds * (args.total_timesteps / env_steps - 1)
    print(f"{env_steps:,} steps, recent return {recent:.4g}, loss {loss:.3g}", end=", ")
    print(f"{env_steps / seconds:,.0f} steps/s, {left:.0f} s left", flush=True)


def statistics(args, env, env_steps, started, compiled):
    """The episodes of the run, and how long it took."""
    seconds = time.time() - compiled
    counts = {"env_steps": env_steps, "interrupted": env_steps < args.total_timesteps}
    counts |= {"compile_seconds": compiled - started, "train_seconds": seconds}
    counts["steps_per_second"] = env_steps / seconds
    return np.column_stack([np.cumsum(env.length_queue), env.return_queue]), counts


# ---------- Evaluation
MAX_EVAL_STEPS = 100_000
ENDLESS = f"an episode of over {MAX_EVAL_STEPS:,} steps stops the evaluation; set a limit with "
ENDLESS += "gymnasium.register(..., max_episode_steps=...) or gymnasium.wrappers.TimeLimit"


def play(args, params, env, seed):
    """The return of a greedy episode."""
    listed = list_actions(args, env)
    obs, _ = env.reset(seed=seed)
    for _ in range(MAX_EVAL_STEPS):
        if args.q_input == "state":
            q = q_values(params, obs[None])
        else:
            q = q_of_actions(params, obs[None], listed)
        obs, _, terminated, truncated, _ = env.step(listed[[q.argmax()]])
        if terminated or truncated:
            return env.return_queue[-1]
    raise BadRun(ENDLESS)


def evaluate(args, params, env):
    """The returns (eval_episodes,) of greedy episodes, from seeds that training does not use."""
    env = wrap_env(env)
    first = 2**30 + args.seed * args.eval_episodes
    return np.array([play(args, params, env, first + k) for k in range(args.eval_episodes)])


def summarize(args, env, returns):
    """Print the result, and return statistics of the agent."""
    threshold = env.spec.reward_threshold
    solved = None if threshold is None else bool(returns.mean() >= threshold)
    print(f"{returns.size} greedy episodes: mean {returns.mean():.4g}", end=", ")
    verdict = "" if threshold is None else f"; solved: {solved} (threshold {threshold})"
    print(f"std {returns.std():.4g}, worst {returns.min():.4g}{verdict}")
    agent = {"seed": None if args.load_model else args.seed, "solved": solved}
    agent |= {"eval_return_mean": returns.mean(), "eval_return_std": returns.std()}
    return agent | {"eval_return_min": returns.min(), "eval_episodes": returns.size}


# ---------- Command line
API = "reset(seed=...) -> obs, info; step(action) -> obs, reward, terminated, truncated, info"
UNEVEN = "some observations may be 100 times others: try gymnasium.wrappers.RescaleObservation"


def check(args):
    """Raise BadInput, naming the flag, on bad settings."""
    counts = "total_timesteps", "train_frequency", "gradient_steps", "buffer_size"
    counts += "batch_size", "hidden_sizes", "eval_episodes", "sampled_actions"
    limits = dict.fromkeys(counts, (1, np.inf)) | {"num_actions": (2, np.inf)}
    limits |= dict.fromkeys(("gamma", "end_e", "exploration_fraction"), (0, 1))
    limits |= dict.fromkeys(("learning_rate", "reward_scale"), (1e-9, 1e9))
    limits |= {"seed": (0, 2**20), "tau": (1e-6, 1), "target_network_frequency": (0, 2**31 - 1)}
    limits["learning_starts"] = (0, args.total_timesteps - 1)
    for name, (least, most) in limits.items():
        for value in np.ravel(getattr(args, name)):
            if not least <= value <= most:
                raise BadInput(f"{name} must be between {least} and {most}")
    if args.q_input not in ("state", "state-action"):
        raise BadInput("q_input must be state or state-action")


def make_env(args):
    """The environment of args.env_id, as Gymnasium makes it."""
    try:
        return gymnasium.make(args.env_id)
    except Exception as error:
        refuse(error, "env_id")


def check_env(env):
    """Reset the environment and take a step. Raises BadInput if this script can't use it."""
    try:
        space = wrap_env(env).observation_space
        actions = env.action_space
        one_number = isinstance(actions, spaces.Box) and actions.shape == (1,)
        if not one_number or not actions.is_bounded() or actions.dtype.kind != "f":
            raise TypeError(f"actions must be a bounded Box (1,) of floats, not {actions!r}")
        if not isinstance(space, spaces.Box):
            raise TypeError(f"observations must be numbers, not {env.observation_space}")
    except Exception as error:
        refuse(error, "env")
    try:
        obs, info = env.reset(seed=0)
        next_obs, _, _, _, _ = env.step(actions.low)
        if not isinstance(info, dict):
            raise TypeError("info is not a dict")
    except Exception as error:
        refuse(error, f"env: Gymnasium's API is {API}")
    for x in (obs, next_obs):
        flatten(env.observation_space, x)


def refuse(error, what):
    """Raise BadInput, which ends the script with one line, or the error itself.

    It is the error itself if its traceback passes through code other than Gymnasium's and the
    functions that call this one: there may be a bug in that code, for example in the environment,
    and then the traceback shows where. Gymnasium raises an error of its own for a failed import, so
    the original error, its __cause__, is looked at too. Never returns.
    """
    ours = "make_env", "check_env", "wrap_env", "prepare_output"
    # Gymnasium calls functools and, to find an environment, importlib. (prepare_output and pathlib
    # are for dqn_lunarlander.py, which has the same function.)
    known = "gymnasium", "importlib", "pathlib", "functools"
    for part in (error, error.__cause__):
        for frame, _ in traceback.walk_tb(getattr(part, "__traceback__", None)):
            own = frame.f_globals is globals() and frame.f_code.co_name in ours
            if not own and frame.f_globals["__name__"].split(".")[0] not in known:
                raise error
    raise BadInput(f"{what}: {type(error).__name__}: {error}") from error


def warn(args, env):
    """Print what may go wrong with this environment, although it fits."""
    space = wrap_env(env).observation_space
    sizes = np.maximum(abs(space.low), abs(space.high)).astype(float)
    sizes = sizes[(sizes < 1e30) & (sizes > 0)]  # many environments declare 3.4e38 for no bound
    if sizes.size and sizes.max() > 100 * sizes.min():
        print(f"warning: {UNEVEN}", file=sys.stderr)
    if env.spec and env.spec.max_episode_steps is None:
        print(f"warning: {ENDLESS}", file=sys.stderr)
    gigabytes = 8e-9 * args.buffer_size * space.shape[0]  # obs and next_obs
    if gigabytes > 4:
        problem = f"the buffer takes {gigabytes:.0f} GB; try a lower --buffer-size"
        print(f"warning: {problem}", file=sys.stderr)


def load_model(path, args=None, env=None):
    """The params of a saved model.npz, which must fit args and env, if given.

    `run` gives both; a program that imports this file need not.
    """
    try:
        params = dict(np.load(path, allow_pickle=False))
        script = params.pop("script")
        if script != SCRIPT:
            raise ValueError(f"{script} saved it")
        listed = params.pop("listed_actions")
        inputs = len(params["w0"])
        outputs = q_values(params, np.zeros((1, inputs))).size
    except Exception as error:  # damaged files raise errors of many kinds
        raise BadInput(f"load_model: {type(error).__name__}: {error}") from error
    if env:
        wanted = spaces.flatdim(env.observation_space), args.num_actions
        if args.q_input == "state-action":
            wanted = wanted[0] + 1, 1
        if (inputs, outputs) != wanted or not np.array_equal(listed, list_actions(args, env)):
            what = f"{inputs} inputs, {outputs} outputs, {len(listed)} listed actions"
            raise BadInput(f"load_model: its {what} do not fit --q-input, --num-actions, --env-id")
    return params


def make_output_dir(args):
    """Make output_dir, a new folder. If that or a package fails, it should be before training."""
    try:
        importlib.import_module("matplotlib")
        Path(args.output_dir).mkdir(parents=True)
    except (ImportError, OSError) as error:
        raise BadInput(f"output_dir: {error}") from error


def keep(args, params, episodes, listed):
    """Save the model, the returns, and a plot of them."""
    from matplotlib.figure import Figure  # slow to import

    path = f"{args.output_dir}/model.npz"
    np.savez(path, script=SCRIPT, listed_actions=listed, **params)
    names = "env_step,episode_return"
    np.savetxt(f"{args.output_dir}/returns.csv", episodes, "%.10g", ",", header=names, comments="")
    axes = Figure().add_subplot(xlabel="environment steps", ylabel="episode return")
    axes.plot(*episodes.T, ".", markersize=1)
    axes.figure.savefig(f"{args.output_dir}/curve.png", dpi=150)


def run(args):
    """Train or load, evaluate, save. Returns the exit status: 0, or 130 after Ctrl-C."""
    check(args)
    env = make_env(args)
    check_env(env)
    if not args.load_model:
        warn(args, env)
    if args.load_model:
        params = load_model(args.load_model, args, env)
    if args.output_dir:
        make_output_dir(args)
    summary = {"script": SCRIPT, "args": vars(args), "versions": {"jax": jax.__version__}}
    summary |= {"device": jax.devices()[0].device_kind, "seeds": []}
    if not args.load_model:
        params, episodes, counts = train(args, env)
        summary |= counts
        if args.output_dir:
            keep(args, params, episodes, list_actions(args, env))
    try:
        # A list, because in dqn_cartpole_jax.py there may be several agents.
        summary["seeds"] = [summarize(args, env, evaluate(args, params, env))]
    finally:  # whatever stops the evaluation, the summary is kept
        if args.output_dir:
            Path(args.output_dir, "summary.json").write_text(json.dumps(summary, indent=2))
    return 130 if summary.get("interrupted") else 0


def main(args):
    """Run the script. Exit status: 0, 1 on failure, 2 on bad input, 130 after Ctrl-C."""
    try:
        return run(args)
    except (BadInput, BadRun) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))

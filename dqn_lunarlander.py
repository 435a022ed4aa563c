# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,!=0.11.1", "optax>=0.2.8", "gymnasium[classic-control]>=1.4.0",
#     "gymnasium[box2d]>=1.4.0; python_version < '3.14'", "numpy>=2.4", "tyro>=1.0.17",
#     "matplotlib>=3.11", "imageio>=2.38"]  # not jax 0.11.1: its issue 40101 on GitHub
# ///
r"""DQN on LunarLander-v3, or on any Gymnasium environment with Discrete actions.

What it teaches: learning with a compiled function from an environment that is ordinary Python. JAX
is a library with NumPy's functions (`jnp`) for arrays of its own. It compiles functions of such
arrays and computes their gradients (see *JAX in short*). The training loop as a whole can't be
compiled, since the environment is not made of such functions. Starting a compiled function takes
longer than this small network's arithmetic, so the agent acts in NumPy. JAX updates the network in
the background, since a call of a compiled function returns before its result is there
("asynchronous dispatch"). Each call makes a group of updates, so that the calls are few.

Q(s, a) is the expected sum of rewards after action a in state s, if every later action is optimal.
It is discounted: a reward that comes k steps later counts gamma^k times as much. So Q(s, a) is the
mean of r + gamma max_a' Q(s', a') over the reward r and next state s' of a step.

Deep Q-learning (DQN, Mnih et al. 2015, https://doi.org/10.1038/nature14236) learns it as a network
Q(s, a; w) with weights w. It explores by acting epsilon-greedily: at random with probability
epsilon, else by the largest Q. A replay buffer keeps the newest steps (s, a, r, s'), called
transitions. Each update draws a batch of them at random, because consecutive steps resemble each
other too much, and takes a gradient step to reduce, on average over the batch,

    h(y - Q(s, a; w))   with   y = r + gamma max_a' Q(s', a'; w-),   or y = r if s' is terminal,

and h(x) = x^2 / 2 if |x| < 1, else |x| - 1/2 (Huber 1964). The slope of h is x, clipped to
between -1 and 1, which is the error clipping of Mnih et al.

y is called the target. w- are the weights of a second network of the same shape, the target
network. They follow w with a delay: if y were computed from w itself, an update that raises
Q(s, a) could raise y at once too, and errors would feed on themselves. The paper copies w to w-
now and then; here, w- moves a small part of the way to w at every update (--tau), so it lags too.
s' is terminal if the episode ended for good, so that no reward can follow. A time limit is not
terminal: it only cuts the episode off (truncates it), so the value of s' still counts.

    python dqn_lunarlander.py --env-id Acrobot-v1
    python dqn_lunarlander.py --output-dir runs/1 --eval-frequency 25000 --capture-video

(`uv run` in place of `python` installs what the first lines of this file name.) The last command
saves the weights every 25,000 steps, and at the end plays and films an episode with each. From
Python, an environment `env` of your own is learned, and played, like this:

    from dqn_lunarlander import Args, evaluate, q_values, train, wrap_env

    args = Args(total_timesteps=50_000)
    params, episodes, counts = train(args, env)  # weights, returns of episodes, counts and times
    print(evaluate(args, params, env).mean())
    env = wrap_env(env)  # its observations are vectors, as the network needs them
    obs, _ = env.reset()
    action = env.action_space.start + q_values(params, obs[None]).argmax()

LunarLander-v3 gives 8 numbers (position, velocity, angle, angular velocity, whether each leg
touches the ground) and has 4 actions (nothing, left engine, main engine, right engine). The way
down to the pad pays 100 to 140, coming to rest another 100, each leg on the ground 10; a crash
costs 100, and engines cost a little. The time limit is 1,000 steps. A return is the sum of the
rewards in an episode, not discounted. An agent has solved LunarLander if its mean return in 100
episodes without random actions is at least 200 (Gymnasium's threshold). Of 20 agents, trained with
seeds that were not used to choose the settings, all solve it: mean 276.1 ± 4.2 (a 95 % interval),
the worst agent 252.3. Training takes 20 to 40 seconds on one core of a server; with a second
core, the background's work is done beside the environment's.

To learn DQN, read `init_params`, `q_values`, `Transition`, `extend`, `sample`, `Learner`, `update`,
`learn`, `act` and `train`, in this order. What comes after `train` reports, evaluates, checks and
saves.

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

Departures from Mnih et al., each with the flag that undoes it. The last column is the mean return
of 10 agents, ± a 95 % interval, when only this departure is undone. They have the seeds of the
first 10 of the 20 agents above.

    departure                                   undone by                                     return
    none                                                                                276.6 ±  6.9
    targets sum n rewards                       --n-step 1                              254.6 ±  8.4
    w- moves a little at every update           --tau 1 --target-network-frequency 500  270.2 ±  8.2
    the learning rate falls to 0                --no-anneal-lr                          149.7 ± 90.7
    hidden layers are normalized                --no-layer-norm                         253.3 ± 21.0
    w chooses a' in y, w- values it: Double DQN --no-double-dqn                         269.2 ±  9.3
    learning starts at once                     --learning-starts 10000                 274.5 ±  5.0
    rewards are multiplied by a constant        --reward-scale 1                        247.1 ± 10.5
    updates come in groups, 10 after 32 steps   --train-frequency 4 --gradient-steps 1  279.1 ±  3.8

Targets of n steps, the falling learning rate, normalization and the rewards' constant change the
return by more than is likely by chance (Welch's test, not corrected for eight comparisons: p is at
most 0.036; for the others, at least 0.17). With a constant rate some agents end badly, with a lower
one too: at a constant rate of 1e-3, 10 agents reach 139.9 ± 130.6. Updates come in groups for
speed. Rewards, of up to 100, are multiplied by 0.03, so that most errors y - Q are below 1, where h
is a square. For an environment of your own, choose the constant so that Q, about the sum of the
next 1 / (1 - gamma) rewards, is of the size that it has here: 1 to 10. Huber's loss is in the
paper, as error clipping. With --loss squared, 10 agents with the same seeds reach 271.6.

No flag undoes these: Adam replaces RMSProp (both divide the step of each weight by a running
average of its gradients' size), the paper's clipping of rewards to between -1 and 1 is left out,
epsilon falls from the first step on, not only once learning has started, and the agent acts with
weights that are one group of updates old. (Of the first weights, whose variance is 2 / in here, the
paper says nothing.)

Plain DQN, with all departures of the table undone, at the settings of dqn_jax.py in CleanRL (single
files of many algorithms, https://github.com/vwxyzjn/cleanrl), which squares errors instead of
clipping them:

    python dqn_lunarlander.py --n-step 1 --tau 1 --target-network-frequency 500 --no-anneal-lr \
        --no-layer-norm --no-double-dqn --learning-starts 10000 --reward-scale 1 \
        --train-frequency 10 --gradient-steps 1 --loss squared --total-timesteps 500000 \
        --learning-rate 2.5e-4 --batch-size 128 --hidden-sizes 120 84 --buffer-size 10000 \
        --gamma 0.99 --end-e 0.05 --exploration-fraction 0.5

Except for the squared errors and what no flag undoes, this is the algorithm of the paper. Of 60
agents, 32 solve LunarLander: mean 188.1. (CleanRL's own agents reach 162.2. Its first weights have
half the variance, which may be why: results/peers.md.)

The defaults need no fine tuning: with one number of them doubled or halved, or with another number
of layers, all 6 agents solve LunarLander (6 for each change). (For gamma, what is doubled or halved
is the horizon 1 / (1 - gamma), which is about how many steps ahead Q looks.) With half and with
twice the steps, all 6 do too (results/knobs.md).

Letters in shapes: B batch, G updates in a group, O observation, A actions.
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
    """DQN on a Gymnasium environment with Discrete actions."""

    seed: int = 1  # the same seed, machine and versions give the same result
    env_id: str = "LunarLander-v3"  # or another id; my_module:MyEnv-v0 imports my_module first
    total_timesteps: int = 200_000  # environment steps
    train_frequency: int = 32  # environment steps between groups of updates
    gradient_steps: int = 10  # updates in a group
    buffer_size: int = 50_000  # transitions in the replay buffer
    batch_size: int = 64  # transitions in an update
    hidden_sizes: tuple[int, ...] = (128, 128)  # units in each hidden layer
    layer_norm: bool = True  # normalize hidden layers
    learning_rate: float = 3e-3  # of Adam, at the start
    anneal_lr: bool = True  # let the learning rate fall linearly to 0
    learning_starts: int = 0  # environment steps before the first update
    gamma: float = 0.995  # discount per step
    n_step: int = 3  # rewards summed in a target
    double_dqn: bool = True  # w chooses the next action, and w- values it
    loss: Literal["huber", "squared"] = "huber"
    tau: float = 0.005  # how far w- moves toward w; 1 makes it equal to w
    target_network_frequency: int = 0  # environment steps between moves of w-; 0: every update
    reward_scale: float = 0.03  # rewards are multiplied by this before they are stored
    end_e: float = 0.02  # the last epsilon, the probability of a random action
    exploration_fraction: float = 0.2  # the part of the run in which epsilon falls from 1
    eval_episodes: int = 100  # greedy episodes at the end
    eval_frequency: int = 0  # environment steps between saved models (played at the end); 0: none
    capture_video: bool = False  # film an episode of each saved model, as GIFs
    output_dir: str | None = None  # new folder for the results
    load_model: str | None = None  # evaluate this model.npz instead of training


SCRIPT = "dqn_lunarlander.py"


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
    """Q(s, a) of every action: obs (B, O) -> (B, A).

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


# ---------- Replay buffer
# A Transition holds one transition, or arrays of many: of the whole buffer (buffer_size, ...), of a
# batch (B, ...), or of the batches of a group of updates (G, B, ...).
class Transition(NamedTuple):
    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray  # scaled; of n steps (fewer at the end of an episode), the discounted sum
    discount: np.ndarray  # what the value of next_obs is multiplied by: gamma^n, 0 if terminated
    next_obs: np.ndarray  # n steps after obs; at the end of an episode, its last observation


def extend(queue, new, ended, n_step):
    """Transitions of n steps, as in Rainbow (Hessel et al. 2018).

    They come from applying the formula of y n times, along the actions that were taken:
    y = r_1 + gamma r_2 + ... + gamma^(n-1) r_n + gamma^n max_a' Q(s_n, a'; w-). Such a transition
    holds the sum as its reward, and gamma^n as its discount.

    Adds the step `new` to each transition in the queue, and starts one from it. A transition is
    complete when it has n steps; if the episode has ended, all are. Returns the complete ones, and
    the queue of the others. With n_step=3, gamma=0.5, and rewards 1, 2, 4, these are the (reward,
    discount) of the transitions, a line for each step:
        (1, 0.5)
        (1 + 0.5 * 2, 0.25)              (2, 0.5)
        (1 + 0.5 * 2 + 0.25 * 4, 0.125)  (2 + 0.5 * 4, 0.25)  (4, 0.5)
    Now the first of them is complete. The rewards after a transition's first depend on actions that
    were random or chosen by older weights, while Q assumes optimal ones. That is not corrected for:
    a bias, accepted because learning is faster.
    """
    longer = []
    for old in queue:
        reward = old.reward + old.discount * new.reward
        discount = old.discount * new.discount
        longer.append(old._replace(reward=reward, discount=discount, next_obs=new.next_obs))
    longer.append(new)
    n_complete = 1 if len(longer) == n_step else 0
    if ended:
        n_complete = len(longer)
    return longer[:n_complete], longer[n_complete:]


def add(buffer, added, new):
    """Write transitions over the oldest ones.

    `added` counts all that were ever written. Returns the new count.
    """
    for transition in new:
        for field, value in zip(buffer, transition, strict=True):
            field[added % len(field)] = value
        added += 1
    return added


def sample(args, rng, buffer, added):
    """Draw the batches of a group uniformly: arrays (G, B, ...).

    NumPy copies what is indexed by an array. So JAX can learn from the batches in the background,
    while acting writes to the buffer.
    """
    filled = min(added, args.buffer_size)
    rows = rng.integers(filled, size=(args.gradient_steps, args.batch_size))
    return Transition(*(field[rows] for field in buffer))


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


def update(args, learner, batch, tau):
    """One gradient step. Returns the next Learner and the loss.

    tau says how far w- moves toward w: 0 not at all, 1 all the way.
    """
    # DQN: a* = argmax_a' Q(s', a'; w-), so that y = r + gamma max_a' Q(s', a'; w-). But the
    # maximum of noisy values is too high on average. Double DQN (van Hasselt et al. 2016):
    # a* = argmax_a' Q(s', a'; w). An action that w overrates is less often overrated by w- too.
    chooser = learner.params if args.double_dqn else learner.target_params
    best = jnp.argmax(q_values(chooser, batch.next_obs), axis=1)
    rows = jnp.arange(args.batch_size)
    next_q = q_values(learner.target_params, batch.next_obs)[rows, best]
    # y = r + gamma Q(s', a*; w-),   or y = r if s' is terminal.
    # batch.discount is gamma, and 0 if s' is terminal. With n steps, `extend` has made batch.reward
    # the sum of n rewards and batch.discount gamma^n.
    target = batch.reward + batch.discount * next_q

    # value_and_grad differentiates loss_fn with respect to its argument. target was computed
    # outside, so it counts as a constant.
    def loss_fn(params):
        q = q_values(params, batch.obs)[rows, batch.action]  # Q(s, a; w)
        if args.loss == "huber":  # a setting, so `if` works
            return jnp.mean(optax.huber_loss(q, target))
        return jnp.mean((target - q) ** 2)  # without the 1/2: Adam divides by the gradient's size

    loss, grads = jax.value_and_grad(loss_fn)(learner.params)
    # optax is JAX's usual library of optimizers. Such an optimizer is two pure functions, `init`
    # and `update`, so it may be made anew here; `apply_updates` adds the changes to the weights.
    # Adam's averages, and the number of updates for its schedule, are in opt_state.
    changes, opt_state = make_optimizer(args).update(grads, learner.opt_state)
    params = optax.apply_updates(learner.params, changes)
    # w- <- (1 - tau) w- + tau w
    target_params = optax.incremental_update(params, learner.target_params, tau)
    return Learner(params, target_params, opt_state), loss


def learn(args, learner, batches, env_steps):
    """A group of updates. Returns the Learner and the last loss.

    `train` compiles `partial(learn, args)`, which is learn with its first argument filled in, so
    that settings are constants. The others are arguments of the compiled function, env_steps too.
    """
    tau = jnp.full(args.gradient_steps, args.tau)  # one for each update
    if args.target_network_frequency:
        # w- stays unless there was a multiple of the frequency in the last train_frequency steps.
        # With a frequency of 500, say, and groups every 32 steps: the group at step 512 follows
        # steps 481 to 512, and 500 is among them, because 512 % 500 = 12 < 32. So w- moves at the
        # first update of this group.
        due = env_steps % args.target_network_frequency < args.train_frequency
        first = jnp.arange(args.gradient_steps) == 0
        tau = jnp.where(due & first, args.tau, 0)

    # `scan` is a compiled loop: for g in range(G): learner, loss = one_update(learner, inputs_g).
    # inputs_g has entry g of each array, and the losses are stacked.
    def one_update(learner, inputs):
        return update(args, learner, *inputs)

    learner, losses = jax.lax.scan(one_update, learner, (batches, tau))
    return learner, losses[-1]


# ---------- Training
def act(args, rng, params, obs, env_steps, n_actions):
    """An epsilon-greedy action, as a number from 0 to n_actions - 1."""
    falling_steps = max(1, args.exploration_fraction * args.total_timesteps)
    progress = min(1, env_steps / falling_steps)
    epsilon = 1 + (args.end_e - 1) * progress
    if rng.random() < epsilon:
        return int(rng.integers(n_actions))
    return int(q_values(params, obs[None]).argmax())


def init_learner(args, sizes):
    """New weights, the same for w and w-, and the optimizer's state before any update."""
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

        steps in Python     1 to 32   33 to 64   65 to 96   97 to 128
        which act with      w_0       w_0        w_1        w_2
        JAX, meanwhile                group 1    group 2    group 3
    """
    check(args)
    check_env(env)
    started = time.time()
    env = wrap_env(env)  # now observations are vectors of float32
    rng = np.random.default_rng(args.seed)
    sizes = *env.observation_space.shape, *args.hidden_sizes, int(env.action_space.n)
    learner = jax.jit(partial(init_learner, args, sizes))()  # compiled as a whole: faster
    buffer = init_buffer(args, sizes[0])
    # Compile by a first call. It learns from zeros, and its result is not used.
    learn_group = jax.jit(partial(learn, args))
    learn_group(learner, sample(args, rng, buffer, added=1), 0)
    acting_params = jax.tree.map(np.asarray, learner.params)
    compiled = printed = time.time()
    queue = []
    loss = 0.0
    added = completed = 0
    obs, _ = env.reset(seed=int(rng.integers(2**30)))
    with contextlib.suppress(KeyboardInterrupt):
        for env_steps in range(1, args.total_timesteps + 1):
            # Act and step. Gymnasium's Discrete actions are counted from `start`.
            action = act(args, rng, acting_params, obs, env_steps, env.action_space.n)
            outcome = env.step(int(env.action_space.start) + action)
            next_obs, reward, terminated, truncated, _ = outcome

            # Store. next_obs is worth 0 after termination, but not if the episode was only cut off.
            discount = 0.0 if terminated else args.gamma
            new = Transition(obs, action, args.reward_scale * reward, discount, next_obs)
            complete, queue = extend(queue, new, terminated or truncated, args.n_step)
            added = add(buffer, added, complete)
            obs = next_obs
            if terminated or truncated:
                obs, _ = env.reset()

            # Learn. np.asarray waits for the previous group of updates. Act with its weights, while
            # JAX works on the next group in the background: the call returns at once.
            if added and env_steps > args.learning_starts and env_steps % args.train_frequency == 0:
                acting_params = jax.tree.map(np.asarray, learner.params)
                learner, loss = learn_group(learner, sample(args, rng, buffer, added), env_steps)

            completed = env_steps  # Ctrl-C may come in the middle of a step
            save_snapshot(args, completed, learner)
            if time.time() - printed > 1 or completed == args.total_timesteps:
                printed = time.time()
                report(args, completed, env, buffer, loss, printed - compiled)
    return jax.device_get(learner.params), *statistics(args, env, completed, started, compiled)


def save_snapshot(args, env_steps, learner):
    """Save the weights every eval_frequency steps."""
    if args.eval_frequency and env_steps % args.eval_frequency == 0:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)  # run has made it, others may not
        path = f"{args.output_dir}/model_{env_steps:08}.npz"
        np.savez(path, script=SCRIPT, **learner.params)


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


def play(params, env, seed, frames=None):
    """The return of a greedy episode. Adds every other frame, at half size."""
    obs, _ = env.reset(seed=seed)
    for t in range(MAX_EVAL_STEPS):
        action = int(q_values(params, obs[None]).argmax())
        obs, _, terminated, truncated, _ = env.step(int(env.action_space.start) + action)
        if frames is not None and t % 2 == 0 and t < 2_000:
            frames.append(env.render()[::2, ::2].copy())
        if terminated or truncated:
            return env.return_queue[-1]
    raise BadRun(ENDLESS)


def evaluate(args, params, env):
    """The returns (eval_episodes,) of greedy episodes, from seeds that training does not use."""
    env = wrap_env(env)
    first = 2**30 + args.seed * args.eval_episodes
    return np.array([play(params, env, first + k) for k in range(args.eval_episodes)])


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


def play_snapshots(args, env, params):
    """Play an episode with each snapshot, and with params; with capture_video, film it."""
    models = {path: load_model(path) for path in sorted(Path(args.output_dir).glob("model_*"))}
    models[Path(args.output_dir, "model.npz")] = params
    for path, model in models.items():
        frames = [] if args.capture_video else None
        print(f"{path.stem}: greedy return {play(model, wrap_env(env), 2**30, frames):.4g}")
        if frames:
            import imageio.v3

            imageio.v3.imwrite(path.with_suffix(".gif"), frames, duration=40, loop=0)


# ---------- Command line
API = "reset(seed=...) -> obs, info; step(action) -> obs, reward, terminated, truncated, info"
BOX2D = "it needs Box2D: pip install 'gymnasium[box2d]' (under Python 3.14 first, on Debian: apt "
BOX2D += "install build-essential python3-dev swig); other environments work without it"
UNEVEN = "some observations may be 100 times others: try gymnasium.wrappers.RescaleObservation"


def check(args):
    """Raise BadInput, naming the flag, on bad settings."""
    counts = "total_timesteps", "train_frequency", "gradient_steps", "n_step", "buffer_size"
    counts += "batch_size", "hidden_sizes", "eval_episodes"
    limits = dict.fromkeys(counts, (1, np.inf))
    limits |= dict.fromkeys(("gamma", "end_e", "exploration_fraction"), (0, 1))
    limits |= dict.fromkeys(("learning_rate", "reward_scale"), (1e-9, 1e9))
    limits |= dict.fromkeys(("eval_frequency", "target_network_frequency"), (0, 2**31 - 1))
    limits |= {"seed": (0, 2**20), "tau": (1e-6, 1)}
    limits["learning_starts"] = (0, args.total_timesteps - 1)
    for name, (least, most) in limits.items():
        for value in np.ravel(getattr(args, name)):
            if not least <= value <= most:
                raise BadInput(f"{name} must be between {least} and {most}")
    if args.loss not in ("huber", "squared"):
        raise BadInput("loss must be huber or squared")
    if (args.eval_frequency or args.capture_video) and not args.output_dir:
        raise BadInput("eval_frequency and capture_video need output_dir")


def make_env(args):
    """The environment of args.env_id, as Gymnasium makes it."""
    options = {"render_mode": "rgb_array"} if args.capture_video else {}
    try:
        return gymnasium.make(args.env_id, **options)
    except Exception as error:
        if "Box2D" in str(error):  # Gymnasium's own advice fails under Python 3.14
            raise BadInput(f"env_id: {BOX2D}") from error
        refuse(error, "env_id")


def check_env(env):
    """Reset the environment and take a step. Raises BadInput if this script can't use it."""
    try:
        space = wrap_env(env).observation_space
        if not isinstance(space, spaces.Box) or not isinstance(env.action_space, spaces.Discrete):
            chosen = f"{env.observation_space} and {env.action_space}"
            raise TypeError(f"observations must be numbers and actions Discrete, not {chosen}")
    except Exception as error:
        refuse(error, "env")
    try:
        obs, info = env.reset(seed=0)
        next_obs, _, _, _, _ = env.step(int(env.action_space.start))
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
    # Gymnasium calls functools and, to find an environment, importlib; pathlib makes output_dir.
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


def load_model(path, env=None):
    """The params of a saved model.npz, which must fit env, if given.

    `run` gives env; a program that imports this file need not.
    """
    try:
        params = dict(np.load(path, allow_pickle=False))
        script = params.pop("script")
        if script != SCRIPT:
            raise ValueError(f"{script} saved it")
        inputs = len(params["w0"])
        outputs = q_values(params, np.zeros((1, inputs))).size
    except Exception as error:  # damaged files raise errors of many kinds
        raise BadInput(f"load_model: {type(error).__name__}: {error}") from error
    if env and (inputs, outputs) != (spaces.flatdim(env.observation_space), env.action_space.n):
        what = f"{inputs} observations and {outputs} actions"
        raise BadInput(f"load_model: it is for {what}, not for this environment")
    return params


def prepare_output(args, env):
    """Make output_dir. Fail now, not after training, if a package or the renderer is missing."""
    try:
        importlib.import_module("matplotlib")
        if args.capture_video:
            importlib.import_module("imageio")
            env.render()[::2, ::2]
        Path(args.output_dir).mkdir(parents=True)
    except Exception as error:
        refuse(error, "output_dir or capture_video")


def keep(args, params, episodes):
    """Save the model, the returns, and a plot of them."""
    from matplotlib.figure import Figure  # slow to import

    np.savez(f"{args.output_dir}/model.npz", script=SCRIPT, **params)
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
        params = load_model(args.load_model, env)
    if args.output_dir:
        prepare_output(args, env)
    summary = {"script": SCRIPT, "args": vars(args), "versions": {"jax": jax.__version__}}
    summary |= {"device": jax.devices()[0].device_kind, "seeds": []}
    if not args.load_model:
        params, episodes, counts = train(args, env)
        summary |= counts
        if args.output_dir:
            keep(args, params, episodes)
    try:
        if args.eval_frequency or args.capture_video:
            play_snapshots(args, env, params)
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

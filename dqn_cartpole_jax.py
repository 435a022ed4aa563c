# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,!=0.11.1", "optax>=0.2.8", "numpy>=2.4", "tyro>=1.0.17",
#     "matplotlib>=3.11"]  # not jax 0.11.1: see https://github.com/jax-ml/jax/issues/40101
# ///
r"""DQN on CartPole-v1, compiled as a whole by JAX.

What it teaches: environment, replay buffer and network are a few arrays, and training is a pure
function of them (the same inputs give the same outputs, and nothing else changes). So `jax.jit`
compiles the training loop, and `jax.vmap` trains many agents at once.

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

By default, y sums n rewards before it adds Q (`extend`); with --n-step 1 it is as above.
Q(s', a'; w-) is an estimate with errors, and the maximum prefers errors upward, so y is too high on
average. This file does nothing about that; dqn_lunarlander.py has Double DQN, which does.

    python dqn_cartpole_jax.py --seed 1                            train an agent
    python dqn_cartpole_jax.py --num-seeds 16 --output-dir runs/1  train sixteen, save the results

(`uv run` in place of `python` installs what the first lines of this file name.)

CartPole-v1 is a cart with a pole on it. Pushed to the left or to the right at every step, the cart
has to keep the pole upright. Each step pays 1. The episode ends when the pole leans by more than 12
degrees, when the cart is 2.4 m from the center, or after 500 steps, the time limit. A return is the
sum of the rewards in an episode. An agent has solved CartPole if its mean return in 100 episodes
without random actions is at least 475 (Gymnasium's threshold). Of 1,000 agents, trained with seeds
that had never been used before, all solve it: mean 499.9; the worst agent's mean is 483.5. (Of
another 1,000, with seeds that had been used before, to test earlier settings, 999 do.) Training an
agent for the default 200,000 steps takes 0.15 to 0.3 s on one core of a server, after 3 to 5 s of
compiling.

To learn DQN, read `init_params`, `q_values`, `add`, `sample`, `extend`, `update` and `joint_step`,
in this order. An agent acts in N environments. In a joint step, each of them makes one step; then
comes an update. `train` calls `run_chunk` for all agents, in a loop; the rest sets up, prints,
evaluates and saves.

JAX in short. `jax.jit(f)` compiles f: the first call runs f once with placeholders for its
arguments, which have shapes but no values, and records the operations ("tracing"). Later calls only
run what was recorded; a call with other shapes records anew. Every argument becomes a placeholder,
plain numbers too, and every result an array. `if` on a placeholder is an error: where the values of
arrays decide, use `jnp.where`. The settings are one object, `args` of class Args, which is not
passed to the compiled function: `partial(f, args)` fills it in as the first argument of f before f
is compiled. So the settings are constants, and `if` works on them. In a dict that is an argument,
only the arrays become placeholders; its names stay strings, and `if` works on them too (as in
`q_values`).

JAX's arrays never change: `x.at[i].set(y)` is a new array. Nested dicts and named tuples of arrays
are "pytrees", and the functions of JAX take and return them. `jax.tree.map(f, tree)` calls f on
each array of a tree; with two trees of the same form, f gets one array of each.
`jax.value_and_grad(f)` is a function: it computes f and the gradient of f with respect to its first
argument.

`jax.vmap(f)` is f for arrays that have one more axis, in front. If f takes arrays of shapes (4,)
and (2,) and returns a number, then vmap(f) takes (N, 4) and (N, 2) and returns (N,), as if f were
called N times. `jax.lax.scan(f, carry, xs)` is a compiled loop: for each x of xs,
`carry, y = f(carry, x)`; it returns the last carry and the ys, stacked.

Random functions take a key, which holds two integers. The same key always gives the same numbers,
so each key is used once; `jax.random.split` makes new keys of one.

Departures from Mnih et al., each with the flag that undoes it. The last column says how many of 100
agents solve CartPole when only this departure is undone. With none undone, all 100 do. (Their seeds
were not used to choose the settings, but to test earlier ones.)

    departure                                undone by                                 solved by
    targets sum n rewards                    --n-step 1                                       92
    w- moves a little at every update        --tau 1 --target-network-frequency 500          100
    the learning rate falls to 0             --no-anneal-lr                                   97
    hidden layers are normalized             --no-layer-norm                                  99
    learning starts at once                  --learning-starts 10000                         100
    N environments step between two updates  --num-envs 1                                     100

No flag undoes these: Adam replaces RMSProp (both divide the step of each weight by a running
average of its gradients' size), errors y - Q are not clipped, observations are divided by usual
sizes (OBS_SCALE), and epsilon falls from the first step on, not only once learning has started. (Of
the first weights, whose variance is 2 / in here, the paper says nothing.) Plain DQN, below, undoes
the first five departures of the table. It has 10 environments instead of 1, so that an update
follows every 10 steps, as in CleanRL and PureJaxRL, two collections of such files. (With --num-envs
1, an update follows every step. In the paper, one follows every 4 steps of one environment. With
--num-envs 4 there are as many updates, but each of 4 environments makes one step.)

    python dqn_cartpole_jax.py --n-step 1 --tau 1 --target-network-frequency 500 --no-anneal-lr \
        --no-layer-norm --learning-starts 10000 --num-envs 10 --total-timesteps 500000 \
        --learning-rate 2.5e-4 --batch-size 128 --hidden-sizes 120 84 --buffer-size 10000 \
        --end-e 0.05

Except for the 10 environments and for what no flag undoes, this is the algorithm of the paper, at
settings that CleanRL and PureJaxRL use for CartPole. Of 20 agents, 19 solve it; it takes 2.5 times
the steps of the defaults, and far more computing.

The defaults need no fine tuning: with one number of them doubled or halved, or with another number
of layers, at least 99 of 100 agents solve CartPole. (For gamma, what is doubled or halved is the
horizon 1 / (1 - gamma), which is about how many steps ahead Q looks.) With half the steps 99 do,
with twice 100, with four times 100 (results/knobs.md). The longer runs keep the default buffer of
200,000 transitions. With a smaller one, of 96,000 and four times the steps, 97 do, probably because
late in such a run it holds little but what a good agent sees: what follows a mistake is forgotten.

Letters in shapes: N environments, B batch, O observation, A actions, K agents, T joint steps.
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

    seed: int = 1  # the same seed, num_seeds, machine and versions give the same result
    num_seeds: int = 1  # agents to train at once, from this seed on
    total_timesteps: int = 200_000  # environment steps of each agent
    num_envs: int = 32  # environments that step together; an update follows each joint step
    buffer_size: int = 200_000  # transitions in the replay buffer
    batch_size: int = 32  # transitions in an update
    hidden_sizes: tuple[int, ...] = (64,)  # units in each hidden layer
    layer_norm: bool = True  # normalize hidden layers
    learning_rate: float = 1e-2  # of Adam, at the start
    anneal_lr: bool = True  # let the learning rate fall linearly to 0
    learning_starts: int = 0  # environment steps before the first update
    gamma: float = 0.99  # discount per step
    n_step: int = 3  # rewards summed in a target
    tau: float = 0.1  # how far w- moves toward w; 1 makes it equal to w
    target_network_frequency: int = 0  # environment steps between moves; 0: at every update
    end_e: float = 0.15  # the last epsilon, the probability of a random action
    exploration_fraction: float = 0.5  # the part of the run in which epsilon falls from 1
    eval_episodes: int = 100  # greedy episodes at the end
    output_dir: str | None = None  # new folder for the results
    load_model: str | None = None  # evaluate this model.npz instead of training


SCRIPT = "dqn_cartpole_jax.py"


class BadInput(ValueError):
    """Settings or a file that can't be used: an error line, and exit status 2."""


class BadRun(RuntimeError):
    """Training that can't go on: an error line, and exit status 1."""


# ---------- Environment
# CartPole-v1 as in https://gymnasium.farama.org/environments/classic_control/cart_pole/
# For an environment of your own, rewrite this section. Write `reset` and `step` for one
# environment; `jax.vmap` turns them into functions of N. An EnvState needs a field `obs`, a vector
# of OBS_SIZE numbers; add what else your environment has to remember. With gymnax, call its
# `reset_env` and `step_env` (its `step` also resets), and keep its state in a field of EnvState.
# Install gymnax in a Python environment of its own, because it wants older versions of Gymnasium
# and JAX than other files of this project. This file runs there:
#     python -m venv gymnax-env && gymnax-env/bin/pip install gymnax==1.0.1 six optax tyro

OBS_SIZE = 4  # cart position (m), velocity (m/s), pole angle (rad), angular velocity (rad/s)
ACTIONS = 2  # push the cart to the left or to the right
MAX_STEPS = 500  # the time limit
SOLVED_RETURN = 475.0  # Gymnasium's threshold
# Observations are divided by this: the limits of position and angle, and usual velocities.
OBS_SCALE = np.array([2.4, 2.0, 0.2095, 2.0], np.float32)


class EnvState(NamedTuple):
    obs: Array  # (O,)
    time: Array  # steps since the reset


def reset(key):
    """The first state of an episode."""
    obs = jax.random.uniform(key, (OBS_SIZE,), minval=-0.05, maxval=0.05)
    return EnvState(obs, 0)


def step(key, state, action):
    """Move by 20 ms: Euler's method on the equations of Florian (2007).

    Returns the next EnvState, the reward, terminated (out of bounds) and truncated (out of time).
    CartPole's steps are not random, so it does not use the key; yours may.
    """
    x, x_dot, theta, theta_dot = state.obs
    force = jnp.where(action == 1, 10.0, -10.0)  # N
    sin = jnp.sin(theta)
    cos = jnp.cos(theta)
    # Cart and pole weigh 1.1 kg, the pole alone 0.1 kg; its center is 0.5 m from the joint.
    # The cart's acceleration if the pole had no angular acceleration, then both accelerations:
    x_acc_alone = (force + 0.1 * 0.5 * theta_dot**2 * sin) / 1.1
    theta_acc = (9.8 * sin - cos * x_acc_alone) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    x_acc = x_acc_alone - 0.1 * 0.5 * theta_acc * cos / 1.1
    obs = state.obs + 0.02 * jnp.stack([x_dot, x_acc, theta_dot, theta_acc])
    terminated = (jnp.abs(obs[0]) > 2.4) | (jnp.abs(obs[2]) > np.radians(12))
    truncated = state.time + 1 >= MAX_STEPS
    return EnvState(obs, state.time + 1), 1.0, terminated, truncated


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
    """Q(s, a) of every action: obs (B, O) or (N, O) -> (B, A) or (N, A).

    params holds w0, b0, w1, b1, ... and, if hidden layers are normalized, "layer_norm". NumPy's
    arrays will do too, so a saved model can play in Gymnasium (`load_model`).
    """
    x = obs.astype(np.float32) / OBS_SCALE
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
# Each joint step fills one row, and each environment has a column. With N = 2 and 3 rows, after
# joint steps 0 to 4 (a letter is a transition, numbered by its step):
#
#                environment 0   environment 1
#     row 0           a3              b3         step 3 has overwritten step 0
#     row 1           a4              b4         the newest
#     row 2           a2              b2         the oldest
#
# Step t is in row t % rows, and the next step of the same environment is one row further.


class Transition(NamedTuple):  # arrays whose first axes are (rows, N), (N,) or (B,)
    obs: Array
    action: Array
    reward: Array
    discount: Array  # what the value of next_obs is multiplied by: gamma, or 0 if terminated
    next_obs: Array  # after the step; resets come later, in the next joint step
    ended: Array  # terminated or truncated


def add(buffer, t, new):
    """Write the N transitions of joint step t into its row, over those of a former step."""
    row = t % len(buffer.reward)
    # Compiled, this writes in place: the old buffer is not needed any more.
    return jax.tree.map(lambda x, y: x.at[row].set(y), buffer, new)


def sample(args, noise, buffer, joint_steps):
    """Draw B transitions uniformly from the buffer, a Transition of arrays (rows, N, ...).

    noise (2, B) is uniform in [0, 1), drawn in advance (`run_chunk` says why). joint_steps is how
    many have been stored so far, including those that were overwritten.
    """
    rows = len(buffer.reward)
    age = (noise[0] * jnp.minimum(joint_steps, rows)).astype(int)  # 0 is the newest
    t = joint_steps - 1 - age
    env = (noise[1] * args.num_envs).astype(int)
    batch = jax.tree.map(lambda x: x[t % rows, env], buffer)
    return extend(args, buffer, joint_steps, t, env, batch)


def extend(args, buffer, joint_steps, t, env, batch):
    """Make each transition span n_step steps, as in Rainbow (Hessel et al. 2018).

    Then reward is r_1 + gamma r_2 + ... + gamma^(n-1) r_n, discount is gamma^n, and next_obs is the
    observation after n steps. At the end of an episode, or at the newest step, n is smaller. After
    termination, discount is 0. The rewards after the first depend on actions that were random or
    chosen by older weights, while Q assumes optimal ones. That is not corrected for: a bias,
    accepted because learning is faster.
    """
    rows = len(buffer.reward)
    reward = batch.reward
    discount = batch.discount
    for _ in range(1, args.n_step):
        # Where go_on is true, t moves one row further. At the end of an episode, and at the newest
        # step, t stays. Then the same test fails again in all later turns. (Where go_on is true, no
        # step so far has ended an episode, so discount is a power of gamma, and not 0.)
        go_on = ~buffer.ended[t % rows, env] & (t + 1 < joint_steps)
        t = t + go_on
        reward = reward + jnp.where(go_on, discount * buffer.reward[t % rows, env], 0)
        discount = discount * jnp.where(go_on, buffer.discount[t % rows, env], 1)
    next_obs = buffer.next_obs[t % rows, env]
    return batch._replace(reward=reward, discount=discount, next_obs=next_obs)


# ---------- Learning
class Learner(NamedTuple):
    params: dict  # w
    target_params: dict  # w-
    opt_state: tuple


def make_optimizer(args):
    """Adam (Kingma and Ba 2015). With anneal_lr, its rate is a function: falling linearly to 0."""
    rate = args.learning_rate
    if args.anneal_lr:
        updates = (args.total_timesteps - args.learning_starts) // args.num_envs
        rate = optax.linear_schedule(rate, 0, updates)
    return optax.adam(rate)


def update(args, learner, batch, tau):
    """One gradient step. Returns the next Learner and the loss.

    tau says how far w- moves toward w: 0 not at all, 1 all the way.
    """
    # y = r + gamma max_a' Q(s', a'; w-),   or y = r if s' is terminal.
    # batch.discount is gamma, and 0 if s' is terminal. With n steps, `extend` has made batch.reward
    # the sum of n rewards and batch.discount gamma^n.
    next_q = jnp.max(q_values(learner.target_params, batch.next_obs), axis=1)
    target = batch.reward + batch.discount * next_q

    # value_and_grad differentiates loss_fn with respect to its argument. target was computed
    # outside, so it counts as a constant.
    def loss_fn(params):
        q = q_values(params, batch.obs)[jnp.arange(args.batch_size), batch.action]  # Q(s, a; w)
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


# ---------- Training
class Agent(NamedTuple):  # everything that training changes
    key: Array
    joint_steps: Array  # how many have been done
    state: EnvState  # each array has a first axis N
    ended: Array  # (N,) whether the step before ended an episode
    returns: Array  # (N,) sums of rewards in the current episodes
    buffer: Transition
    learner: Learner


def init_agent(args, key):
    """A new agent with an empty buffer."""
    key, params_key = jax.random.split(key)
    params = init_params(params_key, (OBS_SIZE, *args.hidden_sizes, ACTIONS), args.layer_norm)
    learner = Learner(params, params, make_optimizer(args).init(params))
    N = args.num_envs
    # `ended` is True below, so the first joint step resets all environments, and until then zeros
    # will do. Their shapes are those of what `reset` returns; eval_shape finds them without running
    # it. So these keys are never used to draw a number, and `key` may be split again later.
    shapes = jax.eval_shape(jax.vmap(reset), jax.random.split(key, N))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    rows = args.buffer_size // N
    obs = jnp.zeros((rows, N, OBS_SIZE))
    zeros = jnp.zeros((rows, N))
    buffer = Transition(obs, zeros.astype(int), zeros, zeros, obs, zeros.astype(bool))
    return Agent(key, 0, state, jnp.ones(N, bool), jnp.zeros(N), buffer, learner)


class Draws(NamedTuple):  # the randomness of a joint step, drawn in advance (`run_chunk` says why)
    noise: Array  # (2, N + B) uniform in [0, 1), to explore and to sample
    # (2, N, 2): the keys of N resets and of N steps, each as the two integers that a key holds.
    # joint_step makes keys of them again. (You may skip why: JAX can check that no key is used
    # twice, and that check raises a false alarm on keys that scan hands out.)
    key_data: Array


# To step through joint_step in a debugger, run this in Python, with this file imported. Without
# `jit`, arrays have values, except inside the functions that vmap and value_and_grad call:
#     args = Args(num_envs=2)
#     agent = init_agent(args, jax.random.key(1))
#     _, draws = draw(args, jax.random.key(2), 10)
#     for one in zip(*draws):
#         agent, log = joint_step(args, agent, Draws(*one))
def joint_step(args, agent, draws):
    """One step of N environments and one update.

    Returns the next Agent and a log: which episodes ended (N,), the sums of their rewards so far
    (N,), the loss, and for a warning in `report` the mean |Q| and the largest |reward|.
    """
    N = args.num_envs
    reset_keys, step_keys = jax.random.wrap_key_data(draws.key_data)  # (N,) each

    # Reset where an episode has ended. `if ended` is not possible while tracing, so compute both
    # and choose. `vmap` turns this function of one environment into a function of N.
    def restart(key, ended, state):
        return jax.tree.map(lambda new, old: jnp.where(ended, new, old), reset(key), state)

    state = jax.vmap(restart)(reset_keys, agent.ended, agent.state)
    obs = state.obs

    # Act: epsilon-greedy.
    falling_steps = jnp.maximum(1, args.exploration_fraction * args.total_timesteps)
    progress = jnp.minimum(1, agent.joint_steps * N / falling_steps)
    epsilon = 1 + (args.end_e - 1) * progress
    coin, pick = draws.noise[:, :N]  # two numbers for each environment
    q = q_values(agent.learner.params, obs)
    action = jnp.where(coin < epsilon, (pick * ACTIONS).astype(int), jnp.argmax(q, axis=1))

    # Step.
    state, reward, terminated, truncated = jax.vmap(step)(step_keys, state, action)
    reward = reward.reshape(N)  # some environments return rewards of shape (1,)
    ended = terminated | truncated
    returns = jnp.where(agent.ended, 0, agent.returns) + reward

    # Store. next_obs is worth 0 after termination, but not if the episode was only cut off.
    discount = jnp.where(terminated, 0, args.gamma)
    new = Transition(obs, action, reward, discount, state.obs, ended)
    buffer = add(agent.buffer, agent.joint_steps, new)

    # Learn.
    joint_steps = agent.joint_steps + 1
    env_steps = joint_steps * N
    batch = sample(args, draws.noise[:, N:], buffer, joint_steps)
    tau = args.tau
    if args.target_network_frequency:
        # w- stays unless this joint step reached or passed a multiple of the frequency. With a
        # frequency of 500 and N = 32, it passed one if env_steps is 512: 512 % 500 = 12 < 32.
        tau = jnp.where(env_steps % args.target_network_frequency < N, args.tau, 0)
    learner, loss = update(args, agent.learner, batch, tau)
    if args.learning_starts:  # until then, keep the old Learner
        started = env_steps > args.learning_starts
        learner = jax.tree.map(partial(jnp.where, started), learner, agent.learner)
    agent = Agent(agent.key, joint_steps, state, ended, returns, buffer, learner)
    return agent, (ended, returns, loss, jnp.mean(jnp.abs(q)), jnp.max(jnp.abs(reward)))


def draw(args, key, steps):
    """The next key, and Draws for some joint steps: each array has a first axis `steps`."""
    # One key for the noise, one from which the next chunk draws, and for each joint step and
    # environment one to reset and one to step.
    keys = jax.random.split(key, 2 + 2 * steps * args.num_envs)
    noise = jax.random.uniform(keys[0], (steps, 2, args.num_envs + args.batch_size))
    key_data = jax.random.key_data(keys[2:]).reshape(steps, 2, args.num_envs, -1)
    return keys[1], Draws(noise, key_data)


def run_chunk(args, agent, steps):
    """Some joint steps. Returns the Agent and their logs, each array with a first axis `steps`.

    steps decides shapes, so it can't be a placeholder: `train` fills it in with `partial`.
    """
    # All draws come first: small draws in each joint step would take longer.
    key, draws = draw(args, agent.key, steps)
    # `scan` is a compiled loop. With draws_t for entry t of each array of draws, it does this:
    #     for t in range(steps): agent, log = joint_step(args, agent, draws_t)
    # and stacks the logs.
    return jax.lax.scan(partial(joint_step, args), agent._replace(key=key), draws)


def run_agents(args, agents, steps):
    """run_chunk for all agents: each array has a first axis K."""
    if args.num_seeds > 1:
        return jax.vmap(partial(run_chunk, args, steps=steps))(agents)
    # One agent needs no vmap. Without it, the compiler lays out matrices better: that saves 4 % of
    # the time at PureJaxRL's settings, 12 % at those of jym (one more project: results/peers.md),
    # and nothing at the defaults.
    result = run_chunk(args, jax.tree.map(lambda x: x[0], agents), steps)
    return jax.tree.map(lambda x: x[None], result)


def train(args):
    """Train num_seeds agents.

    Returns params (first axis K), episodes (environment step, return, seed), and a dict of counts
    and times. Ctrl-C ends it early. Raises BadInput on bad settings, and BadRun if the loss stops
    being finite.
    """
    check(args)
    started = time.time()
    agents = init_agents(args)
    joint_steps = args.total_timesteps // args.num_envs
    # Python prints between chunks of about 500 to 1,000 joint steps. With n equal chunks,
    # joint_steps % n steps are left out: take the n that leaves out the fewest, mostly none. (By
    # default, 6,250 joint steps make 10 chunks of 625.)
    most = max(1, joint_steps // 500)
    chunks = min(range((most + 1) // 2, most + 1), key=lambda n: joint_steps % n)
    chunk_steps = joint_steps // chunks
    # Donated: a call may write the new agents over the memory of those it got, so the buffers need
    # not be copied. The old agents can't be used afterwards.
    run_chunks = jax.jit(partial(run_agents, args, steps=chunk_steps), donate_argnums=0)
    if not jax.config.jax_disable_jit:  # JAX_DISABLE_JIT=1 runs everything line by line
        run_chunks = run_chunks.lower(agents).compile()  # now, not at the first call: to time it
    compiled = printed = time.time()
    episodes = []
    env_steps = 0
    try:
        for chunk in range(1, chunks + 1):
            agents, logs = run_chunks(agents)
            # run_chunks returns before its work is done. `device_get` waits for it, and copies the
            # weights and logs. If Ctrl-C interrupts the next call, which takes these agents'
            # memory, this copy of the weights is all that is left.
            params, logs = jax.device_get((agents.learner.params, logs))
            episodes.append(ended_episodes(args, logs, env_steps))
            env_steps = chunk * chunk_steps * args.num_envs
            # Only printing, and a check of the loss.
            if time.time() - printed > 1 or chunk == chunks:
                printed = time.time()
                report(args, logs, env_steps, printed - compiled)
    except KeyboardInterrupt:
        if not episodes:
            raise
    seconds = time.time() - compiled
    counts = {"env_steps": env_steps, "interrupted": len(episodes) < chunks}
    counts |= {"compile_seconds": compiled - started, "train_seconds": seconds}
    counts["steps_per_second"] = args.num_seeds * env_steps / seconds
    return params, np.concatenate(episodes), counts


def init_agents(args):
    """The agents of all seeds. Each array has a first axis K, divided among the devices."""
    keys = jax.vmap(jax.random.key)(args.seed + np.arange(args.num_seeds))
    # What follows is only for speed, with several agents: they are divided among the devices. (One
    # agent means one device.) A device is what runs compiled code: a GPU, or a core of the CPU;
    # `run` makes each core a device. Take as many as can share the agents equally. Mesh lays them
    # in a row, which is named "devices" here, and P("devices") means: cut the first axis of each
    # array into equal parts, one for each device. Compiled functions run where their arguments are,
    # so training runs on all of them too.
    devices = max(n for n in range(1, jax.device_count() + 1) if args.num_seeds % n == 0)
    mesh = jax.sharding.Mesh(jax.devices()[:devices], "devices")
    sharding = jax.NamedSharding(mesh, jax.P("devices"))
    return jax.jit(jax.vmap(partial(init_agent, args)), out_shardings=sharding)(keys)


def ended_episodes(args, logs, env_steps):
    """The episodes of a chunk (episodes, 3): environment step of the end, return, seed.

    env_steps is the number of steps before the chunk.
    """
    ended, returns = logs[:2]  # (K, T, N)
    k, t, _ = np.nonzero(ended)
    ends = env_steps + (t + 1) * args.num_envs
    return np.stack([ends, returns[ended], args.seed + k], axis=1)


def report(args, logs, env_steps, seconds):
    """Print the progress, and a warning if learning diverged."""
    ended, returns, loss, q_size, reward_size = logs
    if not np.isfinite(loss).all():
        raise BadRun("the loss is not finite: try a lower --learning-rate")
    recent = returns[ended].mean() if ended.any() else np.nan
    left = seconds * (args.total_timesteps / env_steps - 1)
    print(f"{env_steps:,} steps, recent return {recent:.4g}, loss {loss.mean():.3g}", end=", ")
    print(f"{args.num_seeds * env_steps / seconds:,.0f} steps/s, {left:.0f} s left", flush=True)
    # Rewards of at most R make |Q| at most R + gamma R + gamma^2 R + ... = R / (1 - gamma).
    q_now = q_size[:, -1].max()
    if q_now * (1 - args.gamma) > 2 * reward_size.max() > 0:
        problem = f"mean |Q| is {q_now:.3g}, over twice what the rewards allow: learning diverged"
        print(f"warning: {problem}; try a lower --learning-rate", file=sys.stderr)


# ---------- Evaluation
def evaluate(args, params):
    """The returns (K, eval_episodes) of greedy episodes, from the same starts for every agent."""

    def play(params, seed):
        def one_step(carry, key):
            state, total, running = carry
            action = jnp.argmax(q_values(params, state.obs[None]))
            state, reward, terminated, truncated = step(key, state, action)
            total += jnp.where(running, jnp.sum(reward), 0)  # a reward may have shape (1,)
            return (state, total, running & ~(terminated | truncated)), None

        # All episodes take MAX_STEPS steps; after its end, an episode's rewards do not count.
        reset_key, steps_key = jax.random.split(jax.random.key(seed))
        keys = jax.random.split(steps_key, MAX_STEPS)
        (_, total, _), _ = jax.lax.scan(one_step, (reset(reset_key), 0.0, True), keys)
        return total

    # vmap's (0, None): params have a first axis of agents, and the seed is the same for all.
    play_all = jax.jit(jax.vmap(play, (0, None)))
    # Seeds that training can't have (see `check`). The loop over them is Python's, because
    # compiling another vmap takes longer than this loop.
    seeds = 2**31 + np.arange(args.eval_episodes, dtype=np.uint32)
    return np.stack([play_all(params, seed) for seed in seeds], axis=1).astype(float)


def summarize(args, returns):
    """Print the result, and return statistics of each agent."""
    solved = returns.mean(axis=1) >= SOLVED_RETURN
    print(f"{returns.size} greedy episodes: mean {returns.mean():.4g}", end=", ")
    print(f"std {returns.std():.4g}, worst {returns.min():.4g}", end="; ")
    print(f"{solved.sum()} of {len(solved)} solved (threshold {SOLVED_RETURN:g})")
    agents = []
    for k, x in enumerate(returns):
        agent = {"seed": None if args.load_model else args.seed + k}
        agent |= {"eval_return_mean": x.mean(), "eval_return_std": x.std()}
        agent |= {"eval_return_min": x.min(), "eval_episodes": len(x), "solved": bool(solved[k])}
        agents.append(agent)
    return agents


# ---------- Command line
def check(args):
    """Raise BadInput, naming the setting, on bad settings."""
    counts = "num_seeds", "num_envs", "batch_size", "n_step", "hidden_sizes", "eval_episodes"
    limits = dict.fromkeys(counts, (1, np.inf))
    limits |= dict.fromkeys(("total_timesteps", "buffer_size"), (args.num_envs, 2**31 - 1))
    limits |= dict.fromkeys(("gamma", "end_e", "exploration_fraction"), (0, 1))
    limits |= {"seed": (0, 2**31 - args.num_seeds), "learning_rate": (0, 1e9), "tau": (1e-6, 1)}
    limits["learning_starts"] = (0, args.total_timesteps - args.num_envs)
    limits["target_network_frequency"] = (0, 2**31 - 1)
    for name, (least, most) in limits.items():
        for value in np.ravel(getattr(args, name)):
            if not least <= value <= most:
                raise BadInput(f"{name} must be between {least} and {most}")


def load_model(path):
    """The params of a saved model.npz. To play with agent 0:

    params = {name: array[0] for name, array in load_model(path).items()}
    action = int(q_values(params, obs[None]).argmax())
    """
    try:
        params = dict(np.load(path, allow_pickle=False))
        script = params.pop("script")
        if script != SCRIPT:
            raise ValueError(f"{script} saved it")
        first = {name: array[0] for name, array in params.items()}
        outputs = q_values(first, np.zeros((1, OBS_SIZE))).size
    except Exception as error:  # damaged files raise errors of many kinds
        raise BadInput(f"load_model: {type(error).__name__}: {error}") from error
    if outputs != ACTIONS:
        raise BadInput(f"load_model: it is for {outputs} actions, not {ACTIONS}")
    return params


def make_output_dir(args):
    """Make output_dir, a new folder. If that or a package fails, it should be before training."""
    try:
        importlib.import_module("matplotlib")
        Path(args.output_dir).mkdir(parents=True)
    except (ImportError, OSError) as error:
        raise BadInput(f"output_dir: {error}") from error


def keep(args, params, episodes):
    """Save the model, the returns, and a plot of them."""
    from matplotlib.figure import Figure  # slow to import

    np.savez(f"{args.output_dir}/model.npz", script=SCRIPT, **params)
    names = "env_step,episode_return,seed"
    np.savetxt(f"{args.output_dir}/returns.csv", episodes, "%.10g", ",", header=names, comments="")
    axes = Figure().add_subplot(xlabel="environment steps", ylabel="episode return")
    axes.plot(*episodes[:, :2].T, ".", markersize=1)
    axes.figure.savefig(f"{args.output_dir}/curve.png", dpi=150)


def run(args):
    """Train or load, evaluate, save. Returns the exit status: 0, or 130 after Ctrl-C."""
    check(args)
    if args.num_seeds > 1 and jax.config.jax_num_cpu_devices == -1:  # not set by the user
        # A device for each core that this process may use.
        cores = os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count())
        jax.config.update("jax_num_cpu_devices", min(len(cores), args.num_seeds))
    if args.load_model:
        params = load_model(args.load_model)
    if args.output_dir:
        make_output_dir(args)
    summary = {"script": SCRIPT, "args": vars(args), "versions": {"jax": jax.__version__}}
    if not args.load_model:
        params, episodes, counts = train(args)
        summary |= counts
        if args.output_dir:
            keep(args, params, episodes)
    summary["seeds"] = summarize(args, evaluate(args, params))
    if args.output_dir:
        summary["device"] = jax.devices()[0].device_kind
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

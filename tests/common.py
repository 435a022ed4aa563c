"""What several test files need: comparisons, an update by hand, a story, and environments."""

from functools import partial

import gymnasium
import jax
import numpy as np
from gymnasium.spaces import Box, Discrete


def assert_close(ours, expected, tolerance=0.0):
    """Nested structures of arrays are equal, within a relative and an absolute tolerance."""
    compare = partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(compare, ours, expected)


def same(ours, expected):
    """Whether nested structures hold the same bits."""
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, ours, expected)))


def row(tree, k):
    """Row k of each array."""
    return jax.tree.map(lambda x: x[k], tree)


# ---------- An update by hand
# DQN as published, as far as an update knows it. Each case turns something on.
PLAIN = {"layer_norm": False, "anneal_lr": False, "tau": 1.0, "target_network_frequency": 500}
SWITCHES = {
    "plain": {},
    "layer_norm": {"layer_norm": True},
    "anneal_lr": {"anneal_lr": True},
    "soft target": {"tau": 0.25, "target_network_frequency": 0},
    "soft target, now and then": {"tau": 0.25},
    "all": {"layer_norm": True, "anneal_lr": True, "tau": 0.25, "target_network_frequency": 0},
}


def numpy_q(params, obs):
    """A multilayer perceptron in float64; its layers are normalized if params say so."""
    x = np.asarray(obs, np.float64)
    last = max(int(name[1:]) for name in params if name.startswith("w"))
    for i in range(last):
        x = x @ params[f"w{i}"] + params[f"b{i}"]
        if "layer_norm" in params:
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        x = np.maximum(x, 0)
    return x @ params[f"w{last}"] + params[f"b{last}"]


def numpy_gradient(loss_of, params):
    """The gradient of loss_of(params), by moving one weight at a time."""
    size = 1e-6
    grads = {}
    for name, x in params.items():
        grads[name] = np.zeros_like(x)
        for i in np.ndindex(x.shape):
            bump = np.zeros_like(x)
            bump[i] = size
            above = loss_of(params | {name: x + bump})
            below = loss_of(params | {name: x - bump})
            grads[name][i] = (above - below) / (2 * size)
    return grads


class ByHand:
    """Adam and a target network in NumPy, in float64."""

    def __init__(self, learner):
        self.params = jax.tree.map(np.float64, learner.params)
        self.target_params = jax.tree.map(np.float64, learner.target_params)
        self.mean = {name: np.zeros_like(x) for name, x in self.params.items()}
        self.mean_square = {name: np.zeros_like(x) for name, x in self.params.items()}
        self.updates = 0

    def update(self, loss_of, rate, tau):
        """A step at a learning rate; then w- moves by tau. Returns the loss from before."""
        loss = loss_of(self.params)
        grads = numpy_gradient(loss_of, self.params)
        self.updates += 1
        for name, x in self.params.items():
            self.mean[name] = 0.9 * self.mean[name] + 0.1 * grads[name]
            self.mean_square[name] = 0.999 * self.mean_square[name] + 0.001 * grads[name] ** 2
            mean = self.mean[name] / (1 - 0.9**self.updates)
            mean_square = self.mean_square[name] / (1 - 0.999**self.updates)
            self.params[name] = x - rate * mean / (np.sqrt(mean_square) + 1e-8)
            old = self.target_params[name]
            self.target_params[name] = (1 - tau) * old + tau * self.params[name]
        return loss


def random_learner(dqn, args, sizes):
    """Two networks of random numbers, and an optimizer that has seen nothing."""
    rng = np.random.default_rng(0)
    shapes = dqn.init_params(jax.random.key(0), sizes, args.layer_norm)
    networks = []
    for _ in range(2):
        networks.append({name: np.float32(rng.normal(size=x.shape)) for name, x in shapes.items()})
    return dqn.Learner(*networks, dqn.make_optimizer(args).init(networks[0]))


def assert_updates_by_hand(args, learner, update, loss_with, updates_of_the_run):
    """Three calls of update(learner, tau) do what is done by hand; w- stays in the second.

    loss_with(params, target_params) is a function of other params: the loss with targets by these.
    """
    by_hand = ByHand(learner)
    for k, tau in enumerate([args.tau, 0.0, args.tau]):
        rate = args.learning_rate
        if args.anneal_lr:
            rate *= 1 - k / updates_of_the_run
        loss_of = loss_with(by_hand.params, by_hand.target_params)
        expected = by_hand.update(loss_of, rate, tau)
        learner, loss = update(learner, tau)
        assert_close(float(loss), expected, 1e-3)
        assert_close(learner.params, by_hand.params, 5e-4)
        assert_close(learner.target_params, by_hand.target_params, 5e-4)


def learning_rate_of(before, after):
    """The learning rate of one update with Adam, from the Learners before and after it."""
    adam = after.opt_state[0]
    count = int(adam.count)
    mean = np.asarray(adam.mu["b1"]) / (1 - 0.9**count)
    mean_square = np.asarray(adam.nu["b1"]) / (1 - 0.999**count)
    direction = mean / (np.sqrt(mean_square) + 1e-8)
    moved = np.asarray(before.params["b1"]) - np.asarray(after.params["b1"])
    largest = np.abs(direction).argmax()
    return moved.flat[largest] / direction.flat[largest]


def moves_due(frequency, update_steps, interval):
    """The environment steps of the first update at or after each multiple of the frequency.

    Multiples that come more than an interval before the first update don't count.
    """
    due = set()
    for multiple in range(frequency, max(update_steps) + 1, frequency):
        if multiple > min(update_steps) - interval:
            due.add(min(step for step in update_steps if step >= multiple))
    return due


# ---------- A story
class Story:
    """Twelve random steps of two environments. One episode terminates and one is truncated."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.next_obs = rng.normal(size=(12, 2, 4)).astype(np.float32)
        self.obs = np.concatenate([np.ones((1, 2, 4), np.float32), self.next_obs[:-1]])
        self.reward = rng.normal(size=(12, 2)).astype(np.float32)
        self.action = rng.integers(2, size=(12, 2))
        self.terminated = np.zeros((12, 2), bool)
        self.terminated[4, 0] = True
        self.ended = self.terminated.copy()
        self.ended[6, 1] = True
        self.obs[5, 0] = 7.0  # the starts of the next episodes
        self.obs[7, 1] = 8.0

    def transition(self, first, i, n_step, gamma, newest=11):
        """Obs, action, reward, discount and next_obs of n steps from `first`, or of fewer."""
        t = first
        total = self.reward[t, i]
        while not self.ended[t, i] and t < first + n_step - 1 and t < newest:
            t += 1
            total += gamma ** (t - first) * self.reward[t, i]
        discount = 0.0 if self.terminated[t, i] else gamma ** (t - first + 1)
        parts = self.obs[first, i], self.action[first, i], total, discount, self.next_obs[t, i]
        return np.hstack(parts)


# ---------- Environments whose values are known
class Probe(gymnasium.Env):
    """Pays 1 and ends after each step. It writes every observation over the one before."""

    observation_space = Box(-1, 1, (1,), np.float32)

    def __init__(self, dqn):
        self.action_space = Box(-1, 1, (1,))
        if dqn.SCRIPT == "dqn_lunarlander.py":
            self.action_space = Discrete(2, start=5)
        self.obs = np.zeros(1, np.float32)
        self.steps = 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.obs[:] = self.first_number()
        return self.obs, {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.steps += 1
        reward, terminated, truncated = self.outcome(action)
        return self.obs, reward, terminated, truncated, {}

    def first_number(self):
        return -1

    def outcome(self, action):
        return 1.0, True, False


class PaysWhatItShows(Probe):
    """Shows -1 or 1, pays that, and ends."""

    def first_number(self):
        return self.np_random.choice([-1, 1])

    def outcome(self, action):
        return float(self.obs[0]), True, False


class PaysLater(Probe):
    """Shows -1, then 1, and pays for the second action: 1 for action 6, or for a torque of 0.5."""

    def outcome(self, action):
        self.obs[:] = 1
        if self.steps == 1:
            return 0.0, False, False
        if isinstance(self.action_space, Discrete):
            return float(action == 6), True, False
        return float(1 - 2 * abs(action[0] - 0.5)), True, False


class RunsOutOfTime(Probe):
    """Pays 1 at each step, until a time limit of 4."""

    def outcome(self, action):
        return 1.0, False, self.steps == 4


def small(dqn, **changes):
    """The Args of a run of a moment; in the pendulum's file, with five actions."""
    settings = {"total_timesteps": 1_500, "buffer_size": 1_000, "hidden_sizes": (16,)}
    settings |= {"learning_rate": 0.02, "tau": 0.1, "gamma": 0.5, "reward_scale": 1.0}
    settings |= {"train_frequency": 16, "gradient_steps": 8, "end_e": 0.5, "eval_episodes": 3}
    return dqn.Args(**settings | changes)

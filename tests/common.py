"""What several test files need: comparisons, a story to learn from, an update by hand."""

from functools import partial

import jax
import numpy as np


def assert_close(ours, expected, tolerance=0.0):
    """Nested structures of arrays are equal, within a relative and an absolute tolerance."""
    compare = partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(compare, ours, expected)


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


def two_networks(dqn, sizes):
    """The params of two, in float64."""
    rng = np.random.default_rng(0)
    shapes = dqn.init_params(rng, sizes)
    return [jax.tree.map(lambda x: rng.normal(size=x.shape), shapes) for _ in range(2)]


def assert_adam_step(dqn, optimizer, update, batch, networks, loss_of, eps=1e-4):
    """update(learner, batch) is Adam's first step on loss_of, and moves the target by a quarter."""
    params, target = networks
    ours, ours_target = jax.tree.map(np.float32, networks)
    learner = dqn.Learner(ours, ours_target, optimizer.init(ours))
    learner, loss = jax.jit(update)(learner, batch)
    assert_close(loss, loss_of(params), 1e-3)
    for name, x in params.items():
        grads = np.zeros_like(x)
        for i in np.ndindex(x.shape):
            bump = np.zeros_like(x)
            bump[i] = eps
            above = loss_of(params | {name: x + bump})
            grads[i] = (above - loss_of(params | {name: x - bump})) / (2 * eps)
        np.testing.assert_allclose(learner.opt_state[0].mu[name], grads / 10, rtol=1e-2, atol=1e-3)
        sure = np.abs(grads) > 1e-3  # a gradient of 0 has no sign
        assert_close(learner.params[name][sure], (x - 0.02 * np.sign(grads))[sure], 1e-3)
    moved = jax.tree.map(lambda old, new: old + 0.25 * (new - old), target, learner.params)
    assert_close(learner.target_params, moved, 1e-4)

"""What several test files need: a story to learn from, gradients by differences, comparisons."""

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
        self.obs = np.concatenate([rng.normal(size=(1, 2, 4)), self.next_obs[:-1]])
        self.obs = self.obs.astype(np.float32)
        self.reward = rng.normal(size=(12, 2)).astype(np.float32)
        self.action = rng.integers(2, size=(12, 2))
        self.terminated = np.zeros((12, 2), bool)
        self.truncated = np.zeros((12, 2), bool)
        self.terminated[4, 0] = True
        self.truncated[6, 1] = True
        self.ended = self.terminated | self.truncated
        self.obs[5, 0] = 7.0  # the starts of the next episodes
        self.obs[7, 1] = 8.0

    def transition(self, first, i, n_step, gamma, newest=11):
        """The transition that begins at step `first` and has n steps, or as many as there are.

        Returns obs, action, reward, discount and next_obs in one array.
        """
        t = first
        total = self.reward[t, i]
        while not self.ended[t, i] and t < first + n_step - 1 and t < newest:
            t += 1
            total += gamma ** (t - first) * self.reward[t, i]
        discount = 0.0 if self.terminated[t, i] else gamma ** (t - first + 1)
        parts = self.obs[first, i], self.action[first, i], total, discount, self.next_obs[t, i]
        return np.hstack(parts)


def gradient(loss_of, params, eps=1e-4):
    """The gradient of loss_of at params, by central differences in float64."""
    grads = {}
    for name, x in params.items():
        grads[name] = np.zeros_like(x)
        for i in np.ndindex(x.shape):
            bump = np.zeros_like(x)
            bump[i] = eps
            above = loss_of(params | {name: x + bump})
            below = loss_of(params | {name: x - bump})
            grads[name][i] = (above - below) / (2 * eps)
    return grads

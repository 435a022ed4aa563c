"""A Gymnasium environment whose values are known, dressed as users' environments are."""

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete


class Probe(gymnasium.Env):
    """An environment without a spec, which writes every observation over the one before.

    kind says what pays: "one" pays 1 and ends; "observation" pays what is seen; "action" pays for
    the action, and "later" does so at the second step; "limit" pays 1 until a time limit of 4.
    dress_obs, dress_reward and dress_flag turn what it gives into another form.
    """

    observation_space = Box(-1, 1, (1,), np.float32)
    dress_obs = staticmethod(lambda obs: obs)
    dress_reward = staticmethod(lambda reward: reward)
    dress_flag = staticmethod(lambda flag: flag)

    def __init__(self, kind, continuous):
        self.kind = kind
        self.action_space = Box(-1, 1, (1,)) if continuous else Discrete(2, start=5)
        self.obs = np.zeros(1, np.float32)
        self.t = 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        self.obs[:] = self.np_random.choice([-1, 1]) if self.kind == "observation" else -1
        return self.dress_obs(self.obs), {}

    def worth(self, action):
        """The reward for an action: the best is 6, or a torque of 0.5."""
        assert self.action_space.contains(action)
        if isinstance(self.action_space, Discrete):
            return 1.0 if action == 6 else -1.0
        return float(1 - 2 * abs(action[0] - 0.5))

    def step(self, action):
        self.t += 1
        reward = 1.0
        terminated = self.kind not in ("limit", "later")
        truncated = self.kind == "limit" and self.t == 4
        if self.kind == "observation":
            reward = float(self.obs[0])
        if self.kind == "action":
            reward = self.worth(action)
        if self.kind == "later":
            self.obs[:] = 1
            terminated = self.t == 2
            reward = self.worth(action) if terminated else 0.0
        flags = self.dress_flag(terminated), self.dress_flag(truncated)
        return self.dress_obs(self.obs), self.dress_reward(reward), *flags, {}

"""What would break for a user of dqn_lunarlander.py and of dqn_pendulum_discretized.py."""

import itertools
from dataclasses import replace
from functools import partial

import gymnasium
import imageio.v3
import jax
import numpy as np
import pytest
from common import Story, assert_adam_step, assert_close, two_networks
from gymnasium import spaces
from gymnasium.spaces import Box, Discrete

import dqn_lunarlander as lander
import dqn_pendulum_discretized as pendulum

BOTH = pytest.mark.parametrize("dqn", [lander, pendulum], ids=["lander", "pendulum"])
NETWORKS = {
    "lander": (lander, {}),
    "state": (pendulum, {}),
    "state-action": (pendulum, {"q_input": "state-action"}),
    "state-action-drawn": (pendulum, {"q_input": "state-action", "max_samples": 3}),
}
EACH_NETWORK = pytest.mark.parametrize("dqn,changes", NETWORKS.values(), ids=NETWORKS.keys())
GAMMA = 0.5
TORQUES = np.linspace(-1, 1, 5, dtype=np.float32)


class Probe(gymnasium.Env):
    """An environment whose values are known; it writes every observation over the one before.

    kind says what pays: "one" pays 1 and ends; "observation" pays what is seen; "later" pays for
    the second action; "limit" pays 1 until a time limit of 4.
    """

    observation_space = Box(-1, 1, (1,), np.float32)
    dress_obs = staticmethod(lambda obs: obs)
    dress_reward = staticmethod(lambda reward: reward)
    dress_flag = staticmethod(lambda flag: flag)

    def __init__(self, kind, dqn):
        self.kind = kind
        self.action_space = Discrete(2, start=5) if dqn is lander else Box(-1, 1, (1,))
        self.obs = np.zeros(1, np.float32)
        self.t = 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        self.obs[:] = self.np_random.choice([-1, 1]) if self.kind == "observation" else -1
        return self.dress_obs(self.obs), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        reward = 1.0
        terminated = self.kind != "limit"
        truncated = self.kind == "limit" and self.t == 4
        if self.kind == "observation":
            reward = float(self.obs[0])
        if self.kind == "later":
            self.obs[:] = 1
            terminated = self.t == 2
            best = action == 6 if np.isscalar(action) else 1 - 2 * abs(action[0] - 0.5)
            reward = float(best) if terminated else 0.0
        flags = self.dress_flag(terminated), self.dress_flag(truncated)
        return self.dress_obs(self.obs), self.dress_reward(reward), *flags, {}


def small(dqn, **changes):
    """The Args of a run of a moment; five torques."""
    args = dqn.Args(total_timesteps=1_500, buffer_size=1_000, hidden_sizes=(16,), end_e=0.5)
    args = replace(args, learning_rate=0.02, tau=0.1, gamma=GAMMA, reward_scale=1.0)
    return replace(args, train_frequency=16, gradient_steps=8, eval_episodes=3, **changes)


@EACH_NETWORK
@pytest.mark.parametrize("kind", ["observation", "later", "limit"])
def test_values_that_are_known(kind, dqn, changes):
    """Truncation does not end the value: "limit" is worth 1 / (1 - gamma).

    "later" is worth gamma times the best reward, or the mean best of three torques drawn.
    """
    args = small(dqn, **changes)
    env = Probe(kind, dqn)
    params, episodes, counts = dqn.train(args, env)
    q_values = lander.q_values
    if dqn is pendulum:
        q_values = partial(pendulum.Q_VALUES[args.q_input], torques=TORQUES)
    before, after = q_values(params, np.float32([[-1], [1]]))
    worth = np.array([0, 1]) if dqn is lander else 1 - 2 * np.abs(TORQUES - 0.5)
    best = 1.0
    if "max_samples" in changes:
        best = np.mean([max(three) for three in itertools.product(worth, repeat=3)])
    expected = {"observation": -1.0, "later": GAMMA * best, "limit": 1 / (1 - GAMMA)}[kind]
    np.testing.assert_allclose(before, np.full(worth.shape, expected), atol=0.2)
    if kind == "later":
        np.testing.assert_allclose(after, worth, atol=0.2)
    if kind == "observation":
        np.testing.assert_allclose(after, np.ones(worth.shape), atol=0.2)
    else:
        assert np.all(dqn.evaluate(args, params, env) == [4 if kind == "limit" else 1] * 3)
    assert counts["env_steps"] == 1_500
    assert np.all(np.diff(episodes[:, 0]) == {"limit": 4, "later": 2}.get(kind, 1))


# ---------- Whatever a user brings
SAME = {  # forms of what an environment gives, which must make no difference
    "list": {"dress_obs": lambda obs: obs.tolist()},
    "whole": {"dress_obs": lambda obs: obs.astype(int)},
    "reward NumPy": {"dress_reward": np.float32},
    "reward whole": {"dress_reward": int},
    "reward array": {"dress_reward": lambda reward: np.array([reward])},
    "flag array": {"dress_flag": np.array},
}


@BOTH
@pytest.mark.parametrize("form", SAME)
def test_the_form_of_observations_and_rewards_makes_no_difference(form, dqn):
    args = small(dqn, total_timesteps=200)
    plain = dqn.train(args, Probe("observation", dqn))
    env = Probe("observation", dqn)
    vars(env).update(SAME[form])
    assert_close(dqn.train(args, env)[:2], plain[:2])


SPACES = {  # an observation space, how many numbers its observations become
    "number from 5": (Discrete(3, start=5), 3),
    "numbers": (spaces.MultiDiscrete([2, 3]), 5),
    "grid": (Box(0, 255, (2, 3), np.uint8), 6),
    "tuple": (spaces.Tuple([Discrete(3), Box(-1, 1, (2,))]), 5),
    "text": (spaces.Text(4, min_length=4), 4),
    "dict": (spaces.Dict({"a": Discrete(3), "b": Box(-1, 1, (2, 2))}), 7),
}


@BOTH
@pytest.mark.parametrize("name", SPACES)
def test_observations_of_every_kind_are_flattened(name, dqn):
    space, size = SPACES[name]
    env = Probe("one", dqn)
    env.observation_space = space
    env.dress_obs = lambda obs: space.sample()
    args = small(dqn, total_timesteps=100)
    params, _, _ = dqn.train(args, env)
    assert params["w0"].shape == (size, 16)
    assert np.all(dqn.evaluate(args, params, env) == 1)


OBS = np.zeros(1, np.float32)
API = "Gymnasium's API is reset"
REFUSED = [  # what an environment has, and a word of the message
    ("observation_space", spaces.Sequence(Discrete(2)), "Sequence"),
    ("observation_space", type("Mission", (spaces.Space,), {})(), "Mission"),  # minigrid has one
    ("action_space", spaces.MultiDiscrete([2, 2]), "MultiDiscrete"),
    ("action_space", Box(-1, 1, (2,)), "Box"),
    ("action_space", Box(-np.inf, np.inf, (1,)), "Box"),
    ("reset", lambda: (OBS, {}), API),  # no seed
    ("reset", lambda seed=None, options=None: OBS, API),  # no info
    ("step", lambda action: (OBS, 1.0, True, {}), API),  # four values
]
REFUSED = [(dqn, *case) for case in REFUSED for dqn in (lander, pendulum)]
REFUSED += [(lander, "action_space", Box(-1, 1, (1,)), "Box")]
REFUSED += [(pendulum, "action_space", Discrete(2), "Discrete")]


@pytest.mark.parametrize("dqn,name,value,message", REFUSED)
def test_what_does_not_fit_is_refused_by_name(dqn, name, value, message):
    env = Probe("one", dqn)
    setattr(env, name, value)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        dqn.train(small(dqn), env)


@BOTH
def test_an_environment_may_keep_statistics_of_its_own(dqn):
    env = gymnasium.wrappers.RecordEpisodeStatistics(Probe("later", dqn))
    _, episodes, _ = dqn.train(small(dqn, total_timesteps=200), env)
    assert len(episodes) == 100 and np.all(episodes[:, 0] == np.arange(2, 202, 2))


@BOTH
def test_an_episode_without_an_end_stops_the_evaluation(dqn, monkeypatch):
    env = Probe("limit", dqn)
    args = small(dqn, total_timesteps=100)
    params, _, _ = dqn.train(args, env)
    env.step = lambda action: (OBS, 1.0, False, False, {})
    monkeypatch.setattr(dqn, "range", lambda n: range(min(n, 1_000)), raising=False)
    with pytest.raises(TimeoutError, match="TimeLimit"):
        dqn.evaluate(args, params, env)


@BOTH
@pytest.mark.parametrize("what", ["observation", "reward", "loss"])
def test_a_number_that_is_not_finite_ends_the_run_by_name(what, dqn):
    env = Probe("one", dqn)
    args = small(dqn, total_timesteps=100)
    env.dress_reward = lambda reward: {"reward": np.inf, "loss": 3e38}.get(what, 1.0)
    if what == "observation":
        env.dress_obs = lambda obs: obs * np.float32("nan")
    with pytest.raises(FloatingPointError, match=f"{what} is not finite"):
        dqn.train(args, env)


def test_frozen_lake_without_slipping():
    """A numbered cell, a sparse reward: after 10,000 steps, the goal is reached greedily."""
    args = lander.Args(total_timesteps=10_000, gamma=0.95, reward_scale=1.0)
    env = gymnasium.make("FrozenLake-v1", is_slippery=False)
    params, _, _ = lander.train(args, env)
    assert np.all(lander.evaluate(args, params, env) == 1)


# ---------- Replay buffer
@pytest.mark.parametrize("n_step", [1, 3])
def test_the_queue_sums_rewards_and_stops_at_ends(n_step):
    story = Story()
    for i in range(2):
        queue = []
        found = []
        for t in range(12):
            discount = 0.0 if story.terminated[t, i] else 0.9
            step = [x[t, i] for x in (story.obs, story.action, story.reward)]
            new = lander.Transition(*step, discount, story.next_obs[t, i])
            complete, queue = lander.extend(queue, new, story.ended[t, i], n_step)
            found += complete
        expected = [story.transition(t, i, n_step, 0.9) for t in range(13 - n_step)]
        for transition, numbers in zip(found, expected, strict=True):
            np.testing.assert_allclose(np.hstack(transition), numbers, rtol=1e-5)


@BOTH
def test_the_ring_keeps_the_newest_and_draws_all_that_is_filled(dqn):
    args = replace(small(dqn), batch_size=40, buffer_size=4)
    sample = lander.sample
    if dqn is pendulum:
        sample = lambda *inputs: pendulum.sample(*inputs, TORQUES)[0]  # noqa: E731
    arrays = [np.zeros((4, 1), np.float32), np.zeros(4, int), np.zeros(4), np.zeros(4)]
    buffer = dqn.Transition(*arrays, np.zeros((4, 1), np.float32))
    for t in range(6):
        dqn.add(buffer, t, dqn.Transition(np.array([t]), t + 1, t + 2, t + 3, np.array([t + 4])))
        batch = sample(args, np.random.default_rng(0), buffer, t + 1)
        first, *others = (x.reshape(8, 40) for x in batch)
        assert set(first.ravel()) == set(range(max(0, t - 3), t + 1))
        for k, x in enumerate(others, 1):
            assert np.all(x == first + k)


# ---------- Network and learning
def numpy_q(args, params, obs, torques):
    """A plain perceptron in float64. For state-action on the rows [obs, torque]."""
    x = obs
    with_torque = getattr(args, "q_input", "") == "state-action"
    if with_torque:
        torques = np.broadcast_to(torques, (len(obs), np.shape(torques)[-1]))
        states = np.repeat(obs[:, None], torques.shape[1], axis=1)
        x = np.concatenate([states, torques[..., None]], axis=-1)
    last = len(params) // 2 - 1
    for i in range(last):
        x = x @ params[f"w{i}"] + params[f"b{i}"]
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        x = np.maximum(x, 0)
    q = x @ params[f"w{last}"] + params[f"b{last}"]
    return q[..., 0] if with_torque else q


@EACH_NETWORK
def test_updates_are_steps_of_adam_on_the_loss(dqn, changes):
    """Against NumPy: y = r + discount * max Q(next_obs; w-), or the value of w's choice."""
    args = replace(small(dqn, **changes), batch_size=12, tau=0.25)
    story = Story()
    fields = story.obs, story.next_obs, story.reward, story.action, story.terminated
    obs, next_obs, reward, action, terminated = (x[:, 0] for x in fields)
    discount = np.float32(0.9) * ~terminated
    sizes = (4, 6, 5, 2)
    if dqn is pendulum:
        sizes = (5, 6, 5, 1) if changes else (4, 6, 5, 5)
    networks = two_networks(dqn, sizes)
    drawn = TORQUES[: changes.get("max_samples")]

    def loss_of(params):
        q = numpy_q(args, params, obs, TORQUES)[np.arange(12), action]
        error = np.abs(y - q)
        huber = np.where(error > 1, error - 0.5, error**2 / 2)
        return np.mean(huber if dqn is lander else error**2)

    chooser = networks[0] if dqn is lander else networks[1]
    choice = numpy_q(args, chooser, next_obs, drawn).argmax(axis=1)
    y = reward + discount * numpy_q(args, networks[1], next_obs, drawn)[np.arange(12), choice]
    batch = dqn.Transition(obs, action, reward, discount, next_obs)
    update = partial(lander.update, args)
    if dqn is pendulum:
        update = partial(pendulum.update, args, jax.numpy.asarray(TORQUES))
        batch = batch, drawn
    assert_adam_step(dqn, dqn.make_optimizer(args), update, batch, networks, loss_of)


@BOTH
def test_the_learning_rate_falls_to_0(dqn):
    optimizer = dqn.make_optimizer(small(dqn, total_timesteps=160))  # 10 groups of 8 updates
    state = optimizer.init(np.float32(1))
    sizes = []
    for _ in range(81):
        size, state = optimizer.update(np.float32(1), state)
        sizes.append(-size)
    assert_close(sizes[::40], [0.02, 0.01, 0.0], 1e-4)


# ---------- Runs
def test_snapshots_are_filmed_and_change_nothing(tmp_path):
    args = small(lander, env_id="CartPole-v1")
    plain, _, _ = lander.train(args, gymnasium.make("CartPole-v1"))
    args = replace(args, eval_frequency=750, capture_video=True)
    with pytest.raises(ValueError, match="eval_frequency.*output_dir"):
        lander.check(args)
    assert lander.main(replace(args, output_dir=str(tmp_path / "run"))) == 0
    for name in ("model_00001500", "model"):
        assert_close(lander.load_model(tmp_path / "run" / f"{name}.npz"), plain)
    films = sorted(path.name for path in (tmp_path / "run").glob("*.gif"))
    assert films == ["model.gif", "model_00000750.gif", "model_00001500.gif"]
    frames = imageio.v3.imread(tmp_path / "run" / "model.gif")
    assert frames.shape[3] == 3 and np.any(frames[0] != frames[-1])

"""What would break for a user of dqn_lunarlander.py and of dqn_pendulum_discretized.py."""

import itertools
from dataclasses import replace
from functools import partial

import gymnasium
import imageio.v3
import jax
import numpy as np
import pytest
from common import Story, assert_close, gradient
from gymnasium import spaces
from gymnasium.spaces import Box, Discrete
from probe import Probe

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


def small(dqn, **changes):
    """The Args of a run of a moment; five torques."""
    args = dqn.Args(total_timesteps=1_500, buffer_size=1_000, hidden_sizes=(16,), end_e=0.5)
    args = replace(args, learning_rate=0.02, tau=0.1, gamma=GAMMA, reward_scale=1.0)
    if dqn is lander:
        args = replace(args, n_step=1)
    return replace(args, gradient_steps=8, eval_episodes=3, **changes)


def probe(kind, dqn):
    return Probe(kind, continuous=dqn is pendulum)


def q_values(dqn, args, params, obs):
    if dqn is lander:
        return lander.q_values(params, obs)
    return pendulum.Q_VALUES[args.q_input](params, obs, TORQUES)


# ---------- Values that are known
@EACH_NETWORK
@pytest.mark.parametrize("kind", ["one", "observation", "action", "later", "limit"])
def test_values_that_are_known(kind, dqn, changes):
    """Truncation ends the episode and not the value: a limit is worth 1 / (1 - gamma).

    "later" is worth gamma times the best reward, or times the mean best of three torques, if the
    maximum is taken over three random ones.
    """
    args = small(dqn, **changes)
    if dqn is lander and kind == "limit":
        args = replace(args, n_step=3)
    if kind == "one":
        args = replace(args, reward_scale=0.5)
    env = probe(kind, dqn)
    params, episodes, counts = dqn.train(args, env)
    before = q_values(dqn, args, params, np.float32([[-1]]))[0]
    after = q_values(dqn, args, params, np.float32([[1]]))[0]
    worth = np.array([-1, 1]) if dqn is lander else 1 - 2 * np.abs(TORQUES - 0.5)
    best = 1.0
    if "max_samples" in changes:
        best = np.mean([max(three) for three in itertools.product(worth, repeat=3)])
    expected = {"observation": -1, "action": worth, "later": GAMMA * best}
    expected |= {"one": 0.5, "limit": 1 / (1 - GAMMA)}
    np.testing.assert_allclose(before, np.broadcast_to(expected[kind], worth.shape), atol=0.2)
    if kind == "later":
        np.testing.assert_allclose(after, worth, atol=0.2)
    if kind == "observation":
        np.testing.assert_allclose(after, np.ones(worth.shape), atol=0.2)
    else:
        returns = dqn.evaluate(args, params, env)
        assert returns.shape == (3,)
        assert np.all(returns == (4 if kind == "limit" else 1))
    assert counts["env_steps"] == 1_500
    assert np.all(np.diff(episodes[:, 0]) == {"limit": 4, "later": 2}.get(kind, 1))


# ---------- Whatever a user brings
SAME = {  # forms of what an environment gives, which must make no difference
    "list": {"dress_obs": lambda obs: obs.tolist()},
    "tuple": {"dress_obs": lambda obs: tuple(obs)},
    "float64": {"dress_obs": lambda obs: obs.astype(np.float64)},
    "whole": {"dress_obs": lambda obs: obs.astype(int)},
    "reward NumPy": {"dress_reward": np.float32},
    "reward whole": {"dress_reward": int},
    "reward array": {"dress_reward": lambda reward: np.array([reward])},
    "flag NumPy": {"dress_flag": np.bool_},
    "flag array": {"dress_flag": np.array},
}


@BOTH
@pytest.mark.parametrize("form", SAME)
def test_the_form_of_observations_and_rewards_makes_no_difference(form, dqn, monkeypatch):
    args = small(dqn, total_timesteps=200)
    plain = dqn.train(args, probe("observation", dqn))
    env = probe("observation", dqn)
    for name, function in SAME[form].items():
        monkeypatch.setattr(env, name, function)
    assert_close(dqn.train(args, env)[:2], plain[:2])


SPACES = {  # an observation space, how many numbers its observations become
    "number": (Discrete(3), 3),
    "number from 5": (Discrete(3, start=5), 3),
    "bits": (spaces.MultiBinary(4), 4),
    "numbers": (spaces.MultiDiscrete([2, 3]), 5),
    "grid": (Box(0, 255, (2, 3), np.uint8), 6),
    "tuple": (spaces.Tuple([Discrete(3), Box(-1, 1, (2,))]), 5),
    "dict": (spaces.Dict({"a": Discrete(3), "b": Box(-1, 1, (2, 2))}), 7),
}


@BOTH
@pytest.mark.parametrize("name", SPACES)
def test_observations_of_every_kind_are_flattened(name, dqn, monkeypatch):
    space, size = SPACES[name]
    env = probe("one", dqn)
    env.observation_space = space
    monkeypatch.setattr(env, "dress_obs", lambda obs: space.sample())
    args = small(dqn, total_timesteps=100)
    params, _, _ = dqn.train(args, env)
    assert params["w0"].shape == (size, 16)
    assert np.all(dqn.evaluate(args, params, env) == 1)


class Mission(spaces.Space):
    """A space unknown to Gymnasium, such as one of minigrid's."""


UNSUITABLE = {
    lander: [(None, Box(-1, 1, (1,))), (None, spaces.MultiDiscrete([2, 2]))],
    pendulum: [(None, Discrete(2)), (None, Box(-1, 1, (2,))), (None, Box(-np.inf, np.inf, (1,)))],
}
for both in UNSUITABLE.values():
    both += [(spaces.Text(5), None), (spaces.Sequence(Discrete(2)), None)]
    both += [(Mission(), None)]
    both += [(spaces.Graph(Discrete(2), None), None)]
    both += [(spaces.Dict({"a": Discrete(2), "b": spaces.Text(5)}), None)]
CASES = [(dqn, case) for dqn, cases in UNSUITABLE.items() for case in cases]


@pytest.mark.parametrize("dqn,case", CASES)
def test_spaces_that_do_not_fit_are_refused_by_name(dqn, case):
    env = probe("one", dqn)
    observation_space, action_space = case
    env.observation_space = observation_space or env.observation_space
    env.action_space = action_space or env.action_space
    unfit = type(observation_space or action_space).__name__
    with pytest.raises(ValueError, match=unfit):
        dqn.train(small(dqn), env)


@BOTH
@pytest.mark.parametrize("wrong", ["reset without a seed", "reset without info", "four values"])
def test_another_api_is_refused_with_the_right_one(wrong, dqn):
    env = probe("one", dqn)
    if wrong == "reset without a seed":
        env.reset = lambda: (np.zeros(1, np.float32), {})
    if wrong == "reset without info":
        env.reset = lambda seed=None, options=None: np.zeros(1, np.float32)
    if wrong == "four values":
        env.step = lambda action: (np.zeros(1, np.float32), 1.0, True, {})
    with pytest.raises(ValueError, match="Gymnasium's API is reset"):
        dqn.train(small(dqn), env)


@BOTH
def test_an_episode_without_an_end_stops_the_evaluation(dqn, monkeypatch):
    """At a hundredth of the bound, to save time."""
    env = probe("limit", dqn)
    args = small(dqn, total_timesteps=100)
    params, _, _ = dqn.train(args, env)
    env.step = lambda action: (np.zeros(1, np.float32), 1.0, False, False, {})
    bounds = []

    def shorter(*numbers):
        if numbers == (100_000,):
            bounds.append(numbers)
            return range(1_000)
        return range(*numbers)

    monkeypatch.setattr(dqn, "range", shorter, raising=False)
    with pytest.raises(TimeoutError, match="TimeLimit"):
        dqn.evaluate(args, params, env)
    assert len(bounds) == 1


@BOTH
@pytest.mark.parametrize("what", ["observation", "reward", "loss"])
def test_a_number_that_is_not_finite_ends_the_run_by_name(what, dqn, monkeypatch):
    env = probe("one", dqn)
    args = small(dqn, total_timesteps=100)
    if what == "observation":
        monkeypatch.setattr(env, "dress_obs", lambda obs: np.full(1, np.nan, np.float32))
    if what == "reward":
        monkeypatch.setattr(env, "dress_reward", lambda reward: np.inf)
    if what == "loss":
        args = replace(args, reward_scale=1e9)
        monkeypatch.setattr(env, "dress_reward", lambda reward: 1e25)
    with pytest.raises(FloatingPointError, match=f"{what} is not finite"):
        dqn.train(args, env)


def test_frozen_lake_from_the_command_line(tmp_path):
    """A numbered cell, a sparse reward: after 10,000 steps, the goal is reached greedily."""
    flags = "--env-id FrozenLake-v1 --total-timesteps 10000 --gamma 0.95 --reward-scale 1"
    args = lander.tyro.cli(lander.Args, args=flags.split())
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
    args = small(dqn, batch_size=40)
    args = replace(args, buffer_size=4)
    arrays = [np.zeros((4, 1), np.float32), np.zeros(4, int), np.zeros(4), np.zeros(4)]
    buffer = dqn.Transition(*arrays, np.zeros((4, 1), np.float32))
    for t in range(6):
        dqn.add(buffer, t, dqn.Transition(np.array([t]), t + 1, t + 2, t + 3, np.array([t + 4])))
        drawn = dqn.sample(args, np.random.default_rng(0), buffer, t + 1, *torques_for(dqn))
        batch = drawn if dqn is lander else drawn[0]
        assert batch.obs.shape == (8, 40, 1)
        obs = batch.obs[..., 0]
        assert set(obs.ravel()) == set(range(max(0, t - 3), t + 1))
        assert np.all(batch.action == obs + 1)
        assert np.all(batch.reward == obs + 2)
        assert np.all(batch.discount == obs + 3)
        assert np.all(batch.next_obs[..., 0] == obs + 4)


def torques_for(dqn):
    return [TORQUES] if dqn is pendulum else []


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


def networks(dqn, args):
    """Random weights, in float64, of two networks."""
    rng = np.random.default_rng(0)
    with_torque = getattr(args, "q_input", "") == "state-action"
    outputs = 2 if dqn is lander else 5
    sizes = (5, 6, 5, 1) if with_torque else (4, 6, 5, outputs)
    shapes = dqn.init_params(rng, sizes)
    return [{name: rng.normal(size=x.shape) for name, x in shapes.items()} for _ in range(2)]


@EACH_NETWORK
def test_updates_are_steps_of_adam_on_the_squared_error(dqn, changes):
    """Against NumPy: y = r + discount * max Q(next_obs; w-), or the value of w's choice."""
    args = small(dqn, **changes, batch_size=12)
    args = replace(args, tau=0.25)
    story = Story()
    obs, next_obs, reward, action = (
        x[:, 0] for x in (story.obs, story.next_obs, story.reward, story.action)
    )
    discount = 0.9 * ~story.terminated[:, 0]
    params, target = networks(dqn, args)
    drawn = TORQUES
    if "max_samples" in changes:
        drawn = TORQUES[:3]
    chooser = params if dqn is lander else target
    choice = numpy_q(args, chooser, next_obs, drawn).argmax(axis=1)
    y = reward + discount * numpy_q(args, target, next_obs, drawn)[np.arange(12), choice]

    def loss_of(params):
        return np.mean((y - numpy_q(args, params, obs, TORQUES)[np.arange(12), action]) ** 2)

    ours, ours_target = jax.tree.map(np.float32, (params, target))
    learner = dqn.Learner(ours, ours_target, dqn.make_optimizer(args).init(ours))
    batch = dqn.Transition(obs, action, reward, np.float32(discount), next_obs)
    if dqn is lander:
        learner, loss = jax.jit(partial(dqn.update, args))(learner, batch)
    else:
        torques = jax.numpy.asarray(TORQUES)
        learner, loss = jax.jit(partial(dqn.update, args, torques))(learner, (batch, drawn))
    grads = gradient(loss_of, params)
    assert_close(loss, loss_of(params), 1e-3)
    for name, g in grads.items():
        np.testing.assert_allclose(learner.opt_state[0].mu[name], 0.1 * g, rtol=1e-2, atol=1e-3)
        sure = np.abs(g) > 1e-3  # a gradient of 0 has no sign
        expected = params[name] - 0.02 * np.sign(g)
        np.testing.assert_allclose(learner.params[name][sure], expected[sure], atol=1e-3)
    moved = jax.tree.map(lambda old, new: old + 0.25 * (new - old), target, learner.params)
    assert_close(learner.target_params, moved, 1e-5)


@BOTH
def test_the_learning_rate_falls_to_0(dqn):
    args = small(dqn, total_timesteps=160)  # 10 groups of 8 updates
    optimizer = dqn.make_optimizer(args)
    one = np.ones(1, np.float32)
    adam, schedule = optimizer.init(one)
    for count, size in ((0, 0.02), (40, 0.01), (79, 0.00025), (80, 0.0)):
        state = adam, schedule._replace(count=np.int32(count))
        np.testing.assert_allclose(optimizer.update(one, state)[0], -size, rtol=1e-3, atol=1e-9)


# ---------- Runs
@pytest.mark.parametrize("dqn,env_id", [(lander, "CartPole-v1"), (pendulum, "Pendulum-v1")])
def test_same_seed_same_bits_other_seed_other_agent(dqn, env_id, tmp_path):
    """Although learning overlaps acting, and although the lander's snapshots come between."""
    args = small(dqn)
    env = gymnasium.make(env_id)
    params, episodes, _ = dqn.train(args, env)
    snapshots = {}
    if dqn is lander:
        snapshots = {"eval_frequency": 500, "output_dir": str(tmp_path)}
    again = dqn.train(replace(args, **snapshots), env)
    other = dqn.train(replace(args, seed=2), env)
    assert_close(again[:2], (params, episodes))
    assert not np.any(params["w0"] == other[0]["w0"])
    assert not np.any(params["w1"] == other[0]["w1"])
    if dqn is lander:
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == [f"model_{step:08}.npz" for step in (500, 1000, 1500)]
        assert_close(lander.load_model(tmp_path / "model_00001500.npz"), params)


@BOTH
def test_integers_stand_for_floats(dqn):
    names = ["learning_rate", "gamma", "tau", "reward_scale", "end_e", "exploration_fraction"]
    whole = dict.fromkeys(names, 1)
    args = replace(small(dqn), total_timesteps=200, **whole)
    decimals = replace(args, **{name: float(value) for name, value in whole.items()})
    env = probe("limit", dqn)
    assert_close(dqn.train(args, env)[0], dqn.train(decimals, env)[0])


@BOTH
def test_train_checks_its_settings(dqn):
    with pytest.raises(ValueError, match="n_step" if dqn is lander else "num_bins"):
        dqn.train(replace(small(dqn), **{"n_step" if dqn is lander else "num_bins": 0}), None)
    if dqn is lander:
        with pytest.raises(ValueError, match="eval_frequency.*output_dir"):
            dqn.train(small(dqn, eval_frequency=500), None)


def test_snapshots_are_filmed(tmp_path):
    args = small(lander, env_id="CartPole-v1", capture_video=True, eval_frequency=750)
    assert lander.main(replace(args, output_dir=str(tmp_path / "run"))) == 0
    films = sorted(path.name for path in (tmp_path / "run").glob("*.gif"))
    assert films == ["model.gif", "model_00000750.gif", "model_00001500.gif"]
    frames = imageio.v3.imread(tmp_path / "run" / "model.gif")
    assert len(frames) > 1
    assert frames.shape[3] == 3
    assert np.any(frames[0] != frames[-1])

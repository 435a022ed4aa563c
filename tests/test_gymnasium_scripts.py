"""What would break for a user of dqn_lunarlander.py and of dqn_pendulum_discretized.py: most tests run for both."""

import itertools
from dataclasses import replace
from functools import partial

import gymnasium
import imageio.v3
import jax
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from test_dqn_cartpole_jax import Story, assert_close, compile_once, gradient  # noqa: F401

import dqn_lunarlander as lander
import dqn_pendulum_discretized as pendulum

BOTH = pytest.mark.parametrize("dqn", [lander, pendulum], ids=["lander", "pendulum"])
NETWORKS = {
    "lander": (lander, {"action_gap": 0.5}),
    "lander-plain": (lander, {"double_dqn": False, "layer_norm": False, "action_gap": 0.0}),
    "state": (pendulum, {}),
    "state-action": (pendulum, {"q_input": "state-action"}),
    "state-action-drawn": (pendulum, {"q_input": "state-action", "max_samples": 3}),
}
EACH_NETWORK = pytest.mark.parametrize("dqn,changes", NETWORKS.values(), ids=NETWORKS.keys())
GAMMA, TORQUES = 0.5, np.linspace(-1, 1, 5, dtype=np.float32)


def small(dqn, **changes):
    """The Args of a run of a moment; five torques."""
    args = dqn.Args(total_timesteps=1_500, learning_starts=100, buffer_size=1_000, hidden_sizes=(16,), train_frequency=16)
    args = replace(args, learning_rate=0.02, tau=0.5, gamma=GAMMA, reward_scale=1.0, n_step=1, end_e=0.5, gradient_steps=8)
    return replace(args, eval_episodes=3, **changes)


def q_values(dqn, params, obs):
    return dqn.q_values(params, obs, *([TORQUES] if dqn is pendulum else []))


class Probe(gymnasium.Env):
    """An environment without a spec, whose values are known, and which writes every observation over the last."""

    observation_space = Box(-1, 1, (1,), np.float32)

    def __init__(self, kind, dqn):
        self.kind, self.action_space = kind, Discrete(2, start=5) if dqn is lander else Box(-1, 1, (1,))
        self.obs = np.zeros(1, np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.obs[:] = 0, self.np_random.choice([-1, 1]) if self.kind == "observation" else -1
        return self.obs, {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        worth = (-1.0, 1.0)[action - 5] if isinstance(self.action_space, Discrete) else float(1 - 2 * abs(action[0] - 0.5))
        pays = {"observation": self.obs[0], "action": worth, "later": worth if self.t == 2 else 0.0}
        if self.kind == "later":
            self.obs[:] = 1
        terminated = self.kind != "limit" and (self.kind != "later" or self.t == 2)
        return self.obs, pays.get(self.kind, 1.0), terminated, self.kind == "limit" and self.t == 4, {}


@EACH_NETWORK
@pytest.mark.parametrize("kind", ["one", "observation", "action", "later", "limit"])
def test_values_that_are_known(kind, dqn, changes):
    """A reward of 1; one that is the observation; one for the action; one for the second action; 1 at every step.

    The last is worth 1 / (1 - gamma), for truncation ends the episode and not the value. The last but one is worth gamma times
    the best reward, or times the mean best of three if a maximum is taken over three random torques. With action_gap the value
    of the worse action is further from the best by the factor 1 / (1 - action_gap).
    """
    args, env = small(dqn, **changes, n_step=3 if kind == "limit" else 1), Probe(kind, dqn)
    params, episodes, counts = dqn.train(args, env)
    before, after = (q_values(dqn, params, np.float32([obs])) for obs in (-1, 1))
    assert before.shape == (2,) if dqn is lander else (5,)
    worth = np.array([1 - 2 / (1 - args.action_gap), 1]) if dqn is lander else 1 - 2 * np.abs(TORQUES - 0.5)
    best = np.mean([max(three) for three in itertools.product(worth, repeat=3)]) if "max_samples" in changes else 1
    expected = {"observation": -1, "action": worth, "later": GAMMA * best, "limit": 1 / (1 - GAMMA)}.get(kind, 1)
    np.testing.assert_allclose(before, np.broadcast_to(expected, before.shape), atol=0.2)
    if kind in ("observation", "later"):
        np.testing.assert_allclose(after, worth if kind == "later" else np.ones(before.shape), atol=0.2)
    returns = dqn.evaluate(args, params, env)
    assert returns.shape == (1, 3) and (kind == "observation" or np.all(returns == (4 if kind == "limit" else 1)))
    assert np.all(np.cumsum(episodes[:, 2]) == episodes[:, 0]) and counts["env_steps"] == 1_500


@BOTH
def test_rewards_are_scaled_for_learning_only(dqn):
    args, env = small(dqn, reward_scale=0.5), Probe("one", dqn)
    params, episodes, _ = dqn.train(args, env)
    np.testing.assert_allclose(q_values(dqn, params, np.float32([-1])), 0.5, atol=0.05)
    assert np.all(episodes[:, 1] == 1) and np.all(dqn.evaluate(args, params, env) == 1)


# ---------- Replay buffer
@BOTH
@pytest.mark.parametrize("n_step", [1, 3])
def test_the_queue_sums_rewards_and_stops_at_ends(dqn, n_step):
    story = Story()
    for i in range(2):
        queue, rows = [], []
        for t in range(12):
            ends = story.terminated[t, i], story.truncated[t, i]
            step = story.obs[t, i], story.action[t, i], story.reward[t, i], story.next_obs[t, i], *ends
            rows += dqn.extend(queue, *step, n_step, 0.9)
        expected = [story.transition(t, i, n_step, 0.9) for t in range(13 - n_step)]
        for row, transition in zip(rows, expected, strict=True):
            np.testing.assert_allclose(np.hstack(row), transition, rtol=1e-5)


@BOTH
def test_the_ring_keeps_the_newest_and_draws_all_that_is_filled(dqn):
    buffer = np.zeros((4, 5), np.float32)
    for t in range(6):
        dqn.add(buffer, t, dqn.Transition(np.array([t]), 1, 2, 3, np.array([t + 1])))
        rows = dqn.sample(buffer, t + 1, np.random.default_rng(0), (3, 40))
        assert rows.shape == (3, 40, 5) and set(rows[..., 0].ravel()) == set(range(max(0, t - 3), t + 1))
    obs, action, reward, discount, next_obs = dqn.unpack(rows[0])
    assert action.dtype == int and np.all(next_obs == obs + 1) and obs.shape == (40, 1)
    assert np.all(action == 1) and np.all(reward == 2) and np.all(discount == 3)


# ---------- Network and learning
def numpy_q(args, params, obs, torques):
    """A plain perceptron in float64. For state-action on the rows [obs, torque], torques (A,) or (B, A)."""
    x, layers = obs, len(params) // 2
    if getattr(args, "q_input", "") == "state-action":
        torques = np.broadcast_to(torques, (len(obs), np.shape(torques)[-1]))
        x = np.concatenate([np.repeat(obs[:, None], torques.shape[1], axis=1), torques[..., None]], axis=-1)
    for i in range(layers):
        x = x @ params[f"w{i}"] + (params[f"n{i}"] if f"n{i}" in params else params[f"b{i}"])
        if i < layers - 1:
            if getattr(args, "layer_norm", True):
                x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
            x = np.maximum(x, 0)
    return x[..., 0] if getattr(args, "q_input", "") == "state-action" else x


def networks(dqn, args, count=2):
    """Random weights, in float64, of networks of three inputs."""
    rng, with_torque = np.random.default_rng(0), getattr(args, "q_input", "") == "state-action"
    sizes = 4 + with_torque, 6, 5, 2 if dqn is lander else 1 if with_torque else 5
    empty = dqn.init_params(rng, sizes, *([args.layer_norm] if dqn is lander else []))
    return [{name: rng.normal(size=x.shape) for name, x in empty.items()} for _ in range(count)]


@EACH_NETWORK
def test_the_network_that_acts_is_the_one_that_learns(dqn, changes):
    """q_values of NumPy arrays, of one observation and of a batch, of JAX arrays, and a plain perceptron all agree."""
    args = small(dqn, **changes)
    (params,) = networks(dqn, args, 1)
    obs, ours = Story().obs[:, 0], jax.tree.map(np.float32, params)
    expected = numpy_q(args, params, obs, TORQUES)
    assert expected.shape == (12, 2 if dqn is lander else 5)
    batch, compiled = q_values(dqn, ours, obs), jax.jit(partial(q_values, dqn))(ours, obs)
    one = np.array([q_values(dqn, ours, x) for x in obs])
    assert one.dtype == batch.dtype == np.float32 and isinstance(batch, np.ndarray)
    for q in (one, batch, compiled):
        np.testing.assert_allclose(q, expected, rtol=1e-3, atol=1e-4)


@EACH_NETWORK
def test_updates_are_steps_of_adam_on_the_squared_error(dqn, changes):
    """Against NumPy: y = r + discount * max Q(next_obs; target network), or Double DQN's choice, less the action gap."""
    args, story = small(dqn, **changes, end_learning_rate=0.02), Story()
    obs, next_obs, reward = story.obs[:, 0], story.next_obs[:, 0], story.reward[:, 0]
    action, discount = story.action[:, 0], 0.9 * ~story.terminated[:, 0]
    params, target = networks(dqn, args)
    drawn = TORQUES[np.random.default_rng(0).integers(5, size=args.max_samples)] if "max_samples" in changes else TORQUES
    choice = numpy_q(args, params if getattr(args, "double_dqn", False) else target, next_obs, drawn).argmax(axis=1)
    y = reward + discount * numpy_q(args, target, next_obs, drawn)[np.arange(12), choice]
    q = numpy_q(args, params, obs, TORQUES)
    y = y - getattr(args, "action_gap", 0) * (q.max(axis=1) - q[np.arange(12), action])

    def loss_of(params):
        return np.mean((y - np.take_along_axis(numpy_q(args, params, obs, TORQUES), action[:, None], axis=1)[:, 0]) ** 2)

    ours, ours_target = jax.tree.map(np.float32, (params, target))
    learner = dqn.Learner(ours, ours_target, dqn.make_optimizer(args).init(ours))
    rows = np.float32(np.column_stack([obs, action, reward, discount, next_obs]))[None]
    if dqn is lander:
        learner, loss = jax.jit(partial(dqn.learn, args))(learner, rows, 0.25)
    else:
        learner, loss = jax.jit(partial(dqn.learn, replace(args, tau=0.25), TORQUES))(learner, rows, drawn[None])
    grads = gradient(loss_of, params)
    assert_close(loss, loss_of(params), 1e-3)
    for name, g in grads.items():
        np.testing.assert_allclose(learner.opt_state[0].mu[name], 0.1 * g, rtol=1e-2, atol=1e-3)
        sure = np.abs(g) > 1e-3  # a gradient of 0 has no sign
        np.testing.assert_allclose(learner.params[name][sure], (params[name] - 0.02 * np.sign(g))[sure], atol=1e-3)
    mixed = jax.tree.map(lambda old, new: old + 0.25 * (new - old), target, learner.params)
    assert_close(learner.target_params, mixed, 1e-5)


def test_the_lander_updates_the_target_network_on_schedule(monkeypatch):
    """A call each 16 steps after learning_starts; tau only where a multiple of target_network_frequency lies in them."""
    taus = []

    def learn(args, learner, rows, tau):
        jax.debug.callback(lambda tau: taus.append(float(tau)), tau, ordered=True)
        return learner, 0.0

    monkeypatch.setattr(lander, "learn", learn)
    lander.train(small(lander, total_timesteps=300, target_network_frequency=40), Probe("limit", lander))
    jax.effects_barrier()
    assert taus == [0.5 if step // 40 > (step - 16) // 40 else 0 for step in range(112, 300, 16)]


@BOTH
def test_step_sizes_fall_to_the_end_learning_rate(dqn):
    args = small(dqn, total_timesteps=180, learning_starts=20, end_learning_rate=0.01)  # 10 calls of 8 updates
    optimizer = dqn.make_optimizer(args)
    state = optimizer.init(np.zeros(1, np.float32))
    for count, size in ((0, 0.02), (40, 0.015), (80, 0.01), (99, 0.01)):
        at = jax.tree.map(lambda x: x, (state[0], state[1]._replace(count=np.int32(count))))  # noqa: B023
        np.testing.assert_allclose(optimizer.update(np.ones(1, np.float32), at)[0], -size, rtol=1e-4)


# ---------- Runs
@pytest.mark.parametrize("dqn,env_id", [(lander, "CartPole-v1"), (pendulum, "InvertedPendulum-v5")])
def test_same_seed_same_bits_other_seed_other_agent(dqn, env_id, tmp_path):
    """Although learning overlaps acting, and although the lander's snapshots come between."""
    args, env = small(dqn), gymnasium.make(env_id)
    params, episodes, _ = dqn.train(args, env)
    snapshots = {"eval_frequency": 500, "output_dir": str(tmp_path)} if dqn is lander else {}
    again, other = dqn.train(replace(args, **snapshots), env), dqn.train(replace(args, seed=2), env)
    assert_close(again[:2], (params, episodes))
    assert not any(np.any(params[name] == other[0][name]) for name in ("w0", "w1"))
    if dqn is lander:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model_1000.npz", "model_1500.npz", "model_500.npz"]
        assert_close(lander.load_model(tmp_path / "model_1500.npz"), params)


@pytest.mark.parametrize("dqn,env_id", [(lander, "CartPole-v1"), (pendulum, "Pendulum-v1")])
def test_videos(dqn, env_id, tmp_path):
    snapshots = {"eval_frequency": 750} if dqn is lander else {}
    args = small(dqn, env_id=env_id, capture_video=True, output_dir=str(tmp_path / "run"), **snapshots)
    assert dqn.main(args) == 0
    films = sorted(path.name for path in (tmp_path / "run").glob("*.gif"))
    assert films == (["model.gif", "model_1500.gif", "model_750.gif"] if dqn is lander else ["model.gif"])
    frames = imageio.v3.imread(tmp_path / "run" / "model.gif")
    assert len(frames) > 1 and frames.shape[3] == 3 and np.any(frames[0] != frames[-1])


SPACES = {
    lander: [(Box(-1, 1, (1,)), Box(-1, 1, (1,))), (Discrete(3), Discrete(2)), (Box(0, 1, (8, 8)), Discrete(2))],
    pendulum: [(Box(-1, 1, (1,)), Discrete(2)), (Box(-1, 1, (1,)), Box(-1, 1, (2,))), (Discrete(3), Box(-1, 1, (1,)))]
    + [(Box(-1, 1, (1,)), Box(-np.inf, np.inf, (1,))), (Box(0, 1, (8, 8)), Box(-1, 1, (1,)))],
}


@pytest.mark.parametrize("dqn,spaces", [(dqn, spaces) for dqn, several in SPACES.items() for spaces in several])
def test_unsuitable_spaces(dqn, spaces):
    env = Probe("one", dqn)
    env.observation_space, env.action_space = spaces
    with pytest.raises(ValueError, match="env_id must have a flat Box observation"):
        dqn.train(small(dqn), env)


@BOTH
def test_an_observation_that_is_not_a_number_ends_the_run(dqn):
    env = Probe("one", dqn)
    env.t, env.reset = 0, lambda seed=None: (np.full(1, np.nan, np.float32), {})
    with pytest.raises(FloatingPointError):
        dqn.train(small(dqn), env)

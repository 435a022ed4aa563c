"""What would break for a user of dqn_lunarlander.py and of dqn_pendulum_discretized.py: most tests run for both."""

import dataclasses
import os
import pathlib
import subprocess
import sys
from functools import partial

import gymnasium
import imageio.v3
import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import dqn_lunarlander as lander  # noqa: E402
import dqn_pendulum_discretized as pendulum  # noqa: E402

each_script = pytest.mark.parametrize("dqn", [lander, pendulum], ids=["lander", "pendulum"])


def small(dqn, **changes):
    """The Args of a run of a second."""
    args = dqn.Args(total_timesteps=3_000, learning_starts=500, buffer_size=3_000, hidden_sizes=(32,), eval_episodes=3)
    return dataclasses.replace(args, **changes)


class Probe(gymnasium.Env):
    """Reward 1 at every step, and every step ends the episode, in the way that is asked for."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, how, action_space):
        self.how, self.action_space = how, action_space

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        return np.ones(1, np.float32), self.reward(action), self.how == "terminated", self.how == "truncated", {}

    def reward(self, action):
        return 1.0


class BestTorque(Probe):
    """Torques from -2 to 6; the reward is 1 at torque 2 and falls to 0 at both ends."""

    def reward(self, action):
        return 1 - abs(float(action[0]) - 2) / 4


SPACES = {lander: gymnasium.spaces.Discrete(2, start=5), pendulum: gymnasium.spaces.Box(-2, 6, (1,), np.float32)}
for dqn, space in SPACES.items():
    for how in ("terminated", "truncated"):
        gymnasium.register(f"{dqn.__name__}-{how}-v0", entry_point=partial(Probe, how, space))
    easy = f"{dqn.__name__}-easy-v0"
    gymnasium.register(easy, entry_point=partial(Probe, "terminated", space), reward_threshold=1.0)
gymnasium.register("BestTorque-v0", entry_point=partial(BestTorque, "terminated", SPACES[pendulum]))


# ------------------------------------------------------------------------------------------------ Buffer and targets

RING = [((1,), np.float32), ((), np.int32), ((), np.float32), ((1,), np.float32), ((), bool), ((), bool)]


def ring(dqn, size, steps, ended=()):
    """A buffer after `steps` environment steps: obs holds the step, reward 1, `ended` maps a step to how it ended."""
    buffer = dqn.Transition(*(np.zeros((size, *shape), kind) for shape, kind in RING))
    for t in range(steps):
        how = dict(ended).get(t)
        dqn.add(buffer, t, dqn.Transition([t], t % 2, 1, [t + 0.5], how == "terminated", how == "truncated"))
    return buffer


def draws(dqn, buffer, steps, n_step, gamma, count=2_000):
    return dqn.sample(buffer, steps, np.random.default_rng(0), (2, count // 2), n_step, gamma)


@each_script
def test_ring_overwrites_the_oldest(dqn):
    buffer = ring(dqn, size=4, steps=6)
    np.testing.assert_array_equal(buffer.obs[:, 0], [4, 5, 2, 3])
    np.testing.assert_array_equal(buffer.next_obs[:, 0], [4.5, 5.5, 2.5, 3.5])


@each_script
@pytest.mark.parametrize("steps", [4, 7, 8, 9, 13, 16])
@pytest.mark.parametrize("n_step", [1, 2, 3])
def test_sample_draws_every_full_run_and_no_other(dqn, steps, n_step):
    batch = draws(dqn, ring(dqn, size=8, steps=steps), steps, n_step, 0.5)
    assert batch.obs.shape == (2, 1_000, 1) and batch.reward.dtype == batch.discount.dtype == np.float32
    assert set(batch.obs.ravel().tolist()) == set(range(max(0, steps - 8), steps - (n_step - 1)))
    np.testing.assert_array_equal(batch.next_obs, batch.obs + (n_step - 1) + 0.5)
    np.testing.assert_array_equal(batch.action, batch.obs[..., 0] % 2)
    np.testing.assert_allclose(batch.reward, sum(0.5**k for k in range(n_step)))
    np.testing.assert_allclose(batch.discount, 0.5**n_step)


@each_script
def test_a_run_stops_where_its_episode_ends(dqn):
    batch = draws(dqn, ring(dqn, size=20, steps=20, ended={4: "terminated", 9: "truncated"}), 20, 3, 0.5)
    found = {}
    for obs, *rest in zip(batch.obs.ravel(), batch.reward.ravel(), batch.discount.ravel(), batch.next_obs.ravel(), strict=True):
        found[int(obs)] = tuple(map(float, rest))
    assert found[2] == (1.75, 0, 4.5) and found[3] == (1.5, 0, 4.5) and found[4] == (1, 0, 4.5)
    assert found[7] == (1.75, 0.125, 9.5) and found[8] == (1.5, 0.25, 9.5) and found[9] == (1, 0.5, 9.5)
    assert found[5] == (1.75, 0.125, 7.5)


@each_script
def test_a_batch_is_a_copy(dqn):
    buffer = ring(dqn, size=8, steps=8)
    batch = draws(dqn, buffer, 8, 1, 0.9)
    before = [array.copy() for array in batch]
    for array in buffer:
        array[:] = 1
    for old, new in zip(before, batch, strict=True):
        np.testing.assert_array_equal(old, new)


def linear_network(weights):
    return {"w0": jnp.array(weights, jnp.float32), "b0": jnp.zeros(len(weights[0]))}


@each_script
def test_target_by_hand(dqn):
    """Q(s, a) = s * (1, 3) in the target network, s * (2, 1) online; one terminated and one truncated step."""
    batch = draws(dqn, ring(dqn, size=2, steps=2, ended={0: "terminated", 1: "truncated"}), 2, 1, 0.9, count=20)
    batch = dqn.Batch(*(array.reshape(20, *array.shape[2:]) for array in batch))
    params, target_params = linear_network([[2, 1]]), linear_network([[1, 3]])
    for double_dqn, value in ((False, 1 + 0.9 * 4.5), (True, 1 + 0.9 * 1.5)):
        target = dqn.td_target(params, target_params, batch, double_dqn, False)
        np.testing.assert_allclose(target, np.where(batch.obs[:, 0] == 0, 1, value), rtol=1e-6)


@each_script
def test_update_by_hand(dqn):
    """The gradient is that of the action taken only; Adam's first step is the learning rate, by sign."""
    batch = dqn.Batch(np.ones((1, 1)), np.array([1]), np.array([5.0]), np.array([0.0]), np.ones((1, 1)))
    params = linear_network([[2, 1]])
    new, _, loss = dqn.update(params, params, dqn.optimizer.init(params), batch, 0.1, False, False)
    assert loss == (5 - 1) ** 2
    np.testing.assert_allclose(new["w0"], [[2, 1.1]], rtol=1e-5)
    np.testing.assert_allclose(new["b0"], [0, 0.1], rtol=1e-5)


def network(dqn, **changes):
    """The random network of these settings, and its Environment."""
    args = small(dqn, hidden_sizes=(16, 16), **changes)
    env = dqn.Environment(args)
    return dqn.init_network(args, env), env


NETWORKS = [(lander, {}), (pendulum, {}), (pendulum, {"q_input": "state-action"})]


@pytest.mark.parametrize("dqn,changes", NETWORKS)
@pytest.mark.parametrize("layer_norm", [False, True])
def test_q_values_of_numpy_and_jax_agree(dqn, changes, layer_norm):
    params, env = network(dqn, **changes)
    obs = np.random.default_rng(0).normal(size=(5, env.obs_size)).astype(np.float32)
    arrays = jax.tree.map(np.asarray, params)
    batch = dqn.q_values(params, jnp.array(obs), layer_norm)
    assert batch.shape == (5, env.actions)
    for i in range(5):
        one = dqn.q_values(arrays, obs[i], layer_norm)
        assert isinstance(one, np.ndarray) and one.shape == (env.actions,) and one.dtype == np.float32
        np.testing.assert_allclose(one, batch[i], rtol=1e-4, atol=1e-5)


@each_script
def test_layer_norm_by_hand(dqn):
    np.testing.assert_allclose(dqn.normalize(np.array([[1.0, 3.0], [0.0, 10.0]])), [[-1, 1], [-1, 1]], atol=1e-4)
    params = {"w0": np.array([[1.0, 3.0]]), "b0": np.zeros(2), "w1": np.array([[5.0], [7.0]]), "b1": np.array([0.5])}
    np.testing.assert_allclose(dqn.q_values(params, np.array([2.0]), True), [7.5], atol=1e-3)  # ReLU of -1 and 1, then 7 + 0.5
    np.testing.assert_allclose(dqn.q_values(params, np.array([2.0]), False), [2 * 5 + 6 * 7 + 0.5])


@pytest.mark.parametrize("dqn,changes", NETWORKS)
def test_average_and_target_move_as_documented(dqn, changes):
    changes |= {"gradient_steps": 1, "train_frequency": 16, "average_rate": 0.25, "tau": 0.5, "target_network_frequency": 64}
    args = small(dqn, **changes)
    start, env = network(dqn, **changes)
    zero = jax.tree.map(jnp.zeros_like, start)
    if "torques" in start:
        zero["torques"] = start["torques"]
    learner = dqn.Learner(start, zero, zero, dqn.optimizer.init(start))
    shape = args.gradient_steps, args.batch_size
    rng = np.random.default_rng(0)
    batches = dqn.Batch(
        rng.normal(size=(*shape, env.obs_size)).astype(np.float32),
        rng.integers(env.actions, size=shape).astype(np.int32),
        np.ones(shape, np.float32),
        np.zeros(shape, np.float32),
        np.zeros((*shape, env.obs_size), np.float32),
    )
    early, loss = dqn.learn(args, learner, batches, np.int32(48))
    due, _ = dqn.learn(args, learner, batches, np.int32(64))
    assert loss > 0 and np.any(early.params["w0"] != start["w0"])
    np.testing.assert_allclose(early.average_params["w0"], 0.25 * early.params["w0"], rtol=1e-6)
    np.testing.assert_array_equal(early.target_params["w0"], 0)
    np.testing.assert_allclose(due.target_params["w0"], 0.5 * due.params["w0"], rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------- Training


@each_script
@pytest.mark.parametrize("how,value", [("truncated", 10), ("terminated", 1)])
@pytest.mark.parametrize("n_step", [1, 3])
def test_value_of_a_probe(dqn, how, value, n_step):
    """A truncated step bootstraps: reward 1 for ever is worth 1 / (1 - gamma). A terminated one does not."""
    args = small(
        dqn,
        env_id=f"{dqn.__name__}-{how}-v0",
        learning_starts=100,
        buffer_size=1_000,
        hidden_sizes=(),
        gamma=0.9,
        learning_rate=0.1,
        tau=0.5,
        train_frequency=16,
        target_network_frequency=16,
        gradient_steps=8,
        n_step=n_step,
        reward_scale=1.0,
        average_rate=0.05,
    )
    result = dqn.train(args)
    np.testing.assert_allclose(dqn.q_values(result.params, np.ones(1, np.float32)), value, rtol=0.03)
    np.testing.assert_array_equal(result.episodes, np.stack([np.arange(1, 3_001), np.ones(3_000), np.ones(3_000)], axis=1))


@each_script
def test_rewards_are_scaled_for_learning_only(dqn):
    args = small(dqn, env_id=f"{dqn.__name__}-terminated-v0", learning_starts=100, hidden_sizes=(), learning_rate=0.1)
    result = dqn.train(dataclasses.replace(args, reward_scale=0.1, average_rate=0.05))
    np.testing.assert_allclose(dqn.q_values(result.params, np.ones(1, np.float32)), 0.1, rtol=0.03)
    np.testing.assert_array_equal(result.episodes[:, 1], 1)
    np.testing.assert_array_equal(dqn.evaluate(args, result.params), 1)


@each_script
def test_updates_happened_and_episodes_are_gymnasiums(dqn):
    args = small(dqn)
    env = dqn.Environment(args)
    start = dqn.init_network(args, env)
    losses = []
    result = dqn.train(args, report=lambda env_steps, seconds, episodes, loss: losses.append(float(loss)))
    assert len(losses) == 3 and min(losses) > 0
    for name, values in result.params.items():
        assert np.all(np.isfinite(values)) and np.abs(values - start[name]).max() > 1e-3
    steps, returns, lengths = result.episodes.T
    np.testing.assert_array_equal(np.cumsum(lengths), steps)
    assert steps[-1] <= 3_000 and len(steps) > 10
    if dqn is lander:
        assert returns.min() > -2_000 and returns.max() < 350
    else:  # 1 for every step that the pole stands, so none for the one at which it falls
        np.testing.assert_array_equal(returns, lengths - 1)


@each_script
def test_same_seed_same_bits_other_seed_other_agent(dqn):
    """Although learning overlaps acting, and although snapshots come between."""
    args = small(dqn)
    first = dqn.train(args)
    pictures = []
    again = dqn.train(
        dataclasses.replace(args, eval_frequency=1_000),
        snapshot=lambda step, params: pictures.append((step, dqn.evaluate(args, params))),
    )
    other = dqn.train(dataclasses.replace(args, seed=2))
    assert [step for step, _ in pictures] == [1_000, 2_000, 3_000]
    np.testing.assert_array_equal(first.episodes, again.episodes)
    for name in first.params:
        np.testing.assert_array_equal(first.params[name], again.params[name])
        if name.startswith("w"):
            assert not np.any(first.params[name] == other.params[name])
    assert not np.array_equal(first.episodes[:10], other.episodes[:10])


@each_script
def test_an_interrupted_run_has_every_episode_once(dqn):
    def report(env_steps, seconds, episodes, loss):
        if env_steps == 2_000:
            raise KeyboardInterrupt

    whole, part = dqn.train(small(dqn)), dqn.train(small(dqn), report=report)
    assert part.interrupted and part.env_steps == 2_000
    np.testing.assert_array_equal(part.episodes, whole.episodes[: len(part.episodes)])
    assert len(part.episodes) == np.sum(whole.episodes[:, 0] <= 2_000) > 0


def test_learns_cartpole():
    """The flags of the README's CartPole, shortened, learn: from episodes of about 20 steps to more than 100."""
    args = lander.Args(env_id="CartPole-v1", seed=3, total_timesteps=12_000, learning_starts=500, eval_episodes=10)
    result = lander.train(args)
    assert lander.evaluate(args, result.params).mean() > 100 > 3 * result.episodes[:20, 1].mean()


@pytest.mark.parametrize("q_input", ["state", "state-action"])
def test_both_networks_find_the_best_torque(q_input):
    """The reward of a torque is known: 1 at torque 2, one quarter less for every unit away from it."""
    args = small(pendulum, env_id="BestTorque-v0", q_input=q_input, num_bins=9, reward_scale=1.0, average_rate=0.05)
    result = pendulum.train(args)
    q, env = pendulum.q_values(result.params, np.ones(1, np.float32), args.layer_norm), pendulum.Environment(args)
    assert q.shape == (9,) and env.torques[q.argmax(), 0] == 2
    np.testing.assert_allclose(q, 1 - np.abs(np.linspace(-2, 6, 9) - 2) / 4, atol=0.15)
    np.testing.assert_array_equal(pendulum.evaluate(args, result.params), 1)
    if q_input == "state-action":  # and no gradient moved the torques
        np.testing.assert_array_equal(result.params["torques"], np.linspace(-2, 6, 9, dtype=np.float32))


def test_the_joined_first_layer_is_the_product_of_state_and_torque():
    params, env = network(pendulum, q_input="state-action", num_bins=5)
    obs = np.random.default_rng(0).normal(size=(3, env.obs_size)).astype(np.float32)
    scaled = np.linspace(-1, 1, 5)
    both = np.concatenate([np.repeat(obs, 5, axis=0), np.tile(scaled, 3)[:, None]], axis=1)
    hidden = np.maximum(both @ params["w0"] + params["b0"], 0)
    hidden = np.maximum(hidden @ params["w1"] + params["b1"], 0)
    expected = (hidden @ params["w2"] + params["b2"]).reshape(3, 5)
    np.testing.assert_allclose(pendulum.q_values(params, obs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("env_id,most", [("InvertedPendulum-v5", 3), ("Pendulum-v1", 2)])
@pytest.mark.parametrize("num_bins", [2, 5, 1000])
def test_torques_go_evenly_from_end_to_end(env_id, most, num_bins):
    env = pendulum.Environment(pendulum.Args(env_id=env_id, num_bins=num_bins))
    torques = env.torques[:, 0]
    assert env.torques.shape == (num_bins, 1) and env.actions == num_bins
    assert torques[0] == -most and torques[-1] == most
    np.testing.assert_allclose(np.diff(torques), 2 * most / (num_bins - 1), rtol=1e-3)
    env.reset(seed=0)
    for action in (0, num_bins - 1):
        env.step(action)  # Gymnasium's checker would complain about a torque outside the space
    assert env.episode_length == 2


@each_script
def test_early_stop_is_at_the_published_criterion(dqn):
    args = small(dqn, env_id=f"{dqn.__name__}-easy-v0", total_timesteps=2_000, learning_starts=50, early_stop=True)
    assert dqn.train(args).env_steps == 100  # the first moment with 100 episodes
    assert dqn.train(dataclasses.replace(args, early_stop=False)).env_steps == 2_000


def test_evaluation_tells_a_bad_policy():
    params = {"w0": np.zeros((8, 4), np.float32), "b0": np.array([1, 0, 0, 0], np.float32)}  # never fires an engine
    returns = lander.evaluate(small(lander), params)
    assert returns.shape == (3,) and returns.max() < 0


# --------------------------------------------------------------------------------------------------------- Command line

FLAGS = "--total-timesteps 3000 --learning-starts 500 --eval-episodes 3 --hidden-sizes 32".split()


@pytest.mark.parametrize("dqn,shape", [(lander, (200, 300, 3)), (pendulum, (240, 240, 3))])
def test_snapshots_and_videos_without_a_display(dqn, shape, tmp_path):
    hidden = ("DISPLAY", "SDL_VIDEODRIVER", "MUJOCO_GL", "WAYLAND_DISPLAY")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    flags = "--eval-frequency 1500 --snapshot-episodes 2 --capture-video --output-dir run".split()
    command = [sys.executable, dqn.__file__, *FLAGS, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("snapshot: mean") == 2
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        *("model.npz", "returns.csv", "curve.png", "summary.json", "video.gif"),
        *("model_1500.npz", "model_3000.npz", "video_1500.gif", "video_3000.gif"),
    }
    frames = imageio.v3.imread(tmp_path / "run" / "video.gif")
    assert len(frames) > 1 and frames.shape[1:] == shape and np.any(frames[0] != frames[-1])
    first, last = (dqn.load_model(tmp_path / "run" / f"model_{step}.npz") for step in (1_500, 3_000))
    assert np.any(first["w0"] != last["w0"])
    kept = dqn.load_model(tmp_path / "run" / "model.npz")
    for name in kept:
        np.testing.assert_array_equal(last[name], kept[name])


NAMELESS = dict.fromkeys(["LunarLander-v99", "Nothing", "nomodule:Nothing-v0"], "must name a Gymnasium environment")
UNSUITABLE = {
    lander: NAMELESS
    | {
        "Pendulum-v1": "Discrete actions, but Pendulum-v1 has Box",
        "FrozenLake-v1": "flat Box observation, but FrozenLake-v1 has Discrete",
        "Blackjack-v1": "flat Box observation, but Blackjack-v1 has Tuple",
        "CarRacing-v3": "flat Box observation, but CarRacing-v3 has Box(0, 255, (96, 96, 3)",
    },
    pendulum: NAMELESS
    | {
        "CartPole-v1": "bounded Box action of one number, but CartPole-v1 has Discrete",
        "LunarLanderContinuous-v3": "bounded Box action of one number, but LunarLanderContinuous-v3 has Box(-1.0, 1.0, (2,)",
        "Reacher-v5": "bounded Box action of one number, but Reacher-v5 has Box(-1.0, 1.0, (2,)",
        "Unbounded-v0": "bounded Box action of one number, but Unbounded-v0 has Box(-inf, inf, (1,)",
        "CarRacing-v3": "flat Box observation, but CarRacing-v3 has Box(0, 255, (96, 96, 3)",
    },
}
gymnasium.register(
    "Unbounded-v0", entry_point=partial(Probe, "terminated", gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32))
)


@pytest.mark.parametrize("dqn,env_id", [(dqn, env_id) for dqn, table in UNSUITABLE.items() for env_id in table])
def test_unsuitable_environments(dqn, env_id, capsys):
    assert dqn.main(dqn.Args(env_id=env_id)) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert UNSUITABLE[dqn][env_id] in printed.err


@pytest.mark.parametrize("dqn,package,extra", [(lander, "Box2D", "box2d"), (pendulum, "mujoco", "mujoco")])
def test_a_missing_simulator_is_named_with_its_command(dqn, package, extra, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith(f"gymnasium.envs.{extra}") or name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert dqn.main(dqn.Args()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f'pip install "gymnasium[{extra}]"' in error


@pytest.mark.parametrize("dqn,env_id", [(lander, "CartPole-v1"), (pendulum, "Pendulum-v1")])
def test_a_missing_renderer_ends_before_training(dqn, env_id, monkeypatch, capsys, tmp_path):
    for name in [name for name in sys.modules if name.split(".")[0] == "pygame"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "pygame", None)
    args = small(dqn, env_id=env_id, capture_video=True, output_dir=str(tmp_path / "run"))
    assert dqn.main(args) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"cannot render {env_id}" in error and "pip install" in error
    assert not (tmp_path / "run").exists()


@each_script
def test_an_environment_without_a_threshold(dqn):
    code = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import test_gymnasium_scripts as probe, {dqn.__name__} as dqn
args = probe.small(dqn, env_id="{dqn.__name__}-truncated-v0")
assert dqn.main(args) == 0
assert dqn.main(probe.dataclasses.replace(args, early_stop=True)) == 2
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    error = f"error: early_stop needs a reward threshold, and {dqn.__name__}-truncated-v0 has none\n"
    assert "no threshold" in done.stdout and done.stderr == error

"""What would break for a user of dqn_lunarlander.py."""

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
SCRIPT = ROOT / "dqn_lunarlander.py"
sys.path.insert(0, str(ROOT))
import dqn_lunarlander as dqn  # noqa: E402

SMALL = dqn.Args(total_timesteps=3_000, learning_starts=500, buffer_size=3_000, hidden_sizes=(32,), eval_episodes=3)
CARTPOLE = dataclasses.replace(SMALL, env_id="CartPole-v1")


class Probe(gymnasium.Env):
    """Reward 1 at every step, and every step ends the episode, in the way that is asked for."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2, start=5)

    def __init__(self, how):
        self.how = how

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        return np.ones(1, np.float32), 1.0, self.how == "terminated", self.how == "truncated", {}


for how in ("terminated", "truncated"):
    gymnasium.register(f"Probe-{how}-v0", entry_point=partial(Probe, how))


# ------------------------------------------------------------------------------------------------ Buffer and targets


def ring(size, steps, ended=()):
    """A buffer after `steps` environment steps: obs holds the step, reward 1, `ended` maps a step to how it ended."""
    buffer = dqn.Transition(*(np.zeros((size, *shape), kind) for shape, kind in RING))
    for t in range(steps):
        how = dict(ended).get(t)
        dqn.add(buffer, t, dqn.Transition([t], t % 2, 1, [t + 0.5], how == "terminated", how == "truncated"))
    return buffer


RING = [((1,), np.float32), ((), np.int32), ((), np.float32), ((1,), np.float32), ((), bool), ((), bool)]


def draws(buffer, steps, n_step, gamma, count=2_000):
    return dqn.sample(buffer, steps, np.random.default_rng(0), (2, count // 2), n_step, gamma)


def test_ring_overwrites_the_oldest():
    buffer = ring(size=4, steps=6)
    np.testing.assert_array_equal(buffer.obs[:, 0], [4, 5, 2, 3])
    np.testing.assert_array_equal(buffer.next_obs[:, 0], [4.5, 5.5, 2.5, 3.5])


@pytest.mark.parametrize("steps", [4, 7, 8, 9, 13, 16])
@pytest.mark.parametrize("n_step", [1, 2, 3])
def test_sample_draws_every_full_run_and_no_other(steps, n_step):
    batch = draws(ring(size=8, steps=steps), steps, n_step, 0.5)
    assert batch.obs.shape == (2, 1_000, 1) and batch.reward.dtype == batch.discount.dtype == np.float32
    assert set(batch.obs.ravel().tolist()) == set(range(max(0, steps - 8), steps - (n_step - 1)))
    np.testing.assert_array_equal(batch.next_obs, batch.obs + (n_step - 1) + 0.5)
    np.testing.assert_array_equal(batch.action, batch.obs[..., 0] % 2)
    np.testing.assert_allclose(batch.reward, sum(0.5**k for k in range(n_step)))
    np.testing.assert_allclose(batch.discount, 0.5**n_step)


def test_a_run_stops_where_its_episode_ends():
    batch = draws(ring(size=20, steps=20, ended={4: "terminated", 9: "truncated"}), 20, 3, 0.5)
    found = {}
    for obs, *rest in zip(batch.obs.ravel(), batch.reward.ravel(), batch.discount.ravel(), batch.next_obs.ravel(), strict=True):
        found[int(obs)] = tuple(map(float, rest))
    assert found[2] == (1.75, 0, 4.5) and found[3] == (1.5, 0, 4.5) and found[4] == (1, 0, 4.5)
    assert found[7] == (1.75, 0.125, 9.5) and found[8] == (1.5, 0.25, 9.5) and found[9] == (1, 0.5, 9.5)
    assert found[5] == (1.75, 0.125, 7.5)


def test_a_batch_is_a_copy():
    buffer = ring(size=8, steps=8)
    batch = draws(buffer, 8, 1, 0.9)
    before = [array.copy() for array in batch]
    for array in buffer:
        array[:] = 1
    for old, new in zip(before, batch, strict=True):
        np.testing.assert_array_equal(old, new)


def linear_network(weights):
    return {"w0": jnp.array(weights, jnp.float32), "b0": jnp.zeros(len(weights[0]))}


def test_target_by_hand():
    """Q(s, a) = s * (1, 3) in the target network, s * (2, 1) online; one terminated and one truncated step."""
    batch = draws(ring(size=2, steps=2, ended={0: "terminated", 1: "truncated"}), 2, 1, 0.9, count=20)
    batch = dqn.Batch(*(array.reshape(20, *array.shape[2:]) for array in batch))
    params, target_params = linear_network([[2, 1]]), linear_network([[1, 3]])
    for double_dqn, value in ((False, 1 + 0.9 * 4.5), (True, 1 + 0.9 * 1.5)):
        target = dqn.td_target(params, target_params, batch, double_dqn, False)
        np.testing.assert_allclose(target, np.where(batch.obs[:, 0] == 0, 1, value), rtol=1e-6)


def test_update_by_hand():
    """The gradient is that of the action taken only; Adam's first step is the learning rate, by sign."""
    batch = dqn.Batch(np.ones((1, 1)), np.array([1]), np.array([5.0]), np.array([0.0]), np.ones((1, 1)))
    params = linear_network([[2, 1]])
    new, _, loss = dqn.update(params, params, dqn.optimizer.init(params), batch, 0.1, False, False)
    assert loss == (5 - 1) ** 2
    np.testing.assert_allclose(new["w0"], [[2, 1.1]], rtol=1e-5)
    np.testing.assert_allclose(new["b0"], [0, 0.1], rtol=1e-5)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_q_values_of_numpy_and_jax_agree(layer_norm):
    params = dqn.init_params(jax.random.key(0), (8, 16, 16, 4))
    obs = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    arrays = jax.tree.map(np.asarray, params)
    batch = dqn.q_values(params, jnp.array(obs), layer_norm)
    assert batch.shape == (5, 4)
    for i in range(5):
        one = dqn.q_values(arrays, obs[i], layer_norm)
        assert isinstance(one, np.ndarray) and one.shape == (4,)
        np.testing.assert_allclose(one, batch[i], rtol=1e-5, atol=1e-6)


def test_layer_norm_by_hand():
    np.testing.assert_allclose(dqn.normalize(np.array([[1.0, 3.0], [0.0, 10.0]])), [[-1, 1], [-1, 1]], atol=1e-4)
    params = {"w0": np.array([[1.0, 3.0]]), "b0": np.zeros(2), "w1": np.array([[5.0], [7.0]]), "b1": np.array([0.5])}
    np.testing.assert_allclose(dqn.q_values(params, np.array([2.0]), True), [7.5], atol=1e-3)  # ReLU of -1 and 1, then 7 + 0.5
    np.testing.assert_allclose(dqn.q_values(params, np.array([2.0]), False), [2 * 5 + 6 * 7 + 0.5])


def test_average_and_target_move_as_documented():
    args = dataclasses.replace(SMALL, gradient_steps=1, average_rate=0.25, tau=0.5, target_network_frequency=64)
    start = dqn.init_params(jax.random.key(0), (8, 32, 4))
    zero = jax.tree.map(jnp.zeros_like, start)
    learner = dqn.Learner(start, zero, zero, dqn.optimizer.init(start))
    shape = dqn.batch_shape(args)
    rng = np.random.default_rng(0)
    batches = dqn.Batch(
        rng.normal(size=(*shape, 8)).astype(np.float32),
        rng.integers(4, size=shape).astype(np.int32),
        np.ones(shape, np.float32),
        np.zeros(shape, np.float32),
        np.zeros((*shape, 8), np.float32),
    )
    early, loss = dqn.learn(args, learner, batches, np.int32(48))
    due, _ = dqn.learn(args, learner, batches, np.int32(64))
    assert loss > 0 and np.any(early.params["w0"] != start["w0"])
    np.testing.assert_allclose(early.average_params["w0"], 0.25 * early.params["w0"], rtol=1e-6)
    np.testing.assert_array_equal(early.target_params["w0"], 0)
    np.testing.assert_allclose(due.target_params["w0"], 0.5 * due.params["w0"], rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------- Training


@pytest.mark.parametrize("how,value", [("truncated", 10), ("terminated", 1)])
@pytest.mark.parametrize("n_step", [1, 3])
def test_value_of_a_probe(how, value, n_step):
    """A truncated step bootstraps: reward 1 for ever is worth 1 / (1 - gamma). A terminated one does not."""
    args = dqn.Args(
        env_id=f"Probe-{how}-v0",
        total_timesteps=3_000,
        learning_starts=100,
        buffer_size=1_000,
        hidden_sizes=(),
        gamma=0.9,
        learning_rate=0.1,
        tau=0.5,
        n_step=n_step,
        reward_scale=1.0,
        average_rate=0.05,
        eval_episodes=2,
    )
    result = dqn.train(args)
    np.testing.assert_allclose(dqn.q_values(result.params, np.ones(1, np.float32), False), value, rtol=0.03)
    np.testing.assert_array_equal(result.episodes, np.stack([np.arange(1, 3_001), np.ones(3_000), np.ones(3_000)], axis=1))


def test_rewards_are_scaled_for_learning_only():
    args = dqn.Args(
        env_id="Probe-terminated-v0", total_timesteps=2_000, learning_starts=100, hidden_sizes=(), learning_rate=0.1
    )
    result = dqn.train(dataclasses.replace(args, reward_scale=0.1, average_rate=0.05))
    np.testing.assert_allclose(dqn.q_values(result.params, np.ones(1, np.float32), False), 0.1, rtol=0.03)
    np.testing.assert_array_equal(result.episodes[:, 1], 1)
    np.testing.assert_array_equal(dqn.evaluate(dataclasses.replace(args, eval_episodes=2), result.params), 1)


def test_updates_happened_and_episodes_are_gymnasiums():
    start = dqn.init_params(jax.random.key(SMALL.seed), (8, 32, 4))
    losses = []
    result = dqn.train(SMALL, report=lambda env_steps, seconds, episodes, loss: losses.append(float(loss)))
    assert len(losses) == 3 and min(losses) > 0
    for name, values in result.params.items():
        assert np.all(np.isfinite(values)) and np.abs(values - start[name]).max() > 1e-3
    steps, returns, lengths = result.episodes.T
    np.testing.assert_array_equal(np.cumsum(lengths), steps)
    assert steps[-1] <= 3_000 and returns.min() > -2_000 and returns.max() < 350 and len(steps) > 10


def test_same_seed_same_bits_other_seed_other_agent():
    """Although learning overlaps acting, and although snapshots come between."""
    first = dqn.train(SMALL)
    pictures = []
    again = dqn.train(
        dataclasses.replace(SMALL, eval_frequency=1_000),
        snapshot=lambda step, params: pictures.append((step, dqn.evaluate(SMALL, params))),
    )
    other = dqn.train(dataclasses.replace(SMALL, seed=2))
    assert [step for step, _ in pictures] == [1_000, 2_000, 3_000]
    np.testing.assert_array_equal(first.episodes, again.episodes)
    for name in first.params:
        np.testing.assert_array_equal(first.params[name], again.params[name])
        if name.startswith("w"):
            assert not np.any(first.params[name] == other.params[name])
    assert first.episodes[0, 1] != other.episodes[0, 1]


def test_learns_cartpole():
    """A tenth of a second of episodes last about 20 steps at first; the flags of the README's CartPole, shortened, learn."""
    args = dqn.Args(env_id="CartPole-v1", seed=3, total_timesteps=12_000, learning_starts=500, eval_episodes=10)
    result = dqn.train(args)
    assert dqn.evaluate(args, result.params).mean() > 100 > 3 * result.episodes[:20, 1].mean()


def test_early_stop_is_at_the_published_criterion():
    gymnasium.register("Probe-easy-v0", entry_point=partial(Probe, "terminated"), reward_threshold=1.0)
    args = dqn.Args(env_id="Probe-easy-v0", total_timesteps=2_000, learning_starts=50, hidden_sizes=(4,), early_stop=True)
    assert dqn.train(args).env_steps == 100  # the first moment with 100 episodes
    assert dqn.train(dataclasses.replace(args, early_stop=False)).env_steps == 2_000


def test_evaluation_tells_a_bad_policy():
    params = {"w0": np.zeros((8, 4), np.float32), "b0": np.array([1, 0, 0, 0], np.float32)}  # never fires an engine
    returns = dqn.evaluate(SMALL, params)
    assert returns.shape == (3,) and returns.max() < 0


# --------------------------------------------------------------------------------------------------------- Command line

FLAGS = "--total-timesteps 3000 --learning-starts 500 --eval-episodes 3 --hidden-sizes 32".split()


def run(*flags, **options):
    command = [sys.executable, str(SCRIPT), *FLAGS, *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_snapshots_and_videos_without_a_display(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "SDL_VIDEODRIVER")}
    flags = "--eval-frequency 1500 --snapshot-episodes 2 --capture-video --output-dir run".split()
    done = run(*flags, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("snapshot: mean") == 2
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        *("model.npz", "returns.csv", "curve.png", "summary.json", "video.gif"),
        *("model_1500.npz", "model_3000.npz", "video_1500.gif", "video_3000.gif"),
    }
    frames = imageio.v3.imread(tmp_path / "run" / "video.gif")
    assert len(frames) > 10 and frames.shape[1:] == (200, 300, 3) and np.any(frames[0] != frames[-1])
    first, last = (dqn.load_model(tmp_path / "run" / f"model_{step}.npz") for step in (1_500, 3_000))
    assert np.any(first["w0"] != last["w0"])
    kept = dqn.load_model(tmp_path / "run" / "model.npz")
    for name in kept:
        np.testing.assert_array_equal(last[name], kept[name])


UNSUITABLE = {
    "Pendulum-v1": "Discrete actions, but Pendulum-v1 has Box",
    "FrozenLake-v1": "flat Box observation, but FrozenLake-v1 has Discrete",
    "Blackjack-v1": "flat Box observation, but Blackjack-v1 has Tuple",
    "CarRacing-v3": "flat Box observation, but CarRacing-v3 has Box(0, 255, (96, 96, 3)",
    "LunarLander-v99": "must name a Gymnasium environment",
    "Nothing": "must name a Gymnasium environment",
    "nomodule:Nothing-v0": "must name a Gymnasium environment",
}


@pytest.mark.parametrize("env_id", UNSUITABLE)
def test_unsuitable_environments(env_id, capsys):
    assert dqn.main(dqn.Args(env_id=env_id)) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert UNSUITABLE[env_id] in printed.err


def test_a_missing_box2d_is_named_with_its_command(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("gymnasium.envs.box2d")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "Box2D", None)
    assert dqn.main(dqn.Args()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and 'pip install "gymnasium[box2d]"' in error


def test_a_missing_renderer_ends_before_training(monkeypatch, capsys, tmp_path):
    for name in [name for name in sys.modules if name.split(".")[0] == "pygame"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "pygame", None)
    args = dataclasses.replace(CARTPOLE, capture_video=True, output_dir=str(tmp_path / "run"))
    assert dqn.main(args) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot render CartPole-v1" in error and "pip install" in error
    assert not (tmp_path / "run").exists()


def test_an_environment_without_a_threshold():
    done = run("--env-id", "gymnasium.envs.classic_control:MountainCar-v0", "--early-stop")
    assert done.returncode in (0, 2)
    code = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import test_dqn_lunarlander as probe, dqn_lunarlander as dqn
args = dqn.Args(env_id="Probe-truncated-v0", total_timesteps=2000, hidden_sizes=(4,), eval_episodes=2)
assert dqn.main(args) == 0
assert dqn.main(probe.dataclasses.replace(args, early_stop=True)) == 2
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (
        "no threshold" in done.stdout
        and done.stderr == "error: early_stop needs a reward threshold, and Probe-truncated-v0 has none\n"
    )

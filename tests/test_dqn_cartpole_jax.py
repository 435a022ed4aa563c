"""What would break for a user of dqn_cartpole_jax.py."""

import pathlib
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import dqn_cartpole_jax as dqn  # noqa: E402

jax.config.update("jax_num_cpu_devices", 1)  # main() sets it, which JAX refuses once it has run a program
SMALL = dqn.Args(total_timesteps=6_400, learning_starts=1_280, buffer_size=6_400, eval_episodes=10)


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """Runs with the same settings share a compiled program, which need not be fast."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_disable_most_optimizations", True)


def assert_close(ours, expected, tolerance=0.0):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), ours, expected)


def fresh_agent(args):
    return jax.tree.map(lambda x: x[0], dqn.init_agents(args, [np.random.default_rng(0)]))


def test_the_environment_is_gymnasiums():
    """Three carts side by side: one is balanced until the time limit, two are pushed at random until they fall."""
    rng, step, ends, time = np.random.default_rng(0), jax.jit(dqn.step), np.zeros(2, int), np.zeros(3, np.int32)
    envs = [gymnasium.make("CartPole-v1") for _ in range(3)]
    _ = [env.reset(seed=0) for env in envs]
    for _ in range(500):
        obs = np.float32([env.unwrapped.state for env in envs])
        action = np.append(obs[0] @ [0.02, 0.05, 1, 0.5] > 0, rng.integers(2, size=2)).astype(np.int32)
        state, reward, terminated, truncated = step(dqn.EnvState(obs, time), action)
        for i, env in enumerate(envs):
            their_obs, *theirs, _ = env.step(int(action[i]))
            assert_close(state.obs[i], their_obs, 1e-5)
            assert [reward[i], terminated[i], truncated[i]] == theirs
            if theirs[1] or theirs[2]:
                env.reset()
        ends += terminated.sum(), truncated.sum()
        time = np.where(terminated | truncated, 0, state.time)
    assert ends[0] > 20 and ends[1] == 1 and gymnasium.spec("CartPole-v1").reward_threshold == dqn.SOLVED_RETURN
    assert_close(dqn.reset(np.float32([[0, 0.25, 0.5, 1]])).obs, np.array([[-0.05, -0.025, 0, 0.05]]), 1e-7)


class Story:
    """Twelve random steps of two environments. In the middle, one episode terminates and one is truncated."""

    def __init__(self):
        rng = np.random.default_rng(0)
        start, self.next_obs = rng.normal(size=(2, 12, 2, 4)).astype(np.float32)
        self.start, self.obs = np.roll(start, -1, axis=0), np.concatenate([start[:1], self.next_obs[:-1]])
        self.reward, self.action = rng.normal(size=(12, 2)).astype(np.float32), rng.integers(2, size=(12, 2))
        self.terminated, self.truncated = np.zeros((2, 12, 2), bool)
        self.terminated[4, 0] = self.truncated[6, 1] = True
        self.obs[5, 0], self.obs[7, 1] = start[5, 0], start[7, 1]

    def transition(self, first, i, n, gamma=0.9):
        """The n-step transition that begins at step `first`: obs, action, reward, discount, next_obs in a row."""
        total, t = self.reward[first, i], first
        while not (self.terminated[t, i] or self.truncated[t, i] or t == first + n - 1):
            t += 1
            total += gamma ** (t - first) * self.reward[t, i]
        discount = 0 if self.terminated[t, i] else gamma ** (t - first + 1)
        return np.hstack([self.obs[first, i], self.action[first, i], total, discount, self.next_obs[t, i]])


@pytest.mark.parametrize("n_step", [1, 3])
def test_batches_hold_every_complete_transition_of_the_ring_and_no_other(n_step, monkeypatch):
    """The loop lives through a story, its time set from outside. A grid of noise draws each place of the ring."""
    story, args = Story(), dqn.Args(num_envs=2, n_step=n_step, buffer_size=8, batch_size=64, gamma=0.9, end_e=1.0)
    agent, told = fresh_agent(args), [jnp.array(x) for x in (story.next_obs, story.reward, story.terminated, story.truncated)]

    def step(state, action):
        next_obs, *rest = (x[state.time[0]] for x in told)
        return dqn.EnvState(next_obs, state.time), *rest

    monkeypatch.setattr(dqn, "step", step)
    monkeypatch.setattr(dqn, "update", lambda args, _, target_params, opt_state, batch: (target_params, opt_state, batch))
    grid = np.tile((np.arange(64) + 0.5) / 64, (12, 1))
    noise = np.hstack([np.zeros((12, 2)), 0.5 * story.action + 0.25, 10 * story.start.reshape(12, 8) + 0.5, grid])
    chunk, target = jax.jit(partial(dqn.train_chunk, args)), jax.tree.map(np.zeros_like, agent.params)
    agent = agent._replace(env_state=dqn.EnvState(story.obs[0], None), target_params=target)
    for t in range(12):
        agent = agent._replace(env_state=agent.env_state._replace(time=np.full(2, t, np.int32)))
        agent, _, _, batches = chunk(agent, 2 * t, np.float32(noise[t : t + 1]))
        begun = range(max(0, t - n_step - 2), t - n_step + 2)  # the last 4 that are complete
        assert not np.any(agent.params["w0"])  # the mocked update returned the target network
        if begun:
            drawn = np.column_stack([x[0] for x in batches[:5]])
            expected = [story.transition(first, i, n_step) for first in begun for i in range(2)]
            assert_close(np.unique(drawn, axis=0), np.unique(expected, axis=0), 1e-5)


def gradient(loss_of, params, eps=1e-4):
    grads = {name: np.zeros_like(x) for name, x in params.items()}
    for name, i in [(name, i) for name, x in params.items() for i in np.ndindex(x.shape)]:
        bump = np.zeros_like(params[name])
        bump[i] = eps
        grads[name][i] = loss_of(params | {name: params[name] + bump}) - loss_of(params | {name: params[name] - bump})
    return {name: x / (2 * eps) for name, x in grads.items()}


def test_an_update_is_a_step_of_adam_on_the_squared_error():
    """Against NumPy. Truncated steps bootstrap. The step size is 0 before update 3, then falls linearly until update 10."""
    args = dqn.Args(num_envs=8, learning_starts=24, total_timesteps=80, learning_rate=0.02, end_learning_rate=0.004)
    story, rng = Story(), np.random.default_rng(0)
    params, target = ({k: rng.normal(size=x.shape) for k, x in dqn.init_params(rng, (4, 6, 2)).items()} for _ in range(2))

    def q(params, obs):
        hidden = np.maximum(obs / np.array([2.4, 2, 0.2095, 2]) @ params["w0"].T + params["b0"][:, 0], 0)
        return hidden @ params["w1"].T + params["b1"][:, 0]

    def loss_of(params):
        y = story.reward + 0.9 * np.where(story.terminated, 0, q(target, story.next_obs).max(axis=-1))
        return np.mean((y - np.take_along_axis(q(params, story.obs), story.action[..., None], -1)[..., 0]) ** 2)

    batch = (story.obs, story.action, story.reward, np.float32(0.9 * ~story.terminated), story.next_obs, story.terminated)
    batch = dqn.Transition(*(x.reshape(24, *x.shape[2:]) for x in batch))
    ours, ours_target = jax.tree.map(np.float32, (params, target))
    (adam, schedule), update = dqn.make_optimizer(args).init(ours), jax.jit(partial(dqn.update, args))
    grads = gradient(loss_of, params)
    directions = jax.tree.map(lambda g: g / (np.abs(g) + 1e-8), grads)
    for count, size in ((2, 0), (3, 0.0152), (9, 0.0056), (11, 0.004)):
        new, (after, _), loss = update(ours, ours_target, (adam, schedule._replace(count=np.int32(count))), batch)
        assert_close(loss, loss_of(params), 1e-4)
        assert_close(after.mu, jax.tree.map(lambda g: 0.1 * g, grads), 1e-4)
        assert_close(new, {name: x - size * directions[name] for name, x in params.items()}, 1e-4)


@pytest.mark.parametrize("tau,frequency", [(1, 20), (0.05, 24)])
def test_weights_wait_for_learning_starts_and_the_target_network_follows_on_schedule(tau, frequency):
    """By tau after each joint step of 8 in which a multiple of target_network_frequency lies."""
    args = dqn.Args(num_envs=8, n_step=3, buffer_size=80, learning_starts=40, tau=tau, target_network_frequency=frequency)
    chunk, agent, moved = jax.jit(partial(dqn.train_chunk, args)), fresh_agent(args), []
    expected = agent.params
    for t in range(0, 96, 8):
        before = agent.params
        agent, *_ = chunk(agent, t, np.random.default_rng(t).random((1, 8 * 6 + 64), np.float32))
        moved.append(np.any(agent.params["w0"] != before["w0"]))
        if (t + 8) // frequency > t // frequency:
            expected = jax.tree.map(lambda old, new: old + tau * (new - old), expected, agent.params)
        assert_close(agent.target_params, expected, 1e-6)
    assert moved == [False] * 5 + [True] * 7


def test_epsilon_falls_and_stays():
    """Weights of 0 choose action 0 and the noise names action 1, so the mean action of 100 environments is epsilon."""
    args = dqn.Args(num_envs=100, n_step=1, total_timesteps=1_000, start_e=0.8, end_e=0.2, buffer_size=100)
    agent, chunk = fresh_agent(args), jax.jit(partial(dqn.train_chunk, args))
    agent = agent._replace(params=jax.tree.map(np.zeros_like, agent.params))
    noise = np.float32([*(np.arange(100) + 0.5) / 100, *[0.75] * 100, *[0.5] * 464])
    for t, epsilon in ((0, 0.8), (200, 0.56), (500, 0.2), (900, 0.2)):
        assert_close(chunk(agent, t, noise[None])[0].queue.action[-1].mean(), epsilon, 1e-6)


def test_same_seed_same_bits_other_seed_other_agent():
    (params, episodes, _), again, other = (dqn.train(replace(SMALL, seed=seed)) for seed in (1, 1, 2))
    assert_close(again[:2], (params, episodes))
    assert not any(np.any(params[name] == other[0][name]) for name in ("w0", "w1"))
    steps, returns, _ = episodes.T  # 1 for every step, so what is missing are the running episodes
    assert np.all(np.diff(steps) > 0) and 6_400 - 64 * 200 < returns.sum() <= again[2]["env_steps"] == 6_400


def test_seeds_trained_together_are_the_seeds_trained_alone(tmp_path):
    """Four seeds on two devices."""
    code = f"""
import jax, numpy as np, dqn_cartpole_jax as dqn
jax.config.update("jax_num_cpu_devices", 2)
params, episodes, _ = dqn.train(dqn.{replace(SMALL, seed=5, num_seeds=4)})
assert len(params["w0"]) == 4 and jax.device_count() == 2
np.savez({str(tmp_path / "together.npz")!r}, episodes=episodes, **params)"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=ROOT)
    together = dict(np.load(tmp_path / "together.npz"))
    episodes = together.pop("episodes")
    for k in range(4):
        params, alone, _ = dqn.train(replace(SMALL, seed=5 + k))
        assert_close({name: x[k] for name, x in together.items()}, params, 0.01)
        assert_close(episodes[episodes[:, 2] == 5 + k][:100], alone[:100])


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_the_compiled_loop_does_not_copy_the_buffer(num_seeds):
    """A chunk takes less memory beside its arguments than a copy of the buffer's smallest field."""
    args = replace(SMALL, buffer_size=640_000)
    agent = dqn.init_agents(args, [np.random.default_rng(k) for k in range(num_seeds)])
    chunk = jax.jit(jax.vmap(partial(dqn.train_chunk, args), (0, None, 0)), donate_argnums=0)
    lowered = chunk.lower(agent, np.int32(0), np.zeros((num_seeds, 10, 64 * 6 + 64), np.float32))
    compiled = lowered.compile({"xla_backend_optimization_level": 1})
    assert compiled.memory_analysis().temp_size_in_bytes < 640_000 * num_seeds


def test_ctrl_c_returns_the_last_chunk(monkeypatch):
    """After three of eight chunks: what a run of three chunks returns, for without schedules they are the same steps."""
    args, isfinite, go_on = dqn.Args(end_learning_rate=0.01, start_e=0.15), np.isfinite, iter([True, True, False])
    whole = dqn.train(replace(args, total_timesteps=96_000))
    stop = partial(signal.raise_signal, signal.SIGINT)
    monkeypatch.setattr(np, "isfinite", lambda x: stop() if isinstance(x, np.floating) and not next(go_on) else isfinite(x))
    interrupted = dqn.train(args)
    assert_close(interrupted[:2], whole[:2])
    assert interrupted[2]["env_steps"] == 96_000 and interrupted[2]["interrupted"] and not whole[2]["interrupted"]


def test_a_kept_model_balances_gymnasiums_pole(tmp_path):
    """The defaults, as a user runs them, and then q_values alone on what they keep."""
    assert dqn.main(dqn.Args(output_dir=str(tmp_path / "run"))) == 0
    params, q_values = dqn.load_model(tmp_path / "run" / "model.npz"), jax.jit(dqn.q_values)
    env = gymnasium.make("CartPole-v1")
    for episode in range(5):
        obs, total, ended = env.reset(seed=episode)[0], 0, False
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(int(q_values(params, obs[None])[0].argmax()))
            total, ended = total + reward, terminated or truncated
        assert total >= 400
    always_right = params | {"w1": 0 * params["w1"], "b1": np.float32([[0], [1]])}
    assert set(dqn.evaluate(SMALL, always_right)[0]) <= {8, 9, 10, 11}

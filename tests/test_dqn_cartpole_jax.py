"""What would break for a user of dqn_cartpole_jax.py."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
from functools import partial

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ROOT / "dqn_cartpole_jax.py"
sys.path.insert(0, str(ROOT))
import dqn_cartpole_jax as dqn  # noqa: E402

SMALL = dqn.Args(total_timesteps=6_400, learning_starts=1_280, buffer_size=6_400, eval_episodes=10)
FLAGS = "--total-timesteps 6400 --learning-starts 1280 --buffer-size 6400 --eval-episodes 10".split()


def run(*flags, script=SCRIPT, **options):
    command = [sys.executable, str(script), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture(scope="module")
def trained():
    return dqn.train(SMALL)


# ---------------------------------------------------------------------------------------------------------- Environment


def assert_same_step(env, state, action):
    """Steps both from `state` (arrays of one environment), compares, and returns the next state and whether it ended."""
    env.unwrapped.state = np.asarray(state.obs[0], np.float64)
    env.unwrapped.steps_beyond_terminated = None
    obs, reward, terminated, truncated, _ = env.step(int(action))
    state, our_reward, our_terminated, our_truncated = dqn.step(state, jnp.array([action]))
    np.testing.assert_allclose(state.obs[0], obs, rtol=1e-5, atol=1e-6)
    assert (our_reward[0], our_terminated[0], our_truncated[0]) == (reward, terminated, truncated)
    return state, terminated or truncated


def test_environment_agrees_with_gymnasium_over_random_steps():
    env, rng = gymnasium.make("CartPole-v1"), np.random.default_rng(0)
    terminations = 0
    ended = True
    for _ in range(1_500):
        if ended:
            env.reset(seed=int(rng.integers(1 << 30)))
            state = dqn.reset(rng.random((1, 4), dtype=np.float32))
        state, ended = assert_same_step(env, state, rng.integers(2))
        terminations += ended
    assert terminations > 20


def test_environment_agrees_with_gymnasium_over_a_truncated_episode():
    env = gymnasium.make("CartPole-v1")
    env.reset(seed=0)
    state = dqn.reset(np.full((1, 4), 0.6, np.float32))
    for i in range(500):
        x, x_dot, theta, theta_dot = np.asarray(state.obs[0])
        state, ended = assert_same_step(env, state, theta + 0.5 * theta_dot + 0.02 * x + 0.05 * x_dot > 0)
        assert ended == (i == 499)
    assert dqn.step(state._replace(time=state.time - 1), jnp.array([0]))[3][0]  # truncated, and not by the pole
    assert not dqn.step(state._replace(time=state.time - 1), jnp.array([0]))[2][0]


def test_starts_are_gymnasiums():
    obs = dqn.reset(np.random.default_rng(0).random((10_000, 4), dtype=np.float32)).obs
    assert -0.05 <= obs.min() < -0.0499 and 0.0499 < obs.max() <= 0.05
    assert gymnasium.spec("CartPole-v1").max_episode_steps == dqn.MAX_STEPS
    assert gymnasium.spec("CartPole-v1").reward_threshold == dqn.SOLVED_RETURN


def test_stored_next_obs_is_from_before_the_reset():
    args = dataclasses.replace(SMALL, num_envs=2, train_frequency=2, n_step=1, scale_obs=False)
    agent = dqn.init_agent(args, 0)
    falling = jnp.array([[0.0, 0.0, 0.2, 3.0], [2.39, 3.0, 0.0, 0.0]])
    agent = agent._replace(env_state=dqn.EnvState(falling, jnp.array([5, 498])))
    agent, returns = dqn.act_and_store(args, agent, np.int32(0), jnp.full((2, 6), 0.5))
    assert np.abs(agent.buffer.next_obs[0, 2]) > 0.25 and agent.buffer.next_obs[1, 0] > 2.4
    assert np.all(np.abs(agent.env_state.obs) <= 0.05) and np.all(agent.env_state.time == 0)
    np.testing.assert_array_equal(agent.buffer.terminated[:2], True)
    np.testing.assert_array_equal(agent.buffer.truncated[:2], False)
    np.testing.assert_array_equal(returns, 1)


# ------------------------------------------------------------------------------------------------ Buffer and targets


def ring(size, num_envs, steps, ended=()):
    """A buffer after `steps` environment steps: obs holds the step, reward 1, `ended` maps a step to how it ended."""
    zeros = jnp.zeros(size)
    buffer = dqn.Transition(zeros[:, None], zeros.astype(int), zeros, zeros[:, None], zeros > 0, zeros > 0)
    ended = dict(ended)
    for t in range(0, steps, num_envs):
        now = np.arange(t, t + num_envs)
        how = np.array([ended.get(i, "") for i in now])
        buffer = dqn.add(
            buffer,
            t,
            dqn.Transition(
                jnp.float32(now)[:, None],
                jnp.array(now % 2),
                jnp.ones(num_envs),
                jnp.float32(now + 0.5)[:, None],
                jnp.array(how == "terminated"),
                jnp.array(how == "truncated"),
            ),
        )
    return buffer


def test_ring_overwrites_the_oldest():
    buffer = ring(size=8, num_envs=2, steps=12)
    np.testing.assert_array_equal(buffer.obs[:, 0], [8, 9, 10, 11, 4, 5, 6, 7])
    np.testing.assert_array_equal(buffer.next_obs[:, 0], np.array([8, 9, 10, 11, 4, 5, 6, 7]) + 0.5)


@pytest.mark.parametrize("steps", [6, 8, 10, 12, 14, 16, 22])
@pytest.mark.parametrize("n_step", [1, 2, 3])
def test_sample_draws_every_full_run_and_no_other(steps, n_step):
    """Every run of n joint steps that lies in the ring comes up, none crosses from the newest step into the oldest."""
    buffer = ring(size=8, num_envs=2, steps=steps)
    noise = (np.arange(1_000, dtype=np.float32) + 0.5) / 1_000
    batch = dqn.sample(buffer, steps, noise, num_envs=2, n_step=n_step, gamma=0.5)
    oldest = max(0, steps - 8)
    assert set(np.asarray(batch.obs[:, 0]).tolist()) == set(range(oldest, steps - 2 * (n_step - 1)))
    np.testing.assert_array_equal(batch.next_obs[:, 0], batch.obs[:, 0] + 2 * (n_step - 1) + 0.5)
    np.testing.assert_array_equal(batch.action, batch.obs[:, 0] % 2)
    np.testing.assert_allclose(batch.reward, sum(0.5**k for k in range(n_step)))
    np.testing.assert_allclose(batch.discount, 0.5**n_step)


def test_sample_reaches_the_ends_of_its_range_at_a_million():
    size = 1_000_000
    buffer = jax.tree.map(lambda x: jnp.resize(x, (size, *x.shape[1:])), ring(size=8, num_envs=1, steps=8))
    buffer = buffer._replace(obs=jnp.arange(size, dtype=jnp.float32)[:, None])
    batch = dqn.sample(buffer, 1_500_000, np.array([0.0, 1 - 2**-24], np.float32), 1, 1, 0.9)
    assert batch.obs[0, 0] == 500_000 and batch.obs[1, 0] == 499_999  # the oldest and the newest


def test_a_run_stops_where_its_episode_ends():
    """Environment 0 of 2 terminates at step 4, environment 1 is truncated at step 5."""
    buffer = ring(size=20, num_envs=2, steps=20, ended={4: "terminated", 5: "truncated"})
    noise = (np.arange(14, dtype=np.float32) + 0.5) / 14
    batch = dqn.sample(buffer, 20, noise, num_envs=2, n_step=4, gamma=0.5)
    by_start = {int(obs): i for i, obs in enumerate(batch.obs[:, 0])}
    for start, rewards, discount, end in ((0, 1.75, 0, 4.5), (2, 1.5, 0, 4.5), (4, 1, 0, 4.5), (6, 1.875, 1 / 16, 12.5)):
        i = by_start[start]
        assert (batch.reward[i], batch.discount[i], batch.next_obs[i, 0]) == (rewards, discount, end)
    for start, rewards, discount, end in (
        (1, 1.75, 1 / 8, 5.5),
        (3, 1.5, 1 / 4, 5.5),
        (5, 1, 1 / 2, 5.5),
        (7, 1.875, 1 / 16, 13.5),
    ):
        i = by_start[start]
        assert (batch.reward[i], batch.discount[i], batch.next_obs[i, 0]) == (rewards, discount, end)


def linear_network(weights):
    return {"w0": jnp.array(weights, jnp.float32), "b0": jnp.zeros(len(weights[0]))}


def test_target_by_hand():
    """Q(s, a) = s * (1, 3) in the target network, s * (2, 1) online; one terminated and one truncated transition."""
    buffer = ring(size=2, num_envs=1, steps=2, ended={0: "terminated", 1: "truncated"})
    batch = dqn.sample(buffer, 2, np.array([0.1, 0.9], np.float32), 1, 1, gamma=0.9)
    params, target_params = linear_network([[2, 1]]), linear_network([[1, 3]])
    # next_obs is 0.5 and 1.5: terminated 1; truncated 1 + 0.9 * max(1.5, 4.5), or double 1 + 0.9 * 1.5
    np.testing.assert_allclose(dqn.td_target(params, target_params, batch, False), [1, 1 + 0.9 * 4.5], rtol=1e-6)
    np.testing.assert_allclose(dqn.td_target(params, target_params, batch, True), [1, 1 + 0.9 * 1.5], rtol=1e-6)


def test_update_by_hand():
    """The gradient is that of the online network's own action only; Adam's first step is the learning rate, by sign."""
    batch = dqn.Batch(jnp.array([[1.0]]), jnp.array([1]), jnp.array([5.0]), jnp.array([0.0]), jnp.array([[1.0]]))
    params = linear_network([[2, 1]])
    new, _, loss = dqn.update(params, params, dqn.optimizer.init(params), batch, 0.1, False)
    assert loss == (5 - 1) ** 2
    np.testing.assert_allclose(new["w0"], [[2, 1.1]], rtol=1e-5)
    np.testing.assert_allclose(new["b0"], [0, 0.1], rtol=1e-5)


def test_value_of_a_state_that_is_only_ever_truncated():
    """Reward 1 for ever, cut every step: the value must approach 1 / (1 - gamma), and 1 where it terminates instead."""
    for how, value in (("truncated", 10), ("terminated", 1)):
        buffer = ring(size=4, num_envs=1, steps=4, ended={i: how for i in range(4)})
        buffer = buffer._replace(obs=jnp.ones((4, 1)), next_obs=jnp.ones((4, 1)))
        params = linear_network([[0, 0]])
        target_params, opt_state = params, dqn.optimizer.init(params)
        update = jax.jit(partial(dqn.update, double_dqn=False))
        for i in range(400):
            batch = dqn.sample(buffer, 4, np.random.default_rng(i).random(8, dtype=np.float32), 1, 1, 0.9)
            params, opt_state, _ = update(params, target_params, opt_state, batch, 0.1)
            target_params = jax.tree.map(lambda old, new: 0.7 * old + 0.3 * new, target_params, params)
        np.testing.assert_allclose(dqn.q_values(params, jnp.ones((1, 1)))[0], value, rtol=0.05)


def test_target_network_period_and_tau():
    args = dataclasses.replace(SMALL, tau=0.25, target_network_frequency=128)
    agent = dqn.init_agent(args, 0)
    agent = agent._replace(target_params=jax.tree.map(jnp.zeros_like, agent.params))
    noise = jnp.zeros((1, args.batch_size))
    not_yet, _ = dqn.learn(args, agent, 64, noise)  # before learning_starts: the weights do not move
    due, _ = dqn.learn(args, agent, 128, noise)
    np.testing.assert_array_equal(not_yet.target_params["w0"], 0)
    np.testing.assert_array_equal(due.params["w0"], agent.params["w0"])
    np.testing.assert_allclose(due.target_params["w0"], 0.25 * agent.params["w0"], rtol=1e-6)


@pytest.mark.parametrize("step,epsilon", [(0, 1.0), (32_000, 0.7875), (64_000, 0.575), (128_000, 0.15), (256_000, 0.15)])
def test_epsilon_at_stated_steps(step, epsilon):
    """Of many environments at one moment the share of actions that differ from greedy is epsilon / 2."""
    args = dqn.Args(num_envs=16_000, train_frequency=16_000, buffer_size=16_000, n_step=1)
    agent = dqn.init_agent(args, 0)
    noise = jnp.array(np.random.default_rng(0).random((16_000, 6), dtype=np.float32))
    obs = dqn.scale(args, agent.env_state.obs)
    agent, _ = dqn.act_and_store(args, agent, np.int32(step), noise)
    greedy = dqn.q_values(agent.params, obs).argmax(1)
    share = np.mean(np.asarray(agent.buffer.action) != np.asarray(greedy))
    assert abs(share - epsilon / 2) < 0.015
    assert abs(dqn.linear_schedule(1.0, 0.15, np.float32(step / 128_000)) - epsilon) < 1e-6


# ------------------------------------------------------------------------------------------------------------- Training


def test_updates_and_target_updates_happened(trained):
    start = dqn.init_agent(SMALL, SMALL.seed)
    agent, returns, losses = jax.jit(partial(dqn.train_chunk, SMALL, 100))(start, 0)
    losses = np.asarray(losses)
    learning = 64 * np.arange(1, 101) >= SMALL.learning_starts
    assert np.all(losses[learning] > 0) and np.all(losses[~learning] == 0)
    assert int(jax.tree.leaves(agent.opt_state)[0]) == learning.sum()  # Adam's own count of its steps
    for name, values in agent.params.items():
        assert np.all(np.isfinite(values))
        moved, followed = (
            np.abs(values - start.params[name]).max(),
            np.abs(agent.target_params[name] - start.params[name]).max(),
        )
        assert moved > 0.01 and followed > 0.001
    assert trained.env_steps == 6_400
    assert np.nanmax(returns) > 9


def test_episodes_add_up_to_the_steps():
    result = dqn.train(SMALL)
    steps, returns, seeds = result.episodes.T
    assert len(returns) > 100 and np.all(seeds == 1) and np.all(np.diff(steps) > 0) and steps[-1] <= 6_400
    assert 6_400 - 64 * 200 < returns.sum() <= 6_400  # reward 1 a step; what is missing are the running episodes
    assert returns.min() >= 8 and returns.max() <= 500


def test_same_seed_same_bits_other_seed_other_agent(trained):
    again, other = dqn.train(SMALL), dqn.train(dataclasses.replace(SMALL, seed=2))
    for name in trained.params:
        np.testing.assert_array_equal(trained.params[name], again.params[name])
        if name.startswith("w"):
            assert not np.any(trained.params[name] == other.params[name])
    np.testing.assert_array_equal(trained.episodes, again.episodes)

    agents = [dqn.init_agent(SMALL, seed) for seed in (1, 2)]
    assert not np.any(agents[0].params["w0"] == agents[1].params["w0"])
    chunks = [jax.jit(partial(dqn.train_chunk, SMALL, 1))(agent, 0)[0] for agent in agents]
    assert np.any(chunks[0].buffer.action[:64] != chunks[1].buffer.action[:64])
    assert np.all(np.any(chunks[0].buffer.obs[:64] != chunks[1].buffer.obs[:64], axis=1))


def test_no_key_is_used_twice():
    with jax.debug_key_reuse(True):
        agent = jax.jit(partial(dqn.init_agent, SMALL))(np.uint32(0))
        jax.jit(partial(dqn.train_chunk, SMALL, 30))(agent, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_step": 1},
        {"num_envs": 1, "train_frequency": 1, "n_step": 1},
        {"num_envs": 10, "train_frequency": 40, "gradient_steps": 3},
        {"num_seeds": 2},
        {"num_seeds": 2, "n_step": 1, "num_envs": 8, "train_frequency": 8},
    ],
)
def test_a_larger_buffer_needs_no_larger_copies(changes):
    """What a compiled chunk takes beside its arguments does not grow with the buffer: no step copies it."""

    def temporary_bytes(buffer_size):
        args = dataclasses.replace(SMALL, buffer_size=buffer_size, **changes)
        seeds = np.arange(args.num_seeds, dtype=np.uint32) if args.num_seeds > 1 else np.uint32(0)
        agent = jax.eval_shape(dqn.jit(args, partial(dqn.init_agent, args), 0), seeds)
        chunk = dqn.jit(args, partial(dqn.train_chunk, args, 10), (0, None), donate_argnums=0)
        return chunk.lower(agent, np.int32(0)).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(1_000_000) <= temporary_bytes(10_000) + 1_000


def test_seeds_trained_together_are_the_seeds_trained_alone():
    """Three seeds over two devices, as main() lays them, against three runs of their own."""
    flags = [*FLAGS, "--num-seeds", 3, "--seed", 5]
    code = f"""
import sys, jax, numpy as np
sys.path.insert(0, {str(ROOT)!r})
import dqn_cartpole_jax as dqn
jax.config.update("jax_num_cpu_devices", 2)
args = dqn.Args(seed=5, num_seeds=3, total_timesteps=6_400, learning_starts=1_280, buffer_size=6_400, eval_episodes=10)
result = dqn.train(args)
np.savez(sys.argv[1], returns=dqn.evaluate(args, result.params), episodes=result.episodes, **result.params)
"""
    path = pathlib.Path(os.environ.get("TMPDIR", "/tmp")) / f"together-{os.getpid()}.npz"
    try:
        subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=120)
        together = dqn.load_model(path)
    finally:
        path.unlink(missing_ok=True)
    for i, seed in enumerate((5, 6, 7)):
        args = dataclasses.replace(SMALL, seed=seed)
        alone = dqn.train(args)
        for name, values in alone.params.items():
            np.testing.assert_allclose(together[name][i], values, rtol=0.02, atol=0.02)
        episodes = together["episodes"][together["episodes"][:, 2] == seed]
        np.testing.assert_array_equal(episodes[:50], alone.episodes[:50])
        np.testing.assert_allclose(together["returns"][i], dqn.evaluate(args, alone.params), atol=20)
    done = run(*flags)
    assert done.returncode == 0 and re.search(r"solved \d of 3 .*mean .*95 % interval .*worst seed", done.stdout)


def test_defaults_solve_gymnasiums_cartpole():
    """A user's whole run, and then Gymnasium's own environment on the weights that came out."""
    args = dqn.Args(seed=3)
    result = dqn.train(args)
    ours = dqn.evaluate(args, result.params)
    assert ours.shape == (100,) and ours.mean() >= 475
    env = gymnasium.make("CartPole-v1")
    params = result.params
    theirs = []
    for episode in range(20):
        obs, _ = env.reset(seed=episode)
        total, ended = 0, False
        while not ended:
            h = obs / dqn.OBS_SCALE
            for i in range(2):
                h = np.maximum(h @ params[f"w{i}"] + params[f"b{i}"], 0)
            obs, reward, terminated, truncated, _ = env.step(int((h @ params["w2"] + params["b2"]).argmax()))
            total, ended = total + reward, terminated or truncated
        theirs.append(total)
    assert abs(np.mean(theirs) - ours.mean()) < 15


def test_evaluation_tells_a_bad_policy(trained):
    """A policy that always pushes right falls after about ten steps; the evaluation says so."""
    params = {name: np.zeros_like(values) for name, values in trained.params.items()}
    params["b2"] = np.array([0, 1], np.float32)
    returns = dqn.evaluate(SMALL, params)
    assert returns.shape == (10,) and 8 <= returns.min() and returns.max() <= 11


PUREJAXRL = (
    "--num-envs 10 --train-frequency 10 --buffer-size 10000 --batch-size 128 --hidden-sizes 120 84 --learning-rate 2.5e-4"
    " --no-anneal-lr --gamma 0.99 --n-step 1 --tau 1 --target-network-frequency 500 --learning-starts 1000 --end-e 0.05"
    " --no-scale-obs --total-timesteps 2000"
)
JYM = (
    "--num-envs 1 --train-frequency 1 --buffer-size 512 --batch-size 32 --hidden-sizes 64 64 64 --learning-rate 1e-3"
    " --no-anneal-lr --gamma 0.9 --n-step 1 --tau 1 --target-network-frequency 10 --learning-starts 32 --start-e 0.3"
    " --end-e 0.01 --exploration-fraction 1 --no-scale-obs --total-timesteps 500"
)
OTHER = "--num-envs 8 --train-frequency 32 --gradient-steps 2 --double-dqn --hidden-sizes 16 --total-timesteps 7013"


@pytest.mark.parametrize("flags", [PUREJAXRL, JYM, OTHER])
def test_other_settings_run(flags):
    done = run(*flags.split(), "--eval-episodes", 5)
    assert done.returncode == 0, done.stderr
    assert re.search(r"loss (?!0 )\S+ .*steps/s", done.stdout.splitlines()[-3])


def test_a_diverging_loss_ends_the_run():
    done = run(*FLAGS, "--learning-rate", "1e30")
    assert done.returncode == 1 and "not finite" in done.stderr and "Traceback" not in done.stderr


def test_training_starts_from_a_loaded_model(trained):
    result = dqn.train(dataclasses.replace(SMALL, learning_rate=1e-9), trained.params)
    for name in trained.params:
        np.testing.assert_allclose(result.params[name], trained.params[name], atol=1e-5)

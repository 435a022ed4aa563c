"""What would break for a user of dqn_cartpole_jax.py."""

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import Story, assert_adam_step, assert_close, two_networks

import dqn_cartpole_jax as dqn

ROOT = Path(__file__).resolve().parent.parent
SMALL = dqn.Args(total_timesteps=6_400, buffer_size=6_400, eval_episodes=10)


def one_agent(args):
    return jax.tree.map(lambda x: x[0], dqn.init_agents(args))


@pytest.mark.parametrize("cart", range(3))
def test_the_environment_is_gymnasiums(cart):
    """Cart 0 is balanced until the time limit, the others are pushed at random until they fall."""
    rng = np.random.default_rng(cart)
    step = jax.jit(partial(dqn.step, jax.random.key(0)))
    env = gymnasium.make("CartPole-v1")
    env.reset(seed=cart)
    time = 0
    ends = np.zeros(2, int)
    for _ in range(500):
        obs = np.float32(env.unwrapped.state)
        balancing = int(obs @ [0.02, 0.05, 1, 0.5] > 0)
        action = balancing if cart == 0 else int(rng.integers(2))
        state, *ours = step(dqn.EnvState(obs, time), action)
        their_obs, *theirs, _ = env.step(action)
        assert_close(state.obs, their_obs, 1e-5)
        assert ours == theirs  # reward, terminated, truncated
        ends += theirs[1:]
        time += 1
        if any(theirs[1:]):
            env.reset()
            time = 0
    assert ends[1] == 1 if cart == 0 else ends[0] > 10
    assert gymnasium.spec("CartPole-v1").reward_threshold == dqn.SOLVED_RETURN


# ---------- Replay buffer
@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("buffer_size", [7, 8])
def test_batches_hold_every_transition_of_the_ring_and_no_other(n_step, buffer_size):
    """After each step of the story; 512 draws from at most 8 places miss none."""
    story = Story()
    args = dqn.Args(num_envs=2, n_step=n_step, buffer_size=buffer_size, batch_size=512, gamma=0.9)
    zeros = jnp.zeros(buffer_size)
    obs = jnp.zeros((buffer_size, 4))
    buffer = dqn.Transition(obs, zeros.astype(int), zeros, zeros, obs, zeros.astype(bool))
    add = jax.jit(dqn.add)
    sample = jax.jit(partial(dqn.sample, args))
    for t in range(12):
        discount = np.float32(0.9) * ~story.terminated[t]
        new = [x[t] for x in (story.obs, story.action, story.reward)]
        new = dqn.Transition(*new, discount, story.next_obs[t], story.ended[t])
        buffer = add(buffer, 2 * t, new)
        batch = sample(jax.random.key(t), buffer, 2 * (t + 1))
        drawn = np.column_stack([np.float64(x) for x in batch[:5]])
        expected = []
        for number in range(max(0, 2 * (t + 1) - buffer_size), 2 * (t + 1)):
            expected.append(story.transition(number // 2, number % 2, n_step, 0.9, newest=t))
        order = np.unique(drawn.round(4), axis=0)
        assert_close(order, np.unique(np.array(expected).round(4), axis=0), 2e-4)


def test_the_loop_stores_what_happened(monkeypatch):
    """Forty steps of four carts with a time limit of 12: some fall, some run out of time."""
    monkeypatch.setattr(dqn, "MAX_STEPS", 12)
    args = dqn.Args(num_envs=4, buffer_size=160, gamma=0.5)
    loop = partial(jax.lax.scan, partial(dqn.joint_step, args), length=40)
    agent, (ended, returns, _) = jax.jit(loop)(one_agent(args))
    in_steps = partial(jax.tree.map, lambda x: np.asarray(x).reshape(40, 4, *x.shape[1:]))
    obs, action, reward, discount, next_obs, stored = in_steps(agent.buffer)
    assert np.all((stored == ended) & (reward == 1))
    time = np.zeros(4, int)
    for t in range(40):
        step = jax.vmap(partial(dqn.step, jax.random.key(0)))
        state, _, terminated, truncated = step(dqn.EnvState(obs[t], time), action[t])
        assert_close(next_obs[t], state.obs, 1e-6)
        assert np.all(ended[t] == (terminated | truncated))
        assert np.all(discount[t] == np.where(terminated, 0, 0.5))
        assert np.all(returns[t] == time + 1)
        time = np.where(ended[t], 0, time + 1)
        if t < 39:
            assert np.all(obs[t + 1][~ended[t]] == next_obs[t][~ended[t]])
            assert np.abs(obs[t + 1][ended[t]]).max(initial=0) <= 0.05
    assert np.any(discount == 0) and np.any(ended & (discount > 0))


def test_epsilon_falls_and_stays():
    """Weights of 0 make action 0 greedy, so the mean action is half of epsilon."""
    args = dqn.Args(num_envs=10_000, total_timesteps=1_000_000, end_e=0.2, buffer_size=10_000)
    agent = one_agent(args)
    learner = agent.learner._replace(params=jax.tree.map(jnp.zeros_like, agent.learner.params))
    agent = agent._replace(learner=learner)
    joint_step = jax.jit(partial(dqn.joint_step, args))
    for env_steps, epsilon in ((0, 1.0), (250_000, 0.6), (500_000, 0.2), (900_000, 0.2)):
        after, _ = joint_step(agent._replace(env_steps=env_steps), None)
        assert_close(after.buffer.action.mean(), epsilon / 2, 0.02)


def test_every_environment_and_step_has_random_numbers_of_its_own(monkeypatch):
    """And rewards may be of any numeric type and shape of one number."""

    def step(key, state, action):
        obs = jax.random.uniform(key, (4,))
        return dqn.EnvState(obs, state.time + 1), jnp.array([2]), obs[0] < 0.3, False

    monkeypatch.setattr(dqn, "step", step)
    args = dqn.Args(num_envs=4, buffer_size=80)
    loop = partial(jax.lax.scan, partial(dqn.joint_step, args), length=20)
    agent, (ended, returns, _) = jax.jit(loop)(one_agent(args))
    for x in (agent.buffer.obs, agent.buffer.next_obs):
        assert len(np.unique(x[:, 0])) == 80
    assert np.all(agent.buffer.reward == 2)
    assert np.all(returns[1:][ended[:-1]] == 2)
    assert np.all(dqn.evaluate(args, jax.tree.map(lambda x: x[None], agent.learner.params)) >= 2)


def test_an_update_is_a_step_of_adam_on_the_squared_error():
    """Against NumPy; truncated steps bootstrap."""
    args = dqn.Args(learning_rate=0.02, tau=0.25, batch_size=24)
    story = Story()
    networks = two_networks(dqn, (4, 6, 2))

    def q(params, obs):
        hidden = obs / np.array([2.4, 2, 0.2095, 2]) @ params["w0"].T + params["b0"][:, 0]
        return np.maximum(hidden, 0) @ params["w1"].T + params["b1"][:, 0]

    def loss_of(params):
        next_q = q(networks[1], story.next_obs).max(axis=-1)
        y = story.reward + 0.9 * np.where(story.terminated, 0, next_q)
        chosen = np.take_along_axis(q(params, story.obs), story.action[..., None], -1)[..., 0]
        return np.mean((y - chosen) ** 2)

    discount = np.float32(0.9) * ~story.terminated
    batch = story.obs, story.action, story.reward, discount, story.next_obs, story.ended
    batch = dqn.Transition(*(x.reshape(24, *x.shape[2:]) for x in batch))
    adam = dqn.optax.adam(args.learning_rate)
    assert_adam_step(dqn, adam, partial(dqn.update, args), batch, networks, loss_of)


# ---------- Runs
def test_seeds_trained_together_are_the_seeds_trained_alone(tmp_path):
    """Six seeds on four devices use three of them."""
    code = f"""
import jax, numpy as np, dqn_cartpole_jax as dqn
jax.config.update("jax_num_cpu_devices", 4)
args = dqn.{replace(SMALL, seed=5, num_seeds=6)}
params = dqn.init_agents(args).learner.params
assert jax.device_count() == 4 and len(params["w0"].sharding.device_set) == 3
params, episodes, _ = dqn.train(args)
np.savez({str(tmp_path / "together.npz")!r}, episodes=episodes, **params)"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=ROOT)
    together = dict(np.load(tmp_path / "together.npz"))
    episodes = together.pop("episodes")
    for k in range(6):
        params, alone, _ = dqn.train(replace(SMALL, seed=5 + k))
        assert_close({name: x[k : k + 1] for name, x in together.items()}, params, 0.02)
        assert_close(episodes[episodes[:, 2] == 5 + k][:100], alone[:100])


def test_ctrl_c_returns_the_last_chunk(monkeypatch):
    """In chunk 4 of 8: what a run of three chunks returns, as epsilon stays 1 in both."""
    args = replace(dqn.Args(), end_e=1.0)
    whole = dqn.train(replace(args, total_timesteps=96_000))
    results = [jax.device_get] * 3

    def interrupted_get(tree):
        if not results:
            raise KeyboardInterrupt
        return results.pop()(tree)

    monkeypatch.setattr(jax, "device_get", interrupted_get)
    params, episodes, counts = dqn.train(args)
    assert_close((params, episodes), whole[:2])
    assert counts["env_steps"] == whole[2]["env_steps"] == 96_000
    assert counts["interrupted"] and not whole[2]["interrupted"]


def test_a_kept_model_balances_gymnasiums_pole(tmp_path):
    """The defaults, as a user runs them, and then the recipe of load_model on what they keep."""
    assert dqn.main(dqn.Args(output_dir=str(tmp_path / "run"))) == 0
    kept = dqn.load_model(tmp_path / "run" / "model.npz")
    params = {name: array[0] for name, array in kept.items()}
    env = gymnasium.wrappers.RecordEpisodeStatistics(gymnasium.make("CartPole-v1"))
    for episode in range(3):
        obs, info = env.reset(seed=episode)
        while "episode" not in info:
            action = int(dqn.q_values(params, obs[None]).argmax())
            obs, _, _, _, info = env.step(action)
        assert info["episode"]["r"] >= 400
    always_right = kept | {"w1": 0 * kept["w1"], "b1": np.float32([[[0], [1]]])}
    assert set(dqn.evaluate(SMALL, always_right)[0]) <= {8, 9, 10, 11}

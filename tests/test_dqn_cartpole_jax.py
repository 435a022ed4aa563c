"""What would break for a user of dqn_cartpole_jax.py."""

import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import common
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import PLAIN, SWITCHES, Story, assert_close, row, same

import dqn_cartpole_jax as dqn

ROOT = Path(__file__).resolve().parent.parent
SEVERAL_CHUNKS = dqn.Args(num_envs=2, total_timesteps=6_000, buffer_size=500)
SMALL = dqn.Args(total_timesteps=3_200, buffer_size=3_200, eval_episodes=10)
FEW_STEPS = dqn.Args(num_envs=2, total_timesteps=4, batch_size=4, hidden_sizes=(8,), n_step=1)
FEW_STEPS = replace(FEW_STEPS, layer_norm=False, anneal_lr=False, eval_episodes=1)
FOUR_SEEDS = replace(SMALL, seed=5, num_seeds=4)
KEY = jax.random.key(0)
CHILDREN = {  # what runs in processes of their own: JAX does not change its devices later
    "four seeds on three cores": f"""
os.sched_getaffinity = lambda process: {{0, 1, 2}}
os.cpu_count = lambda: 3
assert dqn.main({FOUR_SEEDS}) == 0
assert jax.device_count() == 3
params = dqn.init_agents({FOUR_SEEDS}).learner.params
assert len(params["w0"].sharding.device_set) == 2""",
    "one core": """
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
assert dqn.main(dqn.Args(num_seeds=2, load_model="missing.npz")) == 2  # so it ends soon
assert jax.device_count() == 1""",
    "without jit": f"""
jax.config.update("jax_disable_jit", True)
assert dqn.main({FEW_STEPS}) == 0""",
}


@pytest.fixture(scope="module", autouse=True)
def children(tmp_path_factory):
    """A function that waits for a child and returns its folder. They run beside the tests."""
    processes = {}
    folders = {}
    for name, code in CHILDREN.items():
        folders[name] = tmp_path_factory.mktemp("child")
        code = code.replace("output_dir=None", "output_dir='run'")
        lines = ["import os, sys, jax", f"sys.path.insert(0, {str(ROOT)!r})"]
        lines += ["import dqn_cartpole_jax as dqn", "from dqn_cartpole_jax import Args", code]
        command = [sys.executable, "-c", "\n".join(lines)]
        processes[name] = subprocess.Popen(command, cwd=folders[name])

    def folder_of(name):
        assert processes[name].wait(timeout=120) == 0
        return folders[name]

    try:
        yield folder_of
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def new_agent(args):
    return jax.jit(partial(dqn.init_agent, args))(KEY)


def run_steps(args, steps):
    """A new agent after some joint steps, and the logs."""
    return jax.jit(partial(dqn.run_chunk, args, steps=steps))(new_agent(args))


def one_by_one(args, steps):
    """The Learners before and after each joint step."""
    agent = new_agent(args)
    _, draws = dqn.draw(args, jax.random.key(1), steps)
    joint_step = jax.jit(partial(dqn.joint_step, args))
    learners = [agent.learner]
    for one in zip(*draws, strict=True):
        agent, _ = joint_step(agent, dqn.Draws(*one))
        learners.append(agent.learner)
    return learners


# ---------- Environment
@pytest.mark.parametrize("cart", range(3))
def test_the_environment_is_gymnasiums(cart):
    """Cart 0 is balanced until the time limit, the others are pushed at random until they fall."""
    rng = np.random.default_rng(cart)
    step = jax.jit(partial(dqn.step, KEY))
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


def test_the_cart_may_not_leave_the_track():
    step = jax.jit(partial(dqn.step, KEY))
    for position, ended in ((2.39, False), (2.41, True), (-2.39, False), (-2.41, True)):
        _, _, terminated, _ = step(dqn.EnvState(jnp.array([position, 0.0, 0.0, 0.0]), 0), 0)
        assert terminated == ended


def test_episodes_start_as_gymnasiums():
    """Four numbers, uniform between -0.05 and 0.05."""
    state = jax.vmap(dqn.reset)(jax.random.split(KEY, 1_000))
    assert_close(state.obs.min(axis=0), np.full(4, -0.05), 1e-3)
    assert_close(state.obs.max(axis=0), np.full(4, 0.05), 1e-3)
    assert np.abs(np.corrcoef(state.obs.T) - np.eye(4)).max() < 0.15
    assert not np.any(state.time)


# ---------- Replay buffer
@pytest.mark.parametrize("n_step, buffer_size", [(1, 7), (3, 8)])
def test_batches_hold_every_transition_of_the_ring_and_no_other(n_step, buffer_size):
    """After each step of the story; 512 draws from at most 4 rows of 2 miss none."""
    story = Story()
    args = dqn.Args(num_envs=2, n_step=n_step, buffer_size=buffer_size, batch_size=512, gamma=0.9)
    rows = buffer_size // 2
    buffer = new_agent(args).buffer
    assert buffer.obs.shape == (rows, 2, 4)
    add = jax.jit(dqn.add)
    sample = jax.jit(partial(dqn.sample, args))
    for t in range(12):
        discount = np.float32(0.9) * ~story.terminated[t]
        new = [x[t] for x in (story.obs, story.action, story.reward)]
        new = dqn.Transition(*new, discount, story.next_obs[t], story.ended[t])
        buffer = add(buffer, t, new)
        noise = jax.random.uniform(jax.random.key(t), (2, 512))
        batch = sample(noise, buffer, t + 1)
        drawn = np.column_stack([np.float64(x) for x in batch[:5]])
        expected = []
        for first in range(max(0, t + 1 - rows), t + 1):
            for env in range(2):
                expected.append(story.transition(first, env, n_step, 0.9, newest=t))
        order = np.unique(drawn.round(4), axis=0)
        assert_close(order, np.unique(np.array(expected).round(4), axis=0), 2e-4)


def test_draws_are_uniform_and_stay_in_the_buffer():
    args = dqn.Args(num_envs=3, buffer_size=12, batch_size=20_000, n_step=1)
    buffer = new_agent(args).buffer
    buffer = buffer._replace(reward=jnp.arange(12.0).reshape(4, 3))
    noise = jax.random.uniform(KEY, (2, 20_000))
    counts = np.bincount(dqn.sample(args, noise, buffer, 9).reward.astype(int), minlength=12)
    assert_close(counts / 20_000, np.full(12, 1 / 12), 0.01)
    for edge in (0.0, np.nextafter(np.float32(1), np.float32(0))):
        corner = dqn.sample(args, jnp.full((2, 20_000), edge), buffer, 4).reward[0]
        # The newest row and the first environment, or the oldest row and the last.
        assert corner == (9 if edge == 0 else 2)


# ---------- The loop
def test_a_new_agent():
    args = dqn.Args(num_envs=4, buffer_size=160, hidden_sizes=(8,))
    init_agent = jax.jit(partial(dqn.init_agent, args))
    agent = init_agent(KEY)
    other = init_agent(jax.random.key(1))
    assert agent.joint_steps == 0 and np.all(agent.ended) and not np.any(agent.returns)
    assert same(agent.learner.params, agent.learner.target_params)
    assert not same(agent.learner.params["w0"], other.learner.params["w0"])
    assert agent.learner.params["w1"].shape == (8, 2)
    assert not any(np.any(x) for x in agent.buffer)


def test_the_loop_stores_what_happened(monkeypatch):
    """Forty steps of four carts with a time limit of 12: some fall, some run out of time."""
    monkeypatch.setattr(dqn, "MAX_STEPS", 12)
    args = dqn.Args(num_envs=4, buffer_size=160, gamma=0.5)
    agent, (ended, returns, loss, q_size, reward_size) = run_steps(args, 40)
    obs, action, reward, discount, next_obs, stored = jax.tree.map(np.asarray, agent.buffer)
    assert np.all((stored == ended) & (reward == 1))
    assert np.all(reward_size == 1) and np.all(loss > 0)
    step = jax.jit(jax.vmap(partial(dqn.step, KEY)))
    time = np.zeros(4, int)
    for t in range(40):
        state, _, terminated, truncated = step(dqn.EnvState(obs[t], time), action[t])
        assert_close(next_obs[t], state.obs, 1e-6)
        assert np.all(ended[t] == (terminated | truncated))
        assert np.all(discount[t] == np.where(terminated, 0, 0.5))
        assert np.all(returns[t] == time + 1)
        time = np.where(ended[t], 0, time + 1)
        if t < 39:
            assert np.all(obs[t + 1][~ended[t]] == next_obs[t][~ended[t]])
            starts = obs[t + 1][ended[t]]
            assert np.abs(starts).max(initial=0) <= 0.05 and np.all(starts != 0)
    assert np.abs(obs[0]).max() <= 0.05 and np.all(obs[0] != 0)
    assert np.any(discount == 0) and np.any(ended & (discount > 0))
    assert agent.joint_steps == 40
    first_q = common.numpy_q(new_agent(args).learner.params, obs[0] / dqn.OBS_SCALE)
    assert q_size[0] == pytest.approx(np.abs(first_q).mean(), rel=1e-3)


def test_epsilon_falls_and_stays():
    """Weights of 0 make action 0 greedy, so the mean action is half of epsilon."""
    args = dqn.Args(num_envs=10_000, total_timesteps=1_000_000, end_e=0.2, buffer_size=10_000)
    agent = new_agent(args)
    learner = agent.learner._replace(params=jax.tree.map(jnp.zeros_like, agent.learner.params))
    _, draws = dqn.draw(args, KEY, 1)
    joint_step = jax.jit(partial(dqn.joint_step, args))
    for env_steps, epsilon in ((0, 1.0), (250_000, 0.6), (500_000, 0.2), (900_000, 0.2)):
        agent = agent._replace(learner=learner, joint_steps=env_steps // 10_000)
        after, _ = joint_step(agent, row(draws, 0))
        assert_close(after.buffer.action.mean(), epsilon / 2, 0.02)


def test_greedy_actions_and_the_newest_rows():
    """No exploration, hardly any learning. After 25 joint steps, the oldest of 10 is in row 5."""
    args = dqn.Args(num_envs=50, end_e=0.0, exploration_fraction=0.0, learning_rate=1e-9)
    agent, (ended, *_) = run_steps(replace(args, buffer_size=500), 25)
    buffer = jax.tree.map(lambda x: np.roll(x, -5, axis=0), agent.buffer)
    assert np.all(buffer.ended == ended[15:])
    go_on = ~buffer.ended[:-1]
    assert np.all(buffer.obs[1:][go_on] == buffer.next_obs[:-1][go_on])
    best = common.numpy_q(agent.learner.params, buffer.obs / dqn.OBS_SCALE).argmax(axis=-1)
    assert np.mean(best == buffer.action) > 0.98
    assert 0 < best.mean() < 1


def test_every_environment_and_step_has_random_numbers_of_its_own(monkeypatch):
    """And rewards may be of any numeric type and shape of one number."""

    def step(key, state, action):
        obs = jax.random.uniform(key, (4,))
        return dqn.EnvState(obs, state.time + 1), jnp.array([2]), obs[0] < 0.3, False

    monkeypatch.setattr(dqn, "step", step)
    args = dqn.Args(num_envs=4, buffer_size=160)
    run_chunk = jax.jit(partial(dqn.run_chunk, args, steps=20))
    agent, (ended, returns, *_) = run_chunk(new_agent(args))
    assert np.all(returns[1:][ended[:-1]] == 2)
    agent, _ = run_chunk(agent)  # the next chunk has other numbers
    for x in (agent.buffer.obs, agent.buffer.next_obs):
        assert len(np.unique(x.reshape(160, 4)[:, 0])) == 160
    assert np.all(agent.buffer.reward == 2)
    assert np.all(dqn.evaluate(args, jax.tree.map(lambda x: x[None], agent.learner.params)) >= 2)


# ---------- Learning
@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_updates_by_hand(switches):
    """Each switch on, the others off; and all on. The last transition of 24 is truncated."""
    args = dqn.Args(**PLAIN | switches, learning_rate=0.02, batch_size=24, n_step=1)
    args = replace(args, num_envs=5, total_timesteps=25, learning_starts=5)  # 4 updates
    story = Story()

    def q(params, obs):
        return common.numpy_q(params, obs / np.array([2.4, 2, 0.2095, 2]))

    def loss_with(_, target_params):
        next_q = q(target_params, story.next_obs).max(axis=-1)
        y = story.reward + 0.9 * np.where(story.terminated, 0, next_q)

        def loss_of(params):
            chosen = np.take_along_axis(q(params, story.obs), story.action[..., None], -1)
            return np.mean((y - chosen[..., 0]) ** 2)

        return loss_of

    discount = np.float32(0.9) * ~story.terminated
    batch = story.obs, story.action, story.reward, discount, story.next_obs, story.ended
    batch = dqn.Transition(*(x.reshape(24, *x.shape[2:]) for x in batch))
    update = jax.jit(partial(dqn.update, args))
    learner = common.random_learner(dqn, args, (4, 6, 5, 2))
    common.assert_updates_by_hand(
        args, learner, lambda learner, tau: update(learner, batch, tau), loss_with, 4
    )


def test_when_updates_begin_what_they_copy_and_how_fast_they_learn():
    """Learning starts after step 40. At or after each multiple of 10, the next update copies w.

    From its first update on, the learning rate falls to 0.
    """
    args = dqn.Args(num_envs=4, total_timesteps=80, learning_starts=40, learning_rate=0.01)
    args = replace(args, hidden_sizes=(8,))
    learners = one_by_one(replace(args, tau=1.0, target_network_frequency=10), 20)
    update_steps = []
    rates = []
    copied = set()
    for t, (before, after) in enumerate(zip(learners[:-1], learners[1:], strict=True), 1):
        if not same(before, after):
            update_steps.append(4 * t)
            rates.append(common.learning_rate_of(before, after))
        if not same(before.target_params, after.target_params):
            assert same(after.target_params, after.params)
            copied.add(4 * t)
    assert update_steps == list(range(44, 81, 4))
    assert copied == {52, 60, 72, 80} == common.moves_due(10, update_steps, 4)
    assert_close(np.array(rates), 0.01 * np.linspace(1, 0.1, 10), 1e-3)


def test_weights_at_the_start():
    """Uniform, with variance 2 / in; biases are 0; no two layers share numbers."""
    params = dqn.init_params(KEY, (300, 400, 200, 3), layer_norm=False)
    assert sorted(params) == ["b0", "b1", "b2", "w0", "w1", "w2"]
    for name, n_in in (("w0", 300), ("w1", 400), ("w2", 200)):
        bound = (6 / n_in) ** 0.5
        w = np.asarray(params[name])
        assert w.max() == pytest.approx(bound, rel=0.01)
        assert w.min() == pytest.approx(-bound, rel=0.01)
        assert w.mean() == pytest.approx(0, abs=bound / 20)
        assert w.std() == pytest.approx((2 / n_in) ** 0.5, rel=0.05)
        assert params[f"b{name[1]}"].shape == w.shape[1:]
        assert not np.any(params[f"b{name[1]}"])
    shared = np.corrcoef(params["w0"].ravel()[:600], params["w1"].ravel()[:600])[0, 1]
    assert abs(shared) < 0.2
    assert "layer_norm" in dqn.init_params(KEY, (4, 8, 2), layer_norm=True)


def test_rows_are_normalized():
    x = np.random.default_rng(0).normal(3, 2, (5, 40))
    expected = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    assert_close(dqn.normalize(x), expected, 1e-9)
    tiny = np.array([[0.002, -0.002]])
    assert_close(dqn.normalize(tiny), tiny / np.sqrt(4e-6 + 1e-5), 1e-9)


# ---------- Agents side by side
def test_settings_may_be_mapped_from_outside():
    """Four learning rates, and more, in one vmap give what four separate runs give."""
    settings = {
        "learning_rate": [1e-4, 1e-3, 1e-2, 3e-2],
        "gamma": [0.9, 0.95, 0.99, 1.0],
        "tau": [0.01, 0.1, 0.5, 1.0],
        "end_e": [0.0, 0.1, 0.2, 0.5],
        "exploration_fraction": [0.1, 0.2, 0.5, 1.0],
    }
    args = dqn.Args(num_envs=4, total_timesteps=160, hidden_sizes=(8,), buffer_size=160)

    def train_from_the_start(changes):
        own = replace(args, **changes)
        agent, logs = dqn.run_chunk(own, dqn.init_agent(own, KEY), 40)
        return agent.learner, agent.buffer.discount, logs

    arrays = {name: jnp.array(values) for name, values in settings.items()}
    together = jax.jit(jax.vmap(train_from_the_start))(arrays)
    separate = jax.jit(train_from_the_start)
    for k in range(4):
        assert_close(row(together, k), separate(row(arrays, k)), 1e-3)
    assert not same(together[0].params["w0"][0], together[0].params["w0"][3])


def test_seeds_trained_together_are_the_seeds_trained_alone(children):
    """Four seeds, through main; with three cores, two share them equally."""
    folder = children("four seeds on three cores") / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert [agent["seed"] for agent in summary["seeds"]] == [5, 6, 7, 8]
    together = dqn.load_model(folder / "model.npz")
    episodes = np.genfromtxt(folder / "returns.csv", delimiter=",", skip_header=1)
    for k in range(4):
        params, alone, _ = dqn.train(replace(SMALL, seed=5 + k))
        assert_close({name: x[k : k + 1] for name, x in together.items()}, params, 0.02)
        assert_close(episodes[episodes[:, 2] == 5 + k][:50], alone[:50])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux assigns cores")
def test_devices_are_the_cores_that_the_process_may_use(children):
    """As with `taskset -c 0`."""
    children("one core")


# ---------- Runs
def test_the_episodes_of_several_chunks():
    """Their steps and returns add up."""
    params, episodes, counts = dqn.train(SEVERAL_CHUNKS)
    assert counts["env_steps"] == 6_000 and not counts["interrupted"]
    ends, returns, seeds = episodes.T
    assert set(seeds) == {SEVERAL_CHUNKS.seed}
    assert np.all(np.diff(ends) >= 0) and np.all(ends % 2 == 0)
    # What is missing is in the two last episodes, which have not ended.
    assert 0 <= 6_000 - returns.sum() < 1_000
    assert 5_000 < ends[-1] <= 6_000
    assert returns.min() >= 8
    assert params["w0"].shape == (1, 4, 64)


def test_ended_episodes_by_hand():
    """Two agents, three joint steps, two environments; 100 steps came before."""
    ended = np.zeros((2, 3, 2), bool)
    ended[0, 1, 0] = True
    ended[1, 2, 1] = True
    returns = np.arange(12.0).reshape(2, 3, 2)
    args = dqn.Args(num_envs=2, num_seeds=2, seed=7)
    episodes = dqn.ended_episodes(args, (ended, returns, None), 100)
    assert_close(episodes, np.array([[104.0, 2.0, 7.0], [106.0, 11.0, 8.0]]))


def test_ctrl_c_returns_the_last_chunk(monkeypatch):
    """Interrupted in its last chunk, it returns the weights and episodes of those before."""
    device_get = jax.device_get
    weights = []

    def watched_get(tree):
        weights.append(device_get(tree)[0])
        return device_get(tree)

    monkeypatch.setattr(jax, "device_get", watched_get)
    whole, all_episodes, counts = dqn.train(SEVERAL_CHUNKS)
    assert same(whole, weights[-1]) and not counts["interrupted"]
    chunks = len(weights)
    assert chunks > 2
    left = [device_get] * (chunks - 1)

    def interrupted_get(tree):
        if not left:
            raise KeyboardInterrupt
        return left.pop()(tree)

    monkeypatch.setattr(jax, "device_get", interrupted_get)
    params, episodes, counts = dqn.train(SEVERAL_CHUNKS)
    assert same(params, weights[chunks - 2]) and not same(params, whole)
    done = 6_000 * (chunks - 1) // chunks
    assert counts["env_steps"] == done and counts["interrupted"]
    assert same(episodes, all_episodes[all_episodes[:, 0] <= done])
    assert dqn.main(SEVERAL_CHUNKS) == 130  # before the first chunk is done


def test_memory_grows_with_episodes_only(monkeypatch):
    """Of all that came from the device, only the weights of the last chunk are kept."""
    device_get = jax.device_get
    seen = []

    def watched_get(tree):
        result = device_get(tree)
        seen.append([weakref.ref(x) for x in jax.tree.leaves(result)])
        return result

    monkeypatch.setattr(jax, "device_get", watched_get)
    params, episodes, counts = dqn.train(SEVERAL_CHUNKS)
    assert len(seen) > 2  # chunks
    for arrays in seen[:-1]:
        assert all(array() is None for array in arrays)
    assert sum(array() is not None for array in seen[-1]) <= len(params)
    assert episodes.shape[1] == 3 and len(episodes) < 6_000 / 8
    assert all(np.ndim(x) == 0 for x in counts.values())


def test_a_few_steps_without_jit_give_the_same(children):
    """As with JAX_DISABLE_JIT=1, so that a debugger can stop anywhere."""
    params = dqn.load_model(children("without jit") / "run" / "model.npz")
    expected, _, _ = dqn.train(FEW_STEPS)
    assert_close(params, expected, 1e-4)


def test_a_diverged_run_warns_and_names_the_learning_rate(capsys):
    """The loss is finite, but |Q| is far above the 2 that rewards of 1 and gamma allow."""
    args = replace(SMALL, learning_rate=10.0, anneal_lr=False, gamma=0.5, eval_episodes=1)
    assert dqn.main(args) == 0
    assert "--learning-rate" in capsys.readouterr().err
    assert dqn.main(SMALL) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("q_size, warned", [(199.0, False), (201.0, True)])
def test_the_warning_comes_at_twice_what_rewards_allow(q_size, warned, capsys):
    """Rewards of at most 1 and gamma 0.99 allow 100. Earlier sizes don't count."""
    ended = np.ones((1, 2, 1), bool)
    sizes = np.array([[500.0, q_size]])
    rewards = np.array([[1.0, 0.5]])
    logs = ended, np.ones((1, 2, 1)), np.zeros((1, 2)), sizes, rewards
    dqn.report(dqn.Args(gamma=0.99), logs, 100, 1.0)
    assert ("warning" in capsys.readouterr().err) == warned


# ---------- Evaluation
def test_evaluation_by_gymnasium():
    """Always to the right, from the starts that `evaluate` plays; one agent, and its opposite."""
    sizes = {"w0": (4, 8), "b0": (8,), "w1": (8, 2), "b1": (2,)}
    params = {name: np.zeros((2, *shape), np.float32) for name, shape in sizes.items()}
    params["b1"][0] = [0, 1]
    params["b1"][1] = [1, 0]
    returns = dqn.evaluate(SMALL, params)
    env = gymnasium.make("CartPole-v1").unwrapped
    for k, action in enumerate([1, 0]):
        for episode in range(10):
            key, _ = jax.random.split(jax.random.key(2**31 + episode))
            env.reset()
            env.state = np.array(dqn.reset(key).obs)
            total = 0
            terminated = False
            while not terminated:
                _, reward, terminated, _, _ = env.step(action)
                total += reward
            assert returns[k, episode] == total
    assert len(np.unique(returns)) > 2


def test_solved_is_a_mean_of_475(capsys):
    returns = np.array([[475.0, 475.0], [500.0, 449.0]])
    agents = dqn.summarize(dqn.Args(seed=3), returns)
    assert agents[1] == {
        "seed": 4,
        "eval_return_mean": 474.5,
        "eval_return_std": 25.5,
        "eval_return_min": 449.0,
        "eval_episodes": 2,
        "solved": False,
    }
    assert agents[0]["solved"] and agents[0]["seed"] == 3
    assert "4 greedy episodes: mean 474.8" in capsys.readouterr().out


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

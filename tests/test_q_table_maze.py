"""What would break for a user of q_table_maze.py."""

import dataclasses
import os
import pathlib
import subprocess
import sys
from functools import partial

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ROOT / "q_table_maze.py"
sys.path.insert(0, str(ROOT))
import q_table_maze as q  # noqa: E402

SMALL = q.Args(total_timesteps=20_000, eval_episodes=10)
ICE = 2 / 3


def move(args, maze, cell, action, noise, time=0):
    """One step from a cell, as plain numbers: cell, reward, terminated, truncated."""
    state, *rest = q.step(args, maze, q.EnvState(jnp.int32(cell), jnp.int32(time)), jnp.int32(action), jnp.float32(noise))
    return int(state.cell), *(x.item() for x in rest)


# ---------------------------------------------------------------------------------------------------------- Environment


@pytest.mark.parametrize("name", ["4x4", "8x8"])
@pytest.mark.parametrize("slip_prob", [0, ICE])
def test_transitions_are_frozen_lakes(name, slip_prob):
    """Every cell, action and slip against the table of Gymnasium's FrozenLake, whose holes give 0 where ours give -1."""
    table = gymnasium.make("FrozenLake-v1", map_name=name, is_slippery=slip_prob > 0).unwrapped.P
    theirs = (0, 2, 3, 1)  # left, right, up, down in FrozenLake's numbers
    args, maze = q.Args(board=name, slip_prob=slip_prob), q.read_board(name)
    step = jax.jit(jax.vmap(lambda s, a, u: q.step(args, maze, q.EnvState(s, 0), a, u)))
    cells = np.flatnonzero(~maze.terminal)
    assert len(cells) in (11, 53)
    s, a, u = np.meshgrid(cells, np.arange(4), (np.arange(12) + 0.5) / 12, indexing="ij")
    state, reward, terminated, _ = step(s.ravel(), a.ravel(), u.ravel())
    for i, cell in enumerate(cells):
        for action in range(4):
            expected = {}
            for probability, new, gain, ended in table[cell][theirs[action]]:
                key = int(new), -1.0 if ended and not gain else float(gain), bool(ended)
                expected[key] = expected.get(key, 0) + probability
            found = {}
            for j in range(12):
                k = (i * 4 + action) * 12 + j
                key = int(state.cell[k]), float(reward[k]), bool(terminated[k])
                found[key] = found.get(key, 0) + 1 / 12
            assert found.keys() == expected.keys()
            assert all(abs(found[key] - expected[key]) < 1e-9 for key in found)


def test_slips_go_to_the_two_sides():
    args, maze = q.Args(board="FFF/FSF/FFG", slip_prob=0.5), q.read_board("FFF/FSF/FFG")
    for action, ways in enumerate([(1, 7, 3), (1, 7, 5), (3, 5, 1), (3, 5, 7)]):
        assert tuple(move(args, maze, 4, action, noise)[0] for noise in (0.2, 0.3, 0.6)) == ways


def test_walls_rewards_ends_and_the_time_limit():
    args, maze = q.Args(max_episode_steps=5), q.read_board("2x3")
    assert move(args, maze, 0, 0, 0.5) == (0, 0, False, False)  # into the wall
    assert move(args, maze, 0, 3, 0.5) == (3, -1, True, False)
    assert move(args, maze, 4, 1, 0.5) == (5, 1, True, False)
    assert move(args, maze, 0, 1, 0.5, time=3) == (1, 0, False, False)
    assert move(args, maze, 0, 1, 0.5, time=4) == (1, 0, False, True)


def test_reachable_cells():
    maze = q.read_board("4x5")
    cells = "".join(maze.rows)
    assert "".join("x" if r else c for r, c in zip(maze.reachable, cells, strict=True)) == "xxHHHHxxxHHHHxHFHHxG"
    assert q.read_board("FSGFF").reachable.tolist() == [True, True, False, False, False]  # what lies behind the goal is not


# ---------------------------------------------------------------------------------------------------------- Exact values


def numpy_q(board, slip_prob, gamma):
    """Value iteration written out cell by cell."""
    rows = q.BOARDS.get(board, board).split("/")
    height, width = len(rows), len(rows[0])
    go = {0: (0, -1), 1: (0, 1), 2: (-1, 0), 3: (1, 0)}
    values = {(r, c, a): 0.0 for r in range(height) for c in range(width) for a in go}

    def worth(r, c, a):
        r, c = r + go[a][0], c + go[a][1]
        r, c = min(max(r, 0), height - 1), min(max(c, 0), width - 1)
        if rows[r][c] in "GH":
            return 1.0 if rows[r][c] == "G" else -1.0
        return gamma * max(values[r, c, b] for b in go)

    for _ in range(1_000):
        new = {}
        for r, c, a in values:
            sides = (2, 3) if a < 2 else (0, 1)
            new[r, c, a] = (1 - slip_prob) * worth(r, c, a) + slip_prob / 2 * sum(worth(r, c, b) for b in sides)
        change = max(abs(new[key] - values[key]) for key in new)
        values = new
        if change < 1e-9:
            break
    return np.array([values[r, c, a] for r in range(height) for c in range(width) for a in go]).reshape(-1, 4)


@pytest.mark.parametrize("board,slip_prob,gamma", [("2x3", 0, 0.95), ("4x5", 0.3, 0.9), ("4x4", ICE, 0.95), ("8x8", ICE, 0.99)])
def test_value_iteration(board, slip_prob, gamma):
    args = q.Args(board=board, slip_prob=slip_prob, gamma=gamma)
    exact = jax.jit(partial(q.exact_q, args, q.read_board(board)))()
    np.testing.assert_allclose(exact, numpy_q(board, slip_prob, gamma), atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- Learning


def test_update_by_hand():
    """Q(0, down) moves half way from 0 to 1 + 0.9 * 3, or to 1 where the episode ends; nothing else moves, in either form."""
    table = np.zeros((6, 4), np.float32)
    table[3] = 1, 3, 2, 0
    for name in ("q_table", "w0"):
        params = {name: jnp.array(table)}
        target = q.td_target(params, 0.9, 1.0, 3, False)
        assert abs(target - 3.7) < 1e-6 and q.td_target(params, 0.9, 1.0, 3, True) == 1
        new, _ = q.update(params, q.optimizer.init(params), jnp.int32(0), jnp.int32(3), target, 0.5)
        expected = table.copy()
        expected[0, 3] = 1.85
        np.testing.assert_allclose(new[name], expected, rtol=1e-6)


@pytest.mark.parametrize("slip_prob", [0, ICE])
def test_table_and_network_learn_the_same_numbers(slip_prob):
    args = dataclasses.replace(SMALL, slip_prob=slip_prob)
    table = q.train(args)
    network = q.train(dataclasses.replace(args, method="network"))
    np.testing.assert_allclose(network.params["w0"], table.params["q_table"], atol=1e-5)
    np.testing.assert_array_equal(network.visits, table.visits)
    assert table.visits.sum() == 20_000 and np.abs(table.params["q_table"]).max() > 0.7


def test_a_terminal_step_does_not_bootstrap_and_a_truncated_one_does():
    """With one step per episode only the first cell is ever left; by its own value it still learns gamma * max Q."""
    args = dataclasses.replace(SMALL, board="SFG", max_episode_steps=1, gamma=0.5)
    start = {"q_table": np.array([[0, 0, 0, 0], [0, 0, 0, 0.8], [9, 9, 9, 9]], np.float32)}
    result = q.train(args, start)
    values = result.params["q_table"]
    np.testing.assert_allclose(values[0], [0.2, 0.4, 0.2, 0.2], rtol=1e-3)  # 0.5 * 0.8 for going right, half of it for staying
    np.testing.assert_array_equal(values[1:], start["q_table"][1:])
    np.testing.assert_allclose(q.train(dataclasses.replace(args, board="SGF"), start).params["q_table"][0][1], 1)


def test_alpha_falls_with_the_visits():
    args = dataclasses.replace(SMALL, halving_visits=3, start_e=0, end_e=0, learning_rate=0.8)
    maze = q.read_board("2x3")
    agent = jax.tree.map(jnp.asarray, q.init_agent(args, maze, 0))
    agent = agent._replace(visits=agent.visits.at[0, 0].set(6), params={"q_table": agent.params["q_table"].at[0, 0].set(1.0)})
    agent, ended, _ = q.act_and_learn(args, maze, agent, np.int32(0), jnp.array([0.5, 0.5, 0.5]))  # greedy: left, into the wall
    assert agent.visits[0, 0] == 7 and not ended
    np.testing.assert_allclose(agent.params["q_table"][0, 0], 1 + 0.8 / (1 + 6 / 3) * (0.95 - 1), rtol=1e-6)


@pytest.mark.parametrize("t,epsilon", [(0, 1.0), (1_000, 0.8), (2_000, 0.6), (4_000, 0.2), (20_000, 0.2)])
def test_epsilon_at_stated_steps(t, epsilon):
    """Greedy is left; the share of other first actions is three quarters of epsilon."""
    maze = q.read_board("2x3")
    agent = jax.tree.map(jnp.asarray, q.init_agent(SMALL, maze, 0))
    noise = np.random.default_rng(0).random((20_000, 3), np.float32)
    act = jax.jit(jax.vmap(lambda noise: q.act_and_learn(SMALL, maze, agent, np.int32(t), noise)[0].visits[0]))
    share = 1 - np.asarray(act(noise)).mean(axis=0)[0]
    assert abs(share - 0.75 * epsilon) < 0.012


# ------------------------------------------------------------------------------------------------------------- Training


@pytest.mark.parametrize("board", ["2x3", "4x4", "4x5"])
def test_defaults_end_at_the_exact_answer(board):
    args = q.Args(board=board, seed=3)
    result = q.train(args)
    verdict = q.judge(args, result.params, result.visits, result.exact)
    assert verdict["error_all"] < 1e-3 and verdict["optimal_cells"] == verdict["reachable_cells"]
    np.testing.assert_array_equal(q.evaluate(args, result.params), 1)
    assert result.windows[-1, 0] == result.env_steps == 1_000 * result.params["q_table"].shape[0] ** 3


def test_defaults_on_ice():
    """Optimal in every cell of FrozenLake's small map, and as good in Gymnasium's own environment as the exact policy."""
    args = q.Args(board="4x4", slip_prob=ICE, seed=3)
    result = q.train(args)
    verdict = q.judge(args, result.params, result.visits, result.exact)
    assert verdict["optimal_cells"] == 11 and verdict["regret"] < 1e-5
    env, wins = gymnasium.make("FrozenLake-v1", is_slippery=True), 0
    for episode in range(200):
        cell, _ = env.reset(seed=episode)
        ended = False
        while not ended:
            cell, reward, terminated, truncated, _ = env.step((0, 2, 3, 1)[result.params["q_table"][cell].argmax()])
            ended = terminated or truncated
        wins += reward
    ours = np.mean(q.evaluate(dataclasses.replace(args, eval_episodes=1_000), result.params) > 0)
    assert abs(wins / 200 - ours) < 0.12 and ours > 0.6


def test_judge_tells_a_bad_policy():
    args = SMALL
    exact = np.asarray(q.exact_q(args, q.read_board(args.board)))
    wrong = exact.copy()
    wrong[0, 0] = 1  # left, into the wall, for ever
    verdict = q.judge(args, {"q_table": wrong}, np.zeros((6, 4), int), exact)
    assert verdict["optimal_cells"] == 2 and verdict["reachable_cells"] == 3
    np.testing.assert_allclose([verdict["regret"], verdict["error_all"]], [exact[0, 1] - exact[0, 0], 1 - exact[0, 0]])
    assert verdict["error_visited"] == 0  # no pair was visited
    np.testing.assert_array_equal(q.evaluate(args, {"q_table": wrong}), 0)


def test_windows_add_up():
    args = dataclasses.replace(SMALL, total_timesteps=20_123)
    result = q.train(args)
    steps, mean, seed, count, error = result.windows.T
    assert steps[-1] == result.env_steps == result.visits.sum() == 20_123
    assert np.all(np.diff(steps) > 0) and np.all(seed == 1) and np.all(np.abs(mean) <= 1)
    entered = (result.visits * (q.read_board("2x3").terminal[q.read_board("2x3").neighbor])).sum()
    assert count.sum() == entered  # every episode ended in a hole or the goal
    assert error[0] > error[-1]


def test_same_seed_same_bits_other_seed_other_agent():
    first, again, other = q.train(SMALL), q.train(SMALL), q.train(dataclasses.replace(SMALL, seed=2))
    np.testing.assert_array_equal(first.params["q_table"], again.params["q_table"])
    np.testing.assert_array_equal(first.windows, again.windows)
    assert np.any(first.visits != other.visits)


def test_no_key_is_used_twice():
    maze = q.read_board("2x3")
    with jax.debug_key_reuse(True):
        jax.jit(partial(q.train_chunk, SMALL, maze, 100))(q.init_agent(SMALL, maze, 0), 0)


@pytest.mark.parametrize("method", ["table", "network"])
def test_seeds_trained_together_are_the_seeds_trained_alone(method, tmp_path):
    """Three seeds over two devices, as main() lays them, against three runs of their own: the same bits."""
    code = f"""
import sys, jax, numpy as np
sys.path.insert(0, {str(ROOT)!r})
import q_table_maze as q
jax.config.update("jax_num_cpu_devices", 2)
args = q.Args(seed=5, num_seeds=3, total_timesteps=20_000, slip_prob=0.5, method={method!r}, eval_episodes=10)
result = q.train(args)
np.savez(sys.argv[1], returns=q.evaluate(args, result.params), windows=result.windows, **result.params)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "together.npz")], check=True, timeout=120)
    together = q.load_model(tmp_path / "together.npz")
    for i, seed in enumerate((5, 6, 7)):
        args = dataclasses.replace(SMALL, seed=seed, slip_prob=0.5, method=method)
        alone = q.train(args)
        for name, values in alone.params.items():
            np.testing.assert_allclose(together[name][i], values, atol=1e-6)
        windows = together["windows"][together["windows"][:, 2] == seed]
        np.testing.assert_allclose(windows, alone.windows, atol=1e-6)
        np.testing.assert_array_equal(together["returns"][i], q.evaluate(args, alone.params))


def test_the_compiled_loop_copies_no_table():
    """A copy of a table at every step makes the loop 20 times slower and shows in no result: look for it in the program."""
    args, maze = q.Args(board="8x8", slip_prob=ICE, total_timesteps=64_000), q.read_board("8x8")
    agent = jax.tree.map(jnp.asarray, q.init_agent(args, maze, 0))
    chunk = q.jit(args, partial(q.train_chunk, args, maze, 1_000), (0, None), donate_argnums=0)
    text = chunk.lower(agent, np.int32(0)).compile().as_text()
    loops = [body for body in text.split("\n\n") if "dynamic-update-slice" in body and "tuple(" in body]
    assert loops and not any(" copy(" in line and "[64,4]" in line for body in loops for line in body.splitlines())


def test_plain_python_for_a_debugger():
    """JAX_DISABLE_JIT=1: the whole run step by step, with the numbers of the compiled one."""
    flags = ["--total-timesteps", "60", "--eval-episodes", "2", "--board", "SFG"]
    command = [sys.executable, str(SCRIPT), *flags]
    slow, fast = (
        subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | extra)
        for extra in ({"JAX_DISABLE_JIT": "1"}, {})
    )
    assert slow.returncode == 0, slow.stderr
    assert slow.stdout.splitlines()[-8:-4] == fast.stdout.splitlines()[-8:-4]
    assert "60 of 60 steps" in slow.stdout


def test_what_is_printed():
    done = subprocess.run([sys.executable, str(SCRIPT), "--seed", "3"], capture_output=True, text=True, timeout=120)
    assert "board    greedy policy\nS F H    →  ↓  H\nH F G    H  →  G\n" in done.stdout
    assert "S  0, 0    0.8574   0.9025   0.8574  -1.0000" in done.stdout
    assert "optimal in 3 of 3 reachable cells; solved" in done.stdout
    plain = subprocess.run(
        [sys.executable, str(SCRIPT), "--seed", "3"],
        capture_output=True,
        timeout=120,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert plain.returncode == 0 and b"S F H    >  v  H" in plain.stdout

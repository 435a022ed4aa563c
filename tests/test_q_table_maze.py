"""The maze: its steps against Gymnasium's FrozenLake, its updates by hand, its values against the exact ones."""

import gymnasium
import jax.numpy as jnp
import numpy as np
import pytest

import q_table_maze as maze_file
from q_table_maze import Args, EnvState, evaluate, exact_q, lost_value, q_values, read_board, step, train, update

FROZEN_LAKE = [0, 2, 3, 1]  # our left, right, up, down in Gymnasium's order: left, down, right, up


@pytest.mark.parametrize("board", ["4x4", "8x8"])
@pytest.mark.parametrize("slip", [0.0, 2 / 3])
def test_step_has_the_transition_probabilities_of_frozen_lake(board, slip):
    table = gymnasium.make("FrozenLake-v1", map_name=board, is_slippery=slip > 0).unwrapped.P
    maze, args = read_board(board), Args(board=board, slip_prob=slip)
    noise = (np.arange(30, dtype=np.float32) + 0.5) / 30
    for cell in maze.free:
        for action in range(4):
            state = EnvState(jnp.full(30, cell), jnp.zeros(30, int))
            after, reward, terminated, _ = step(args, maze, state, jnp.full(30, action), noise)
            ours = np.bincount(np.asarray(after.cell), minlength=len(maze.reward)) / 30
            theirs, ends, pays = np.zeros(len(maze.reward)), set(), set()
            for probability, next_cell, value, end in table[int(cell)][FROZEN_LAKE[action]]:
                theirs[next_cell] += probability
                ends |= {next_cell} if end else set()
                pays |= {next_cell} if value else set()
            np.testing.assert_allclose(ours, theirs, atol=1e-6)
            assert {int(c) for c, t in zip(after.cell, terminated, strict=True) if t} == ends
            assert {int(c) for c, r in zip(after.cell, reward, strict=True) if r > 0} == pays


def test_time_limit_truncates_and_does_not_terminate():
    args, maze = Args(board="SFFG", max_episode_steps=3), read_board("SFFG")
    _, _, terminated, truncated = step(args, maze, EnvState(jnp.int32(0), jnp.int32(2)), 0, 0.5)
    assert truncated and not terminated


def test_exact_values_of_a_corridor_and_of_a_bad_policy():
    args, maze = Args(board="SFG", gamma=0.5), read_board("SFG")
    np.testing.assert_allclose(exact_q(args, maze)[:2], [[0.25, 0.5, 0.25, 0.25], [0.25, 1, 0.5, 0.5]])
    always_left = np.zeros(3, int)
    np.testing.assert_allclose(exact_q(args, maze, always_left)[:2, 0], 0)
    assert lost_value(args, {"q_table": np.eye(3, 4)[[0, 0, 0]]}) == 1  # going left in the cell before the goal


@pytest.mark.parametrize("terminated, target", [(False, 0.3 + 0.9 * 4), (True, 0.3)])
def test_update_of_table_and_network_by_hand(terminated, target):
    values = np.arange(12, dtype=np.float32).reshape(3, 4) / 2
    values[2] = [1, 4, 2, 3]
    expected = values.copy()
    expected[1, 2] += 0.25 * (target - values[1, 2])
    for name in ("q_table", "w0"):
        params = update(Args(gamma=0.9), {name: jnp.asarray(values)}, 1, 2, 0.3, 2, terminated, 0.25)
        np.testing.assert_allclose(params[name], expected, rtol=1e-6)


def test_a_table_is_a_linear_network_on_one_hot_states():
    values = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    np.testing.assert_array_equal(q_values({"w0": values}, np.arange(6)), q_values({"q_table": values}, np.arange(6)))
    table, network = (train(Args(total_timesteps=5000, slip_prob=0.3, method=method))[0] for method in ("table", "network"))
    np.testing.assert_allclose(table["q_table"], network["w0"], atol=1e-5)


@pytest.mark.parametrize("board, slip", [("2x3", 0.0), ("2x3", 0.2), ("4x4", 0.0), ("4x5", 0.6667)])
def test_training_finds_an_optimal_policy_and_nearly_the_exact_values(board, slip):
    args = Args(board=board, slip_prob=slip, seed=3)
    params, windows, counts = train(args)
    free = read_board(board).free
    assert lost_value(args, params) < 1e-3
    assert np.abs(params["q_table"] - exact_q(args, read_board(board)))[free].max() < 0.05
    assert windows[-1, 2] <= windows[0, 2] and counts["env_steps"] == windows[-1, 0]
    if slip == 0:
        assert (evaluate(args, params) == 1).all()


def test_the_end_by_the_time_limit_does_not_end_the_value():
    """Episodes of one step: every value beyond one step comes from bootstrapping at a truncation."""
    args = Args(board="SFFG", max_episode_steps=1, total_timesteps=40_000)
    maze = read_board("SFFG")
    np.testing.assert_allclose(train(args)[0]["q_table"][maze.free], exact_q(args, maze)[maze.free], atol=1e-3)


def test_network_solves_a_larger_board():
    args = Args(board="4x4", method="network", total_timesteps=100_000)
    assert lost_value(args, train(args)[0]) < 1e-3


def test_same_seed_same_bits_and_another_seed_another_run():
    args = Args(slip_prob=0.5, total_timesteps=3000)
    first, again, other = train(args)[0], train(args)[0], train(Args(slip_prob=0.5, total_timesteps=3000, seed=2))[0]
    np.testing.assert_array_equal(first["q_table"], again["q_table"])
    assert (first["q_table"] != other["q_table"]).any()


def test_what_is_kept_is_the_average_over_the_second_half(monkeypatch):
    seen = []
    get = maze_file.jax.device_get
    monkeypatch.setattr(maze_file.jax, "device_get", lambda tree: seen.append(get(tree)["q_table"]) or get(tree))
    params, _, _ = train(Args(slip_prob=0.5, total_timesteps=6400))
    np.testing.assert_allclose(params["q_table"], np.mean(seen[len(seen) // 2 :], axis=0), rtol=1e-5, atol=1e-7)


def test_ctrl_c_ends_the_training_and_returns_what_was_learned(monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", interrupt)  # the line at the end of the run
    params, windows, counts = train(Args())
    assert counts["interrupted"] and len(windows) and params["q_table"].any()


@pytest.mark.parametrize("board", ["", "SF/G", "SFX/FFG", "FFG", "SSG", "SFF", "SHG", "9x9"])
def test_bad_boards_are_refused(board):
    with pytest.raises(ValueError, match="board"):
        read_board(board)

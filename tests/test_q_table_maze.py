"""The maze: its steps against FrozenLake's, its updates by hand, its values against the exact."""

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import assert_close

import q_table_maze
from q_table_maze import Args, EnvState, evaluate, exact_q, lost_value, read_board, train

FROZEN_LAKE = [0, 2, 3, 1]  # our left, right, up, down in Gymnasium's order: left, down, right, up


@pytest.mark.parametrize("board", ["4x4", "8x8"])
@pytest.mark.parametrize("slip", [0.0, 2 / 3])
def test_step_has_the_transition_probabilities_of_frozen_lake(board, slip):
    table = gymnasium.make("FrozenLake-v1", map_name=board, is_slippery=slip > 0).unwrapped.P
    maze = read_board(board)
    args = Args(board=board, slip_prob=slip)
    noise = (np.arange(30, dtype=np.float32) + 0.5) / 30
    for cell, action in np.ndindex(len(maze.free), 4):
        cell = maze.free[cell]
        state = EnvState(jnp.full(30, cell), jnp.zeros(30, int))
        after = q_table_maze.step(args, maze, state, jnp.full(30, action), noise)
        state, reward, terminated, _ = jax.tree.map(np.asarray, after)
        theirs = np.zeros(len(maze.reward))
        for probability, next_cell, pays, ends in table[int(cell)][FROZEN_LAKE[action]]:
            theirs[next_cell] += probability
            assert np.all(terminated[state.cell == next_cell] == ends)
            assert np.all((reward[state.cell == next_cell] > 0) == (pays > 0))
        ours = np.bincount(state.cell, minlength=len(maze.reward)) / 30
        assert_close(ours, theirs, 1e-6)


def test_exact_values_of_a_corridor_and_of_a_bad_policy():
    args = Args(board="SFG", gamma=0.5)
    maze = read_board("SFG")
    best = exact_q(args, maze)[:2]
    assert_close(best, np.array([[0.25, 0.5, 0.25, 0.25], [0.25, 1, 0.5, 0.5]]), 1e-9)
    always_left = exact_q(args, maze, policy=np.zeros(3, int))
    assert_close(always_left[:2, 0], np.zeros(2), 1e-9)
    # Going left in the cell before the goal loses 1.
    assert lost_value(args, {"q_table": np.eye(3, 4)[[0, 0, 0]]}) == 1


@pytest.mark.parametrize("terminated, target", [(False, 0.3 + 0.9 * 4), (True, 0.3)])
@pytest.mark.parametrize("name", ["q_table", "w0"])
def test_update_of_table_and_network_by_hand(name, terminated, target):
    values = np.arange(12, dtype=np.float32).reshape(3, 4) / 2
    values[2] = [1, 4, 2, 3]
    expected = values.copy()
    expected[1, 2] += 0.25 * (target - values[1, 2])
    params = {name: jnp.asarray(values)}
    params = q_table_maze.update(Args(gamma=0.9), params, 1, 2, 0.3, 2, terminated, 0.25)
    np.testing.assert_allclose(params[name], expected, rtol=1e-6)


LEARNED = [("2x3", 0.2, "table"), ("4x4", 0.0, "network"), ("4x5", 0.6667, "table")]


@pytest.mark.parametrize("board, slip, method", LEARNED)
def test_training_finds_an_optimal_policy_and_nearly_the_exact_values(board, slip, method):
    args = Args(board=board, slip_prob=slip, method=method, seed=3)
    params, _, _ = train(args)
    maze = read_board(board)
    assert lost_value(args, params) < 1e-3
    (values,) = params.values()
    assert np.abs(values - exact_q(args, maze))[maze.free].max() < 0.05
    if slip == 0:
        assert np.all(evaluate(args, params) == 1)


def test_the_end_by_the_time_limit_does_not_end_the_value():
    """Episodes of one step: what lies beyond comes from bootstrapping at a truncation."""
    args = Args(board="SFFG", max_episode_steps=1, total_timesteps=40_000)
    maze = read_board("SFFG")
    params, _, _ = train(args)
    assert_close(params["q_table"][maze.free], exact_q(args, maze)[maze.free], 1e-3)


def test_steps_are_as_many_as_asked_for(monkeypatch):
    """Also 200, which is no multiple of a chunk, and everything compiles once, before them."""
    for steps in (1, 200, 5_000):
        _, windows, counts = train(Args(total_timesteps=steps))
        assert counts["env_steps"] == windows[-1, 0] == steps
    compiled = []
    jit = jax.jit
    monkeypatch.setattr(jax, "jit", lambda *a, **k: compiled.append(jit(*a, **k)) or compiled[-1])
    train(Args(total_timesteps=200))
    assert compiled[0]._cache_size() == 1

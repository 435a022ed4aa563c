"""The maze: its steps against FrozenLake's, its updates by hand, its values against the exact."""

from functools import partial

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import assert_close, same

import q_table_maze
from q_table_maze import Args, EnvState, evaluate, exact_q, lost_value, read_board, train

FROZEN_LAKE = [0, 2, 3, 1]  # our left, right, up, down in Gymnasium's order: left, down, right, up


# ---------- Environment
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


def test_a_hole_costs_one_and_the_time_limit_counts_steps():
    args = Args(board="HSG", max_episode_steps=3)
    maze = read_board("HSG")
    assert maze.start == 1 and list(maze.free) == [1]
    for action, reward, terminated in ((0, -1, True), (1, 1, True), (2, 0, False)):
        for time, truncated in ((1, False), (2, True)):
            state, *ours = q_table_maze.step(args, maze, EnvState(1, time), action, 0.5)
            assert ours == [reward, terminated, truncated]
            assert state.time == time + 1


def test_the_named_boards():
    sizes = {"2x3": 6, "4x5": 20, "4x4": 16, "8x8": 64}
    for board, cells in sizes.items():
        maze = read_board(board)
        assert maze.neighbor.shape == (cells, 4, 3)
        # Some policy reaches the goal from the start.
        assert exact_q(Args(), maze)[maze.start].max() > 0


# ---------- Exact values
def test_exact_values_of_a_corridor_and_of_a_bad_policy():
    args = Args(board="SFG", gamma=0.5)
    maze = read_board("SFG")
    best = exact_q(args, maze)[:2]
    assert_close(best, np.array([[0.25, 0.5, 0.25, 0.25], [0.25, 1, 0.5, 0.5]]), 1e-9)
    always_left = exact_q(args, maze, policy=np.zeros(3, int))
    assert_close(always_left[:2, 0], np.zeros(2), 1e-9)
    # Going left in the cell before the goal loses 1.
    assert lost_value(args, {"q_table": np.eye(3, 4)[[0, 0, 0]]}) == 1


def test_exact_values_on_ice():
    """A strip between holes: straight on with 1 - slip, else the fall into a hole."""
    board = "HHHH/HSFG/HHHH"
    args = Args(board=board, gamma=0.5, slip_prob=0.2)
    q = exact_q(args, read_board(board))
    before_goal = 0.8 * 1 - 0.2
    assert q[6, 1] == pytest.approx(before_goal)
    assert q[5, 1] == pytest.approx(0.8 * 0.5 * before_goal - 0.2)
    # Up: straight on is a hole, and so is no side: left is a hole, right is the goal's neighbor.
    assert q[5, 2] == pytest.approx(-0.8 - 0.1 + 0.1 * 0.5 * before_goal)


# ---------- Learning
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


def learn_by_hand(args, maze, noise):
    """Q-learning in plain Python: the values, the visits, how many episodes, their returns."""
    cells = len(maze.reward)
    q = np.zeros((cells, 4))
    visits = np.zeros((cells, 4), int)
    returns = []
    cell = maze.start
    time = 0
    total = 0.0
    for explore, pick, slip, place in noise:
        action = int(q[cell].argmax())
        if explore < args.epsilon:
            action = int(pick * 4)
        turn = 0
        if slip < args.slip_prob:
            turn = 1 if slip < args.slip_prob / 2 else 2
        next_cell = maze.neighbor[cell, action, turn]
        reward = maze.reward[next_cell]
        target = reward
        if not maze.terminal[next_cell]:
            target = reward + args.gamma * q[next_cell].max()
        visits[cell, action] += 1
        alpha = args.learning_rate
        if args.slip_prob > 0:
            alpha /= visits[cell, action] ** args.decay_power
        q[cell, action] += alpha * (target - q[cell, action])
        cell = next_cell
        time += 1
        total += reward
        if maze.terminal[cell] or time == args.max_episode_steps:
            returns.append(total)
            cell = maze.free[int(place * len(maze.free))]
            time = 0
            total = 0.0
    return q, visits, len(returns), sum(returns)


@pytest.mark.parametrize("slip", [0.0, 0.4])
@pytest.mark.parametrize("method", ["table", "network"])
def test_a_chunk_of_training_by_hand(slip, method):
    """600 steps with the same random numbers."""
    args = Args(board="4x4", slip_prob=slip, method=method, max_episode_steps=7, gamma=0.8)
    maze = read_board("4x4")
    noise = np.random.default_rng(0).random((600, 4), np.float32)
    expected = learn_by_hand(args, maze, noise)
    world = jax.tree.map(jnp.asarray, maze)
    chunk = jax.jit(partial(q_table_maze.train_chunk, args, world))
    agent, episodes, total = chunk(q_table_maze.init_agent(args, maze), noise, 600)
    (q,) = agent.params.values()
    assert_close((q, agent.visits, episodes, total), expected, 1e-4)
    first_400, _, _ = chunk(q_table_maze.init_agent(args, maze), noise, 400)
    assert first_400.visits.sum() == 400


# ---------- Runs
LEARNED = [  # board, slip_prob, method, steps
    ("2x3", 0.2, "table", 0),
    ("4x4", 0.0, "network", 0),
    ("4x5", 0.6667, "table", 4_000_000),
]


@pytest.mark.parametrize("board, slip, method, steps", LEARNED)
def test_training_finds_an_optimal_policy_and_nearly_the_exact_values(board, slip, method, steps):
    args = Args(board=board, slip_prob=slip, method=method, total_timesteps=steps, seed=3)
    params, progress, _ = train(args)
    maze = read_board(board)
    assert lost_value(args, params) < 1e-3
    (values,) = params.values()
    error = np.abs(values - exact_q(args, maze))[maze.free].max()
    assert error < 0.05
    # The printed error is that of what is returned.
    assert progress[-1, 2] == pytest.approx(error, abs=1e-6)
    if slip == 0:
        assert np.all(evaluate(args, params) == 1)


def test_the_end_by_the_time_limit_does_not_end_the_value():
    """Episodes of one step: what lies beyond comes from bootstrapping at a truncation."""
    args = Args(board="SFFG", max_episode_steps=1, total_timesteps=40_000)
    maze = read_board("SFFG")
    params, _, _ = train(args)
    assert_close(params["q_table"][maze.free], exact_q(args, maze)[maze.free], 1e-3)


def test_the_result_is_the_average_over_the_second_half():
    """sums[n] is the sum of the values after n chunks."""
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    sums = [np.zeros(1), *np.cumsum(values)[:, None]]
    assert q_table_maze.average(sums[:1]) == 0  # no chunk
    assert q_table_maze.average(sums[:2]) == 1
    assert q_table_maze.average(sums[:5]) == (4 + 8) / 2
    assert q_table_maze.average(sums) == (4 + 8 + 16) / 3


def test_steps_are_as_many_as_asked_for_and_progress_holds_their_episodes():
    """Also 200, which is no multiple of a chunk."""
    for steps in (1, 200, 5_000):
        args = Args(total_timesteps=steps, board="SG", epsilon=1.0)
        _, progress, counts = train(args)
        assert counts["env_steps"] == progress[-1, 0] == steps
        assert not counts["interrupted"]
        # Every episode that ends reaches the goal.
        assert set(progress[~np.isnan(progress[:, 1]), 1]) <= {1.0}
    assert np.mean(progress[:, 1]) == 1
    changing = train(Args(total_timesteps=5_000))[1]
    assert len(np.unique(changing[:, 1])) > 10  # each chunk has random numbers of its own


def test_run_lengths():
    """Ice needs more steps, and the network is slow."""
    assert q_table_maze.run_length(Args(total_timesteps=7), 10) == 7
    assert q_table_maze.run_length(Args(), 10) == 200_000
    assert q_table_maze.run_length(Args(slip_prob=0.1), 10) == 5_000_000
    assert q_table_maze.run_length(Args(slip_prob=0.1, method="network"), 10) == 200_000


def test_everything_compiles_once_before_the_steps(monkeypatch):
    compiled = []
    jit = jax.jit
    monkeypatch.setattr(jax, "jit", lambda *a, **k: compiled.append(jit(*a, **k)) or compiled[-1])
    train(Args(total_timesteps=200))
    assert compiled[0]._cache_size() == 1


def test_a_few_steps_without_jit_give_the_same():
    """As with JAX_DISABLE_JIT=1, so that a debugger can stop anywhere."""
    args = Args(total_timesteps=20, slip_prob=0.3)
    expected, progress, _ = train(args)
    with jax.disable_jit():
        params, same_progress, _ = train(args)
    assert_close(params, expected, 1e-6)
    assert same(progress[:, 0], same_progress[:, 0])


# ---------- Evaluation
def always(action, cells):
    """A table in which one action is best in every cell."""
    return {"q_table": np.eye(4)[np.full(cells, action)]}


def test_evaluation_plays_greedily_until_an_end_or_the_time_limit():
    args = Args(board="HSFG", eval_episodes=7)
    assert list(evaluate(args, always(0, 4))) == [-1] * 7
    assert list(evaluate(args, always(1, 4))) == [1] * 7
    assert list(evaluate(args, always(2, 4))) == [0] * 7  # into a wall, until time runs out
    short = Args(board="HSFG", eval_episodes=7, max_episode_steps=1)
    assert list(evaluate(short, always(1, 4))) == [0] * 7


def test_evaluation_slips_too():
    """The goal is two steps away between holes: it is reached with probability 1 / 4."""
    args = Args(board="HHHH/HSFG/HHHH", slip_prob=0.5, eval_episodes=4_000)
    returns = evaluate(args, always(1, 12))
    assert set(returns) == {-1, 1}
    assert returns.mean() == pytest.approx(-0.5, abs=0.05)


def test_solved_is_within_a_thousandth_of_the_best(capsys):
    returns = np.array([1.0, 0.0, 1.0, 1.0])
    for lost, solved in ((0.0, True), (1e-3, True), (1.1e-3, False)):
        agent = q_table_maze.summarize(Args(seed=4), returns, lost)
        assert agent == {
            "seed": 4,
            "solved": solved,
            "eval_return_mean": 0.75,
            "eval_return_std": pytest.approx(0.4330127),
            "eval_return_min": 0.0,
            "eval_episodes": 4,
        }
        assert "mean 0.75, std 0.433, worst 0; solved: " + str(solved) in capsys.readouterr().out

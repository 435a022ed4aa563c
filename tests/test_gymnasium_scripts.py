"""How dqn_lunarlander.py and dqn_pendulum_discretized.py learn, act, evaluate and film."""

import itertools
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import common
import gymnasium
import imageio.v3
import jax
import numpy as np
import pytest
from common import PLAIN, SWITCHES, Story, assert_close, row, same, small

import dqn_lunarlander as lander
import dqn_pendulum_discretized as pendulum

BOTH = pytest.mark.parametrize("dqn", [lander, pendulum], ids=["lander", "pendulum"])
NETWORKS = {
    "lander": (lander, {}),
    "state": (pendulum, {}),
    "state-action": (pendulum, {"q_input": "state-action"}),
    "state-action-sampled": (pendulum, {"q_input": "state-action", "sampled_actions": 3}),
}
EACH_NETWORK = pytest.mark.parametrize("dqn, changes", NETWORKS.values(), ids=NETWORKS)
KINDS = [common.PaysWhatItShows, common.PaysLater, common.RunsOutOfTime]
LISTED = np.linspace(-1, 1, 5, dtype=np.float32)


# ---------- Values that are known
@EACH_NETWORK
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_values_that_are_known(kind, dqn, changes):
    """Truncation does not end the value: RunsOutOfTime is worth 1 / (1 - gamma).

    PaysLater is worth gamma times the best reward, or the mean best of three actions drawn.
    """
    args = small(dqn, hidden_sizes=(32,), **changes)
    env = kind(dqn)
    params, episodes, counts = dqn.train(args, env)
    q_values = dqn.q_values
    if "q_input" in changes:
        q_values = partial(pendulum.q_of_actions, actions=LISTED)
    before, after = q_values(params, np.float32([[-1], [1]]))
    worth = np.array([0, 1]) if dqn is lander else 1 - 2 * np.abs(LISTED - 0.5)
    best = 1.0
    if "sampled_actions" in changes:
        best = np.mean([max(three) for three in itertools.product(worth, repeat=3)])
    if kind is common.PaysWhatItShows:
        expected = -1.0
        length = 1
        np.testing.assert_allclose(after, np.ones(worth.shape), atol=0.2)
    if kind is common.PaysLater:
        expected = 0.5 * best
        length = 2
        np.testing.assert_allclose(after, worth, atol=0.2)
        assert list(dqn.evaluate(args, params, env)) == [1] * 3
    if kind is common.RunsOutOfTime:
        expected = 1 / (1 - 0.5)
        length = 4
        assert list(dqn.evaluate(args, params, env)) == [4] * 3
    np.testing.assert_allclose(before, np.full(worth.shape, expected), atol=0.2)
    assert counts["env_steps"] == 1_500 and not counts["interrupted"]
    assert list(episodes[:, 0]) == list(range(length, 1_501, length))
    assert all(np.ndim(x) == 0 for x in counts.values())


# ---------- Replay buffer
@pytest.mark.parametrize("n_step", [1, 3])
def test_the_queue_sums_rewards_and_stops_at_ends(n_step):
    story = Story()
    for i in range(2):
        queue = []
        found = []
        for t in range(12):
            discount = 0.0 if story.terminated[t, i] else 0.9
            step = [x[t, i] for x in (story.obs, story.action, story.reward)]
            new = lander.Transition(*step, discount, story.next_obs[t, i])
            complete, queue = lander.extend(queue, new, story.ended[t, i], n_step)
            found += complete
        expected = [story.transition(t, i, n_step, 0.9) for t in range(13 - n_step)]
        for transition, numbers in zip(found, expected, strict=True):
            np.testing.assert_allclose(np.hstack(transition), numbers, rtol=1e-5)


@BOTH
def test_the_buffer_keeps_the_newest_and_draws_all_that_is_filled(dqn):
    args = small(dqn, batch_size=40, buffer_size=4)
    buffer = dqn.init_buffer(args, 1)
    for t in range(6):
        new = dqn.Transition(np.array([t]), t + 1, t + 2, t + 3, np.array([t + 4]))
        if dqn is lander:
            assert lander.add(buffer, t, [new]) == t + 1
        else:
            pendulum.add(buffer, t, new)
        batches = dqn.sample(args, np.random.default_rng(0), buffer, t + 1)
        assert batches.obs.shape == (8, 40, 1) and batches.reward.shape == (8, 40)
        first, *others = (x.reshape(8, 40) for x in batches)
        assert set(first.ravel()) == set(range(max(0, t - 3), t + 1))
        for k, x in enumerate(others, 1):
            assert np.all(x == first + k)


def test_several_transitions_are_added_in_order():
    buffer = lander.init_buffer(small(lander, buffer_size=4), 1)
    transitions = []
    for t in range(3):
        transitions.append(lander.Transition(np.array([t]), t, t, t, np.array([t])))
    assert lander.add(buffer, 3, transitions) == 6
    assert list(buffer.reward) == [1, 2, 0, 0]


# ---------- Updates by hand
def q_by_hand(args, params, obs, actions):
    """Q (B, A) of some actions by the network that takes them, or else of every listed one."""
    if getattr(args, "q_input", "state") == "state":
        return common.numpy_q(params, obs)
    actions = np.broadcast_to(actions, (len(obs), np.shape(actions)[-1]))
    states = np.repeat(obs[:, None], actions.shape[1], axis=1)
    rows = np.concatenate([states, actions[..., None]], axis=-1)
    return common.numpy_q(params, rows)[..., 0]


CASES = {f"lander {name}": (lander, switches) for name, switches in SWITCHES.items()}
CASES["lander double_dqn"] = (lander, {"double_dqn": True})
CASES["lander huber"] = (lander, {"loss": "huber"})
CASES["lander all"] = (lander, SWITCHES["all"] | {"double_dqn": True, "loss": "huber"})
for name in ("plain", "soft target, now and then", "all"):
    CASES[f"pendulum {name}"] = (pendulum, SWITCHES[name])
CASES["pendulum double_dqn"] = (pendulum, {"double_dqn": True})
for name in ("plain", "all"):
    switches = SWITCHES[name] | {"q_input": "state-action", "sampled_actions": 3}
    switches |= {"double_dqn": name == "all"}
    CASES[f"pendulum state-action {name}"] = (pendulum, switches)


def story_batch(dqn):
    """A batch of 12 transitions; the rewards are so large that some errors exceed 1."""
    story = Story()
    discount = np.float32(0.9) * ~story.terminated[:, 0]
    reward = 3 * story.reward[:, 0]
    fields = story.obs[:, 0], story.action[:, 0], reward, discount, story.next_obs[:, 0]
    return dqn.Transition(*fields)


@pytest.mark.parametrize("dqn, switches", CASES.values(), ids=CASES)
def test_updates_by_hand(dqn, switches):
    """Each switch on, the others off; and all on."""
    plain = PLAIN | {"double_dqn": False}
    if dqn is lander:
        plain |= {"loss": "squared"}
    args = small(dqn, **plain | {"batch_size": 12} | switches)
    # A run of 4 updates.
    args = replace(args, total_timesteps=24, learning_starts=8, train_frequency=8, gradient_steps=2)
    batch = story_batch(dqn)
    sizes = (4, 6, 5, 2 if dqn is lander else 5)
    if "q_input" in switches:
        sizes = (5, 6, 5, 1)
    drawn = LISTED[[4, 1, 1]]

    def loss_with(params, target_params):
        next_q = q_by_hand(args, target_params, batch.next_obs, drawn)
        chooser = params if args.double_dqn else target_params
        best = q_by_hand(args, chooser, batch.next_obs, drawn).argmax(axis=1)
        y = batch.reward + batch.discount * next_q[np.arange(12), best]

        def loss_of(params):
            q = q_by_hand(args, params, batch.obs, LISTED)[np.arange(12), batch.action]
            error = np.abs(y - q)
            if getattr(args, "loss", "squared") == "huber":
                return np.mean(np.where(error > 1, error - 0.5, error**2 / 2))
            return np.mean(error**2)

        return loss_of

    update = partial(lander.update, args)
    if dqn is pendulum:

        def update(learner, batch, tau):
            listed = jax.numpy.asarray(LISTED)
            return pendulum.update(args, listed, learner, batch, drawn, tau)

    update = jax.jit(update)
    learner = common.random_learner(dqn, args, sizes)
    common.assert_updates_by_hand(
        args, learner, lambda learner, tau: update(learner, batch, tau), loss_with, 4
    )


@BOTH
@pytest.mark.parametrize("env_steps, moves", [(104, True), (112, False)])
def test_only_the_first_update_of_a_group_moves_the_target_network(env_steps, moves, dqn):
    """A multiple of 50 is at most 8 steps before step 104, and more before step 112."""
    args = small(dqn, **PLAIN | {"batch_size": 12, "target_network_frequency": 50})
    args = replace(args, train_frequency=8, gradient_steps=3)
    batch = story_batch(dqn)
    batches = jax.tree.map(lambda x: np.stack([x, x[::-1], np.roll(x, 1, axis=0)]), batch)
    learner = common.random_learner(dqn, args, (4, 6, 2 if dqn is lander else 5))
    update = partial(lander.update, args)
    learn = partial(lander.learn, args)
    if dqn is pendulum:

        def update(learner, batch, tau):
            return pendulum.update(args, LISTED, learner, batch, None, tau)

        def learn(learner, batches, env_steps):
            return pendulum.learn(args, LISTED, learner, batches, None, env_steps)

    after, loss = jax.jit(learn)(learner, batches, env_steps)
    one_update = jax.jit(update)
    one_by_one = learner
    for k in range(3):
        tau = args.tau if moves and k == 0 else 0.0
        one_by_one, last_loss = one_update(one_by_one, row(batches, k), tau)
        if k == 0:
            first = one_by_one.params
    assert_close(after.params, one_by_one.params, 1e-4)
    assert_close(loss, last_loss, 1e-3)
    assert_close(after.target_params, first if moves else learner.target_params, 1e-4)


# ---------- What a run does
class Action(NamedTuple):
    env_steps: int
    params: dict  # the weights that chose it
    obs: np.ndarray
    number: int


class Group(NamedTuple):
    before: tuple  # the Learner
    batches: tuple
    env_steps: int
    after: tuple


def watch(dqn, args, env, monkeypatch):
    """Train. Returns what `train` returns, and each Action and each Group, in order."""
    events = []
    jit = jax.jit
    act = dqn.act

    def watched_jit(function):
        compiled = jit(function)

        def call(*inputs):
            outputs = compiled(*inputs)
            if inputs and inputs[-1] > 0:  # neither init_learner nor the call that compiles
                events.append(Group(inputs[0], inputs[1], inputs[-1], outputs[0]))
            return outputs

        return call

    def watched_act(args, rng, params, obs, env_steps, actions):
        number = act(args, rng, params, obs, env_steps, actions)
        events.append(Action(env_steps, params, obs, number))
        return number

    with monkeypatch.context() as patch:
        patch.setattr(jax, "jit", watched_jit)
        patch.setattr(dqn, "act", watched_act)
        result = dqn.train(args, env)
    return result, events


def groups_of(events):
    return [event for event in events if isinstance(event, Group)]


def updates_done(learner):
    return int(learner.opt_state[0].count)


@BOTH
def test_groups_of_updates_follow_the_flags(dqn, monkeypatch):
    """From the first multiple of train_frequency after learning_starts on, and not before."""
    args = small(dqn, total_timesteps=200, train_frequency=10, gradient_steps=3, batch_size=8)
    args = replace(args, learning_starts=50)
    (params, _, _), events = watch(dqn, args, common.RunsOutOfTime(dqn), monkeypatch)
    groups = groups_of(events)
    assert [group.env_steps for group in groups] == list(range(60, 201, 10))
    for k, group in enumerate(groups):
        assert group.batches.reward.shape == (3, 8)
        assert updates_done(group.before) == 3 * k
        assert updates_done(group.after) == 3 * k + 3
        assert not same(group.before.params, group.after.params)
        if k > 0:
            assert same(group.before, groups[k - 1].after)
    assert same(params, groups[-1].after.params)
    first = groups[0].before
    assert same(first.params, first.target_params)
    assert same(first.params, events[0].params)
    assert [event.env_steps for event in events if isinstance(event, Action)] == list(range(1, 201))


@BOTH
def test_learning_starts_with_the_first_stored_transition(dqn, monkeypatch):
    """An update after every step: with three steps in a target, the third is the first."""
    args = small(dqn, total_timesteps=5, train_frequency=1, gradient_steps=1, batch_size=4)
    _, events = watch(dqn, args, common.RunsOutOfTime(dqn), monkeypatch)
    first = 3 if dqn is lander else 1
    assert [group.env_steps for group in groups_of(events)] == list(range(first, 6))
    for group in groups_of(events):
        assert np.all(group.batches.reward > 0)  # nothing that is not filled is drawn


@BOTH
def test_acting_is_one_group_behind(dqn, monkeypatch):
    args = small(dqn, total_timesteps=100, train_frequency=10, gradient_steps=2, batch_size=8)
    _, events = watch(dqn, args, common.RunsOutOfTime(dqn), monkeypatch)
    acting = events[0].params
    compared = 0
    for event in events:
        if isinstance(event, Group):
            acting = event.before.params
        else:
            assert same(event.params, acting)
            compared += not same(acting, events[0].params)
    assert compared == 80  # the weights of the first group are used from step 21 on


@BOTH
@pytest.mark.parametrize("frequency", [40, 10])
def test_the_target_network_is_copied_when_it_is_due(frequency, dqn, monkeypatch):
    """At the first update at or after each multiple of the frequency, exactly, and at no other."""
    args = small(dqn, total_timesteps=400, tau=1.0, target_network_frequency=frequency)
    args = replace(args, train_frequency=16, gradient_steps=1, batch_size=8, learning_starts=60)
    _, events = watch(dqn, args, common.RunsOutOfTime(dqn), monkeypatch)
    copied = set()
    for group in groups_of(events):
        if not same(group.before.target_params, group.after.target_params):
            assert same(group.after.target_params, group.after.params)
            copied.add(group.env_steps)
    update_steps = [group.env_steps for group in groups_of(events)]
    assert copied == common.moves_due(frequency, update_steps, args.train_frequency)


@BOTH
def test_the_learning_rate_falls_through_a_run(dqn, monkeypatch):
    """Ten updates from learning_starts on; after the last, it would be 0."""
    args = small(dqn, total_timesteps=210, train_frequency=20, gradient_steps=1, batch_size=8)
    args = replace(args, learning_starts=10)
    _, events = watch(dqn, args, common.PaysWhatItShows(dqn), monkeypatch)
    rates = []
    for group in groups_of(events):
        rates.append(common.learning_rate_of(group.before, group.after))
    assert_close(np.array(rates), 0.02 * np.linspace(1, 0.1, 10), 1e-3)


@BOTH
def test_the_buffer_holds_scaled_rewards_of_n_steps(dqn, monkeypatch):
    """Episodes of four steps that pay 1, at gamma 0.5: near the end, sums are shorter."""
    args = small(dqn, total_timesteps=160, reward_scale=0.25, batch_size=64)
    _, events = watch(dqn, args, common.RunsOutOfTime(dqn), monkeypatch)
    batches = groups_of(events)[-1].batches
    found = set(zip(batches.reward.ravel() * 4, batches.discount.ravel(), strict=True))
    expected = {(1.0, 0.5)}
    if dqn is lander:
        expected |= {(1.75, 0.125), (1.5, 0.25)}
    assert found == expected
    args = replace(args, reward_scale=1.0)
    _, events = watch(dqn, args, common.Probe(dqn), monkeypatch)
    assert not np.any(groups_of(events)[-1].batches.discount)


@BOTH
def test_transitions_hold_what_was_seen_and_done(dqn, monkeypatch):
    """PaysLater shows -1 and then 1. Its second observation comes from before the reset."""
    args = small(dqn, total_timesteps=160, batch_size=64, **{"n_step": 1} if dqn is lander else {})
    _, events = watch(dqn, args, common.PaysLater(dqn), monkeypatch)
    batches = groups_of(events)[-1].batches
    last = batches.obs.ravel() == 1
    assert np.all(batches.next_obs == 1) and 0 < last.mean() < 1
    assert np.all((batches.discount.ravel() == 0) == last)
    worth = np.array([0, 1]) if dqn is lander else 1 - 2 * np.abs(LISTED - 0.5)
    expected = np.where(last, worth[batches.action.ravel()], 0)
    assert_close(batches.reward.ravel(), expected.astype(np.float32))
    assert len(np.unique(batches.action)) == len(worth)
    for event in events:
        if isinstance(event, Action):
            assert event.obs.shape == (1,) and event.number in range(len(worth))


# ---------- Acting
def numbers_of(dqn, args, params, env_steps):
    """The numbers of 4,000 actions."""
    rng = np.random.default_rng(0)
    options = 5 if dqn is lander else LISTED
    obs = np.zeros(1, np.float32)
    draws = [dqn.act(args, rng, params, obs, env_steps, options) for _ in range(4_000)]
    return np.bincount(draws, minlength=5) / 4_000


@BOTH
@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_epsilon_falls_and_stays(fraction, dqn):
    """Random actions are uniform; the others are the best: number 3 of 5."""
    args = small(dqn, total_timesteps=1_000, exploration_fraction=fraction, end_e=0.2)
    params = {"w0": np.zeros((1, 5), np.float32), "b0": np.float32([0, 1, 2, 3, 1])}
    for env_steps, epsilon in ((0, 1.0), (1, 0.998), (250, 0.6), (500, 0.2), (900, 0.2)):
        if fraction == 0 and env_steps:
            epsilon = 0.2
        expected = np.full(5, epsilon / 5)
        expected[3] += 1 - epsilon
        assert_close(numbers_of(dqn, args, params, env_steps), expected, 0.025)


def test_acting_on_sampled_actions():
    """The best of three random ones of five. Q is the action, so the largest is the best."""
    args = small(pendulum, q_input="state-action", sampled_actions=3, end_e=0.0)
    params = {"w0": np.float32([[0], [1]]), "b0": np.zeros(1, np.float32)}
    largest = [max(three) for three in itertools.product(range(5), repeat=3)]
    expected = np.bincount(largest) / 5**3
    assert_close(numbers_of(pendulum, args, params, 1_500), expected, 0.025)


def test_the_network_that_takes_actions():
    """A list for all rows, or one for each; in NumPy and in JAX."""
    params = {"w0": np.float32([[1], [2], [10]]), "b0": np.float32([3])}
    obs = np.float32([[1, 2], [5, 6]])
    alone = [[5 + 3, 5 + 10 + 3, 5 + 20 + 3], [17 + 3, 17 + 10 + 3, 17 + 20 + 3]]
    for array in (np.asarray, jax.numpy.asarray):
        q = pendulum.q_of_actions(params, array(obs), array(np.float32([0, 1, 2])))
        assert_close(q, np.float32(alone))
        q = pendulum.q_of_actions(params, array(obs), array(np.float32([[1], [2]])))
        assert_close(q, np.float32([[18], [40]]))


def test_listed_and_drawn_actions():
    env = common.Probe(pendulum)
    args = small(pendulum, sampled_actions=50)
    assert_close(pendulum.list_actions(args, env), LISTED)
    rng = np.random.default_rng(0)
    assert pendulum.draw_actions(args, rng, LISTED) is None
    drawn = pendulum.draw_actions(replace(args, q_input="state-action"), rng, LISTED)
    assert drawn.shape == (8, 50) and drawn.dtype == np.float32
    assert set(drawn.ravel()) == set(LISTED)
    assert not np.array_equal(drawn[0], drawn[1])


# ---------- Ctrl-C
class Interrupts(common.RunsOutOfTime):
    """Ctrl-C in one of its steps, counted over all episodes."""

    def __init__(self, dqn, step):
        super().__init__(dqn)
        self.left = step

    def outcome(self, action):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().outcome(action)


@BOTH
@pytest.mark.parametrize("step", [1, 57, 100])
def test_ctrl_c_in_any_step_counts_the_steps_done(step, dqn, monkeypatch):
    """Also in the first and in the last. What was learned until then is returned."""
    args = small(dqn, total_timesteps=100)
    env = Interrupts(dqn, 1 + step)  # check_env takes a step too
    (params, episodes, counts), events = watch(dqn, args, env, monkeypatch)
    assert counts["env_steps"] == step - 1 and counts["interrupted"]
    assert episodes.shape == ((step - 1) // 4, 2)
    learned = [group.after.params for group in groups_of(events)]
    assert same(params, learned[-1] if learned else events[0].params)


# ---------- Evaluation
@BOTH
def test_evaluation_plays_greedily_with_seeds_of_its_own(dqn):
    """Other seeds for other agents, and none that training uses."""

    class Seeded(common.PaysLater):
        seeds = []

        def reset(self, seed=None, options=None):
            self.seeds.append(seed)
            return super().reset(seed=seed)

    args = small(dqn, total_timesteps=20, eval_episodes=4)
    env = Seeded(dqn)
    dqn.train(replace(args, seed=7), env)
    checked, trained, *later = Seeded.seeds
    assert checked == 0 and 0 <= trained < 2**30 and set(later) == {None}
    sizes = (1, 2) if dqn is lander else (1, 5)
    for best in range(sizes[1]):
        # The network has one layer, in which action number `best` is the best.
        params = {"w0": np.zeros(sizes, np.float32), "b0": np.eye(sizes[1], dtype=np.float32)[best]}
        worth = best if dqn is lander else 1 - 2 * abs(LISTED[best] - 0.5)
        assert list(dqn.evaluate(args, params, env)) == [worth] * 4
    Seeded.seeds.clear()
    dqn.evaluate(replace(args, seed=7), params, env)
    dqn.evaluate(replace(args, seed=8), params, env)
    assert Seeded.seeds == list(range(2**30 + 7 * 4, 2**30 + 9 * 4))


def test_evaluation_with_the_network_that_takes_actions():
    args = small(pendulum, q_input="state-action", sampled_actions=1)
    # Q is the action: the best of all five is 1, for a reward of 0.
    params = {"w0": np.float32([[0], [1]]), "b0": np.zeros(1, np.float32)}
    assert list(pendulum.evaluate(args, params, common.PaysLater(pendulum))) == [0] * 3


@BOTH
def test_solved_is_a_mean_at_the_threshold(dqn, capsys):
    """And numbers are printed with three significant digits or more."""
    env = gymnasium.make("CartPole-v1")  # its threshold is 475
    args = small(dqn, seed=9)
    agent = dqn.summarize(args, env, np.array([475.0, 474.0, 476.0]))
    assert agent == {
        "seed": 9,
        "solved": True,
        "eval_return_mean": 475.0,
        "eval_return_std": pytest.approx(0.8164966),
        "eval_return_min": 474.0,
        "eval_episodes": 3,
    }
    assert not dqn.summarize(args, env, np.array([474.9]))["solved"]
    capsys.readouterr()
    env.spec.reward_threshold = None
    assert dqn.summarize(args, env, np.array([-0.06812]))["solved"] is None
    assert "mean -0.0681" in capsys.readouterr().out


# ---------- Films
def test_snapshots_are_filmed_and_change_nothing(tmp_path):
    args = small(lander, env_id="CartPole-v1")
    plain, _, _ = lander.train(args, gymnasium.make("CartPole-v1"))
    args = replace(args, eval_frequency=750, capture_video=True)
    with pytest.raises(lander.BadInput, match="eval_frequency.*output_dir"):
        lander.check(args)
    assert lander.main(replace(args, output_dir=str(tmp_path / "run"))) == 0
    for name in ("model_00001500", "model"):
        assert_close(lander.load_model(tmp_path / "run" / f"{name}.npz"), plain)
    early = lander.load_model(tmp_path / "run" / "model_00000750.npz")
    assert not same(early, plain)
    films = sorted(path.name for path in (tmp_path / "run").glob("*.gif"))
    assert films == ["model.gif", "model_00000750.gif", "model_00001500.gif"]
    frames = imageio.v3.imread(tmp_path / "run" / "model.gif")
    assert frames.shape[3] == 3 and np.any(frames[0] != frames[-1])


def test_train_alone_makes_the_folder_of_its_snapshots(tmp_path):
    args = small(lander, total_timesteps=100, eval_frequency=50, output_dir=str(tmp_path / "new"))
    lander.train(args, gymnasium.make("CartPole-v1"))
    assert len(list((tmp_path / "new").glob("model_*.npz"))) == 2


def test_a_film_has_every_other_frame_at_half_size():
    """Of the first 2,000 steps: of 2,100, it shows 1,000."""

    class Filmed(common.Probe):
        def outcome(self, action):
            return 1.0, False, self.steps == self.length

        def render(self):
            return np.full((6, 8, 3), self.steps)

    params = {"w0": np.zeros((1, 2), np.float32), "b0": np.zeros(2, np.float32)}
    for length, shown in ((5, 3), (2_100, 1_000)):
        env = Filmed(lander)
        env.length = length
        frames = []
        assert lander.play(params, lander.wrap_env(env), 3, frames) == length
        assert len(frames) == shown and frames[0].shape == (3, 4, 3)
        assert [frame[0, 0, 0] for frame in frames[:3]] == [1, 3, 5]

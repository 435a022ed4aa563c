"""Whatever environment a user brings: it runs, or is refused clearly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from common import PaysWhatItShows, Probe, RunsOutOfTime, assert_close, small
from gymnasium import spaces
from gymnasium.spaces import Box, Discrete
from gymnasium.wrappers import RecordEpisodeStatistics, TransformObservation, TransformReward

import dqn_lunarlander as lander
import dqn_pendulum_discretized as pendulum

BOTH = pytest.mark.parametrize("dqn", [lander, pendulum], ids=["lander", "pendulum"])
ROOT = Path(__file__).resolve().parent.parent
OBS = np.zeros(1, np.float32)
# The probes write over their observations on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.*share an object")


@pytest.fixture
def register():
    """A function that registers an environment as Own-v0, until the test ends."""

    def register_own(make, **options):
        gymnasium.register("Own-v0", entry_point=make, **options)

    yield register_own
    gymnasium.registry.pop("Own-v0", None)


def main(dqn, **changes):
    """The exit status of a run of a moment in Own-v0."""
    return dqn.main(small(dqn, total_timesteps=100, env_id="Own-v0", **changes))


def broken(error):
    """A function that raises the error, whatever it is called with."""

    def method(*inputs, **options):
        raise error

    return method


# ---------- What fits
class FlagsAsArrays(gymnasium.Wrapper):
    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, np.array(terminated), np.array(truncated), info


FORMS = {  # forms of what an environment gives, which must make no difference
    "list": lambda env: TransformObservation(env, lambda obs: obs.tolist(), None),
    "whole": lambda env: TransformObservation(env, lambda obs: obs.astype(int), None),
    "reward NumPy": lambda env: TransformReward(env, np.float32),
    "reward whole": lambda env: TransformReward(env, int),
    "reward array": lambda env: TransformReward(env, lambda reward: np.array([reward])),
    "flag array": FlagsAsArrays,
}
PLAIN_RUNS = {}  # what each script does without a wrapper


@BOTH
@pytest.mark.parametrize("wrap", FORMS.values(), ids=FORMS)
def test_the_form_of_observations_and_rewards_makes_no_difference(wrap, dqn):
    args = small(dqn, total_timesteps=100)
    if dqn not in PLAIN_RUNS:
        PLAIN_RUNS[dqn] = dqn.train(args, PaysWhatItShows(dqn))[:2]
    assert_close(dqn.train(args, wrap(PaysWhatItShows(dqn)))[:2], PLAIN_RUNS[dqn])


SPACES = {  # an observation space, how many numbers its observations become
    "number from 5": (Discrete(3, start=5), 3),
    "numbers": (spaces.MultiDiscrete([2, 3]), 5),
    "bits": (spaces.MultiBinary(3), 3),
    "grid": (Box(0, 255, (2, 3), np.uint8), 6),
    "tuple": (spaces.Tuple([Discrete(3), Box(-1, 1, (2,))]), 5),
    "text": (spaces.Text(4, min_length=4), 4),
    "dict": (spaces.Dict({"a": Discrete(3), "b": Box(-1, 1, (2, 2))}), 7),
}


@BOTH
@pytest.mark.parametrize("space, size", SPACES.values(), ids=SPACES)
def test_observations_of_every_kind_are_flattened(space, size, dqn):
    env = TransformObservation(Probe(dqn), lambda obs: space.sample(), space)
    dqn.check_env(env)
    wrapped = dqn.wrap_env(env)
    obs, _ = wrapped.reset()
    assert obs.shape == wrapped.observation_space.shape == (size,) and obs.dtype == np.float32


@BOTH
def test_flattened_observations(dqn):
    space = spaces.Dict({"a": Discrete(3), "b": Box(-1, 1, (2,), np.float64)})
    flat = dqn.flatten(space, {"a": 2, "b": [0.25, 7.0]})  # bounds may be exceeded
    assert flat.dtype == np.float32 and list(flat) == [0, 0, 1, 0.25, 7]


GRID = '''
import gymnasium as gym
import numpy as np

class GridWorld(gym.Env):
    """As in Gymnasium's tutorial: no render_mode."""
    def __init__(self, size: int = 5):
        self.size = size
        cell = gym.spaces.Box(0, size - 1, shape=(2,), dtype=int)
        self.observation_space = gym.spaces.Dict({"agent": cell, "target": cell})
        self.action_space = gym.spaces.Discrete(4)
    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.agent = self.np_random.integers(0, self.size, size=2, dtype=int)
        self.target = self.np_random.integers(0, self.size, size=2, dtype=int)
        return {"agent": self.agent, "target": self.target}, {}
    def step(self, action):
        assert isinstance(action, int)
        move = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])[action]
        self.agent = np.clip(self.agent + move, 0, self.size - 1)
        done = np.array_equal(self.agent, self.target)
        return {"agent": self.agent, "target": self.target}, 1 if done else 0, done, False, {}

gym.register("GridWorld-v0", GridWorld, max_episode_steps=20)
'''


def test_the_tutorials_grid_world_runs(tmp_path, monkeypatch, capsys):
    """Its __init__ takes no render_mode, and its actions are Python's int."""
    (tmp_path / "my_grid.py").write_text(GRID)
    monkeypatch.syspath_prepend(tmp_path)
    args = small(lander, total_timesteps=200, env_id="my_grid:GridWorld-v0")
    assert lander.main(args) == 0
    assert "3 greedy episodes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "dtype, changes", [(np.float64, {}), (np.float32, {"q_input": "state-action"})]
)
def test_actions_are_in_the_declared_space(dtype, changes):
    """0.1 in float32 is more than 0.1 in float64. The probe asserts that its space has them."""
    env = RunsOutOfTime(pendulum)
    env.action_space = Box(-0.1, 0.1, (1,), dtype)
    args = small(pendulum, total_timesteps=100, num_actions=7, **changes)
    params, _, _ = pendulum.train(args, env)
    assert np.all(pendulum.evaluate(args, params, env) == 4)
    listed = pendulum.list_actions(args, env)
    assert listed.dtype == dtype and listed[0] == dtype(-0.1) and listed[-1] == dtype(0.1)


@BOTH
def test_an_environment_may_keep_statistics_of_its_own(dqn):
    env = RecordEpisodeStatistics(RunsOutOfTime(dqn))
    _, episodes, _ = dqn.train(small(dqn, total_timesteps=200), env)
    assert list(episodes[:, 0]) == list(range(4, 201, 4)) and np.all(episodes[:, 1] == 4)


# ---------- What does not fit is refused by name
MISSION = type("Mission", (spaces.Space,), {})()  # minigrid has one
API = "Gymnasium's API is reset"
REFUSED = [  # what an environment has, and a word of the message
    ("observation_space", spaces.Sequence(Discrete(2)), "Sequence"),
    ("observation_space", MISSION, "NotImplementedError"),
    ("observation_space", spaces.Dict({"mission": MISSION}), "NotImplementedError"),
    ("action_space", spaces.MultiDiscrete([2, 2]), "MultiDiscrete"),
    ("action_space", Box(-1, 1, (2,)), "Box"),
    ("action_space", Box(-np.inf, np.inf, (1,)), "Box"),
    ("action_space", Box(-2, 2, (1,), np.int64), "Box.*int64"),
    ("reset", lambda: (OBS, {}), API),  # no seed
    ("reset", lambda seed=None, options=None: OBS, API),  # no info
    ("reset", lambda seed=None, options=None: np.zeros(2), API),  # it unpacks like two results
    ("step", lambda action: (OBS, 1.0, True, {}), API),  # four values
]
REFUSED = [(dqn, *case) for case in REFUSED for dqn in (lander, pendulum)]
REFUSED += [(lander, "action_space", Box(-1, 1, (1,)), "Box")]
REFUSED += [(pendulum, "action_space", Discrete(2), "Discrete")]


@pytest.mark.parametrize("dqn, name, value, message", REFUSED)
def test_what_does_not_fit_is_refused_by_name(dqn, name, value, message):
    env = Probe(dqn)
    setattr(env, name, value)
    with pytest.raises(dqn.BadInput, match=message):
        dqn.train(small(dqn), env)


@BOTH
def test_a_copy_in_a_package_refuses_too(dqn, monkeypatch):
    copied = type(sys)(f"package.{dqn.__name__}")
    monkeypatch.setitem(sys.modules, copied.__name__, copied)
    exec(compile(Path(dqn.__file__).read_text(encoding="utf-8"), "copy", "exec"), vars(copied))
    env = Probe(dqn)
    env.reset = lambda seed=None, options=None: OBS
    with pytest.raises(copied.BadInput, match=API):
        copied.train(small(copied), env)
    own = 'def reset(seed=None, options=None):\n    raise KeyError("own")'
    exec(compile(own, "copy", "exec"), vars(copied))  # an environment in the same file
    env.reset = copied.reset
    with pytest.raises(KeyError, match="own"):
        copied.train(small(copied), env)


@BOTH
def test_an_object_of_the_old_gym_is_refused_by_name(dqn):
    class OldEnv:
        observation_space = Probe.observation_space
        action_space = Discrete(2)

    with pytest.raises(dqn.BadInput, match="gymnasium.Env.*OldEnv"):
        dqn.train(small(dqn), OldEnv())


UNDECLARED = {  # a declared space, and an observation that it would change or can't hold
    "floats for whole numbers": (Box(0, 255, (1,), np.uint8), np.float32([0.4])),
    "too large for its type": (Box(0, 255, (1,), np.uint8), np.array([256])),
    "-1 of two": (Discrete(2), -1),
    "2 of two": (Discrete(2), 2),
    "another shape": (Box(-1, 1, (2,)), np.zeros(3)),
    "nothing": (Box(-1, 1, (1,)), None),
    "in a dict": (spaces.Dict({"a": Discrete(2)}), {"a": 5}),
    "in a tuple": (spaces.Tuple([Discrete(2)]), (5,)),
    "a part is missing": (spaces.Dict({"a": Discrete(2), "b": Discrete(2)}), {"b": 1}),
    "too short": (spaces.Tuple([Discrete(2), Discrete(2)]), (1,)),
}


@BOTH
@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("space, wrong", UNDECLARED.values(), ids=UNDECLARED)
def test_observations_outside_the_declared_space_are_refused(space, wrong, step, dqn):
    """In the first reset, or in the first step."""
    seen = []

    def observation(obs):
        seen.append(obs)
        return wrong if len(seen) > step else space.sample()

    env = TransformObservation(Probe(dqn), observation, space)
    with pytest.raises(dqn.BadInput, match="not in the declared"):
        dqn.train(small(dqn), env)


@BOTH
def test_observations_are_checked_at_every_step(dqn):
    seen = []

    def observation(obs):
        seen.append(obs)
        return np.zeros(1) if len(seen) < 40 else np.float64([0.4])

    env = TransformObservation(Probe(dqn), observation, Box(0, 255, (1,), np.uint8))
    with pytest.raises(dqn.BadInput, match="not in the declared"):
        dqn.train(small(dqn), env)
    assert len(seen) == 40


@BOTH
@pytest.mark.parametrize("space", [spaces.Dict({"a": Discrete(2)}), spaces.Tuple([Discrete(2)])])
def test_nothing_in_place_of_a_dict_or_tuple_is_refused(space, dqn):
    env = TransformObservation(Probe(dqn), lambda obs: None, space)
    with pytest.raises(dqn.BadInput, match="not in the declared"):
        dqn.train(small(dqn), env)


@BOTH
def test_a_number_that_is_missing_before_an_end_is_found(dqn):
    """Every step ends its episode: only next_obs shows it."""
    env = Probe(dqn)
    first = env.reset
    env.reset = lambda **options: (first(**options)[0].copy(), {})
    env.outcome = lambda action: (env.obs.fill(np.nan), (1.0, True, False))[1]
    with pytest.raises(dqn.BadRun, match="next observation is not finite"):
        dqn.train(small(dqn, total_timesteps=100), env)


@BOTH
@pytest.mark.parametrize("what", ["observation", "reward", "loss"])
def test_a_number_that_is_not_finite_ends_the_run_by_name(what, dqn):
    env = RunsOutOfTime(dqn)
    if what == "observation":
        env = TransformObservation(env, lambda obs: obs * np.float32("nan"), None)
    else:
        reward = np.inf if what == "reward" else 1e30  # its square is infinite in float32
        env = TransformReward(env, lambda _: reward)
    changes = {"loss": "squared"} if dqn is lander else {}
    with pytest.raises(dqn.BadRun, match=f"^{what} is not finite"):
        dqn.train(small(dqn, total_timesteps=100, **changes), env)


# ---------- Errors of the user's own code keep their traceback
OWN_ERRORS = [
    KeyError("level"),
    AssertionError(),
    TypeError("own"),
    ValueError("own"),
    TimeoutError("timed out"),
    FloatingPointError("own"),
    ImportError("own"),
]


@BOTH
@pytest.mark.parametrize("method", ["reset", "step"])
@pytest.mark.parametrize("error", OWN_ERRORS, ids=repr)
def test_own_errors_are_not_refused(error, method, dqn, register):
    """From the first reset or step, through train and through main."""
    env = Probe(dqn)
    setattr(env, method, broken(error))
    with pytest.raises(type(error)) as caught:
        dqn.train(small(dqn), env)
    assert caught.value is error
    register(lambda: env, max_episode_steps=10)
    with pytest.raises(type(error)) as caught:
        main(dqn)
    assert caught.value is error


@BOTH
def test_own_errors_in_the_middle_of_training_are_not_refused(dqn):
    class Breaks(RunsOutOfTime):
        calls = 0

        def outcome(self, action):
            self.calls += 1
            if self.calls == 50:
                raise TimeoutError("timed out")
            return super().outcome(action)

    with pytest.raises(TimeoutError, match="timed out"):
        dqn.train(small(dqn), Breaks(dqn))


@BOTH
def test_own_errors_of_init_are_not_refused(dqn, register):
    register(broken(KeyError("level")))
    with pytest.raises(KeyError, match="level"):
        main(dqn)


@BOTH
def test_own_errors_with_a_cause_are_not_refused(dqn):
    env = Probe(dqn)

    def reset(seed=None, options=None):
        try:
            {}["level"]
        except KeyError as error:
            raise RuntimeError("own") from error

    env.reset = reset
    with pytest.raises(RuntimeError, match="own"):
        dqn.train(small(dqn), env)


@BOTH
def test_own_errors_with_a_cause_that_was_not_raised_are_not_refused(dqn):
    env = Probe(dqn)

    def reset(seed=None, options=None):
        raise RuntimeError("own") from KeyError("level")

    env.reset = reset
    with pytest.raises(RuntimeError, match="own"):
        dqn.train(small(dqn), env)


@BOTH
def test_own_misuse_of_gymnasium_is_not_refused(dqn):
    """The last line of the traceback is Gymnasium's, but the mistake is in the user's reset."""
    env = Probe(dqn)
    env.reset = lambda seed=None, options=None: Box(0, 1, (2,)).sample(mask="wrong")
    with pytest.raises(gymnasium.error.Error):
        dqn.train(small(dqn), env)


@BOTH
def test_an_import_error_in_the_users_module_keeps_its_traceback(dqn, tmp_path, monkeypatch):
    (tmp_path / "my_broken.py").write_text("import nothing_of_this_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        dqn.main(small(dqn, env_id="my_broken:Own-v0"))


def test_own_errors_on_the_command_line(tmp_path):
    """Exit status 1 and a traceback that shows the user's line."""
    module = GRID.replace("        super().reset(seed=seed)", '        self.cfg["level"]')
    module = module.replace("self.size = size", "self.cfg = {}")
    (tmp_path / "my_grid.py").write_text(module.replace("(0, size - 1", "(0, 4"))
    command = [sys.executable, str(ROOT / "dqn_lunarlander.py"), "--env-id", "my_grid:GridWorld-v0"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" in done.stderr and 'self.cfg["level"]' in done.stderr
    assert done.stderr.endswith("KeyError: 'level'\n")


# ---------- Errors of Gymnasium are one line
@BOTH
def test_a_refusal_without_text_has_the_name_of_the_error(dqn, monkeypatch, capsys):
    made_by_gymnasium = {"__name__": "gymnasium.some_module"}
    exec("def make(*inputs, **options):\n    assert False", made_by_gymnasium)
    monkeypatch.setattr(gymnasium, "make", made_by_gymnasium["make"])
    assert main(dqn) == 2
    assert capsys.readouterr().err == "error: env_id: AssertionError:\n"


@BOTH
def test_unknown_environments_are_one_line(dqn, capsys):
    for env_id in ("Nothing-v0", "no_module:X-v0", "Blackjack-v7"):
        assert dqn.main(small(dqn, env_id=env_id)) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: env_id: ") and err.count("\n") == 1


def test_without_box2d_the_line_says_what_works(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "Box2D", None)
    for name in list(sys.modules):
        if name.startswith("gymnasium.envs.box2d"):
            monkeypatch.delitem(sys.modules, name)
    assert lander.main(small(lander, env_id="LunarLander-v3")) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "build-essential python3-dev swig" in err


@BOTH
def test_a_model_for_other_observations_is_refused_with_its_sizes(dqn, tmp_path, register, capsys):
    register(lambda: RunsOutOfTime(dqn), max_episode_steps=10)
    assert main(dqn, output_dir=str(tmp_path / "run")) == 0
    model = str(tmp_path / "run" / "model.npz")
    assert main(dqn, load_model=model) == 0
    wide = Probe(dqn)
    wide.observation_space = Box(-1, 1, (7,))
    wide.obs = np.zeros(7, np.float32)
    gymnasium.registry.pop("Own-v0")
    register(lambda: wide, max_episode_steps=10)
    capsys.readouterr()
    assert main(dqn, load_model=model) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: load_model: ") and err.count("\n") == 1
    assert " 1 " in err  # observations of the model


# ---------- Warnings, and episodes without an end
def test_a_wide_range_of_observations_is_a_warning(capsys):
    for dqn in (lander, pendulum):
        for high, warned in (([1, 99], False), ([1, 101], True), ([1, np.inf], False)):
            env = Probe(dqn)
            env.observation_space = Box(-np.float32(high), np.float32(high))
            dqn.warn(dqn.Args(), env)
            assert ("100 times" in capsys.readouterr().err) == warned


def test_a_buffer_that_may_not_fit_into_memory_is_a_warning(capsys):
    """Two observations of 200 x 200 x 3 numbers in a transition: 4 bytes for each number."""
    for dqn in (lander, pendulum):
        env = Probe(dqn)
        env.observation_space = Box(0, 255, (200, 200, 3), np.uint8)
        for buffer_size, warned in ((1_000, False), (10_000, True)):
            dqn.warn(dqn.Args(buffer_size=buffer_size), env)
            assert ("takes 10 GB" in capsys.readouterr().err) == warned


@BOTH
def test_an_endless_evaluation_is_foretold_and_what_was_learned_is_kept(
    dqn, tmp_path, monkeypatch, register, capsys
):
    class Endless(RunsOutOfTime):
        """After 150 steps of training, no episode ends."""

        calls = 0

        def outcome(self, action):
            self.calls += 1
            return 1.0, False, self.steps == 4 and self.calls < 100

    monkeypatch.setattr(dqn, "MAX_EVAL_STEPS", 1_000)
    register(lambda: Endless(dqn))
    assert main(dqn, output_dir=str(tmp_path / "run")) == 1
    out, err = capsys.readouterr()
    warning, error = err.strip().split("error: ")
    for text in (warning, error):
        assert "max_episode_steps" in text and "TimeLimit" in text
    assert warning.startswith("warning: ") and "100 steps" in out
    kept = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert kept == ["curve.png", "model.npz", "returns.csv", "summary.json"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["env_steps"] == 100 and summary["seeds"] == []


@BOTH
def test_no_warning_where_all_is_well(dqn, register, capsys):
    register(lambda: RunsOutOfTime(dqn), max_episode_steps=10)
    assert main(dqn) == 0
    assert capsys.readouterr().err == ""

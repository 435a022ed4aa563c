"""What every script promises on its command line, and the README beside them."""

import ast
import contextlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import gymnasium
import jax
import numpy as np
import pytest
import tyro
from common import assert_close

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CEILINGS = {  # bytes, lines, lines after "# ---------- Command line"
    "dqn_cartpole_jax": (20_000, 450, 85),
    "dqn_lunarlander": (20_000, 450, 85),
    "dqn_pendulum_discretized": (19_500, 440, 80),
    "q_table_maze": (17_000, 390, 70),
}
DQN = "--total-timesteps 1280 --eval-episodes 5 --hidden-sizes 8"
SMALL = {  # flags of a run of a moment
    "q_table_maze": "--total-timesteps 20000 --eval-episodes 5 --slip-prob 0.5",
    "dqn_cartpole_jax": DQN,
    "dqn_lunarlander": DQN + " --env-id CartPole-v1",
    "dqn_pendulum_discretized": DQN,
}
BAD = "seed -1|total-timesteps -1|learning-rate -1|gamma nan|eval-episodes 0|output-dir ."
BAD += "|load-model missing.npz"
BAD_DQN = BAD + "|total-timesteps 0|batch-size 0|hidden-sizes 8 0|tau 0|buffer-size 0|end-e inf"
BAD_GYMNASIUM = BAD_DQN + "|env-id Nothing-v0|env-id Taxi-v3|env-id no_module:X-v0"
BAD_GYMNASIUM += "|env-id Blackjack-v7|reward-scale 0|train-frequency 0|gradient-steps 0"
BAD_LANDER = "|env-id Pendulum-v1|env-id BipedalWalker-v3|n-step 0|eval-frequency 5|capture-video"
BAD_PENDULUM = "|env-id CartPole-v1|env-id LunarLander-v3|num-bins 1|max-samples 0"
BAD_FLAGS = {
    "q_table_maze": BAD + "|board SXG|board SF/G|board FFG|board SSG|board 9x9|slip-prob 2",
    "dqn_cartpole_jax": BAD_DQN + "|num-seeds 0|buffer-size 63|total-timesteps 63|n-step 0",
    "dqn_lunarlander": BAD_GYMNASIUM + BAD_LANDER,
    "dqn_pendulum_discretized": BAD_GYMNASIUM + BAD_PENDULUM,
}
BAD_CASES = [(script, flag) for script, flags in BAD_FLAGS.items() for flag in flags.split("|")]
EACH = pytest.mark.parametrize("script", SMALL)


def run(script, flags):
    """Run main() on flags. Returns the status and what it printed."""
    module = importlib.import_module(script)
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = module.main(module.tyro.cli(module.Args, args=flags.split()))
    return status, out.getvalue(), err.getvalue()


def start(script, flags, folder=ROOT, **environment):
    command = [sys.executable, f"{script}.py", *flags.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=os.environ | environment, **pipes)


def assert_refused(script, flags, name):
    """With one line that names the flag, and nothing written."""
    before = set(Path().iterdir())
    status, out, err = run(script, flags)
    assert (status, out) == (2, "")
    assert re.fullmatch(f"error: .*{name}.*\n", err)
    assert set(Path().iterdir()) == before


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with a folder for each script, of a run of a moment."""
    folder = tmp_path_factory.mktemp("kept")
    for script, flags in SMALL.items():
        status, _, err = run(script, f"{flags} --output-dir {folder / script}")
        assert (status, err) == (0, "")
    return folder


@pytest.mark.parametrize("script,flag", BAD_CASES)
def test_bad_settings_end_with_one_line(script, flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alone = flag.startswith(("output-dir", "capture-video", "eval-frequency"))
    flags = f"--{flag}" if alone else f"--{flag} --output-dir new"
    assert_refused(script, flags, flag.split()[0].replace("-", "_"))


MISSING = [(script, "", "matplotlib") for script in SMALL]
MISSING += [("dqn_lunarlander", "--capture-video", "imageio")]
MISSING += [("dqn_lunarlander", "--capture-video --env-id Acrobot-v1", "pygame")]


@pytest.mark.parametrize("script,flags,package", MISSING)
def test_a_missing_package_is_found_before_training(script, flags, package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    assert_refused(script, f"{flags} --output-dir new", "capture_video" if flags else "output_dir")


@EACH
def test_models_that_do_not_fit(script, kept, tmp_path, monkeypatch):
    """Damaged, of another script, of another board, or for other observations or torques."""
    monkeypatch.chdir(tmp_path)
    good = kept / script / "model.npz"
    Path("cut.npz").write_bytes(good.read_bytes()[:500])
    Path("text.npz").write_text("no model")
    models = [".", "cut.npz", "text.npz"]
    models += [kept / other / "model.npz" for other in SMALL if other != script]
    if script == "q_table_maze":
        models += [f"{good} --board SFF/HFG"]  # as many cells
    else:
        arrays = dict(np.load(good))
        for name in "w0", "w1":  # for fewer observations, and for more actions
            shape = np.array(arrays[name].shape)
            shape[shape != 8] += 1
            np.savez(f"{name}.npz", **arrays | {name: np.ones(shape, np.float32)})
            models += [f"{name}.npz"]
    if script == "dqn_pendulum_discretized":
        others = "--num-bins 6", "--env-id Pendulum-v1", "--q-input state-action"
        models += [f"{good} {flags}" for flags in others]
    for model in models:
        flags = f"{SMALL[script]} --output-dir new --load-model {model}"
        assert_refused(script, flags, "load_model")


@EACH
def test_a_kept_run_is_complete_and_has_learned(script, kept):
    folder = kept / script
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["curve.png", "model.npz", "returns.csv", "summary.json"]
    summary = json.loads((folder / "summary.json").read_text())
    named = "script args versions device env_steps compile_seconds train_seconds steps_per_second"
    assert set(summary) >= set(named.split())
    (seed,) = summary["seeds"]
    named = "seed eval_return_mean eval_return_std eval_return_min eval_episodes solved"
    assert set(seed) >= set(named.split())
    returns = np.genfromtxt(folder / "returns.csv", delimiter=",", names=True)
    assert returns.dtype.names[:2] == ("env_step", "episode_return")
    assert np.all(np.diff([1, *returns["env_step"], summary["env_steps"]]) >= 0)
    assert summary["env_steps"] == summary["args"]["total_timesteps"]
    arrays = dict(np.load(folder / "model.npz", allow_pickle=False))
    for name in {"q_table", "b0", "b1"} & set(arrays):  # 0 before the first update
        assert np.any(arrays[name])


@EACH
def test_a_kept_model_evaluates_to_the_same_again(script, kept, tmp_path):
    """Its seed and flags are not those of this command, and the sizes of layers are read."""
    again = tmp_path / "again"
    flags = SMALL[script].replace(" --hidden-sizes 8", "")
    model = kept / script / "model.npz"
    assert run(script, f"{flags} --load-model {model} --output-dir {again}")[0] == 0
    summary = json.loads((again / "summary.json").read_text())
    before = json.loads((kept / script / "summary.json").read_text())
    assert summary["seeds"] == [before["seeds"][0] | {"seed": None}]
    assert "args" not in summary
    assert [path.name for path in again.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("script", list(SMALL)[1:])
def test_weights_that_are_not_finite_end_the_run(script, monkeypatch):
    nan = lambda params, _: jax.tree.map(lambda x: x * np.nan, params)  # noqa: E731
    monkeypatch.setattr("optax.apply_updates", nan)
    # Python prints the message and exits with 1.
    with pytest.raises(SystemExit, match=r"\Aerror: .*loss.* not finite.*\Z"):
        run(script, SMALL[script])


@EACH
@pytest.mark.parametrize("strict", [False, True])
def test_one_copied_file_runs_alone_and_writes_nothing(script, strict, tmp_path):
    """In a folder of its own, and under what strict projects set for JAX."""
    shutil.copy(ROOT / f"{script}.py", tmp_path)
    strictness = {"JAX_ENABLE_X64": "1", "JAX_DEBUG_NANS": "1", "JAX_NUMPY_RANK_PROMOTION": "raise"}
    process = start(script, SMALL[script], tmp_path, **(strictness if strict else {}))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert "5 greedy episodes: mean" in out
    assert not re.search("loss (0|nan),", out)
    assert [path.name for path in tmp_path.iterdir()] == [f"{script}.py"]


def train(script, **changes):
    """The params and the episodes of a run of a moment."""
    module = importlib.import_module(script)
    args = module.tyro.cli(module.Args, args=SMALL[script].split())
    env = [gymnasium.make(args.env_id)] if hasattr(args, "env_id") else []
    return module.train(replace(args, **changes), *env)[:2]


@EACH
def test_same_settings_same_bits_other_seed_other_agent(script):
    """Although learning overlaps acting; integers may stand for floats."""
    fields = importlib.import_module(script).Args.__dataclass_fields__
    names = [name for name, field in fields.items() if isinstance(field.default, float)]
    assert_close(
        train(script, **dict.fromkeys(names, 1)), train(script, **dict.fromkeys(names, 1.0))
    )
    params, episodes = train(script)
    assert_close(train(script), (params, episodes))
    other, _ = train(script, seed=2)
    for name, x in params.items():
        assert np.any(x != other[name])


@EACH
def test_train_checks_its_settings_in_a_file_with_postponed_annotations(script):
    text = (ROOT / f"{script}.py").read_text()
    first = text.index("import ", text.index('"""\n\nimport'))
    module = type(sys)(f"{script}_copy")
    sys.modules[module.__name__] = module
    text = f"{text[:first]}from __future__ import annotations\n{text[first:]}"
    exec(compile(text, script, "exec"), module.__dict__)
    env = [None] if hasattr(module.Args, "env_id") else []
    for name in ("gamma", "eval_episodes", "learning_rate"):
        with pytest.raises(ValueError, match=name):
            module.train(module.Args(**{name: -1}), *env)


@EACH
def test_ctrl_c_evaluates_and_keeps_the_run(script, tmp_path):
    run_folder = tmp_path / "run"
    process = start(script, f"{SMALL[script]} --total-timesteps 99999999 --output-dir {run_folder}")
    assert "steps" in process.stdout.readline()  # training is under way
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "")
    assert "5 greedy episodes: mean" in out
    assert len(list(run_folder.iterdir())) == 4
    summary = json.loads((run_folder / "summary.json").read_text())
    assert summary["interrupted"] and 0 < summary["env_steps"] < 99_999_999


@EACH
def test_inline_metadata_names_what_requirements_txt_lists(script):
    text = (ROOT / f"{script}.py").read_text()
    block = re.search(r"# /// script\n((?:#.*\n)+?)# ///\n", text).group(1)
    metadata = tomllib.loads(re.sub("^# ?", "", block, flags=re.M))
    listed = re.findall(r"^\w+\S*", (ROOT / "requirements.txt").read_text(), re.M)
    named = set()
    for package in metadata["dependencies"]:
        name, extra, bounds = re.fullmatch(r"(\w+)(?:\[(.*)\])?(.*)", package).groups("")
        named |= {name}
        assert any(re.match(name, x) and extra in x and x.endswith(bounds) for x in listed)
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", text, re.M))
    assert imported - set(sys.stdlib_module_names) == named


# ---------- What the README and the docstrings promise
def source(script):
    return (ROOT / f"{script}.py").read_text()


@pytest.mark.parametrize("name", ["README", *CEILINGS])
def test_every_command_has_flags_that_its_script_takes(name):
    text = README if name == "README" else ast.get_docstring(ast.parse(source(name)))
    found = re.findall(r"python (\w+)\.py([^\n]*)", text)
    assert len(found) >= 2
    for script, rest in found:
        if script in CEILINGS and "$" not in rest:
            flags = rest.split("  ")[0].split()
            tyro.cli(importlib.import_module(script).Args, args=flags)


def test_links_lead_to_files_and_the_snippet_runs():
    links = re.findall(r"\]\((\w[^):]+)\)", README)
    assert len(links) >= 6
    assert all((ROOT / link).exists() for link in links)
    (snippet,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    code = snippet.replace("50_000", "3_000, eval_episodes=2")
    exec(code, {"env": gymnasium.make("CartPole-v1")})


@pytest.mark.parametrize("script", CEILINGS)
def test_the_files_and_the_readme_stay_small(script):
    text = source(script)
    command_line = text.partition("# ---------- Command line")[2]
    sizes = len(text.encode()), len(text.splitlines()), len(command_line.splitlines())
    assert np.all(np.array(sizes) <= CEILINGS[script])
    assert max(map(len, text.splitlines())) <= 100
    assert len(README.splitlines()) <= 120

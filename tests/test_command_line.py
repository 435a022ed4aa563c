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
from common import assert_close, same
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DQN = "--total-timesteps 1280 --eval-episodes 5 --hidden-sizes 8"
SMALL = {  # flags of a run of a moment
    "q_table_maze": "--total-timesteps 20000 --eval-episodes 5 --slip-prob 0.5",
    "dqn_cartpole_jax": DQN,
    "dqn_lunarlander": f"{DQN} --env-id CartPole-v1",
    "dqn_pendulum_discretized": DQN,
}
SCRIPTS = list(SMALL)
DQN_SCRIPTS = SCRIPTS[1:]
EACH = pytest.mark.parametrize("script", SCRIPTS)
EACH_DQN = pytest.mark.parametrize("script", DQN_SCRIPTS)


def run(script, flags):
    """Run main() on flags. Returns the status and what it printed."""
    module = importlib.import_module(script)
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = module.main(tyro.cli(module.Args, args=flags.split()))
    return status, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def started(script, flags, folder=ROOT, **environment):
    """The script in a process of its own, which Ctrl-C can stop even if it can't stop this one."""
    restore = "import runpy, signal, sys; sys.argv.pop(0)"
    restore += "; signal.signal(signal.SIGINT, signal.default_int_handler)"
    restore += "; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", restore, f"{script}.py", *flags.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=os.environ | environment, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def train(script, **changes):
    """The params and the episodes of a run of a moment."""
    module = importlib.import_module(script)
    args = tyro.cli(module.Args, args=SMALL[script].split())
    env = [gymnasium.make(args.env_id)] if hasattr(args, "env_id") else []
    return module.train(replace(args, **changes), *env)[:2]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with a folder for each script, of a run of a moment."""
    folder = tmp_path_factory.mktemp("kept")
    for script, flags in SMALL.items():
        status, _, err = run(script, f"{flags} --output-dir {folder / script}")
        assert (status, err) == (0, "")
    return folder


# ---------- Bad input
BAD = {"seed": "-1", "total-timesteps": "-1", "learning-rate": "-1", "gamma": "nan"}
BAD |= {"eval-episodes": "0", "output-dir": ".", "load-model": "missing.npz"}
BAD_DQN = {"total-timesteps": "0", "batch-size": "0", "hidden-sizes": "8 0", "tau": "0"}
BAD_DQN |= {"buffer-size": "0", "end-e": "inf", "exploration-fraction": "1.1"}
BAD_DQN |= {"learning-starts": "-1", "target-network-frequency": "-1"}
BAD_GYMNASIUM = {"reward-scale": "0", "train-frequency": "0", "gradient-steps": "0"}
BAD_MAZE = {"slip-prob": "2", "decay-power": "-1", "max-episode-steps": "0", "epsilon": "-0.1"}
BAD_CASES = []
for script in SCRIPTS:
    bad = BAD | (BAD_MAZE if script == "q_table_maze" else BAD_DQN)
    if script in ("dqn_lunarlander", "dqn_pendulum_discretized"):
        bad |= BAD_GYMNASIUM
    BAD_CASES += [(script, flag, value) for flag, value in bad.items()]
for board in ("SXG", "SF/G", "FFG", "SSG", "9x9"):
    BAD_CASES += [("q_table_maze", "board", board)]
BAD_CASES += [("dqn_cartpole_jax", "num-seeds", "0"), ("dqn_cartpole_jax", "n-step", "0")]
BAD_CASES += [("dqn_cartpole_jax", "buffer-size", "31"), ("dqn_cartpole_jax", "num-envs", "0")]
BAD_CASES += [("dqn_cartpole_jax", "total-timesteps", "31")]
BAD_CASES += [("dqn_cartpole_jax", "learning-starts", "1249")]  # of 1280, by 32
BAD_CASES += [("dqn_lunarlander", "learning-starts", "1280"), ("dqn_lunarlander", "n-step", "0")]
BAD_CASES += [("dqn_pendulum_discretized", "learning-starts", "1280")]
BAD_CASES += [("dqn_pendulum_discretized", "num-actions", "1")]
BAD_CASES += [("dqn_pendulum_discretized", "sampled-actions", "0")]
BAD_CASES += [("dqn_lunarlander", "eval-frequency", "-1")]
for env_id in ("Nothing-v0", "no_module:X-v0", "Blackjack-v7", "Pendulum-v1", "BipedalWalker-v3"):
    BAD_CASES += [("dqn_lunarlander", "env-id", env_id)]
for env_id in ("Nothing-v0", "no_module:X-v0", "Blackjack-v7", "CartPole-v1", "LunarLander-v3"):
    BAD_CASES += [("dqn_pendulum_discretized", "env-id", env_id)]


def assert_refused(script, flags, name):
    """With one line that names the flag, and nothing written."""
    before = set(Path().iterdir())
    status, out, err = run(script, flags)
    assert (status, out) == (2, "")
    assert re.fullmatch(f"error: .*{name}.*\n", err)
    assert set(Path().iterdir()) == before


@pytest.mark.parametrize("script, flag, value", BAD_CASES)
def test_bad_settings_end_with_one_line(script, flag, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = "" if flag == "output-dir" else "--output-dir new"
    name = "env" if flag == "env-id" else flag.replace("-", "_")
    assert_refused(script, f"{SMALL[script]} {output} --{flag} {value}", name)


@pytest.mark.parametrize("flags", ["--eval-frequency 5", "--capture-video"])
def test_snapshots_and_films_need_a_folder(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused("dqn_lunarlander", f"{SMALL['dqn_lunarlander']} {flags}", "output_dir")


MISSING = [(script, "", "matplotlib") for script in SCRIPTS]
MISSING += [("dqn_lunarlander", "--capture-video", "imageio")]
MISSING += [("dqn_lunarlander", "--capture-video --env-id Acrobot-v1", "pygame")]


@pytest.mark.parametrize("script, flags, package", MISSING)
def test_a_missing_package_is_found_before_training(script, flags, package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    name = "capture_video" if flags else "output_dir"
    assert_refused(script, f"{SMALL[script]} {flags} --output-dir new", name)


@EACH
def test_models_that_do_not_fit(script, kept, tmp_path, monkeypatch):
    """Damaged, of another script, of another board, or for other observations or actions."""
    monkeypatch.chdir(tmp_path)
    good = kept / script / "model.npz"
    Path("cut.npz").write_bytes(good.read_bytes()[:500])
    Path("text.npz").write_text("no model")
    models = [".", "cut.npz", "text.npz"]
    models += [kept / other / "model.npz" for other in SCRIPTS if other != script]
    if script == "q_table_maze":
        models += [f"{good} --board SFF/HFG"]  # as many cells
    else:
        arrays = dict(np.load(good))
        for name in "w0", "w1":  # for more observations, and for more actions
            shape = np.array(arrays[name].shape)
            shape[shape != 8] += 1
            np.savez(f"{name}.npz", **arrays | {name: np.ones(shape, np.float32)})
            models += [f"{name}.npz"]
    if script == "dqn_pendulum_discretized":
        others = "--num-actions 6", "--env-id Pendulum-v1", "--q-input state-action"
        models += [f"{good} {flags}" for flags in others]
    for model in models:
        flags = f"{SMALL[script]} --output-dir new --load-model {model}"
        assert_refused(script, flags, "load_model")


# ---------- Runs
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
    assert not summary["interrupted"]
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
    assert summary["args"]["load_model"] == str(model)
    assert [path.name for path in again.iterdir()] == ["summary.json"]


@EACH_DQN
def test_a_kept_model_remembers_whether_its_layers_are_normalized(script, kept, tmp_path):
    """Whatever the flags of the command that loads it."""
    plain = tmp_path / "plain"
    status, _, _ = run(script, f"{SMALL[script]} --no-layer-norm --output-dir {plain}")
    assert status == 0
    for folder, marked in ((kept / script, True), (plain, False)):
        with np.load(folder / "model.npz") as arrays:
            assert ("layer_norm" in arrays) == marked
        other = "--no-layer-norm" if marked else "--layer-norm"
        again = tmp_path / f"again{other}"
        load = f"--load-model {folder / 'model.npz'} --output-dir {again}"
        assert run(script, f"{SMALL[script]} {other} {load}")[0] == 0
        before = json.loads((folder / "summary.json").read_text())
        summary = json.loads((again / "summary.json").read_text())
        assert summary["seeds"] == [before["seeds"][0] | {"seed": None}]


@EACH_DQN
def test_weights_that_are_not_finite_end_the_run(script, monkeypatch):
    nan = lambda params, _: jax.tree.map(lambda x: x * np.nan, params)  # noqa: E731
    monkeypatch.setattr("optax.apply_updates", nan)
    status, out, err = run(script, SMALL[script])
    assert status == 1 and "greedy" not in out
    assert re.fullmatch("error: .*loss.* not finite.*\n", err)


# JAX's own checks, and numbers of twice the precision.
STRICT = ["JAX_ENABLE_X64", "JAX_DEBUG_NANS", "JAX_DEBUG_KEY_REUSE", "JAX_CHECK_TRACER_LEAKS"]


@pytest.fixture(scope="module", autouse=True)
def strict_runs(tmp_path_factory):
    """For each script, a folder with a copy of it, where it runs beside the tests."""
    runs = {}
    with contextlib.ExitStack() as stack:
        for script, flags in SMALL.items():
            folder = tmp_path_factory.mktemp(script)
            shutil.copy(ROOT / f"{script}.py", folder)
            process = started(script, flags, folder, **dict.fromkeys(STRICT, "1"))
            runs[script] = folder, stack.enter_context(process)
        yield runs


@EACH
def test_one_copied_file_runs_alone_and_writes_nothing(script, strict_runs):
    """In a folder of its own, and under what strict projects set for JAX."""
    folder, process = strict_runs[script]
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert "5 greedy episodes: mean" in out
    assert not re.search("loss (0|nan),", out)
    assert [path.name for path in folder.iterdir()] == [f"{script}.py"]


@EACH
def test_same_settings_same_bits_other_seed_other_agent(script):
    """Although learning overlaps acting; integers may stand for floats."""
    fields = importlib.import_module(script).Args.__dataclass_fields__
    names = [name for name, field in fields.items() if isinstance(field.default, float)]
    whole = train(script, **dict.fromkeys(names, 1))
    assert_close(whole, train(script, **dict.fromkeys(names, 1.0)))
    params, episodes = train(script)
    assert same(train(script), (params, episodes))
    other, _ = train(script, seed=2)
    for name, x in params.items():
        if name != "layer_norm":  # a mark, the same for all
            assert np.any(x != other[name])


@EACH
def test_train_checks_its_settings_in_a_file_with_postponed_annotations(script):
    text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    docstring = ast.parse(text).body[0]
    lines.insert(docstring.end_lineno, "from __future__ import annotations\n")
    module = type(sys)(f"{script}_copy")
    sys.modules[module.__name__] = module
    exec(compile("".join(lines), script, "exec"), module.__dict__)
    env = [None] if hasattr(module.Args, "env_id") else []
    for name in ("gamma", "eval_episodes", "learning_rate"):
        with pytest.raises(module.BadInput, match=name):
            module.train(module.Args(**{name: -1}), *env)


@pytest.mark.parametrize(
    "script, name, value",
    [
        ("q_table_maze", "method", "Network"),
        ("dqn_lunarlander", "loss", "Huber"),
        ("dqn_pendulum_discretized", "q_input", "state_action"),
    ],
)
def test_train_refuses_a_choice_that_it_does_not_know(script, name, value):
    module = importlib.import_module(script)
    env = [None] if hasattr(module.Args, "env_id") else []
    with pytest.raises(module.BadInput, match=f"{name} must be"):
        module.train(module.Args(**{name: value}), *env)


@EACH
def test_ctrl_c_evaluates_and_keeps_the_run(script, tmp_path):
    run_folder = tmp_path / "run"
    flags = f"{SMALL[script]} --total-timesteps 99999999 --output-dir {run_folder}"
    with started(script, flags) as process:
        assert "steps" in process.stdout.readline()  # training is under way
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "")
    assert "5 greedy episodes: mean" in out
    assert len(list(run_folder.iterdir())) == 4
    summary = json.loads((run_folder / "summary.json").read_text())
    assert summary["interrupted"] and 0 < summary["env_steps"] < 99_999_999


# ---------- What the README and the docstrings promise
@EACH
def test_inline_metadata_names_what_requirements_txt_lists(script):
    text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    block = re.search(r"# /// script\n((?:#.*\n)+?)# ///\n", text).group(1)
    metadata = tomllib.loads(re.sub("^# ?", "", block, flags=re.M))
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    lines = [line.partition("#")[0].strip() for line in lines]
    listed = [Requirement(line) for line in lines if line]
    named = set()
    for package in map(Requirement, metadata["dependencies"]):
        named.add(package.name)
        found = [other for other in listed if other.name == package.name]
        found = [other for other in found if other.extras >= package.extras]
        assert package.specifier in [other.specifier for other in found]
        assert str(package.marker) in [str(other.marker) for other in found]
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == named


@pytest.mark.parametrize("name", ["README", *SCRIPTS])
def test_every_command_has_flags_that_its_script_takes(name):
    text = README
    if name != "README":
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        text = ast.get_docstring(ast.parse(source))
    text = re.sub(r" *\\\n *", " ", text)  # a command may go on in the next line
    found = re.findall(r"python (\w+)\.py([^\n`]*)", text)
    assert len(found) >= 2
    for script, rest in found:
        if script in SCRIPTS and "$" not in rest:
            flags = re.split("  |#", rest)[0].split()
            tyro.cli(importlib.import_module(script).Args, args=flags)


def test_links_lead_to_files():
    links = re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", README)
    assert len(links) >= 4
    assert all((ROOT / link).exists() for link in links)


def test_the_snippets_run(kept, tmp_path, monkeypatch):
    """With fewer steps and episodes, in CartPole, without a window; one loads a kept model."""
    shutil.copytree(kept / "dqn_cartpole_jax", tmp_path / "runs" / "1")
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert snippets
    for snippet in snippets:
        code = re.sub(r"\b\d+_000\b", "3_200", snippet).replace("human", "rgb_array")
        for setting in ("eval_episodes=2", "total_timesteps=3_200"):
            if setting.partition("=")[0] + "=" not in code:
                code = code.replace("Args(", f"Args({setting}, ")
        exec(code, {"env": gymnasium.make("CartPole-v1")})

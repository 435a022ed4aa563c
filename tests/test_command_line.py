"""What every script promises on its command line. Where that is the same, main() runs in this process."""

import contextlib
import importlib
import io
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tomllib

import jax
import numpy as np
import pytest
from test_dqn_cartpole_jax import ROOT, compile_once  # noqa: F401

DQN = "--total-timesteps 1280 --learning-starts 640 --eval-episodes 5 --hidden-sizes 8"
BAD = "seed -1|total-timesteps 0|learning-rate 2|gamma nan|eval-episodes 0|output-dir .|load-model missing.npz"
BAD_DQN = BAD + "|batch-size 0|hidden-sizes 8 0|tau -0.1|n-step 0|learning-starts 1|buffer-size 0|start-e inf"
BAD_CARTPOLE = BAD_DQN + "|num-seeds 0|buffer-size 64|buffer-size 6401|total-timesteps 63|target-network-frequency 0"
BAD_GYMNASIUM = BAD_DQN + "|env-id Nothing-v0|env-id FrozenLake-v1|reward-scale -1|train-frequency 0|capture-video"
BAD_LANDER = BAD_GYMNASIUM + "|env-id Pendulum-v1|env-id BipedalWalker-v3|eval-frequency 5"
BAD_PENDULUM = BAD_GYMNASIUM + "|env-id CartPole-v1|env-id LunarLander-v3|num-bins 0|hidden-sizes --q-input state-action"
SCRIPTS = {  # flags of a run of a moment, the columns of returns.csv, flags that cannot work
    "q_table_maze": ("--total-timesteps 20000 --eval-episodes 5", "env_step,episode_return,largest_error", BAD + "|board SXG"),
    "dqn_cartpole_jax": (DQN, "env_step,episode_return,seed", BAD_CARTPOLE),
    "dqn_lunarlander": (DQN + " --env-id CartPole-v1", "env_step,episode_return,episode_length", BAD_LANDER),
    "dqn_pendulum_discretized": (DQN, "env_step,episode_return,episode_length", BAD_PENDULUM),
}
EACH = pytest.mark.parametrize("script", SCRIPTS)
EACH_DQN = pytest.mark.parametrize("script", [script for script in SCRIPTS if script.startswith("dqn")])


def run(script, flags):
    """Run main() on flags. Returns the status and what it printed."""
    module, out, err = importlib.import_module(script), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = module.main(module.tyro.cli(module.Args, args=flags.split()))
    return status, out.getvalue(), err.getvalue()


def start(script, flags, folder=ROOT):
    command = [sys.executable, f"{script}.py", *flags.split()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)


def assert_refused(script, flags, name):
    """With one line that names the flag, and nothing written."""
    before = set(pathlib.Path().iterdir())
    status, out, err = run(script, flags)
    assert status == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and name in err, err
    assert set(pathlib.Path().iterdir()) == before


@pytest.fixture(scope="module")
def kept(compile_once, tmp_path_factory):  # noqa: F811
    """A folder with a folder for each script, of a run of a moment."""
    folder = tmp_path_factory.mktemp("kept")
    for script in SCRIPTS:
        assert run(script, f"{SCRIPTS[script][0]} --output-dir {folder / script}")[::2] == (0, "")
    return folder


@pytest.mark.parametrize("script,flag", [(script, flag) for script in SCRIPTS for flag in SCRIPTS[script][2].split("|")])
def test_bad_settings_end_with_one_line(script, flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new = "" if flag.startswith(("output-dir", "capture-video", "eval-frequency")) else " --output-dir new"
    assert_refused(script, f"--{flag}{new}", flag.split()[0].replace("-", "_"))


@EACH
def test_unknown_flags_end_with_2(script):
    with pytest.raises(SystemExit) as ended:
        run(script, "--no-such-flag")
    assert ended.value.code == 2


@EACH
def test_models_that_do_not_fit(script, kept, tmp_path, monkeypatch):
    """Damaged, of another script, for other torques, or with too few or too many rows for the observation."""
    monkeypatch.chdir(tmp_path)
    good = kept / script / "model.npz"
    pathlib.Path("cut.npz").write_bytes(good.read_bytes()[:500])
    pathlib.Path("text.npz").write_text("no model")
    for rows in (3, 5, 7):
        arrays = dict(np.load(good))
        first = "w0" if "w0" in arrays else "q_table"
        np.savez(f"{rows}.npz", **arrays | {first: np.resize(arrays[first], (rows, arrays[first].shape[1]))})
    models = [".", *pathlib.Path().iterdir(), *(kept / other / "model.npz" for other in SCRIPTS if other != script)]
    for model in models + [f"{good} --num-bins 6"] * (script == "dqn_pendulum_discretized"):
        assert_refused(script, f"{SCRIPTS[script][0]} --output-dir new --load-model {model}", "load_model")


@EACH
def test_a_kept_run_is_complete_and_has_learned(script, kept, tmp_path):
    """And evaluates to the same again, where flags name the environment but not the network."""
    folder, again = kept / script, tmp_path / "again"
    assert {path.name for path in folder.iterdir()} == {"curve.png", "model.npz", "returns.csv", "summary.json"}
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) >= set("args versions device env_steps compile_seconds train_seconds steps_per_second".split())
    assert summary["script"] == f"{script}.py"
    args, (seed,) = summary["args"], summary["seeds"]
    assert set(seed) >= set("seed eval_return_mean eval_return_std eval_return_min eval_episodes solved".split())
    header, *rows = (folder / "returns.csv").read_text().splitlines()
    steps = [int(row.split(",")[0]) for row in rows]
    assert header == SCRIPTS[script][1] and len(rows) >= 2 and steps == sorted(steps)
    assert 0 < steps[-1] <= summary["env_steps"] and 0.99 < summary["env_steps"] / args["total_timesteps"] <= 1
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    with np.load(folder / "model.npz", allow_pickle=False) as file:
        values = [file[name] for name in file.files if name[0] in "bnq"]  # 0 before the first update
    assert values and all(np.any(x) and np.all(np.isfinite(x)) for x in values)
    assert args["total_timesteps"] - args.get("learning_starts", 0) >= 2 * args.get("target_network_frequency", 1)
    flags = f"{SCRIPTS[script][0].replace(' --hidden-sizes 8', '')} --load-model {folder / 'model.npz'} --output-dir {again}"
    assert run(script, flags)[0] == 0 and json.loads((again / "summary.json").read_text())["seeds"] == [seed]


def test_a_state_action_model_needs_no_flags(tmp_path):
    first = run("dqn_pendulum_discretized", f"{DQN} --q-input state-action --output-dir {tmp_path / 'run'}")
    again = run("dqn_pendulum_discretized", f"--eval-episodes 5 --load-model {tmp_path / 'run' / 'model.npz'}")
    assert first[0] == again[0] == 0 and first[1].splitlines()[-1] == again[1].splitlines()[-1]


@EACH_DQN
def test_a_run_too_short_for_an_update_says_so(script):
    status, out, _ = run(script, SCRIPTS[script][0] + " --learning-starts 1280")
    assert status == 0 and out.splitlines()[0].startswith("no update")


@EACH_DQN
def test_weights_that_are_not_finite_end_the_run(script, monkeypatch):
    monkeypatch.setattr("optax.apply_updates", lambda params, _: jax.tree.map(lambda x: x * np.nan, params))
    with pytest.raises(SystemExit, match=r"\Aerror: .*loss.* not finite.*\Z"):  # Python prints it and exits with 1
        run(script, SCRIPTS[script][0])


@EACH
def test_one_copied_file_runs_alone_and_writes_nothing(script, tmp_path):
    shutil.copy(ROOT / f"{script}.py", tmp_path)
    process = start(script, SCRIPTS[script][0], tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and err == "" and "5 greedy episodes: mean" in out and not re.search("loss (0|nan),", out)
    assert [path.name for path in tmp_path.iterdir()] == [f"{script}.py"]


@EACH
def test_ctrl_c_evaluates_and_keeps_the_run(script, tmp_path):
    process = start(script, f"{SCRIPTS[script][0]} --total-timesteps 99999999 --output-dir {tmp_path / 'run'}")
    assert "steps" in process.stdout.readline()  # training is under way
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and err == "" and "5 greedy episodes: mean" in out
    assert sorted(path.suffix for path in (tmp_path / "run").iterdir()) == [".csv", ".json", ".npz", ".png"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["interrupted"] and 0 < summary["env_steps"] < 99_999_999


@EACH
def test_inline_metadata_names_what_requirements_txt_lists(script):
    text = (ROOT / f"{script}.py").read_text()
    metadata = tomllib.loads(re.sub("^# ?", "", re.search(r"# /// script\n((?:#.*\n)+?)# ///\n", text).group(1), flags=re.M))

    def packages(lines):  # a[b,c]>=1 is both a[b]>=1 and a[c]>=1
        parts = [re.fullmatch(r"([\w-]+)(?:\[(.*)\])?(\S*)\s*(?:#.*)?", line).groups() for line in lines if line[0] != "#"]
        return {(name, extra, bounds) for name, extras, bounds in parts for extra in (extras or "").split(",")}

    assert packages(metadata["dependencies"]) <= packages((ROOT / "requirements.txt").read_text().splitlines())
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", text, re.M)) - set(sys.stdlib_module_names)
    assert imported == {re.match(r"\w+", line).group() for line in metadata["dependencies"]}

"""What every script promises on its command line: checks, printing, keeping, stopping. Each test runs for each script."""

import ast
import csv
import dataclasses
import importlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tomllib

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


@dataclasses.dataclass
class Case:
    """How to try a script."""

    small: str  # flags of a run of seconds that learns
    endless: str  # flags of a run that will be interrupted
    other_network: str  # a flag that asks for arrays of another shape
    arrays: set  # the names in model.npz
    columns: list  # of returns.csv
    bad: dict  # flags that cannot work, and words of the one line that says so


COMMON = {
    "--seed -1": "seed",
    "--total-timesteps -5": "total_timesteps",
    "--learning-rate 0": "learning_rate",
    "--learning-rate nan": "learning_rate",
    "--learning-rate inf": "learning_rate",
    "--gamma 1.5": "gamma",
    "--gamma nan": "gamma",
    "--start-e 2": "start_e",
    "--end-e -0.1": "end_e",
    "--exploration-fraction 0": "exploration_fraction",
    "--eval-episodes 0": "eval_episodes",
    "--load-model nowhere.npz": "no model file nowhere.npz",
}
DQN = {
    "--train-frequency 0": "train_frequency",
    "--gradient-steps 0": "gradient_steps",
    "--batch-size 0": "batch_size",
    "--batch-size 300000": "batch_size is 300000",
    "--buffer-size 0": "buffer_size",
    "--learning-starts 3000000": "learning_starts is 3000000",
    "--tau 0": "tau",
    "--target-network-frequency 0": "target_network_frequency",
    "--n-step 0": "n_step",
    "--hidden-sizes 64 0": "hidden_sizes",
}
CASES = {
    "q_table_maze": Case(
        small="--total-timesteps 20000 --eval-episodes 10",
        endless="--total-timesteps 2000000000 --eval-episodes 5",
        other_network="--board 4x4",
        arrays={"q_table"},
        columns=["env_step", "episode_return", "seed", "episodes", "error"],
        bad=COMMON
        | {
            "--num-seeds 0": "num_seeds",
            "--total-timesteps 2000000001": "2,000,000,000",
            "--slip-prob 1.1": "slip_prob is 1.1",
            "--slip-prob nan": "slip_prob",
            "--max-episode-steps 0": "max_episode_steps",
            "--learning-rate 1.5": "learning_rate",
            "--halving-visits 0": "halving_visits",
            "--board SF/G": "equal length",
            "--board S//G": "equal length",
            "--board SXG": "letters S, F, H and G",
            "--board 16x16": "2x3, 4x5, 4x4, 8x8",
            "--board FFG": "one S",
            "--board SSG": "one S",
            "--board SFF": "at least one G",
            "--board SHG/FHF": "path from S to G",
        },
    ),
    "dqn_cartpole_jax": Case(
        small="--total-timesteps 6400 --learning-starts 1280 --buffer-size 6400 --eval-episodes 10",
        endless="--total-timesteps 64000000 --eval-episodes 5",
        other_network="--hidden-sizes 8",
        arrays={"w0", "b0", "w1", "b1", "w2", "b2"},
        columns=["env_step", "episode_return", "seed"],
        bad=COMMON
        | DQN
        | {
            "--num-seeds 0": "num_seeds",
            "--num-envs 0": "num_envs",
            "--num-envs 128": "multiple of num_envs",
            "--num-envs 48 --train-frequency 48": "buffer_size must be a multiple",
            "--buffer-size 128": "n_step * num_envs",
            "--buffer-size 64000000": "2^23",
            "--learning-starts 300000": "total_timesteps is 256000",
            "--learning-starts 64": "n_step * num_envs",
        },
    ),
}
CASES["dqn_lunarlander"] = Case(
    small="--env-id CartPole-v1 --total-timesteps 2000 --learning-starts 500 --hidden-sizes 16 --eval-episodes 10",
    endless="--env-id CartPole-v1 --total-timesteps 64000000 --hidden-sizes 16 --eval-episodes 5",
    other_network="--hidden-sizes 8",
    arrays={"w0", "b0", "w1", "b1"},
    columns=["env_step", "episode_return", "episode_length"],
    bad=COMMON
    | DQN
    | {
        "--buffer-size 2 --batch-size 1": "buffer_size must be at least n_step",
        "--learning-starts 2": "learning_starts must be at least n_step",
        "--learning-starts 300000": "total_timesteps is ",
        "--train-frequency 300000": "total_timesteps is ",
        "--reward-scale 0": "reward_scale",
        "--average-rate 0": "average_rate",
        "--eval-frequency 1000": "needs an output_dir",
        "--capture-video": "needs an output_dir",
        "--eval-frequency -1": "eval_frequency",
        "--snapshot-episodes 0": "snapshot_episodes",
    },
)
CASES["dqn_pendulum_discretized"] = dataclasses.replace(
    CASES["dqn_lunarlander"],
    small=CASES["dqn_lunarlander"].small.replace("CartPole-v1", "Pendulum-v1"),
    endless=CASES["dqn_lunarlander"].endless.replace("CartPole-v1", "Pendulum-v1"),
    bad=CASES["dqn_lunarlander"].bad
    | {"--num-bins 1": "num_bins is 1", "--q-input state-action --hidden-sizes": "needs hidden_sizes"},
)
each_script = pytest.mark.parametrize("script", CASES)


def run(script, *flags, **options):
    """Run a script as a user does; flags are strings of flags, paths or numbers."""
    words = [word for flag in flags for word in (flag.split() if isinstance(flag, str) else [str(flag)])]
    command = [sys.executable, str(options.pop("path", ROOT / f"{script}.py")), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def arguments(script, flags):
    module = importlib.import_module(script)
    return module, module.tyro.cli(module.Args, args=flags.split())


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder and the process of a small run of a script that a user kept; each script runs once."""
    runs = {}

    def get(script):
        if script not in runs:
            folder = tmp_path_factory.mktemp(script) / "run"
            runs[script] = folder, run(script, CASES[script].small, "--output-dir", folder)
        return runs[script]

    return get


@pytest.mark.parametrize("script,flags", [(script, flags) for script, case in CASES.items() for flags in case.bad])
def test_bad_settings_end_with_one_line(script, flags, capsys):
    module, args = arguments(script, flags)
    status = module.main(args)
    printed = capsys.readouterr()
    assert status == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and CASES[script].bad[flags] in printed.err


@each_script
@pytest.mark.parametrize("flags", ["--seed many", "--no-such-flag", "--gamma 7"])
def test_bad_command_lines_exit_with_2(script, flags):
    done = run(script, flags)
    assert done.returncode == 2 and done.stderr and "Traceback" not in done.stderr + done.stdout


@each_script
def test_models_that_do_not_fit(script, kept, tmp_path, capsys):
    good = kept(script)[0] / "model.npz"
    whole = good.read_bytes()
    files = {
        "cut.npz": whole[: len(whole) // 2],
        "text.npz": b"this is no model",
        "empty.npz": b"",
        "flipped.npz": whole[:200] + bytes([whole[200] ^ 255]) + whole[201:],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    module, args = arguments(script, f"{CASES[script].small} --total-timesteps 0")
    model = module.load_model(good)
    first = next(iter(model))
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "pickled.npz", **{first: np.array([{}], dtype=object)})
    np.savez(tmp_path / "nan.npz", **(model | {first: model[first] * np.nan}))
    for path in [*sorted(tmp_path.iterdir()), tmp_path]:
        status = module.main(dataclasses.replace(args, load_model=str(path)))
        error = capsys.readouterr().err
        assert status == 2 and error.startswith("error: ") and error.count("\n") == 1, (path, error)
    module, args = arguments(script, f"{CASES[script].small} --total-timesteps 0 {CASES[script].other_network}")
    assert module.main(dataclasses.replace(args, load_model=str(good))) == 2
    assert "these settings ask for" in capsys.readouterr().err


@each_script
def test_kept_run(script, kept):
    folder, done = kept(script)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["curve.png", "model.npz", "returns.csv", "summary.json"]
    summary = json.loads((folder / "summary.json").read_text())
    for key in "script args versions device env_steps compile_seconds train_seconds steps_per_second seeds".split():
        assert key in summary
    assert summary["script"] == f"{script}.py" and summary["env_steps"] == summary["args"]["total_timesteps"]
    (seed,) = summary["seeds"]
    assert set(seed) >= set("seed eval_return_mean eval_return_std eval_return_min eval_episodes solved".split())
    with open(folder / "returns.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == CASES[script].columns
    steps = [int(row["env_step"]) for row in rows]
    assert len(rows) >= 10 and steps == sorted(steps) and 0 < steps[-1] <= summary["env_steps"]
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    with np.load(folder / "model.npz", allow_pickle=False) as model:
        assert set(model.files) == CASES[script].arrays


@each_script
def test_a_kept_model_evaluates_to_the_same(script, kept):
    folder, done = kept(script)
    again = run(script, CASES[script].small, "--total-timesteps 0", "--load-model", folder / "model.npz")
    assert again.returncode == 0, again.stderr

    def evaluation(process):
        return [line for line in process.stdout.splitlines() if line.startswith("evaluation")]

    assert evaluation(done) == evaluation(again) != []


@each_script
def test_a_folder_that_holds_a_run_is_refused(script, kept):
    folder, _ = kept(script)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = run(script, CASES[script].small, "--output-dir", folder)
    assert done.returncode == 2 and "already holds a run" in done.stderr and done.stdout == ""
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


@each_script
def test_a_failed_write_leaves_the_earlier_file(script, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"earlier")

    def fail(file):
        file.write(b"half")
        raise OSError

    with pytest.raises(OSError):
        importlib.import_module(script).write_whole(path, fail)
    assert path.read_bytes() == b"earlier" and [p.name for p in tmp_path.iterdir()] == ["file"]


@each_script
def test_ctrl_c_keeps_the_run(script, tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, ROOT / f"{script}.py", *CASES[script].endless.split(), "--output-dir", folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    line = process.stdout.readline()  # the first progress line: training is under way
    assert "steps" in line and "return" in line and "left" in line
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "" and "interrupted after" in out
    assert sorted(path.name for path in folder.iterdir()) == ["curve.png", "model.npz", "returns.csv", "summary.json"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["interrupted"] and 0 < summary["env_steps"] < summary["args"]["total_timesteps"]
    assert importlib.import_module(script).load_model(folder / "model.npz").keys() == CASES[script].arrays


@each_script
def test_a_closed_pipe_is_no_traceback(script):
    command = f"{sys.executable} {ROOT / script}.py {CASES[script].small} | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


@each_script
def test_alone_in_an_empty_folder(script, tmp_path):
    shutil.copy(ROOT / f"{script}.py", tmp_path)
    done = run(script, CASES[script].small, path=f"{script}.py", cwd=tmp_path)
    assert done.returncode == 0 and "evaluation" in done.stdout, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [f"{script}.py"]  # nothing written unless asked


@each_script
def test_every_flag_is_documented(script):
    done = run(script, "--help", env=os.environ | {"COLUMNS": "200"})
    assert done.returncode == 0
    for field in dataclasses.fields(importlib.import_module(script).Args):
        assert f"--{field.name.replace('_', '-')}" in done.stdout
    for node in ast.parse((ROOT / f"{script}.py").read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            kinds = [type(part) for part in node.body[1:]]
            assert kinds == [ast.AnnAssign, ast.Expr] * (len(kinds) // 2)


@each_script
def test_inline_metadata_is_in_step_with_requirements(script):
    text = (ROOT / f"{script}.py").read_text()
    block = re.search(r"# /// script\n((?:#.*\n)+?)# ///\n", text).group(1)
    metadata = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    required = [re.sub(r"\s*#.*", "", line) for line in (ROOT / "requirements.txt").read_text().splitlines()]

    def packages(lines):  # gymnasium[box2d,mujoco]>=1.4.0 is both gymnasium[box2d]>=1.4.0 and gymnasium[mujoco]>=1.4.0
        parts = [re.fullmatch(r"([\w-]+)(?:\[(.*)\])?(.*)", line).groups() for line in lines if line]
        return {(name, extra, version) for name, extras, version in parts for extra in (extras or "").split(",")}

    assert packages(metadata["dependencies"]) <= packages(required)
    named = {re.match(r"[a-z]+", name).group() for name in metadata["dependencies"]}
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", text, re.M)) - set(sys.stdlib_module_names)
    assert imported == named

"""Run other projects at settings that ours has too: python results/peers.py [--only NAME ...]

It needs a Python with the peers' packages and patched clones, in runs/peers:

    python -m venv runs/peers/venv && runs/peers/venv/bin/pip install -r results/peers/packages.txt
    for peer in vwxyzjn/cleanrl luchris429/purejaxrl RPegoud/jym; do
        clone=runs/peers/checkouts/$(basename $peer)
        git clone https://github.com/$peer $clone
        git -C $clone apply --unidiff-zero $PWD/results/peers/$(basename $peer).patch
    done

and takes one to four hours on one core. What came of each run goes into results/peers.csv when it
ends, with its date, machine, versions and the peer's commit; the training returns, as means over 50
parts of the run, into results/curves.csv. A run is not repeated. Ours at the same settings are rows
of measure.py, so flags alone make them; `not_equal` names what flags can't make equal.

With --speed, each row is timed instead: shorter runs of theirs and ours take turns on one core,
three times, and results/speeds.csv gets a line for each pair; then whole runs of theirs and of our
defaults (OWN). Nothing else may run meanwhile.
results/tables.py makes peers.md of all this, and results/pictures.py same.png.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import measure
import numpy as np
import tyro
from measure import ROOT, all_rows, commit, machine

RUNS = ROOT / "runs" / "peers"
PYTHON = RUNS / "venv" / "bin" / "python"
FOUND = ROOT / "results" / "peers.csv"
CURVES = ROOT / "results" / "curves.csv"
SPEEDS = ROOT / "results" / "speeds.csv"
PARTS = 50  # of a run, in curves.csv
FIRST_SEED = 7000
PAIRS = 3
COLUMNS = "row peer flags seed mean std worst env_steps compile_seconds train_seconds"
COLUMNS = [*COLUMNS.split(), "command_seconds", "date", "device", "versions", "peer_version"]
SPEED_COLUMNS = "row pair env_steps theirs_train ours_train theirs_compile ours_compile"
SPEED_COLUMNS += " theirs_command ours_command date device commit load"


@dataclass(frozen=True)
class Row:
    """One peer's settings."""

    name: str
    adapter: str  # a file of results/peers
    flags: str  # of the adapter: the peer's own settings
    steps: int
    ours: str  # the row of measure.py at the same settings
    not_equal: str
    runs: int = 10
    timed_steps: int = 60_000  # of the runs that --speed times
    first_seed: int = FIRST_SEED
    stride: int = 1  # between seeds


SB3 = "--learning-rate 2.5e-4 --buffer-size 10000 --learning-starts 1000 --batch-size 64"
SB3 += " --target-update-interval 500 --train-freq 4 --exploration-fraction 0.5"
SB3 += " --policy-kwargs {'net_arch':[64,64]} --env-id LunarLander-v3"
CLIPS = (
    "theirs clips gradients (its max_grad_norm was left at 10) and starts with smaller weights"
    " (PyTorch's default, variance 1 / (3 in)); ours acts with weights that are one"
)
# What RL Baselines3 Zoo recommends for LunarLander-v3 (hyperparams/dqn.yml of its commit
# 22e3ff2450fd, 2026-04-23). gradient_steps -1 means as many updates as steps.
ZOO = "--learning-rate 6.3e-4 --buffer-size 50000 --learning-starts 0 --batch-size 128"
ZOO += " --target-update-interval 250 --train-freq 4 --gradient-steps -1 --gamma 0.99"
ZOO += " --exploration-fraction 0.12 --exploration-final-eps 0.1"
ZOO += " --policy-kwargs {'net_arch':[256,256]} --env-id LunarLander-v3"
ROWS = [
    Row(
        "CleanRL, CartPole",
        "cleanrl.py",
        "",
        500_000,
        "CartPole in Gymnasium, plain",
        "ours starts with wider weights (variance 2 / in, theirs 1 / in) and acts with weights that"
        " are one update old; theirs writes logs",
    ),
    Row(
        "CleanRL, LunarLander",
        "cleanrl.py",
        "--env-id LunarLander-v3",
        500_000,
        "LunarLander, plain",
        "as above; the settings are CleanRL's for CartPole, which it has for no other environment",
        runs=30,
    ),
    Row(
        "PureJaxRL, CartPole",
        "purejaxrl.py",
        "",
        500_000,
        "CartPole, plain",
        "theirs treats the time limit as a fall; ours divides observations by usual sizes, starts"
        " with wider weights, and is evaluated in its own CartPole; theirs returns metrics of every"
        " step; a patch makes its seed count",
        timed_steps=500_000,
    ),
    Row(
        "jym, CartPole",
        "jym.py",
        "",
        20_000,
        "CartPole, as jym",
        "theirs has no time limit, a reward of 0 for the last step, epsilon 0.3 / (1 + t / 1000),"
        " a target network that starts from other weights, and 512 random steps in Python before"
        " its compiled run; ours has the mean of that epsilon throughout, divides observations by"
        " usual sizes, starts with wider weights, and is evaluated in its own CartPole",
        runs=100,
        timed_steps=20_000,
        first_seed=8000,
        stride=3,  # it uses the keys of seed, seed + 1 and seed + 2
    ),
    Row(
        "Stable-Baselines3, LunarLander",
        "sb3.py",
        SB3,
        200_000,
        "LunarLander, as SB3",
        f"{CLIPS} update old",
        runs=5,
        timed_steps=20_000,
    ),
    Row(
        "SBX, LunarLander",
        "sb3.py",
        f"--peer sbx {SB3}",
        200_000,
        "LunarLander, as SB3",
        "SBX uses the first number of net_arch twice, and starts with smaller weights (variance"
        " 1 / in); ours acts with weights that are one update old",
        timed_steps=20_000,
    ),
    Row(
        "Stable-Baselines3, LunarLander, RL Zoo",
        "sb3.py",
        ZOO,
        100_000,
        "LunarLander, as RL Zoo",
        f"{CLIPS} group of updates old",
        timed_steps=20_000,
    ),
    Row(
        "SBX, LunarLander, RL Zoo",
        "sb3.py",
        f"--peer sbx {ZOO}",
        100_000,
        "LunarLander, as RL Zoo",
        "theirs starts with smaller weights (variance 1 / in); ours acts with weights that are one"
        " group of updates old",
        timed_steps=20_000,
    ),
]


@dataclass(frozen=True)
class Own:
    """A peer at its own settings, beside ours at its defaults."""

    theirs: str  # of ROWS
    learning: str  # their updates and batches
    ours: str  # of measure.py
    our_learning: str


OWN = [
    Own("CleanRL, CartPole", "49,000 of 128", "CartPole, seeds not seen", "6,250 of 32"),
    Own("PureJaxRL, CartPole", "49,000 of 128", "CartPole, seeds not seen", "6,250 of 32"),
    Own("jym, CartPole", "20,000 of 32", "CartPole, seeds not seen", "6,250 of 32"),
    Own(
        "Stable-Baselines3, LunarLander, RL Zoo",
        "100,000 of 128",
        "LunarLander, defaults",
        "62,500 of 64",
    ),
    Own("SBX, LunarLander, RL Zoo", "100,000 of 128", "LunarLander, defaults", "62,500 of 64"),
]


def seeds_of(row):
    return range(row.first_seed, row.first_seed + row.runs * row.stride, row.stride)


# ---------- Theirs
def run_theirs(row, seed, core):
    """Run an adapter. Returns its summary, and the folder of its files."""
    folder = RUNS / f"{row.name}, {seed}"
    shutil.rmtree(folder, ignore_errors=True)
    command = ["taskset", "-c", core, PYTHON, ROOT / "results" / "peers" / row.adapter]
    command += ["--seed", str(seed), "--total-timesteps", str(row.steps), "--output-dir", folder]
    if row.adapter != "sb3.py":
        command += ["--checkout", RUNS / "checkouts" / row.adapter.removesuffix(".py")]
    command = [*command, *row.flags.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{row.name}, seed {seed}: {done.stderr.strip()[-2000:]}")
    return json.loads((folder / "summary.json").read_text()), folder


def note(row, seed, summary, folder):
    """Add a run to peers.csv and curves.csv."""
    agent = summary["seeds"][0]
    line = {name: summary[name] for name in COLUMNS if name in summary}
    line |= {"row": row.name, "flags": row.flags, "seed": seed, "device": machine()}
    for name, column in (("mean", "mean"), ("std", "std"), ("min", "worst")):
        line[column] = round(agent[f"eval_return_{name}"], 4)
    line["versions"] = " ".join(f"{name} {v}" for name, v in summary["versions"].items())
    append(FOUND, COLUMNS, [line])
    add_curve(row.name, seed, row.steps, folder / "returns.csv")


def add_curve(name, seed, steps, path):
    """Add the training returns of a run to curves.csv: the mean of each of its PARTS."""
    ends, returns = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2).T[:2]
    part = np.minimum(ends * PARTS // steps, PARTS - 1).astype(int)
    lines = []
    for k in np.unique(part):
        value = round(returns[part == k].mean(), 2)
        step = (k + 1) * steps // PARTS
        lines.append({"row": name, "seed": seed, "env_steps": step, "return": value})
    append(CURVES, ["row", "seed", "env_steps", "return"], lines)


def append(path, columns, lines):
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(lines)


def finished():
    """What peers.csv has: a set of (row, flags, seed)."""
    if not FOUND.exists():
        return set()
    with FOUND.open(newline="") as file:
        return {(line["row"], line["flags"], int(line["seed"])) for line in csv.DictReader(file)}


def add_our_curves(row):
    """Add the curves of ours that measure.py left in its folder."""
    known = set()
    if CURVES.exists():
        with CURVES.open(newline="") as file:
            known = {(line["row"], int(line["seed"])) for line in csv.DictReader(file)}
    ours = next(x for x in all_rows() if x.name == row.ours)
    for seed in range(ours.first_seed, ours.first_seed + ours.runs):
        path = measure.RUNS / f"{ours.name}, {seed}" / "returns.csv"
        if path.exists() and (ours.name, seed) not in known:
            add_curve(ours.name, seed, row.steps, path)


# ---------- Speed
def run_ours(name, steps, seed, core):
    """Run a row of measure.py, with other total_timesteps if steps are given. Its summary."""
    row = next(row for row in all_rows() if row.name == name)
    folder = RUNS / "ours"
    shutil.rmtree(folder, ignore_errors=True)
    command = ["taskset", "-c", core, sys.executable, row.script, *row.flags.split()]
    command += ["--seed", str(seed), "--eval-episodes", "1", "--output-dir", folder]
    if steps:
        command += ["--total-timesteps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    start = time.time()
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, env=environment)
    seconds = {"command_seconds": time.time() - start}
    return json.loads((folder / "summary.json").read_text()) | seconds


def time_pairs(name, row, ours_row, our_steps, core):
    """Theirs and ours in turn; in every other pair, ours goes first.

    The time of a command is from its start to the end of training; ours has one greedy episode and
    the saving of the model in it.
    """
    for pair in range(PAIRS):
        load = os.getloadavg()[0]
        seed = FIRST_SEED + pair * row.stride
        if pair % 2:
            ours = run_ours(ours_row, our_steps, seed, core)
        theirs, _ = run_theirs(row, seed, core)
        if not pair % 2:
            ours = run_ours(ours_row, our_steps, seed, core)
        line = {"row": name, "pair": pair, "env_steps": row.steps, "load": load}
        line |= {"date": time.strftime("%Y-%m-%d"), "device": machine(), "commit": commit()}
        for who, summary in (("theirs", theirs), ("ours", ours)):
            line[f"{who}_train"] = round(summary["train_seconds"], 4)
            line[f"{who}_compile"] = round(summary["compile_seconds"], 4)
            line[f"{who}_command"] = round(summary["command_seconds"], 4)
        append(SPEEDS, SPEED_COLUMNS.split(), [line])
        print(name, pair, line["theirs_train"] / line["ours_train"], flush=True)


def main(only: tuple[str, ...] = (), speed: bool = False) -> None:
    """Run all rows, or those whose name contains one of `only`; with speed, time them."""
    core = str(min(os.sched_getaffinity(0)))
    known = finished()
    for row in ROWS:
        if only and not any(word in row.name for word in only):
            continue
        if speed:
            steps = row.timed_steps
            time_pairs(row.name, replace(row, steps=steps), row.ours, steps, core)
            for own in OWN:
                if own.theirs == row.name:
                    time_pairs(f"{row.name}, own settings", row, own.ours, None, core)
            continue
        for seed in seeds_of(row):
            if (row.name, row.flags, seed) not in known:
                note(row, seed, *run_theirs(row, seed, core))
                print(row.name, seed, flush=True)
        if row.adapter == "cleanrl.py":
            add_our_curves(row)


if __name__ == "__main__":
    tyro.cli(main)

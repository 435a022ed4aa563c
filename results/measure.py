"""Run the scripts and note what came of it: python results/measure.py [--only NAME ...]

It needs the packages of requirements.txt and two cores, and takes about four hours in all; with
--only, the rows whose name contains one of the words. `python results/measure.py --only "CartPole,
defaults"` takes two minutes.

Each run is a script started as a user starts it, in a process of its own with one thread and on
one core, as many at a time as there are cores (`taskset -c 1 python results/measure.py` uses one).
What came of it goes into results/agents.csv when it ends, a line for each agent, with the date,
machine, versions and commit of this run; results/tables.py makes all tables from that file. A run
is not repeated if a line has the same code, flags, versions and machine. The files of a run stay in
runs/measure. The seeds of CartPole's and InvertedPendulum's rows had been seen with defaults that
were given up, but for "seeds not seen" and "each in a process of its own"; those of "defaults
again" had been seen with today's. No other row's had been seen when defaults were chosen.
"""

import ast
import csv
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RUNS = ROOT / "runs" / "measure"
AGENTS = ROOT / "results" / "agents.csv"
LOCK = threading.Lock()
MAZE = "q_table_maze.py"
CARTPOLE = "dqn_cartpole_jax.py"
LANDER = "dqn_lunarlander.py"
PENDULUM = "dqn_pendulum_discretized.py"
SWING = "--env-id Pendulum-v1 --num-actions 9 --gamma 0.99 --reward-scale 0.03"
SWING += " --total-timesteps 200000"
THOUSAND = "--q-input state-action --num-actions 1000"
PACKAGES = "jax jaxlib optax gymnasium numpy tyro matplotlib imageio box2d mujoco".split()
COLUMNS = "row script flags seed mean std worst solved env_steps compile_seconds train_seconds"
COLUMNS = [*COLUMNS.split(), "date", "device", "python", "versions", "commit", "code"]
SAME = "script flags seed device python versions code".split()  # then a run is not repeated


@dataclass(frozen=True)
class Row:
    """A line of a table: `runs` processes with consecutive seeds, each of `agents` agents."""

    name: str
    script: str
    flags: str = ""
    first_seed: int = 6500
    runs: int = 10
    agents: int = 1


# ---------- What is measured
# The paper's way of each departure: a name of it, and the flags.
SWITCHES = {
    "one-step targets": "--n-step 1",
    "w- copied every 500 steps": "--tau 1 --target-network-frequency 500",
    "a constant learning rate": "--no-anneal-lr",
    "plain layers": "--no-layer-norm",
    "no Double DQN": "--no-double-dqn",
    "squared errors": "--loss squared",
    "learning after 10,000 steps": "--learning-starts 10000",
    "unscaled rewards": "--reward-scale 1",
    "one environment": "--num-envs 1",
    "single updates": "--train-frequency 4 --gradient-steps 1",
}
PLAIN = "--n-step 1 --tau 1 --target-network-frequency 500 --no-anneal-lr --no-layer-norm"
PLAIN += " --learning-starts 10000 --learning-rate 2.5e-4 --end-e 0.05 --exploration-fraction 0.5"
PLAIN += " --buffer-size 10000 --batch-size 128 --hidden-sizes 120 84 --total-timesteps 500000"
JYM = "--n-step 1 --tau 1 --target-network-frequency 10 --no-anneal-lr --no-layer-norm --gamma 0.9"
JYM += " --learning-rate 1e-3 --buffer-size 512 --batch-size 32 --num-envs 1"
# Its epsilon is 0.3 / (1 + t / 1000), with a mean of 0.046 over its 20,000 steps.
JYM += " --hidden-sizes 64 64 64 --end-e 0.046 --exploration-fraction 0 --total-timesteps 20000"
# The settings of the five tutorials (results/tutorials.md), the fifth is JYM's; and of other
# environments (results/environments.md, which says how they were chosen).
PAPER = "--no-anneal-lr --no-layer-norm --learning-rate 1e-3 --batch-size 32 --train-frequency 4"
PAPER += " --gradient-steps 1"
VALUES = f"{PAPER} --n-step 1 --no-double-dqn --loss squared --reward-scale 1"
TUTORIALS = [
    (MAZE, "--epsilon 0 --learning-rate 0.8 --max-episode-steps 4 --total-timesteps 200"),
    (
        PENDULUM,
        f"{THOUSAND} --sampled-actions 1000 {PAPER} --no-double-dqn --hidden-sizes 10"
        " --buffer-size 100 --tau 1 --end-e 0.1 --exploration-fraction 0 --total-timesteps 20000"
        " --eval-episodes 20",
    ),
    (
        LANDER,
        f"{VALUES} --hidden-sizes 64 64 --buffer-size 10000 --learning-starts 10000 --tau 0.001"
        " --end-e 0.01",
    ),
    (
        LANDER,
        f"{VALUES} --env-id CartPole-v1 --hidden-sizes 300 100 --buffer-size 100000 --gamma 0.99"
        " --tau 1 --target-network-frequency 100 --end-e 0.3 --exploration-fraction 0"
        " --total-timesteps 30000",
    ),
]
ELSEWHERE = {
    "FrozenLake, 8x8, not slippery": "--env-id elsewhere:Lake-v0 --total-timesteps 50000",
    "CliffWalking": "--env-id elsewhere:Cliff-v0 --total-timesteps 50000",
    "Taxi": "--env-id Taxi-v4 --total-timesteps 150000",
    "Blackjack": "--env-id Blackjack-v1 --total-timesteps 50000 --reward-scale 1 --gamma 1"
    " --eval-episodes 5000",
    "MountainCar": "--env-id MountainCar-v0 --total-timesteps 100000",
}
KNOBS = "num_envs train_frequency gradient_steps buffer_size batch_size learning_rate gamma n_step"
KNOBS += " tau reward_scale end_e exploration_fraction num_actions"


def short(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def knob_changes(script, flags):
    """Each number doubled and halved, one at a time; other numbers of layers, of steps."""
    module = __import__(script.removesuffix(".py"))
    args = tyro.cli(module.Args, args=flags.split())
    for name in KNOBS.split():
        if not hasattr(args, name):
            continue
        value = getattr(args, name)
        both = value * 2, value / 2
        if isinstance(value, int):
            both = value * 2, -(-value // 2)
        if name == "gamma":  # twice and half as far ahead: 1 / (1 - gamma) steps
            both = 1 - (1 - value) / 2, 1 - (1 - value) * 2
        if name == "exploration_fraction":
            both = min(1.0, both[0]), both[1]
        for x in both:
            yield f"--{name.replace('_', '-')} {short(x)}"
    units = args.hidden_sizes[0]
    layers = len(args.hidden_sizes)
    for many in (2 * units, units // 2):
        yield "--hidden-sizes " + " ".join([str(many)] * layers)
    for depth in {1, 2, 3} - {layers}:
        yield "--hidden-sizes " + " ".join([str(units)] * depth)
    for factor in (0.5, 2, 4) if script == CARTPOLE else (0.5, 2):
        yield f"--total-timesteps {int(args.total_timesteps * factor)}"


def rows_of(name, script, flags, first, defaults, knobs, switches, agents=1, lengths=None):
    """The rows of an environment. defaults, knobs, switches: how many agents each has.

    lengths: how many the rows with other numbers of steps have, if not as many as the other knobs.
    """
    yield Row(f"{name}, defaults", script, flags, first, defaults // agents, agents)
    module = __import__(script.removesuffix(".py"))
    for what, change in SWITCHES.items():
        if script == PENDULUM:  # half as many updates as steps, as by default
            change = change.replace("--train-frequency 4", "--train-frequency 2")
        field = change.split()[0].removeprefix("--no-").removeprefix("--").replace("-", "_")
        if what == "unscaled rewards" and script == PENDULUM:  # its default
            continue
        if switches and hasattr(module.Args(), field):
            both = f"{flags} {change}".strip()
            yield Row(f"{name}, switch, {what}", script, both, first, switches // agents, agents)
    for change in knob_changes(script, flags):
        both = f"{flags} {change}".strip()
        count = lengths if lengths and "total-timesteps" in change else knobs
        yield Row(f"{name}, knob, {change}", script, both, first, count // agents, agents)


def all_rows():
    yield from rows_of("CartPole", CARTPOLE, "", 10000, 1000, 100, 100, agents=100)
    # Other defaults were tried, and given up, when the seeds above had been seen. These had not.
    yield Row("CartPole, seeds not seen", CARTPOLE, "", 13000, 10, 100)
    yield Row("CartPole, each in a process of its own", CARTPOLE, "", 15000, 20)
    small = "--buffer-size 96000 --total-timesteps 800000"
    yield Row(f"CartPole, knob, {small}", CARTPOLE, small, 10000, 1, 100)
    yield Row("CartPole, plain", CARTPOLE, f"{PLAIN} --num-envs 10", 10000, 1, 20)
    flags = f"{PLAIN} --no-double-dqn --loss squared --reward-scale 1 --gamma 0.99"
    flags += " --train-frequency 10 --gradient-steps 1"
    yield Row("LunarLander, plain", LANDER, flags, 6500, 30)
    lower = "--no-anneal-lr --learning-rate 1e-3"
    yield Row("LunarLander, a constant learning rate of 1e-3", LANDER, lower, 6500, 10)
    yield Row("CartPole in Gymnasium, plain", LANDER, f"{flags} --env-id CartPole-v1", 7000, 10)
    small = flags.replace("120 84", "64 64").replace("--batch-size 128", "--batch-size 64")
    small = small.replace("--learning-starts 10000", "--learning-starts 1000")
    small = small.replace("--train-frequency 10", "--train-frequency 4")
    small = small.replace("--loss squared", "--loss huber").replace("500000", "200000")
    yield Row("LunarLander, as SB3", LANDER, small, 7000, 10)
    zoo = "--n-step 1 --tau 1 --target-network-frequency 250 --no-anneal-lr --no-layer-norm"
    zoo += " --no-double-dqn --reward-scale 1 --gamma 0.99 --learning-rate 6.3e-4 --batch-size 128"
    zoo += " --buffer-size 50000 --train-frequency 4 --gradient-steps 4 --hidden-sizes 256 256"
    zoo += " --end-e 0.1 --exploration-fraction 0.12 --total-timesteps 100000"
    yield Row("LunarLander, as RL Zoo", LANDER, zoo, 7000, 10)
    yield Row("CartPole, as jym", CARTPOLE, JYM, 8000, 1, 100)
    for flag in ("--n-step 1 ", " --loss squared", " --reward-scale 1"):
        flags = flags.replace(flag, "")
    flags = flags.replace(" --total-timesteps 500000", "")
    yield Row("InvertedPendulum, plain", PENDULUM, flags, 6500, 10)
    yield from rows_of("LunarLander", LANDER, "", 6500, 20, 6, 10)
    yield from rows_of("InvertedPendulum", PENDULUM, "--eval-episodes 100", 6500, 30, 10, 10)
    yield from rows_of("Pendulum", PENDULUM, SWING, 18000, 20, 2, 0, lengths=20)
    # As in CartPole: agents with other defaults had been seen on InvertedPendulum's seeds above.
    yield Row("InvertedPendulum, seeds not seen", PENDULUM, "--eval-episodes 100", 16000, 30)
    yield Row("InvertedPendulum, defaults again", PENDULUM, "--eval-episodes 100", 14000, 30)
    yield Row("InvertedPendulum, 1000 actions", PENDULUM, f"{THOUSAND} --eval-episodes 20")
    yield Row("Acrobot", LANDER, "--env-id Acrobot-v1")
    yield Row("CartPole in Gymnasium", LANDER, "--env-id CartPole-v1")
    for board in ("2x3", "4x5", "4x4", "8x8"):
        for slip in ("0", "0.2", "0.6667"):
            flags = f"--board {board} --slip-prob {slip}"
            yield Row(f"maze {board}, slip {slip}", MAZE, flags, runs=20)
        yield Row(f"maze {board}, network", MAZE, f"--board {board} --method network", runs=5)
    for number, (script, flags) in enumerate(TUTORIALS, 1):
        yield Row(f"tutorial {number}", script, flags)
    for name, flags in ELSEWHERE.items():
        yield Row(f"elsewhere, {name}", LANDER, flags, runs=3)


# ---------- Running
# Functions that only check, print or save: they can't change what is learned.
PLUMBING = "report statistics summarize play_snapshots save_snapshot".split()


class OnlyLearning(ast.NodeTransformer):
    """Leaves out docstrings and the functions of PLUMBING."""

    def visit_Expr(self, node):
        return None if isinstance(node.value, ast.Constant) else node

    def visit_FunctionDef(self, node):
        return None if node.name in PLUMBING else self.generic_visit(node)


def code_of(script):
    """A hash of the code of a script that learns and evaluates, above Command line."""
    text = (ROOT / script).read_text().partition("# ---------- Command line")[0]
    with LOCK:  # Python 3.11 may fail if two threads parse at once
        code = ast.dump(OnlyLearning().visit(ast.parse(text)))
    return hashlib.sha256(code.encode()).hexdigest()[:12]


def machine():
    """The processor, and how many of its cores there are."""
    cpu = re.search(r"model name\t: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{os.cpu_count()} cores of {cpu[1] if cpu else platform.processor()}"


def versions():
    return " ".join(f"{name} {version(name)}" for name in PACKAGES)


def commit():
    """The commit, marked as dirty if a program differs from it (the tables it writes may)."""
    git = ["git", "-C", str(ROOT)]
    command = [*git, "rev-parse", "--short=12", "HEAD"]
    name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"]).returncode
    return f"{name}-dirty" if changed else name


def run(row, seed, core):
    """Start a script on one core. Returns the lines of agents.csv, which it adds there."""
    flags = f"{row.flags} --seed {seed}"
    if row.agents > 1:
        flags += f" --num-seeds {row.agents}"
    folder = RUNS / f"{row.name}, {seed}".replace("/", "-")
    shutil.rmtree(folder, ignore_errors=True)
    command = ["taskset", "-c", core, sys.executable, row.script, *flags.split()]
    command += ["--output-dir", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "results")}
    same = conditions(row)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    summary = json.loads((folder / "summary.json").read_text())
    record = same | {"row": row.name, "date": time.strftime("%Y-%m-%d"), "commit": commit()}
    record |= {name: summary[name] for name in ("env_steps", "compile_seconds", "train_seconds")}
    lines = []
    for agent in summary["seeds"]:
        line = record | {"seed": agent["seed"], "solved": agent["solved"]}
        for name, column in (("mean", "mean"), ("std", "std"), ("min", "worst")):
            line[column] = round(float(agent[f"eval_return_{name}"]), 4)
        lines.append({name: line[name] for name in COLUMNS})
    add(lines)
    return lines


def conditions(row):
    """What has to be the same for a run not to be repeated, but for the seed."""
    found = {"script": row.script, "flags": row.flags, "code": code_of(row.script)}
    return found | {
        "device": machine(),
        "python": platform.python_version(),
        "versions": versions(),
    }


def add(lines):
    """Append lines to agents.csv. Two of these programs may do so at the same time."""
    with LOCK, AGENTS.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, COLUMNS)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(lines)


def finished():
    """A set of what agents.csv has, in terms of SAME."""
    if not AGENTS.exists():
        return set()
    with AGENTS.open(newline="") as file:
        return {tuple(line[name] for name in SAME) for line in csv.DictReader(file)}


def main(only: tuple[str, ...] = ()) -> None:
    """Measure all rows, or those whose name contains one of `only`."""
    known = finished()
    jobs = []
    for row in all_rows():
        if only and not any(word in row.name for word in only):
            continue
        same = conditions(row)
        for i in range(row.runs):
            seed = row.first_seed + i * row.agents
            if tuple(str((same | {"seed": seed})[name]) for name in SAME) not in known:
                jobs.append((row, seed))
    free = [str(core) for core in os.sched_getaffinity(0)]

    def one(job):
        core = free.pop()
        try:
            lines = run(*job, core)
        finally:
            free.append(core)
        mean = np.mean([line["mean"] for line in lines])
        print(f"{job[0].name}: {job[1]}: {mean:.1f}", flush=True)

    with open(ROOT / "results" / "versions.txt", "w") as file:
        print(f"# What Python {platform.python_version()} measured with, for pip's -c", file=file)
        print(*(f"{name}=={version(name)}" for name in PACKAGES), sep="\n", file=file)
    print(f"{len(jobs)} runs", flush=True)
    with ThreadPoolExecutor(len(free)) as pool:
        list(pool.map(one, jobs))


if __name__ == "__main__":
    tyro.cli(main)

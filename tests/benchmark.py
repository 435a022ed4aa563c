"""Make every figure and picture of the README: python tests/benchmark.py [--only SCRIPT ...] [--quick]

Each run is a script started as a user starts it, in its own process. Finished runs are kept in runs/benchmark and not run
again as long as the script and the flags stay the same; results/ gets the table and the pictures, and the README the table.
No default was tuned on the seeds used here. Timings want a machine with nothing else running, for about 45 minutes.
"""

import ast
import csv
import datetime
import hashlib
import json
import os
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal

import imageio.v3
import numpy as np
import tyro

ROOT = pathlib.Path(__file__).parent.parent
RUNS = ROOT / "runs" / "benchmark"
RESULTS = ROOT / "results"
MAZE, CARTPOLE = "q_table_maze.py", "dqn_cartpole_jax.py"
LANDER, PENDULUM = "dqn_lunarlander.py", "dqn_pendulum_discretized.py"
# Defaults were chosen on seeds below 100. Seeds 1000 to 1099 were looked at once with earlier defaults, and so were 2000 to
# 2009 with an earlier buffer_size of the pendulum file, which therefore has seeds of its own.
FIRST_SEED = {MAZE: 2000, CARTPOLE: 2000, LANDER: 2000, PENDULUM: 3000}

# The peers' own settings: luchris429/purejaxrl (purejaxrl/dqn.py) and RPegoud/jym (the CartPole notebook), which is tutorial 5.
PUREJAXRL = (
    "--num-envs 10 --train-frequency 10 --buffer-size 10000 --batch-size 128 --hidden-sizes 120 84 --learning-rate 2.5e-4"
    " --no-anneal-lr --gamma 0.99 --n-step 1 --tau 1 --target-network-frequency 500 --learning-starts 10000 --start-e 1"
    " --end-e 0.05 --exploration-fraction 0.5 --no-scale-obs --total-timesteps 500000"
)
JYM = (
    "--num-envs 1 --train-frequency 1 --buffer-size 512 --batch-size 32 --hidden-sizes 64 64 64 --learning-rate 1e-3"
    " --no-anneal-lr --gamma 0.9 --n-step 1 --tau 1 --target-network-frequency 10 --learning-starts 32 --start-e 0.3"
    " --end-e 0.015 --exploration-fraction 1 --no-scale-obs --total-timesteps 20000"
)
# CleanRL's dqn_jax.py on LunarLander-v3 as shared/measurements.md timed it: batch 64, an update every 4 steps, 120-84 units.
CLEANRL = (
    "--batch-size 64 --hidden-sizes 120 84 --no-layer-norm --n-step 1 --no-double-dqn --tau 1 --target-network-frequency 500"
    " --learning-rate 2.5e-4 --no-anneal-lr --buffer-size 10000 --start-e 1 --end-e 0.05 --exploration-fraction 0.5"
    " --learning-starts 10000 --reward-scale 1 --average-rate 1 --eval-episodes 5 --total-timesteps 60000"
)
# The other tutorials' settings, as near as our files come (shared/tutorials.md).
TUTORIAL_1 = (
    "--start-e 0 --end-e 0 --learning-rate 0.8 --halving-visits inf --gamma 0.95 --max-episode-steps 4 --total-timesteps 200"
)
TUTORIAL_2 = (
    "--q-input state-action --num-bins 1000 --hidden-sizes 10 --no-layer-norm --start-e 0.1 --end-e 0.1 --buffer-size 100"
    " --batch-size 32 --learning-starts 100 --train-frequency 4 --gradient-steps 1 --n-step 1 --no-double-dqn"
    " --learning-rate 1e-3 --no-anneal-lr --reward-scale 1 --average-rate 1 --total-timesteps 20000"
)
TUTORIAL_3 = (
    "--hidden-sizes 64 64 --no-layer-norm --learning-rate 1e-3 --no-anneal-lr --buffer-size 10000 --learning-starts 10000"
    " --batch-size 32 --train-frequency 4 --gradient-steps 1 --gamma 0.995 --n-step 1 --tau 0.001 --target-network-frequency 4"
    " --no-double-dqn --reward-scale 1 --end-e 0.01 --early-stop --total-timesteps 400000"
)
TUTORIAL_4 = (
    "--env-id CartPole-v1 --hidden-sizes 300 100 --no-layer-norm --learning-rate 1e-3 --no-anneal-lr --buffer-size 100000"
    " --learning-starts 1000 --batch-size 32 --train-frequency 4 --gradient-steps 4 --n-step 1 --tau 1"
    " --target-network-frequency 100 --no-double-dqn --reward-scale 1 --average-rate 1 --start-e 0.3 --end-e 0.3"
    " --total-timesteps 30000"
)


@dataclass(frozen=True)
class Row:
    """A line of the table: `runs` processes, each with `agents` seeds, from the script's FIRST_SEED on."""

    name: str
    script: str
    environment: str
    flags: str = ""
    runs: int = 1
    agents: int = 1
    one_core: bool = False  # pin the processes to one core
    cold: bool = False  # also time the bare command, as a user types it
    bare: bool = False  # also time the environment alone
    in_readme: bool = True


ICE = "--slip-prob 0.66667"
SPEED = "--total-timesteps 20000000"
LONG = "--num-envs 50 --train-frequency 50 --target-network-frequency 50 --total-timesteps 2000000"
SMALL = "--env-id CartPole-v1 --hidden-sizes 16 --no-layer-norm --gradient-steps 1 --eval-episodes 2 --buffer-size 100000"


def boards():
    for board in ("2x3", "4x5", "4x4", "8x8"):
        yield Row(f"maze {board}", MAZE, board, f"--board {board}", agents=20)
        yield Row(f"maze {board} on ice", MAZE, f"{board} on ice", f"--board {board} {ICE}", agents=20)


ROWS = [
    *boards(),
    Row("maze 8x8, one core", MAZE, "8x8", f"--board 8x8 {SPEED}", 5, one_core=True, in_readme=False),
    Row("maze 8x8 on ice, one core", MAZE, "8x8", f"--board 8x8 {ICE} {SPEED}", 5, one_core=True, in_readme=False),
    Row("maze 8x8, 16 seeds", MAZE, "8x8", f"--board 8x8 {SPEED}", 3, agents=16, in_readme=False),
    Row("maze, one seed", MAZE, "2x3", "", 5, one_core=True, cold=True, in_readme=False),
    Row("maze, network", MAZE, "2x3", "--method network", 5, one_core=True),
    Row("CartPole", CARTPOLE, "CartPole-v1", agents=100),
    Row("CartPole, one seed", CARTPOLE, "CartPole-v1", "", 9, one_core=True, cold=True),
    Row("CartPole, 16 seeds, one core", CARTPOLE, "CartPole-v1", "", 3, agents=16, one_core=True, in_readme=False),
    Row("CartPole, 16 seeds", CARTPOLE, "CartPole-v1", "", 3, agents=16, in_readme=False),
    Row("buffer of 10,000", CARTPOLE, "CartPole-v1", f"{LONG} --buffer-size 10000", 3, one_core=True, in_readme=False),
    Row("buffer of 1,000,000", CARTPOLE, "CartPole-v1", f"{LONG} --buffer-size 1000000", 3, one_core=True, in_readme=False),
    Row("CartPole, PureJaxRL's settings", CARTPOLE, "CartPole-v1", PUREJAXRL, runs=3),
    Row("CartPole, jym's settings (tutorial 5)", CARTPOLE, "CartPole-v1", JYM, runs=3),
    Row("LunarLander", LANDER, "LunarLander-v3", runs=10, bare=True),
    Row("LunarLander file on CartPole", LANDER, "CartPole-v1", "--env-id CartPole-v1", runs=5),
    Row("LunarLander file on Acrobot", LANDER, "Acrobot-v1", "--env-id Acrobot-v1", runs=5),
    Row(
        "LunarLander, CleanRL's settings, 4 updates every 16 steps",
        LANDER,
        "LunarLander-v3",
        f"{CLEANRL} --train-frequency 16 --gradient-steps 4",
        runs=5,
        bare=True,
    ),
    Row(
        "LunarLander, CleanRL's settings, 1 update every 4 steps",
        LANDER,
        "LunarLander-v3",
        f"{CLEANRL} --train-frequency 4 --gradient-steps 1",
        runs=5,
        bare=True,
    ),
    Row("memory of 100,000 steps", LANDER, "CartPole-v1", f"{SMALL} --total-timesteps 100000", in_readme=False),
    Row("memory of 1,000,000 steps", LANDER, "CartPole-v1", f"{SMALL} --total-timesteps 1000000", in_readme=False),
    Row("InvertedPendulum", PENDULUM, "InvertedPendulum-v5", runs=10, bare=True),
    Row("Pendulum", PENDULUM, "Pendulum-v1", "--env-id Pendulum-v1", runs=10, bare=True),
    Row(
        "InvertedPendulum, no layer norm",
        PENDULUM,
        "InvertedPendulum-v5",
        "--no-layer-norm",
        runs=3,
        bare=True,
        in_readme=False,
    ),
    Row("maze, tutorial 1", MAZE, "2x3", TUTORIAL_1, agents=20),
    Row("InvertedPendulum, tutorial 2", PENDULUM, "InvertedPendulum-v5", TUTORIAL_2, runs=3),
    Row("LunarLander, tutorial 3", LANDER, "LunarLander-v3", TUTORIAL_3, runs=3),
    Row("CartPole, tutorial 4", LANDER, "CartPole-v1", TUTORIAL_4, runs=3),
    Row(
        "InvertedPendulum, 1000 torques as input",
        PENDULUM,
        "InvertedPendulum-v5",
        "--q-input state-action --num-bins 1000",
        runs=3,
    ),
]
QUICK = {MAZE: 20_000, CARTPOLE: 25_600, LANDER: 15_000, PENDULUM: 5_000}
VIDEO = "--capture-video --eval-frequency"
FILMS = [
    Row("lander film", LANDER, "LunarLander-v3", f"{VIDEO} 20000"),
    Row("pole film", PENDULUM, "InvertedPendulum-v5", f"{VIDEO} 4000"),
    Row("pendulum film", PENDULUM, "Pendulum-v1", f"--env-id Pendulum-v1 {VIDEO} 4000"),
]


# ---------------------------------------------------------------------------------------------------------------- Runs


def timed(command, core=None):
    """Run a command, on one core if asked. Returns its output, wall seconds and peak memory in MB."""
    pin = (lambda: os.sched_setaffinity(0, {core})) if core is not None else None
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, preexec_fn=pin)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return output, time.perf_counter() - started, usage.ru_maxrss / 1024


def once(key, identity, work):
    """work(folder), unless RUNS/key holds what it returned for the same identity. Gives that dict."""
    folder = RUNS / key
    done = folder / "done.json"
    if done.exists():
        kept = json.loads(done.read_text())
        if kept["identity"] == identity:
            return kept
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kept = {"identity": identity, "date": datetime.date.today().isoformat()} | work(folder)
    done.write_text(json.dumps(kept))
    return kept


def script_run(row, i, flags):
    """Run number i of a row: its summary.json with the wall seconds and the peak memory."""
    command = [str(ROOT / row.script), "--seed", str(FIRST_SEED[row.script] + i), *flags]

    def work(folder):
        _, seconds, peak_mb = timed([*command, "--output-dir", str(folder / "run")], core=0 if row.one_core else None)
        summary = json.loads((folder / "run" / "summary.json").read_text())
        return {"summary": summary, "wall_seconds": seconds, "peak_mb": peak_mb, "folder": str(folder / "run")}

    return once(f"{slug(row.name)}/{i}", identity(row.script, flags), work)


BARE = """
import sys, time, gymnasium
env = gymnasium.make(sys.argv[1]); env.reset(seed=0); env.action_space.seed(0)
actions = [env.action_space.sample() for _ in range(60_000)]
start = time.perf_counter()
for action in actions:
    _, _, terminated, truncated, _ = env.step(action)
    if terminated or truncated: env.reset()
print(len(actions) / (time.perf_counter() - start))
"""


def extra_runs(row, i, flags):
    """What is timed beside run i: the command without keeping anything, the imports alone, the environment alone."""

    def work(folder):
        times = {}
        if row.cold:
            times["cold"] = timed([str(ROOT / row.script), "--seed", str(FIRST_SEED[row.script] + i), *flags])[1]
            times["imports"] = timed(["-c", "import jax, optax"])[1]
        if row.bare:
            times["bare"] = float(timed(["-c", BARE, row.environment])[0])
        return times

    return once(f"{slug(row.name)}/extra{i}", identity(row.script, flags), work)


def identity(script, flags):
    """Changes when the script's code or the flags do, but not with comments and docstrings, which state the results."""
    module = ast.parse((ROOT / script).read_text())
    for node in ast.walk(module):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [part for part in node.body if not is_text(part)] or [ast.Pass()]
    return hashlib.sha256((ast.unparse(module) + " ".join(flags)).encode()).hexdigest()


def is_text(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def slug(name):
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# --------------------------------------------------------------------------------------------------------------- Table

COLUMNS = (
    "name script environment flags steps seeds return_mean interval_95 worst solved largest_error training_seconds"
    " compile_seconds cold_command_seconds import_seconds steps_per_second bare_steps_per_second peak_memory_mb"
    " versions processor date"
).split()


def measure(row, quick, report):
    """All runs of a row, as a line of the table and the folders that hold them."""
    flags = row.flags.split()
    if row.agents > 1:
        flags += ["--num-seeds", str(min(row.agents, 4) if quick else row.agents)]
    if quick:
        flags += ["--total-timesteps", str(QUICK[row.script]), "--eval-episodes", "5"]
    count = 1 if quick else row.runs
    runs, extras = [], []
    for i in range(count):
        report(f"{row.name}, run {i + 1} of {count}")
        runs.append(script_run(row, i, flags))
        if row.bare:
            extras.append(extra_runs(row, i, flags))
    for i in range((1 if quick else 9) if row.cold else 0):
        report(f"{row.name}, cold command {i + 1}")
        extras.append(extra_runs(row, i, flags))
    summaries = [run["summary"] for run in runs]
    seeds = [seed for summary in summaries for seed in summary["seeds"]]
    means = [seed["eval_return_mean"] for seed in seeds]
    solved = [seed["solved"] for seed in seeds]
    errors = [seed["error_all"] for seed in seeds if "error_all" in seed]
    digits = 3 if row.script == MAZE else 1

    def median(values, digits):
        values = list(values)
        return f"{statistics.median(values):.{digits}f}" if values else ""

    line = {
        "name": row.name,
        "script": row.script,
        "environment": row.environment,
        "flags": row.flags,
        "steps": summaries[0]["env_steps"],
        "seeds": f"{seeds[0]['seed']} to {seeds[-1]['seed']}",
        "return_mean": f"{statistics.mean(means):.{digits}f}",
        "interval_95": f"{1.96 * statistics.stdev(means) / len(means) ** 0.5:.{digits}f}" if len(means) > 1 else "",
        "worst": f"{min(means):.{digits}f}",
        "solved": "" if None in solved else f"{sum(solved)} of {len(solved)}",
        "largest_error": f"{max(errors):.1e}" if errors else "",
        "training_seconds": median((s["train_seconds"] for s in summaries), 2),
        "compile_seconds": median((s["compile_seconds"] for s in summaries), 2),
        "cold_command_seconds": median((e["cold"] for e in extras if "cold" in e), 2)
        or median((run["wall_seconds"] for run in runs), 1),
        "import_seconds": median((e["imports"] for e in extras if "imports" in e), 2),
        "steps_per_second": median((s["steps_per_second"] for s in summaries), 0),
        "bare_steps_per_second": median((e["bare"] for e in extras if "bare" in e), 0),
        "peak_memory_mb": median((run["peak_mb"] for run in runs), 0),
        "versions": " ".join(f"{name} {version}" for name, version in summaries[0]["versions"].items()),
        "processor": processor(),
        "date": max(run["date"] for run in runs),
    }
    return line, [pathlib.Path(run["folder"]) for run in runs]


def processor():
    """The processor's name and the number of cores."""
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()}"


def write_table(lines):
    with open(RESULTS / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)


HEADER = "| run | steps | seeds | greedy return, mean ± 95 % | worst seed | solved | training, s | steps/s |"
START, END = "<!-- table of tests/benchmark.py -->", "<!-- end of table -->"


def readme_table(lines):
    """The table that the README shows, in Markdown."""
    rows = [HEADER, "| --- " * (HEADER.count("|") - 1) + "|"]
    for line in lines:
        if next(row for row in ROWS if row.name == line["name"]).in_readme:
            interval = f" ± {line['interval_95']}" if line["interval_95"] else ""
            cells = line["name"], f"{int(line['steps']):,}", line["seeds"], line["return_mean"] + interval, line["worst"]
            cells += line["solved"], line["training_seconds"], f"{int(line['steps_per_second']):,}"
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def write_readme(lines):
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(START)
    readme.write_text(f"{before}{START}\n\n{readme_table(lines)}\n\n{END}{rest.split(END)[1]}")


# ------------------------------------------------------------------------------------------------------------ Pictures


def curves(folders):
    """Training returns over environment steps: the mean over seeds, and the band from the worst to the best of them."""
    from matplotlib.figure import Figure

    names = [name for name in ("CartPole", "LunarLander", "InvertedPendulum", "Pendulum") if name in folders]
    thresholds = {"CartPole": 475, "LunarLander": 200, "InvertedPendulum": 950, "Pendulum": -150}
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    for axes, name in zip(figure.subplots(2, 2).flat, names, strict=False):
        series = []
        for folder in folders[name]:
            data = np.genfromtxt(folder / "returns.csv", delimiter=",", names=True)
            total = json.loads((folder / "summary.json").read_text())["env_steps"]
            seeds = data["seed"] if "seed" in data.dtype.names else np.zeros(len(data))
            for seed in np.unique(seeds):
                series.append((data["env_step"][seeds == seed], data["episode_return"][seeds == seed]))
        ends = np.linspace(0, total, 41)[1:]
        means = np.array([[window_mean(*one, end, total / 20) for end in ends] for one in series])
        axes.fill_between(ends, np.nanmin(means, axis=0), np.nanmax(means, axis=0), alpha=0.25, linewidth=0)
        axes.plot(ends, np.nanmean(means, axis=0), linewidth=1.5)
        axes.axhline(thresholds[name], color="0.4", linewidth=0.8, linestyle=":")
        axes.set(title=f"{name}, {len(series)} seeds", xlabel="environment steps", ylabel="return while exploring")
        axes.spines[["top", "right"]].set_visible(False)
        axes.locator_params(axis="x", nbins=5)
    figure.savefig(RESULTS / "curves.png", dpi=110)


def window_mean(steps, returns, end, width):
    """Mean return of the episodes that ended in the window of this width before `end`; nan if none did."""
    inside = (steps > end - width) & (steps <= end)
    return returns[inside].mean() if inside.any() else np.nan


def mazes(folders):
    """FrozenLake's maps with the greedy policy that a run on ice learned."""
    from matplotlib.figure import Figure

    sys.path.insert(0, str(ROOT))
    import q_table_maze

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    for axes, board in zip(figure.subplots(1, 2), ("4x4", "8x8"), strict=True):
        maze = q_table_maze.read_board(board)
        q = q_table_maze.load_model(folders[f"maze {board} on ice"][0] / "model.npz")["q_table"][0]
        cells, width = "".join(maze.rows), len(maze.rows[0])
        colors = {"S": (0.8, 0.9, 1), "F": (1, 1, 1), "H": (0.25, 0.25, 0.3), "G": (0.6, 0.85, 0.6)}
        axes.imshow(np.array([colors[cell] for cell in cells]).reshape(len(maze.rows), width, 3))
        for cell, letter in enumerate(cells):
            row, column = divmod(cell, width)
            text = "←→↑↓"[q[cell].argmax()] if maze.reachable[cell] else {"G": "G"}.get(letter, "")
            axes.text(column, row, text, ha="center", va="center", fontsize=64 / width + 4)
        axes.set(title=f"{board} on ice, learned policy", xticks=[], yticks=[])
    figure.savefig(RESULTS / "maze.png", dpi=110)


def films(quick, report):
    """Early and late episodes of one agent, as GIFs of at most 200 frames."""
    chosen = {"lander film": ("20000", "100000", None), "pole film": ("4000", None), "pendulum film": ("4000", None)}
    for row in FILMS:
        report(row.name)
        flags = row.flags.split()
        if quick:
            flags = [*flags, "--total-timesteps", "20000", "--eval-episodes", "5"]
        folder = pathlib.Path(script_run(row, 0, flags)["folder"])
        for step in chosen[row.name]:
            source = folder / (f"video_{step}.gif" if step else "video.gif")
            if source.exists():
                frames = imageio.v3.imread(source)[::2][:150]
                name = f"{slug(row.name).split('-')[0]}_{step or 'end'}.gif"
                imageio.v3.imwrite(RESULTS / name, frames, duration=80, loop=0)


# ---------------------------------------------------------------------------------------------------------------- Main


@dataclass
class Args:
    """Measure the scripts."""

    only: tuple[Literal["maze", "cartpole", "lunarlander", "pendulum"], ...] = ()
    """measure only these scripts"""
    quick: bool = False
    """shorter and fewer runs, to try this file itself: prints, and writes no results"""


def main(args):
    global RUNS
    if args.quick:
        RUNS = RUNS.with_name("quick")
    rows = [row for row in ROWS if not args.only or any(name in row.script for name in args.only)]
    started = time.perf_counter()
    lines, folders = [], {}
    for i, row in enumerate(rows):

        def report(text, i=i):
            print(f"{time.perf_counter() - started:6.0f} s  row {i + 1} of {len(rows)}: {text}", flush=True)

        line, folders[row.name] = measure(row, args.quick, report)
        lines.append(line)
    print()
    for line in lines:
        print(
            f"{line['name']:<58} mean {line['return_mean']:>8}  worst {line['worst']:>8}  solved {line['solved']:<10}"
            f" {line['training_seconds']:>8} s  {int(line['steps_per_second']):>11,} steps/s"
        )
    if not args.quick and not args.only:
        RESULTS.mkdir(exist_ok=True)
        write_table(lines)
        write_readme(lines)
        curves(folders)
        mazes(folders)
        films(args.quick, report)
        print(f"\nwritten: {RESULTS} and the README's table")


if __name__ == "__main__":
    main(tyro.cli(Args))

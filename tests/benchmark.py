"""Measure the scripts and make what the README shows: python tests/benchmark.py [--only NAME ...] [--against DIR]

Each run is a script started as a user starts it, in its own process with one thread and on one core, two processes at a time;
rows marked `alone` run one at a time, on both cores, for their speed. Finished runs are kept in runs/benchmark and not repeated
as long as the code above Command line and the flags stay the same. Writes results/results.csv, the pictures and the table of
the README.
With --against DIR, a checkout of an earlier commit, it measures nothing but speed: alternating runs of both, as ratios.
No default was chosen with the seeds used here.
"""

import ast
import csv
import hashlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RUNS, RESULTS, README = ROOT / "runs" / "benchmark", ROOT / "results", ROOT / "README.md"
START, END = "<!-- table of tests/benchmark.py -->", "<!-- end of table -->"
MAZE, CARTPOLE = "q_table_maze.py", "dqn_cartpole_jax.py"
LANDER, PENDULUM = "dqn_lunarlander.py", "dqn_pendulum_discretized.py"


@dataclass(frozen=True)
class Row:
    """A line of results.csv: `runs` processes with consecutive seeds, each of `agents` agents."""

    name: str
    script: str
    flags: str = ""
    first_seed: int = 5000
    runs: int = 10
    agents: int = 1
    alone: bool = False  # one process at a time, for its speed
    readme: str = ""  # its name in the README's table; not in it if empty


def maze_rows():
    """Every board without ice and on two kinds of it, the largest on four, and the network on every board."""
    for board in ("2x3", "4x5", "4x4", "8x8"):
        for slip in ("0", "0.1", "0.2", "0.3333", "0.6667") if board == "8x8" else ("0", "0.2", "0.6667"):
            yield Row(f"maze {board}, slip {slip}", MAZE, f"--board {board} --slip-prob {slip}", runs=20)
        yield Row(f"maze {board}, network", MAZE, f"--board {board} --method network", runs=5)


INVERTED, SWING, THOUSAND = "InvertedPendulum-v5", "Pendulum-v1", "--q-input state-action --num-bins 1000"
ROWS = [
    *maze_rows(),
    Row("CartPole", CARTPOLE, "", 7000, 10, 100, readme="CartPole-v1"),
    Row("CartPole, one at a time", CARTPOLE, "", 5000, 9, alone=True),
    Row("LunarLander", LANDER, "", 5700, readme="LunarLander-v3"),
    Row("LunarLander, one at a time", LANDER, "", 5710, 3, alone=True),
    Row("LunarLander, 120,000 steps", LANDER, "--total-timesteps 120000", 5800),
    Row("LunarLander, 120,000 steps, no action_gap", LANDER, "--total-timesteps 120000 --action-gap 0", 5800),
    Row("Acrobot", LANDER, "--env-id Acrobot-v1", runs=5, readme="Acrobot-v1 (dqn_lunarlander.py)"),
    Row("CartPole in Gymnasium", LANDER, "--env-id CartPole-v1", runs=5, readme="CartPole-v1 (dqn_lunarlander.py)"),
    Row("InvertedPendulum", PENDULUM, "", 5060, readme=INVERTED),
    Row("InvertedPendulum, 25,000 steps", PENDULUM, "--total-timesteps 25000", 5100, runs=20),
    Row("InvertedPendulum, one at a time", PENDULUM, "", 5090, 3, alone=True),
    Row("Pendulum", PENDULUM, f"--env-id {SWING}", 5060, readme=f"{SWING} (best with 5 torques: -136)"),
    Row(
        "InvertedPendulum, 1000 torques",
        PENDULUM,
        f"{THOUSAND} --eval-episodes 20",
        5060,
        readme=f"{INVERTED}, 1000 torques as an input",
    ),
    Row("Pendulum, 1000 torques", PENDULUM, f"{THOUSAND} --env-id {SWING}", 5060, runs=4),
    Row("InvertedPendulum, 100,000 torques", PENDULUM, f"{THOUSAND}00 --eval-episodes 1", 5060, runs=2),
]
# Every ablation changes one or two flags of the defaults. What that costs stands in results/ablations.md.
ABLATIONS = {
    CARTPOLE: (
        "--n-step 1|--tau 1 --target-network-frequency 512|--end-learning-rate 0.01|--buffer-size 9600|--gamma 0.98"
        "|--hidden-sizes 64 64|--hidden-sizes 48|--exploration-fraction 0.2|--num-envs 128"
    ),
    LANDER: (
        "--action-gap 0|--n-step 1|--no-double-dqn|--no-layer-norm|--buffer-size 200000|--end-learning-rate 0.003"
        "|--reward-scale 1"
    ),
    PENDULUM: "--n-step 1|--buffer-size 30000|--end-learning-rate 0.003|--num-bins 11|--reward-scale 1",
}
ROWS += [
    Row(f"ablation {script} {flags}", script, flags, 6000, 1 if script == CARTPOLE else 10, 100 if script == CARTPOLE else 1)
    for script, all_flags in ABLATIONS.items()
    for flags in all_flags.split("|")
]
# The settings of the five tutorials, or the nearest that our flags allow: results/tutorials.md.
JYM = (
    "--num-envs 1 --buffer-size 512 --batch-size 32 --hidden-sizes 64 64 64 --learning-rate 1e-3 --gamma 0.9 --n-step 1 --tau 1"
)
JYM += " --target-network-frequency 10 --learning-starts 32 --start-e 0.3 --end-e 0.015 --exploration-fraction 1"
JYM += " --total-timesteps 20000"
PAPER = "--learning-rate 1e-3 --end-learning-rate 1e-3 --n-step 1 --reward-scale 1 --train-frequency 4 --batch-size 32"
TUTORIALS = {
    MAZE: "--epsilon 0 --learning-rate 0.8 --decay-power 0 --max-episode-steps 4 --total-timesteps 200",
    PENDULUM: f"{THOUSAND} --max-samples 1000 {PAPER} --gradient-steps 1 --hidden-sizes 10 --start-e 0.1 --end-e 0.1"
    " --buffer-size 100 --learning-starts 100 --tau 1 --total-timesteps 20000 --eval-episodes 20",
    LANDER: f"{PAPER} --action-gap 0 --gradient-steps 1 --hidden-sizes 64 64 --no-layer-norm --buffer-size 10000"
    " --learning-starts 10000 --gamma 0.995 --tau 0.001 --target-network-frequency 4 --end-e 0.01 --total-timesteps 200000",
    f"./{LANDER}": f"--env-id CartPole-v1 {PAPER} --gamma 0.99 --action-gap 0 --gradient-steps 4 --hidden-sizes 300 100"
    " --no-layer-norm --buffer-size 100000 --learning-starts 1000 --tau 1 --target-network-frequency 100 --start-e 0.3"
    " --end-e 0.3 --total-timesteps 30000",
    CARTPOLE: f"{JYM} --end-learning-rate 1e-3",
}
ROWS += [Row(f"tutorial {i}", script.strip("./"), flags) for i, (script, flags) in enumerate(TUTORIALS.items(), 1)]
COLUMNS = "name script flags seeds steps mean interval worst solved compile_seconds train_seconds steps_per_second".split()
COLUMNS += ["device", "versions", "date"]


def start(script, flags, folder, cores, environment=None):
    """Run a script with --output-dir folder on these cores. Returns the seconds that the whole command took."""
    command = ["taskset", "-c", cores, sys.executable, str(script), *flags.split(), "--output-dir", str(folder)]
    shutil.rmtree(folder, ignore_errors=True)
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | (environment or {}))
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return time.perf_counter() - begin


def measure(row, runs_of):
    """The line of results.csv for a row. runs_of keeps what finished: name to list of folders."""
    lesson = (ROOT / row.script).read_text().partition("# ---------- Command line")[0]
    tree = ast.parse(lesson).body[1:]  # without the docstring; comments do not count either
    code = hashlib.sha256(ast.dump(ast.Module(tree, [])).encode()).hexdigest()[:12]
    cores = ["0", "1"] if not row.alone and os.cpu_count() > 1 else ["0-1" if os.cpu_count() > 1 else "0"]
    free = list(cores)

    def one(i):
        seed = row.first_seed + i * row.agents
        flags = f"{row.flags} --seed {seed}" + (f" --num-seeds {row.agents}" if row.agents > 1 else "")
        folder = RUNS / f"{row.script[:-3]}-{code}-{hashlib.sha256(flags.encode()).hexdigest()[:12]}-{len(cores)}"
        if not (folder / "summary.json").exists():
            core = free.pop()
            try:
                one_thread = {"OMP_NUM_THREADS": "1", "JAX_COMPILATION_CACHE_DIR": str(RUNS / "cache")}
                start(row.script, flags, folder, core, one_thread if len(cores) > 1 else {})
            finally:
                free.append(core)
        return folder

    with ThreadPoolExecutor(len(cores)) as pool:
        folders = runs_of[row.name] = list(pool.map(one, range(row.runs)))
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    seeds = [seed for summary in summaries for seed in summary["seeds"]]
    means = np.array([seed["eval_return_mean"] for seed in seeds])
    solved = [seed["solved"] for seed in seeds]
    middle = {name: statistics.median(x[name] for x in summaries) for name in COLUMNS[9:12]}
    versions = " ".join(f"{name} {version}" for name, version in summaries[0]["versions"].items())
    cpu = re.search(r"model name\t: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "name": row.name,
        "script": row.script,
        "flags": row.flags,
        "seeds": f"{seeds[0]['seed']} to {seeds[-1]['seed']}",
        "steps": summaries[0]["env_steps"],
        "mean": round(float(means.mean()), 3),
        "interval": round(1.96 * float(means.std(ddof=1)) / len(means) ** 0.5, 3) if len(means) > 1 else "",
        "worst": round(float(means.min()), 3),
        "solved": "" if solved[0] is None else f"{sum(solved)} of {len(solved)}",
        "compile_seconds": round(middle["compile_seconds"], 2) if row.alone else "",
        "train_seconds": round(middle["train_seconds"], 2),
        "steps_per_second": round(middle["steps_per_second"]),
        "device": f"{os.cpu_count()} cores of {cpu[1] if cpu else platform.processor()}",
        "versions": f"python {platform.python_version()} {versions}",
        "date": time.strftime("%Y-%m-%d"),
    }


def write_ablations(found):
    """results/ablations.md, a table for each script; found maps a row's name to its line of results.csv."""
    text = [
        "# Ablations",
        "",
        "What becomes of the result when one or two defaults change: greedy return over 100 episodes, its",
    ]
    text += ["95 % interval over the agents, the worst agent, and how many agents reach Gymnasium's threshold. Made by"]
    text += ["`python tests/benchmark.py` from seeds on which nothing was tuned; the lines are in [results.csv](results.csv)."]
    for (script, all_flags), default in zip(ABLATIONS.items(), ("CartPole", "LunarLander", "InvertedPendulum"), strict=True):
        text += ["", f"## {script}", "", "| changed | seeds | greedy return | worst seed | solved |", "| --- " * 5 + "|"]
        for name in [default] + [f"ablation {script} {flags}" for flags in all_flags.split("|")]:
            if x := found.get(name):
                changed = f"`{x['flags']}`" if x["flags"] else "nothing: the defaults"
                text += ["| {} | {seeds} | {mean} ± {interval} | {worst} | {solved} |".format(changed, **x)]
    (RESULTS / "ablations.md").write_text("\n".join(text) + "\n")


def write_table(lines):
    """results.csv, and the README's table between its two marks."""
    with (RESULTS / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)
    table = ["| environment | steps | seeds | greedy return | worst seed | solved |", "| --- " * 6 + "|"]
    found = {line["name"]: line for line in lines}
    for row in ROWS:
        if row.readme and row.name in found:
            x = found[row.name]
            interval = f" ± {float(x['interval']):.1f}" if x["interval"] != "" else ""
            mean, worst = f"{float(x['mean']):.1f}{interval}", f"{float(x['worst']):.1f}"
            cells = row.readme, f"{int(x['steps']):,}", x["seeds"], mean, worst, x["solved"]
            table.append("| " + " | ".join(cells) + " |")
    before, start_mark, rest = README.read_text().partition(START)
    if start_mark:
        README.write_text(f"{before}{START}\n" + "\n".join(table) + f"\n{END}{rest.split(END)[1]}")


def draw_curves(runs_of):
    """Learning curves: the mean over the agents of their last 10 episodes, and a band from the worst to the best."""
    from matplotlib.figure import Figure

    names = {"CartPole": "CartPole-v1", "LunarLander": "LunarLander-v3", "InvertedPendulum": INVERTED, "Pendulum": SWING}
    figure = Figure(figsize=(12, 2.8), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, 4), names.items(), strict=True):
        tables = [np.loadtxt(folder / "returns.csv", delimiter=",", skiprows=1) for folder in runs_of.get(name, [])]
        if name == "CartPole":  # many agents in one file; the first ten
            tables = [table[table[:, 2] == seed] for table in tables[:1] for seed in np.unique(table[:, 2])[:10]]
        if tables:
            grid = np.linspace(0, max(table[-1, 0] for table in tables), 200)
            recent = [
                [table[table[:, 0] <= t, 1][-10:].mean() if t >= table[0, 0] else np.nan for t in grid] for table in tables
            ]
            recent = np.array(recent)[:, ~np.isnan(recent).any(axis=0)]
            axes.fill_between(grid[-recent.shape[1] :], recent.min(axis=0), recent.max(axis=0), alpha=0.25, linewidth=0)
            axes.plot(grid[-recent.shape[1] :], recent.mean(axis=0))
        axes.set(title=f"{title}, {len(tables)} agents", xlabel="environment steps")
        axes.locator_params(axis="x", nbins=4)
    figure.supylabel("epsilon-greedy return, last 10", fontsize=9)
    figure.savefig(RESULTS / "curves.png", dpi=110)


def film(runs_of):
    """pole.gif: a kept CartPole model in Gymnasium's own environment. lander.gif: early and late, side by side."""
    import gymnasium
    import imageio.v3

    import dqn_cartpole_jax

    start(CARTPOLE, "--seed 5000", RUNS / "pole", "0")
    params = dqn_cartpole_jax.load_model(RUNS / "pole" / "model.npz")
    env, frames = gymnasium.make("CartPole-v1", render_mode="rgb_array"), []
    obs, ended = env.reset(seed=0)[0], False
    while not ended and len(frames) < 150:
        frames.append(env.render()[100:340:2, ::2].copy())
        for _ in range(2):
            obs, _, terminated, truncated, _ = env.step(int(dqn_cartpole_jax.q_values(params, obs[None]).argmax()))
            ended = terminated or truncated or ended
    imageio.v3.imwrite(RESULTS / "pole.gif", frames, duration=40, loop=0)
    start(LANDER, "--seed 5100 --eval-frequency 10000 --capture-video --eval-episodes 5", RUNS / "lander", "0-1")
    both = [imageio.v3.imread(RUNS / "lander" / f"{name}.gif")[::2] for name in ("model_10000", "model")]
    steps = range(max(map(len, both)))  # the shorter one stays at its last frame
    frames = [np.concatenate([clip[min(i, len(clip) - 1)] for clip in both], axis=1) for i in steps]
    imageio.v3.imwrite(RESULTS / "lander.gif", frames, duration=80, loop=0)


# Flags of an earlier commit (608c3bf) and of these files that mean the same, for the comparison of speeds.
OLD_PLAIN = "--n-step 1 --tau 1 --no-anneal-lr --learning-rate 2.5e-4 --buffer-size 10000 --start-e 1 --end-e 0.05"
PLAIN = OLD_PLAIN.replace("--no-anneal-lr", "--end-learning-rate 2.5e-4")
PUREJAXRL = (
    " --gamma 0.99 --exploration-fraction 0.5 --num-envs 10 --batch-size 128 --hidden-sizes 120 84 --learning-starts 10000"
)
PUREJAXRL += " --target-network-frequency 500 --total-timesteps 500000"
CLEANRL = " --no-double-dqn --gamma 0.99 --exploration-fraction 0.5 --batch-size 64 --hidden-sizes 120 84 --no-layer-norm"
CLEANRL += " --reward-scale 1 --target-network-frequency 500 --learning-starts 1000 --train-frequency 4 --gradient-steps 1"
CLEANRL += " --total-timesteps 40000"
NET = "--hidden-sizes 128 128 --gradient-steps 4 --learning-rate 3e-3 --buffer-size 50000 --total-timesteps 40000"
PAIRS = [  # name, script, flags of the earlier commit, flags of this one, cores
    ("CartPole, defaults", CARTPOLE, "", "", "0"),
    ("CartPole, 16 seeds", CARTPOLE, "--num-seeds 16", "--num-seeds 16", "0-1"),
    ("PureJaxRL's settings", CARTPOLE, OLD_PLAIN + PUREJAXRL + " --train-frequency 10", PLAIN + PUREJAXRL, "0"),
    ("jym's settings", CARTPOLE, JYM + " --no-anneal-lr --train-frequency 1", JYM + " --end-learning-rate 1e-3", "0"),
    ("LunarLander, defaults", LANDER, "", "", "0-1"),
    ("LunarLander, 128-128 units, 40,000 steps", LANDER, NET, NET + " --action-gap 0", "0-1"),
    ("LunarLander, CleanRL's settings", LANDER, OLD_PLAIN + CLEANRL, PLAIN + CLEANRL + " --action-gap 0", "0-1"),
    (
        "InvertedPendulum, 40,000 steps",
        PENDULUM,
        "--no-double-dqn",
        "--total-timesteps 40000 --train-frequency 32 --tau 0.1",
        "0-1",
    ),
    ("1000 torques as an input", PENDULUM, THOUSAND, THOUSAND, "0-1"),
    (
        "maze 8x8, 20 million steps",
        MAZE,
        "--board 8x8 --total-timesteps 20000000",
        "--board 8x8 --total-timesteps 20000000",
        "0",
    ),
    ("maze 8x8 on ice, 20 million steps", MAZE, *["--board 8x8 --slip-prob 0.6667 --total-timesteps 20000000"] * 2, "0"),
]


def compare(checkout, only, pairs):
    """Print, for each of PAIRS, ratios of training time, time a step and the command's time: the median (least to most)."""
    for name, script, old_flags, new_flags, cores in PAIRS:
        if only and not any(word in name for word in only):
            continue
        ratios = []
        for seed in range(5000, 5000 + pairs):
            both = []
            for path, flags in ((checkout / script, old_flags), (ROOT / script, new_flags)):
                seconds = start(path, f"{flags} --eval-episodes 100 --seed {seed}", RUNS / "pair", cores)
                summary = json.loads((RUNS / "pair" / "summary.json").read_text())
                both.append((summary["train_seconds"], 1 / summary["steps_per_second"], seconds))
            ratios.append(np.divide(both[1], both[0]))
        ratios = np.sort(ratios, axis=0)
        parts = (f"{np.median(x):.2f} ({x[0]:.2f} to {x[-1]:.2f})" for x in ratios.T)
        print(name, "| train_seconds {} | seconds a step {} | command {}".format(*parts), flush=True)


def main(only: tuple[str, ...] = (), against: Path | None = None, pairs: int = 5) -> None:
    """Measure all rows, or those whose name contains one of `only`; or compare with a checkout `against` in `pairs` of runs."""
    RUNS.mkdir(parents=True, exist_ok=True)
    if against:
        return compare(against.resolve(), only, pairs)
    kept = {}
    if (RESULTS / "results.csv").exists():
        kept = {line["name"]: line for line in csv.DictReader((RESULTS / "results.csv").open()) if "interval" in line}
    runs_of = {}
    for row in ROWS:
        if not only or any(word in row.name for word in only):
            kept[row.name] = measure(row, runs_of)
            print(row.name, {key: kept[row.name][key] for key in ("mean", "worst", "solved", "train_seconds")}, flush=True)
            write_table([kept[row.name] for row in ROWS if row.name in kept])
    write_ablations(kept)
    if not only:
        draw_curves(runs_of)
        film(runs_of)


if __name__ == "__main__":
    tyro.cli(main)

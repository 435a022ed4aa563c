"""Measure the scripts: python tests/benchmark.py [--only NAME ...] [--against DIR]

Each run is a script started as a user starts it, in a process of its own with one thread and on
one core, two processes at a time. Finished runs are kept in runs/benchmark, and not repeated as
long as the code above Command line and the flags stay the same (docstrings and comments aside).
Writes results/results.csv, the
ablations, the pictures, and the table of the README. With --against DIR, a checkout of an earlier
commit, it measures nothing but speed: alternating runs of both, as ratios.
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
RUNS = ROOT / "runs" / "benchmark"
RESULTS = ROOT / "results"
README = ROOT / "README.md"
START = "<!-- table of tests/benchmark.py -->"
END = "<!-- end of table -->"
MAZE = "q_table_maze.py"
CARTPOLE = "dqn_cartpole_jax.py"
LANDER = "dqn_lunarlander.py"
PENDULUM = "dqn_pendulum_discretized.py"


@dataclass(frozen=True)
class Row:
    """A line of results.csv: `runs` processes with consecutive seeds, each of `agents` agents."""

    name: str
    script: str
    flags: str = ""
    first_seed: int = 6100
    runs: int = 10
    agents: int = 1
    readme: str = ""  # its name in the README's table; not in it if empty
    change: tuple[str, str] = ("", "")  # of one line, in a copy of the script: before and after


def maze_rows():
    """Every board without ice and on FrozenLake's, and the network on every board."""
    for board in ("2x3", "4x5", "4x4", "8x8"):
        for slip in ("0", "0.6667"):
            flags = f"--board {board} --slip-prob {slip}"
            yield Row(f"maze {board}, slip {slip}", MAZE, flags, runs=20)
        yield Row(f"maze {board}, network", MAZE, f"--board {board} --method network", runs=5)


THOUSAND = "--q-input state-action --num-bins 1000"
INVERTED = "InvertedPendulum-v5"
SWING = "--env-id Pendulum-v1"
ROWS = [
    Row("CartPole", CARTPOLE, "", 9000, 10, 100, readme="CartPole-v1"),
    Row("CartPole, one at a time", CARTPOLE, "", 6100, 9),
    Row("LunarLander", LANDER, "", 6300, readme="LunarLander-v3"),
    Row(
        "Acrobot",
        LANDER,
        "--env-id Acrobot-v1",
        6300,
        5,
        readme="Acrobot-v1, by dqn_lunarlander.py",
    ),
    Row("CartPole in Gymnasium", LANDER, "--env-id CartPole-v1", 6300, 5),
    Row("InvertedPendulum", PENDULUM, readme=INVERTED),
    Row("Pendulum", PENDULUM, SWING, readme="Pendulum-v1"),
    Row(
        "1000 torques",
        PENDULUM,
        f"{THOUSAND} --eval-episodes 20",
        readme=f"{INVERTED}, 1000 torques",
    ),
    Row("Pendulum, 1000 torques", PENDULUM, f"{THOUSAND} {SWING}", 6100, 4),
    *maze_rows(),
]
# Each ablation changes a flag of the defaults, or a line of a copy: results/ablations.md.
ABLATIONS = {
    CARTPOLE: "--n-step 1|--buffer-size 9600|--gamma 0.98|--hidden-sizes 64 64|--hidden-sizes 48"
    "|--exploration-fraction 0.2|--end-e 0.05|--num-envs 128",
    LANDER: "--n-step 1|--tau 0.0125|--buffer-size 200000|--reward-scale 1",
    PENDULUM: "--gamma 0.99|--buffer-size 30000|--num-bins 11|--reward-scale 1",
}
TARGET = "target = batch.reward + batch.discount * next_q"
GAP = " - 0.8 * (q_values(learner.target_params, batch.obs).max(axis=1)"
GAP += " - q_values(learner.target_params, batch.obs)[rows, batch.action])"
SOFT = "optax.incremental_update(params, learner.target_params, args.tau)"
COPY = "optax.periodic_update(params, learner.target_params, opt_state[0].count, {})"
CHOICE = "jnp.argmax(q_values(learner.params, batch.next_obs), axis=1)"
LAYER = 'normalize(x @ params[f"w{i}"] + params[f"b{i}"])'
CHANGES = {
    (CARTPOLE, "w- copies w every 20 updates"): (SOFT, COPY.format(20)),
    (LANDER, "w- copies w every 200 updates"): (SOFT, COPY.format(200)),
    (LANDER, "action gap (advantage learning) of 0.8"): (TARGET, TARGET + GAP),
    (LANDER, "no Double DQN"): (CHOICE, CHOICE.replace("learner.params", "learner.target_params")),
    (LANDER, "squared errors"): ("optax.huber_loss(q, target)", "(target - q) ** 2"),
    (LANDER, "no layer normalization"): (LAYER, LAYER.removeprefix("normalize")),
}
for ablated, all_flags in ABLATIONS.items():
    several, together = {CARTPOLE: (1, 100), LANDER: (6, 1), PENDULUM: (10, 1)}[ablated]
    for flags in all_flags.split("|"):
        name = f"ablation {ablated} {flags}"
        ROWS.append(Row(name, ablated, flags, 6000, several, together))
    for (script, what), change in CHANGES.items():
        if script == ablated:
            name = f"ablation {ablated} {what}"
            ROWS.append(Row(name, ablated, "", 6000, several, together, change=change))
# The settings of the five tutorials, or the nearest that our flags allow: results/tutorials.md.
JYM = "--num-envs 1 --buffer-size 512 --batch-size 32 --hidden-sizes 64 64 64 --n-step 1"
JYM += " --learning-rate 1e-3 --gamma 0.9 --tau 0.1 --end-e 0.015 --total-timesteps 20000"
PAPER = "--reward-scale 1 --train-frequency 4 --batch-size 32 --gradient-steps 1"
PAPER += " --learning-rate 1e-3"
TUTORIALS = [
    (MAZE, "--epsilon 0 --learning-rate 0.8 --max-episode-steps 4 --total-timesteps 200"),
    (PENDULUM, f"{THOUSAND} --max-samples 1000 {PAPER} --hidden-sizes 10 --end-e 0.1 --tau 1")
    + ("--buffer-size 100 --total-timesteps 20000 --eval-episodes 20",),
    (LANDER, f"{PAPER} --n-step 1 --hidden-sizes 64 64 --buffer-size 10000 --tau 0.001"),
    (LANDER, f"{PAPER} --n-step 1 --env-id CartPole-v1 --gamma 0.99 --hidden-sizes 300 100")
    + ("--buffer-size 100000 --tau 0.01 --end-e 0.3 --total-timesteps 30000",),
    (CARTPOLE, JYM),
]
for number, (tutorial, *flags) in enumerate(TUTORIALS, 1):
    ROWS.append(Row(f"tutorial {number}", tutorial, " ".join(flags)))
COLUMNS = "name script flags seeds steps mean interval worst solved compile_seconds".split()
COLUMNS += ["train_seconds", "steps_per_second", "device", "versions", "date"]


def start(script, flags, folder, cores, environment=None):
    """Run a script with --output-dir folder on these cores. Returns the command's seconds."""
    command = ["taskset", "-c", cores, sys.executable, str(script), *flags.split()]
    command += ["--output-dir", str(folder)]
    shutil.rmtree(folder, ignore_errors=True)
    begin = time.perf_counter()
    environment = os.environ | (environment or {})
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return time.perf_counter() - begin


class WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node):
        return None if isinstance(node.value, ast.Constant) else node


def prepare(row):
    """The script of a row, changed if it says so, and a hash of its code above Command line."""
    script = ROOT / row.script
    text = script.read_text()
    before, after = row.change
    if before:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
        script = RUNS / f"changed_{hashlib.sha256(after.encode()).hexdigest()[:12]}.py"
        script.write_text(text)
    tree = ast.parse(text.partition("# ---------- Command line")[0])
    code = ast.dump(WithoutDocstrings().visit(tree))
    return script, hashlib.sha256(code.encode()).hexdigest()[:12]


def measure(row, runs_of):
    """The line of results.csv for a row. runs_of keeps what finished: name to list of folders."""
    script, code = prepare(row)
    free = ["0", "1"] if os.cpu_count() > 1 else ["0"]
    processes = len(free)

    def one(i):
        flags = f"{row.flags} --seed {row.first_seed + i * row.agents}"
        if row.agents > 1:
            flags += f" --num-seeds {row.agents}"
        name = hashlib.sha256(flags.encode()).hexdigest()[:12]
        folder = RUNS / f"{row.script[:-3]}-{code}-{name}"
        if not (folder / "summary.json").exists():
            core = free.pop()
            try:
                start(script, flags, folder, core, {"OMP_NUM_THREADS": "1"})
            finally:
                free.append(core)
        return folder

    with ThreadPoolExecutor(processes) as pool:
        folders = list(pool.map(one, range(row.runs)))
    runs_of[row.name] = folders
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    seeds = [seed for summary in summaries for seed in summary["seeds"]]
    means = np.array([seed["eval_return_mean"] for seed in seeds])
    solved = [seed["solved"] for seed in seeds]
    line = {"name": row.name, "script": row.script, "flags": row.flags}
    line["seeds"] = f"{seeds[0]['seed']} to {seeds[-1]['seed']}"
    line["steps"] = summaries[0]["env_steps"]
    line["mean"] = round(float(means.mean()), 3)
    line["interval"] = round(1.96 * float(means.std(ddof=1)) / len(means) ** 0.5, 3)
    line["worst"] = round(float(means.min()), 3)
    line["solved"] = "" if solved[0] is None else f"{sum(solved)} of {len(solved)}"
    for name in ("compile_seconds", "train_seconds", "steps_per_second"):
        line[name] = round(statistics.median(x[name] for x in summaries), 2)
    cpu = re.search(r"model name\t: (.*)", Path("/proc/cpuinfo").read_text())
    model = cpu[1] if cpu else platform.processor()
    line["device"] = f"{os.cpu_count()} cores of {model}"
    versions = " ".join(f"{name} {x}" for name, x in summaries[0]["versions"].items())
    line["versions"] = f"python {platform.python_version()} {versions}"
    line["date"] = time.strftime("%Y-%m-%d")
    return line


def write_ablations(found):
    """results/ablations.md, a table for each script; found maps a name to its line."""
    text = """# Ablations

What becomes of the result when one default changes: greedy return over 100 episodes, its 95 %
interval over the agents, the worst agent, and how many agents reach Gymnasium's threshold. Where no
flag is named, one line of a copy of the script was changed (CHANGES in tests/benchmark.py). Made by
`python tests/benchmark.py` from seeds on which nothing was tuned; the lines are in
[results.csv](results.csv).
"""
    names = ("CartPole", "LunarLander", "InvertedPendulum")
    for script, default in zip(ABLATIONS, names, strict=True):
        text += f"\n## {script}\n\n"
        text += (
            "| changed | seeds | greedy return | worst agent | solved |\n" + "| --- " * 5 + "|\n"
        )
        prefix = f"ablation {script} "
        for name, x in found.items():
            if name == default or name.startswith(prefix):
                what = f"`{x['flags']}`" if x["flags"] else name.removeprefix(prefix)
                what = "nothing: the defaults" if name == default else what
                cells = what, x["seeds"], f"{x['mean']} ± {x['interval']}", x["worst"], x["solved"]
                text += "| " + " | ".join(map(str, cells)) + " |\n"
    (RESULTS / "ablations.md").write_text(text)


def write_table(lines):
    """results.csv, and the README's table between its two marks."""
    with (RESULTS / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)
    table = ["| environment | steps | seeds | greedy return | worst agent | solved |"]
    table += ["| --- " * 6 + "|"]
    found = {line["name"]: line for line in lines}
    for row in ROWS:
        if row.readme and row.name in found:
            x = found[row.name]
            mean = f"{float(x['mean']):.1f} ± {float(x['interval']):.1f}"
            cells = row.readme, f"{int(x['steps']):,}", x["seeds"], mean
            table.append(
                "| " + " | ".join((*cells, f"{float(x['worst']):.1f}", x["solved"])) + " |"
            )
    before, mark, rest = README.read_text().partition(START)
    if mark:
        after = rest.split(END)[1]
        README.write_text(f"{before}{START}\n" + "\n".join(table) + f"\n{END}{after}")


def draw_curves(runs_of):
    """Learning curves: the mean over agents of their last 10 episodes, and a band to the worst."""
    from matplotlib.figure import Figure

    names = {"CartPole": "CartPole-v1", "LunarLander": "LunarLander-v3"}
    names |= {"InvertedPendulum": INVERTED, "Pendulum": "Pendulum-v1"}
    figure = Figure(figsize=(12, 3), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, 4), names.items(), strict=True):
        folders = runs_of.get(name, [])
        tables = [np.loadtxt(x / "returns.csv", delimiter=",", skiprows=1) for x in folders]
        if name == "CartPole":  # many agents in one file; the first ten
            one = tables[0]
            tables = [one[one[:, 2] == seed] for seed in np.unique(one[:, 2])[:10]]
        grid = np.linspace(0, max(table[-1, 0] for table in tables), 200)
        recent = np.full((len(tables), 200), np.nan)
        for i, table in enumerate(tables):
            for j, step in enumerate(grid):
                if step >= table[0, 0]:
                    recent[i, j] = table[table[:, 0] <= step, 1][-10:].mean()
        begun = ~np.isnan(recent).any(axis=0)
        recent = recent[:, begun]
        axes.fill_between(grid[begun], recent.min(axis=0), recent.max(axis=0), alpha=0.25)
        axes.plot(grid[begun], recent.mean(axis=0))
        axes.set(title=f"{title}, {len(tables)} agents", xlabel="environment steps")
        axes.locator_params(axis="x", nbins=4)
    figure.supylabel("return in training (last 10 episodes)", fontsize=9)
    figure.savefig(RESULTS / "curves.png", dpi=110)


def draw_maze():
    """maze.png: the 8x8 board with what was learned, and the best action of each free cell."""
    from matplotlib.figure import Figure

    import q_table_maze as maze_file

    start(MAZE, "--board 8x8 --seed 6100", RUNS / "maze", "0")
    q_table = maze_file.load_model(RUNS / "maze" / "model.npz")["q_table"]
    maze = maze_file.read_board("8x8")
    axes = Figure(figsize=(4.2, 3.4), layout="constrained").add_subplot()
    value = np.where(maze.terminal, np.nan, q_table.max(axis=1)).reshape(8, 8)
    picture = axes.imshow(value, cmap="viridis", vmin=0, vmax=1)
    for cell in range(64):
        row, column = divmod(cell, 8)
        if maze.terminal[cell]:
            text = "G" if maze.reward[cell] > 0 else "H"
            axes.text(column, row, text, ha="center", va="center")
            continue
        down, right = maze_file.MOVES[q_table[cell].argmax()]
        begin = column - 0.3 * right, row - 0.3 * down
        end = column + 0.3 * right, row + 0.3 * down
        axes.annotate("", end, begin, arrowprops={"arrowstyle": "->", "color": "white"})
    axes.set(xticks=[], yticks=[], title="max Q(s, a), and the action that has it")
    axes.figure.colorbar(picture, shrink=0.8)
    axes.figure.savefig(RESULTS / "maze.png", dpi=80)


def film():
    """pole.gif: a kept CartPole model in Gymnasium's environment. lander.gif: early and late."""
    import gymnasium
    import imageio.v3

    import dqn_cartpole_jax

    start(CARTPOLE, "--seed 6100", RUNS / "pole", "0")
    kept = dqn_cartpole_jax.load_model(RUNS / "pole" / "model.npz")
    params = {name: array[0] for name, array in kept.items()}
    env = gymnasium.make("CartPole-v1", render_mode="rgb_array")
    obs, _ = env.reset(seed=0)
    frames = []
    for t in range(300):
        if t % 2 == 0:
            frames.append(env.render()[100:340:2, ::2].copy())
        action = int(dqn_cartpole_jax.q_values(params, obs[None]).argmax())
        obs, _, terminated, _, _ = env.step(action)
        if terminated:
            break
    imageio.v3.imwrite(RESULTS / "pole.gif", frames, duration=40, loop=0)
    flags = "--seed 6100 --eval-frequency 10000 --capture-video --eval-episodes 5"
    start(LANDER, flags, RUNS / "lander", "0-1")
    clips = []
    for name in ("model_00010000", "model"):
        clips.append(imageio.v3.imread(RUNS / "lander" / f"{name}.gif")[::2])
    frames = []
    for i in range(max(map(len, clips))):  # the shorter one stays at its last frame
        frames.append(np.concatenate([clip[min(i, len(clip) - 1)] for clip in clips], axis=1))
    imageio.v3.imwrite(RESULTS / "lander.gif", frames, duration=80, loop=0)


# Flags of commit f922ec1 and of these files that mean the same work, for the ratios of speed.
OLD_PUREJAXRL = "--n-step 1 --tau 1 --learning-rate 2.5e-4 --end-learning-rate 2.5e-4"
OLD_PUREJAXRL += " --start-e 1 --end-e 0.05 --buffer-size 10000 --exploration-fraction 0.5"
OLD_PUREJAXRL += " --num-envs 10 --batch-size 128 --hidden-sizes 120 84 --learning-starts 10000"
OLD_PUREJAXRL += " --target-network-frequency 500 --total-timesteps 500000"
PUREJAXRL = "--n-step 1 --tau 0.02 --learning-rate 2.5e-4 --end-e 0.05 --buffer-size 10000"
PUREJAXRL += " --num-envs 10 --batch-size 128 --hidden-sizes 120 84 --total-timesteps 500000"
EIGHT = "--board 8x8 --total-timesteps 20000000"
PAIRS = [  # name, script, flags of the earlier commit, flags of this one, cores
    ("CartPole, defaults", CARTPOLE, "", "", "0"),
    ("CartPole, 16 seeds", CARTPOLE, "--num-seeds 16", "--num-seeds 16", "0-1"),
    ("PureJaxRL's settings", CARTPOLE, OLD_PUREJAXRL, PUREJAXRL, "0"),
    ("LunarLander", LANDER, "--action-gap 0", "", "0-1"),
    ("InvertedPendulum", PENDULUM, "", "", "0-1"),
    ("Pendulum", PENDULUM, SWING, SWING, "0-1"),
    ("1000 torques", PENDULUM, THOUSAND, THOUSAND, "0-1"),
    ("maze 8x8", MAZE, EIGHT, EIGHT, "0"),
    ("maze 8x8 on ice", MAZE, f"{EIGHT} --slip-prob 0.6667", f"{EIGHT} --slip-prob 0.6667", "0"),
]


def compare(checkout, only, pairs):
    """Print ratios of training time, of time a step, and of the command's time, for each pair."""
    for name, script, old_flags, new_flags, cores in PAIRS:
        if only and not any(word in name for word in only):
            continue
        ratios = []
        for seed in range(6100, 6100 + pairs):
            both = []
            for path, flags in ((checkout / script, old_flags), (ROOT / script, new_flags)):
                folder = RUNS / "pair"
                seconds = start(path, f"{flags} --eval-episodes 100 --seed {seed}", folder, cores)
                summary = json.loads((folder / "summary.json").read_text())
                both.append((summary["train_seconds"], 1 / summary["steps_per_second"], seconds))
            ratios.append(np.divide(both[1], both[0]))
        ratios = np.sort(ratios, axis=0)
        parts = [f"{np.median(x):.2f} ({x[0]:.2f} to {x[-1]:.2f})" for x in ratios.T]
        train, step, command = parts
        print(f"{name} | train {train} | seconds a step {step} | command {command}", flush=True)


def main(only: tuple[str, ...] = (), against: Path | None = None, pairs: int = 5) -> None:
    """Measure all rows, or those whose name contains one of `only`; or compare with `against`."""
    RUNS.mkdir(parents=True, exist_ok=True)
    if against:
        return compare(against.resolve(), only, pairs)
    kept = {}
    if only and (RESULTS / "results.csv").exists():
        kept = {line["name"]: line for line in csv.DictReader((RESULTS / "results.csv").open())}
    runs_of = {}
    for row in ROWS:
        if not only or any(word in row.name for word in only):
            kept[row.name] = measure(row, runs_of)
            line = kept[row.name]
            print(row.name, line["mean"], line["worst"], line["solved"], flush=True)
            write_table([kept[row.name] for row in ROWS if row.name in kept])
    write_ablations(kept)
    if not only:
        draw_curves(runs_of)
        draw_maze()
        film()


if __name__ == "__main__":
    tyro.cli(main)

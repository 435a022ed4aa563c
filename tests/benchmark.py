"""Measure what the README and the docstrings state: python tests/benchmark.py [--only NAME ...] [--quick]

Every figure comes from runs of the scripts as a user would start them. No default was tuned on the seeds used here. Timings
want a machine with nothing else running; where two things are compared, they are run in turn and the medians compared.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Literal

import tyro

ROOT = pathlib.Path(__file__).parent.parent
MAZE = ROOT / "q_table_maze.py"
CARTPOLE = ROOT / "dqn_cartpole_jax.py"
LANDER = ROOT / "dqn_lunarlander.py"
FIRST_SEED = 2000  # defaults were chosen on seeds below 100; 1000 to 1099 were looked at once, with earlier defaults

# The peers' own settings: luchris429/purejaxrl (purejaxrl/dqn.py) and RPegoud/jym (the CartPole notebook).
PUREJAXRL = (
    "--num-envs 10 --train-frequency 10 --buffer-size 10000 --batch-size 128 --hidden-sizes 120 84 --learning-rate 2.5e-4"
    " --no-anneal-lr --gamma 0.99 --n-step 1 --tau 1 --target-network-frequency 500 --learning-starts 10000 --start-e 1"
    " --end-e 0.05 --exploration-fraction 0.5 --no-scale-obs --total-timesteps 500000"
).split()
JYM = (
    "--num-envs 1 --train-frequency 1 --buffer-size 512 --batch-size 32 --hidden-sizes 64 64 64 --learning-rate 1e-3"
    " --no-anneal-lr --gamma 0.9 --n-step 1 --tau 1 --target-network-frequency 10 --learning-starts 32 --start-e 0.3"
    " --end-e 0.015 --exploration-fraction 1 --no-scale-obs --total-timesteps 20000"
).split()
# CleanRL's dqn_jax.py on LunarLander-v3 as shared/measurements.md timed it: batch 64, an update every 4 steps, 120-84 units.
CLEANRL = (
    "--train-frequency 4 --gradient-steps 1 --batch-size 64 --hidden-sizes 120 84 --no-layer-norm --n-step 1 --no-double-dqn"
    " --tau 1 --target-network-frequency 500 --learning-rate 2.5e-4 --no-anneal-lr --buffer-size 10000 --start-e 1 --end-e 0.05"
    " --exploration-fraction 0.5 --learning-starts 10000 --reward-scale 1 --average-rate 1 --eval-episodes 5"
).split()


def run(*command, core=None):
    """Run a command, on one core if asked, and return its wall seconds and peak memory in MB."""
    pin = (lambda: os.sched_setaffinity(0, {core})) if core is not None else None
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL, preexec_fn=pin)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(map(str, command))}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def summary(script, *flags, core=None):
    """summary.json of a run of a script, with peak_mb added."""
    with tempfile.TemporaryDirectory() as folder:
        _, peak_mb = run(script, *flags, "--output-dir", pathlib.Path(folder) / "run", core=core)
        return json.loads((pathlib.Path(folder) / "run" / "summary.json").read_text()) | {"peak_mb": peak_mb}


def show(name, value):
    print(f"{name:<66}{value}", flush=True)


def spread(values, digits=2):
    median, least, most = (f"{f(values):,.{digits}f}" for f in (statistics.median, min, max))
    return f"median {median}, {least} to {most}, {len(values)} runs"


def cold_command(script, quick):
    """The whole command against importing what it imports, in turn."""
    whole, imports = [], []
    for i in range(3 if quick else 11):
        whole.append(run(script, "--seed", FIRST_SEED + i)[0])
        imports.append(run("-c", "import jax, optax")[0])
    show("cold command, seconds", spread(whole))
    show('python -c "import jax, optax", seconds', spread(imports))
    show("cold command / import", f"{statistics.median(whole) / statistics.median(imports):.2f}")


def maze_solved(quick):
    """20 seeds on every built-in board, without ice and on FrozenLake's, where the slower boards take minutes."""
    for board in ("2x3", "4x5", "4x4") if quick else ("2x3", "4x5", "4x4", "8x8"):
        for slip_prob in (0, 2 / 3):
            flags = ["--board", board, "--slip-prob", slip_prob, "--num-seeds", 20, "--seed", FIRST_SEED]
            seeds = summary(MAZE, *flags)["seeds"]
            solved = sum(seed["solved"] for seed in seeds)
            error, regret = (max(seed[name] for seed in seeds) for name in ("error_all", "regret"))
            value = f"{solved} of {len(seeds)}, largest error {error:.1e}, largest regret {regret:.1e}"
            show(f"{board}, slip {slip_prob:.2f}, seeds {FIRST_SEED} to {FIRST_SEED + 19}: optimal everywhere", value)


def maze_seconds(quick):
    for board, slip_prob in (("4x4", 0), ("8x8", 0), ("8x8", 2 / 3)):
        flags = ["--board", board, "--slip-prob", slip_prob, "--total-timesteps", 20_000_000]
        runs = [summary(MAZE, *flags, "--seed", FIRST_SEED + i, core=0) for i in range(1 if quick else 5)]
        show(
            f"{board}, slip {slip_prob:.2f}, one core: million steps/s", spread([r["steps_per_second"] / 1e6 for r in runs], 1)
        )
        runs = [summary(MAZE, *flags, "--seed", FIRST_SEED + i, "--num-seeds", 16) for i in range(1 if quick else 3)]
        show(
            f"{board}, slip {slip_prob:.2f}, 16 seeds: million steps/s", spread([r["steps_per_second"] / 1e6 for r in runs], 1)
        )
    runs = [summary(MAZE, "--method", "network", "--seed", FIRST_SEED + i, core=0) for i in range(1 if quick else 5)]
    show("default board, network, one core: million steps/s", spread([r["steps_per_second"] / 1e6 for r in runs], 1))
    cold_command(MAZE, quick)


def cartpole_solved(quick):
    count = 10 if quick else 100
    seeds = summary(CARTPOLE, "--num-seeds", count, "--seed", FIRST_SEED)["seeds"]
    means = [seed["eval_return_mean"] for seed in seeds]
    half = 1.96 * statistics.stdev(means) / len(means) ** 0.5
    solved = sum(seed["solved"] for seed in seeds)
    value = f"{solved} of {count}, mean {statistics.mean(means):.1f} +/- {half:.1f} (95 % interval), worst {min(means):.1f}"
    show(f"defaults, seeds {FIRST_SEED} to {FIRST_SEED + count - 1}: solved", value)


def cartpole_seconds(quick):
    runs = [summary(CARTPOLE, "--seed", FIRST_SEED + i, core=0) for i in range(3 if quick else 9)]
    show("defaults: training seconds on one core", spread([run["train_seconds"] for run in runs]))
    show("defaults: compile seconds on one core", spread([run["compile_seconds"] for run in runs]))
    cold_command(CARTPOLE, quick)


def cartpole_peers(quick):
    for name, flags in (("PureJaxRL's settings", PUREJAXRL), ("jym's settings", JYM)):
        runs = [summary(CARTPOLE, *flags, "--seed", FIRST_SEED + i) for i in range(1 if quick else 3)]
        show(f"{name}: steps per second", spread([run["steps_per_second"] for run in runs], 0))
        show(f"{name}: greedy return", spread([run["seeds"][0]["eval_return_mean"] for run in runs], 0))


def cartpole_buffer(quick):
    """Two sizes, the same run otherwise, long enough to fill the larger one."""
    flags = ["--num-envs", 50, "--train-frequency", 50, "--target-network-frequency", 50]
    flags += ["--total-timesteps", 250_000 if quick else 2_000_000]
    sizes = 10_000, 1_000_000
    runs = [[summary(CARTPOLE, *flags, "--buffer-size", size, core=0) for size in sizes] for _ in range(1 if quick else 5)]
    small, large = ([run[i] for run in runs] for i in range(2))
    seconds = [statistics.median(run["train_seconds"] for run in runs) for runs in (small, large)]
    show("time per step, buffer of 1,000,000 / of 10,000", f"{seconds[1] / seconds[0]:.2f}")
    memory = [statistics.median(run["peak_mb"] for run in runs) for runs in (small, large)]
    bytes_each = 4 * (4 + 4 + 1 + 1) + 2  # two observations, action, reward, two flags
    show("peak memory, MB, of the two", f"{memory[0]:.0f}, {memory[1]:.0f}")
    show("peak memory grows by, MB / the buffer by, MB", f"{memory[1] - memory[0]:.0f} / {bytes_each * 990_000 / 2**20:.0f}")


def cartpole_devices(quick):
    code = (
        "import sys, jax; sys.path.insert(0, sys.argv[1]); import dqn_cartpole_jax as dqn;"
        " jax.config.update('jax_num_cpu_devices', int(sys.argv[2]));"
        " print(dqn.train(dqn.Args(num_seeds=16, seed=1000)).train_seconds)"
    )

    def seconds(devices):
        command = [sys.executable, "-c", code, str(ROOT), str(devices)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    times = [[seconds(devices) for devices in (1, os.cpu_count())] for _ in range(1 if quick else 5)]
    one, all_cores = zip(*times, strict=True)
    show("16 seeds on one CPU device: training seconds", spread(one))
    show(f"16 seeds on {os.cpu_count()} CPU devices: training seconds", spread(all_cores))
    show("one device / all", f"{statistics.median(one) / statistics.median(all_cores):.2f}")


def bare_speed(env_id, steps):
    """Steps per second of the environment alone, with random actions."""
    code = (
        "import sys, time, gymnasium; env = gymnasium.make(sys.argv[1]); env.reset(seed=0); env.action_space.seed(0);"
        " actions = [env.action_space.sample() for _ in range(int(sys.argv[2]))]; start = time.perf_counter()\n"
        "for action in actions:\n"
        "    _, _, terminated, truncated, _ = env.step(action)\n"
        "    if terminated or truncated: env.reset()\n"
        "print(len(actions) / (time.perf_counter() - start))"
    )
    command = [sys.executable, "-c", code, env_id, str(steps)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def gymnasium_solved(script, name, flags, quick):
    """Ten runs, one after the other, as a user starts them."""
    runs = [summary(script, *flags, "--seed", FIRST_SEED + i) for i in range(2 if quick else 10)]
    seeds = [run["seeds"][0] for run in runs]
    means = [seed["eval_return_mean"] for seed in seeds]
    half = 1.96 * statistics.stdev(means) / len(means) ** 0.5
    solved = sum(bool(seed["solved"]) for seed in seeds)
    value = f"{solved} of {len(runs)}, mean {statistics.mean(means):.1f} +/- {half:.1f} (95 % interval), worst {min(means):.1f}"
    show(f"{name}, seeds {FIRST_SEED} to {FIRST_SEED + len(runs) - 1}: solved", value)
    show(f"{name}: training seconds", spread([run["train_seconds"] for run in runs], 1))


def lander_solved(quick):
    gymnasium_solved(LANDER, "LunarLander-v3", [], quick)


def lander_others(quick):
    gymnasium_solved(LANDER, "CartPole-v1", "--env-id CartPole-v1".split(), quick)
    gymnasium_solved(LANDER, "Acrobot-v1", "--env-id Acrobot-v1".split(), quick)


def lander_speed(quick):
    steps = 20_000 if quick else 60_000
    pairs = []
    for i in range(1 if quick else 5):
        ours = summary(LANDER, *CLEANRL, "--total-timesteps", steps, "--seed", FIRST_SEED + i)["steps_per_second"]
        pairs.append((ours, bare_speed("LunarLander-v3", steps)))
    show("CleanRL's settings: steps per second", spread([ours for ours, _ in pairs], 0))
    show("bare LunarLander-v3: steps per second", spread([bare for _, bare in pairs], 0))
    show("ours / bare", spread([ours / bare for ours, bare in pairs]))


def lander_memory(quick):
    """A run that fills its buffer ten times against one that fills it once."""
    flags = ["--env-id", "CartPole-v1", "--hidden-sizes", 16, "--no-layer-norm", "--gradient-steps", 1, "--eval-episodes", 2]
    steps = (20_000, 50_000) if quick else (100_000, 1_000_000)
    memory = [summary(LANDER, *flags, "--buffer-size", steps[0], "--total-timesteps", n)["peak_mb"] for n in steps]
    show(f"peak memory, MB, of {steps[0]:,} and {steps[1]:,} steps", f"{memory[0]:.0f}, {memory[1]:.0f}")


MEASURES = {
    "maze": [maze_solved, maze_seconds],
    "cartpole": [cartpole_solved, cartpole_seconds, cartpole_peers, cartpole_buffer, cartpole_devices],
    "lander": [lander_solved, lander_others, lander_speed, lander_memory],
}


@dataclass
class Args:
    """Measure the scripts."""

    only: tuple[Literal[tuple(MEASURES)], ...] = ()
    """measure only these scripts"""
    measure: str = ""
    """of these, only the measurement of this name, such as seconds"""
    quick: bool = False
    """fewer and shorter runs, to try this script itself; not for publishing"""


def main(args):
    for script, measures in MEASURES.items():
        for measure in measures:
            if (not args.only or script in args.only) and measure.__name__.endswith(args.measure):
                measure(args.quick)


if __name__ == "__main__":
    main(tyro.cli(Args))

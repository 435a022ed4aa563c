"""Why ours differs from CleanRL, jym and SBX: python results/causes.py

Where peers.md shows a difference, its cause is looked for in copies of our script, each with a
patch of results/causes/. This is the only program that changes lines of a script: what it finds
stands in sections of their own in peers.md. It needs the program `patch`. A run takes a minute on
one core, and is not repeated; results/causes.csv gets a line for each agent, curves.csv the
training returns beside CleanRL, and results/tables.py makes tables of them.

    first_weights.patch  draws the first weights as CleanRL does, by Flax: a cut off normal
                         distribution with the variance 1 / in, not a uniform one with 2 / in
    act_at_once.patch    also acts with the newest weights, not with those one update old
    variance.patch       changes only the variance of the first weights, to 1 / in
    no_scale.patch       does not divide CartPole's observations by usual sizes (for jym)

The first two, and those beside SBX, were run with the seeds of ours in peers.md, whose agents were
the reason to look for a cause. The others and, beside them, ours without a patch have seeds of
their own.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import tyro
from measure import CARTPOLE, LANDER, ROOT, all_rows, commit, machine, versions
from peers import add_curve

FOUND = ROOT / "results" / "causes.csv"
RUNS = ROOT / "runs" / "causes"
COLUMNS = "row patches seed mean std worst date device versions commit".split()
ROW = "LunarLander, plain"  # of measure.py
STEPS = 500_000  # of that row
JYM = "CartPole, as jym"  # of measure.py
WEIGHTS = "first_weights.patch"
ACTING = "act_at_once.patch"
VARIANCE = "variance.patch"
NO_SCALE = "no_scale.patch"
VARIANTS = {(WEIGHTS,): 6500, (WEIGHTS, ACTING): 6500, (): 8000, (VARIANCE,): 8000}  # first seeds
AGENTS = 30
JYM_VARIANTS = {(): 8100, (NO_SCALE,): 8100}
JYM_AGENTS = 100  # in one process
ZOO = "LunarLander, as RL Zoo"  # of measure.py
ZOO_VARIANTS = {(VARIANCE,): 7000, (VARIANCE, ACTING): 7000}
ZOO_AGENTS = 10


def name_of(patches):
    return " ".join(patches) or "no patch"


def patched(script, patches):
    """A folder with a copy of the script in which the patches are applied."""
    folder = RUNS / f"{script} {name_of(patches)}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / script, folder)
    for patch in patches:
        source = ROOT / "results" / "causes" / patch
        subprocess.run(["patch", "--quiet", script, source], cwd=folder, check=True)
    return folder


def run(name, patches, seed, core):
    """Train with the patched copy at the settings of a row; add what came of it to causes.csv."""
    row = next(row for row in all_rows() if row.name == name)
    folder = RUNS / f"{row.script} {name_of(patches)}"
    output = folder / str(seed)
    shutil.rmtree(output, ignore_errors=True)
    command = ["taskset", "-c", core, sys.executable, row.script, *row.flags.split()]
    command += ["--seed", str(seed), "--output-dir", str(output)]
    if row.agents > 1:
        command += ["--num-seeds", str(row.agents)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=folder, capture_output=True, check=True, env=environment)
    same = {"row": name, "patches": name_of(patches), "date": time.strftime("%Y-%m-%d")}
    same |= {"device": machine(), "versions": versions(), "commit": commit()}
    lines = []
    for agent in json.loads((output / "summary.json").read_text())["seeds"]:
        line = same | {"seed": agent["seed"]}
        for key, column in (("mean", "mean"), ("std", "std"), ("min", "worst")):
            line[column] = round(agent[f"eval_return_{key}"], 4)
        lines.append(line)
    with FOUND.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(lines)
    if name == ROW:
        add_curve(name_of(patches), seed, STEPS, output / "returns.csv")
    print(name, name_of(patches), seed, lines[0]["mean"], flush=True)


def main() -> None:
    """Run what is missing, one process on each core."""
    known = set()
    if FOUND.exists():
        with FOUND.open(newline="") as file:
            for line in csv.DictReader(file):
                known.add((line["row"], line["patches"], line["seed"]))
    wanted = []
    for patches, first in VARIANTS.items():
        patched(LANDER, patches)
        wanted += [(ROW, patches, seed) for seed in range(first, first + AGENTS)]
    for patches, first in JYM_VARIANTS.items():
        patched(CARTPOLE, patches)
        wanted.append((JYM, patches, first))
    for patches, first in ZOO_VARIANTS.items():
        patched(LANDER, patches)
        wanted += [(ZOO, patches, seed) for seed in range(first, first + ZOO_AGENTS)]
    jobs = [job for job in wanted if (job[0], name_of(job[1]), str(job[2])) not in known]
    free = [str(core) for core in os.sched_getaffinity(0)]

    def one(job):
        core = free.pop()
        try:
            run(*job, core)
        finally:
            free.append(core)

    with ThreadPoolExecutor(len(free)) as pool:
        list(pool.map(one, jobs))


if __name__ == "__main__":
    tyro.cli(main)

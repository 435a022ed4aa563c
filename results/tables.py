"""Make the tables from results/agents.csv: python results/tables.py

It takes a second. Writes results/knobs.md and the README's table of results, between its marks.
Every interval is Student's, 95 %, over the agents. "The same seeds" are the defaults' agents with
the seeds of the changed ones.
"""

import csv
import sys
from pathlib import Path

import numpy as np
from scipy.stats import t as student  # JAX needs SciPy too

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # measure.py reads the defaults of the scripts
from measure import all_rows, code_of  # noqa: E402

KNOBS = ROOT / "results" / "knobs.md"
README = ROOT / "README.md"
START = "<!-- table of results/tables.py -->"
END = "<!-- end of table -->"
ENVIRONMENTS = {
    "CartPole": "CartPole-v1, by dqn_cartpole_jax.py",
    "LunarLander": "LunarLander-v3, by dqn_lunarlander.py",
    "InvertedPendulum": "InvertedPendulum-v5, by dqn_pendulum_discretized.py",
    "Pendulum": "Pendulum-v1, by dqn_pendulum_discretized.py",
}
IN_README = {
    "CartPole, defaults": "CartPole-v1",
    "LunarLander, defaults": "LunarLander-v3",
    "Acrobot": "Acrobot-v1, by dqn_lunarlander.py",
    "CartPole in Gymnasium": "CartPole-v1, by dqn_lunarlander.py",
    "InvertedPendulum, defaults": "InvertedPendulum-v5",
    "InvertedPendulum, 1000 actions": "InvertedPendulum-v5, 1000 actions",
    "Pendulum, defaults": "Pendulum-v1",
}
HEAD = "| changed | seeds | greedy return | worst agent | solved |\n" + "| --- " * 5 + "|\n"


def read():
    """The agents of each row that were measured with the code as it is: name to list of lines."""
    codes = {}
    found = {}
    with (ROOT / "results" / "agents.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            script = line["script"]
            codes.setdefault(script, code_of(script))
            if line["code"] == codes[script]:
                agents = found.setdefault(line["row"], {})
                agents[int(line["seed"])] = line
    return {name: [agents[seed] for seed in sorted(agents)] for name, agents in found.items()}


def cells(lines):
    """Seeds, mean with its interval, worst agent, solved."""
    means = np.array([float(line["mean"]) for line in lines])
    n = len(means)
    half = student.ppf(0.975, n - 1) * means.std(ddof=1) / n**0.5 if n > 1 else np.nan
    seeds = f"{lines[0]['seed']} to {lines[-1]['seed']}"
    solved = sum(line["solved"] == "True" for line in lines)
    share = f"{solved} of {n}" if lines[0]["solved"] else ""
    return seeds, f"{means.mean():.1f} ± {half:.1f}", f"{means.min():.1f}", share


def knobs(found):
    """results/knobs.md."""
    text = """# Switches and knobs

What becomes of the greedy return (100 episodes) when one thing changes: each departure from the
paper switched off (*switch*), each number flag doubled and halved, other numbers of layers and
steps (*knob*). ± is a 95 % interval over the agents (Student's t). An agent has solved its
environment if its mean return reaches Gymnasium's threshold; Pendulum-v1 has none. No default was
chosen with these seeds. `python results/measure.py` measures, `python results/tables.py` writes
this file.
"""
    for short, title in ENVIRONMENTS.items():
        defaults = found.get(f"{short}, defaults")
        if not defaults:
            continue
        text += f"\n## {title}\n\n{HEAD}"
        text += line_of("nothing: the defaults", defaults)
        names = [row.name for row in all_rows() if row.name.startswith(f"{short}, ")]
        changed = [name for name in names if name in found and name != f"{short}, defaults"]
        sizes = sorted({len(found[name]) for name in changed})
        for size in sizes:
            if size < len(defaults):
                text += line_of(f"nothing, the same {size} seeds", defaults[:size])
        for name in changed:
            kind, _, what = name.removeprefix(f"{short}, ").partition(", ")
            flags = found[name][0]["flags"]
            label = f"{kind}: `{what}`" if kind == "knob" else f"{kind}: {what}, `{flags}`"
            if kind == "plain":
                label = f"plain DQN: `{flags}`"
            text += line_of(label, found[name])
    KNOBS.write_text(text)


def line_of(label, lines):
    return "| " + " | ".join([label, *cells(lines)]) + " |\n"


def readme(found):
    """The README's table, between its two marks."""
    before, mark, rest = README.read_text().partition(START)
    if not mark:
        return
    table = "| environment | steps | seeds | greedy return | worst agent | solved |\n"
    table += "| --- " * 6 + "|\n"
    for name, title in IN_README.items():
        if name in found:
            steps = f"{int(found[name][0]['env_steps']):,}"
            table += "| " + " | ".join([title, steps, *cells(found[name])]) + " |\n"
    README.write_text(f"{before}{START}\n{table}{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    agents = read()
    knobs(agents)
    readme(agents)

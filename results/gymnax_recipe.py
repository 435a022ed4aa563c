"""Follow the README's recipe for gymnax, and run what comes of it: python results/gymnax_recipe.py

It runs the README's two commands for an environment of its own, in runs/gymnax, applies the
README's changes to a copy of dqn_cartpole_jax.py there, and trains one agent, then two at once. It
takes two minutes and the network. It fails if a change no longer applies or an agent fails.
"""

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "runs" / "gymnax"
SCRIPT = "dqn_cartpole_jax.py"


def read_recipe():
    """The README's command, and its changes: new imports, and new lines by class or function."""
    readme = (ROOT / "README.md").read_text()
    command = re.search(r"python -m venv gymnax-env && .*", readme)[0]
    imports = []
    changes = {}
    lines = imports
    for line in re.search(r"```diff\n(.*?)```", readme, re.DOTALL)[1].splitlines():
        if line.startswith("+"):
            lines.append(line[1:].partition("  # in place")[0])
        else:
            name = re.match(r" (?:class|def) (\w+)", line)[1]
            lines = changes.setdefault(name, [])
    return command, imports, changes


def apply(text, imports, changes):
    """The script's text with the changes, from its last line to its first."""
    lines = text.splitlines()
    nodes = {node.name: node for node in ast.parse(text).body if hasattr(node, "name")}
    for name in sorted(changes, key=lambda name: -nodes[name].lineno):
        old = nodes[name].body[1:]  # all but the docstring, or the first field of EnvState
        lines[old[0].lineno - 1 : old[-1].end_lineno] = changes[name]
    last_import = lines.index("import tyro")
    lines[last_import + 1 : last_import + 1] = imports
    return "\n".join(lines) + "\n"


def main():
    command, imports, changes = read_recipe()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    subprocess.run(command, shell=True, cwd=FOLDER, check=True, stdout=subprocess.DEVNULL)
    script = FOLDER / SCRIPT
    script.write_text(apply((ROOT / SCRIPT).read_text(), imports, changes))
    python = FOLDER / "gymnax-env" / "bin" / "python"
    for flags, devices in (("--seed 1", "1"), ("--num-seeds 2", "2")):
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": devices}
        run = [python, script, *flags.split()]
        done = subprocess.run(run, env=environment, check=True, capture_output=True, text=True)
        print(done.stdout.splitlines()[-1])
        solved = re.search(r"(\d+) of (\d+) solved", done.stdout)
        if solved[1] != solved[2]:
            raise SystemExit(f"not all agents solve CartPole: {flags}")


if __name__ == "__main__":
    main()

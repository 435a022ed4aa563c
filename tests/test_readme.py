"""What the README and the docstrings promise: commands that parse, files that exist, a snippet that runs, sizes that hold."""

import ast
import importlib
import re
from pathlib import Path

import gymnasium
import pytest
import tyro

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = ["q_table_maze", "dqn_cartpole_jax", "dqn_lunarlander", "dqn_pendulum_discretized"]


def commands(text):
    """The scripts and flags of a text's command lines, up to the explanation behind two spaces."""
    for script, rest in re.findall(r"python (\w+)\.py([^\n]*)", text):
        if script in SCRIPTS and "$" not in rest:
            yield script, rest.split("  ")[0].split()


@pytest.mark.parametrize("name", ["README.md"] + [f"{script}.py" for script in SCRIPTS])
def test_every_command_has_flags_that_its_script_takes(name):
    found = list(commands(README if name == "README.md" else ast.get_docstring(ast.parse((ROOT / name).read_text()))))
    assert len(found) >= 4
    for script, flags in found:
        tyro.cli(importlib.import_module(script).Args, args=flags)  # exits on a flag that is unknown


def test_every_linked_file_exists():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(links) >= 6
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_snippet_runs():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    code = re.sub(r"^  ", "", snippet, flags=re.MULTILINE).replace("50_000", "3_000, eval_episodes=2")
    exec(code, {"env": gymnasium.make("CartPole-v1")})


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_files_stay_small(script):
    text = (ROOT / f"{script}.py").read_text()
    lines, size = (370, 19_000) if script == "q_table_maze" else (440, 23_000)
    assert len(text.splitlines()) <= lines and len(text.encode()) <= size
    assert sum(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in ast.parse(text).body) <= 26
    assert len(README.splitlines()) <= 120

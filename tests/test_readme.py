"""What the README and the docstrings promise: commands, links, a snippet, sizes."""

import ast
import importlib
import re
from pathlib import Path

import gymnasium
import pytest
import tyro

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CEILINGS = {  # bytes, lines, lines after "# ---------- Command line"
    "dqn_cartpole_jax": (20_000, 450, 85),
    "dqn_lunarlander": (20_000, 450, 85),
    "dqn_pendulum_discretized": (19_500, 440, 80),
    "q_table_maze": (17_000, 390, 70),
}


def source(script):
    return (ROOT / f"{script}.py").read_text()


@pytest.mark.parametrize("name", ["README", *CEILINGS])
def test_every_command_has_flags_that_its_script_takes(name):
    text = README if name == "README" else ast.get_docstring(ast.parse(source(name)))
    found = re.findall(r"python (\w+)\.py([^\n]*)", text)
    assert len(found) >= 2
    for script, rest in found:
        if script in CEILINGS and "$" not in rest:
            flags = rest.split("  ")[0].split()
            tyro.cli(importlib.import_module(script).Args, args=flags)


def test_every_linked_file_exists():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) >= 6
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_snippet_runs():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    code = re.sub(r"^  ", "", snippet, flags=re.MULTILINE)
    code = code.replace("50_000", "3_000, eval_episodes=2")
    exec(code, {"env": gymnasium.make("CartPole-v1")})


@pytest.mark.parametrize("script", CEILINGS)
def test_the_files_stay_small_and_calm(script):
    text = source(script)
    size, lines, command_line = CEILINGS[script]
    assert len(text.encode()) <= size
    assert len(text.splitlines()) <= lines
    assert len(text.partition("# ---------- Command line")[2].splitlines()) <= command_line
    assert max(map(len, text.splitlines())) <= 100


def test_the_readme_stays_short():
    assert len(README.splitlines()) <= 120

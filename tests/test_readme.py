"""The README against the scripts and results/: its commands run, its flags exist, its figures were measured."""

import csv
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = ["q_table_maze.py", "dqn_cartpole_jax.py", "dqn_lunarlander.py", "dqn_pendulum_discretized.py"]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import benchmark  # noqa: E402

# What makes a command short; the last of two equal flags counts.
SHORT = {
    "q_table_maze.py": "--total-timesteps 20000 --eval-episodes 5",
    "dqn_cartpole_jax.py": "--total-timesteps 6400 --learning-starts 1280 --eval-episodes 5",
    "dqn_lunarlander.py": "--total-timesteps 1500 --learning-starts 500 --eval-frequency 0 --eval-episodes 1",
    "dqn_pendulum_discretized.py": "--total-timesteps 1500 --learning-starts 1400 --eval-frequency 0 --eval-episodes 1",
}


def code_lines():
    """The lines of the README's indented and fenced code that are commands of a shell."""
    text = re.sub(r"\\\n\s*", "", README)  # lines that go on after a backslash
    return [line.split("  #")[0].strip() for line in text.splitlines() if re.match(r"    \S", line)]


def commands():
    """(script, flags) of every command that runs one of the four scripts."""
    for line in code_lines():
        match = re.search(r"(?:python|uv run) (\w+\.py)(.*)", line)
        if match and match.group(1) in SCRIPTS:
            yield match.group(1), match.group(2).split()


def test_every_command_runs(tmp_path):
    for script in SCRIPTS:
        shutil.copy(ROOT / script, tmp_path)
    seen = set()
    for script, flags in commands():
        short = [] if "0" in flags and "--load-model" in flags else SHORT[script].split()
        done = subprocess.run(
            [sys.executable, script, *flags, *short], capture_output=True, text=True, timeout=120, cwd=tmp_path
        )
        assert done.returncode == 0 and "evaluation" in done.stdout, (script, flags, done.stderr)
        seen.add(script)
    assert seen == set(SCRIPTS)


def test_every_other_command_is_known():
    others = [line for line in code_lines() if not re.search(rf"python ({'|'.join(map(re.escape, SCRIPTS))})", line)]
    assert others == ["python -m pytest", "uv run dqn_cartpole_jax.py"]
    assert "pip install -r requirements.txt" in README and (ROOT / "requirements.txt").exists()


def test_every_flag_exists():
    known = {"--help", "--check"}
    for script in SCRIPTS:
        module = __import__(script.removesuffix(".py"))
        known |= {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(module.Args)}
    known |= {f"--{field.name}" for field in dataclasses.fields(benchmark.Args)}
    known |= {"--no-" + flag.removeprefix("--") for flag in known}
    assert set(re.findall(r"--[a-z][a-z-]+", README)) <= known


def test_the_notebook_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    shutil.copy(ROOT / "dqn_cartpole_jax.py", tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0 and float(done.stdout) > 100, done.stderr


def results():
    with open(ROOT / "results" / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_is_what_was_measured():
    lines = results()
    assert [line["name"] for line in lines] == [row.name for row in benchmark.ROWS]
    assert benchmark.readme_table(lines) == README.split(benchmark.START)[1].split(benchmark.END)[0].strip()


def numbers(text):
    """The figures of a text as they would stand in results.csv, without the commas of thousands."""
    return re.findall(r"-?\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", text))


def test_every_figure_said_to_be_ours_stands_in_results():
    """A row of the section "Measured against" names, in its last cell, the line of results.csv that its figures are from."""
    lines = {line["name"]: line for line in results()}
    section = README.split("## Measured against")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 4
    for row in rows:
        measured = " ".join(lines[row[-1]].values())
        for number in numbers(row[1]):
            assert number in numbers(measured), (row, number)


def test_what_the_tutorials_reach_stands_in_results():
    section = README.split("## What differs from the tutorials")[1].split("\n## ")[0]
    prose = "\n".join(line for line in section.splitlines() if not line.startswith("    "))
    measured = numbers(" ".join(" ".join(line.values()) for line in results()))
    stated = [number for number in numbers(prose) if "." in number]
    assert len(stated) > 5 and set(stated) <= set(measured), set(stated) - set(measured)


def test_every_picture_is_there_and_the_repository_is_small():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert len(pictures) >= 5
    for picture in pictures:
        assert (ROOT / picture).stat().st_size > 1_000
    assert sum(path.stat().st_size for path in (ROOT / "results").rglob("*") if path.is_file()) < 4_000_000


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_docstring_states_what_was_measured(script):
    """Every number with a decimal point in the paragraph that begins with Measured stands in results.csv."""
    text = (ROOT / script).read_text().split('"""')[1]
    (paragraph,) = [part for part in text.split("\n\n") if part.startswith("Measured")]
    measured = {number for line in results() if line["script"] == script for number in numbers(" ".join(line.values()))}
    stated = [number for number in numbers(paragraph) if "." in number and number != "0.10"]
    assert stated and set(stated) <= measured, set(stated) - measured


def test_benchmark_keeps_finished_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "RUNS", tmp_path)
    calls = []

    def work(folder):
        calls.append(folder)
        return {"value": len(calls)}

    assert [benchmark.once("a", "1", work)["value"] for _ in range(3)] == [1, 1, 1]
    assert benchmark.once("a", "2", work)["value"] == 2  # another script or other flags: run again
    assert benchmark.once("b", "2", work)["value"] == 3


def test_benchmark_measures_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "RUNS", tmp_path)
    row = benchmark.Row("small", benchmark.MAZE, "2x3", "--total-timesteps 20000 --eval-episodes 5", runs=2, cold=True)
    line, folders = benchmark.measure(row, True, lambda text: None)
    assert set(line) == set(benchmark.COLUMNS) and line["solved"] == "1 of 1" and line["steps"] == 20_000
    assert float(line["cold_command_seconds"]) > float(line["import_seconds"]) > 0 and float(line["peak_memory_mb"]) > 50
    assert (folders[0] / "model.npz").exists() and os.path.commonpath([folders[0], tmp_path]) == str(tmp_path)

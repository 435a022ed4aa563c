"""What the adapters in this folder share: the command line, timing, greedy episodes, the files."""

import argparse
import ast
import csv
import json
import os
import platform
import subprocess
import sys
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import gymnasium
import numpy as np

EVAL_EPISODES = 100
EVAL_SEED = 1_000_000  # of the first greedy episode's reset; training's seeds are lower
PACKAGES = ["jax", "jaxlib", "optax", "gymnasium", "numpy"]
FLAGS = "every other --name value is a setting of the peer's own"


# ---------- Command line
def make_parser(doc):
    """The flags that all adapters have."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=doc, epilog=FLAGS, formatter_class=layout, allow_abbrev=False
    )
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--total-timesteps", type=int, required=True, help="environment steps")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the results")
    return parser


def parse_args(doc):
    """Returns the flags of an adapter that needs a checkout, and those left for the peer."""
    parser = make_parser(doc)
    parser.add_argument("--checkout", type=Path, required=True, help="patched clone of the peer")
    args, flags = parser.parse_known_args()
    args.checkout = args.checkout.resolve()
    make_output_dir(args)
    return args, flags


def make_output_dir(args):
    """Make the folder, and its path absolute: a peer may need another working folder."""
    args.output_dir = args.output_dir.resolve()
    args.output_dir.mkdir(parents=True, exist_ok=True)


def read_settings(flags):
    """['--lr', '1e-3', '--net-arch', '[64, 64]'] -> {'lr': 0.001, 'net_arch': [64, 64]}"""
    settings = {}
    for name, text in zip(flags[::2], flags[1::2], strict=True):
        name = name.removeprefix("--").replace("-", "_")
        try:
            settings[name] = ast.literal_eval(text)
        except (SyntaxError, ValueError):  # a word without quotes
            settings[name] = text
    return settings


def checkout_version(args, patch):
    """The commit of a clone. Ends the program if the patch is missing in it."""
    git = ["git", "--git-dir", args.checkout / ".git", "--work-tree", args.checkout]
    check = [*git, "apply", "--reverse", "--check", "--unidiff-zero"]
    patch = Path(__file__).resolve().with_name(patch)
    done = subprocess.run([*check, patch], cwd=args.checkout, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {args.checkout} needs {patch.name} first: {done.stderr.strip()}")
    return subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()


# ---------- Timing
compile_spans = []  # begin and end of all that JAX traced and compiled; one may hold another


def listen_to_jax():
    """From now on, note when JAX compiles."""
    import jax  # slow to import, and Stable-Baselines3 does without

    def note(event, seconds, **_):
        if "/compile/" in event:
            end = time.time()
            compile_spans.append((end - seconds, end))

    jax.monitoring.register_event_duration_secs_listener(note)


def compile_seconds(since=0):
    """Seconds of tracing and compiling since a time; what lies in two spans counts once."""
    seconds = 0.0
    seen = since
    for begin, end in sorted(compile_spans):
        seconds += max(end - max(begin, seen), 0)
        seen = max(seen, end)
    return seconds


def times(train_seconds):
    """The times in a summary; to call at the end of training."""
    fields = Path("/proc/self/stat").read_text().rsplit(")")[-1].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # this process, in seconds after boot
    command_seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - started
    seconds = {"compile_seconds": compile_seconds(), "train_seconds": train_seconds}
    seconds["command_seconds"] = command_seconds
    # Much less than command_seconds: other programs were using the core.
    seconds["command_cpu_seconds"] = time.process_time()
    return seconds


def train_compiled(train, *inputs):
    """Compile ahead, then run. Returns what the function returns, and the times."""
    import jax

    train = jax.jit(train).lower(*inputs).compile()
    start = time.time()
    end = jax.block_until_ready(train(*inputs))
    return end, times(time.time() - start)


# ---------- Evaluation
def evaluate(env_id, act):
    """The returns of greedy episodes. `act` takes observations (1, O) and returns actions (1,)."""
    env = gymnasium.make(env_id)
    returns = np.zeros(EVAL_EPISODES)
    for k in range(EVAL_EPISODES):
        obs, _ = env.reset(seed=EVAL_SEED + k)
        ended = False
        while not ended:
            action = int(act(obs[None])[0])
            obs, reward, terminated, truncated, _ = env.step(action)
            returns[k] += reward
            ended = terminated or truncated
    return returns


# ---------- Files
def write_returns(args, episodes):
    """returns.csv, from pairs of the step in which an episode ended, and its return."""
    with (args.output_dir / "returns.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["env_step", "episode_return"])
        writer.writerows((int(step), f"{value:.10g}") for step, value in episodes)


def describe_machine(*packages):
    """The versions of these packages and of those that all use, and the processor."""
    versions = {name: version(name) for name in [*PACKAGES, *packages]}
    versions["python"] = platform.python_version()
    cpu = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    return {"versions": versions, "device": cpu}


def write_summary(args, summary, returns):
    """summary.json, the last file of a run: where it is, the run is complete."""
    summary["date"] = datetime.now().astimezone().isoformat(timespec="seconds")
    agent = {"seed": args.seed, "eval_return_mean": returns.mean()}
    agent |= {"eval_return_std": returns.std(), "eval_return_min": returns.min()}
    agent |= {"eval_episodes": len(returns)}
    summary["seeds"] = [agent]
    text = json.dumps(summary, indent=2, default=str) + "\n"
    (args.output_dir / "summary.json").write_text(text)
    print(f"{summary['peer']}, seed {args.seed}: greedy return {returns.mean():.1f}", end=", ")
    print(f"{summary['train_seconds']:.2f} s of training", flush=True)

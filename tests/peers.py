"""Measure other projects beside ours, in alternating runs on one core.

python tests/peers.py --cleanrl DIR --purejaxrl DIR --jym DIR [--only NAME ...] [--pairs N]

DIR is a checkout of github.com/vwxyzjn/cleanrl, luchris429/purejaxrl or RPegoud/jym;
Stable-Baselines3 and SBX come from PyPI. Writes results/peers.csv, and peers.md with the
two tables.
Nobody's compiling is timed: PureJaxRL and jym are compiled ahead; where a loop compiles as it goes,
the time that JAX reports for tracing and compiling is subtracted. Every agent's greedy return is
the mean of 100 episodes with its last weights.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median

import tyro

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "peers"
RESULTS = ROOT / "results" / "peers.csv"
PYTHON = RUNS / "venv" / "bin" / "python"
FIRST_SEED = 6100
# The same JAX, Optax and Gymnasium as ours. Elsewhere `pip install torch` may fetch the build for
# GPUs, which is far larger.
PYPI = {"sb3": "stable-baselines3==2.9.2", "sbx": "sbx-rl==0.28.0"}
PACKAGES = list(PYPI.values())
PACKAGES += [f"{name}=={version(name)}" for name in ("jax", "jaxlib", "optax", "numpy")]
PACKAGES += [f"gymnasium[box2d,classic-control]=={version('gymnasium')}"]
PACKAGES += "torch==2.13.0 flax==0.12.8 gymnax==0.0.9 flashbax==0.1.3 dm-haiku==0.0.17".split()
PACKAGES += "chex==0.1.92 distrax==0.1.9 tensorboard==2.21.0 tyro pandas plotly".split()

# What a copy of a checkout needs to run on these packages: text and replacement, in all its Python
# files and notebooks. Left out: CleanRL's printing of finished episodes, PureJaxRL's wandb, jym's
# progress bar.
TREE_MAP = ("jax.tree_map", "jax.tree.map")
AUTORESET = "(args.num_envs)], autoreset_mode=gym.vector.AutoresetMode.SAME_STEP\n"
CHANGES = {
    "purejaxrl": [TREE_MAP, ("import wandb\n", "\n")],
    "cleanrl": [
        ('infos["final_observation"]', 'infos["final_obs"]'),
        ('if "final_info" in infos:', "if False:"),
        ("(args.num_envs)]\n", AUTORESET),
    ],
    "jym": [
        TREE_MAP,
        ("random, tree_map, vmap", "random, vmap; from jax.tree import map as tree_map"),
        ("from jax_tqdm import loop_tqdm", "loop_tqdm = lambda n: lambda f: f"),
        ("jnp.float32(0.0)\n", "0.0\n"),
    ],
}

# Programs that run one agent of theirs and print what came of it. `job` holds the seed, the steps,
# and what a row sets.
BEFORE = """
import ast, json, runpy, sys, time
import gymnasium, jax
job = json.loads(sys.argv[1])
spans = []  # begin and end of all that JAX traced and compiled; they may be nested
def listen(event, seconds, **_):
    if "/compile/" in event:
        spans.append((time.time() - seconds, time.time()))
jax.monitoring.register_event_duration_secs_listener(listen)
def seconds_since(start):
    seconds = time.time() - start
    seen = start
    for begin, end in sorted(spans):
        seconds -= max(end - max(begin, seen), 0)
        seen = max(seen, end)
    return seconds
def run_compiled(train, *inputs):
    train = jax.jit(train).lower(*inputs).compile()
    start = time.time()
    return jax.block_until_ready(train(*inputs)), time.time() - start
def report(seconds, act, env_id="CartPole-v1"):
    env = gymnasium.make(env_id)
    total = 0
    for episode in range(100):
        obs, _ = env.reset(seed=1_000_000 + episode)
        done = False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(int(act(obs[None])[0]))
            total += reward
            done = terminated or truncated
    print("\\n" + json.dumps({"steps": job["steps"], "seconds": seconds, "return": total / 100}))
"""
PROGRAMS = {}
PROGRAMS["cleanrl"] = """
sys.argv = ["dqn_jax.py", "--seed", str(job["seed"]), *job["flags"].split()]
sys.argv += ["--total-timesteps", str(job["steps"])]
end = runpy.run_path("cleanrl/dqn_jax.py", run_name="__main__")
act = lambda obs: end["q_network"].apply(end["q_state"].params, obs).argmax(-1)
report(seconds_since(end["start_time"]), act, end["args"].env_id)
"""
PROGRAMS["purejaxrl"] = """
code = runpy.run_path("purejaxrl/dqn.py")  # its settings are the one dictionary written out in it
nodes = ast.walk(ast.parse(open("purejaxrl/dqn.py").read()))
values = [node.value for node in nodes if isinstance(node, ast.Assign)]
config = next(ast.literal_eval(value) for value in values if isinstance(value, ast.Dict))
config |= {"TOTAL_TIMESTEPS": job["steps"]}
end, seconds = run_compiled(code["make_train"](config), jax.random.PRNGKey(job["seed"]))
params = end["runner_state"][0].params
report(seconds, jax.jit(lambda obs: code["QNetwork"](2).apply(params, obs).argmax(-1)))
"""
PROGRAMS["jym"] = """
cells = json.load(open("notebooks/control/dqn_cartpole.ipynb"))["cells"]  # up to its training
code = "\\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
code = code.split("out = deep_rl_rollout")[0]
code = code.replace("RANDOM_SEED = 1", f"RANDOM_SEED = {job['seed']}")
note = {}
exec(code.replace("20_000", str(job["steps"])), note)
inputs = [note["rollout_params"].pop(name) for name in ("random_seed", "buffer_state")]
rollout = note["deep_rl_rollout"]
params = note["rollout_params"]
train = lambda seed, buffer: rollout(random_seed=seed, buffer_state=buffer, **params)
end, seconds = run_compiled(train, *inputs)
report(seconds, jax.jit(lambda obs: note["model"].apply(end["model_params"], None, obs).argmax(-1)))
"""
PROGRAMS["sb3"] = """
from stable_baselines3 import DQN
model = DQN("MlpPolicy", "LunarLander-v3", seed=job["seed"], device="cpu", **job["settings"])
start = time.time()
model.learn(job["steps"])
act = lambda obs: model.predict(obs, deterministic=True)[0]
report(seconds_since(start), act, "LunarLander-v3")
"""
PROGRAMS["sbx"] = PROGRAMS["sb3"].replace("stable_baselines3", "sbx")

# Ours. Where a peer does without Double DQN and layer normalization, so do we: two functions of the
# module are replaced before it runs, and the work is the same.
OURS = """
import sys
import {module} as dqn
{changes}
sys.exit(dqn.main(dqn.tyro.cli(dqn.Args)))
"""
PLAIN_DQN = """
import jax, optax
import jax.numpy as jnp

def update(args, learner, batch):
    next_q = jnp.max(dqn.q_values(learner.target_params, batch.next_obs), axis=1)
    target = batch.reward + batch.discount * next_q
    def loss_fn(params):
        rows = jnp.arange(args.batch_size)
        return jnp.mean((target - dqn.q_values(params, batch.obs)[rows, batch.action]) ** 2)
    loss, grads = jax.value_and_grad(loss_fn)(learner.params)
    updates, opt_state = dqn.make_optimizer(args).update(grads, learner.opt_state)
    params = optax.apply_updates(learner.params, updates)
    target_params = optax.incremental_update(params, learner.target_params, args.tau)
    return dqn.Learner(params, target_params, opt_state), loss

dqn.update = update
dqn.normalize = lambda x: x
"""
SAME = {"learning_rate": 2.5e-4, "buffer_size": 10_000, "learning_starts": 1000, "batch_size": 64}
SAME |= {"target_update_interval": 500, "train_freq": 4, "exploration_fraction": 0.5}
SAME |= {"policy_kwargs": {"net_arch": [64, 64]}}
RL_ZOO = {"learning_rate": 6.3e-4, "buffer_size": 50_000, "learning_starts": 0, "batch_size": 128}
RL_ZOO |= {"target_update_interval": 250, "train_freq": 4, "gradient_steps": -1}
RL_ZOO |= {"exploration_fraction": 0.12, "exploration_final_eps": 0.1}
RL_ZOO |= {"policy_kwargs": {"net_arch": [256, 256]}}
LUNAR = "--env-id LunarLander-v3 --batch-size 64 --train-frequency 4 --learning-starts 1000"
PLAIN = "--n-step 1 --gamma 0.99 --learning-rate 2.5e-4 --buffer-size 10000 --end-e 0.05"
PLAIN += " --exploration-fraction 0.5"
AS_PUREJAXRL = PLAIN + " --tau 0.02 --num-envs 10 --batch-size 128 --hidden-sizes 120 84"
AS_JYM = "--n-step 1 --tau 0.1 --gamma 0.9 --learning-rate 1e-3 --buffer-size 512 --end-e 0.015"
AS_JYM += " --exploration-fraction 1 --batch-size 32 --num-envs 1 --hidden-sizes 64 64 64"
AS_SB3 = PLAIN + " --tau 0.008 --batch-size 64 --reward-scale 1 --hidden-sizes 64 64"
AS_SB3 += " --train-frequency 4 --gradient-steps 1"
AS_CLEANRL = AS_SB3.replace("64 64", "120 84")
IN_GROUPS = AS_CLEANRL.replace("frequency 4 --gradient-steps 1", "frequency 16 --gradient-steps 4")


@dataclass(frozen=True)
class Row:
    """A comparison: with the same settings if there are flags for ours, or each with its own."""

    name: str
    peer: str
    steps: int  # of theirs; of ours too, if the settings are the same
    not_equal: str
    ours: str = ""  # flags
    theirs: str | dict = ""  # flags or settings
    lander: bool = False  # on LunarLander-v3, not CartPole-v1


TARGET = "ours moves the target network at every update, theirs copies it from time to time"
LIMIT = "theirs treats the time limit as a fall; only ours scales observations"
BOTH = f"{TARGET}; our learning rate falls; theirs writes logs"
ROWS = [
    Row(
        "PureJaxRL, CartPole",
        "purejaxrl",
        500_000,
        f"{LIMIT}; {TARGET}; ours learns from the first step on, theirs after 10,000; theirs also"
        " returns four metrics of every step",
        AS_PUREJAXRL,
    ),
    Row(
        "jym, CartPole",
        "jym",
        20_000,
        f"theirs has no time limit and its epsilon falls as 1 / (1 + t / 1000); {TARGET}",
        AS_JYM,
    ),
    Row("CleanRL, LunarLander", "cleanrl", 40_000, BOTH, AS_CLEANRL, LUNAR, True),
    Row(
        "CleanRL, LunarLander, in groups",
        "cleanrl",
        40_000,
        f"ours makes 4 updates every 16 steps; {BOTH}",
        IN_GROUPS,
        LUNAR,
        True,
    ),
    Row(
        "Stable-Baselines3, LunarLander",
        "sb3",
        40_000,
        f"theirs: Huber loss, clipped gradients; {BOTH}",
        AS_SB3,
        SAME,
        True,
    ),
    Row("SBX, LunarLander", "sbx", 40_000, f"theirs: Huber loss; {BOTH}", AS_SB3, SAME, True),
    Row(
        "PureJaxRL, CartPole, own",
        "purejaxrl",
        500_000,
        f"theirs: 500,000 steps, one initial network; {LIMIT}",
    ),
    Row(
        "CleanRL, CartPole, own",
        "cleanrl",
        500_000,
        "theirs: 500,000 steps in Gymnasium's CartPole; theirs writes logs",
    ),
    Row("jym, CartPole, own", "jym", 20_000, "theirs: 20,000 steps without a time limit"),
    Row(
        "SB3 as in RL Zoo, LunarLander, own",
        "sb3",
        100_000,
        "theirs: 100,000 steps; published: 154",
        "",
        RL_ZOO,
        True,
    ),
]
COLUMNS = "name peer version unit pairs theirs ours ratio smallest largest not_equal".split()
COLUMNS += "changes date machine theirs_return ours_return theirs_solved ours_solved".split()


def run(folder, *command):
    """Returns what the command printed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def prepare(peer, checkout):
    """Install PACKAGES and, in RUNS, copy a checkout with CHANGES. Returns the peer's version."""
    if not PYTHON.exists():
        run(ROOT, sys.executable, "-m", "venv", RUNS / "venv")
        run(ROOT, PYTHON, "-m", "pip", "install", "--quiet", *PACKAGES)
    if peer in PYPI:
        return PYPI[peer]
    if not checkout:
        raise ValueError(f"--{peer} DIR was not given")
    without_git = shutil.ignore_patterns(".git")
    shutil.copytree(checkout, RUNS / peer, ignore=without_git, dirs_exist_ok=True)
    for path in [*(RUNS / peer).rglob("*.py"), *(RUNS / peer).rglob("*.ipynb")]:
        for old, new in CHANGES[peer]:
            path.write_text(path.read_text().replace(old, new))
    return run(checkout, "git", "rev-parse", "HEAD")


def run_theirs(row, seed, folder):
    """Returns its seconds of training and its greedy return."""
    job = {"seed": seed, "steps": row.steps}
    job["settings" if isinstance(row.theirs, dict) else "flags"] = row.theirs
    code = BEFORE + PROGRAMS[row.peer]
    found = json.loads(run(folder, PYTHON, "-c", code, json.dumps(job)).splitlines()[-1])
    return found["seconds"], found["return"]


def run_ours(row, seed):
    """Returns its seconds of training, its greedy return, and its steps."""
    module = "dqn_lunarlander" if row.lander else "dqn_cartpole_jax"
    code = OURS.format(module=module, changes=PLAIN_DQN if row.lander and row.ours else "")
    flags = f"{row.ours} --seed {seed} --output-dir {RUNS / 'ours'}"
    if row.ours:
        flags += f" --total-timesteps {row.steps}"
    shutil.rmtree(RUNS / "ours", ignore_errors=True)
    run(ROOT, sys.executable, "-c", code, *flags.split())
    summary = json.loads((RUNS / "ours" / "summary.json").read_text())
    greedy = summary["seeds"][0]["eval_return_mean"]
    return summary["train_seconds"], greedy, summary["env_steps"]


def measure(row, checkout, count):
    """A line of the table: medians over the pairs of runs; of their ratios also the extremes."""
    line = {"name": row.name, "peer": row.peer, "not_equal": row.not_equal}
    line |= {"date": time.strftime("%Y-%m-%d"), "unit": "steps/s" if row.ours else "s"}
    cpu = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    line["machine"] = f"1 of {os.cpu_count()} cores of {cpu}"
    changes = [f"`{a.strip()}` -> `{b.strip()}`" for a, b in CHANGES.get(row.peer, [])]
    line["changes"] = "; ".join(changes)
    theirs = []
    ours = []
    try:
        line["version"] = f"{prepare(row.peer, checkout)}, jax {version('jax')}"
        for seed in range(FIRST_SEED, FIRST_SEED + count):
            theirs.append(run_theirs(row, seed, RUNS / row.peer if checkout else RUNS))
            ours.append(run_ours(row, seed))
            print(row.name, seed, theirs[-1], ours[-1], flush=True)
    except (subprocess.CalledProcessError, ValueError) as error:
        # A peer that can't be run is a line that says why.
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
        return line | {"not_equal": f"not run: {reason}"}
    threshold = 200 if row.lander else 475
    steps = {"theirs": row.steps, "ours": ours[0][2]}
    for who, runs in (("theirs", theirs), ("ours", ours)):
        seconds = median(x[0] for x in runs)
        line[who] = f"{steps[who] / seconds:.0f}" if row.ours else f"{seconds:.2f}"
        line[f"{who}_return"] = f"{mean(x[1] for x in runs):.1f}"
        line[f"{who}_solved"] = sum(x[1] >= threshold for x in runs)
    ratios = sorted(a[0] / b[0] for a, b in zip(theirs, ours, strict=True))
    line |= {"ratio": f"{median(ratios):.3g}", "pairs": count}
    return line | {"smallest": f"{ratios[0]:.3g}", "largest": f"{ratios[-1]:.3g}"}


def tables(lines):
    """Two tables in Markdown: the same settings, and each one's own."""
    heads = {"steps/s": "same settings | speed: ours / theirs"}
    heads["s"] = "own settings | training time: theirs / ours"
    text = []
    for unit, head in heads.items():
        text += [f"| {head} | return: theirs, ours | solved of 3: theirs, ours | not equal |"]
        text += ["| --- " * 5 + "|"]
        cells = "| {name} | {ratio} ({smallest} to {largest}) | {theirs_return}, {ours_return}"
        cells += " | {theirs_solved}, {ours_solved} | {not_equal} |"
        text += [cells.format(**x) for x in lines if x["unit"] == unit]
        text += [""]
    return "\n".join(text)


def write(lines):
    """peers.csv and peers.md."""
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)
    RESULTS.with_suffix(".md").write_text(tables(lines))


def main(
    cleanrl: str = "",
    purejaxrl: str = "",
    jym: str = "",
    only: tuple[str, ...] = (),
    pairs: int = 3,
) -> None:
    """Measure all rows, or `only` some, by name or peer, in `pairs` of runs."""
    RUNS.mkdir(parents=True, exist_ok=True)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ |= {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    checkouts = {"cleanrl": cleanrl, "purejaxrl": purejaxrl, "jym": jym}
    kept = {}
    if RESULTS.exists():
        kept = {line["name"]: line for line in csv.DictReader(RESULTS.open())}
    for row in ROWS:
        if not only or {row.name, row.peer} & set(only):
            kept[row.name] = measure(row, checkouts.get(row.peer), pairs)
            write([dict.fromkeys(COLUMNS, "") | kept[x.name] for x in ROWS if x.name in kept])


if __name__ == "__main__":
    tyro.cli(main)

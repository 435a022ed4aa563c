"""Measure other projects beside ours: python tests/peers.py --cleanrl DIR --purejaxrl DIR --jym DIR [--only NAME ...] [--quick]

DIR is a checkout of github.com/vwxyzjn/cleanrl, luchris429/purejaxrl or RPegoud/jym; Stable-Baselines3 and SBX come from PyPI.
Runs alternate (theirs, ours, theirs, ours ...), all on the same one core. Writes results/peers.csv and the README's table.
Nobody's compiling is timed: PureJaxRL and jym are compiled ahead; where a loop compiles as it goes, the time that JAX reports
for tracing and compiling is subtracted. Every agent's greedy return is the mean of 100 episodes with its last weights.
"""

import csv
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from statistics import mean, median

import tyro

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUNS, RESULTS, README = ROOT / "runs" / "peers", ROOT / "results" / "peers.csv", ROOT / "README.md"
START, END = "<!-- table of tests/peers.py -->", "<!-- end of peers -->"
PYTHON, FIRST_SEED = RUNS / "venv" / "bin" / "python", 5000
# The same JAX, Optax and Gymnasium as ours. Elsewhere `pip install torch` may fetch the build for GPUs, which is far larger.
PYPI = {"sb3": "stable-baselines3==2.9.2", "sbx": "sbx-rl==0.28.0"}
PACKAGES = [*PYPI.values()] + [
    f"{name}=={version(name)}" for name in ("jax", "jaxlib", "optax", "numpy")
]
PACKAGES += f"gymnasium[box2d,classic-control]=={version('gymnasium')} torch==2.13.0 flax==0.12.8 gymnax==0.0.9".split()
PACKAGES += "flashbax==0.1.3 dm-haiku==0.0.17 chex==0.1.92 distrax==0.1.9 tensorboard==2.21.0 tyro pandas plotly".split()

# What the copy of a checkout needs to run on these packages: text and replacement, in all its Python files and notebooks.
# Left out: CleanRL's printing of finished episodes, PureJaxRL's wandb, jym's progress bar.
CHANGES = {"purejaxrl": [("jax.tree_map", "jax.tree.map"), ("import wandb\n", "\n")]}
CHANGES["cleanrl"] = [
    ('infos["final_observation"]', 'infos["final_obs"]'),
    ('if "final_info" in infos:', "if False:"),
]
CHANGES["cleanrl"] += [
    ("(args.num_envs)]\n", "(args.num_envs)], autoreset_mode=gym.vector.AutoresetMode.SAME_STEP\n")
]
CHANGES["jym"] = [
    CHANGES["purejaxrl"][0],
    ("random, tree_map, vmap", "random, vmap; from jax.tree import map as tree_map"),
]
CHANGES["jym"] += [
    ("from jax_tqdm import loop_tqdm", "loop_tqdm = lambda n: lambda f: f"),
    ("jnp.float32(0.0)\n", "0.0\n"),
]

# Programs that run one agent of theirs and print what came of it. `job` holds the seed, the steps and what a row sets.
BEFORE = """
import ast, json, runpy, sys, time
import gymnasium, jax
job, spans = json.loads(sys.argv[1]), []  # spans: begin and end of all that JAX traced and compiled; they may be nested
listen = lambda event, seconds, **_: "/compile/" in event and spans.append((time.time() - seconds, time.time()))
jax.monitoring.register_event_duration_secs_listener(listen)
def seconds_since(start):
    seconds, seen = time.time() - start, start
    for begin, end in sorted(spans):
        seconds, seen = seconds - max(end - max(begin, seen), 0), max(seen, end)
    return seconds
def run_compiled(train, *inputs):
    train, start = jax.jit(train).lower(*inputs).compile(), time.time()
    return jax.block_until_ready(train(*inputs)), time.time() - start
def report(seconds, act, env_id="CartPole-v1"):
    env, total = gymnasium.make(env_id), 0
    for episode in range(100):
        obs, done = env.reset(seed=1_000_000 + episode)[0], False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(int(act(obs[None])[0]))
            total, done = total + reward, terminated or truncated
    print("\\n" + json.dumps({"steps": job["steps"], "seconds": seconds, "return": total / 100}))
"""
PROGRAMS = {}
PROGRAMS["cleanrl"] = """
sys.argv = ["dqn_jax.py", "--seed", str(job["seed"]), *job["flags"].split(), "--total-timesteps", str(job["steps"])]
end = runpy.run_path("cleanrl/dqn_jax.py", run_name="__main__")
act = lambda obs: end["q_network"].apply(end["q_state"].params, obs).argmax(-1)
report(seconds_since(end["start_time"]), act, end["args"].env_id)
"""
PROGRAMS["purejaxrl"] = """
code = runpy.run_path("purejaxrl/dqn.py")  # its settings are the one dictionary written out in it
literals = [node.value for node in ast.walk(ast.parse(open("purejaxrl/dqn.py").read())) if isinstance(node, ast.Assign)]
config = next(ast.literal_eval(value) for value in literals if isinstance(value, ast.Dict)) | {"TOTAL_TIMESTEPS": job["steps"]}
end, seconds = run_compiled(code["make_train"](config), jax.random.PRNGKey(job["seed"]))
report(seconds, jax.jit(lambda obs: code["QNetwork"](2).apply(end["runner_state"][0].params, obs).argmax(-1)))
"""
PROGRAMS["jym"] = """
cells = json.load(open("notebooks/control/dqn_cartpole.ipynb"))["cells"]  # it is run up to its training
code = "\\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code").split("out = deep_rl_rollout")[0]
exec(code.replace("RANDOM_SEED = 1", f"RANDOM_SEED = {job['seed']}").replace("20_000", str(job["steps"])), note := {})
inputs = [note["rollout_params"].pop(name) for name in ("random_seed", "buffer_state")]
train = lambda seed, buffer: note["deep_rl_rollout"](random_seed=seed, buffer_state=buffer, **note["rollout_params"])
end, seconds = run_compiled(train, *inputs)
report(seconds, jax.jit(lambda obs: note["model"].apply(end["model_params"], None, obs).argmax(-1)))
"""
PROGRAMS["sb3"] = """
from stable_baselines3 import DQN
model = DQN("MlpPolicy", "LunarLander-v3", seed=job["seed"], device="cpu", **job["settings"])
start = time.time()
model.learn(job["steps"])
report(seconds_since(start), lambda obs: model.predict(obs, deterministic=True)[0], "LunarLander-v3")
"""
PROGRAMS["sbx"] = PROGRAMS["sb3"].replace("stable_baselines3", "sbx")

SAME = dict(
    learning_rate=2.5e-4,
    buffer_size=10_000,
    learning_starts=1000,
    batch_size=64,
    target_update_interval=500,
)
SAME |= dict(train_freq=4, exploration_fraction=0.5, policy_kwargs={"net_arch": [64, 64]})
RL_ZOO = SAME | dict(
    learning_rate=6.3e-4,
    buffer_size=50_000,
    learning_starts=0,
    batch_size=128,
    target_update_interval=250,
)
RL_ZOO |= dict(
    gradient_steps=-1,
    exploration_fraction=0.12,
    exploration_final_eps=0.1,
    policy_kwargs={"net_arch": [256, 256]},
)
LUNAR = {
    "flags": "--env-id LunarLander-v3 --batch-size 64 --train-frequency 4 --learning-starts 1000"
}
PLAIN = "--n-step 1 --tau 1 --gamma 0.99 --learning-rate 2.5e-4 --end-learning-rate 2.5e-4 --buffer-size 10000 --start-e 1"
PLAIN += " --end-e 0.05 --exploration-fraction 0.5 --target-network-frequency 500"
AS_PUREJAXRL = (
    PLAIN + " --num-envs 10 --batch-size 128 --hidden-sizes 120 84 --learning-starts 10000"
)
AS_JYM = "--n-step 1 --tau 1 --gamma 0.9 --learning-rate 1e-3 --end-learning-rate 1e-3 --buffer-size 512 --start-e 0.3"
AS_JYM += " --end-e 0.015 --exploration-fraction 1 --target-network-frequency 10 --batch-size 32 --learning-starts 32"
AS_JYM += " --num-envs 1 --hidden-sizes 64 64 64"
AS_SB3 = (
    PLAIN
    + " --batch-size 64 --no-layer-norm --no-double-dqn --reward-scale 1 --learning-starts 1000 --hidden-sizes 64 64"
)
AS_SB3 += " --train-frequency 4 --gradient-steps 1 --action-gap 0"
AS_CLEANRL = AS_SB3.replace("64 64", "120 84")
IN_BLOCKS = AS_CLEANRL.replace("frequency 4 --gradient-steps 1", "frequency 16 --gradient-steps 4")
LIMIT, LOGS = (
    "theirs treats the time limit as a fall; only ours scales observations",
    "theirs writes logs",
)
# Name, peer, its steps, its settings if not its own, our flags ("" where both run their own), what is not equal.
ROWS = [
    (
        "PureJaxRL, CartPole",
        "purejaxrl",
        500_000,
        {},
        AS_PUREJAXRL,
        f"{LIMIT}; theirs also returns four metrics of every step",
    ),
    (
        "jym, CartPole",
        "jym",
        20_000,
        {},
        AS_JYM,
        "theirs has no time limit; epsilon falls as 1 / (1 + t / 1000)",
    ),
    ("CleanRL, LunarLander", "cleanrl", 40_000, LUNAR, AS_CLEANRL, LOGS),
    (
        "CleanRL, LunarLander, in groups",
        "cleanrl",
        40_000,
        LUNAR,
        IN_BLOCKS,
        f"{LOGS}; ours: 4 updates every 16 steps",
    ),
    (
        "Stable-Baselines3, LunarLander",
        "sb3",
        40_000,
        {"settings": SAME},
        AS_SB3,
        f"Huber loss, clipped gradients; {LOGS}",
    ),
    ("SBX, LunarLander", "sbx", 40_000, {"settings": SAME}, AS_SB3, f"Huber loss; {LOGS}"),
    (
        "PureJaxRL, CartPole, own",
        "purejaxrl",
        500_000,
        {},
        "",
        f"theirs: 500,000 steps, one initial network; {LIMIT}",
    ),
    (
        "CleanRL, CartPole, own",
        "cleanrl",
        500_000,
        {"flags": ""},
        "",
        f"theirs: 500,000 steps in Gymnasium's CartPole; {LOGS}",
    ),
    ("jym, CartPole, own", "jym", 20_000, {}, "", "theirs: 20,000 steps without a time limit"),
    (
        "SB3 as in RL Zoo, LunarLander, own",
        "sb3",
        100_000,
        {"settings": RL_ZOO},
        "",
        "theirs: 100,000 steps; published: 154",
    ),
]
COLUMNS = "name peer version unit pairs theirs ours ratio smallest largest not_equal changes date machine".split()
COLUMNS += "theirs_return ours_return theirs_solved ours_solved".split()


def run(folder, *command):
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def prepare(peer, checkout):
    """Install PACKAGES and, in RUNS, copy a checkout with CHANGES. Returns the peer's version."""
    run(ROOT, sys.executable, "-m", "venv", RUNS / "venv")
    run(ROOT, PYTHON, "-m", "pip", "install", "--quiet", *PACKAGES)
    if peer in PYPI:
        return PYPI[peer]
    assert checkout, f"--{peer} DIR was not given"
    shutil.copytree(
        checkout, RUNS / peer, ignore=shutil.ignore_patterns(".git"), dirs_exist_ok=True
    )
    for path in [*(RUNS / peer).rglob("*.py"), *(RUNS / peer).rglob("*.ipynb")]:
        for old, new in CHANGES[peer]:
            path.write_text(path.read_text().replace(old, new))
    return run(checkout, "git", "rev-parse", "HEAD")


def measure(name, peer, steps, job, flags, not_equal, checkout, count, quick):
    """One line of the table: medians over the pairs of runs; of their ratios also the smallest and the largest."""
    script, threshold = (
        ("dqn_lunarlander.py", 200) if "Lunar" in name else ("dqn_cartpole_jax.py", 475)
    )
    line = dict(
        name=name,
        peer=peer,
        not_equal=not_equal,
        date=time.strftime("%Y-%m-%d"),
        unit="steps/s" if flags else "s",
    )
    line["machine"] = (
        pathlib.Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    )
    line["changes"] = "; ".join(
        f"`{old.strip()}` -> `{new.strip()}`" for old, new in CHANGES.get(peer, [])
    )
    steps, count = (12_800, 1) if quick else (steps, count)
    pairs, our_flags = (
        [],
        f"{flags} --eval-episodes 100 {f'--total-timesteps {steps}' if flags or quick else ''}".split(),
    )
    try:
        line["version"] = f"{prepare(peer, checkout)}, jax {version('jax')}"
        for seed in range(FIRST_SEED, FIRST_SEED + count):
            code, text = BEFORE + PROGRAMS[peer], json.dumps(job | {"seed": seed, "steps": steps})
            theirs = json.loads(
                run(RUNS / peer if checkout else RUNS, PYTHON, "-c", code, text).splitlines()[-1]
            )
            shutil.rmtree(RUNS / "ours", ignore_errors=True)
            run(
                ROOT,
                sys.executable,
                script,
                *our_flags,
                "--seed",
                str(seed),
                "--output-dir",
                RUNS / "ours",
            )
            ours = json.loads((RUNS / "ours" / "summary.json").read_text())
            pairs.append(
                [
                    theirs["seconds"],
                    ours["train_seconds"],
                    theirs["return"],
                    ours["seeds"][0]["eval_return_mean"],
                ]
            )
            print(name, seed, pairs[-1], flush=True)
    except Exception as error:  # a peer that can't be run is a line that says why
        return line | {
            "not_equal": "not run: "
            + (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
        }
    for who, one in ("theirs", 0), ("ours", 1):
        seconds, returns = median(pair[one] for pair in pairs), [pair[one + 2] for pair in pairs]
        line |= {
            who: f"{(steps, ours['env_steps'])[one] / seconds:.0f}" if flags else f"{seconds:.2f}"
        }
        line |= {
            f"{who}_return": f"{mean(returns):.1f}",
            f"{who}_solved": sum(r >= threshold for r in returns),
        }
    ratios = sorted(pair[0] / pair[1] for pair in pairs)
    return line | dict(
        ratio=f"{median(ratios):.3g}",
        smallest=f"{ratios[0]:.3g}",
        largest=f"{ratios[-1]:.3g}",
        pairs=count,
    )


def main(
    cleanrl: str = "",
    purejaxrl: str = "",
    jym: str = "",
    only: tuple[str, ...] = (),
    pairs: int = 3,
    quick: bool = False,
) -> None:
    """Measure cleanrl, purejaxrl, jym, sb3 and sbx, or `only` some, by name or row; `quick` tries this and writes nothing."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ |= {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    checkouts = dict(cleanrl=cleanrl, purejaxrl=purejaxrl, jym=jym)
    kept = (
        {line["name"]: line for line in csv.DictReader(RESULTS.open())} if RESULTS.exists() else {}
    )
    kept |= {
        row[0]: measure(*row, checkouts.get(row[1]), pairs, quick)
        for row in ROWS
        if not only or {*row[:2]} & {*only}
    }
    lines = [dict.fromkeys(COLUMNS, "") | kept[row[0]] for row in ROWS if row[0] in kept]
    table, heads = (
        [],
        {
            "steps/s": "same settings | speed: ours / theirs",
            "s": "own settings | training time: theirs / ours",
        },
    )
    for unit, head in heads.items():
        table += [
            "",
            f"| {head} | return: theirs, ours | solved of 3: theirs, ours | known differences |",
            "| --- " * 5 + "|",
        ]
        cells = "| {name} | {ratio} ({smallest} to {largest}) | {theirs_return}, {ours_return} | {theirs_solved}, {ours_solved}"
        table += [f"{cells} | {{not_equal}} |".format(**x) for x in lines if x["unit"] == unit]
    table += [
        "",
        *dict.fromkeys(
            f"- Changed in the copy of {x['peer']}: {x['changes']}." for x in lines if x["changes"]
        ),
    ]
    print(
        text := "\n".join(table[1:])
        .replace(" ( to )", "")
        .replace(" -> ``", " left out")
        .replace(", own |", " |")
    )
    if not quick:
        with RESULTS.open("w", newline="") as file:
            csv.writer(file).writerows(
                [COLUMNS, *([x[column] for column in COLUMNS] for x in lines)]
            )
        before, start, rest = README.read_text().partition(START)
        README.write_text(f"{before}{start}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    tyro.cli(main)

"""Draw the README's pictures: python results/pictures.py [--only NAME ...]

maze.png, pole.gif and lander.gif come from runs with seed 6100; curves.png from five agents for
each environment, seeds 6100 to 6104; same.png from results/curves.csv, which peers.py and causes.py
write. None was picked for its result. It needs the packages of requirements.txt, and takes about
ten minutes on two cores. The runs stay in runs/pictures.
"""

import contextlib
import csv
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import gymnasium
import imageio.v3
import numpy as np
import tyro
from causes import ROW, VARIANTS, name_of
from matplotlib.figure import Figure
from scipy.stats import t as student  # JAX needs SciPy too

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
RUNS = ROOT / "runs" / "pictures"
SEED = 6100
AGENTS = 5
PARTS = 10  # greedy returns in a curve
GREEDY_EPISODES = 20  # of each agent after each part


def start(script, flags):
    """Run a script once. Returns the folder of its results."""
    folder = RUNS / f"{script} {flags}".replace("/", "-")
    if not (folder / "summary.json").exists():
        command = [sys.executable, script, *flags.split(), "--output-dir", folder]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=environment)
    return folder


# ---------- Stills and films
def maze():
    """maze.png: the 8x8 board with what was learned, and the best action of each free cell."""
    sys.path.insert(0, str(ROOT))
    import q_table_maze

    folder = start("q_table_maze.py", f"--board 8x8 --seed {SEED}")
    q_table = q_table_maze.load_model(folder / "model.npz")["q_table"]
    board = q_table_maze.read_board("8x8")
    axes = Figure(figsize=(4.2, 3.4), layout="constrained").add_subplot()
    value = np.where(board.terminal, np.nan, q_table.max(axis=1)).reshape(8, 8)
    picture = axes.imshow(value, cmap="viridis", vmin=0, vmax=1)
    for cell in range(64):
        row, column = divmod(cell, 8)
        if board.terminal[cell]:
            text = "G" if board.reward[cell] > 0 else "H"
            axes.text(column, row, text, ha="center", va="center")
            continue
        down, right = q_table_maze.MOVES[q_table[cell].argmax()]
        begin = column - 0.3 * right, row - 0.3 * down
        end = column + 0.3 * right, row + 0.3 * down
        axes.annotate("", end, begin, arrowprops={"arrowstyle": "->", "color": "white"})
    axes.set(xticks=[], yticks=[], title="max Q(s, a), and the action that has it")
    axes.figure.colorbar(picture, shrink=0.8)
    axes.figure.savefig(RESULTS / "maze.png", dpi=80)


def pole():
    """pole.gif: a kept CartPole model in Gymnasium's environment."""
    sys.path.insert(0, str(ROOT))
    import dqn_cartpole_jax

    folder = start("dqn_cartpole_jax.py", f"--seed {SEED}")
    kept = dqn_cartpole_jax.load_model(folder / "model.npz")
    params = {name: array[0] for name, array in kept.items()}
    env = gymnasium.make("CartPole-v1", render_mode="rgb_array")
    obs, _ = env.reset(seed=0)
    frames = []
    for t in range(300):
        if t % 2 == 0:
            frames.append(env.render()[100:340:2, ::2].copy())
        action = int(dqn_cartpole_jax.q_values(params, obs[None]).argmax())
        obs, _, terminated, _, _ = env.step(action)
        if terminated:
            break
    imageio.v3.imwrite(RESULTS / "pole.gif", frames, duration=40, loop=0)


def lander():
    """lander.gif: after 10,000 steps, and at the end."""
    flags = f"--seed {SEED} --eval-frequency 10000 --capture-video --eval-episodes 5"
    folder = start("dqn_lunarlander.py", flags)
    clips = []
    for name in ("model_00010000", "model"):
        clips.append(imageio.v3.imread(folder / f"{name}.gif")[::2])
    frames = []
    for i in range(max(map(len, clips))):  # the shorter one stays at its last frame
        frames.append(np.concatenate([clip[min(i, len(clip) - 1)] for clip in clips], axis=1))
    imageio.v3.imwrite(RESULTS / "lander.gif", frames, duration=80, loop=0)


# ---------- Curves
class StopAt(gymnasium.Wrapper):
    """Ctrl-C after some steps: train returns what was learned until then."""

    def __init__(self, env, steps):
        super().__init__(env)
        self.left = steps

    def step(self, action):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().step(action)


def curves_of_script(module, env_id, seed):
    """Episodes of training (step, return), and greedy returns after each part (PARTS,).

    A run is the same as a longer one with its seed, up to where it is interrupted.
    """
    sys.path.insert(0, str(ROOT))
    script = __import__(module)
    args = script.Args(seed=seed, env_id=env_id, eval_episodes=GREEDY_EPISODES)
    greedy = []
    for part in range(1, PARTS + 1):
        env = StopAt(gymnasium.make(env_id), args.total_timesteps * part // PARTS)
        with contextlib.redirect_stdout(None):
            params, episodes, _ = script.train(args, env)
        # An evaluation seed of its own, so that no part is judged on the final episodes.
        other = replace(args, seed=2**19 + seed * PARTS + part)
        greedy.append(script.evaluate(other, params, gymnasium.make(env_id)).mean())
    return episodes, np.array(greedy)


def curves_of_cartpole():
    """The same for all agents of dqn_cartpole_jax.py, trained at once."""
    sys.path.insert(0, str(ROOT))
    import jax

    import dqn_cartpole_jax as dqn

    args = dqn.Args(seed=SEED, num_seeds=AGENTS, eval_episodes=GREEDY_EPISODES)
    steps = args.total_timesteps // args.num_envs // PARTS
    run_chunks = jax.jit(jax.vmap(partial(dqn.run_chunk, args, steps=steps)))
    agents = dqn.init_agents(args)
    episodes = []
    greedy = []
    for part in range(PARTS):
        agents, logs = run_chunks(agents)
        logs = jax.device_get(logs)
        episodes.append(dqn.ended_episodes(args, logs, part * steps * args.num_envs))
        greedy.append(dqn.evaluate(args, agents.learner.params).mean(axis=1))
    episodes = np.concatenate(episodes)
    greedy = np.array(greedy)
    found = []
    for k in range(AGENTS):
        found.append((episodes[episodes[:, 2] == SEED + k, :2], greedy[:, k]))
    return found


def curves():
    """curves.png: returns in training and greedy returns, the mean over agents and the range."""
    found = {"CartPole-v1": curves_of_cartpole()}
    env_id = "InvertedPendulum-v5"
    spawn = multiprocessing.get_context("spawn")  # JAX has threads, which a fork can lock up
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), spawn) as pool:
        one = partial(curves_of_script, "dqn_pendulum_discretized", env_id)
        found[env_id] = list(pool.map(one, range(SEED, SEED + AGENTS)))
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, (title, agents) in zip(figure.subplots(1, 2), found.items(), strict=True):
        draw_curve(axes, agents)
        axes.set(title=title, xlabel="environment steps", ylabel="return")
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(RESULTS / "curves.png", dpi=110)


def draw_curve(axes, agents):
    """In blue the mean of the last 10 training episodes, in orange greedy episodes."""
    end = max(episodes[-1, 0] for episodes, _ in agents)
    grid = np.linspace(0, end, 200)
    recent = np.full((len(agents), 200), np.nan)
    for i, (episodes, _) in enumerate(agents):
        for j, step in enumerate(grid):
            if step >= episodes[0, 0]:
                recent[i, j] = episodes[episodes[:, 0] <= step, 1][-10:].mean()
    begun = ~np.isnan(recent).any(axis=0)
    steps = end * np.arange(1, PARTS + 1) / PARTS
    greedy = np.array([returns for _, returns in agents])
    for x, y, style, label in (
        (grid[begun], recent[:, begun], "C0-", "in training, with random actions"),
        (steps, greedy, "C1o-", "greedy"),
    ):
        axes.fill_between(x, y.min(axis=0), y.max(axis=0), alpha=0.2, color=style[:2])
        axes.plot(x, y.mean(axis=0), style, markersize=3, label=label)


def same():
    """same.png: CleanRL's learning curves and ours at its settings."""
    with (RESULTS / "curves.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    small = [name_of(patches) for patches in VARIANTS if patches]
    rows = {
        "CartPole-v1": (["CleanRL, CartPole"], ["CartPole in Gymnasium, plain"]),
        "LunarLander-v3": (["CleanRL, LunarLander"], [ROW, name_of(())], small),
    }
    for axes, (env_id, groups) in zip(figure.subplots(1, 2), rows.items(), strict=True):
        labels = "CleanRL's dqn_jax.py", "dqn_lunarlander.py, the same settings"
        labels += ("with first weights as small as CleanRL's",)
        for names, label in zip(groups, labels, strict=False):  # two groups or three
            agents = {}
            for line in lines:
                if line["row"] in names:
                    curve = agents.setdefault((line["row"], line["seed"]), {})
                    curve[int(line["env_steps"])] = float(line["return"])
            steps = sorted(set.intersection(*map(set, agents.values())))
            values = np.array([[curve[step] for step in steps] for curve in agents.values()])
            half = student.ppf(0.975, len(values) - 1) * values.std(axis=0, ddof=1)
            half = half / len(values) ** 0.5
            mean = values.mean(axis=0)
            axes.fill_between(steps, mean - half, mean + half, alpha=0.25)
            axes.plot(steps, mean, label=f"{label}, {len(values)} agents")
        axes.set(title=env_id, xlabel="environment steps", ylabel="return in training")
        axes.legend(fontsize=8)
    figure.savefig(RESULTS / "same.png", dpi=110)


def main(only: tuple[str, ...] = ()) -> None:
    """Draw all pictures, or some: maze, pole, lander, curves, same."""
    for picture in (maze, pole, lander, curves, same):
        if not only or picture.__name__ in only:
            picture()


if __name__ == "__main__":
    tyro.cli(main)

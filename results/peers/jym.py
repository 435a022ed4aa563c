"""Run one agent of jym's notebook dqn_cartpole.ipynb, and write what came of it.

Needs the packages of results/peers/packages.txt, and a clone with its patch:

    git clone https://github.com/RPegoud/jym DIR
    git -C DIR apply --unidiff-zero $PWD/results/peers/jym.patch

    PYTHON results/peers/jym.py --checkout DIR --seed 7000 --total-timesteps 20000 \\
        --output-dir runs/jym-7000 [--LEARNING_RATE 3e-4 --BATCH_SIZE 64 ...]

Writes summary.json and returns.csv. 20,000 steps take 2 s, after 15 s of importing and compiling.
Training is compiled ahead, as one function, and has no progress bar. Its CartPole has no time
limit, and an episode's last step gives no reward; returns.csv counts that step, as Gymnasium does.
"""

import json
import sys
from types import SimpleNamespace

import common
import jax
import numpy as np


def read_cells(path):
    """The code of the notebook's cells."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run_notebook(cells, settings):
    """Run the notebook through its training. Returns its variables, and the times."""
    # In place of the package: no progress bar.
    sys.modules["jax_tqdm"] = SimpleNamespace(loop_tqdm=lambda steps: lambda body: body)
    import jym  # the checkout's

    rollout = jym.deep_rl_rollout
    seconds = {}

    def compile_and_rollout(random_seed, buffer_state, **params):
        def train(random_seed, buffer_state):
            return rollout(random_seed=random_seed, buffer_state=buffer_state, **params)

        end, times = common.train_compiled(train, random_seed, buffer_state)
        seconds.update(times)
        return end

    jym.deep_rl_rollout = compile_and_rollout
    variables = {}
    for cell in cells:
        exec(cell, variables)
        if "RANDOM_SEED = " in cell:  # this cell sets what is in capital letters
            variables.update(settings)
        if "out" in variables:  # trained; what follows draws pictures
            return variables, seconds
    raise ValueError("the notebook did not train")


def find_episodes(ended):
    """Pairs of the step in which a training episode ended, and its return."""
    steps = np.flatnonzero(ended) + 1
    return zip(steps, np.diff(steps, prepend=0), strict=True)


def main():
    args, flags = common.parse_args(__doc__)
    version = common.checkout_version(args, "jym.patch")
    common.listen_to_jax()
    sys.path.insert(0, str(args.checkout))  # before this file's folder: this is a jym too
    settings = common.read_settings(flags)
    settings |= {"RANDOM_SEED": args.seed, "TIMESTEPS": args.total_timesteps}
    cells = read_cells(args.checkout / "notebooks" / "control" / "dqn_cartpole.ipynb")
    variables, seconds = run_notebook(cells, settings)
    params = variables["out"]["model_params"]

    @jax.jit
    def act(obs):
        return variables["model"].apply(params, None, obs).argmax(-1)

    returns = common.evaluate("CartPole-v1", act)
    common.write_returns(args, find_episodes(variables["out"]["all_done"]))
    settings = {name: variables[name] for name in variables if name.isupper()}
    del settings["DQN"]  # a class
    summary = {"peer": "jym", "peer_version": version, "args": settings}
    summary |= common.describe_machine("dm-haiku")
    # Without BUFFER_SIZE random steps before: what they store is never drawn.
    summary |= {"env_steps": args.total_timesteps, **seconds}
    common.write_summary(args, summary, returns)


if __name__ == "__main__":
    main()

"""Run one agent of PureJaxRL's dqn.py, and write what came of it.

Needs the packages of results/peers/packages.txt, and a clone with its patch. The patch also returns
the returns of each environment, where dqn.py takes their mean.

    git clone https://github.com/luchris429/purejaxrl DIR
    git -C DIR apply --unidiff-zero $PWD/results/peers/purejaxrl.patch

    PYTHON results/peers/purejaxrl.py --checkout DIR --seed 7000 --total-timesteps 500000 \\
        --output-dir runs/purejaxrl-7000 [--LR 1e-3 --NUM_ENVS 20 ...]

Writes summary.json and returns.csv. 500,000 steps take 10 s, after 15 s of importing and
compiling. Training is compiled ahead, as one function. In dqn.py the network and most random
numbers are drawn from PRNGKey(0), whatever the seed; the patch draws them from the seed.
"""

import ast
import runpy

import common
import jax
import numpy as np


def read_settings(path):
    """The settings of dqn.py: the one dictionary written out in it, a variable of its main()."""
    nodes = ast.walk(ast.parse(path.read_text()))
    values = [node.value for node in nodes if isinstance(node, ast.Assign)]
    return next(ast.literal_eval(x) for x in values if isinstance(x, ast.Dict))


def find_episodes(metrics, num_envs):
    """Pairs of the step in which a training episode ended, and its return."""
    t, n = np.nonzero(metrics["ended"])  # (T, N): joint steps, environments
    returns = np.asarray(metrics["returns"])[t, n]
    return zip((t + 1) * num_envs, returns, strict=True)


def main():
    args, flags = common.parse_args(__doc__)
    version = common.checkout_version(args, "purejaxrl.patch")
    common.listen_to_jax()
    path = args.checkout / "purejaxrl" / "dqn.py"
    settings = read_settings(path) | common.read_settings(flags)
    settings |= {"SEED": args.seed, "TOTAL_TIMESTEPS": args.total_timesteps}

    train = runpy.run_path(str(path))["make_train"](settings)
    key = jax.random.split(jax.random.PRNGKey(args.seed), 1)[0]  # as in its main()
    end, seconds = common.train_compiled(train, key)
    state = end["runner_state"][0]

    @jax.jit
    def act(obs):
        return state.apply_fn(state.params, obs).argmax(-1)

    returns = common.evaluate(settings["ENV_NAME"], act)
    num_envs = settings["NUM_ENVS"]
    common.write_returns(args, find_episodes(end["metrics"], num_envs))
    summary = {"peer": "PureJaxRL", "peer_version": version, "args": settings}
    summary |= common.describe_machine("flax", "gymnax", "flashbax")
    summary |= {"env_steps": settings["NUM_UPDATES"] * num_envs, **seconds}
    common.write_summary(args, summary, returns)


if __name__ == "__main__":
    main()

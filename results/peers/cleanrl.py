"""Run one agent of CleanRL's dqn_jax.py, and write what came of it.

Needs the packages of results/peers/packages.txt, and a clone with its patch:

    git clone https://github.com/vwxyzjn/cleanrl DIR
    git -C DIR apply --unidiff-zero $PWD/results/peers/cleanrl.patch

    PYTHON results/peers/cleanrl.py --checkout DIR --seed 7000 --total-timesteps 500000 \\
        --output-dir runs/cleanrl-7000 [--env-id LunarLander-v3 --learning-rate 1e-3 ...]

Writes summary.json and returns.csv, and CleanRL its own logs in runs/. 500,000 steps take two to
four minutes on one core. It compiles as it goes: what JAX reports for that is subtracted from the
training time.
"""

import os
import runpy
import sys
import time

import common


def read_log(folder):
    """Pairs of the step in which a training episode ended, and its return."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(folder, size_guidance={"scalars": 0})  # 0: keep all of them
    log.Reload()
    if "charts/episodic_return" not in log.Tags()["scalars"]:
        return []
    return [(x.step + 1, x.value) for x in log.Scalars("charts/episodic_return")]  # 0 is the first


def main():
    args, flags = common.parse_args(__doc__)
    version = common.checkout_version(args, "cleanrl.patch")
    common.listen_to_jax()
    sys.path.insert(0, str(args.checkout))  # dqn_jax.py imports cleanrl_utils
    sys.argv = ["dqn_jax.py", "--seed", str(args.seed), *flags]
    sys.argv += ["--total-timesteps", str(args.total_timesteps)]
    os.chdir(args.output_dir)  # it writes its logs in the working folder

    # The variables of dqn_jax.py after its last line.
    end = runpy.run_path(str(args.checkout / "cleanrl" / "dqn_jax.py"), run_name="__main__")
    seconds = time.time() - end["start_time"]
    seconds -= common.compile_seconds(since=end["start_time"])
    seconds = common.times(seconds)

    def act(obs):
        return end["q_network"].apply(end["q_state"].params, obs).argmax(-1)

    settings = vars(end["args"])
    returns = common.evaluate(settings["env_id"], act)
    common.write_returns(args, read_log(f"runs/{end['run_name']}"))
    summary = {"peer": "CleanRL", "peer_version": version, "args": settings}
    summary |= common.describe_machine("flax", "torch")
    summary |= {"env_steps": args.total_timesteps, **seconds}
    common.write_summary(args, summary, returns)


if __name__ == "__main__":
    main()

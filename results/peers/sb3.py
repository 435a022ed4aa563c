"""Run one agent of Stable-Baselines3's DQN, or of SBX's, and write what came of it.

Needs the packages of results/peers/packages.txt; a checkout isn't needed.

    PYTHON results/peers/sb3.py --peer sbx --env-id LunarLander-v3 --seed 7000 \\
        --total-timesteps 100000 --output-dir runs/sbx-7000 \\
        [--learning-rate 6.3e-4 --policy-kwargs "{'net_arch': [256, 256]}" ...]

Writes summary.json and returns.csv. 100,000 steps take 2 minutes with the default settings, and 4
(SBX) to 7 with an update of 256 + 256 units at every step. Without --peer sbx it is
Stable-Baselines3, which compiles nothing. SBX compiles as it goes: what JAX reports for that is
subtracted from the training time.
"""

import importlib
import inspect
import itertools
import time
from importlib.metadata import version

import common

PEERS = {  # package, module and other packages
    "sb3": ("stable-baselines3", "stable_baselines3", ["torch"]),
    "sbx": ("sbx-rl", "sbx", ["stable-baselines3", "torch", "flax"]),
}


def main():
    parser = common.make_parser(__doc__)
    parser.add_argument("--peer", choices=PEERS, default="sb3")
    parser.add_argument("--env-id", default="CartPole-v1")
    args, flags = parser.parse_known_args()
    common.make_output_dir(args)
    package, module, others = PEERS[args.peer]
    if args.peer == "sbx":
        common.listen_to_jax()
    DQN = importlib.import_module(module).DQN
    given = {"policy": "MlpPolicy", "env": args.env_id, "seed": args.seed, "device": "cpu"}
    given |= common.read_settings(flags)

    model = DQN(**given)
    start = time.time()
    model.learn(args.total_timesteps)
    seconds = time.time() - start
    seconds = common.times(seconds - common.compile_seconds(since=start))

    def act(obs):
        return model.predict(obs, deterministic=True)[0]

    returns = common.evaluate(args.env_id, act)
    # Stable-Baselines3 itself puts a Monitor around the environment.
    lengths = model.get_env().env_method("get_episode_lengths")[0]
    episode_returns = model.get_env().env_method("get_episode_rewards")[0]
    episodes = zip(itertools.accumulate(lengths), episode_returns, strict=True)
    common.write_returns(args, episodes)

    settings = {name: x.default for name, x in inspect.signature(DQN).parameters.items()}
    del settings["_init_setup_model"]
    settings |= given | {"total_timesteps": args.total_timesteps}
    summary = {"peer": package, "peer_version": version(package), "args": settings}
    summary |= common.describe_machine(*others)
    summary |= {"env_steps": model.num_timesteps, **seconds}
    common.write_summary(args, summary, returns)


if __name__ == "__main__":
    main()

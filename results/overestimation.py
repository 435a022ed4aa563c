"""How far Q is too high in InvertedPendulum-v5: python results/overestimation.py [--runs DIR]

Each step pays 1, so no sum of discounted rewards is larger than 1 / (1 - gamma) = 50. Prints the
largest Q of a cart and pole at rest (four zeros), divided by 50, for ten agents with Double DQN and
ten without, and writes results/overestimation.csv. It takes a second, and reads the models that

    python results/measure.py --only "InvertedPendulum, defaults" "no Double DQN"

leaves in runs/measure.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from dqn_pendulum_discretized import Args, load_model, q_values  # noqa: E402

FOUND = ROOT / "results" / "overestimation.csv"
ROWS = "InvertedPendulum, defaults", "InvertedPendulum, switch, no Double DQN"
SEEDS = range(6500, 6510)


def main(runs: Path = ROOT / "runs" / "measure") -> None:
    at_rest = np.zeros((1, 4), np.float32)
    most = 1 / (1 - Args().gamma)
    lines = []
    for row in ROWS:
        for seed in SEEDS:
            params = load_model(runs / f"{row}, {seed}" / "model.npz")
            lines.append((row, seed, round(float(q_values(params, at_rest).max() / most), 4)))
        print(row, np.mean([times for _, _, times in lines[-len(SEEDS) :]]))
    with FOUND.open("w", newline="") as file:
        csv.writer(file).writerows([("row", "seed", "times"), *lines])


if __name__ == "__main__":
    tyro.cli(main)

"""The best return that five torques allow on Pendulum-v1: python tests/pendulum_optimum.py [--num-bins N] [--episodes N]

Dynamic programming over a grid of angles and velocities, backward over the 200 steps, interpolating between its points
(equations: https://gymnasium.farama.org/environments/classic_control/pendulum/). Then the best actions are played in Gymnasium.
"""

import sys
from pathlib import Path

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dqn_pendulum_discretized import Args, make_torques  # noqa: E402

STEPS, ANGLES, SPEEDS, MAX_SPEED = 200, 600, 401, 8.0


def successor(angle, speed, torque):
    """The next angle and speed, and the reward of this step."""
    centered = (angle + np.pi) % (2 * np.pi) - np.pi
    reward = -(centered**2 + 0.1 * speed**2 + 0.001 * torque**2)
    speed = jnp.clip(speed + 0.05 * (15 * jnp.sin(angle) + 3 * torque), -MAX_SPEED, MAX_SPEED)
    return angle + 0.05 * speed, speed, reward


def returns_to_go(values, angle, speed, torques):
    """Reward plus value of every torque, (..., A), where values (ANGLES, SPEEDS) are those of the next step."""
    angle, speed, reward = successor(angle[..., None], speed[..., None], torques)
    row = angle % (2 * np.pi) / (2 * np.pi) * ANGLES
    column = (speed + MAX_SPEED) / (2 * MAX_SPEED) * (SPEEDS - 1)
    return reward + jax.scipy.ndimage.map_coordinates(values, [row, column], order=1, mode="wrap")


def main(num_bins: int = 5, episodes: int = 1000) -> None:
    env = gymnasium.make("Pendulum-v1")
    torques = make_torques(Args(num_bins=num_bins), env)
    angles = np.arange(ANGLES, dtype=np.float32) * 2 * np.pi / ANGLES
    grid = np.meshgrid(
        angles, np.linspace(-MAX_SPEED, MAX_SPEED, SPEEDS, dtype=np.float32), indexing="ij"
    )

    def backward(values, _):
        return returns_to_go(values, *grid, torques).max(axis=-1), values

    _, values = jax.lax.scan(backward, jnp.zeros((ANGLES, SPEEDS)), length=STEPS)
    best = jax.jit(
        lambda values, angle, speed: returns_to_go(values, angle, speed, torques).argmax()
    )
    totals = []  # from the starts that dqn_pendulum_discretized.py gives the seeds 5900 to 5909
    for seed in range(2**30 + 100 * 5900, 2**30 + 100 * 5900 + episodes):
        env.reset(seed=seed)
        totals.append(0.0)
        for t in range(STEPS):
            angle, speed = env.unwrapped.state
            _, reward, *_ = env.step(
                torques[
                    int(best(values[STEPS - 1 - t], np.asarray(angle), np.asarray(speed))), None
                ]
            )
            totals[-1] += reward
    print(
        f"{num_bins} torques: mean {np.mean(totals):.1f} over {episodes} starts, standard deviation {np.std(totals):.1f}"
    )


if __name__ == "__main__":
    tyro.cli(main)

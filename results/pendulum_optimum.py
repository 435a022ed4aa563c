"""The best return that a few actions allow on Pendulum-v1.

python results/pendulum_optimum.py [--num-actions N] [--episodes N] [--seed N]

Dynamic programming over a grid of angles and velocities, backward over the 200 steps,
interpolating between its points (equations:
https://gymnasium.farama.org/environments/classic_control/pendulum/). Then the best actions are
played in Gymnasium, from the starts of the agents' greedy episodes.
"""

import sys
from pathlib import Path

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dqn_pendulum_discretized import Args, list_actions  # noqa: E402

STEPS = 200
ANGLES = 600
SPEEDS = 401
MAX_SPEED = 8.0


def successor(angle, speed, action):
    """The next angle and speed, and the reward of this step."""
    centered = (angle + np.pi) % (2 * np.pi) - np.pi
    reward = -(centered**2 + 0.1 * speed**2 + 0.001 * action**2)
    speed = jnp.clip(speed + 0.05 * (15 * jnp.sin(angle) + 3 * action), -MAX_SPEED, MAX_SPEED)
    return angle + 0.05 * speed, speed, reward


def returns_to_go(values, angle, speed, actions):
    """Reward plus value of every action (..., A), from the next step's values (ANGLES, SPEEDS)."""
    angle, speed, reward = successor(angle[..., None], speed[..., None], actions)
    row = angle % (2 * np.pi) / (2 * np.pi) * ANGLES
    column = (speed + MAX_SPEED) / (2 * MAX_SPEED) * (SPEEDS - 1)
    return reward + jax.scipy.ndimage.map_coordinates(values, [row, column], order=1, mode="wrap")


def main(num_actions: int = 5, episodes: int = 1000, seed: int = 6100) -> None:
    """Print the mean return over the starts that agents from this seed on have, 100 each."""
    env = gymnasium.make("Pendulum-v1")
    actions = list_actions(Args(num_actions=num_actions), env)
    angles = np.arange(ANGLES, dtype=np.float32) * 2 * np.pi / ANGLES
    speeds = np.linspace(-MAX_SPEED, MAX_SPEED, SPEEDS, dtype=np.float32)
    grid = np.meshgrid(angles, speeds, indexing="ij")

    def backward(values, _):
        return returns_to_go(values, *grid, actions).max(axis=-1), values

    @jax.jit
    def best(values, angle, speed):
        return returns_to_go(values, angle, speed, actions).argmax()

    _, values = jax.lax.scan(backward, jnp.zeros((ANGLES, SPEEDS)), length=STEPS)
    totals = np.zeros(episodes)
    first = 2**30 + 100 * seed
    for episode in range(episodes):
        env.reset(seed=first + episode)
        for t in range(STEPS):
            angle, speed = map(np.asarray, env.unwrapped.state)
            action = int(best(values[STEPS - 1 - t], angle, speed))
            _, reward, *_ = env.step(actions[action, None])
            totals[episode] += reward
    print(f"{num_actions} actions: mean {totals.mean():.1f} over {episodes} starts", end=", ")
    print(f"standard deviation {totals.std():.1f}")


if __name__ == "__main__":
    tyro.cli(main)

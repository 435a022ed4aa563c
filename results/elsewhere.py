"""Two of Gymnasium's environments with other settings: elsewhere:Lake-v0, elsewhere:Cliff-v0."""

import gymnasium

TOYS = "gymnasium.envs.toy_text"
NOT_SLIPPERY = {"map_name": "8x8", "is_slippery": False}
gymnasium.register(
    "Lake-v0", f"{TOYS}.frozen_lake:FrozenLakeEnv", kwargs=NOT_SLIPPERY, max_episode_steps=200
)
gymnasium.register("Cliff-v0", f"{TOYS}.cliffwalking:CliffWalkingEnv", max_episode_steps=200)

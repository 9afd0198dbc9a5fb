"""Evaluation: whole episodes from given seeds, each counted once, and the score made of their returns."""

from math import nan

import gymnasium as gym
import numpy as np
import pytest

from dmg_offline import Args, evaluate, normalized_score


class SeedEnv(gym.Env):
    """After reset(seed) it has seed % 17 + 1 steps. Reward 1 if the action fits its own observation."""

    def observe(self):
        return np.array([np.sin(31 * self.length + self.t)], np.float32)

    def reset(self, *, seed=None, options=None):
        self.t, self.length = 0, seed % 17 + 1
        return self.observe(), {}

    def step(self, action):
        right, self.t = float(action[0] == self.observe()[0] / 2), self.t + 1
        ends = [self.t == self.length and self.length % 2 == k for k in (0, 1)]
        return self.observe(), right if self.t <= self.length else 1000.0, *ends, {}


@pytest.mark.parametrize("episodes", [1, 9, 34])
def test_each_episode_from_its_seed_counts_once_however_long(episodes):
    envs = [SeedEnv() for _ in range(episodes)]
    for _ in range(2):  # what an evaluation leaves behind does not touch the next
        for found in evaluate(lambda s: s / 2, envs, 5):
            np.testing.assert_array_equal(found, (5 + np.arange(episodes)) % 17 + 1)


@pytest.mark.parametrize("env_id, raw, score", [
    ("halfcheetah-medium-v2", 5927.4105235, 50), ("hopper-full-replay-v2", -20.272305, 0),
    ("walker2d-medium-expert-v2", 2296.964504, 50), ("antmaze-large-diverse-v2", 0.25, 25),
    ("gymnasium_robotics:AntMaze_Large-v5", 1, 100), ("Hopper-v4", 3234.3, nan),
])  # fmt: skip
def test_d4rls_references_are_for_d4rls_names_only(env_id, raw, score, hopper_file):
    assert normalized_score(Args(env_id, hopper_file), raw) == pytest.approx(score, abs=1e-9, nan_ok=True)

"""Evaluation: whole episodes from given seeds, each counted once, and the score made of their returns."""

import json

import gymnasium as gym
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer

from dmg_offline import Args, evaluate, normalized_score


class SeedEnv(gym.Env):
    """An episode from reset(seed) has seed % 17 + 1 steps; all that follows it pays 1000.
    The reward of a step is 1 if the action is the one for its own observation.
    """

    observation_space = action_space = gym.spaces.Box(-1, 1, (1,))

    def observe(self):
        return np.array([np.sin(31 * self.length + self.t)], np.float32)

    def reset(self, *, seed=None, options=None):
        self.t, self.length, self.reward = 0, *((4, 1000) if seed is None else (seed % 17 + 1, 1))
        return self.observe(), {}

    def step(self, action):
        right = action == self.observe() / 2
        self.t += 1
        over, odd = self.t == self.length, self.length % 2 == 1
        return self.observe(), self.reward * float(right.all()), over and not odd, over and odd, {}


@pytest.mark.parametrize("episodes", [1, 9, 34])
def test_each_episode_from_its_seed_counts_once_however_long(episodes):
    envs = [SeedEnv() for _ in range(episodes)]
    expected = (5 + np.arange(episodes)) % 17 + 1
    for _ in range(2):  # what an evaluation leaves behind does not touch the next
        returns, lengths = evaluate(lambda s: s / 2, envs, 5)
        np.testing.assert_array_equal(returns, expected)
        np.testing.assert_array_equal(lengths, expected)


@pytest.mark.parametrize("env_id, raw, score", [
    ("halfcheetah-medium-v2", 5927.4105235, 50), ("hopper-full-replay-v2", -20.272305, 0),
    ("walker2d-medium-expert-v2", 2296.964504, 50), ("antmaze-large-diverse-v2", 0.25, 25),
    ("AntMaze_Large-v5", 1, 100), ("Hopper-v4", 3234.3, None),
])  # fmt: skip
def test_d4rls_references_are_for_d4rls_names_only(env_id, raw, score):
    found = normalized_score(Args(env_id=env_id, dataset_path="own.hdf5"), raw)
    assert found is None if score is None else found == pytest.approx(score, abs=1e-9)


@pytest.mark.filterwarnings("ignore:.*(is set to None|env_spec is None)")  # Minari asks for an author
@pytest.mark.parametrize("env_id, raw, score, references", [
    ("Pendulum-v1", -400, 75, {"ref_min_score": -1000, "ref_max_score": -200}),
    ("Hopper-v5", 1607.0138475, None, {}),
    ("Pendulum-v1", -400, None, {"ref_min_score": None, "ref_max_score": -200}),
    ("Pendulum-v1", -400, None, {"ref_min_score": -1000, "ref_max_score": None}),
])  # fmt: skip
def test_a_minari_dataset_has_its_own_references(env_id, raw, score, references, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env, dataset_id = gym.make(env_id), "test/own-v0"
    zero = np.zeros(env.action_space.shape, env.action_space.dtype)
    observations, over = [env.reset(seed=0)[0], env.step(zero)[0]], {"terminations": [0], "truncations": [1]}
    episode = EpisodeBuffer(observations=observations, actions=zero[None], rewards=[0.0], **over)
    minari.create_dataset_from_buffers(dataset_id, [episode], env=env_id)
    path = tmp_path / dataset_id / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | references))
    found = normalized_score(Args(env_id=dataset_id), raw)
    assert found is None if score is None else found == pytest.approx(score, rel=1e-9)

"""Evaluation: whole episodes from given seeds, each counted once, and the score made of their returns."""

import gymnasium as gym
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer

from dmg_offline import Args, evaluate, make_env, normalized_score


# ---- evaluate ----
def act(observations):
    return observations[:, 2:5].clip(-1, 1)  # element by element: batches of 1 and 10 give the same bits


def hopper():
    return make_env(Args(env_id="Hopper-v4", dataset_path="own.hdf5"))


@pytest.fixture(scope="module")
def alone():
    """Return and length of each episode played by itself after reset(seed=100), reset(seed=101), ..."""
    env, result = hopper(), []
    for seed in range(100, 107):
        observation, _ = env.reset(seed=seed)
        rewards, over = [], False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(act(observation[None])[0])
            rewards.append(reward)
            over = terminated or truncated
        result.append((sum(rewards), len(rewards)))
    assert len({length for _, length in result}) > 2 and max(length for _, length in result) < 1000
    return np.array(result).T


@pytest.mark.parametrize("num_envs, episodes", [(1, 3), (3, 3), (3, 7), (5, 2)])
def test_episodes_are_those_played_alone(alone, num_envs, episodes):
    envs = [hopper() for _ in range(num_envs)]
    for _ in range(2):  # what an evaluation leaves behind does not touch the next
        returns, lengths = evaluate(act, envs, episodes, 100)
        np.testing.assert_array_equal(returns, alone[0, :episodes])
        np.testing.assert_array_equal(lengths, alone[1, :episodes])


class SeedEnv(gym.Env):
    """An episode from reset(seed) has seed % 17 + 1 steps of reward 1; all that follows it pays 1000."""

    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        self.t, self.length, self.reward = 0, *((4, 1000) if seed is None else (seed % 17 + 1, 1))
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        over, odd = self.t == self.length, self.length % 2 == 1
        return np.zeros(1, np.float32), self.reward, over and not odd, over and odd, {}


@pytest.mark.parametrize("num_envs, episodes", [(1, 9), (2, 34), (10, 1), (10, 10), (10, 100)])
def test_long_episodes_count_as_much_as_short_ones(num_envs, episodes):
    envs = [SeedEnv() for _ in range(num_envs)]
    returns, lengths = evaluate(lambda s: np.zeros((len(s), 1)), envs, episodes, 5)
    expected = (5 + np.arange(episodes)) % 17 + 1
    np.testing.assert_array_equal(returns, expected)
    np.testing.assert_array_equal(lengths, expected)


# ---- normalized_score ----
@pytest.mark.parametrize(
    "env_id, raw, score",
    [
        ("halfcheetah-medium-v2", 5927.4105235, 50),
        ("halfcheetah-random-v2", -280.178953, 0),
        ("hopper-medium-replay-v2", 3234.3, 100),
        ("hopper-full-replay-v2", -20.272305, 0),
        ("hopper-expert-v2", 1607.0138475, 50),
        ("walker2d-medium-expert-v2", 2296.964504, 50),
        ("walker2d-medium-v2", -4589.041984, -100),
        ("antmaze-umaze-v2", 1, 100),
        ("antmaze-large-diverse-v2", 0.25, 25),
        ("AntMaze_Large-v5", 1, 100),
        ("HalfCheetah-v5", 12135.0, None),
        ("Hopper-v4", 3234.3, None),
        ("Pendulum-v1", -123.5, None),
    ],
)
def test_d4rls_references_are_for_d4rls_names_only(env_id, raw, score):
    found = normalized_score(Args(env_id=env_id, dataset_path="own.hdf5"), raw)
    assert found is None if score is None else found == pytest.approx(score, abs=1e-9)


@pytest.mark.filterwarnings("ignore:.*(is set to None|env_spec is None)")  # Minari asks for an author
@pytest.mark.parametrize(
    "env_id, references, raw, score",
    [
        ("Pendulum-v1", {"ref_min_score": -1000, "ref_max_score": -200}, -400, 75),
        ("Hopper-v5", {"ref_min_score": 10, "ref_max_score": 110}, 35, 25),
        ("Hopper-v5", {}, 1607.0138475, None),
        ("Pendulum-v1", {"ref_max_score": -200}, -400, None),
        ("Pendulum-v1", {"ref_min_score": -200}, -400, None),
    ],
)
def test_a_minari_dataset_has_its_own_references(env_id, references, raw, score, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env, dataset_id = gym.make(env_id), "test/own-v0"
    zero = np.zeros(env.action_space.shape, env.action_space.dtype)
    observations, over = (
        [env.reset(seed=0)[0], env.step(zero)[0]],
        {"terminations": [False], "truncations": [True]},
    )
    episode = EpisodeBuffer(observations=observations, actions=zero[None], rewards=[0.0], **over)
    minari.create_dataset_from_buffers(dataset_id, [episode], env=env_id, **references)
    found = normalized_score(Args(env_id=dataset_id), raw)
    assert found is None if score is None else found == pytest.approx(score, rel=1e-9)

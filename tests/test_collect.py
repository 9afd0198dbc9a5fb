"""benchmark/collect.py: the saved agent acts, in episodes of its own, and every script can read the set."""

import subprocess
import sys
from pathlib import Path

import collect
import gymnasium as gym
import minari
import numpy as np
import pytest
import torch

import dmg_finetune
import dmg_offline

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def td3(tmp_path_factory):
    """The run folder of a TD3 on short episodes that has hardly learnt: its actions are far from their bounds."""
    folder = tmp_path_factory.mktemp("collect")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MINARI_DATASETS_PATH", str(folder / "minari"))
        patched.chdir(folder)
        flags = "--env-id Hopper-v5 --from-scratch --online-steps 120 --learning-starts 60 --eval-episodes 1 --no-cuda"
        command = [
            sys.executable,
            str(REPOSITORY / "dmg_finetune.py"),
            *flags.split(),
            "--batch-size",
            "16",
            "--learning-rate",
            "1e-5",
        ]
        subprocess.run(command, check=True, capture_output=True)
        (run,) = Path("runs").iterdir()
        yield folder / run


def rollouts(td3, name, **settings):
    collect.collect(collect.Args(run=str(td3), dataset_id=name, transitions=250, **settings))
    return minari.load_dataset(name)


def actor(td3, observations):
    agent = dmg_finetune.Agent(11, 3, dmg_finetune.Args())
    agent.load_state_dict(dmg_finetune.load_checkpoint(str(td3))["agent"])
    with torch.no_grad():
        return agent.actor(torch.from_numpy(observations)).numpy()


def test_without_noise_the_actions_are_the_agents_and_the_environment_answers_them(td3):
    episodes = list(rollouts(td3, "my/hopper/greedy-v0", noise=0).iterate_episodes())
    assert sum(len(episode) for episode in episodes) == 250 and len(episodes) > 1
    for episode in episodes:
        np.testing.assert_allclose(episode.actions, actor(td3, episode.observations[:-1]), rtol=0, atol=1e-6)
    env = gym.make("Hopper-v5")
    starts = [10_000_000 * 101 + number for number in range(len(episodes))]
    for seed, episode in zip(starts, episodes, strict=True):
        s = [env.reset(seed=seed)[0]]
        r, ends = [], []
        for action in episode.actions:
            observation, reward, terminated, _, _ = env.step(action)
            s.append(observation), r.append(reward), ends.append(terminated)
        np.testing.assert_allclose(episode.observations, s, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(episode.rewards, r, rtol=1e-5, atol=1e-5)
        assert np.array_equal(episode.terminations, ends)
    assert [bool(episode.terminations[-1]) for episode in episodes[:-1]] == [True] * (len(episodes) - 1)


def test_the_noise_has_its_size_and_its_seed(td3):
    sets = {}
    for name, settings in {"a": {}, "again": {}, "other": {"seed": 7}, "wide": {"noise": 0.3}}.items():
        episodes = list(rollouts(td3, f"my/hopper/{name}-v0", **settings).iterate_episodes())
        s = np.concatenate([episode.observations[:-1] for episode in episodes])
        sets[name] = np.concatenate([episode.actions for episode in episodes]), s
    for name, size in (("a", 0.1), ("wide", 0.3)):
        a, s = sets[name]
        inside = np.abs(actor(td3, s)) < 0.5
        noise = (a - actor(td3, s))[inside]
        assert len(noise) > 50 and abs(noise.std() / size - 1) < 0.25 and abs(noise.mean()) < size / 3
        assert np.abs(a).max() <= 1
    assert all(np.array_equal(x, y) for x, y in zip(sets["a"], sets["again"], strict=True))
    assert not np.array_equal(sets["a"][0][:5], sets["other"][0][:5])


def test_dmg_offline_trains_on_the_set_and_finds_its_references_there(td3):
    metadata = rollouts(td3, "my/hopper/medium-v0").storage.metadata
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (-20.272305, 3234.3)
    args = dmg_offline.resolve(dmg_offline.Args(env_id="my/hopper/medium-v0", gradient_steps=4, eval_episodes=1))
    dmg_offline.train(args)
    (path,) = Path("runs").glob("my-hopper-medium-v0__dmg_offline__*/eval.csv")
    step, mean, *_ = path.read_text().splitlines()[-1].split(",")
    score = dmg_offline.normalized_score(args, dmg_offline.open_minari(args), np.array([float(mean)]))
    assert step == "4" and score == pytest.approx(100 * (float(mean) + 20.272305) / (3234.3 + 20.272305))


@pytest.mark.parametrize(
    "argv, word",
    [
        ("RUN my/taken-v0", "exists already"),
        ("RUN nonsense", "not a Minari id"),
        ("runs/none my/new-v0", "runs/none"),
        ("RUN my/new-v0 --transitions 0", "--transitions 0"),
        ("RUN my/new-v0 --transitions 1000000000000000", "1,000,000,000,000,000"),
        ("RUN my/new-v0 --noise -1", "--noise -1"),
        ("RUN my/new-v0 --noise inf", "--noise inf"),
        ("RUN my/new-v0 --seed -1", "--seed -1"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_writes_nothing(td3, argv, word):
    root = td3.parent.parent / "minari"
    (root / "my/taken-v0/data").mkdir(parents=True, exist_ok=True)
    before = sorted(root.rglob("*"))
    command = [sys.executable, str(REPOSITORY / "benchmark/collect.py"), *argv.replace("RUN", str(td3)).split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and word in done.stderr and len(done.stderr.splitlines()) == 1
    assert sorted(root.rglob("*")) == before

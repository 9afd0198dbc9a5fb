"""benchmark/collect.py: a saved agent acts, or its online transitions are kept; scripts read the sets."""

import collect
import gymnasium as gym
import gymnasium_robotics  # noqa: F401  registers AntMaze
import minari
import numpy as np
import pytest
from conftest import d4rl_arrays, load_checkpoint, refusal, run, write_hdf5

import dmg_finetune
import dmg_offline
import td3bc

TINY = {"eval_episodes": 1, "batch_size": 16, "cuda": False}


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A folder of Minari sets and runs of this file's own."""
    folder = tmp_path_factory.mktemp("collect")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MINARI_DATASETS_PATH", str(folder / "minari"))
        patched.chdir(folder)
        yield folder


def wide():
    """Hopper with actions from -2 to 6."""
    return gym.wrappers.RescaleAction(gym.make("Hopper-v5").unwrapped, np.float32(-2), np.float32(6))


@pytest.fixture(scope="module")
def td3(place):
    """A TD3 on Hopper that has hardly learnt: short episodes, actions far from their bounds."""
    flags = {"from_scratch": True, "online_steps": 120, "learning_starts": 60, "learning_rate": 1e-5}
    return run(env_id="Hopper-v5", **TINY, **flags)


def episodes_of(run, name, **flags):
    collect.collect(collect.Args(str(run), name, **flags))
    return list(minari.load_dataset(name))


def check(episodes, env, first_seed):
    """The environment gives the recorded rows again; each whole episode ends as it did there."""
    assert len(episodes) > 1
    for number, episode in enumerate(episodes):
        first, _ = env.reset(seed=first_seed + number)
        s, rewards, terminated, _, _ = zip(*map(env.step, episode.actions), strict=True)
        np.testing.assert_allclose(episode.observations, [first, *s], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(episode.rewards, rewards, rtol=1e-4, atol=1e-4)
        assert episode.terminations.tolist() == list(terminated)
        assert not episode.truncations[:-1].any()
        assert episode.truncations[-1] != episode.terminations[-1]


def test_without_noise_the_actions_are_the_agents(td3):
    agent = dmg_finetune.Agent(11, 3, dmg_finetune.read_args(td3))
    agent.load_state_dict(load_checkpoint(td3)["agent"])
    for noise, least, most in ((0, 0, 1e-5), (0.3, 0.2, 0.35)):
        episodes = episodes_of(td3, f"my/hopper/noise{noise > 0:d}-v0", transitions=150, noise=noise)
        check(episodes, gym.make("Hopper-v5"), 10_000_000 * 101)
        a = np.concatenate([episode.actions for episode in episodes])
        s = np.concatenate([episode.observations[:-1] for episode in episodes])
        assert least <= np.std(a - agent.act(s)) <= most and np.abs(a).max() <= 1 and len(a) == 150


def test_the_replay_is_the_run(td3):
    """Seeds, actions, rewards and ends of training, and D4RL's references, which score the next run."""
    episodes = episodes_of(td3, "my/hopper/replay-v0", replay=True)
    check(episodes, gym.make("Hopper-v5"), 10_000_000)
    online = load_checkpoint(td3)["online"]
    assert sum(map(len, episodes)) == 120 and len(episodes) - online["episodes"] in (0, 1)
    rewards = np.concatenate([episode.rewards for episode in episodes])
    np.testing.assert_allclose(rewards, online["rows"][2], rtol=1e-4)
    offline = run(dmg_offline, **TINY, env_id="my/hopper/replay-v0", gradient_steps=4)
    mean, _, score, _ = map(float, (offline / "eval.csv").read_text().split()[-1].split(",")[1:])
    assert score == pytest.approx(100 * (mean + 20.272305) / (3234.3 + 20.272305))
    assert len(episodes_of(offline, "my/hopper/by-offline-v0", transitions=30)) > 0


def test_behind_a_normalized_dataset_the_replay_has_the_environments_units(place):
    """Behind an own HDF5 file: raw states, without the file's rows, actions from -2 to 6."""
    gym.register("Wide-v0", "test_collect:wide", max_episode_steps=20)
    arrays = d4rl_arrays()
    file = write_hdf5("wide.hdf5", arrays | {"actions": 4 * arrays["actions"] + 2})
    flags = TINY | {"env_id": "Wide-v0", "dataset_path": file}
    flags |= {"offline_steps": 4, "online_steps": 90, "learning_starts": 60}
    episodes = episodes_of(run(**flags), "my/wide/replay-v0", replay=True)
    check(episodes, gym.make("Wide-v0"), 10_000_000)
    actions = np.concatenate([episode.actions for episode in episodes])
    assert len(actions) == 90 and actions.min() < 0 and actions.max() > 3
    assert "my-wide-replay-v0" in run(td3bc, **TINY, env_id="my/wide/replay-v0", gradient_steps=4).name


def test_antmaze_has_its_rewards_and_nested_observations_back(place, monkeypatch):
    flags = {"env_id": "AntMaze_UMaze-v5", "from_scratch": True, "online_steps": 40, "learning_starts": 39}
    monkeypatch.setattr(dmg_finetune, "evaluate", lambda *_: (np.zeros(1), np.ones(1)))  # it is slow
    folder = run(**TINY, **flags)
    (episode,) = episodes_of(folder, "my/antmaze/replay-v0", replay=True)
    assert set(load_checkpoint(folder)["online"]["rows"][2].tolist()) == {-1.0}
    assert set(episode.rewards) == {0.0}
    lengths = {name: len(x) for name, x in episode.observations.items()}
    assert lengths == {"achieved_goal": 41, "desired_goal": 41, "observation": 41}
    for name in [name for name in gym.registry if "AntMaze" in name]:
        monkeypatch.delitem(gym.registry, name)  # as in a new process
    monkeypatch.delitem(collect.sys.modules, "gymnasium_robotics")
    assert {*dmg_offline.load_dataset(dmg_offline.Args(env_id="my/antmaze/replay-v0"))[2].tolist()} == {-1.0}


def test_what_cannot_be_done_is_said_and_writes_nothing(td3, place, capsys):
    (place / "minari/my/taken-v0").mkdir(parents=True)
    (place / "args.json").write_text('{"lam": 0.25}')
    before = sorted((place / "minari").rglob("*"))
    assert "exists" in refusal(collect.collect, collect.Args(str(td3), "my/taken-v0"))
    assert "has no version" in refusal(collect.collect, collect.Args(str(td3), "my/new"))
    args = collect.Args(str(place), "my/new-v0", replay=True)
    assert "of dmg_offline.py" in refusal(collect.collect, args)
    assert "a copy or another version of dmg_offline.py" in capsys.readouterr().out
    with pytest.raises(OSError, match="nowhere"):
        collect.collect(collect.Args("nowhere", "my/new-v0"))
    assert sorted((place / "minari").rglob("*")) == before

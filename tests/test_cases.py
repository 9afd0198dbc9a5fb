"""Odd inputs of users, each with what is right: trained on as it was meant, or refused with the reason."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from conftest import d4rl_arrays, refusal, run, write_hdf5
from gymnasium import wrappers
from gymnasium.spaces import Box, Dict, MultiBinary, Tuple
from gymnasium.vector.utils import concatenate, create_empty_array
from minari.data_collector import EpisodeBuffer

import dmg_offline
from dmg_offline import Args, evaluate, load_dataset, main, make_env, normalized_score

pytestmark = pytest.mark.filterwarnings("ignore:.*(set to None|env_spec is None|recision low|are equal)")
SHORT = {"gradient_steps": 2, "eval_frequency": 2, "eval_episodes": 1, "batch_size": 8, "cuda": False}
X, G = Box(-9, 9, (2,)), Box(-9, 9, (1,))
SEEN = {"vector": X, "dict": Dict(pos=X, Text=G), "tuple": Tuple((X, G)), "bits": Dict(x=X, b=MultiBinary(2))}
TAKEN = {"int": Box(0, 10, (1,), np.int64), "huge": Box(-1e38, 1e38, (1,)), "wide": Box(-1e6, 1e6, (1,))}
TAKEN |= {"locked": Box(0, 0, (1,)), "double": Box(-1, 1, (1,), np.float64), "nested": Dict(a=G)}


class Point(gym.Env):
    """A point that walks; `kind` says what it shows or what actions it takes."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, kind="vector", render_mode=None):
        self.render_mode, self.observation_space = render_mode, SEEN.get(kind, X)
        self.action_space = TAKEN.get(kind, Box(-1, 1, (1,)))

    def observe(self):
        flat = np.ones(gym.spaces.flatdim(self.observation_space), np.float32)
        flat[:2], flat[2:-1] = self.x, 0
        return gym.spaces.unflatten(self.observation_space, flat)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1, 1, 2)
        return self.observe(), {}

    def step(self, action):
        self.x = self.x + 0.1 * action
        return self.observe(), -float(np.abs(self.x).sum()), False, False, {}

    def render(self):
        return np.zeros((32, 32, 3), np.uint8)


def shifted(env=None):
    """Pendulum with actions in [-1, 3]; also an entry point, that of a wrapper, and without a render_mode."""
    return wrappers.RescaleAction(env or gym.make("Pendulum-v1").unwrapped, -1.0, 3.0)


for kind in SEEN | TAKEN:
    gym.register(f"Point_{kind}-v0", f"{__name__}:Point", kwargs={"kind": kind}, max_episode_steps=50)
gym.register("Shifted-v0", f"{__name__}:shifted", max_episode_steps=200)
HARM = {"entry_point": "harm:Env"}
ACTIONS = np.random.default_rng(0).uniform(-1, 1, (12, 1)).astype(np.float32)


def play(env, actions):
    """Observations and rewards of an episode from reset(seed=0) with these actions."""
    first, _ = env.reset(seed=0)
    observations, rewards, *_ = zip(*map(env.step, actions), strict=True)
    return [first, *observations], list(rewards)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """store(env) records an episode as a Minari set; `seen` changes what it saw, `edit` its metadata."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "sets"))
    dmg_offline.open_minari.cache_clear()

    def go(env, actions=ACTIONS, env_id="my/set-v0", kept=True, count=1, seen=lambda x: x, edit=None, **how):
        (observations, rewards), last = play(env, actions), np.arange(len(actions)) == len(actions) - 1
        space, ends = env.observation_space, {"terminations": 0 * last, "truncations": last}
        stacked = seen(concatenate(space, observations, create_empty_array(space, len(observations))))
        episode = EpisodeBuffer(observations=stacked, actions=actions, rewards=rewards, **ends)
        minari.create_dataset_from_buffers(env_id, [episode] * count, env=env if kept else None, **how)
        if edit:
            path = tmp_path / "sets" / env_id / "data" / "metadata.json"
            edit(metadata := json.loads(path.read_text()), spec := json.loads(metadata["env_spec"]))
            path.write_text(json.dumps(metadata | {"env_spec": json.dumps(spec)}))
        return Args(env_id, **SHORT)

    return go


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    """The arguments of a short run on random rows of Point's shapes."""
    monkeypatch.chdir(tmp_path)
    path = write_hdf5("x.hdf5", d4rl_arrays(60, 2, 1))
    return lambda kind="vector", **how: Args(f"Point_{kind}-v0", path, **SHORT | how)


@pytest.mark.parametrize("kind", ["wrapper in the set", "wrapped entry point"])
def test_rescaled_actions_are_those_of_the_plainly_stored_set(store, kind):
    plain = store(gym.make("Pendulum-v1"), 2 * ACTIONS, "my/plain-v0")
    env = shifted(gym.make("Pendulum-v1")) if "set" in kind else gym.make("Shifted-v0")
    other = store(env, 2 * ACTIONS + 1)
    for x, y in zip(load_dataset(plain), load_dataset(other), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    np.testing.assert_allclose(load_dataset(other)[1], ACTIONS, atol=1e-6)
    scores = [evaluate(lambda s: s[:, :1], [make_env(args), make_env(args)], 7) for args in (plain, other)]
    np.testing.assert_allclose(*scores, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dict", "tuple", "bits", "flattened"])
def test_dicts_and_tuples_train_and_are_flattened_as_gymnasium_does(store, kind):
    env = gym.make(f"Point_{kind}-v0".replace("flattened", "dict"))
    flat = wrappers.FlattenObservation(env)
    main(args := store(flat if kind == "flattened" else env))
    observations, _ = play(flat, ACTIONS)
    np.testing.assert_array_equal(load_dataset(args)[0], observations[:-1])
    np.testing.assert_array_equal(load_dataset(args)[3], observations[1:])
    assert np.isnan(normalized_score(args, 1.0))  # the set has no references


def test_bounds_in_float64_train_as_others_do(own_file):
    main(args := own_file("double"))
    assert all(x.dtype == torch.float32 for x in load_dataset(args))


@pytest.mark.parametrize("kind, word", [
    ("nested", "Dict('a'"), ("int", "int64"), ("huge", "e+38"), ("wide", "1.e+06"), ("locked", "0.0, 0.0"),
])  # fmt: skip
def test_actions_that_do_not_fill_two_bounds_are_refused_before_a_run(own_file, kind, word):
    assert word in refusal(main, own_file(kind)) and not Path("runs").exists()


@pytest.mark.parametrize("kind, seen, space", [
    ("dict", lambda x: {"pos": x["pos"]}, Dict(pos=X)), ("dict", lambda x: x["pos"], X),
    ("vector", lambda x: x[:, :1], G),
])  # fmt: skip
def test_a_set_with_other_observations_than_its_environment_says_which(store, kind, seen, space):
    """A callback of the recorder stored a part of them."""
    args = store(env := gym.make(f"Point_{kind}-v0"), seen=seen, observation_space=space)
    sentence, width = refusal(main, args), gym.spaces.flatdim(space)
    assert args.env_id in sentence and str(env.observation_space) in sentence
    assert re.search(rf"[\[(]{width}[,\]]", sentence) and not Path("runs").exists(), sentence
    strong = store(gym.make("Pendulum-v1"), 2 * ACTIONS, "my/strong-v0", eval_env="Shifted-v0")
    assert "Box(-2.0, 2.0, (1,), float32); " in refusal(load_dataset, strong)


def test_a_set_without_an_environment_or_an_episode_says_so(store):
    env = gym.make("Pendulum-v1")
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    assert "my/x-v0 has no environment" in refusal(main, store(env, env_id="my/x-v0", kept=False, **spaces))
    assert "no episodes" in refusal(main, store(env, count=0, **spaces))


@pytest.mark.parametrize("name", ["NormalizeReward", "NormalizeObservation", "ClipAction"])
def test_wrappers_with_a_memory_or_without_bounds_are_refused_by_name(store, name):
    args = store(getattr(wrappers, name)(gym.make("Pendulum-v1")))
    assert all(word in refusal(main, args) for word in (args.env_id, name))


def test_recorders_are_dropped_and_other_wrappers_of_gymnasium_kept(store):
    monitor = {"name": "Monitor", "entry_point": "stable_baselines3.common.monitor:Monitor", "kwargs": {}}
    edit = lambda _, spec: spec["additional_wrappers"].append(monitor)  # noqa: E731
    env = make_env(store(wrappers.RecordEpisodeStatistics(shifted(gym.make("Pendulum-v1"))), edit=edit))
    assert env.env.action_space.high == 3  # RescaleAction's
    assert "Monitor" not in str(env) and "RecordEpisodeStatistics" not in str(env)


@pytest.mark.parametrize("edit", [
    lambda _, spec: spec.update(HARM), lambda _, spec: spec.update(HARM, id="harm:Env-v0"),
    lambda metadata, spec: metadata.update(eval_env_spec=json.dumps(spec | HARM)),
    lambda _, spec: spec.update(additional_wrappers=[HARM | {"name": "Env", "kwargs": {}}]),
], ids=["entry point", "id", "evaluation", "wrapper"])  # fmt: skip
def test_a_set_cannot_choose_what_code_is_imported(store, monkeypatch, edit):
    args = store(gym.make("Pendulum-v1"), edit=edit)
    monkeypatch.syspath_prepend(".")
    Path("harm.py").write_text("open('harmed', 'w')\nclass Env: pass\n")
    assert args.env_id in refusal(main, args)
    assert not Path("harmed").exists() and "harm" not in sys.modules


def test_the_recordings_render_mode_is_not_used_and_an_endless_environment_gets_1000_steps(store):
    def edit(_, spec):
        spec["max_episode_steps"], spec["kwargs"]["render_mode"] = None, "rgb_array"

    args = store(gym.make("Point_vector-v0"), edit=edit)
    assert make_env(args).unwrapped.render_mode is None
    assert evaluate(lambda s: np.zeros((len(s), 1)), [make_env(args)], 0)[1] == [1000]


def test_the_first_episode_of_each_evaluation_is_filmed(own_file):
    pytest.importorskip("moviepy")
    main(own_file(capture_video=True))
    films = sorted(film.name for film in Path("runs").glob("*/videos/*.mp4"))
    assert films == ["from-step-0-episode-0.mp4", "from-step-0-episode-1.mp4"]


def test_threads_are_one_unless_omp_num_threads_says_otherwise(own_file, monkeypatch):
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "4,3,2")  # OpenMP's list, for nested regions
    main(own_file())
    assert torch.get_num_threads() == 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    main(own_file())
    assert torch.get_num_threads() == 1


def test_track_and_resume_are_one_wandb_run_also_beside_a_folder_wandb(own_file, monkeypatch):
    Path("wandb").mkdir()
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **how: calls.append(how)))
    folder = run(dmg_offline, **vars(own_file(track=True)))
    main(own_file(track=True, resume=str(folder), gradient_steps=4))
    assert [call["id"] for call in calls] == [folder.name] * 2
    assert all(call["resume"] == "allow" and call["sync_tensorboard"] for call in calls)

"""Odd inputs of users, each with what is right: trained on as it was meant, or refused with the reason."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from conftest import d4rl_arrays, write_hdf5
from gymnasium import wrappers
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Tuple
from minari.data_collector import EpisodeBuffer

import dmg_offline
from dmg_offline import Args, InputError, evaluate, load_dataset, main, make_env, read_args

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* is set to None:UserWarning:minari"),
    pytest.mark.filterwarnings("ignore:.*(has no time limit|env_spec is None|precision lowered)"),
]
FAULT = pytest.mark.xfail(reason="a known fault of the scripts", strict=True)
SHORT = {"gradient_steps": 2, "eval_frequency": 2, "eval_episodes": 1, "batch_size": 8, "cuda": False}


class Goal(gym.Env):
    """A point that walks; its observations are of the kind asked for."""

    action_space = Box(-1, 1, (1,))

    def __init__(self, kind, render_mode=None):
        x, g = Box(-9, 9, (2,)), Box(-9, 9, (1,))
        spaces = {"dict": Dict(pos=x, goal=g), "tuple": Tuple((x, g)), "vector": x}
        spaces |= {"mode": Dict(pos=x, mode=Discrete(3)), "bits": Dict(pos=x, bits=MultiBinary(2))}
        self.kind, self.observation_space = kind, spaces[kind]

    def observe(self):
        x, g = self.x.astype(np.float32), np.zeros(1, np.float32)
        kinds = {"dict": {"pos": x, "goal": g}, "tuple": (x, g), "vector": x}
        kinds |= {"mode": {"pos": x, "mode": self.t % 3}, "bits": {"pos": x, "bits": np.ones(2, np.int8)}}
        return kinds[self.kind]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = self.np_random.uniform(-1, 1, 2), 0
        return self.observe(), {}

    def step(self, action):
        self.x, self.t = self.x + 0.1 * action, self.t + 1
        return self.observe(), -float(np.abs(self.x).sum()), False, False, {}


class Crash(Goal):
    """An environment with a mistake in it."""

    def step(self, action):
        raise ZeroDivisionError("a user's own mistake")


def halved():
    """An entry point that returns a wrapped environment, its actions in [-1, 1], Pendulum's in [-2, 2]."""
    return wrappers.RescaleAction(gym.make("Pendulum-v1").unwrapped, -1.0, 1.0)


for kind in ("dict", "tuple", "vector", "mode", "bits"):
    gym.register(f"Goal_{kind}-v0", f"{__name__}:Goal", kwargs={"kind": kind}, max_episode_steps=50)
gym.register("Crash-v0", f"{__name__}:Crash", kwargs={"kind": "vector"}, max_episode_steps=50)
gym.register("Halved-v0", f"{__name__}:halved", max_episode_steps=200)


def stack(observations):
    if isinstance(observations[0], dict):
        return {key: stack([x[key] for x in observations]) for key in observations[0]}
    if isinstance(observations[0], tuple):
        return tuple(map(stack, zip(*observations, strict=True)))
    return np.stack(observations)


def play(env, actions):
    """One episode from reset(seed=0) with these actions, cut at their end."""
    observations, rewards = [env.reset(seed=0)[0]], []
    for action in actions:
        observation, reward, *_ = env.step(action)
        observations.append(observation)
        rewards.append(reward)
    return observations, rewards


ACTIONS = np.random.default_rng(0).uniform(-1, 1, (12, 1)).astype(np.float32)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """store(env, actions) records an episode as the Minari set my/set-v0; `edit` changes its metadata."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "sets"))

    def go(env, actions=ACTIONS, env_id="my/set-v0", edit=lambda metadata, spec: None, column=False, **how):
        observations, rewards = play(env, actions)
        shape = (-1, 1) if column else (-1,)
        flags = np.arange(len(rewards)).reshape(shape) == len(rewards) - 1
        episode = EpisodeBuffer(
            observations=stack(observations),
            actions=actions,
            rewards=np.reshape(rewards, shape),
            terminations=np.zeros_like(flags),
            truncations=flags,
        )
        how = how if "observation_space" in how else how | {"env": env}
        minari.create_dataset_from_buffers(env_id, [episode], **how)
        path = tmp_path / "sets" / env_id / "data" / "metadata.json"
        metadata = json.loads(path.read_text())
        spec = json.loads(metadata.get("env_spec") or "{}")
        edit(metadata, spec)
        if "env_spec" in metadata:
            metadata["env_spec"] = json.dumps(spec)
        path.write_text(json.dumps(metadata))
        return Args(env_id=env_id, **SHORT)

    return go


def refusal(function, *args):
    with pytest.raises(InputError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- spaces ----
def rows_of(actions, path):
    """The same episode as D4RL rows, with these actions in the file."""
    observations, rewards = play(gym.make("Pendulum-v1"), 2 * ACTIONS)
    flags = np.arange(len(rewards)) == len(rewards) - 1
    rows = {"observations": np.stack(observations[:-1]), "actions": actions, "rewards": rewards}
    return write_hdf5(path, rows | {"terminals": np.zeros(len(rewards)), "timeouts": flags})


@pytest.mark.parametrize(
    "kind", ["a wrapper in the set", "a wrapped entry point", "a wrapped entry point, HDF5"]
)
def test_rescaled_actions_are_those_of_the_plainly_stored_set(store, tmp_path, kind):
    if "HDF5" in kind:
        plain = Args(env_id="Pendulum-v1", dataset_path=rows_of(2 * ACTIONS, tmp_path / "plain.hdf5"))
        other = Args(env_id="Halved-v0", dataset_path=rows_of(ACTIONS, tmp_path / "halved.hdf5"))
    else:
        plain = store(gym.make("Pendulum-v1"), 2 * ACTIONS, "my/plain-v0")
        inside = wrappers.RescaleAction(gym.make("Pendulum-v1"), -1.0, 1.0)
        other = store(inside if "set" in kind else gym.make("Halved-v0"))
    batch, same = load_dataset(plain)[0], load_dataset(other)[0]
    np.testing.assert_allclose(batch.actions[: len(same.actions)], ACTIONS[: len(batch.actions)], atol=1e-6)
    for x, y in zip(batch, same, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    scores = [evaluate(lambda s: s[:, :1], [make_env(args)], 2, 7) for args in (plain, other)]
    np.testing.assert_allclose(*scores, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dict", "tuple", "flattened"])
def test_dicts_and_tuples_of_boxes_train_and_are_flattened_as_gymnasium_does(store, kind):
    env = gym.make(f"Goal_{kind}-v0".replace("flattened", "dict"))
    flat = wrappers.FlattenObservation(env)
    args = store(flat if kind == "flattened" else env)
    main(args)
    args.normalize_states = False
    observations, _ = play(flat, ACTIONS)
    np.testing.assert_array_equal(load_dataset(args)[0].observations, observations[:-1])


@pytest.mark.parametrize(
    "kind, word, form",
    [
        ("mode", "Discrete", "Minari"),
        pytest.param("mode", "Discrete", "HDF5", marks=FAULT),
        pytest.param("bits", "MultiBinary", "Minari", marks=FAULT),
        pytest.param("bits", "MultiBinary", "HDF5", marks=FAULT),
    ],
)
def test_other_spaces_are_refused_by_name(store, tmp_path, kind, word, form):
    env = gym.make(f"Goal_{kind}-v0")
    if form == "Minari":
        args = store(env)
    else:
        width = gym.spaces.flatdim(env.observation_space)
        path = write_hdf5(tmp_path / "x.hdf5", d4rl_arrays(60, width, 1))
        args = Args(env_id=env.spec.id, dataset_path=path)
    assert word in refusal(load_dataset, args)


def test_columns_of_shape_n_1_are_those_of_shape_n(store):
    env = gym.make("Goal_vector-v0")
    one, other = (load_dataset(store(env, env_id=f"my/{x}-v0", column=x))[0] for x in (False, True))
    for x, y in zip(one, other, strict=True):
        np.testing.assert_array_equal(x, y)


# ---- Minari's environments ----
@pytest.mark.parametrize("name", ["NormalizeReward", "NormalizeObservation"])
def test_wrappers_with_a_memory_are_refused_by_name_with_what_to_do(store, name):
    args = store(getattr(wrappers, name)(gym.make("Pendulum-v1")))
    sentence = refusal(load_dataset, args)
    assert args.env_id in sentence and name in sentence and "record it without" in sentence


def test_a_set_without_an_environment_says_so(store):
    env = gym.make("Pendulum-v1")
    args = store(env, observation_space=env.observation_space, action_space=env.action_space)
    assert f"{args.env_id} has no environment" in refusal(load_dataset, args)


def test_a_set_that_names_only_its_evaluation_environment_uses_that(store):
    env = gym.make("Pendulum-v1")
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    assert make_env(store(env, eval_env="Pendulum-v1", **spaces)).spec.id == "Pendulum-v1"


def test_an_arrow_set_trains(store):
    pytest.importorskip("pyarrow")
    args = store(gym.make("Pendulum-v1"), 2 * ACTIONS, data_format="arrow")
    main(args)
    np.testing.assert_allclose(load_dataset(args)[0].actions, ACTIONS, rtol=1e-6)


def test_a_set_recorded_in_a_window_trains_without_a_screen(store):
    actions = np.zeros((12, 3), np.float32)
    args = store(
        gym.make("Hopper-v5"), actions, edit=lambda _, spec: spec["kwargs"].update(render_mode="human")
    )
    assert make_env(args).unwrapped.render_mode is None
    main(args)


def test_an_environment_without_a_time_limit_gets_one_and_says_so(store):
    args = store(gym.make("Goal_vector-v0"), edit=lambda _, spec: spec.update(max_episode_steps=None))
    with pytest.warns(UserWarning, match=r"my/set-v0 has no time limit.*1000"):
        env = make_env(args)
    _, lengths = evaluate(lambda s: np.zeros((len(s), 1)), [env], 1, 0)
    assert lengths == [1000]


def wrapper(entry_point, **kwargs):
    return {"name": entry_point.split(":")[-1], "entry_point": entry_point, "kwargs": kwargs}


RECORDERS = (
    wrapper("stable_baselines3.common.monitor:Monitor"),
    wrapper("gymnasium.wrappers.common:RecordEpisodeStatistics", buffer_length=100, stats_key="episode"),
    wrapper("gymnasium.wrappers.rendering:RecordVideo", video_folder="films"),
)


def test_recorders_are_dropped_and_other_wrappers_of_gymnasium_are_kept(store, tmp_path):
    kept = wrapper("gymnasium.wrappers.transform_reward:ClipReward", min_reward=-1, max_reward=0)
    specs = [RECORDERS[0], kept, *RECORDERS[1:]]
    args = store(gym.make("Pendulum-v1"), edit=lambda _, spec: spec.update(additional_wrappers=specs))
    env, names = make_env(args), []
    while env is not env.unwrapped:
        names.append(type(env).__name__)
        env = env.env
    assert "ClipReward" in names and not {"Monitor", "RecordEpisodeStatistics", "RecordVideo"} & {*names}
    assert not (tmp_path / "films").exists()


HARMFUL = {
    "another entry point": lambda _, spec: spec.update(entry_point="harm:Env"),
    "an id that names a module": lambda _, spec: spec.update(id="harm:Env-v0"),
    "an id that is not registered": lambda _, spec: spec.update(id="Env-v0", entry_point="harm:Env"),
    "a wrapper of its own": lambda _, spec: spec.update(additional_wrappers=[wrapper("harm:Env")]),
    "no spaces": lambda metadata, spec: (
        metadata.pop("observation_space"),
        spec.update(entry_point="harm:Env"),
    ),
}


@pytest.mark.parametrize("name", [*list(HARMFUL)[:-1], pytest.param("no spaces", marks=FAULT)])
def test_a_set_cannot_choose_what_code_is_imported(store, tmp_path, monkeypatch, name):
    (tmp_path / "harm.py").write_text("open('harmed', 'w')\nclass Env: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    args = store(gym.make("Pendulum-v1"), edit=HARMFUL[name])
    sentence = refusal(load_dataset, args)
    assert not (tmp_path / "harmed").exists() and "harm" not in sys.modules
    assert args.env_id in sentence


# ---- HDF5 in and out of order ----
def walk(n=300):
    """Rows of Goal_vector-v0's shapes in order of time, with next_observations."""
    x = d4rl_arrays(n, 2, 1)
    next_observations = np.roll(x["observations"], -1, 0)
    ends = x["terminals"] | x["timeouts"]
    next_observations[ends] += 1  # the last state of an episode is not the first of the next
    return x | {"next_observations": next_observations}


def own_file(tmp_path, x):
    return Args(env_id="Goal_vector-v0", dataset_path=write_hdf5(tmp_path / "x.hdf5", x), **SHORT)


def test_rows_out_of_order_are_refused(tmp_path):
    order = np.random.default_rng(0).permutation(300)
    args = own_file(tmp_path, {key: column[order] for key, column in walk().items()})
    assert re.search("order.*next_observations", refusal(load_dataset, args))


@pytest.mark.parametrize("wrong", [0, 3])
def test_a_few_next_observations_that_differ_are_only_counted(tmp_path, wrong, capsys):
    x = walk()
    inside = np.flatnonzero(~(x["terminals"] | x["timeouts"]))[:wrong]
    x["next_observations"][inside, 1] += 0.5
    batch, mean, std = load_dataset(own_file(tmp_path, x))
    out = capsys.readouterr().out
    assert ("Warning" in out) == (f"{wrong} next_observations" in out) == bool(wrong), out
    expected = np.roll(x["observations"], -1, 0)[:-1][~x["timeouts"][:-1]]
    np.testing.assert_allclose(batch.next_observations * std + mean, expected, atol=1e-5)


def test_advice_for_a_row_of_nan_is_safe_to_follow(tmp_path):
    x = walk()
    x["observations"][100, 1] = np.nan
    assert "mark the row before each as a timeout, then remove it" in refusal(
        load_dataset, own_file(tmp_path, x)
    )


def test_a_file_that_marks_no_timeouts_is_warned_about(tmp_path, capsys):
    load_dataset(own_file(tmp_path, walk()))
    assert "Warning" not in capsys.readouterr().out
    load_dataset(own_file(tmp_path, walk() | {"timeouts": np.zeros(300)}))
    out = capsys.readouterr().out
    assert all(words in out for words in ("Warning", "marks no timeouts", "set timeouts to 1", "last row")), (
        out
    )


# ---- --env-id and paths ----
def test_an_environment_without_a_file_says_what_is_missing():
    assert (
        refusal(load_dataset, Args(env_id="Hopper-v5")) == "Hopper-v5 is an environment: add --dataset-path"
    )


def test_full_replay_is_a_d4rl_name(hopper_file):
    args = Args(env_id="hopper-full-replay-v2", dataset_path=hopper_file)
    load_dataset(args)
    assert dmg_offline.normalized_score(args, 3234.3) == 100


def alone(path, name="alone"):
    """A copy of the script, imported from there."""
    copy = shutil.copy(dmg_offline.__file__, path / f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_alone_says_where_its_default_dataset_is_and_asks_no_server(tmp_path, monkeypatch):
    module = alone(tmp_path)
    monkeypatch.setattr(minari, "load_dataset", lambda *_, **__: pytest.fail("a server was asked"))
    with pytest.raises(module.InputError, match=r"dmg/halfcheetah/medium-replay-v0 .*repository"):
        module.load_dataset(module.Args())


def test_a_tilde_in_dataset_path_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Args(env_id="Hopper-v5", dataset_path="~/x.hdf5").dataset_path == str(tmp_path / "x.hdf5")


def test_a_relative_dataset_path_is_absolute_in_the_record_and_found_from_another_folder(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_hdf5("x.hdf5", walk())
    main(Args(env_id="Goal_vector-v0", dataset_path="x.hdf5", **SHORT))
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "args.json").read_text())["dataset_path"] == str(tmp_path / "x.hdf5")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    args = read_args(str(folder))
    args.resume, args.gradient_steps = str(folder), 4
    main(args)
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 4


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_an_unfinished_minari_download_names_the_folder_to_delete(store, tmp_path, damage):
    args = store(gym.make("Pendulum-v1"))
    file = tmp_path / "sets/my/set-v0/data/main_data.hdf5"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:1000])
    sentence = refusal(load_dataset, args)
    assert "delete" in sentence and str(tmp_path / "sets/my/set-v0") in sentence, sentence


# ---- W&B, notebooks, mistakes of others ----
def test_track_and_resume_are_one_wandb_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []
    stub = ModuleType("wandb")
    stub.init = lambda **options: calls.append(options) or SimpleNamespace()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    args = own_file(tmp_path, walk())
    args.track, args.wandb_entity = True, "team"
    main(args)
    (folder,) = Path("runs").iterdir()
    args = read_args(str(folder))
    args.resume, args.gradient_steps = str(folder), 4
    main(args)
    first, second = calls
    assert first["id"] == second["id"] == first["name"] == folder.name
    assert first["resume"] == second["resume"] == "allow" and first["sync_tensorboard"] is True
    assert (first["project"], first["entity"]) == ("dmg", "team")
    assert (first["config"]["gradient_steps"], second["config"]["gradient_steps"]) == (2, 4)


@pytest.mark.parametrize("how", ["imported", "pasted"])
def test_agent_and_update_work_in_a_notebook(how, tmp_path):
    names = vars(dmg_offline)
    if how == "pasted":  # into a cell, which has no __file__
        names = {"__name__": "cell"}
        exec(Path(dmg_offline.__file__).read_text(), names)
    args = names["Args"](env_id="Pendulum-v1", dataset_path=rows_of(2 * ACTIONS, tmp_path / "x.hdf5"))
    dataset, *_ = names["load_dataset"](args)
    agent = names["Agent"](3, 1, args)
    before = agent.actor(dataset.observations).clone()
    metrics = names["update"](agent, dataset, torch.zeros_like(dataset.actions), args, True)
    assert all(x.isfinite() for x in metrics.values())
    assert not torch.equal(agent.actor(dataset.observations), before)
    with pytest.raises(names["InputError"], match="repository"):  # looked for beside the file
        names["open_minari"]("dmg/nothing-v0")


def test_a_mistake_in_a_users_environment_shows_its_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = Args(env_id="Crash-v0", dataset_path=write_hdf5(tmp_path / "x.hdf5", walk()), **SHORT)
    monkeypatch.setattr(dmg_offline, "SummaryWriter", MagicMock())  # its thread would outlive the folder
    with pytest.raises(ZeroDivisionError, match="a user's own mistake"):
        main(args)

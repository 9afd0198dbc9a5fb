"""Odd inputs of users, each with what is right: trained on as it was meant, or refused with the reason."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from conftest import d4rl_arrays, load_checkpoint, refusal, write_hdf5
from gymnasium import wrappers
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Tuple
from minari.data_collector import EpisodeBuffer

import dmg_offline
from dmg_offline import Args, evaluate, load_dataset, main, make_env, read_args

pytestmark = pytest.mark.filterwarnings("ignore:.*(set to None|time limit|env_spec is None|precision low)")
SHORT = {"gradient_steps": 2, "eval_frequency": 2, "eval_episodes": 1, "batch_size": 8, "cuda": False}
X, G = Box(-9, 9, (2,)), Box(-9, 9, (1,))
KINDS = {"dict": Dict(pos=X, Text=G), "tuple": Tuple((X, G)), "vector": X}
KINDS |= {"mode": Dict(pos=X, mode=Discrete(3)), "bits": Dict(pos=X, bits=MultiBinary(2))}


class Goal(gym.Env):
    """A point that walks; its observations are of the kind asked for."""

    action_space, metadata = Box(-1, 1, (1,)), {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, kind, render_mode=None):
        self.kind, self.observation_space, self.render_mode = kind, KINDS[kind], render_mode

    def render(self):
        return np.zeros((32, 32, 3), np.uint8)

    def observe(self):
        x, g = self.x.astype(np.float32), np.zeros(1, np.float32)
        if self.kind in ("vector", "tuple"):
            return x if self.kind == "vector" else (x, g)
        found = {"pos": x, "Text": g, "mode": self.t % 3, "bits": np.ones(2, np.int8)}
        return {key: found[key] for key in self.observation_space}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = self.np_random.uniform(-1, 1, 2), 0
        return self.observe(), {}

    def step(self, action):
        self.x, self.t = self.x + 0.1 * action, self.t + 1
        return self.observe(), -float(np.abs(self.x).sum()), False, False, {}


def shifted(env=None):
    """Pendulum with actions in [-1, 3] instead of [-2, 2]; also an entry point that returns a wrapper."""
    return wrappers.RescaleAction(env or gym.make("Pendulum-v1").unwrapped, -1.0, 3.0)


for kind in KINDS:
    gym.register(f"Goal_{kind}-v0", f"{__name__}:Goal", kwargs={"kind": kind}, max_episode_steps=50)
gym.register("Shifted-v0", f"{__name__}:shifted", max_episode_steps=200)


def stack(observations):
    if isinstance(observations[0], dict):
        return {key: stack([x[key] for x in observations]) for key in observations[0]}
    if isinstance(observations[0], tuple):
        return tuple(map(stack, zip(*observations, strict=True)))
    return np.stack(observations)


def play(env, actions):
    """One episode from reset(seed=0) with these actions, cut at their end; the last row is marked."""
    first, _ = env.reset(seed=0)
    observations, rewards, *_ = zip(*map(env.step, actions), strict=True)
    return [first, *observations], list(rewards), np.arange(len(rewards)) == len(rewards) - 1


ACTIONS = np.random.default_rng(0).uniform(-1, 1, (12, 1)).astype(np.float32)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """store(env, actions) records an episode as the Minari set my/set-v0; `edit` changes its metadata."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "sets"))

    def go(env, actions=ACTIONS, env_id="my/set-v0", edit=lambda metadata, spec: None, **how):
        observations, rewards, last = play(env, actions)
        columns = {"actions": actions, "rewards": rewards, "terminations": 0 * last, "truncations": last}
        how = how if "observation_space" in how else how | {"env": env}
        episode = EpisodeBuffer(observations=stack(observations), **columns)
        minari.create_dataset_from_buffers(env_id, [episode], **how)
        path = tmp_path / "sets" / env_id / "data" / "metadata.json"
        metadata = json.loads(path.read_text())
        if "env_spec" in metadata:
            edit(metadata, spec := json.loads(metadata["env_spec"]))
            path.write_text(json.dumps(metadata | {"env_spec": json.dumps(spec)}))
        return Args(env_id=env_id, **SHORT)

    return go


def rows_of(actions, path):
    """The same episode as D4RL rows, with these actions in the file."""
    observations, rewards, last = play(gym.make("Pendulum-v1"), 2 * ACTIONS)
    rows = {"observations": np.stack(observations[:-1]), "actions": actions, "rewards": rewards}
    return write_hdf5(path, rows | {"terminals": 0 * last, "timeouts": last})


@pytest.mark.parametrize("kind", ["wrapper in the set", "wrapped entry point", "wrapped entry point, HDF5"])
def test_rescaled_actions_are_those_of_the_plainly_stored_set(store, tmp_path, kind):
    actions = 2 * ACTIONS
    if "HDF5" in kind:
        plain = Args(env_id="Pendulum-v1", dataset_path=rows_of(actions, tmp_path / "plain.hdf5"))
        other = Args(env_id="Shifted-v0", dataset_path=rows_of(actions + 1, tmp_path / "shifted.hdf5"))
    else:
        plain = store(gym.make("Pendulum-v1"), actions, "my/plain-v0")
        env = shifted(gym.make("Pendulum-v1")) if "set" in kind else gym.make("Shifted-v0")
        other = store(env, actions + 1)
    batch, same = load_dataset(plain)[0], load_dataset(other)[0]
    np.testing.assert_allclose(batch.actions, ACTIONS[: len(batch.actions)], atol=1e-6)
    for x, y in zip(batch, same, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    scores = [evaluate(lambda s: s[:, :1], [make_env(args), make_env(args)], 7) for args in (plain, other)]
    np.testing.assert_allclose(*scores, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dict", "tuple", "flattened"])
def test_dicts_and_tuples_of_boxes_train_and_are_flattened_as_gymnasium_does(store, kind):
    env = gym.make(f"Goal_{kind}-v0".replace("flattened", "dict"))
    flat = wrappers.FlattenObservation(env)
    args = store(flat if kind == "flattened" else env)
    main(args)
    args.normalize_states = False
    observations, *_ = play(flat, ACTIONS)
    np.testing.assert_array_equal(load_dataset(args)[0].observations, observations[:-1])


@pytest.mark.parametrize("form", ["Minari", "HDF5"])
@pytest.mark.parametrize("kind, word", [("mode", "Discrete"), ("bits", "MultiBinary")])
def test_other_spaces_are_refused_by_name(store, tmp_path, kind, word, form):
    env = gym.make(f"Goal_{kind}-v0")
    rows = d4rl_arrays(60, gym.spaces.flatdim(env.observation_space), 1)
    file = {"env_id": env.spec.id, "dataset_path": write_hdf5(tmp_path / "x.hdf5", rows)}
    args = store(env) if form == "Minari" else Args(**file)
    assert word in refusal(load_dataset, args)


@pytest.mark.parametrize("name", ["NormalizeReward", "NormalizeObservation"])
def test_wrappers_with_a_memory_are_refused_by_name_with_what_to_do(store, name):
    args = store(getattr(wrappers, name)(gym.make("Pendulum-v1")))
    assert all(word in refusal(load_dataset, args) for word in (args.env_id, name, "record it without"))


def test_a_set_without_an_environment_says_so(store):
    env = gym.make("Pendulum-v1")
    args = store(env, observation_space=env.observation_space, action_space=env.action_space)
    assert f"{args.env_id} has no environment" in refusal(load_dataset, args)


def test_the_first_episode_of_each_evaluation_is_filmed(store, tmp_path):
    pytest.importorskip("moviepy")
    args = store(gym.make("Goal_vector-v0"))
    args.capture_video = True
    main(args)
    films = [film.name for film in tmp_path.glob("runs/*/videos/*.mp4")]
    assert sorted(films) == ["from-step-0-episode-0.mp4", "from-step-0-episode-1.mp4"]


def test_an_arrow_set_trains(store):
    pytest.importorskip("pyarrow")
    args = store(gym.make("Pendulum-v1"), 2 * ACTIONS, data_format="arrow")
    main(args)
    np.testing.assert_allclose(load_dataset(args)[0].actions, ACTIONS, rtol=1e-6)


def test_a_set_recorded_in_a_window_trains_without_a_screen(store):
    window = lambda _, spec: spec["kwargs"].update(render_mode="human")  # noqa: E731
    args = store(gym.make("Hopper-v5"), np.zeros((12, 3), np.float32), edit=window)
    assert make_env(args).unwrapped.render_mode is None
    main(args)


def test_an_environment_without_a_time_limit_gets_one_and_says_so(store):
    args = store(gym.make("Goal_vector-v0"), edit=lambda _, spec: spec.update(max_episode_steps=None))
    with pytest.warns(UserWarning, match=r"my/set-v0 has no time limit.*1000"):
        env = make_env(args)
    _, lengths = evaluate(lambda s: np.zeros((len(s), 1)), [env], 0)
    assert lengths == [1000]


def test_recorders_are_dropped_and_other_wrappers_of_gymnasium_kept(store):
    entry_point = "stable_baselines3.common.monitor:Monitor"
    monitor = {"name": "Monitor", "entry_point": entry_point, "kwargs": {"filename": None}}
    edit = lambda _, spec: spec["additional_wrappers"].append(monitor)  # noqa: E731
    args = store(wrappers.RecordEpisodeStatistics(shifted(gym.make("Pendulum-v1"))), edit=edit)
    env = make_env(args)
    assert env.env.action_space.high == 3  # RescaleAction's
    assert "Monitor" not in str(env) and "RecordEpisodeStatistics" not in str(env)


HARM = {"entry_point": "harm:Env"}
HARMFUL_WRAPPER = HARM | {"name": "Env", "kwargs": {}}
HARMFUL = {
    "another entry point": lambda _, spec: spec.update(HARM),
    "an id that names a module": lambda _, spec: spec.update(id="harm:Env-v0"),
    "an id that is not registered": lambda _, spec: spec.update(HARM, id="Env-v0"),
    "a wrapper of its own": lambda _, spec: spec.update(additional_wrappers=[HARMFUL_WRAPPER]),
    "no spaces": lambda metadata, spec: (metadata.pop("observation_space"), spec.update(HARM)),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_a_set_cannot_choose_what_code_is_imported(store, tmp_path, monkeypatch, name):
    (tmp_path / "harm.py").write_text("open('harmed', 'w')\nclass Env: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    args = store(gym.make("Pendulum-v1"), edit=HARMFUL[name])
    assert args.env_id in refusal(load_dataset, args)
    assert not (tmp_path / "harmed").exists() and "harm" not in sys.modules


def walk(n=300):
    """Rows of Goal_vector-v0's shapes in order of time, with next_observations."""
    x = d4rl_arrays(n, 2, 1)
    next_observations = np.roll(x["observations"], -1, 0)
    next_observations[x["terminals"] | x["timeouts"]] += 1  # not the first state of the next episode
    return x | {"next_observations": next_observations}


def own_file(tmp_path, x):
    return Args(env_id="Goal_vector-v0", dataset_path=write_hdf5(tmp_path / "x.hdf5", x), **SHORT)


def test_rows_out_of_order_are_refused(tmp_path):
    order = np.random.default_rng(0).permutation(300)
    args = own_file(tmp_path, {key: column[order] for key, column in walk().items()})
    assert re.search("order.*next_observations", refusal(load_dataset, args))


def test_a_few_next_observations_that_differ_are_only_counted(tmp_path, capsys):
    x = walk()
    inside = np.flatnonzero(~(x["terminals"] | x["timeouts"]))[:3]
    x["next_observations"][inside, 1] += 0.5
    batch, mean, std = load_dataset(own_file(tmp_path, x))
    assert re.search("Warning: .*x.hdf5 has 3 next_observations", capsys.readouterr().out)
    expected = np.roll(x["observations"], -1, 0)[:-1][~x["timeouts"][:-1]]
    np.testing.assert_allclose(batch.next_observations * std + mean, expected, atol=1e-5)


def test_a_file_that_marks_no_timeouts_is_warned_about(tmp_path, capsys):
    load_dataset(own_file(tmp_path, walk()))
    assert "Warning" not in capsys.readouterr().out
    load_dataset(own_file(tmp_path, walk() | {"timeouts": np.zeros(300)}))
    words, out = ("Warning", "marks no timeouts", "set timeouts to 1", "last row"), capsys.readouterr().out
    assert all(word in out for word in words), out


def test_the_script_alone_says_where_its_default_dataset_is_and_asks_no_server(tmp_path, monkeypatch):
    module = runpy.run_path(shutil.copy(dmg_offline.__file__, tmp_path / "alone.py"))
    monkeypatch.setattr(minari, "load_dataset", lambda *_, **__: pytest.fail("a server was asked"))
    with pytest.raises(module["InputError"], match=r"dmg/halfcheetah/medium-replay-v0 .*repository"):
        module["load_dataset"](module["Args"]())


def test_dataset_path_is_absolute_in_the_record_and_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert Args(dataset_path="~/x.hdf5").dataset_path == str(tmp_path / "x.hdf5")
    write_hdf5("x.hdf5", walk())
    main(Args(env_id="Goal_vector-v0", dataset_path="x.hdf5", **SHORT))
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "args.json").read_text())["dataset_path"] == str(tmp_path / "x.hdf5")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    args = read_args(str(folder))
    args.resume, args.gradient_steps = str(folder), 4
    main(args)
    assert load_checkpoint(folder)["step"] == 4


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_an_unfinished_minari_download_names_the_folder_to_delete(store, tmp_path, damage):
    args = store(gym.make("Pendulum-v1"))
    file = tmp_path / "sets/my/set-v0/data/main_data.hdf5"
    file.unlink() if damage == "missing" else file.write_bytes(file.read_bytes()[:1000])
    assert re.search(f"delete.*{tmp_path}/sets/my/set-v0", refusal(load_dataset, args))


def test_track_and_resume_are_one_wandb_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **how: calls.append(how)))
    args = own_file(tmp_path, walk())
    args.track, args.wandb_entity = True, "team"
    main(args)
    args.resume, args.gradient_steps = str(*Path("runs").iterdir()), 4
    main(args)
    first, second = calls
    assert first["id"] == second["id"] == first["name"] == Path(args.resume).name
    assert first["resume"] == second["resume"] == "allow" and first["sync_tensorboard"] is True
    assert (first["project"], first["entity"]) == ("dmg", "team")
    assert (first["config"]["gradient_steps"], second["config"]["gradient_steps"]) == (2, 4)


def test_pasted_into_a_notebook_agent_and_update_work(tmp_path):
    names = {"__name__": "cell"}  # a cell has no __file__
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

"""What goes in is what D4RL and Minari mean by a dataset; what cannot be used is refused with a sentence."""

import hashlib
import re
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from conftest import d4rl_arrays, refusal, write_hdf5
from minari.data_collector import EpisodeBuffer

import dmg_offline
from dmg_offline import D4RL_SHA256, Args, download_d4rl, load_dataset, make_env

pytestmark = pytest.mark.filterwarnings("ignore:.*(set to None|no time limit|overflow|invalid value)")


def load(path, env_id="Hopper-v4"):
    return load_dataset(Args(env_id=env_id, dataset_path=str(path)))


def qlearning_dataset(x):
    """d4rl.qlearning_dataset, row by row: s, a, r, next_s, terminated in float64."""
    n, rows = len(x["rewards"]), []
    for i in range(n - 1):
        if not x["timeouts"][i]:
            s, next_s = x["observations"][i : i + 2]
            rows.append((s, x["actions"][i], x["rewards"][i], next_s, x["terminals"][i]))
    return [np.array(column, np.float64) for column in zip(*rows, strict=True)]


def assert_loaded(loaded, rows, normalise=True):
    """load_dataset's answer against float64 columns."""
    (batch, mean, std), (s, a, r, next_s, terminated) = loaded, rows
    true_mean, true_std = (s.mean(0), s.std(0) + 1e-3) if normalise else (0 * s[0], 0 * s[0] + 1)
    np.testing.assert_allclose(mean, true_mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(std, true_std, rtol=1e-6)
    expected = (s - true_mean) / true_std, a, r, (next_s - true_mean) / true_std, terminated
    for name, x, y in zip(batch._fields, batch, expected, strict=True):
        assert x.numpy().dtype == np.float32, name
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("seed", range(9))
def test_hdf5_rows_and_printed_numbers_are_those_of_d4rl_qlearning_dataset(tmp_path, capsys, seed):
    x = d4rl_arrays(200, seed=seed)
    for row, kind in ((0, seed % 3), (-1, seed // 3)):  # inside an episode, terminal, timeout
        x["terminals"][row], x["timeouts"][row] = kind == 1, kind == 2
    x["terminals"][[50, 100]], x["timeouts"][[50, 100]] = (True, False), (True, True)
    x["actions"][7] = 1 + 5e-4, -1 - 5e-4, 0  # beyond the bounds by rounding
    batch, *_ = loaded = load(write_hdf5(tmp_path / "x.hdf5", x))
    rows = qlearning_dataset(x)
    assert_loaded(loaded, rows)
    ends = (x["terminals"] & ~x["timeouts"])[:-1].sum()  # none from a timeout
    assert len(batch.rewards) == 199 - x["timeouts"][:-1].sum() and batch.terminated.sum() == ends
    line = f"{len(rows[2])} transitions, {ends} terminals, {x['timeouts'].sum()} timeouts, mean reward "
    assert f"{tmp_path}/x.hdf5: {line}{rows[2].mean():.3f}\n" in capsys.readouterr().out


def test_mean_and_std_are_summed_in_float64(tmp_path):
    x = d4rl_arrays(20_000)
    x["observations"] = 1000.3 + 0.01 * x["observations"]  # float32 sums are off by more than the std
    x["observations"][:, 4] = 7.0
    batch, mean, std = load(write_hdf5(tmp_path / "x.hdf5", x))
    s = qlearning_dataset(x)[0]
    np.testing.assert_allclose(mean, s.mean(0), rtol=1e-7)
    np.testing.assert_allclose(std, s.std(0) + 1e-3, rtol=1e-6)
    assert std[4] == np.float32(1e-3) and (batch.observations[:, 4] == 0).all()
    assert mean.dtype == std.dtype == torch.float32


def put(key, index, value):
    def change(x):
        x[key] = x[key].astype(np.float64)
        x[key][index] = value

    return change


def replace(key, *shape):
    return lambda x: x.update({key: np.zeros(shape)})


REFUSED = {
    "nan": (
        put("observations", 7, np.nan),
        "NaN .* observations: remove each such row and mark the row before it as a timeout",
    ),
    "observation beyond float32": (put("observations", (7, 2), 1e39), "infinite observations"),
    "reward beyond float32": (put("rewards", 7, -1e39), "infinite rewards"),
    "timeout 0.5": (put("timeouts", 7, 0.5), "terminals or timeouts other than 0 and 1"),
    "action too large": (put("actions", (7, 2), 1.002), "actions outside .*-1.* to .*1"),
    "action too small": (put("actions", (7, 2), -1.002), "actions outside .*-1.* to .*1"),
    "wide state": (replace("observations", 600, 12), r"observations of shape \(600, 12\).*\(600, 11\)"),
    "too few actions": (replace("actions", 599, 3), r"actions of shape \(599, 3\).*\(600, 3\)"),
    "too many rewards": (replace("rewards", 601), r"rewards of shape \(601,\)"),
    "two rewards per row": (replace("rewards", 300, 2), r"rewards of shape \(300, 2\)"),
    "wide next_observations": (replace("next_observations", 600, 12), "next_observations"),
    "text": (lambda x: x.update(rewards="none"), "cannot read"),
    "timeouts only": (put("timeouts", slice(None), 1), "no transition"),
}
for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
    REFUSED[f"no {key}"] = lambda x, key=key: x.pop(key), f"'{key}'"
for rows in (0, 1):
    cut = lambda x, rows=rows: x.update({key: column[:rows] for key, column in x.items()})  # noqa: E731
    REFUSED[f"{rows} rows"] = cut, "no transition"


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_file_is_refused_with_its_own_sentence(tmp_path, name):
    change, words = REFUSED[name]
    change(x := d4rl_arrays())
    path = write_hdf5(tmp_path / "refused.hdf5", x)
    assert re.search(words, sentence := refusal(load, path)) and path in sentence, sentence


@pytest.mark.parametrize("marked", [True, False])
def test_antmaze_goal_is_reward_0_and_terminal_whatever_the_terminals_say(tmp_path, capsys, marked):
    goal = np.isin(np.arange(20), (3, 4, 5)).astype(float)  # rows of the first of two trajectories
    x = d4rl_arrays(20, 29, 8) | {"rewards": goal, "terminals": goal, "timeouts": np.arange(20) % 10 == 9}
    path = write_hdf5(tmp_path / "x.hdf5", x | {"terminals": marked * x["terminals"]})
    s, a, r, next_s, terminated = qlearning_dataset(x)
    assert_loaded(load(path, "antmaze-umaze-v2"), [s, a, r - 1, next_s, terminated], normalise=False)
    line = "18 transitions, 3 terminals, 2 timeouts, mean reward -0.833"
    assert capsys.readouterr().out == f"{path}: {line}\n"
    x["rewards"] = x["rewards"] + 0.5
    assert "AntMaze rewards" in refusal(load, write_hdf5(path, x), "antmaze-umaze-v2")


def pendulum_episodes(lengths):
    """Every second episode terminates, the others are truncated."""
    rng = np.random.default_rng(0)
    for i, n in enumerate(lengths):
        s, a = rng.uniform(-1, 1, (n + 1, 3)), rng.uniform(-2, 2, (n, 1))
        last, found = np.arange(n) == n - 1, {"observations": s.astype("f4"), "actions": a.astype("f4")}
        ends = {"terminations": last & (i % 2 == 0), "truncations": last & (i % 2 == 1)}
        yield EpisodeBuffer(**found, rewards=rng.normal(size=n), **ends)


def test_minari_vector_episodes_keep_order_and_truncated_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    buffers = list(pendulum_episodes(range(2, 14)))  # 12 episodes: as text, episode_10 comes before episode_2
    how = {"env": "Pendulum-v1", "algorithm_name": "test", "requirements": []}
    minari.create_dataset_from_buffers("pendulum-v0", buffers, **how)
    env, loaded = make_env(args := Args(env_id="pendulum-v0")), load_dataset(args)
    of = lambda x: (x.observations[:-1], x.actions / 2, x.rewards, x.observations[1:], x.terminations)  # noqa: E731
    columns = [np.concatenate(column).astype(np.float64) for column in zip(*map(of, buffers), strict=True)]
    assert_loaded(loaded, columns)
    assert env.action_space == gym.spaces.Box(-1, 1, (1,)) and env.spec.id == "Pendulum-v1"
    mean = np.concatenate([x.rewards for x in buffers]).mean()
    line = f"90 transitions, 6 terminals, 6 timeouts, mean reward {mean:.3f}"
    assert capsys.readouterr().out.endswith(f"pendulum-v0: {line}\n")


ANT_FILE = "ant_maze_v2/Ant_maze_{}_noisy_multistart_{}_multigoal_{}_sparse_fixed.hdf5"
FILES = {  # of AntMaze: start and goal of the recorded trajectories: one, or many
    "hopper-medium-v2": "gym_mujoco_v2/hopper_medium-v2.hdf5",
    "halfcheetah-full-replay-v2": "gym_mujoco_v2/halfcheetah_full_replay-v2.hdf5",
    "walker2d-medium-expert-v2": "gym_mujoco_v2/walker2d_medium_expert-v2.hdf5",
    "antmaze-umaze-v2": ANT_FILE.format("u-maze", False, False),
    "antmaze-umaze-diverse-v2": ANT_FILE.format("u-maze", True, True),
    "antmaze-medium-play-v2": ANT_FILE.format("big-maze", True, False),
    "antmaze-medium-diverse-v2": ANT_FILE.format("big-maze", True, True),
    "antmaze-large-play-v2": ANT_FILE.format("hardest-maze", True, False),
    "antmaze-large-diverse-v2": ANT_FILE.format("hardest-maze", True, True),
}


@pytest.fixture
def server(tmp_path, monkeypatch, hopper_file):
    """D4RL's server as a folder of this machine, with one file, and an empty cache."""
    state = SimpleNamespace(file=tmp_path / "d4rl" / FILES["hopper-medium-v2"], folder=tmp_path / "cache")
    state.good = Path(hopper_file).read_bytes()
    state.file.parent.mkdir(parents=True)
    state.file.write_bytes(state.good)
    monkeypatch.setenv("HOME", str(tmp_path))  # whatever goes wrong, the user's own cache stays as it is
    monkeypatch.setenv("D4RL_DATASET_DIR", str(state.folder))
    monkeypatch.setattr(dmg_offline, "D4RL_URL", (tmp_path / "d4rl").as_uri() + "/")
    monkeypatch.setitem(D4RL_SHA256, "hopper-medium-v2", hashlib.sha256(state.good).hexdigest())
    return state


def test_d4rl_name_is_downloaded_once_and_loads(server, tmp_path, monkeypatch):
    args = Args(env_id="hopper-medium-v2")
    for _ in range(2):
        assert_loaded(load_dataset(args), qlearning_dataset(d4rl_arrays()))
        server.file.unlink(missing_ok=True)
    assert [path.name for path in server.folder.iterdir()] == ["hopper_medium-v2.hdf5"]
    server.file.write_bytes(server.good)
    monkeypatch.delenv("D4RL_DATASET_DIR")
    assert download_d4rl("hopper-medium-v2") == tmp_path / ".d4rl/datasets/hopper_medium-v2.hdf5"


@pytest.mark.parametrize("fault", ["another file", "cut connection", "no connection"])
def test_failed_download_leaves_nothing_and_says_where_to_put_the_file(server, fault):
    bad = {"another file": server.good[:-1] + b"?", "cut connection": server.good[:5000]}
    server.file.write_bytes(bad.get(fault, b""))
    if fault == "no connection":
        server.file.unlink()
    sentence = refusal(download_d4rl, "hopper-medium-v2")
    assert FILES["hopper-medium-v2"] in sentence and f"put it at {server.folder}/hopper_medium" in sentence
    assert list(server.folder.iterdir()) == []
    server.file.write_bytes(server.good)  # the next try is not spoiled by this one
    assert download_d4rl("hopper-medium-v2").read_bytes() == server.good


def test_another_file_in_the_cache_is_refused_and_left_alone(server):
    server.folder.mkdir()
    cached = server.folder / "hopper_medium-v2.hdf5"
    cached.write_bytes(server.good[:5000])
    sentence = refusal(download_d4rl, "hopper-medium-v2")
    assert f"{cached} is not D4RL's file" in sentence and "delete it" in sentence
    assert cached.read_bytes() == server.good[:5000]


def test_each_d4rl_name_asks_for_its_file_and_has_a_sha256(server):
    assert len({x[:16] for x in D4RL_SHA256.values()}) == len(D4RL_SHA256) == 24
    server.file.unlink()
    for env_id in FILES:
        assert f"/d4rl/{FILES[env_id]} " in refusal(download_d4rl, env_id)

"""What goes in is what D4RL and Minari mean by a dataset; garbage is refused."""

import hashlib
import re
from pathlib import Path

import minari
import numpy as np
import pytest
import torch
from conftest import d4rl_arrays, load_checkpoint, refusal, run, write_hdf5
from minari.data_collector import EpisodeBuffer

import dmg_offline
from dmg_offline import D4RL_FILES, Args, download_d4rl, load_dataset

pytestmark = pytest.mark.filterwarnings("ignore:.*(set to None|overflow|invalid value)")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(x, env_id="Hopper-v4"):
    return load_dataset(Args(env_id=env_id, dataset_path=write_hdf5("x.hdf5", x)))


def qlearning_dataset(x):
    """d4rl.qlearning_dataset, row by row: s, a, r, next_s, terminated in float64."""
    rows, s = [], x["observations"]
    for i in range(len(s) - 1):
        if not x["timeouts"][i]:
            rows.append((s[i], x["actions"][i], x["rewards"][i], s[i + 1], x["terminals"][i]))
    return [np.array(column, np.float64) for column in zip(*rows, strict=True)]


def assert_loaded(columns, expected):
    """Columns of load_dataset against others. A terminal row has no next observation."""
    mask = 1 - np.asarray(expected[4])[:, None]
    for k, (x, y) in enumerate(zip(columns, map(np.asarray, expected), strict=True)):
        assert x.dtype == torch.float32, k
        x, y = (x.numpy() * mask, y * mask) if k == 3 else (x, y)
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6, err_msg=str(k))


@pytest.mark.parametrize("seed", range(9))
def test_hdf5_rows_and_printed_numbers_are_those_of_d4rl_qlearning_dataset(capsys, seed):
    x = d4rl_arrays(200, seed=seed)
    for row, kind in ((0, seed % 3), (-1, seed // 3)):  # inside an episode, terminal, timeout
        x["terminals"][row], x["timeouts"][row] = kind == 1, kind == 2
    x["terminals"][[50, 100]], x["timeouts"][[50, 100]] = (True, False), (True, True)
    x["actions"][7] = 1 + 5e-4, -1 - 5e-4, 0  # beyond the bounds by rounding
    columns, rows = load(x), qlearning_dataset(x)
    assert_loaded(columns, rows)
    ends = (x["terminals"] & ~x["timeouts"])[:-1].sum()  # none from a timeout
    line = f"x.hdf5: {len(rows[2])} transitions, {ends} terminal, mean reward {rows[2].mean():.3f}\n"
    assert line in capsys.readouterr().out


def with_next(x):
    """In order of time, with the next row's observation at each row that is no end."""
    next_s = np.roll(x["observations"], -1, 0)
    next_s[x["terminals"] | x["timeouts"]] += 1  # not the first state of the next episode
    return x | {"next_observations": next_s}


def test_stored_next_observations_are_used_in_any_order_of_rows(capsys):
    x = d4rl_arrays(300)
    x["terminals"][-1] = x["timeouts"][-1] = False
    plain, stored = load(x), load(with_next(x))
    assert_loaded([c[:-1] for c in stored], plain)
    np.testing.assert_array_equal(stored[3][-1], x["observations"][0])  # the last row is a transition too
    order = np.random.default_rng(0).permutation(300)
    shuffled = load({key: column[order] for key, column in with_next(x).items()})
    for c, d in zip(stored, shuffled, strict=True):  # by their rewards, which all differ
        np.testing.assert_array_equal(c[np.argsort(stored[2])], d[np.argsort(shuffled[2])])
    assert "Warning" not in capsys.readouterr().out


def test_next_observations_may_be_nan_where_they_are_not_used():
    expected, ends = load(x := with_next(d4rl_arrays(300))), x["terminals"] | x["timeouts"]
    x["next_observations"][ends] = np.nan
    assert_loaded(load(x), expected)
    x["next_observations"][np.flatnonzero(~ends)[3], 1] = np.nan
    assert "not finite" in refusal(load, x)


ALL, NO, LAST = np.ones(300), np.zeros(300), np.arange(300) % 15 == 14
BOTH = {"terminals": LAST, "timeouts": LAST, "rewards": LAST.astype("f4")}  # success in the last allowed step


@pytest.mark.parametrize("columns, stored, said", [
    ({}, False, []), ({"timeouts": None}, True, []), ({"terminals": ALL, "timeouts": NO}, True, []),
    ({"terminals": ALL, "timeouts": NO}, False, ["1 rows dropped"]),
    ({"timeouts": None}, False, ["marks no timeouts"]), ({"timeouts": NO}, False, ["marks no timeouts"]),
    (BOTH, False, ["20 rows dropped"]), (BOTH, True, ["20 rows"]),
    (BOTH | {"terminals": NO}, False, ["20 rows"]), (BOTH | {"terminals": LAST[:, None]}, False, ["20 rows"]),
    (BOTH | {"rewards": BOTH["rewards"][:, None]}, False, ["20 rows"]),
])  # fmt: skip
def test_what_is_lost_or_may_be_joined_is_said_aloud(capsys, columns, stored, said):
    x = d4rl_arrays(300)
    x["terminals"][-1] = False
    x = (with_next(x) if stored else x) | columns
    load({key: column for key, column in x.items() if column is not None})
    warnings = [line for line in capsys.readouterr().out.splitlines() if "Warning" in line]
    assert len(warnings) == len(said)
    assert all(words in line and "x.hdf5" in line for words, line in zip(said, warnings, strict=True))


@pytest.mark.parametrize("keys", [["rewards"], ["terminals"], ["timeouts"], ["rewards", "terminals"]])
def test_columns_of_shape_n_1_are_read_as_well(keys):
    x = d4rl_arrays(300)
    assert_loaded(load(x | {key: x[key][:, None] for key in keys}), qlearning_dataset(x))


@pytest.mark.parametrize("key, index, value, words", [
    ("observations", 7, np.nan, "not finite"), ("observations", 7, 1e39, "not finite"),  # beyond float32
    ("rewards", 7, -1e39, "not finite"), ("terminals", 7, 0.5, "other than 0 and 1"),
    ("actions", 7, 1.002, "actions .* -1.* to .*1"), ("actions", 7, -1.002, "actions .* -1.* to .*1"),
    ("actions", ..., 1e-3, "actions .* do not fit"), ("timeouts", ..., 1, "no transitions"),
])  # fmt: skip
def test_unusable_file_is_refused_with_its_own_sentence(key, index, value, words):
    x = d4rl_arrays()
    x[key] = x[key].astype(float) if index else value
    x[key][index] = value
    assert re.search("^x.hdf5 .*" + words, sentence := refusal(load, x)), sentence


@pytest.mark.parametrize("marked", [(3, 4, 5), (), (7,)])
def test_antmaze_goal_is_reward_0_and_terminal_whatever_the_terminals_say(capsys, marked):
    goal = np.isin(np.arange(20), (3, 4, 5)).astype(float)  # rows of the first of two trajectories
    x = d4rl_arrays(20, 29, 8) | {"rewards": goal, "terminals": goal, "timeouts": np.arange(20) % 10 == 9}
    s, a, r, next_s, terminated = qlearning_dataset(x)
    columns = load(x | {"terminals": np.isin(np.arange(20), marked)}, "antmaze-umaze-v2")
    assert_loaded(columns, [s, a, r - 1, next_s, terminated])
    assert capsys.readouterr().out == "x.hdf5: 18 transitions, 3 terminal, mean reward -0.833\n"
    assert "AntMaze" in refusal(load, x | {"rewards": goal + 0.5}, "antmaze-umaze-v2")


def test_mean_and_std_are_those_of_float64():
    x = d4rl_arrays(20_000)
    x["observations"] = 1000.3 + 0.01 * x["observations"]  # float32 sums are off by more than the std
    x["observations"][:, 4] = 7.0
    small = {"dataset_path": write_hdf5("x.hdf5", x), "gradient_steps": 1, "eval_episodes": 1}
    folder = run(dmg_offline, env_id="Hopper-v4", **small)
    agent, s = load_checkpoint(folder)["agent"], qlearning_dataset(x)[0]
    np.testing.assert_allclose(agent["mean"], s.mean(0), rtol=1e-7)
    np.testing.assert_allclose(agent["std"], s.std(0) + 1e-3, rtol=1e-6)


def test_minari_vector_episodes_keep_order_and_truncated_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    rng, episodes = np.random.default_rng(0), []
    for n in range(2, 14):  # 12 episodes: as text, episode_10 comes before episode_2
        s, a, r = rng.uniform(-1, 1, (n + 1, 3)), rng.uniform(-2, 2, (n, 1)), rng.normal(size=n)
        last = np.arange(n) == n - 1
        ends = {"terminations": last & (n % 2 == 0), "truncations": last & (n % 2 == 1)}
        episodes.append(EpisodeBuffer(observations=s.astype("f4"), actions=a.astype("f4"), rewards=r, **ends))
    minari.create_dataset_from_buffers("pendulum-v0", episodes, env="Pendulum-v1")
    columns = load_dataset(Args(env_id="pendulum-v0"))
    of = lambda x: (x.observations[:-1], x.actions / 2, x.rewards, x.observations[1:], x.terminations)  # noqa: E731
    assert_loaded(columns, [np.concatenate(c).astype(float) for c in zip(*map(of, episodes), strict=True)])


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The working folder in place of D4RL's server, with one file, which is returned; an empty cache."""
    monkeypatch.setenv("HOME", str(tmp_path))  # whatever goes wrong, the user's own cache stays as it is
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(dmg_offline, "D4RL_URL", tmp_path.as_uri() + "/")
    Path("gym_mujoco_v2").mkdir()
    file = Path(write_hdf5("gym_mujoco_v2/hopper_medium-v2.hdf5", d4rl_arrays()))
    monkeypatch.setitem(D4RL_FILES, "hopper-medium-v2", hashlib.sha256(file.read_bytes()).hexdigest()[:8])
    return file


def test_d4rl_name_is_downloaded_once_and_a_wrong_sha256_leaves_nothing(server, tmp_path, monkeypatch):
    whole = server.read_bytes()
    server.write_bytes(whole[:5000])
    with pytest.raises(RuntimeError, match="hash"):
        download_d4rl("hopper-medium-v2")
    assert list(Path("cache").iterdir()) == []
    server.write_bytes(whole)  # the next try is not spoiled by this one
    for _ in range(2):
        assert_loaded(load_dataset(Args("hopper-medium-v2")), qlearning_dataset(d4rl_arrays()))
        server.unlink(missing_ok=True)
    assert [path.name for path in Path("cache").iterdir()] == ["hopper_medium-v2.hdf5"]
    server.write_bytes(whole)
    monkeypatch.delenv("D4RL_DATASET_DIR")
    assert download_d4rl("hopper-medium-v2") == tmp_path / ".d4rl/datasets/hopper_medium-v2.hdf5"


ANT = "ant_maze_v2/Ant_maze_{}_noisy_multistart_{}_multigoal_{}_sparse_fixed.hdf5"  # one or many


@pytest.mark.parametrize("name, file", [
    ("hopper-medium-v2", "gym_mujoco_v2/hopper_medium-v2.hdf5"),
    ("halfcheetah-full-replay-v2", "gym_mujoco_v2/halfcheetah_full_replay-v2.hdf5"),
    ("antmaze-umaze-v2", ANT.format("u-maze", False, False)),
    ("antmaze-umaze-diverse-v2", ANT.format("u-maze", True, True)),
    ("antmaze-medium-play-v2", ANT.format("big-maze", True, False)),
    ("antmaze-large-diverse-v2", ANT.format("hardest-maze", True, True)),
])  # fmt: skip
def test_without_a_connection_a_name_says_which_file_to_put_where(server, tmp_path, name, file):
    hashes = hashlib.sha256(dmg_offline.D4RL_HASHES.encode()).hexdigest()
    assert hashes.startswith("39d6cd0c") and len(D4RL_FILES) == 24
    server.unlink()
    sentence = refusal(download_d4rl, name)
    assert f"{tmp_path}/{file} " in sentence and f"put it at {tmp_path}/cache/{Path(file).name}" in sentence
    assert list(Path("cache").iterdir()) == []

"""What goes in is what D4RL and Minari mean by a dataset; what cannot be used is refused with a sentence."""

import dataclasses
import hashlib
import http.server
import re
import socket
import threading
from types import SimpleNamespace

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from conftest import d4rl_arrays, write_hdf5
from gymnasium.spaces import flatten
from minari.data_collector import EpisodeBuffer

import dmg_offline
from dmg_offline import D4RL_SHA256, Args, InputError, download_d4rl, load_dataset, make_env

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* is set to None:UserWarning:minari"),
    pytest.mark.filterwarnings("ignore:.*(has no time limit|overflow|invalid value)"),
]


def load(path, env_id="Hopper-v4"):
    return load_dataset(Args(env_id=env_id, dataset_path=str(path)))


def refusal(function, *args):
    """The sentence with which function(*args) refuses."""
    with pytest.raises(InputError) as caught:
        function(*args)
    return str(caught.value)


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
    batch, mean, std = loaded
    s, a, r, next_s, terminated = rows
    true_mean, true_std = np.zeros(s.shape[1]), np.ones(s.shape[1])
    if normalise:
        true_mean, true_std = s.mean(0), s.std(0) + 1e-3
    np.testing.assert_allclose(mean, true_mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(std, true_std, rtol=1e-6)
    expected = (s - true_mean) / true_std, a, r, (next_s - true_mean) / true_std, terminated
    for name, x, y in zip(batch._fields, batch, expected, strict=True):
        assert x.numpy().dtype == np.float32, name
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5, err_msg=name)


# ---- D4RL's schema ----
@pytest.mark.parametrize("seed", range(9))
def test_hdf5_rows_are_those_of_d4rl_qlearning_dataset(tmp_path, seed):
    x = d4rl_arrays(200, seed=seed)
    for row, kind in (
        (0, seed % 3),
        (-1, seed // 3),
    ):  # the first and last row: inside an episode, terminal, timeout
        x["terminals"][row], x["timeouts"][row] = kind == 1, kind == 2
    x["terminals"][[50, 100]], x["timeouts"][[50, 100]] = (True, False), (False, True)
    batch, *_ = loaded = load(write_hdf5(tmp_path / "x.hdf5", x))
    assert_loaded(loaded, qlearning_dataset(x))
    assert len(batch.rewards) == 199 - x["timeouts"][:-1].sum()
    assert batch.terminated.sum() == x["terminals"][:-1].sum()  # none from a timeout


def test_row_that_is_terminal_and_timeout_is_dropped_as_d4rl_does(tmp_path):
    x = d4rl_arrays(50)
    x["terminals"][7] = x["timeouts"][7] = True
    assert_loaded(load(write_hdf5(tmp_path / "x.hdf5", x)), qlearning_dataset(x))


def test_float64_columns_and_float_flags_give_the_same_dataset(tmp_path, hopper_file):
    x = {key: column.astype(np.float64) for key, column in d4rl_arrays().items()}
    x |= {key: x[key][:, None] for key in ("rewards", "terminals", "timeouts")}
    (batch, *moments), (same, *same_moments) = (
        load(hopper_file),
        load(write_hdf5(tmp_path / "float64.hdf5", x)),
    )
    for one, other in zip((*batch, *moments), (*same, *same_moments), strict=True):
        np.testing.assert_array_equal(one, other)


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


def test_d4rl_name_reads_the_file_of_dataset_path_instead_of_its_own(hopper_file, tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    args = Args(env_id="hopper-medium-v2", dataset_path=hopper_file)
    assert_loaded(load_dataset(args), qlearning_dataset(d4rl_arrays()))
    assert not (tmp_path / "cache").exists()


# ---- the printed line ----
def test_printed_numbers_are_those_of_the_file(tmp_path, capsys):
    x = {key: column[:7] for key, column in d4rl_arrays().items()}
    x["rewards"] = np.array([1, 2, 3, 4, 5, 6, -7], np.float32)  # the unfinished last episode has no return
    x["terminals"], x["timeouts"] = np.arange(7) == 1, np.arange(7) == 4
    path = write_hdf5(tmp_path / "x.hdf5", x)
    load(path)
    whole = "5 transitions, 2 whole episodes, 1 terminals, 1 timeouts, mean return 7.50"
    assert capsys.readouterr().out == f"{path}: {whole}\n"
    x["terminals"][6] = True  # the last row gives no transition, but completes an episode
    load(write_hdf5(tmp_path / "x.hdf5", x))
    whole = "5 transitions, 3 whole episodes, 1 terminals, 1 timeouts, mean return 4.67"
    assert whole in capsys.readouterr().out


# ---- refused files ----
def put(key, index, value):
    def change(x):
        x[key] = x[key].astype(np.float64)
        x[key][index] = value

    return change


def replace(**columns):
    return lambda x: x.update(columns)


FLAGS = "terminals or timeouts other than 0 and 1"
REFUSED = {
    "nan observation": (put("observations", (7, 2), np.nan), "NaN .* observations"),
    "infinite observation": (put("observations", (7, 2), np.inf), "infinite observations"),
    "observation beyond float32": (put("observations", (7, 2), 1e39), "infinite observations"),
    "nan action": (put("actions", (7, 2), np.nan), "NaN .* actions"),
    "nan reward": (put("rewards", 7, np.nan), "NaN .* rewards"),
    "reward beyond float32": (put("rewards", 7, -1e39), "infinite rewards"),
    "nan terminal": (put("terminals", 7, np.nan), "terminals"),
    "terminal 2": (put("terminals", 7, 2), FLAGS),
    "timeout 0.5": (put("timeouts", 7, 0.5), FLAGS),
    "action too large": (put("actions", (7, 2), 1.002), "actions outside .*-1.* to .*1"),
    "action too small": (put("actions", (7, 2), -1.002), "actions outside .*-1.* to .*1"),
    "wide state": (
        replace(observations=np.zeros((600, 12))),
        r"observations of shape \(600, 12\).*\(600, 11\)",
    ),
    "narrow action": (replace(actions=np.zeros((600, 2))), r"actions of shape \(600, 2\).*\(600, 3\)"),
    "flat observations": (replace(observations=np.zeros(600)), r"observations of shape \(600,\)"),
    "flat actions": (replace(actions=np.zeros(600)), r"actions of shape \(600,\)"),
    "too few actions": (replace(actions=np.zeros((599, 3))), r"actions of shape \(599, 3\)"),
    "too many rewards": (replace(rewards=np.zeros(601)), r"rewards of shape \(601,\)"),
    "too few timeouts": (replace(timeouts=np.zeros(599)), "599"),
    "too many terminals": (replace(terminals=np.zeros(601)), "601"),
    "two rewards per row": (replace(rewards=np.zeros((300, 2))), r"rewards of shape \(300, 2\)"),
    "next_observations of another width": (
        replace(next_observations=np.zeros((600, 12))),
        "next_observations",
    ),
    "too few next_observations": (replace(next_observations=np.zeros((599, 11))), "next_observations"),
    "text": (replace(rewards="none"), "cannot read"),
    "a scalar": (replace(observations=1.0), "refused.hdf5"),
    "no row": (lambda x: x.update({key: column[:0] for key, column in x.items()}), "no transition"),
    "one row": (lambda x: x.update({key: column[:1] for key, column in x.items()}), "no transition"),
    "timeouts only": (replace(timeouts=np.ones(600)), "no transition"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_file_is_refused_with_its_own_sentence(tmp_path, name):
    change, words = REFUSED[name]
    x = d4rl_arrays()
    change(x)
    path = write_hdf5(tmp_path / "refused.hdf5", x)
    sentence = refusal(load, path)
    assert re.search(words, sentence) and path in sentence, sentence


@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "terminals", "timeouts"])
def test_missing_column_is_named(tmp_path, key):
    x = d4rl_arrays()
    del x[key]
    assert f"'{key}'" in refusal(load, write_hdf5(tmp_path / "x.hdf5", x))


def test_actions_may_exceed_the_bounds_by_rounding(tmp_path):
    x = d4rl_arrays()
    x["actions"][7] = 1 + 5e-4, -1 - 5e-4, 0
    assert_loaded(load(write_hdf5(tmp_path / "x.hdf5", x)), qlearning_dataset(x))


@pytest.mark.parametrize("kind", ["cut", "text", "groups", "absent", "folder"])
def test_what_is_no_whole_hdf5_file_is_refused(tmp_path, hopper_file, kind):
    path = tmp_path / "refused"
    if kind == "cut":
        with open(hopper_file, "rb") as file:
            path.write_bytes(file.read()[: file.seek(0, 2) // 2])
    elif kind == "text":
        path.write_text("observations,actions\n1,2\n")
    elif kind == "groups":
        write_hdf5(path, {f"{key}/episode_0": x for key, x in d4rl_arrays().items()})
    elif kind == "folder":
        path.mkdir()
    sentence = refusal(load, path)
    assert sentence.startswith(f"cannot read {path} (") and "D4RL's schema is observations (N, o)" in sentence


# ---- --env-id ----
@pytest.mark.parametrize("env_id", ["hopper-medium-v3", "hopper", "a/b-v0", "own/h?pper-v0"])
def test_id_of_no_kind_is_refused_with_the_kinds_there_are(tmp_path, monkeypatch, env_id):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    sentence = refusal(load_dataset, Args(env_id=env_id))
    assert all(words in sentence for words in (f"cannot load {env_id} ", *D4RL_SHA256, "Minari")), sentence
    assert not list(tmp_path.rglob("*.hdf5"))


# ---- action bounds other than -1 and 1 ----
def test_pendulum_actions_are_scaled_in_data_and_environment(tmp_path):
    x = d4rl_arrays(200, 3, 1)
    x["actions"] *= 2
    x["actions"][:2, 0] = -2, 2
    batch, *_ = loaded = load(write_hdf5(tmp_path / "x.hdf5", x), "Pendulum-v1")
    s, a, *others = qlearning_dataset(x)
    assert_loaded(loaded, [s, a / 2, *others])
    assert batch.actions.min() == -1 and batch.actions.max() == 1
    x["actions"][5] = 2.01
    assert "actions outside" in refusal(load, write_hdf5(tmp_path / "x.hdf5", x), "Pendulum-v1")


class Lopsided(gym.Env):
    """Each action has bounds of its own."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (11,))

    def __init__(self, dtype):
        low, high = np.array([0, -3, -1], dtype), np.array([1, 1, 1], dtype)
        self.action_space = gym.spaces.Box(low, high, dtype=dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_lopsided_action_bounds_are_centred_per_dimension(tmp_path, dtype):
    gym.register(f"Lopsided{np.dtype(dtype).name}-v0", Lopsided, kwargs={"dtype": dtype}, max_episode_steps=9)
    x = d4rl_arrays(50)
    low, high = np.array([0, -3, -1]), np.array([1, 1, 1])
    s, a, *others = qlearning_dataset(x)
    x["actions"] = (low + high + x["actions"] * (high - low)) / 2
    path = write_hdf5(tmp_path / "x.hdf5", x)
    assert_loaded(load(path, f"Lopsided{np.dtype(dtype).name}-v0"), [s, a, *others])


# ---- AntMaze ----
def antmaze_arrays():
    """Two trajectories of 10 rows; the first is at its goal in rows 3 to 5, the second never arrives."""
    x = d4rl_arrays(20, 29, 8)
    goal = np.isin(np.arange(20), (3, 4, 5))
    timeouts = np.arange(20) % 10 == 9
    return x | {"rewards": goal.astype(float), "terminals": goal.astype(float), "timeouts": timeouts}


def test_antmaze_goal_is_reward_0_and_terminal_in_raw_states(tmp_path, capsys):
    x = antmaze_arrays()
    path = write_hdf5(tmp_path / "x.hdf5", x)
    batch, *_ = loaded = load(path, "antmaze-umaze-v2")
    s, a, r, next_s, terminated = qlearning_dataset(x)
    assert_loaded(loaded, [s, a, r - 1, next_s, terminated], normalise=False)
    np.testing.assert_array_equal(batch.observations, x["observations"][x["timeouts"] == 0])
    assert batch.rewards.tolist() == [-1] * 3 + [0] * 3 + [-1] * 12
    assert batch.terminated.tolist() == [0] * 3 + [1] * 3 + [0] * 12
    # a trajectory goes on after its goal: only timeouts end it
    whole = "18 transitions, 2 whole episodes, 3 terminals, 2 timeouts, mean return 1.50"
    assert capsys.readouterr().out == f"{path}: {whole}\n"


def test_antmaze_goal_is_where_the_reward_is_1_whatever_the_terminals_say(tmp_path):
    x = antmaze_arrays() | {"terminals": np.zeros(20, bool)}
    batch, *_ = load(write_hdf5(tmp_path / "x.hdf5", x), "antmaze-umaze-v2")
    assert batch.terminated.tolist() == [0] * 3 + [1] * 3 + [0] * 12


@pytest.mark.parametrize("shift", [-1, 0.5])
def test_antmaze_with_other_rewards_than_0_and_1_is_refused(tmp_path, shift):
    x = antmaze_arrays()
    x["rewards"] += shift
    assert "AntMaze rewards" in refusal(load, write_hdf5(tmp_path / "x.hdf5", x), "antmaze-umaze-v2")


# ---- Minari ----
@pytest.fixture
def minari_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # Gymnasium-Robotics leaves its mazes there
    return tmp_path / "minari"


def load_minari(env_id, env, buffers):
    """Store `buffers` as a Minari dataset and read it back: load_dataset's answer and the environment."""
    minari.create_dataset_from_buffers(env_id, buffers, env=env, algorithm_name="test", requirements=[])
    args = Args(env_id=env_id)
    return load_dataset(args), make_env(args)


def pendulum_episodes(lengths):
    """Every second episode terminates, the others are truncated."""
    rng = np.random.default_rng(0)
    for i, n in enumerate(lengths):
        last = np.arange(n) == n - 1
        yield EpisodeBuffer(
            observations=rng.uniform(-1, 1, (n + 1, 3)).astype(np.float32),
            actions=rng.uniform(-2, 2, (n, 1)).astype(np.float32),
            rewards=rng.normal(size=n),
            terminations=last & (i % 2 == 0),
            truncations=last & (i % 2 == 1),
        )


def test_minari_vector_episodes_keep_order_and_truncated_rows(minari_folder, capsys):
    buffers = list(pendulum_episodes(range(2, 14)))  # 12 episodes: as text, episode_10 comes before episode_2
    loaded, env = load_minari("own/pendulum-v0", "Pendulum-v1", buffers)
    columns = [
        [x.observations[:-1] for x in buffers],
        [x.actions / 2 for x in buffers],
        [x.rewards for x in buffers],
        [x.observations[1:] for x in buffers],
        [x.terminations for x in buffers],
    ]
    assert_loaded(loaded, [np.concatenate(column).astype(np.float64) for column in columns])
    assert env.action_space == gym.spaces.Box(-1, 1, (1,)) and env.spec.id == "Pendulum-v1"
    returns = [x.rewards.sum() for x in buffers]
    whole = "90 transitions, 12 whole episodes, 6 terminals, 6 timeouts"
    found = capsys.readouterr().out
    assert found.endswith(f"own/pendulum-v0: {whole}, mean return {np.mean(returns):.2f}\n")


def test_minari_antmaze_is_flattened_and_relabelled(minari_folder, capsys):
    import gymnasium_robotics  # noqa: F401  registers AntMaze

    rng, goals = np.random.default_rng(0), ([], [2, 3], [4])
    sizes = {"observation": 27, "achieved_goal": 2, "desired_goal": 2}
    buffers = [
        EpisodeBuffer(
            observations={key: rng.normal(size=(6, size)) for key, size in sizes.items()},
            actions=rng.uniform(-1, 1, (5, 8)).astype(np.float32),
            rewards=np.isin(np.arange(5), goal).astype(float),
            terminations=np.zeros(5, bool),
            truncations=np.arange(5) == 4,
        )
        for goal in goals
    ]
    loaded, env = load_minari("own/antmaze-v0", "AntMaze_UMaze-v4", buffers)
    space = env.unwrapped.observation_space
    states = [
        [flatten(space, {key: column[t] for key, column in x.observations.items()}) for t in range(6)]
        for x in buffers
    ]
    s, next_s = np.concatenate([x[:-1] for x in states]), np.concatenate([x[1:] for x in states])
    a, r = (np.concatenate([getattr(x, name) for x in buffers]) for name in ("actions", "rewards"))
    assert_loaded(loaded, [s, a, r - 1, next_s, r], normalise=False)
    assert (
        "15 transitions, 3 whole episodes, 3 terminals, 3 timeouts, mean return 1.00"
        in capsys.readouterr().out
    )


def test_minari_episode_without_its_last_observation_is_refused(minari_folder):
    buffers = list(pendulum_episodes([3, 4]))
    buffers[1] = dataclasses.replace(buffers[1], observations=buffers[1].observations[:-1])
    assert "actions of shape (7, 1)" in refusal(load_minari, "own/pendulum-v0", "Pendulum-v1", buffers)


def test_minari_rows_that_are_not_finite_are_refused(minari_folder):
    buffers = list(pendulum_episodes([3, 4]))
    buffers[1].observations[-1, 1] = np.nan  # in no state, only in a next state
    assert "NaN" in refusal(load_minari, "own/pendulum-v0", "Pendulum-v1", buffers)


def test_own_minari_id_without_namespace_is_found(minari_folder):
    loaded, _ = load_minari("pendulum-v0", "Pendulum-v1", list(pendulum_episodes([3, 4])))
    assert len(loaded[0].rewards) == 7


# ---- download ----
LOCOMOTION = "random", "medium", "medium-replay", "medium-expert", "full-replay", "expert"
FILES = {
    f"{robot}-{data}-v2": f"gym_mujoco_v2/{robot}_{data.replace('-', '_')}-v2.hdf5"
    for robot in ("halfcheetah", "hopper", "walker2d")
    for data in LOCOMOTION
}
ANT_FILE = "ant_maze_v2/Ant_maze_{}_noisy_multistart_{}_multigoal_{}_sparse_fixed.hdf5"
FILES |= {  # start and goal of the recorded trajectories: one, or many
    f"antmaze-{name}-v2": ANT_FILE.format(maze, start, goal)
    for name, maze, start, goal in (
        ("umaze", "u-maze", False, False),
        ("umaze-diverse", "u-maze", True, True),
        ("medium-play", "big-maze", True, False),
        ("medium-diverse", "big-maze", True, True),
        ("large-play", "hardest-maze", True, False),
        ("large-diverse", "hardest-maze", True, True),
    )
}
HOPPER = "/d4rl/" + FILES["hopper-medium-v2"]


@pytest.fixture
def server(tmp_path, monkeypatch, hopper_file):
    """D4RL's server on this machine: `files` maps paths to bodies, `requests` lists what was asked for."""
    with open(hopper_file, "rb") as file:
        good = file.read()
    state = SimpleNamespace(files={HOPPER: good}, requests=[], good=good, announced=0)
    state.folder = tmp_path / "cache"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state.requests.append(self.path)
            body = state.files.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", len(body or b"") + state.announced)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HOME", str(tmp_path))  # whatever goes wrong, the user's own cache stays as it is
    monkeypatch.setenv("D4RL_DATASET_DIR", str(state.folder))
    monkeypatch.setattr(dmg_offline, "D4RL_URL", f"http://127.0.0.1:{httpd.server_port}/d4rl/")
    monkeypatch.setitem(D4RL_SHA256, "hopper-medium-v2", hashlib.sha256(good).hexdigest())
    yield state
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_d4rl_name_is_downloaded_once_and_loads(server):
    args = Args(env_id="hopper-medium-v2")
    for _ in range(2):
        assert_loaded(load_dataset(args), qlearning_dataset(d4rl_arrays()))
    assert server.requests == [HOPPER]
    assert [path.name for path in server.folder.iterdir()] == ["hopper_medium-v2.hdf5"]
    assert download_d4rl("hopper-medium-v2").read_bytes() == server.good


@pytest.mark.parametrize("fault", ["another file", "cut connection", "not found", "no connection"])
def test_failed_download_leaves_nothing_and_names_the_ways_on(server, fault, monkeypatch):
    server.files = {HOPPER: server.good[:-1] + b"?" if fault == "another file" else server.good[:5000]}
    server.announced = len(server.good) - 5000 if fault == "cut connection" else 0
    if fault == "not found":
        server.files = {}
    if fault == "no connection":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            monkeypatch.setattr(dmg_offline, "D4RL_URL", f"http://127.0.0.1:{free.getsockname()[1]}/")
    sentence = refusal(download_d4rl, "hopper-medium-v2")
    ways_on = (f"put it to {server.folder}/hopper_medium-v2.hdf5", "--dataset-path", "Minari id")
    assert all(words in sentence for words in (FILES["hopper-medium-v2"], *ways_on)), sentence
    assert ("HTTP Error 404" in sentence) == (fault == "not found")
    assert list(server.folder.iterdir()) == []
    if fault == "no connection":
        return
    server.files, server.announced = {HOPPER: server.good}, 0  # the next try is not spoiled by this one
    assert download_d4rl("hopper-medium-v2").read_bytes() == server.good


def test_another_file_in_the_cache_is_refused_and_left_alone(server):
    server.folder.mkdir()
    cached = server.folder / "hopper_medium-v2.hdf5"
    cached.write_bytes(server.good[:5000])
    sentence = refusal(download_d4rl, "hopper-medium-v2")
    assert f"{cached} is not D4RL's file" in sentence and "delete it" in sentence
    assert cached.read_bytes() == server.good[:5000] and server.requests == []


def test_cache_folder_is_d4rls_own_without_its_variable(server, monkeypatch, tmp_path):
    monkeypatch.delenv("D4RL_DATASET_DIR")
    assert download_d4rl("hopper-medium-v2") == tmp_path / ".d4rl/datasets/hopper_medium-v2.hdf5"


def test_each_d4rl_name_asks_for_its_file(server):
    server.files = {}
    for env_id in D4RL_SHA256:
        refusal(download_d4rl, env_id)
    asked = dict(zip(D4RL_SHA256, server.requests, strict=True))
    assert asked == {name: f"/d4rl/{path}" for name, path in FILES.items()}


def test_d4rl_hashes_are_sha256_and_differ():
    assert dmg_offline.D4RL_URL == "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
    assert len(set(D4RL_SHA256.values())) == len(D4RL_SHA256) == 24
    assert all(re.fullmatch("[0-9a-f]{16}", x) for x in D4RL_SHA256.values())

"""What goes in is what D4RL and Minari mean by a dataset; what cannot be used is refused with a sentence."""

import hashlib
import http.server
import re
import socket
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from conftest import d4rl_arrays, refusal, same, write_hdf5
from gymnasium.spaces import flatten
from minari.data_collector import EpisodeBuffer

import dmg_offline
from dmg_offline import D4RL_SHA256, Args, download_d4rl, load_dataset, make_env

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* is set to None:UserWarning:minari"),
    pytest.mark.filterwarnings("ignore:.*(has no time limit|overflow|invalid value)"),
]


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
    for row, kind in ((0, seed % 3), (-1, seed // 3)):  # inside an episode, terminal, timeout
        x["terminals"][row], x["timeouts"][row] = kind == 1, kind == 2
    x["terminals"][[50, 100]], x["timeouts"][[50, 100]] = (True, False), (True, True)
    x["actions"][7] = 1 + 5e-4, -1 - 5e-4, 0  # beyond the bounds by rounding
    batch, *_ = loaded = load(write_hdf5(tmp_path / "x.hdf5", x))
    assert_loaded(loaded, qlearning_dataset(x))
    assert len(batch.rewards) == 199 - x["timeouts"][:-1].sum()
    assert batch.terminated.sum() == (x["terminals"] & ~x["timeouts"])[:-1].sum()  # none from a timeout


def test_float64_columns_and_float_flags_give_the_same_dataset(tmp_path, hopper_file):
    x = {key: column.astype(np.float64) for key, column in d4rl_arrays().items()}
    x |= {key: x[key][:, None] for key in ("rewards", "terminals", "timeouts")}
    (batch, *moments), (other, *others) = load(hopper_file), load(write_hdf5(tmp_path / "float64.hdf5", x))
    assert same([*batch, *moments], [*other, *others])


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


def first(rows):
    return lambda x: x.update({key: column[:rows] for key, column in x.items()})


COLUMNS = {  # another one instead of the file's
    "wide state": ("observations", (600, 12), r"observations of shape \(600, 12\).*\(600, 11\)"),
    "narrow action": ("actions", (600, 2), r"actions of shape \(600, 2\).*\(600, 3\)"),
    "flat observations": ("observations", 600, r"observations of shape \(600,\)"),
    "too few actions": ("actions", (599, 3), r"actions of shape \(599, 3\)"),
    "too many rewards": ("rewards", 601, r"rewards of shape \(601,\)"),
    "too few timeouts": ("timeouts", 599, "599"),
    "two rewards per row": ("rewards", (300, 2), r"rewards of shape \(300, 2\)"),
    "wide next_observations": ("next_observations", (600, 12), "next_observations"),
}
REFUSED = {
    "nan observation": (put("observations", (7, 2), np.nan), "NaN .* observations"),
    "infinite observation": (put("observations", (7, 2), np.inf), "infinite observations"),
    "observation beyond float32": (put("observations", (7, 2), 1e39), "infinite observations"),
    "nan action": (put("actions", (7, 2), np.nan), "NaN .* actions"),
    "reward beyond float32": (put("rewards", 7, -1e39), "infinite rewards"),
    "terminal 2": (put("terminals", 7, 2), "terminals or timeouts other than 0 and 1"),
    "timeout 0.5": (put("timeouts", 7, 0.5), "terminals or timeouts other than 0 and 1"),
    "action too large": (put("actions", (7, 2), 1.002), "actions outside .*-1.* to .*1"),
    "action too small": (put("actions", (7, 2), -1.002), "actions outside .*-1.* to .*1"),
    "text": (lambda x: x.update(rewards="none"), "cannot read"),
    "no row": (first(0), "no transition"),
    "one row": (first(1), "no transition"),
    "timeouts only": (put("timeouts", slice(None), 1), "no transition"),
}
for name, (key, shape, words) in COLUMNS.items():
    REFUSED[name] = lambda x, key=key, shape=shape: x.update({key: np.zeros(shape)}), words
for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
    REFUSED[f"no {key}"] = lambda x, key=key: x.pop(key), f"'{key}'"


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_file_is_refused_with_its_own_sentence(tmp_path, name):
    change, words = REFUSED[name]
    x = d4rl_arrays()
    change(x)
    path = write_hdf5(tmp_path / "refused.hdf5", x)
    sentence = refusal(load, path)
    assert re.search(words, sentence) and path in sentence, sentence


@pytest.mark.parametrize("kind", ["cut", "groups", "absent"])
def test_what_is_no_whole_hdf5_file_is_refused(tmp_path, hopper_file, kind):
    path = tmp_path / "refused"
    if kind == "cut":
        path.write_bytes(Path(hopper_file).read_bytes()[:9000])
    elif kind == "groups":
        write_hdf5(path, {f"{key}/episode_0": x for key, x in d4rl_arrays().items()})
    sentence = refusal(load, path)
    assert sentence.startswith(f"cannot read {path} (") and "needs observations, actions, rewards" in sentence


# ---- --env-id ----
@pytest.mark.parametrize("env_id", ["hopper-medium-v3", "a/b-v0", "own/h?pper-v0"])
def test_id_of_no_kind_is_refused_with_the_kinds_there_are(tmp_path, monkeypatch, env_id):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    sentence = refusal(load_dataset, Args(env_id=env_id))
    assert all(words in sentence for words in (f"cannot load {env_id} ", *D4RL_SHA256, "Minari")), sentence


# ---- AntMaze ----
def antmaze_arrays():
    """Two trajectories of 10 rows; the first is at its goal in rows 3 to 5, the second never arrives."""
    goal = np.isin(np.arange(20), (3, 4, 5)).astype(float)
    x = {"rewards": goal, "terminals": goal, "timeouts": np.arange(20) % 10 == 9}
    return d4rl_arrays(20, 29, 8) | x


@pytest.mark.parametrize("marked", [True, False])
def test_antmaze_goal_is_reward_0_and_terminal_whatever_the_terminals_say(tmp_path, capsys, marked):
    x = antmaze_arrays()
    path = write_hdf5(tmp_path / "x.hdf5", x | {"terminals": marked * x["terminals"]})
    s, a, r, next_s, terminated = qlearning_dataset(x)
    assert_loaded(load(path, "antmaze-umaze-v2"), [s, a, r - 1, next_s, terminated], normalise=False)
    # a trajectory goes on after its goal: only timeouts end it
    whole = "18 transitions, 2 whole episodes, 3 terminals, 2 timeouts, mean return 1.50"
    assert capsys.readouterr().out == f"{path}: {whole}\n"
    x["rewards"] = x["rewards"] + 0.5
    assert "AntMaze rewards" in refusal(load, write_hdf5(path, x), "antmaze-umaze-v2")


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
    loaded, env = load_minari("pendulum-v0", "Pendulum-v1", buffers)
    columns = zip(
        *(
            (x.observations[:-1], x.actions / 2, x.rewards, x.observations[1:], x.terminations)
            for x in buffers
        ),
        strict=True,
    )
    assert_loaded(loaded, [np.concatenate(column).astype(np.float64) for column in columns])
    assert env.action_space == gym.spaces.Box(-1, 1, (1,)) and env.spec.id == "Pendulum-v1"
    mean = np.mean([x.rewards.sum() for x in buffers])
    whole = f"90 transitions, 12 whole episodes, 6 terminals, 6 timeouts, mean return {mean:.2f}"
    assert capsys.readouterr().out.endswith(f"pendulum-v0: {whole}\n")


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
    flat = partial(flatten, env.unwrapped.observation_space)
    states = [[flat({k: x.observations[k][t] for k in sizes}) for t in range(6)] for x in buffers]
    s, next_s = np.concatenate([x[:-1] for x in states]), np.concatenate([x[1:] for x in states])
    a, r = (np.concatenate([getattr(x, name) for x in buffers]) for name in ("actions", "rewards"))
    assert_loaded(loaded, [s, a, r - 1, next_s, r], normalise=False)
    whole = "15 transitions, 3 whole episodes, 3 terminals, 3 timeouts, mean return 1.00"
    assert whole in capsys.readouterr().out


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
    good = Path(hopper_file).read_bytes()
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
    assert FILES["hopper-medium-v2"] in sentence and f"put it to {server.folder}/hopper_medium" in sentence
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

"""No file can do harm: whatever is in it, loading ends soon with the data or with one sentence and exit code 2.

Each batch of cases runs in a forked child, since a damaged file may crash the HDF5 library itself.
"""

import contextlib
import functools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import zlib
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from conftest import d4rl_arrays, write_hdf5
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import pendulum_episodes

import dmg_offline
from dmg_offline import Args, Stop, load_checkpoint, load_dataset, make_env, open_minari

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SECONDS, BYTES = 10, 2**30
COLUMNS = ("observations", "actions", "rewards", "terminals", "timeouts")
SET = "own/pendulum-v0"


@functools.cache
def pendulum():
    return make_env(Args(env_id="Pendulum-v1", dataset_path="x"), None)


def load_d4rl(path):
    args = Args(env_id="Pendulum-v1", dataset_path=str(path))
    return load_dataset(args, open_minari(args), pendulum())


def load_minari(_=None):
    args = Args(env_id=SET)
    source = open_minari(args)
    return load_dataset(args, source, make_env(args, source))


def outcome(load, *args):
    """'loaded', the sentence of a Stop, or what else happened."""
    begun = time.monotonic()
    try:
        batch, mean, std = load(*args)
        good = all(x.isfinite().all() for x in batch) and np.isfinite([mean, std]).all()
        result = "loaded" if good and batch.terminated.unique().numel() <= 2 else "FAULT: loaded garbage"
    except Stop as stop:
        sentence, code = stop.args
        result = sentence if code == 2 and "\n" not in sentence else f"FAULT: {stop.args}"
    except BaseException:
        result = "FAULT: " + traceback.format_exc()
    return result if time.monotonic() - begun < SECONDS else f"FAULT: it took {time.monotonic() - begun:.0f} s"


def outcomes(load, cases, tmp_path):
    """Of each case, which writes a file to the path it is given, in a forked child with a bound on time and memory."""
    report, path = tmp_path / "report", tmp_path / "case"
    pendulum()
    child = os.fork()
    if not child:  # no return from here
        with contextlib.suppress(BaseException), report.open("w") as out, Path(os.devnull).open("w") as null:
            os.dup2(null.fileno(), 1), os.dup2(null.fileno(), 2)
            base = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (base + BYTES, base + BYTES))
            for case in cases:
                signal.alarm(2 * SECONDS)  # kills a hang
                case(path)
                print(json.dumps(outcome(load, path)), file=out, flush=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    found = [json.loads(line) for line in report.read_text().splitlines()]
    if len(found) < len(cases):
        found.append(f"FAULT: case {len(found)} ended the process with status {status}")
    return found


def assert_refused_or_loaded(found, number):
    faults = {i: x for i, x in enumerate(found) if x.startswith("FAULT")}
    assert not faults and len(found) == number, faults


# ---- damaged bytes ----
def damaged(good, kind, rng):
    """A function that writes `good`, cut or with some bytes changed, to a path."""
    if kind == "cut":
        data = good[: rng.randrange(len(good))]
    elif kind == "flip":
        data = bytearray(good)
        header = [i for i in range(len(good)) if i < 3000] if rng.random() < 0.5 else range(len(good))
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            data[rng.choice(header)] = rng.randrange(256)
    else:  # a stretch of zeros, ones or noise
        data, start = bytearray(good), rng.randrange(len(good))
        size = min(rng.choice((4, 8, 64, 512)), len(good) - start)
        data[start : start + size] = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
    return lambda path: path.write_bytes(data)


def d4rl_file(path, compression=None):
    with h5py.File(path, "w") as file:
        for key, x in d4rl_arrays(60, 3, 1).items():
            file.create_dataset(key, data=x, compression=compression)
    return path.read_bytes()


def check_damaged_d4rl(tmp_path, number, seed):
    rng, cases = random.Random(seed), []
    for compression in (None, "gzip"):
        good = d4rl_file(tmp_path / "good", compression)
        cases += [damaged(good, kind, rng) for kind in ("cut", "flip", "stretch") for _ in range(number // 6)]
    found = outcomes(load_d4rl, cases, tmp_path)
    assert_refused_or_loaded(found, len(cases))
    assert sum(x.startswith("cannot read") for x in found) > len(found) / 4 and "loaded" in found


def test_a_damaged_d4rl_file_is_data_or_one_sentence(tmp_path):
    check_damaged_d4rl(tmp_path, 480, 0)


@pytest.fixture
def minari_set(tmp_path, monkeypatch):
    """The folder of a small Minari set, SET."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    minari.create_dataset_from_buffers(
        SET, list(pendulum_episodes([3, 4])), env="Pendulum-v1", algorithm_name="test", requirements=[]
    )
    return tmp_path / "minari" / SET / "data"


def check_damaged_minari(tmp_path, folder, number, seed):
    rng, cases = random.Random(seed), []
    good = {path: path.read_bytes() for path in folder.iterdir()}

    def case(_, into, write):
        for path, data in good.items():
            path.write_bytes(data)
        write(into)

    for into in (folder / "main_data.hdf5", folder / "metadata.json"):
        writers = [damaged(good[into], kind, rng) for kind in ("cut", "flip", "stretch") for _ in range(number // 6)]
        cases += [functools.partial(case, into=into, write=write) for write in writers]
    found = outcomes(load_minari, cases, tmp_path)
    assert_refused_or_loaded(found, len(cases))
    assert any(x.startswith("cannot read") for x in found) and any(x.startswith("cannot load") for x in found)


def test_a_damaged_minari_set_is_data_or_one_sentence(tmp_path, minari_set):
    check_damaged_minari(tmp_path, minari_set, 240, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_more_damaged_files(tmp_path, minari_set, seed):
    check_damaged_d4rl(tmp_path, 1200, seed)
    check_damaged_minari(tmp_path, minari_set, 1200, seed)


# ---- files that are whole but mean ill ----
def hostile(name, tmp_path):
    """A function that writes a D4RL file with one column made otherwise."""
    secret = tmp_path / "secret.hdf5"
    write_hdf5(secret, d4rl_arrays(60, 3, 1))

    def write(path):
        write_hdf5(path, {key: x for key, x in d4rl_arrays(60, 3, 1).items() if key != "observations"})
        with h5py.File(path, "a") as file:
            make = functools.partial(file.create_dataset, "observations")
            if name == "external link":
                file["observations"] = h5py.ExternalLink(str(secret), "observations")
            elif name == "soft link over an external one":
                file["x"] = h5py.ExternalLink(str(secret), "/")
                file["observations"] = h5py.SoftLink("/x/observations")
            elif name == "external storage":
                make(shape=(60, 3), dtype="f4", external=[(str(secret), 0, 720)])
            elif name == "virtual":
                layout = h5py.VirtualLayout((60, 3), "f4")
                layout[:] = h5py.VirtualSource(str(secret), "observations", (60, 3))
                file.create_virtual_dataset("observations", layout)
            elif name == "10^12 rows":
                make(shape=(10**12, 3), dtype="f4", chunks=(1000, 3))
            elif name == "10^12 contiguous rows":
                make(shape=(10**12, 3), dtype="f4")
            elif name == "chunks of 3 GB":
                make(shape=(60, 3), dtype="f8", maxshape=(None, 3), chunks=(120_000_000, 3), compression="gzip")
                file["observations"].id.write_direct_chunk((0, 0), zlib.compress(bytes(100)))
            elif name == "bomb":
                make(data=np.zeros((20_000_000, 3), np.int8), chunks=(1_000_000, 3), compression="gzip")
            elif name == "unwritten rows":
                make(shape=(60, 3), dtype="f4", chunks=(10, 3))[:30] = 1
            elif name == "never written":
                make(shape=(60, 3), dtype="f4")
            elif name == "objects":
                make(data=np.array([b"x"] * 60, object), dtype=h5py.special_dtype(vlen=bytes))
            elif name == "references":
                make(shape=(60,), dtype=h5py.ref_dtype)[:] = [file["actions"].ref] * 60
            elif name == "ragged":
                make(shape=(60,), dtype=h5py.vlen_dtype("f4"))[0] = np.zeros(3)
            elif name == "compound":
                make(data=np.zeros(60, [("x", "f4"), ("y", "f4")]))
            elif name == "subarrays":
                make(shape=(60,), dtype=np.dtype(("f4", 3)))
            elif name == "complex":
                make(data=np.zeros((60, 3), "c8"))
            elif name == "empty":
                make(data=h5py.Empty("f4"))
            elif name == "a group":
                file["observations/a"] = np.zeros(3)
            elif name == "a group that holds itself":
                file["observations"] = file["/"]
            elif name == "a type":
                file["observations"] = np.dtype("f4")

    return write


HOSTILE = {
    **dict.fromkeys(("external link", "soft link over an external one"), "'observations' is missing or a link"),
    **dict.fromkeys(("external storage", "virtual"), "'observations' is stored in another file"),
    **dict.fromkeys(("10^12 rows", "10^12 contiguous rows", "bomb"), "is over 100 times as large as the file"),
    "chunks of 3 GB": "is over 100 times as large as the file",
    **dict.fromkeys(("unwritten rows", "never written"), "has rows that were never written"),
    **dict.fromkeys(("objects", "references", "ragged", "compound", "subarrays", "complex"), "holds no numbers but"),
    **dict.fromkeys(("empty", "a group", "a group that holds itself", "a type"), "cannot read"),
}


def test_a_file_that_leads_elsewhere_or_unpacks_without_bound_is_refused(tmp_path):
    cases = [hostile(name, tmp_path) for name in HOSTILE]
    found = outcomes(load_d4rl, cases, tmp_path)
    assert_refused_or_loaded(found, len(cases))
    wrong = {name: x for (name, words), x in zip(HOSTILE.items(), found, strict=True) if words not in x}
    assert not wrong


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "name too long", "text", "empty"])
def test_what_is_no_file_of_numbers_is_refused_at_once(tmp_path, kind):
    path = {"device": "/dev/zero", "name too long": "x" * 5000}.get(kind, tmp_path / "x")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("text", "empty"):
        path.write_text("a,b\n1,2\n" * (kind == "text"))
    (found,) = outcomes(lambda _: load_d4rl(path), [lambda _: None], tmp_path)
    assert found.startswith(f"cannot read {path}: "), found


DTYPES = ("f2", "f4", "f8", "i1", "i4", "u8", "?", "c8", "S3")
COLUMN = st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4), st.integers(-1, 2))


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(columns=st.fixed_dictionaries(dict.fromkeys(COLUMNS, COLUMN)))
def test_columns_of_any_type_and_shape_are_data_or_one_sentence(tmp_path, columns):
    arrays = {key: np.full(shape, fill).astype(dtype) for key, (dtype, shape, fill) in columns.items()}
    found = outcome(load_d4rl, write_hdf5(tmp_path / "x.hdf5", arrays))
    assert not found.startswith("FAULT"), found


FLAG = st.sampled_from([0, 0, 0, 1, 1, 0.5, 2, -1, float("nan"), float("inf")])


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(flags=st.lists(st.tuples(FLAG, FLAG), min_size=2, max_size=6), number=st.sampled_from(["f2", "f4", "f8"]))
def test_any_flags_are_data_or_one_sentence(tmp_path, flags, number):
    arrays = d4rl_arrays(len(flags), 3, 1)
    arrays |= dict(zip(("terminals", "timeouts"), np.array(flags, number).T, strict=True))
    found = outcome(load_d4rl, write_hdf5(tmp_path / "x.hdf5", arrays))
    if all(timeout == 1 for _, timeout in flags[:-1]):
        assert "no transition" in found
    else:
        assert found == "loaded" if np.isin(flags, (0, 1)).all() else "other than 0 and 1" in found


# ---- Minari's metadata ----
def ran(path):
    """Something that a file must not be able to call."""
    Path(path).write_text("ran")


class Harmful(gym.Env):
    def __init__(self, path="harm", **_):
        ran(path)


def change_spec(folder, **changes):
    metadata = json.loads((folder / "metadata.json").read_text())
    metadata["env_spec"] = json.dumps(json.loads(metadata["env_spec"]) | changes)
    (folder / "metadata.json").write_text(json.dumps(metadata))


def wrapper(entry_point, **kwargs):
    return [{"name": entry_point.split(":")[-1], "entry_point": entry_point, "kwargs": kwargs}]


SPECS = {
    "another entry point": {"entry_point": f"{__name__}:Harmful"},
    "an id that is not registered": {"id": "Harmful-v0", "entry_point": f"{__name__}:Harmful"},
    "an id that names a module": {"id": f"{__name__}:Harmful-v0"},
    "a wrapper of its own": {"additional_wrappers": wrapper(f"{__name__}:Harmful", path="harm")},
    "a function for a wrapper": {"additional_wrappers": wrapper("os:system", command="touch harm")},
    "a wrapper that writes": {
        "additional_wrappers": wrapper("gymnasium.wrappers.rendering:RecordVideo", video_folder="harm")
    },
    "a path": {"kwargs": {"xml_file": "/etc/passwd"}},
    "a path in the home folder": {"kwargs": {"xml_file": "~x"}},
    "a path upwards": {"kwargs": {"a": [{"b": "..\\harm"}]}},
    "a path in a key": {"kwargs": {"../harm": 1}},
    "an unknown argument": {"kwargs": {"harm": 1}},
    "no text for an id": {"id": 3},
    "no list of wrappers": {"additional_wrappers": 3},
    "an episode of no steps": {"max_episode_steps": -1.5},
}


@pytest.mark.parametrize("without_spaces", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_a_minari_set_cannot_choose_what_code_runs(minari_set, tmp_path, monkeypatch, name, without_spaces):
    monkeypatch.chdir(tmp_path)
    change_spec(minari_set, **SPECS[name])
    if without_spaces:  # Minari would then make the environment to find them
        metadata = json.loads((minari_set / "metadata.json").read_text())
        del metadata["observation_space"], metadata["action_space"]
        (minari_set / "metadata.json").write_text(json.dumps(metadata))
    before = sorted(tmp_path.rglob("*"))
    found = outcome(load_minari)
    assert found != "loaded" and not found.startswith("FAULT"), found
    assert sorted(tmp_path.rglob("*")) == before
    reasons = {"a path": "name paths", "entry_point": "not registered", "wrapper": "has wrappers"}
    words = [reason for key, reason in reasons.items() if key in f"{name} {[*SPECS[name]]}"]
    assert name == "no list of wrappers" or all(x in found for x in words), found


def test_a_set_keeps_its_arguments_its_time_limit_and_gymnasiums_wrappers(minari_set):
    wrappers = wrapper("gymnasium.wrappers.transform_observation:RescaleObservation", min_obs=-1, max_obs=1)
    change_spec(minari_set, kwargs={"g": 5.0}, max_episode_steps=7, additional_wrappers=wrappers)
    args = Args(env_id=SET)
    env = make_env(args, open_minari(args))
    assert env.unwrapped.g == 5 and env.spec.max_episode_steps == 7 and env.observation_space.high.max() == 1


METADATA = {
    "scores that are text": {"ref_min_score": "a", "ref_max_score": "b"},
    "scores that are equal": {"ref_min_score": 1, "ref_max_score": 1},
    "infinite scores": {"ref_min_score": 0, "ref_max_score": float("inf")},
    "half a score": {"ref_max_score": 1},
    "more episodes than it holds": {"total_episodes": 3},
    "10^12 episodes": {"total_episodes": 10**12},
    "no episode": {"total_episodes": 0},
    "no number of episodes": {"total_episodes": "many"},
    "no environment": {"env_spec": None},
    "a deep environment": {"env_spec": "[" * 100_000},
    "another format": {"data_format": "arrow"},
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_that_makes_no_sense_is_refused(minari_set, tmp_path, name):
    path = minari_set / "metadata.json"
    if name == "another format":
        (minari_set / "main_data.hdf5").unlink()
    path.write_text(json.dumps(json.loads(path.read_text()) | METADATA[name]))
    (found,) = outcomes(load_minari, [lambda _: None], tmp_path)
    assert found.startswith(("cannot load", "cannot read")), found


@pytest.mark.parametrize("kind", ["pipe", "huge", "deep", "list"])
def test_metadata_that_is_no_metadata_is_refused(minari_set, tmp_path, kind):
    path = minari_set / "metadata.json"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(2**40)
    else:
        path.write_text("[]" if kind == "list" else "[" * 1_000_000)
    (found,) = outcomes(load_minari, [lambda _: None], tmp_path)
    assert found.startswith("cannot load"), found


def edit(name):
    """Changes the second episode of a Minari set."""

    def change(folder):
        with h5py.File(folder / "main_data.hdf5", "a") as file:
            episode = file["episode_1"]
            actions, rewards, flags = (episode[key][()] for key in ("actions", "rewards", "terminations"))
            if name == "rewards moved between episodes":  # the sums of lengths agree
                for other, part in ((episode, rewards[:-1]), (file["episode_0"], [*rewards, 0.0])):
                    del other["rewards"]
                    other["rewards"] = part
            elif name == "a column of rewards":
                del episode["rewards"]
                episode["rewards"] = rewards[:, None]
            elif name == "flags of 2":
                del episode["terminations"]
                episode["terminations"] = 2.0 * np.ones(len(flags))
            elif name == "wider actions":
                del episode["actions"]
                episode["actions"] = np.concatenate([actions, actions], 1)
            elif name == "a link":
                del episode["actions"]
                episode["actions"] = h5py.ExternalLink(str(folder / "main_data.hdf5"), "episode_0/actions")
            elif name == "an episode elsewhere":
                del file["episode_1"]
                file["episode_1"] = h5py.ExternalLink(str(folder / "other.hdf5"), "episode_1")

    return change


@pytest.mark.parametrize(
    "name",
    [
        "rewards moved between episodes",
        "a column of rewards",
        "flags of 2",
        "wider actions",
        "a link",
        "an episode elsewhere",
    ],
)
def test_minari_columns_that_do_not_fit_each_other_are_refused(minari_set, tmp_path, name):
    shutil.copy(minari_set / "main_data.hdf5", minari_set / "other.hdf5")
    edit(name)(minari_set)
    found = outcome(load_minari)
    assert found != "loaded" and not found.startswith("FAULT"), found


@pytest.mark.parametrize(
    "name", ["../outside-v0", "own/../../outside-v0", "{tmp}/outside-v0", "hf://own/pendulum-v0", "~/x-v0"]
)
def test_an_id_leads_out_of_no_folder(minari_set, tmp_path, name):
    shutil.copytree(minari_set.parent, tmp_path / "outside-v0")
    args = Args(env_id=name.format(tmp=tmp_path))
    found = outcome(lambda: open_minari(args))
    assert found.startswith(f"unknown --env-id {args.env_id}:"), found


# ---- checkpoints ----
class Exploit:
    def __reduce__(self):
        return ran, ("harm",)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Folder of a short run on a small file."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        data = write_hdf5(folder / "x.hdf5", d4rl_arrays(60, 3, 1))
        flags = ["--no-cuda", "--gradient-steps=2", "--eval-episodes=1", "--batch-size=4"]
        patched.setattr(sys, "argv", ["dmg_offline.py", "--env-id", "Pendulum-v1", "--dataset-path", data, *flags])
        assert dmg_offline.main() == 0
        return next((folder / "runs").iterdir()).resolve()


def test_a_checkpoint_cannot_run_code(run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x").mkdir()
    state = torch.load(run_folder / "checkpoint.pt", weights_only=True)
    for name, save in {"pt": torch.save, "pickle": lambda x, path: path.write_bytes(pickle.dumps(x))}.items():
        save(state | {"agent": Exploit()}, Path("x/checkpoint.pt"))
        with pytest.raises(Stop) as stop:
            load_checkpoint("x")
        assert "damaged" in stop.value.args[0] and "weights_only" not in stop.value.args[0], name
    assert not Path("harm").exists()


def test_a_damaged_checkpoint_is_whole_or_one_sentence(run_folder, tmp_path):
    (tmp_path / "x").mkdir()
    good, path, rng = (run_folder / "checkpoint.pt").read_bytes(), tmp_path / "x" / "checkpoint.pt", random.Random(0)
    for kind in ("cut", "flip", "stretch"):
        for _ in range(20):
            damaged(good, kind, rng)(path)
            try:
                load_checkpoint(str(tmp_path / "x"))
            except Stop as stop:
                assert stop.args[1] == 2 and "\n" not in stop.args[0]


def changed(run_folder, tmp_path, **changes):
    (tmp_path / "x").mkdir(exist_ok=True)
    state = torch.load(run_folder / "checkpoint.pt", weights_only=True)
    torch.save(state | changes, tmp_path / "x" / "checkpoint.pt")
    return str(tmp_path / "x")


def resume(folder, monkeypatch, capsys, *more):
    monkeypatch.setattr(sys, "argv", ["dmg_offline.py", "--resume", folder, *more])
    code = dmg_offline.main()
    return code, capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"format": 1}, "format 1, this script reads 3"),
        ({"format": 99}, "format 99"),
        ({"script": "iql"}, "was written by iql.py"),
        ({"args": {"alpha": 2.5}}, "alpha"),
        ({"agent": {}}, "does not fit Pendulum-v1"),
        ({"optimizers": []}, "does not fit Pendulum-v1"),
        ({"generator": torch.zeros(3)}, "does not fit Pendulum-v1"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(run_folder, tmp_path, monkeypatch, capsys, changes, words):
    code, err = resume(changed(run_folder, tmp_path, **changes), monkeypatch, capsys)
    assert code == 2 and words in err, err


@pytest.mark.parametrize("more", [[], ["--eval-only"]])
def test_a_checkpoint_of_another_environment_is_refused_by_name(run_folder, monkeypatch, capsys, more):
    code, err = resume(str(run_folder), monkeypatch, capsys, "--env-id", "MountainCarContinuous-v0", *more)
    assert code == 2 and "was trained on Pendulum-v1, not on MountainCarContinuous-v0" in err

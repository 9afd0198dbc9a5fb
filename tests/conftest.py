"""Tiny datasets, made here, and runs on them: no test needs the network or a file outside the repository."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network fails at once

import runpy
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import dmg_finetune

torch.set_num_threads(1)
DATA = {"env_id": "Hopper-v4", "dataset_path": "hopper.hdf5", "batch_size": 16, "cuda": False}
DATA |= {"eval_episodes": 1, "eval_frequency": 100}


def d4rl_arrays(n=600, state_dim=11, action_dim=3, seed=0):
    """Random rows in D4RL's schema with Hopper's shapes; terminals and timeouts exclude each other."""
    rng = np.random.default_rng(seed)
    end = rng.random(n)
    s, a, r = rng.normal(size=(n, state_dim)), rng.uniform(-1, 1, (n, action_dim)), rng.normal(size=n)
    floats = {"observations": s, "actions": a, "rewards": r}
    ends = {"terminals": end < 0.02, "timeouts": end > 0.98}
    return {key: x.astype(np.float32) for key, x in floats.items()} | ends


def write_hdf5(path, arrays):
    with h5py.File(path, "w") as file:
        for key, x in arrays.items():
            file[key] = x
    return str(path)


@pytest.fixture
def hopper_file(tmp_path):
    """Path of a D4RL file that fits Hopper."""
    return write_hdf5(tmp_path / "hopper.hdf5", d4rl_arrays())


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """All runs of a file share one folder; Gymnasium-Robotics leaves its XML in the temporary folder."""
    folder = tmp_path_factory.mktemp("room")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(tempfile, "tempdir", str(folder))
        write_hdf5("hopper.hdf5", x := d4rl_arrays())
        write_hdf5("other_units.hdf5", x | {"observations": 3 + 5 * x["observations"][::-1]})
        write_hdf5("thousands.hdf5", x | {"rewards": np.full(600, 1000.0)})
        write_hdf5("walker.hdf5", d4rl_arrays(60, 17, 6))
        yield folder


def run(script=dmg_finetune, *flags, **settings):
    """A whole run in this process, with flags as from the command line: its folder, None if resumed."""
    before = set(Path("runs").glob("*"))
    if flags:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("sys.argv", [script.__file__, *map(str, flags)])
            runpy.run_path(script.__file__, run_name="__main__")
    elif settings.get("resume"):
        vars(args := script.read_args(settings["resume"])).update(settings)
        script.main(args)
    else:
        script.main(script.Args(**settings))
    (folder,) = set(Path("runs").glob("*")) - before or [None]
    return folder and folder.resolve()


def spied(script, function, *args, learn=True, **settings):
    """function's result; of each update batch, lam, nu, gamma and rates. learn=False: updates do nothing."""
    seen, update = [], script.update if learn else lambda *_: {"q_values": torch.zeros(())}

    def spy(agent, batch, *rest):
        options = rest[0] if len(rest) == 1 else rest[1]
        numbers = [float(getattr(options, name, 0)) for name in ("lam", "nu", "gamma")]
        rates = [optimizer.param_groups[0]["lr"].item() for optimizer in agent.optimizers]
        seen.append((list(batch), numbers, rates))
        return update(agent, batch, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(script, "update", spy)
        return function(*args, **settings), seen


def drawn(script, folder, seen):
    """Rows of a run's dataset; columns of these and the online rows; which of them each batch has."""
    args, saved = script.read_args(folder), load_checkpoint(folder)
    s, a, r, next_s, terminated = script.load_dataset(args)
    mean, std = saved["agent"]["mean"], saved["agent"]["std"]
    columns = [(s - mean) / std, a, r, (next_s - mean) / std, terminated]
    if "online" in saved:
        columns = [torch.cat(x) for x in zip(columns, saved["online"]["rows"], strict=True)]
    row_of = {bytes(x): i for i, x in enumerate(columns[0].numpy())}
    assert len(row_of) == len(columns[0])
    return len(s), columns, [[row_of[bytes(x)] for x in batch[0].numpy()] for batch, *_ in seen]


def refusal(function, *args):
    """The one sentence with which function(*args) refuses, before it writes anything into runs."""
    files = lambda: {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}  # noqa: E731
    before = files()
    with pytest.raises(ValueError) as caught:
        function(*args)
    assert "\n" not in str(caught.value) and files() == before
    return str(caught.value)


def load_checkpoint(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def eval_rows(folder):
    """{step: the rest of its line} of eval.csv; what a killed run evaluated twice was the same."""
    lines = {(*line.split(","),) for line in (Path(folder) / "eval.csv").read_text().splitlines()[1:]}
    rows = {int(step): row for step, *row in sorted(lines, key=lambda line: int(line[0]))}
    assert len(rows) == len(lines)
    return rows


def same(a, b):
    """Equal to the bit, however nested."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

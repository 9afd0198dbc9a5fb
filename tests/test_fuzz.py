"""Whatever is in a file or an argument, it is trained on or refused with a sentence: no other exception."""

import io

import h5py
import numpy as np
import pytest
import torch
from conftest import d4rl_arrays
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmg_offline import COLUMNS, Agent, Args, Batch, InputError, load_dataset, update

FUZZ = {"suppress_health_check": [HealthCheck.function_scoped_fixture], "deadline": None, "derandomize": True}
SHAPES = {"observations": (40, 3), "actions": (40, 1), "next_observations": (40, 3)}
DTYPES = ("f2", "f4", "f8", "i1", "i4", "u8", "?", "c8", "S3")


@st.composite
def columns(draw):
    """A good file's columns, some of them replaced or missing, or with odd numbers in them."""
    x = d4rl_arrays(40, 3, 1, seed=draw(st.integers(0, 3)))
    x["next_observations"] = np.roll(x["observations"], -1, 0)
    for key in draw(st.lists(st.sampled_from(COLUMNS), unique=True, max_size=1)):
        kind = draw(st.sampled_from(["missing", "shape", "type", "number"]))
        if kind == "missing":
            del x[key]
        elif kind == "shape":
            x[key] = np.zeros(draw(st.lists(st.sampled_from([0, 1, 3, 39, 40, 41]), max_size=3)))
        elif kind == "type":
            x[key] = np.ones(SHAPES.get(key, (40,))).astype(draw(st.sampled_from(DTYPES)))
        else:
            x[key] = x[key].astype(np.float64)
            numbers = [np.nan, np.inf, -1e300, 1e38, 1e9, 2, 0.5, -1]
            x[key][draw(st.integers(0, 39))] = draw(st.sampled_from(numbers))
    return x


@st.composite
def files(draw):
    """The bytes of such a file, sometimes cut."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for key, x in draw(columns()).items():
            file[key] = x
    data = buffer.getvalue()
    return data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 4)) == 4 else data


NUMBER = st.sampled_from([0.5, 1, 0, 2, 1e-9, 1e9, -1, float("nan")])
NAMES = "lam", "nu", "expectile", "gamma", "policy_noise", "inverse_temperature", "in_sample_temperature"
ENVIRONMENTS = st.sampled_from(["hopper-medium-v2", "NoSuchRobot-v0", "a/b", "antmaze-umaze-v2", ""])
OTHERS = {"in_sample": st.sampled_from(["iql", "xql", "sql"]), "env_id": ENVIRONMENTS}
ARGUMENTS = st.fixed_dictionaries({}, optional=OTHERS | dict.fromkeys(NAMES, NUMBER))
LOADED = []


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=100, **FUZZ)
@given(file=files(), arguments=ARGUMENTS)
def test_any_file_and_any_arguments_are_trained_on_or_refused_with_a_sentence(tmp_path, file, arguments):
    (path := tmp_path / "x.hdf5").write_bytes(file)
    try:
        args = Args(**{"env_id": "Pendulum-v1", "dataset_path": str(path)} | arguments)
        dataset, mean, std = load_dataset(args)
    except InputError as error:
        assert len(str(error)) > 20
        return
    assert all(x.isfinite().all() for x in (*dataset, mean, std)), "garbage was loaded"
    assert dataset.terminated.unique().numel() <= 2 and dataset.actions.abs().max() < 1.01
    batch = Batch(*(x[:8] for x in dataset))
    agent = Agent(batch.observations.shape[1], batch.actions.shape[1], args)
    update(agent, batch, torch.zeros_like(batch.actions), args, True)
    LOADED.append(args)


def test_the_cases_were_not_all_refused():
    assert len(LOADED) > 10

"""Tiny datasets, made here: no test needs the network or a file that is not in the repository."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network fails at once

import h5py
import numpy as np
import pytest
import torch

import dmg_finetune
import dmg_offline
import iql
import td3bc

torch.set_num_threads(1)


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


def refusal(function, *args):
    """The one sentence with which function(*args) refuses."""
    with pytest.raises(dmg_offline.InputError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def load_checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same(a, b):
    """Equal to the bit, however nested."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture
def kept_gradients(monkeypatch):
    """Adam takes no gradient from p.grad, but with this fixture what it is given stays there to be seen."""
    for script in (dmg_offline, dmg_finetune, iql, td3bc):

        def keep(parameters, gradients, *state, adam=script.adam, **options):
            for p, g in zip(parameters, gradients, strict=True):
                p.grad = g
            adam(parameters, gradients, *state, **options)

        monkeypatch.setattr(script, "adam", keep)

"""Whatever is in a file: it is loaded in finite numbers, or refused."""

from pathlib import Path

import numpy as np
import pytest
from conftest import d4rl_arrays, write_hdf5

from dmg_offline import Args, load_dataset

REFUSED = ValueError, KeyError, IndexError, TypeError, OSError  # ours, numpy's and h5py's
NUMBERS = [np.nan, np.inf, -1e300, 1e38, 1e9, 2, 0.5, -1]
DAMAGE = {  # column of 40 rows, random numbers -> another column
    "shape": lambda x, rng: np.zeros(rng.choice([0, 1, 3, 39, 40, 41], rng.integers(4))),
    "type": lambda x, rng: np.ones(x.shape, rng.choice(["f2", "f8", "i1", "u8", "?", "S3"])),
    "number": lambda x, rng: np.where(np.arange(x.size).reshape(x.shape) == 7, rng.choice(NUMBERS), x),
    "nothing": lambda x, rng: x,
}


@pytest.mark.filterwarnings("ignore")
def test_any_file_is_loaded_in_finite_numbers_or_refused(tmp_path):
    rng, loaded = np.random.default_rng(0), 0
    for kind in ["gone", "cut", *DAMAGE] * 25:
        x = d4rl_arrays(40, 3, 1) | {"next_observations": rng.normal(size=(40, 3))}
        column = x.pop(key := rng.choice(list(x)))
        x |= {} if kind == "gone" else {key: DAMAGE.get(kind, DAMAGE["nothing"])(column, rng)}
        path = Path(write_hdf5(tmp_path / "x.hdf5", x))
        if kind == "cut":
            path.write_bytes(path.read_bytes()[: rng.integers(9000)])
        try:
            dataset = load_dataset(Args("Pendulum-v1", str(path)))
        except REFUSED:
            continue
        assert all(c.isfinite().all() and len(c) == len(dataset[0]) > 0 for c in dataset), (kind, key)
        assert dataset[4].unique().numel() <= 2 and dataset[1].abs().max() < 1.01, (kind, key)
        loaded += 1
    assert 50 < loaded < 120

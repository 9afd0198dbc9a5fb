"""The set in datasets/: what its README says of it, and that every script runs on it without an argument."""

import re
import subprocess
import sys
from pathlib import Path

import h5py
import minari
import numpy as np
import pytest

import dmg_finetune
from dmg_offline import Args, load_dataset, make_env, open_minari, reference_returns, resolve

ROOT = Path(dmg_finetune.__file__).resolve().parent
FOLDER = ROOT / "datasets" / Args().env_id / "data"


@pytest.fixture(autouse=True)
def empty_minari_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)


def test_it_is_small_float32_and_compressed():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 10e6
    with h5py.File(FOLDER / "main_data.hdf5") as file:
        assert len(file) == 100
        for episode in file.values():
            assert all(x.compression == "gzip" for x in episode.values())
            assert all(episode[key].dtype == np.float32 for key in ("observations", "actions", "rewards"))
            assert len(episode["observations"]) == len(episode["actions"]) + 1 == 1001


def test_its_readme_says_what_it_holds(capsys):
    args = resolve(Args())
    source = open_minari(args)
    env = make_env(args, source)
    batch, *_ = load_dataset(args, source, env)
    assert len(batch.rewards) == 100_000 and env.spec.id == "HalfCheetah-v5" and env.spec.max_episode_steps == 1000
    assert reference_returns(args, source) == (-280.178953, 12135.0)
    (mean,) = re.findall(r"mean return ([\d.]+)", capsys.readouterr().out)
    text = (ROOT / "datasets" / "README.md").read_text()
    assert f"{float(mean):,.0f}" in text and Args().env_id in text


def test_the_command_in_its_readme_makes_it(tmp_path, monkeypatch):
    """Its beginning, that is: the first 300 of the random steps; afterwards physics differs in the last bits by CPU."""
    (command,) = re.findall(r"python dmg_finetune\.py (.+)", (ROOT / "datasets" / "README.md").read_text())
    assert command.split()[-1] == Args().env_id
    short = command.replace("--online-steps 100000", "--online-steps 300 --eval-episodes 1 --no-cuda").split()
    monkeypatch.setattr(sys, "argv", ["dmg_finetune.py", *short])
    assert dmg_finetune.main() == 0
    sets = minari.load_dataset(Args().env_id), minari.MinariDataset(open_minari(Args()).folder)
    made, shipped = (next(iter(x.iterate_episodes())) for x in sets)
    np.testing.assert_array_equal(made.actions, shipped.actions[:300])
    np.testing.assert_allclose(made.observations[:20], shipped.observations[:20], atol=1e-4)
    mine, its = (next(iter(x.storage.get_episode_metadata([0]))) for x in sets)
    assert mine["seed"] == its["seed"]


@pytest.mark.parametrize(
    "script, steps",
    [("dmg_offline", "gradient"), ("td3bc", "gradient"), ("iql", "gradient"), ("dmg_finetune", "offline")],
)
def test_every_script_runs_on_it_without_naming_it(script, steps):
    flags = [f"--{steps}-steps", "3", "--eval-episodes", "1"]
    flags += ["--online-steps", "3"] if script == "dmg_finetune" else []
    run = subprocess.run([sys.executable, ROOT / f"{script}.py", *flags], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "100,000 transitions" in run.stdout and f"step {6 if script == 'dmg_finetune' else 3}: return" in run.stdout

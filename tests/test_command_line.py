"""What a user types, and what the program answers."""

import dataclasses
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import d4rl_arrays, write_hdf5
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dmg_offline
from dmg_offline import Args, Stop, load_checkpoint, main, resolve


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Run the command line in an empty folder; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))

    def go(*argv):
        monkeypatch.setattr(sys, "argv", ["dmg_offline.py", *argv])
        code = main()
        out, err = capsys.readouterr()
        return code, out, err

    return go


@pytest.fixture
def small(hopper_file):
    flags = "--gradient-steps 20 --eval-frequency 10 --eval-episodes 2 --batch-size 8 --no-cuda"
    return ["--env-id", "Hopper-v4", "--dataset-path", hopper_file, *flags.split()]


def test_every_argument_has_help_and_every_help_text_is_shown(cli, capsys):
    with pytest.raises(SystemExit) as stop:
        cli("--help")
    assert stop.value.code == 0
    shown = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    source = Path(dmg_offline.__file__).read_text()
    for field in dataclasses.fields(Args):
        assert f"--{field.name.replace('_', '-')}" in shown
        text = re.search(rf'    {field.name}: [^\n]*\n    """(.+?)"""', source, re.S)
        assert text, f"{field.name} has no docstring"
        assert text.group(1).split("(default")[0].split("--")[0].strip() in shown


@pytest.mark.parametrize(
    "env_id, path, expected",
    [
        ("hopper-medium-v2", None, (0.1, 0.7, 3, 3, 20_000, 10)),
        ("walker2d-medium-expert-v2", None, (10, 0.7, 3, 3, 20_000, 10)),
        ("Hopper-v4", "sets/my_expert.hdf5", (10, 0.7, 3, 3, 20_000, 10)),
        ("hopper-expert-v2", "moved.hdf5", (10, 0.7, 3, 3, 20_000, 10)),
        ("Hopper-v4", "expert/my_medium.hdf5", (0.1, 0.7, 3, 3, 20_000, 10)),
        ("antmaze-large-play-v2", None, (0.5, 0.9, 10, 100, 50_000, 100)),
        ("D4RL/antmaze/umaze-v1", None, (0.5, 0.9, 10, 100, 50_000, 100)),
        ("AntMaze_UMaze-v5", "file.hdf5", (0.5, 0.9, 10, 100, 50_000, 100)),
    ],
)
def test_defaults_by_dataset_are_those_of_the_paper(env_id, path, expected):
    a = resolve(Args(env_id=env_id, dataset_path=path))
    assert (a.nu, a.expectile, a.inverse_temperature, a.max_weight, a.eval_frequency, a.eval_episodes) == expected
    assert (a.lam, a.gamma, a.learning_rate, a.batch_size, a.gradient_steps) == (0.25, 0.99, 3e-4, 256, 1_000_000)
    assert resolve(dataclasses.replace(a, nu=7.0)).nu == 7.0


@pytest.mark.parametrize(
    "flag, value",
    [
        ("lam", 1.5), ("lam", -0.1), ("lam", float("nan")), ("nu", -1.0), ("nu", float("inf")), ("expectile", 1.0),
        ("expectile", 0.0), ("gamma", 1.0), ("gamma", -0.5), ("batch_size", 0), ("gradient_steps", 0),
        ("policy_frequency", 0), ("eval_frequency", 0), ("eval_episodes", 0), ("target_update_rate", 0.0),
        ("target_update_rate", 1.1), ("learning_rate", 0.0), ("max_weight", 0.0), ("inverse_temperature", -1.0),
        ("policy_noise", -0.1), ("noise_clip", float("nan")), ("seed", -1),
    ],
)  # fmt: skip
def test_numbers_outside_their_range_are_refused_by_name(flag, value):
    with pytest.raises(Stop, match=f"--{flag.replace('_', '-')}") as stop:
        resolve(Args(env_id="hopper-medium-v2", **{flag: value}))
    assert stop.value.args[1] == 2


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--env-id", "hopper-medium-v3"], ["unknown", "hopper-medium-v2"]),
        (["--env-id", "Hopper-v5"], ["Hopper-v5", "--dataset-path"]),
        (["--env-id", "Hopper-v4", "--dataset-path", "nowhere.hdf5"], ["nowhere.hdf5"]),
        (["--eval-only"], ["--resume"]),
        (["--resume", "runs/nowhere"], ["runs/nowhere", "checkpoint.pt"]),
        (["--lam", "2"], ["--lam", "[0, 1]"]),
    ],
)
def test_bad_input_is_one_sentence_exit_code_2_and_no_file(cli, tmp_path, argv, words):
    code, _, err = cli(*argv)
    assert code == 2
    assert all(word in err for word in words), err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_a_run_leaves_what_the_readme_lists(cli, small, tmp_path):
    code, out, err = cli(*small)
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"Hopper-v4__dmg_offline__0__\d+", folder.name)
    record = json.loads((folder / "args.json").read_text())
    assert record["nu"] == 0.1 and record["torch"] == torch.__version__
    assert {"gymnasium", "mujoco", "minari", "commit"} <= record.keys()
    rows = (folder / "eval.csv").read_text().splitlines()
    assert rows[0] == "step,return_mean,return_std,normalized_score,length_mean,episodes,wall_seconds"
    assert [row.split(",")[0] for row in rows[1:]] == ["10", "20"]
    events = EventAccumulator(str(folder)).Reload()
    assert set(events.Tags()["scalars"]) == {
        *(f"losses/{x}_loss" for x in ("value", "critic", "actor")),
        *(f"losses/{x}" for x in ("q_values", "v_values", "advantage_weight")),
        *("dmg/lam", "dmg/nu", "charts/SPS", "charts/actor_learning_rate"),
        *(f"eval/{x}" for x in ("episodic_return", "normalized_score", "episodic_length")),
    }
    rates = [e.value for e in events.Scalars("charts/actor_learning_rate")]
    assert rates == pytest.approx([dmg_offline.actor_learning_rate(k, Args(gradient_steps=20)) for k in (10, 20)])
    score = float(rows[-1].split(",")[3])
    assert events.Scalars("eval/normalized_score")[-1].value == pytest.approx(score, rel=1e-6)
    assert f"score {score:.1f}" in out and "step 20:" in out


def test_eval_only_repeats_the_last_score_and_writes_nothing(cli, small, tmp_path):
    _, out, _ = cli(*small)
    (folder,) = (tmp_path / "runs").iterdir()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    Path(small[3]).unlink()  # the dataset is not needed
    code, again, err = cli("--eval-only", "--resume", str(folder))
    assert code == 0, err
    last = [line for line in out.splitlines() if line.startswith("step 20")]
    assert last == [line for line in again.splitlines() if line.startswith("step")]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_checkpoint_of_another_script_or_another_dataset_is_refused(cli, small, tmp_path, hopper_file):
    cli(*small)
    (folder,) = (tmp_path / "runs").iterdir()
    write_hdf5(hopper_file, d4rl_arrays(seed=9))
    code, _, err = cli("--resume", str(folder))
    assert code == 2 and "not the dataset" in err
    checkpoint = load_checkpoint(str(folder))
    torch.save({**checkpoint, "args": {"alpha": 2.5}, "script": "td3bc"}, folder / "checkpoint.pt")
    code, _, err = cli("--resume", str(folder))
    assert code == 2 and "td3bc.py" in err
    (folder / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes()[:1000])
    code, _, err = cli("--resume", str(folder))
    assert code == 2 and "Traceback" not in err


def test_divergence_exits_with_3_and_keeps_the_last_good_checkpoint(cli, small, tmp_path, hopper_file):
    arrays = d4rl_arrays()
    arrays["rewards"] = 1e25 * arrays["rewards"]  # the squared error exceeds float32
    write_hdf5(hopper_file, arrays)
    code, _, err = cli(*small)
    assert code == 3 and "diverged at step 10" in err
    (folder,) = (tmp_path / "runs").iterdir()
    checkpoint = load_checkpoint(str(folder))
    assert checkpoint["step"] == 0
    assert all(x.isfinite().all() for x in checkpoint["agent"].values() if isinstance(x, torch.Tensor))
    assert EventAccumulator(str(folder)).Reload().Scalars("eval/diverged")[0].step == 10


@pytest.mark.skipif(importlib.util.find_spec("moviepy") is not None, reason="moviepy is installed")
def test_capture_video_without_its_package_says_so_at_once(cli, small):
    code, out, err = cli(*small, "--capture-video")
    assert code == 2 and "moviepy" in err.lower() and "step 10" not in out


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_track_without_its_package_says_so_at_once(cli, small):
    code, out, err = cli(*small, "--track")
    assert code == 2 and "wandb" in err and "step 10" not in out


def test_a_machine_without_git_can_train(cli, small, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    code, _, err = cli(*small)
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    assert "commit" not in json.loads((folder / "args.json").read_text())


def test_the_file_runs_alone_in_another_folder(small, tmp_path, monkeypatch):
    copy = shutil.copy(dmg_offline.__file__, tmp_path / "my_copy.py")
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("my_copy", copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["my_copy.py", *small])
    assert module.main() == 0
    (folder,) = Path("runs").iterdir()
    assert "__my_copy__" in folder.name


def test_flags_beside_resume_replace_the_saved_ones(cli, small, tmp_path):
    cli(*small)
    (folder,) = (tmp_path / "runs").iterdir()
    code, out, err = cli("--resume", str(folder), "--gradient-steps", "30")
    assert code == 0, err
    assert [line.split(":")[0] for line in out.splitlines() if "step " in line] == ["seed 0, step 30"]
    checkpoint = load_checkpoint(str(folder))
    assert checkpoint["step"] == checkpoint["args"].gradient_steps == 30
    assert checkpoint["args"].batch_size == 8 and checkpoint["args"].resume is None
    assert len((folder / "eval.csv").read_text().splitlines()) == 4

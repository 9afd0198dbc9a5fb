"""What a user types, and what the program answers."""

import dataclasses
import hashlib
import importlib
import json
import re
import runpy
import sys
from math import nan
from pathlib import Path

import pytest
import tyro
from conftest import load_checkpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dmg_offline
from dmg_offline import Args

ROOT = Path(dmg_offline.__file__).resolve().parent
SCRIPTS = pytest.mark.parametrize("script", ["dmg_offline", "td3bc", "iql", "dmg_finetune"])
FINETUNE, NO_DATA = "dmg_finetune", "Hopper-v5 is an environment: give its data with --dataset-path"
SMALL = "--dataset-path hopper.hdf5 --gradient-steps 20 --eval-frequency 10 --eval-episodes 1 --batch-size 8"


@pytest.fixture
def cli(hopper_file, tmp_path, monkeypatch, capsys):
    """Run a command line beside hopper.hdf5; returns exit code, all that it printed, the run's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))

    def go(line, script="dmg_offline"):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *line.split()])
        code = 0
        try:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        printed = re.sub(r"[\s│]+", " ", "".join(reversed(capsys.readouterr())))
        return code, printed, next(Path("runs").glob("*"), None)

    return go


@SCRIPTS
def test_every_argument_has_a_comment_which_help_shows_the_algorithms_first(script, cli):
    (code, out, _), source = cli("--help", script), (ROOT / f"{script}.py").read_text()
    for field in dataclasses.fields(importlib.import_module(script).Args):
        text = re.search(rf"^    {field.name}: .*  # (.+)$", source, re.M)
        assert text and text[1] in out, f"{field.name} has no comment on its line"
    assert code == 0 and out.index("--env-id ") < out.index("--gamma ") < out.index("--seed ")


MUJOCO = {"expectile": 0.7, "inverse_temperature": 3, "max_weight": 3, "eval_frequency": 20_000, "lam": 0.25}
MUJOCO |= {"eval_episodes": 10, "normalize_states": True, "gamma": 0.99, "learning_rate": 3e-4}
ANTMAZE = MUJOCO | {"expectile": 0.9, "inverse_temperature": 10, "max_weight": 100, "eval_frequency": 50_000}
ANTMAZE |= {"eval_episodes": 100, "normalize_states": False}


@pytest.mark.parametrize("env_id, path, nu, expected", [
    ("hopper-medium-v2", None, 0.1, MUJOCO), ("walker2d-medium-expert-v2", None, 10, MUJOCO),
    ("Hopper-v4", "my_medium_expert.hdf5", 10, MUJOCO), ("Hopper-v4", "expert_runs/x.hdf5", 0.1, MUJOCO),
    ("Hopper-v4", "inexpert_human.hdf5", 0.1, MUJOCO), ("mujoco/hopper/expert-v0", None, 10, MUJOCO),
    ("antmaze-large-play-v2", None, 0.5, ANTMAZE), ("D4RL/antmaze/umaze-v1", None, 0.5, ANTMAZE),
    ("gymnasium_robotics:AntMaze_UMaze-v5", "file.hdf5", 0.5, ANTMAZE),
    ("gymnasium_robotics:AntMaze_UMazeDense-v5", "file.hdf5", 0.1, MUJOCO),
])  # fmt: skip
def test_defaults_by_dataset_are_those_of_the_paper(env_id, path, nu, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("expert_runs").mkdir()
    Path(path or "unused").touch()
    assert vars(Args(env_id, path)).items() >= (expected | {"nu": nu}).items()
    xql, sql = (Args(env_id, path, in_sample=kind).in_sample_temperature for kind in ("xql", "sql"))
    assert (xql, sql) == (5, 5 if nu == 10 else 2)
    assert vars(Args(env_id, path, nu=7, lam=1)).items() >= (expected | {"nu": 7, "lam": 1}).items()
    scripts = map(importlib.import_module, ("td3bc", "iql", "dmg_finetune"))
    assert {script.Args(env_id, path).eval_frequency for script in scripts} == {expected["eval_frequency"]}


@pytest.mark.parametrize("name, value", [
    ("lam", 1.5), ("gamma_online", 1.1), ("nu", -1.0), ("expectile", 1.1), ("gamma", 1.1), ("batch_size", 0),
    ("eval_episodes", 0), ("target_update_rate", 1.1), ("max_weight", 0.0), ("noise_clip", nan), ("seed", -1),
    ("gradient_steps", -1), ("policy_frequency", 0), ("learning_rate", -1e-3), ("lam_end", 2.0),
])  # fmt: skip
@SCRIPTS
def test_numbers_outside_their_range_are_refused_by_name(script, name, value):
    module = importlib.import_module(script)
    if name in {field.name for field in dataclasses.fields(module.Args)}:
        with pytest.raises(ValueError, match=rf"^{name}(_online)? must be in \[[01], .*\], not {value}$"):
            module.Args(**{name: value})


@pytest.mark.parametrize("script, line, words", [
    ("dmg_offline", "--env-id hopper-medium-v3", "hopper-medium-v3: is it hopper-medium-v2?"),
    ("dmg_offline", "--env-id NoSuchRobot-v1 --dataset-path hopper.hdf5", "NoSuchRobot-v1: is it"),
    ("iql", "--env-id Hopperv5", "is it Hopper-v5?"),
    ("td3bc", "--env-id Hopper-v5", NO_DATA), (FINETUNE, "--env-id Hopper-v5", NO_DATA),
    ("dmg_offline", "--env-id Hopper-v4 --dataset-path nowhere.hdf5", "there is no file nowhere.hdf5"),
    ("dmg_offline", "--resume runs/nowhere", "there is no file runs/nowhere/checkpoint.pt"),
    ("iql", "--expectile 2", "expectile must be in [0, 1], not 2.0"),
    ("dmg_offline", "--batch-size 1.5", "batch-size"), ("td3bc", "--lam 0.5", "--lam"),
    (FINETUNE, "--from-scratch --dataset-path hopper.hdf5", "no checkpoint and no dataset_path"),
    (FINETUNE, "--env-id hopper-medium-v2 --online-steps 9 --learning-starts 9", "learning_starts"),
])  # fmt: skip
def test_bad_arguments_are_one_sentence_exit_code_2_and_no_run(cli, script, line, words):
    code, out, folder = cli(line, script)
    assert code == 2 and words in out and "Traceback" not in out and folder is None, out


TAGS = "eval/episodic_length eval/episodic_return losses/actor_loss losses/critic_loss losses/q_values"
IN_SAMPLE = "charts/actor_learning_rate losses/advantage_weight losses/v_values losses/value_loss"


@pytest.mark.parametrize("env_id, scored", [("Hopper-v4", False), ("hopper-medium-v2", True)])
@pytest.mark.parametrize("script", ["dmg_offline", "iql", "td3bc"])
def test_what_a_run_leaves_and_prints(cli, script, env_id, scored):
    code, out, folder = cli(f"{SMALL} --env-id {env_id} --eval-episodes 2", script)
    assert code == 0 and re.fullmatch(rf"{env_id}__{script}__0__\d{{19}}", folder.name), out
    record = json.loads((folder / "args.json").read_text())
    assert record.pop("script") == hashlib.sha256((ROOT / f"{script}.py").read_bytes()).hexdigest()
    assert sorted(record.pop("versions")) == ["gymnasium", "minari", "mujoco", "torch"]
    assert record.keys() == {field.name for field in dataclasses.fields(importlib.import_module(script).Args)}
    header, *rows = (folder / "eval.csv").read_text().splitlines()
    rows = [[float(x) for x in row.split(",")] for row in rows]
    assert header == "step,return_mean,return_std,normalized_score,length_mean"
    assert [row[0] for row in rows] == [0, 10, 20]
    events = EventAccumulator(str(folder)).Reload()
    tags = f"{TAGS} charts/SPS {'losses/bc_loss' if script == 'td3bc' else IN_SAMPLE}".split()
    assert {*events.Tags()["scalars"]} == {*tags, *["eval/normalized_score"] * scored}
    for tag, k in {"eval/episodic_return": 1, "eval/episodic_length": 4, "eval/normalized_score": 3}.items():
        values = [e.value for e in events.Scalars(tag)] if scored or k != 3 else [nan] * 3
        assert values == pytest.approx([row[k] for row in rows], rel=1e-6, nan_ok=True)
    last = "step 20: return {:.1f} +- {:.1f}".format(*rows[-1][1:3]) + f", score {rows[-1][3]:.1f}" * scored
    assert f" {folder}: {last} " in out
    assert rows[-1][2] > 0 and all(event.value > 1 for event in events.Scalars("charts/SPS"))
    _, out, _ = cli(f"--resume {folder} --gradient-steps 30 --gamma 0.5", script)  # new flags replace old
    assert re.findall(r"step (\d+): return", out) == ["30", "30"]
    after = json.loads((folder / "args.json").read_text())
    assert after.items() >= (record | {"gradient_steps": 30, "gamma": 0.5}).items()


@SCRIPTS
def test_divergence_raises_is_recorded_and_keeps_the_last_good_checkpoint(script, cli):
    line = f"{SMALL} --env-id Hopper-v4 --learning-rate 100"
    line = line.replace("gradient", "offline") + " --online-steps 0" if script == FINETUNE else line
    with pytest.raises(FloatingPointError, match=r"diverged at step 10.* runs/.*loss"):
        cli(line, script)
    checkpoint = load_checkpoint(folder := next(Path("runs").iterdir()))
    assert checkpoint["step"] == 0 and all(x.isfinite().all() for x in checkpoint["agent"].values())
    assert EventAccumulator(str(folder)).Reload().Scalars("eval/diverged")[0].step == 10
    assert (folder / "eval.csv").read_text().splitlines()[2:] == ["10,nan,nan,nan,nan"]


@SCRIPTS
def test_a_run_is_readable_from_before_an_argument_was_added_or_its_dataset_moved(script, tmp_path):
    module = importlib.import_module(script)
    saved = dataclasses.asdict(module.Args(batch_size=7))
    del saved["seed"]
    (tmp_path / "args.json").write_text(json.dumps(saved | {"gone": 1, "dataset_path": "gone.hdf5"}))
    args = tyro.cli(module.Args, default=module.read_args(tmp_path), args=["--dataset-path", __file__])
    assert args == module.Args(batch_size=7, dataset_path=__file__)

"""What a user types, and what the program answers."""

import dataclasses
import importlib
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import load_checkpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dmg_offline
from dmg_offline import Args

pytestmark = pytest.mark.filterwarnings("ignore:.*The environment Hopper-v4 is out of date")
ROOT = Path(dmg_offline.__file__).resolve().parent
SCRIPTS = ("dmg_offline", "td3bc", "iql", "dmg_finetune")


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Run a script's command line in an empty folder; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("COLUMNS", "200")

    def go(*argv, script="dmg_offline"):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
        try:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        except SystemExit as stop:
            return stop.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return go


@pytest.fixture
def small(hopper_file):
    flags = "--gradient-steps 20 --eval-frequency 10 --eval-episodes 1 --batch-size 8 --no-cuda"
    return ["--env-id", "Hopper-v4", "--dataset-path", hopper_file, *flags.split()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_argument_has_a_docstring_which_help_shows_the_algorithms_first(script, cli):
    code, out, _ = cli("--help", script=script)
    shown, source = re.sub(r"[\s│]+", " ", out), (ROOT / f"{script}.py").read_text()
    for field in dataclasses.fields(importlib.import_module(script).Args):
        text = re.search(rf'    {field.name}: [^\n]*\n    """(.+?)"""', source, re.S)
        assert text, f"{field.name} has no docstring"
        assert re.sub(r"\s+", " ", text.group(1)).strip() in shown, field.name
    first = {"td3bc": "--alpha"}.get(script, "--expectile")
    assert code == 0 and shown.index(first) < shown.index("--gamma ") < shown.index("--seed ")


MUJOCO, ANTMAZE = (0.7, 3, 3, 20_000, 10, True), (0.9, 10, 100, 50_000, 100, False)


@pytest.mark.parametrize("env_id, path, nu, expected", [
    ("hopper-medium-v2", None, 0.1, MUJOCO), ("walker2d-medium-expert-v2", None, 10, MUJOCO),
    ("Hopper-v4", "my_medium_expert.hdf5", 10, MUJOCO), ("Hopper-v4", "expert/my_medium.hdf5", 0.1, MUJOCO),
    ("antmaze-large-play-v2", None, 0.5, ANTMAZE), ("D4RL/antmaze/umaze-v1", None, 0.5, ANTMAZE),
    ("AntMaze_UMaze-v5", "file.hdf5", 0.5, ANTMAZE),
])  # fmt: skip
def test_defaults_by_dataset_are_those_of_the_paper(env_id, path, nu, expected):
    a = Args(env_id=env_id, dataset_path=path)
    found = a.expectile, a.inverse_temperature, a.max_weight, a.eval_frequency, a.eval_episodes
    assert a.nu == nu and (*found, a.normalize_states) == expected
    found = a.lam, a.gamma, a.learning_rate, a.batch_size, a.gradient_steps, a.matmul_precision
    assert found == (0.25, 0.99, 3e-4, 256, 1_000_000, "high")
    xql, sql = (Args(env_id=env_id, dataset_path=path, in_sample=kind) for kind in ("xql", "sql"))
    assert (xql.in_sample_temperature, sql.in_sample_temperature) == (5, 5 if nu == 10 else 2)
    own = Args(env_id=env_id, nu=7.0, eval_episodes=3, normalize_states=False)
    assert (own.nu, own.eval_episodes, own.normalize_states) == (7.0, 3, False)


NAN = float("nan")
OUTSIDE = [
    ("lam", 1.5), ("lam", NAN), ("nu", -1.0), ("expectile", 1.1), ("gamma", 1.1), ("batch_size", 0),
    ("eval_episodes", 0), ("target_update_rate", 1.1), ("max_weight", 0.0), ("noise_clip", NAN), ("seed", -1),
]  # fmt: skip


@pytest.mark.parametrize("name, value", OUTSIDE)
@pytest.mark.parametrize("script", SCRIPTS)
def test_numbers_outside_their_range_are_refused_by_name(script, name, value):
    module = importlib.import_module(script)
    if name not in {field.name for field in dataclasses.fields(module.Args)}:
        pytest.skip("has no such argument")
    flag = name.replace("_", "-")
    with pytest.raises(module.InputError, match=rf"^--{flag}(-online)? must be in .*, not {value}$"):
        module.Args(env_id="hopper-medium-v2", **{name: value})


@pytest.mark.parametrize("argv, words", [
    (["--env-id", "hopper-medium-v3"], ["hopper-medium-v3", "hopper-medium-v2", "Minari"]),
    (["--env-id", "Hopper-v5"], ["Hopper-v5", "--dataset-path"]),
    (["--env-id", "NoSuchRobot-v1", "--dataset-path", "nowhere.hdf5"], ["NoSuchRobot"]),
    (["--env-id", "nomodule:Robot-v0", "--dataset-path", "nowhere.hdf5"], ["nomodule"]),
    (["--env-id", "CartPole-v1", "--dataset-path", "nowhere.hdf5"], ["Discrete"]),
    (["--env-id", "Hopper-v4", "--dataset-path", "nowhere.hdf5"], ["nowhere.hdf5"]),
    (["--resume", "runs/nowhere"], ["runs/nowhere", "no run of this script"]),
    (["--lam", "2"], ["--lam", "[0, 1]"]),
    (["--batch-size", "1.5"], ["batch-size"]),
])  # fmt: skip
def test_bad_input_is_one_sentence_exit_code_2_and_no_file(cli, tmp_path, argv, words):
    code, _, err = cli(*argv)
    assert code == 2 and all(word in err for word in words), err
    assert "Traceback" not in err and not (tmp_path / "runs").exists()


def run_folder():
    (folder,) = Path("runs").iterdir()
    return folder


LOSSES = "value_loss", "critic_loss", "actor_loss", "q_values", "v_values", "advantage_weight"
TAGS = {"charts/SPS", "charts/actor_learning_rate", "eval/episodic_return", "eval/episodic_length"}
TAGS |= {f"losses/{name}" for name in LOSSES}


@pytest.mark.parametrize("env_id", ["Hopper-v4", "hopper-medium-v2"])
def test_what_a_run_leaves_and_prints(cli, small, env_id):
    code, out, err = cli(*small, "--env-id", env_id, "--gradient-steps", "60")
    assert code == 0, err
    folder = run_folder()
    assert re.fullmatch(rf"{env_id}__dmg_offline__0__\d{{13}}", folder.name)
    record = json.loads((folder / "args.json").read_text())
    versions = record.pop("versions")
    assert record.keys() == {field.name for field in dataclasses.fields(Args)} and record["nu"] == 0.1
    assert versions.keys() == {"torch", "gymnasium", "mujoco", "minari"}
    assert versions["torch"] == torch.__version__
    rows = [row.split(",") for row in (folder / "eval.csv").read_text().splitlines()]
    columns = "step,return_mean,return_std,normalized_score,length_mean,episodes,wall_seconds"
    assert rows[0] == columns.split(",") and [int(row[0]) for row in rows[1:]] == [*range(0, 70, 10)]
    scored = env_id == "hopper-medium-v2"  # an own file has no score
    events = EventAccumulator(str(folder)).Reload()
    assert {*events.Tags()["scalars"]} == TAGS | ({"eval/normalized_score"} if scored else set())
    values = [float(row[3 if scored else 1]) for row in rows[1:]]
    tag = "eval/normalized_score" if scored else "eval/episodic_return"
    assert [e.value for e in events.Scalars(tag)] == pytest.approx(values, rel=1e-6)
    assert scored or {row[3] for row in rows[1:]} == {"None"}
    assert ("score" in out.split("step 60:")[1].split("\n")[0]) == scored
    name = "normalized_score" if scored else "return_mean"
    last = f"{name} {values[-1]:.1f}, mean of the last five {sum(values[-5:]) / 5:.1f}"
    assert out.splitlines()[-1] == f"runs/{folder.name}: {last}"


def test_slashes_and_colons_of_an_id_are_dashes_in_the_folder_which_no_two_runs_share(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dmg_offline.time, "time_ns", lambda: 10**18)
    args = Args(env_id="a/b:c-v0", exp_name="mine", seed=3)
    folder, writer = dmg_offline.open_run(args, 0)
    writer.close()
    assert str(folder) == f"runs/a-b-c-v0__mine__3__{10**12}"
    with pytest.raises(FileExistsError):
        dmg_offline.open_run(args, 0)


@pytest.mark.parametrize("script", SCRIPTS)
def test_divergence_exits_with_3_and_keeps_the_last_good_checkpoint(script, cli, small):
    if script == "dmg_finetune":
        small = [x.replace("gradient", "offline") for x in small] + ["--online-steps", "0"]
    code, out, err = cli(*small, "--learning-rate", "1e30", script=script)
    assert code == 3 and "diverged at step 10" in err and "step 10:" not in out, err
    checkpoint = load_checkpoint(run_folder())
    assert checkpoint["step"] == 0 and all(x.isfinite().all() for x in checkpoint["agent"].values())
    assert EventAccumulator(str(run_folder())).Reload().Scalars("eval/diverged")[0].step == 10


def test_flags_beside_resume_replace_the_saved_ones_in_args_json_too(cli, small):
    cli(*small)
    folder = run_folder()
    before = json.loads((folder / "args.json").read_text())
    code, out, err = cli("--resume", str(folder), "--gradient-steps", "30", "--nu", "3")
    assert code == 0, err
    assert re.findall(r"step (\d+):", out) == ["30"] and "batch_size              8" in out
    after = json.loads((folder / "args.json").read_text())
    assert {key: after[key] for key in before if before[key] != after[key]} == {"gradient_steps": 30, "nu": 3}
    assert after["resume"] is None and len((folder / "eval.csv").read_text().splitlines()) == 5
    code, _, err = cli("--resume", str(folder), script="td3bc")
    assert code == 2 and "no run of this script" in err and "alpha" in err
    (folder / "checkpoint.pt").unlink()  # as if killed before the first
    code, _, err = cli("--resume", str(folder))
    assert code == 2 and "checkpoint.pt" in err and "Traceback" not in err

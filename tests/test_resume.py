"""Seeds, checkpoints, kills and resumption: on a CPU every bit comes back."""

import csv
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dmg_offline
from dmg_offline import Agent, Args, evaluate, load_checkpoint, normalized_score, resolve, train

SCRIPT = Path(dmg_offline.__file__).resolve()
SMALL = {"env_id": "Hopper-v4", "batch_size": 16, "eval_episodes": 2, "cuda": False}


@pytest.fixture
def run(hopper_file, tmp_path, monkeypatch):
    """Train in this process, in an empty folder; returns the run folder."""

    def go(name, **changes):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        train(
            resolve(
                Args(**{**SMALL, "dataset_path": hopper_file, "gradient_steps": 60, "eval_frequency": 20, **changes})
            )
        )
        (folder,) = Path("runs").iterdir()
        return folder.resolve()

    return go


def final(folder):
    """Every tensor and number of the last checkpoint but its clock readings and its arguments."""
    checkpoint = load_checkpoint(str(folder))
    rows = [row[:-1] for row in checkpoint["evaluations"]]
    return {
        "agent": checkpoint["agent"],
        "generator": checkpoint["generator"],
        "step": checkpoint["step"],
        "rows": rows,
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def scalars(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    clock = {"charts/SPS"}
    return {
        tag: [(e.step, None if tag in clock else e.value) for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_one_seed_gives_the_same_bits_and_another_seed_does_not(run):
    first, second, other = run("a"), run("b"), run("c", seed=1)
    assert same(final(first), final(second))
    assert scalars(first) == scalars(second)
    assert not same(final(first)["agent"], final(other)["agent"])


def test_the_seed_sets_the_networks_and_the_batches(run):
    still = {"learning_rate": 1e-12, "gradient_steps": 2}
    a, b = final(run("a", **still)), final(run("b", seed=1, **still))
    assert (a["agent"]["actor.0.weight"] - b["agent"]["actor.0.weight"]).abs().max() > 1e-2
    assert not torch.equal(a["generator"], b["generator"])


def test_training_does_not_depend_on_how_often_it_is_evaluated(run):
    rare, often = run("a", eval_frequency=60, eval_episodes=1), run("b", eval_frequency=7, eval_episodes=3)
    assert same(final(rare)["agent"], final(often)["agent"])
    assert [row[0] for row in final(often)["rows"]] == [*range(7, 60, 7), 60]


def test_checkpoint_holds_what_training_moves(run):
    checkpoint = load_checkpoint(str(run("a", gradient_steps=61)))
    names = {name.split(".")[0] for name in checkpoint["agent"]}
    assert {"actor", "critic", "value", "actor_target", "critic_target", "mean", "std"} <= names
    steps = [step.item() for step, *_ in checkpoint["optimizers"]]
    assert steps == [30, 61, 61]  # actor (every second step, not the first), critic, value


def test_the_score_is_that_of_the_saved_actor_on_normalised_states(run, hopper_file):
    checkpoint = load_checkpoint(str(run("a")))
    args = checkpoint["args"]
    env = dmg_offline.make_env(args, None)
    _, mean, std = dmg_offline.load_dataset(args, None, env)
    agent = Agent(11, 3, args)
    agent.load_state_dict(checkpoint["agent"])
    assert np.array_equal(agent.mean, mean) and np.array_equal(agent.std, std) and std.max() < 2

    @torch.no_grad()
    def act(observations):
        return agent.actor(torch.tensor((observations - mean) / std, dtype=torch.float32)).numpy()

    returns, lengths = evaluate(act, [env], 2, seed=1000)
    step, mean_return, _, score, mean_length, episodes, _ = checkpoint["evaluations"][-1]
    assert (step, episodes) == (60, 2)
    assert mean_return == pytest.approx(returns.mean(), rel=1e-3) and mean_length == lengths.mean()
    assert score == pytest.approx(normalized_score(args, None, returns).mean(), rel=1e-3)


def command(hopper_file, *more):
    flags = {**SMALL, "dataset_path": hopper_file, "gradient_steps": 900, "eval_frequency": 300}
    text = [x for k, v in flags.items() if k != "cuda" for x in (f"--{k.replace('_', '-')}", str(v))]
    return [sys.executable, str(SCRIPT), "--no-cuda", *text, *more]


def start(argv, cwd):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(argv, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_killed_run_resumes_to_the_same_bits(number, code, hopper_file, tmp_path, run):
    process = start(command(hopper_file), tmp_path)
    for line in process.stdout:
        if re.search(r" (3[2-9]\d|[45]\d\d)/900", line):  # the progress bar: past the first checkpoint
            process.send_signal(number)
            break
    process.communicate()
    assert process.returncode == code
    (folder,) = (tmp_path / "runs").iterdir()
    stopped_at = load_checkpoint(str(folder))["step"]
    assert stopped_at == 300 if number == signal.SIGKILL else 320 <= stopped_at < 900

    resumed = start([sys.executable, str(SCRIPT), "--resume", str(folder)], tmp_path)
    output, _ = resumed.communicate()
    assert resumed.returncode == 0, output
    assert "step 300:" not in output and "step 600:" in output

    whole = run("whole", gradient_steps=900, eval_frequency=300)
    assert same(final(folder), final(whole))
    assert scalars(folder) == scalars(whole)  # no step twice, none missing
    steps = [row["step"] for row in csv.DictReader((folder / "eval.csv").open())]
    assert steps == ["300", "600", "900"]
    assert not list(folder.glob("*.tmp"))


def test_what_a_killed_run_logged_past_its_checkpoint_is_not_seen_twice(run, monkeypatch):
    original, saved = dmg_offline.write, []

    def write_and_keep(path, writer):
        original(path, writer)
        saved.append(path.read_bytes()) if path.name == "checkpoint.pt" else None

    with monkeypatch.context() as patched:
        patched.setattr(dmg_offline, "write", write_and_keep)
        folder = run("killed")
    before = scalars(folder)
    (folder / "checkpoint.pt").write_bytes(saved[1])  # as if killed before the second evaluation's checkpoint
    checkpoint = load_checkpoint(str(folder))
    assert checkpoint["step"] == 20
    train(resolve(replace(checkpoint["args"], resume=str(folder))), checkpoint)
    assert [step for step, _ in before["eval/episodic_return"]] == [20, 40, 60]
    assert scalars(folder) == before


def test_a_run_killed_before_its_first_evaluation_resumes_from_its_start(hopper_file, tmp_path, run, monkeypatch):
    def killed(*_):
        raise SystemExit

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(dmg_offline, "evaluate", killed)
        run("killed")
    folder = next((tmp_path / "killed" / "runs").iterdir())
    checkpoint = load_checkpoint(str(folder))
    assert checkpoint["step"] == 0
    train(resolve(replace(checkpoint["args"], resume=str(folder))), checkpoint)
    assert same(final(folder), final(run("whole")))


def test_a_signal_during_an_evaluation_keeps_the_steps_before_it(run, tmp_path, monkeypatch):
    original, calls, signals = dmg_offline.evaluate, [], []

    def interrupted(act, *rest):
        calls.append(1)
        if len(calls) == 2:
            signals.append(int(signal.SIGINT))
        return original(act, *rest)

    folder = run("whole")
    (tmp_path / "stopped").mkdir()
    monkeypatch.chdir(tmp_path / "stopped")
    args = load_checkpoint(str(folder))["args"]
    with monkeypatch.context() as patched, pytest.raises(dmg_offline.Stop) as stop:
        patched.setattr(dmg_offline, "evaluate", interrupted)
        train(args, catch_signals=lambda: signals)
    assert stop.value.args[1] == 130
    (stopped,) = Path("runs").iterdir()
    checkpoint = load_checkpoint(str(stopped))
    assert checkpoint["step"] == 40 and len(checkpoint["evaluations"]) == 1
    train(resolve(replace(checkpoint["args"], resume=str(stopped))), checkpoint)
    assert same(final(stopped), final(folder))
    assert scalars(stopped) == scalars(folder)


def test_two_runs_of_the_same_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dmg_offline.time, "time", lambda: 1e9)
    folders = [dmg_offline.new_run_folder(Args(env_id="a/b-v0", seed=3)) for _ in range(3)]
    assert folders[0] == Path("runs/a-b-v0__dmg_offline__3__1000000000")
    assert len(set(folders)) == 3


def test_a_write_that_fails_half_way_leaves_the_old_file_and_names_it(tmp_path):
    path = tmp_path / "checkpoint.pt"
    dmg_offline.write(path, lambda file: file.write(b"old"))

    def half(file):
        file.write(b"ne")
        raise OSError("No space left on device")

    with pytest.raises(dmg_offline.Stop, match=r"checkpoint\.pt: No space left") as stop:
        dmg_offline.write(path, half)
    assert stop.value.args[1] == 2 and path.read_text() == "old" and [*tmp_path.iterdir()] == [path]

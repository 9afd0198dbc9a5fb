"""Odd arguments are refused before anything is read; odd data, environments, folders and long runs are trained on."""

import importlib
import math
import re
import shlex
import sys
import threading
from pathlib import Path
from typing import get_args, get_type_hints

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import d4rl_arrays, write_hdf5
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_faults import SCRIPTS, STEPS, complete, flags, state, the_run
from test_resume import same

import dmg_offline


class Tiny(gym.Env):
    """Episodes of one step: terminated at once, or truncated by a time limit of 1."""

    observation_space = gym.spaces.Box(-9, 9, (3,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, ends, render_mode=None):
        self.ends = ends

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.float32([0, 7, self.np_random.normal()]), {}

    def step(self, action):
        return np.zeros(3, np.float32), 1.0, self.ends, False, {}


gym.register("TinyTerminated-v0", Tiny, kwargs={"ends": True})
gym.register("TinyTruncated-v0", Tiny, kwargs={"ends": False}, max_episode_steps=1)


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """main() of a script in this process and an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))

    def go(script, *argv):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
        try:
            code = importlib.import_module(script).main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return go


# ---- arguments ----
def numbers(script):
    """(flag, is it whole, low, high, span) of each numeric argument of a script."""
    for name, hint in get_type_hints(importlib.import_module(script).Args, include_extras=True).items():
        plain = get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
        kinds = {*(get_args(plain) or (plain,))}
        if kinds & {int, float}:
            (span,) = hint.__metadata__  # every number has one
            yield name, int in kinds, *map(float, span[1:-1].split(",")), span


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_outside_its_range_is_refused_with_the_range(script):
    module, tried = importlib.import_module(script), 0
    for name, whole, low, high, span in numbers(script):
        outside = [low - 1, high + 1] if whole else [low - 1e-6, high + 1e-6, math.nan, math.inf, -math.inf]
        outside = [x for x in outside if x != high]  # a range may hold infinity
        outside += [low] * (span[0] == "(") + [high] * (span[-1] == ")")
        for x in {int(x) if whole and math.isfinite(x) else x for x in outside if not (whole and x == math.inf)}:
            with pytest.raises(module.Stop) as stop:
                module.resolve(module.Args(**{name: x}))
            sentence, code = stop.value.args
            assert code == 2 and f"--{name.replace('_', '-')} " in sentence and sentence.endswith(f"outside {span}.")
            tried += 1
    assert tried > 25


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_range_is_checked_before_anything_is_read(script, cli, monkeypatch):
    module = importlib.import_module(script)
    for name in ("open_minari", "make_env", "load_dataset"):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("something was read"))
    for flag in ("--gamma=1", "--batch-size=0", "--learning-rate=nan", "--seed=-1", "--eval-frequency=0"):
        code, _, err = cli(script, "--env-id=nothing", flag)
        assert code == 2 and flag.split("=")[0] in err and "outside" in err
    assert cli(script, "--batch-size=1.5")[0] == 2


@pytest.mark.parametrize(
    "env_id, near",
    [
        ("hoper-medium-v2", "hopper-medium-v2"),
        ("Walker-v5", "Walker2d-v5"),
        ("halfcheetah/medium-replay-v0", "dmg/halfcheetah/medium-replay-v0"),
        ("Hopper_v5", "Hopper-v5"),
    ],
)
def test_an_unknown_id_names_the_closest_known_ones(env_id, near, cli):
    code, _, err = cli("dmg_offline", f"--env-id={env_id}")
    assert code == 2 and re.search(rf"did you mean .*\b{re.escape(near)}\b.*\?", err), err


def test_more_than_memory_holds_is_refused_at_the_start(cli):
    argv = ["--env-id=Pendulum-v1", "--from-scratch", "--online-steps=1000000000000000", "--no-cuda"]
    code, _, err = cli("dmg_finetune", *argv)
    assert code == 2 and "cannot hold 1,000,000,000,000,000 online steps" in err


# ---- odd data and environments ----
ODD = {
    "fewer rows than a batch": ("Pendulum-v1", 3, "--batch-size 64"),
    "episodes of one step": ("TinyTerminated-v0", 60, ""),
    "an environment that truncates at once": ("TinyTruncated-v0", 60, ""),
    "an evaluation beyond the run": ("Pendulum-v1", 60, "--eval-frequency 1000000"),
    "a constant state dimension": ("TinyTruncated-v0", 60, "--eval-episodes 3"),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("script", SCRIPTS)
def test_odd_data_and_environments_are_trained_on(script, name, cli, tmp_path):
    env_id, rows, more = ODD[name]
    folder = tmp_path / "mein Ordner ü" / "数据"
    folder.mkdir(parents=True)
    x = d4rl_arrays(rows, 3, 1)
    x |= {"terminals": np.zeros(rows)} | ({"timeouts": np.zeros(rows)} if rows == 3 else {})
    if "constant" in name:
        x["observations"][:, 1] = 7
    path = write_hdf5(folder / "my data.hdf5", x)
    code, _, err = cli(script, *flags(script, 80, path), "--env-id", env_id, *shlex.split(more))
    assert code == 0, err
    checkpoint = torch.load(the_run() / "checkpoint.pt", weights_only=True)
    assert all(x.isfinite().all() for x in checkpoint["agent"].values())
    steps = [row[0] for row in checkpoint["evaluations"]]
    assert steps == ([80] if "beyond" in name and len(STEPS.get(script, ["", ""])) == 1 else [40, 80])
    assert all(row[4] == (200 if env_id == "Pendulum-v1" else 1) for row in checkpoint["evaluations"])
    assert same(state(the_run())["step"], 80)


def test_a_working_folder_with_spaces_and_other_letters(tmp_path, monkeypatch, cli):
    (tmp_path / "a b ü 数").mkdir()
    monkeypatch.chdir(tmp_path / "a b ü 数")
    path = write_hdf5("my data ü.hdf5", d4rl_arrays(60, 3, 1))
    code, _, err = cli("dmg_offline", *flags("dmg_offline", 40, path))
    assert code == 0, err
    code, _, err = cli("dmg_offline", "--resume", str(the_run()), "--gradient-steps", "80")
    assert code == 0 and EventAccumulator(str(the_run())).Reload().Scalars("eval/episodic_return")[-1].step == 80, err


def test_runs_that_start_at_the_same_moment_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dmg_offline.time, "time", lambda: 1e9)
    together, folders = threading.Barrier(8), []

    def start():
        together.wait()
        folders.append(dmg_offline.new_run_folder(dmg_offline.Args()))

    threads = [threading.Thread(target=start) for _ in range(8)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert len(folders) == len(set(folders)) == 8 and all((folder / "args.json").exists() for folder in folders)


def test_no_home_folder_to_write_in(tmp_path, monkeypatch, cli):
    monkeypatch.setenv("HOME", "/dev/null/home")
    for name in ("MINARI_DATASETS_PATH", "D4RL_DATASET_DIR"):
        monkeypatch.delenv(name)
    short = ["--gradient-steps=2", "--eval-episodes=1", "--no-cuda"]
    code, _, err = cli("dmg_offline", *short)  # the set that ships
    assert code == 0, err
    code, _, err = cli("dmg_offline", "--env-id=mujoco/hopper/medium-v0")
    assert code == 2 and "/dev/null/home" in err and "MINARI_DATASETS_PATH" in err
    code, _, err = cli("dmg_offline", "--env-id=hopper-medium-v2")
    assert code == 2 and "/dev/null/home" in err and "--dataset-path" in err


# ---- long runs, threads, divergence ----
@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_hdf5(tmp_path / "pendulum.hdf5", d4rl_arrays(60, 3, 1))


def memory_kept(script, steps, data):
    """Kilobytes in memory at a tenth of a run and at its end."""

    def before(module, update=dmg_offline.update):
        original, count = module.update, 0

        def counted(*args, **kwargs):
            nonlocal count
            count += 1
            if count in (steps // 10, steps):
                Path(f"memory{count}").write_text(Path("/proc/self/status").read_text())
            return original(*args, **kwargs)

        module.update = counted

    argv = [*flags(script, steps, data), f"--eval-frequency={steps // 20}", "--batch-size=1"]
    code, log = complete(script, argv, before=before)
    assert code == 0, log
    return [int(re.search(r"VmRSS:\s+(\d+)", Path(f"memory{n}").read_text())[1]) for n in (steps // 10, steps)]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("steps", [1500, pytest.param(100_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow(steps, data):
    early, late = memory_kept("dmg_finetune", steps, data)
    assert late - early < 5000, (early, late)


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_seed_and_a_number_of_threads_give_the_same_bits(script, threads, data):
    argv, states = [*flags(script, 24, data), "--batch-size=256"], []
    for _ in range(2):
        code, log = complete(script, argv, before=lambda _: torch.set_num_threads(threads))
        assert code == 0, log
        states.append(state(the_run()))
        the_run().rename(f"run{len(states)}")
    assert same(*states)


def reports(q, after):
    """Makes `update` report this mean of Q after some steps, with a hint of what it would report otherwise."""

    def before(module):
        original, count = module.update, 0

        def update(*args, **kwargs):
            nonlocal count
            count += 1
            metrics = original(*args, **kwargs)
            return metrics | {"q_values": torch.tensor(q)} if count > after else metrics

        module.update = update
        if module.__name__ == "iql":
            module.reward_scale = lambda dataset: 2.0

    return before


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_q_beyond_any_return_is_a_divergence_that_keeps_the_last_good_checkpoint(script, sign, data):
    largest = float(np.abs(d4rl_arrays(60, 3, 1)["rewards"]).max()) / (1 - 0.99)
    largest *= 2 if script == "iql" else 1  # Q is of scaled rewards
    argv = [*flags(script, 80, data), "--eval-frequency=20"]
    if "online" in STEPS.get(script, ["online"]):
        argv += ["--online-steps=0"]
    code, log = complete(script, argv, before=reports(sign * 11 * largest, 30))
    assert code == 3 and "diverged at step 40" in log, log
    events = EventAccumulator(str(the_run())).Reload()
    assert [(x.step, x.value) for x in events.Scalars("eval/diverged")] == [(40, 1)]
    assert torch.load(the_run() / "checkpoint.pt", weights_only=True)["step"] == 20
    code, log = complete(script, argv, before=reports(sign * 9 * largest, 30), log="other")
    assert code == 0, log

"""Seeds, checkpoints, kills and resumption: offline every bit comes back, online every transition does."""

import importlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import d4rl_arrays, load_checkpoint, same, write_hdf5
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dmg_finetune
import dmg_offline
import iql
from dmg_offline import Agent, Args, evaluate, load_dataset, make_env, read_args

pytestmark = pytest.mark.filterwarnings("ignore:.*The environment Hopper-v4 is out of date")
SCRIPTS = ("dmg_offline", "td3bc", "iql", "dmg_finetune")
ROOT = Path(dmg_offline.__file__).resolve().parent


def arguments(script, steps=60, online=0, **changes):
    """Of a small run on Hopper, in the working folder's hopper.hdf5."""
    small = {"env_id": "Hopper-v4", "dataset_path": "hopper.hdf5", "batch_size": 8, "eval_episodes": 2}
    small |= {"cuda": False, "eval_frequency": 20}
    small |= {"offline_steps" if script is dmg_finetune else "gradient_steps": steps}
    small |= {"online_steps": online} if script in (dmg_finetune, iql) else {}
    return script.Args(**small | changes)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(name, script): train in this process, in a folder of that name; returns the run folder."""

    def go(name, script=dmg_offline, **changes):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        write_hdf5("hopper.hdf5", d4rl_arrays())
        script.main(arguments(script, **changes))
        (folder,) = Path("runs").iterdir()
        return folder.resolve()

    return go


def resume(folder, script=dmg_offline, **changes):
    args = script.read_args(str(folder))
    vars(args).update(changes, resume=str(folder))
    script.main(args)


def final(folder):
    """All of the last checkpoint and of eval.csv but the clock's readings."""
    checkpoint = load_checkpoint(folder)
    rows = [row[:-1] for row in checkpoint.pop("evaluations")]
    lines = [line.rsplit(",", 1)[0] for line in (folder / "eval.csv").read_text().splitlines()]
    return checkpoint | {"rows": rows, "csv": lines}


def scalars(folder):
    """{tag: [(step, value)]} of the TensorBoard log, without the speed's values."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    value = lambda tag, e: None if tag == "charts/SPS" else e.value  # noqa: E731
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, value(tag, e)) for e in events.Scalars(tag)] for tag in tags}


def test_one_seed_gives_the_same_bits_and_another_seed_other_networks_and_batches(run):
    first, second, other = run("a"), run("b"), run("c", seed=1, learning_rate=1e-12)
    assert same(final(first), final(second)) and scalars(first) == scalars(second)
    a, b = load_checkpoint(first), load_checkpoint(other)
    assert (a["agent"]["actor.0.weight"] - b["agent"]["actor.0.weight"]).abs().max() > 1e-2
    assert not torch.equal(a["generator"], b["generator"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_training_does_not_depend_on_how_often_it_is_evaluated(name, run):
    script, online = importlib.import_module(name), 20 * (name in ("iql", "dmg_finetune"))
    rare = final(run("rare", script, online=online, eval_frequency=1000, eval_episodes=1))
    often = final(run("often", script, online=online, eval_frequency=7, eval_episodes=3))
    ends = [60, 60 + online] if online else [60]  # the hand-over, the end
    assert [row[0] for row in rare["rows"]] == [0, *ends]
    assert [row[0] for row in often["rows"]] == sorted({*range(0, 60 + online, 7), *ends})
    for key in ("agent", "generator"):
        assert same(rare[key], often[key])


def test_the_return_is_that_of_the_saved_actor_on_normalised_states(run):
    folder = run("a")
    checkpoint, args = load_checkpoint(folder), read_args(folder)
    _, mean, std = load_dataset(args)
    agent = Agent(11, 3, args)
    agent.load_state_dict(checkpoint["agent"])
    assert torch.equal(agent.mean, mean) and torch.equal(agent.std, std)
    act = lambda s: agent.actor(((torch.tensor(s) - mean) / std).float()).detach().numpy()  # noqa: E731
    returns, lengths = evaluate(act, [make_env(args), make_env(args)], seed=1000)
    step, mean_return, std, score, mean_length, episodes, _ = checkpoint["evaluations"][-1]
    assert (step, episodes, score) == (60, 2, None)
    assert mean_return == pytest.approx(returns.mean(), rel=1e-3) and mean_length == lengths.mean()
    assert std == pytest.approx(returns.std(), rel=0.01)


def start(script, args):
    """A process of its own that runs main(args); what it prints goes to the file log."""
    code = f"from math import inf\nimport {script.__name__} as s\ns.main(s.Args(**{vars(args)!r}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open("log", "a") as log:
        return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=log, stderr=log)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_killed_at_random_moments_ends_in_the_same_bits(name, run, tmp_path, monkeypatch):
    script = importlib.import_module(name)
    begun = time.monotonic()
    whole = run("whole", script, steps=200)
    duration = time.monotonic() - begun
    (tmp_path / "killed").mkdir()
    monkeypatch.chdir(tmp_path / "killed")
    write_hdf5("hopper.hdf5", d4rl_arrays())
    rng, killed = random.Random(name), 0
    for attempt in range(3):
        folder = next((path.parent for path in Path("runs").glob("*/checkpoint.pt")), None)
        args = script.read_args(str(folder)) if folder else arguments(script, steps=200)
        args.resume = folder and str(folder)
        process = start(script, args)
        if attempt < 2:
            while not [*Path("runs").glob("*/checkpoint.pt")] and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5) * duration)
            process.kill()
        status = process.wait(timeout=120)
        killed += status == -signal.SIGKILL
        assert status in (0, -signal.SIGKILL), Path("log").read_text()
    assert killed and status == 0
    assert same(final(folder), final(whole)) and scalars(folder) == scalars(whole)  # nothing is seen twice


def test_a_finished_run_resumed_changes_nothing_and_a_checkpoint_is_whole_at_every_moment(run, monkeypatch):
    folder, save = run("a"), torch.save
    before = final(folder), scalars(folder)
    resume(folder)
    assert same(final(folder), before[0]) and scalars(folder) == before[1]

    def half(state, path):
        save(state, path)
        Path(path).write_bytes(Path(path).read_bytes()[:1000])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch, "save", half)
        resume(folder, gradient_steps=80)
    checkpoint = load_checkpoint(folder)
    assert checkpoint["step"] == 60
    checkpoint["evaluations"][-1][-1] = 1e6  # seconds
    torch.save(checkpoint, folder / "checkpoint.pt")
    resume(folder)
    assert load_checkpoint(folder)["evaluations"][-1][-1] > 1e6  # the clock goes on
    assert [step for step, _ in scalars(folder)["eval/episodic_return"]] == [0, 20, 40, 60, 80]  # once


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_resumed_run_takes_another_learning_rate_and_normalisation(name, run):
    script = importlib.import_module(name)
    folder = run("a", script, steps=20, normalize_states=True)
    before = load_checkpoint(folder)["agent"]
    length = {"offline_steps" if script is dmg_finetune else "gradient_steps": 40}
    resume(folder, script, learning_rate=0.0, normalize_states=False, **length)
    after = load_checkpoint(folder)["agent"]
    assert before["mean"].abs().max() > 0 and not after["mean"].any() and (after["std"] == 1).all()
    moved = {name for name, x in after.items() if not torch.equal(x, before[name])}
    assert "critic_optimizer.steps.0" in moved
    assert all(name in ("mean", "std") or "_optimizer" in name or "_target" in name for name in moved)


@pytest.mark.parametrize("script", [dmg_finetune, iql])
def test_online_no_saved_transition_is_lost_and_a_new_episode_begins(script, run, monkeypatch):
    folder = run("a", script, steps=10, online=35)
    saved = load_checkpoint(folder)["online"]
    assert len(saved["rows"][0]) == 35
    assert (saved["ends"] or [0])[-1] < 35  # unfinished, else the rest proves nothing
    seeds, begin = [], script.Replay.begin_episode

    def begin_episode(self):
        begin(self)
        seeds.append((len(self.ends), self.observation.copy()))

    monkeypatch.setattr(script.Replay, "begin_episode", begin_episode)
    resume(folder, script, online_steps=65)
    ended, number = load_checkpoint(folder)["online"], len(saved["ends"]) + 1
    observation = dict(seeds)[number]
    assert len(ended["rows"][0]) == 65 and same([x[:35] for x in ended["rows"]], saved["rows"])
    assert ended["ends"][: len(saved["ends"]) + 1] == [*saved["ends"], 35]
    assert len(ended["returns"]) == len(ended["ends"]) and np.isnan(ended["returns"][len(saved["ends"])])
    env = make_env(Args(env_id="Hopper-v4", dataset_path="hopper.hdf5"))
    np.testing.assert_array_equal(observation, env.reset(seed=10_000_000 + number)[0])
    agent = script.Agent(11, 3, script.read_args(str(folder)))
    agent.load_state_dict(load_checkpoint(folder)["agent"])
    np.testing.assert_allclose(ended["rows"][0][35], agent.normalise(observation), rtol=1e-6)

"""Seeds, checkpoints, kills and resumption: offline every bit comes back, online every transition does."""

import dataclasses
import functools
import importlib
import multiprocessing
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, drawn, eval_rows, load_checkpoint, refusal, run, same, spied
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dmg_finetune
import dmg_offline
import iql

pytestmark = pytest.mark.usefixtures("room")
SCRIPTS = ("dmg_offline", "td3bc", "iql", "dmg_finetune")
EACH = pytest.mark.parametrize("name", SCRIPTS)
AND_DROPOUT = pytest.mark.parametrize("name", [*SCRIPTS, "dmg_dropout"])
SERVER = multiprocessing.get_context("forkserver")  # its processes start with this imported
SERVER.set_forkserver_preload(["torch.utils.tensorboard", "gymnasium.envs.mujoco", "minari", "tyro"])


@pytest.fixture(scope="module", autouse=True)
def dropout(room):
    """dmg_dropout, a copy of dmg_offline.py with dropout in its networks."""
    text = Path(dmg_offline.__file__).read_text()
    changed = text.replace("nn.Linear(256, 256), ", "nn.Linear(256, 256), nn.Dropout(0.1), ")
    assert changed != text
    (room / "dmg_dropout.py").write_text(changed)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(room))
        yield importlib.import_module("dmg_dropout")


def offline(script, steps):
    return {"offline_steps" if script is dmg_finetune else "gradient_steps": steps}


def small(script, steps=60, online=0, **changes):
    """Settings of a small run on Hopper."""
    length = offline(script, steps) | ({"online_steps": online} if script in (dmg_finetune, iql) else {})
    return DATA | {"batch_size": 8, "eval_episodes": 2, "eval_frequency": 20} | length | changes


def everything(folder):
    """Of a run the last checkpoint, eval.csv and TensorBoard's log without the speed's values."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    logs = {tag: [(e.step, tag == "charts/SPS" or e.value) for e in events.Scalars(tag)] for tag in tags}
    return load_checkpoint(folder), eval_rows(folder), logs


@AND_DROPOUT
def test_training_does_not_depend_on_how_often_it_is_evaluated(name):
    script, online = importlib.import_module(name), 20 * (name in ("iql", "dmg_finetune"))
    rare = run(script, **small(script, online=online, eval_frequency=1000, eval_episodes=1))
    often = run(script, **small(script, online=online, eval_frequency=7, eval_episodes=3))
    ends = {60, 60 + online}  # the hand-over, the end
    assert eval_rows(rare).keys() == {0, *ends}
    assert eval_rows(often).keys() == {*range(0, 60 + online, 7), *ends}
    assert same(load_checkpoint(rare), load_checkpoint(often))


def test_a_seed_has_its_networks_and_batches_and_the_return_is_the_saved_actors_on_normalized_states():
    folder, other = (run(dmg_offline, **small(dmg_offline, seed=x)) for x in (0, 1))
    found, other, args = load_checkpoint(folder), load_checkpoint(other), dmg_offline.read_args(folder)
    gap = found["agent"]["actor.0.0.weight"] - other["agent"]["actor.0.0.weight"]
    assert gap.abs().max() > 0.1 and not torch.equal(found["random"], other["random"])  # more than is learned
    s = dmg_offline.load_dataset(args)[0].double().numpy()
    mean, std = s.mean(0), s.std(0) + 1e-3
    (agent := dmg_offline.Agent(11, 3, args)).load_state_dict(found["agent"])
    np.testing.assert_allclose(torch.stack([agent.mean, agent.std]), [mean, std], rtol=1e-6, atol=1e-7)
    act = lambda s: agent.actor(torch.tensor((s - mean) / std).float()).detach().numpy()  # noqa: E731
    returns, lengths = dmg_offline.evaluate(act, [dmg_offline.make_env(args) for _ in range(2)], seed=1000)
    expected = returns.mean(), returns.std(), np.nan, lengths.mean()
    np.testing.assert_allclose([float(x) for x in eval_rows(folder)[60]], expected, rtol=1e-3, atol=1e-3)


def test_dropout_acts_in_training_and_not_in_the_evaluation(dropout, monkeypatch):
    seen, s = [], np.ones((50, 11), np.float32)

    def spy(function, act_of, first, *rest):
        seen.append((function.__name__, np.array_equal(act_of(first)(s), act_of(first)(s))))
        return function(first, *rest)

    for name, act_of in (("evaluate", lambda act: act), ("update", lambda agent: agent.act)):
        monkeypatch.setattr(dropout, name, functools.partial(spy, getattr(dropout, name), act_of))
    run(dropout, **small(dropout, steps=2, eval_frequency=1))
    assert seen == [("evaluate", True), ("update", False)] * 2 + [("evaluate", True)]


@AND_DROPOUT
def test_a_run_killed_at_random_moments_ends_in_the_same_bits(name):
    script, rng = importlib.import_module(name), random.Random(name)
    args = script.Args(**small(script, steps=100, eval_frequency=10))
    whole, before = run(script, **vars(args)), {*Path("runs").glob("*/checkpoint.pt")}
    for evaluations in (1, rng.randrange(3, 8), 99):  # killed a moment after so many; the last time never
        process = SERVER.Process(target=script.main, args=(args,))
        process.start()
        while process.is_alive():
            process.join(0.01)
            for path in {*Path("runs").glob("*/checkpoint.pt")} - before:
                args.resume = str(path.parent)
            if args.resume and len(eval_rows(args.resume)) >= evaluations:
                process.join(rng.uniform(0, 0.05))
                process.kill()
        assert process.exitcode == (0 if evaluations == 99 else -signal.SIGKILL)
    assert same(everything(args.resume), everything(whole))


def test_a_finished_run_resumed_changes_nothing_and_a_checkpoint_is_never_half_written(monkeypatch):
    folder = run(dmg_offline, **small(dmg_offline))
    before = everything(folder), (folder / "args.json").read_bytes()
    run(dmg_offline, "--resume", folder)
    assert same((everything(folder), (folder / "args.json").read_bytes()), before)

    def half(state, path):
        Path(path).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        run(dmg_offline, resume=folder, gradient_steps=80)
    assert load_checkpoint(folder)["step"] == 60
    monkeypatch.undo()
    run(dmg_offline, resume=folder, gradient_steps=80)
    checkpoint, rows, logs = everything(folder)
    steps = [step for step, _ in logs["eval/episodic_return"]]
    assert checkpoint["step"] == 80 and steps == [*rows] == [0, 20, 40, 60, 80]


@EACH
def test_a_resumed_run_takes_another_learning_rate_device_and_number_of_steps_but_not_fewer(name):
    script = importlib.import_module(name)
    before = load_checkpoint(folder := run(script, **small(script, steps=20)))
    _, seen = spied(script, run, script, resume=folder, learning_rate=0.002, **offline(script, 40))
    middle, args = load_checkpoint(folder), script.read_args(folder)
    own = getattr(script, "actor_learning_rate", lambda *_: 0.002)
    for k, (*_, rates) in enumerate(seen):
        assert rates == pytest.approx([own(21 + k, args), *[0.002] * (len(rates) - 1)], rel=1e-6)
    on_gpu = {"origin": "cuda, seed 0", "random": torch.zeros(16, dtype=torch.uint8)}
    torch.save(middle | on_gpu, folder / "checkpoint.pt")
    steps = "--offline-steps" if script is dmg_finetune else "--gradient-steps"
    run(script, "--resume", folder, "--learning-rate", 0, steps, 60)
    after = load_checkpoint(folder)
    assert all("_target" in name or same(x, after["agent"][name]) for name, x in middle["agent"].items())
    assert [x["optimizers"][1][0]["step"] for x in (before, middle, after)] == [20, 40, 60]
    assert after["origin"] == "cpu, seed 0" and after["random"].shape == middle["random"].shape
    other = shutil.copytree(folder, f"{folder}-1")
    for k, same_run in enumerate((folder, other)):
        run(script, "--resume", same_run, "--seed", k, steps, 61)
    assert not same(*(load_checkpoint(x)["random"] for x in (folder, other)))  # another seed, other batches
    assert f"{folder} has done 61 steps" in refusal(lambda: run(script, resume=folder, **offline(script, 59)))


@EACH
def test_mean_and_std_belong_to_the_networks_whatever_data_come(name):
    """With --resume, and with dmg_finetune's --checkpoint, on other data of the same robot."""
    script = importlib.import_module(name)
    before = load_checkpoint(folder := run(script, **small(script, steps=20, normalize_states=True)))["agent"]
    other = {"dataset_path": "other_units.hdf5"} | offline(script, 40)
    runs = [(folder, spied(script, run, script, resume=folder, normalize_states=False, **other)[1])]
    if script is dmg_finetune:
        source = run(dmg_offline, **small(dmg_offline, steps=20))
        args = dataclasses.asdict(dmg_finetune.checkpoint_args(str(source))) | other | {"online_steps": 0}
        runs.append(spied(script, run, script, **args))
    for folder, seen in runs:
        after = load_checkpoint(folder)["agent"]
        assert same([after["mean"], after["std"]], [before["mean"], before["std"]])
        _, (s, *_), indices = drawn(script, folder, seen)  # by that mean and std
        assert 2 < s.mean() < 4 and 4 < s.std() < 6 and len(indices) == 20


@pytest.mark.parametrize("script", [dmg_finetune, iql])
def test_online_no_saved_transition_is_lost_and_a_new_episode_begins(script):
    """Also where the file is another one: all online rows are in one unit."""
    folder = run(script, **small(script, steps=10, online=35, normalize_states=True))
    saved, args = load_checkpoint(folder)["online"], script.read_args(folder)
    run(script, resume=folder, online_steps=65, dataset_path="other_units.hdf5")
    ended, number = load_checkpoint(folder)["online"], saved["episodes"] + 1
    assert len(ended["rows"][0]) == 65 and same([x[:35] for x in ended["rows"]], saved["rows"])
    (agent := script.Agent(11, 3, args)).load_state_dict(load_checkpoint(folder)["agent"])
    for row, seed in ((0, 10_000_000), (35, 10_000_000 + number)):
        expected = agent.normalize(script.make_env(args).reset(seed=seed)[0])
        np.testing.assert_allclose(ended["rows"][0][row], expected, rtol=1e-5, atol=1e-6)
    for fewer in (offline(script, 9), offline(script, 11), {"online_steps": 64}):
        assert f"{folder} has done 75 steps" in refusal(lambda x=fewer: run(script, resume=folder, **x))

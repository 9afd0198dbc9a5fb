"""What makes the update fast changes no result: compiled, as a CUDA graph (its logic, on a CPU), several seeds."""

import copy
import ctypes
import dataclasses
import platform
import resource
from collections import Counter
from pathlib import Path

import pytest
import throughput
import torch
from conftest import d4rl_arrays, write_hdf5
from torch.utils._python_dispatch import TorchDispatchMode

import dmg_finetune
import dmg_offline
import iql
import td3bc

STATE, ACTION, BATCH = 5, 3, 16
SCRIPTS = pytest.mark.parametrize(
    "script", [dmg_offline, dmg_finetune, iql, td3bc], ids=["dmg_offline", "dmg_finetune", "iql", "td3bc"]
)


def learner(script, device="cpu", rows=BATCH, **flags):
    """An agent and the function step(update_actor) that trains it on one fixed batch of `rows` transitions."""
    args = script.resolve(script.Args(env_id="hopper-medium-v2", **flags))
    torch.manual_seed(0)
    agent = script.Agent(STATE, ACTION, args, device)
    s, next_s, noise = torch.randn(rows, STATE), torch.randn(rows, STATE), torch.randn(rows, ACTION)
    a, r, terminated = torch.rand(rows, ACTION) * 2 - 1, torch.randn(rows), torch.zeros(rows)
    batch, noise = script.Batch(*(x.to(device) for x in (s, a, r, next_s, terminated))), noise.to(device)

    def step(update_actor):
        if script is iql:
            return iql.update(agent, batch, args)
        return script.update(agent, batch, noise, args, update_actor)

    return agent, step, args


def tensors(agent):
    return [*agent.state_dict().values(), *(x for optimizer in agent.optimizers for x in optimizer.state())]


def assert_close(agent, other, **tolerance):
    for x, y in zip(tensors(agent), tensors(other), strict=True):
        torch.testing.assert_close(x, y, **tolerance)


def test_adam_is_torchs():
    torch.manual_seed(0)
    net, target = torch.nn.Linear(7, 3), torch.randn(9, 3)
    twin, x = copy.deepcopy(net), torch.randn(9, 7)
    own, torchs = dmg_offline.Adam(net, 1e-3), torch.optim.Adam(twin.parameters(), lr=1e-3)
    for _ in range(20):
        own.minimise((net(x) - target).square().sum())
        own.minimise((net.weight.T * x[:7, :3]).square().sum() + net.bias.sum())  # a transposed gradient
        torchs.zero_grad()
        (twin(x) - target).square().sum().backward()
        torchs.step()
        torchs.zero_grad()
        ((twin.weight.T * x[:7, :3]).square().sum() + twin.bias.sum()).backward()
        torchs.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


@SCRIPTS
def test_an_update_changes_every_tensor_in_place_and_reads_none_back(script):
    """What a CUDA graph needs: the same memory at every replay, and no wait for the GPU."""

    class Forbid(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
            return func(*args, **(kwargs or {}))

    agent, step, _ = learner(script)
    before, at = [x.clone() for x in tensors(agent)], [x.data_ptr() for x in tensors(agent)]
    with Forbid():
        step(True)
    assert [x.data_ptr() for x in tensors(agent)] == at
    still = [torch.equal(x, y) for x, y in zip(tensors(agent), before, strict=True)]
    assert sum(still) == 2  # mean and std


@SCRIPTS
def test_operator_calls_a_step(script):
    """Launches, the cost of a step on a GPU and half of it on a CPU: a limit on their number, not on seconds."""

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.update([func.overloadpacket.__name__])
            return func(*args, **(kwargs or {}))

    _, step, _ = learner(script)
    views = {"view", "expand", "t", "transpose", "squeeze", "unsqueeze", "detach", "alias", "select", "slice"}
    found = []
    for update_actor in (False, True):
        calls = Counter()
        with Count():
            step(update_actor)
        found.append(sum(n for name, n in calls.items() if name not in views))
    most = {dmg_offline: (110, 185), dmg_finetune: (110, 185), iql: (164, 164), td3bc: (56, 110)}[script]
    assert found[0] <= most[0] and found[1] <= most[1], found


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone is told to keep memory")
def test_a_step_takes_its_memory_from_what_earlier_ones_freed():
    """Faults of a page of memory a step: each costs more than the use of the page. They were a thousand."""
    for option in (-1, -3):  # glibc's defaults, whatever ran before in this process
        ctypes.CDLL(None).mallopt(option, 2**17)
    _, step, args = learner(dmg_offline, rows=256)
    launch = dmg_offline.accelerate(step, args, torch.device("cpu"))
    for k in range(80):
        if k == 40:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        launch(k % 2 == 1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 40 * 100


@SCRIPTS
def test_compiled_and_plain_updates_agree_and_each_is_one_graph(script):
    (plain, step, _), (agent, own_step, args) = learner(script), learner(script, compile=True)
    torch._dynamo.reset()
    compiled = script.accelerate(own_step, args, torch.device("cpu"))
    torch._dynamo.utils.counters.clear()
    for k in range(1, 5):
        update_actor = script is iql or k % 2 == 0  # IQL moves its actor at every step
        expected, found = step(update_actor), compiled(update_actor)
        assert expected.keys() == found.keys()
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-6, msg=lambda text, at=name: f"{at}: {text}")
    assert_close(agent, plain, rtol=1e-3, atol=2e-5)  # Adam's first steps magnify the last bit of a small gradient
    counters = torch._dynamo.utils.counters
    graphs = 1 if script is iql else 2  # without the actor and with it
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]


def test_compiled_agents_in_one_process_keep_to_themselves(monkeypatch):
    """The compiled functions check nothing when they are called: each must belong to its agent and its kind of step."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)  # more seeds than the limit, 8, must do
    learners = [learner(dmg_offline, compile=True, lam=lam) for lam in (0.25, 1.0, 0.25)]
    torch._dynamo.reset()
    steps = [dmg_offline.accelerate(step, args, torch.device("cpu")) for _, step, args in learners]
    for update_actor in (False, True, True, False):
        for step in steps[:2]:
            step(update_actor)
    for update_actor in (False, True, True, False):
        steps[2](update_actor)
    (first, *_), (other, *_), (alone, *_) = learners
    assert all(torch.equal(x, y) for x, y in zip(tensors(first), tensors(alone), strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(other.value.parameters(), alone.value.parameters(), strict=True))


@SCRIPTS
def test_no_compiled_function_checks_its_guards(script, monkeypatch):
    """torch.compile takes guard_filter_fn out of the options it is given: shared options had left it to the first."""
    filters = []
    monkeypatch.setattr(torch, "compile", lambda f, *, options, **_: filters.append(options.pop("guard_filter_fn", 0)))
    _, step, args = learner(script, compile=True)
    script.accelerate(step, args, torch.device("cpu"))
    assert filters == [torch.compiler.skip_all_guards_unsafe] * 2


def test_compile_without_a_compiler_is_one_sentence(monkeypatch):
    _, step, args = learner(dmg_offline, compile=True)

    def broken(*_, **__):
        def fail():
            raise RuntimeError("No working C++ compiler found")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(dmg_offline.Stop, match=r"--compile failed: No working C\+\+ compiler found. It needs a C\+\+"):
        dmg_offline.accelerate(step, args, torch.device("cpu"))(True)


@SCRIPTS
def test_a_graph_is_captured_once_after_three_plain_steps_and_then_replayed(script, monkeypatch):
    agent, step, args = learner(script)
    reference, plain_step, _ = learner(script)
    seen = []

    def capture(graphed):  # a CUDA graph on a CPU: nothing runs now, all of it later
        seen.append("captured")
        return lambda: (seen.append("replayed"), graphed())[1]

    monkeypatch.setattr(script, "capture", capture)
    launch = script.accelerate(step, args, torch.device("cuda"))
    for k in range(12):
        expected, found = plain_step(k % 2 == 1), launch(k % 2 == 1)
        assert expected.keys() == found.keys() and all(torch.equal(expected[x], found[x]) for x in found)
    assert seen == ["captured", "replayed"] * 2 + ["replayed"] * 4
    assert_close(agent, reference, rtol=0, atol=0)


def test_where_capture_fails_training_goes_on_and_says_so(monkeypatch, capsys):
    (agent, step, args), (reference, plain_step, _) = learner(dmg_offline), learner(dmg_offline)

    def capture(graphed):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(dmg_offline, "capture", capture)
    launch = dmg_offline.accelerate(step, args, torch.device("cuda"))
    for k in range(12):
        launch(k % 2 == 1)
        plain_step(k % 2 == 1)
    assert_close(agent, reference, rtol=0, atol=0)
    out = capsys.readouterr().out
    assert out.count("no CUDA graph, training goes on without it: operation not permitted") == 2


def test_no_graph_on_a_cpu_or_where_it_is_not_wanted(monkeypatch):
    monkeypatch.setattr(dmg_offline, "capture", None)
    _, step, args = learner(dmg_offline)
    assert dmg_offline.accelerate(step, args, torch.device("cpu")) is step
    unwanted = dataclasses.replace(args, cudagraphs=False)
    assert dmg_offline.accelerate(step, unwanted, torch.device("cuda")) is step


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@SCRIPTS
def test_graphed_and_plain_updates_agree_on_a_gpu(script):
    torch.set_float32_matmul_precision("highest")
    agents = []
    for graphs in (False, True):
        agent, step, args = learner(script, "cuda", cudagraphs=graphs)
        launch = script.accelerate(step, args, torch.device("cuda"))
        with torch.cuda.stream(torch.cuda.Stream()):
            for k in range(20):
                launch(k % 2 == 1)
        torch.cuda.synchronize()
        agents.append(agent)
    assert_close(*agents, rtol=1e-4, atol=1e-6)  # the same kernels, but cuBLAS may choose others under capture


# ---- several seeds ----
SETTINGS = {"env_id": "Hopper-v4", "batch_size": 16, "eval_episodes": 1, "eval_frequency": 20, "cuda": False}


def go(script, tmp_path, monkeypatch, name, **flags):
    """Run folders by seed."""
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    script.train(script.resolve(script.Args(**SETTINGS, **flags)))
    return {int(folder.name.split("__")[2]): folder.resolve() for folder in Path("runs").iterdir()}


@SCRIPTS
def test_seeds_side_by_side_give_the_bits_of_runs_after_each_other(script, tmp_path, monkeypatch):
    steps = {"offline_steps": 20, "online_steps": 20} if script is dmg_finetune else {"gradient_steps": 40}
    flags = steps | {"dataset_path": write_hdf5(tmp_path / "hopper.hdf5", d4rl_arrays())}
    together = go(script, tmp_path, monkeypatch, "together", num_seeds=3, seed=4, **flags)
    alone = go(script, tmp_path, monkeypatch, "alone", seed=5, **flags)
    assert sorted(together) == [4, 5, 6] and sorted(alone) == [5]
    a, b = (script.load_checkpoint(str(folder)) for folder in (together[5], alone[5]))
    assert a["args"].seed == 5 and a["args"].num_seeds == 1
    assert all(torch.equal(x, b["agent"][name]) for name, x in a["agent"].items())
    assert [row[:-1] for row in a["evaluations"]] == [row[:-1] for row in b["evaluations"]]
    other = script.load_checkpoint(str(together[6]))["agent"]
    assert not any(torch.equal(x, other[name]) for name, x in a["agent"].items() if name.endswith("0.weight"))
    rows = [(folder / "eval.csv").read_text().splitlines() for folder in together.values()]
    assert all([row.split(",")[0] for row in lines] == ["step", "20", "40"] for lines in rows)


def test_a_seed_that_stops_leaves_the_others_going(capsys):
    seen = []

    def run(name, steps, stop=None):
        for step in range(steps):
            seen.append((name, step))
            yield
        if stop:
            raise stop

    with pytest.raises(dmg_offline.Stop) as stop:
        dmg_offline.take_turns(
            [run("a", 3), run("b", 1, dmg_offline.Stop("b diverged", 3)), run("c", 2, dmg_offline.Stop("c stopped", 2))]
        )
    assert stop.value.args == ("b diverged\nc stopped", 3)
    assert seen == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("c", 1), ("a", 2)]
    dmg_offline.take_turns([run("d", 2)])


def test_a_signal_saves_every_seed(tmp_path, monkeypatch):
    signals, original = [], dmg_offline.evaluate

    def evaluate(*args):
        signals.append(15)
        return original(*args)

    monkeypatch.setattr(dmg_offline, "evaluate", evaluate)
    monkeypatch.chdir(tmp_path)
    data = write_hdf5(tmp_path / "hopper.hdf5", d4rl_arrays())
    args = dmg_offline.resolve(dmg_offline.Args(**SETTINGS, dataset_path=data, gradient_steps=40, num_seeds=2))
    with pytest.raises(dmg_offline.Stop) as stop:
        dmg_offline.train(args, catch_signals=lambda: signals)
    assert stop.value.args[1] == 143 and stop.value.args[0].count("go on with --resume runs/") == 2
    folders = list(Path("runs").iterdir())
    assert [dmg_offline.load_checkpoint(str(folder))["step"] for folder in folders] == [20, 20]


@pytest.mark.parametrize(
    "script, flag",
    [*((script, "resume") for script in (dmg_offline, dmg_finetune, iql, td3bc)), (dmg_finetune, "checkpoint")],
)
def test_several_seeds_cannot_go_on_from_one_run(script, flag):
    with pytest.raises(script.Stop, match="--num-seeds starts new agents: --resume"):
        script.resolve(script.Args(num_seeds=2, **{flag: "runs/x"}))


@SCRIPTS
def test_a_run_of_a_gpu_goes_on_on_a_cpu(script, tmp_path, monkeypatch):
    """Its random state is another kind's, 16 bytes: a new stream; of one kind it must fit."""
    first = {"offline_steps": 20, "online_steps": 20} if script is dmg_finetune else {"gradient_steps": 20}
    more = {"online_steps": 40} if script is dmg_finetune else {"gradient_steps": 40}
    data = write_hdf5(tmp_path / "hopper.hdf5", d4rl_arrays())
    (folder,) = go(script, tmp_path, monkeypatch, "gpu", dataset_path=data, **first).values()
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert saved["device"] == "cpu"

    def resume(device):
        torch.save(
            saved | {"device": device, "generator": torch.zeros(16, dtype=torch.uint8)}, folder / "checkpoint.pt"
        )
        checkpoint = script.load_checkpoint(str(folder))
        script.train(script.resolve(dataclasses.replace(checkpoint["args"], resume=str(folder), **more)), checkpoint)

    with pytest.raises(script.Stop, match="does not fit Hopper-v4"):
        resume("cpu")
    resume("cuda")
    after = script.load_checkpoint(str(folder))
    assert after["step"] == saved["step"] + 20 and after["device"] == "cpu"


def test_agents_of_several_processes_are_counted_and_one_that_cannot_start_is_left_out(capsys):
    spec = {"device": "cpu", "compile": False, "graphs": True, "seeds": 2, "precision": "medium", "threads": 1}
    found = throughput.crowd(throughput.Args(steps=1), spec | {"name": "td3bc"}, 2)
    assert (found["processes"], found["agents"]) == (2, 4) and found["steps_per_second"] > 0
    found = throughput.crowd(throughput.Args(steps=1), spec | {"name": "nothing"}, 1)
    assert found == {"processes": 0, "agents": 0, "steps_per_second": 0}
    assert "nothing 2 seeds did not start: left out" in capsys.readouterr().out

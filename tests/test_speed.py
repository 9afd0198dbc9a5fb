"""What makes the update fast, as counts; that it changes no result: compiled, as a CUDA graph, on a GPU."""

import contextlib
import ctypes
import platform
import resource
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from test_finetune import room  # noqa: F401  all tests share one folder, also for compiled code
from torch.utils._python_dispatch import TorchDispatchMode

import dmg_finetune
import dmg_offline
import iql
import td3bc

NAMES = ["dmg_offline", "dmg_finetune", "iql", "td3bc"]
SCRIPTS = pytest.mark.parametrize("script", [dmg_offline, dmg_finetune, iql, td3bc], ids=NAMES)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STATE, ACTION, BATCH = 5, 3, 16
VIEWS = {"view", "expand", "t", "transpose", "squeeze", "unsqueeze", "detach", "alias", "select", "slice"}


def learner(script, device="cpu", rows=BATCH, **flags):
    """An agent and step(update_actor), which trains it on one fixed batch of `rows` transitions."""
    args = script.Args(env_id="hopper-medium-v2", **flags)
    torch.manual_seed(0)
    agent = script.Agent(STATE, ACTION, args).to(device)
    s, next_s, noise = torch.randn(rows, STATE), torch.randn(rows, STATE), torch.randn(rows, ACTION)
    a, r, terminated = torch.rand(rows, ACTION) * 2 - 1, torch.randn(rows), torch.zeros(rows)
    batch, noise = script.Batch(*(x.to(device) for x in (s, a, r, next_s, terminated))), noise.to(device)

    def step(update_actor):
        given = (args,) if script is iql else (noise, args, update_actor)
        return script.update(agent, batch, *given)

    return agent, step, args


def assert_close(agent, other, **tolerance):
    for (name, x), y in zip(agent.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, **tolerance, msg=lambda text, at=name: f"{at}: {text}")


class Calls(TorchDispatchMode):
    """Counts the operators called, views left out, and refuses those that wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero")
        self.counts[name] += name not in VIEWS
        return func(*args, **(kwargs or {}))


@SCRIPTS
def test_an_update_calls_few_operators_in_place_and_reads_nothing_back(script):
    """Launches are the cost of a step on a GPU and half of it on a CPU. A CUDA graph needs the rest."""
    agent, step, _ = learner(script)
    at = [x.data_ptr() for x in agent.state_dict().values()]
    before = {name: x.clone() for name, x in agent.state_dict().items()}
    with Calls() as calls:
        step(True)
    most = {dmg_offline: 190, dmg_finetune: 190, iql: 170, td3bc: 115}[script]
    assert calls.counts.total() <= most, calls.counts
    assert [x.data_ptr() for x in agent.state_dict().values()] == at
    still = {name for name, x in agent.state_dict().items() if torch.equal(x, before[name])}
    assert still == {"mean", "std"} | {name for name in before if name.endswith("learning_rate")}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep its memory")
def test_a_step_takes_its_memory_from_what_earlier_ones_freed():
    """Page faults of a step: each costs more than the use of the page. They were a thousand."""
    for option in (-1, -3):  # glibc's defaults, whatever ran before in this process
        ctypes.CDLL(None).mallopt(option, 2**17)
    _, step, args = learner(dmg_offline, rows=256)
    launch = dmg_offline.accelerate(step, args, torch.device("cpu"))
    for k in range(60):
        if k == 30:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        launch(k % 2 == 1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 30 * 100


EAGER = [(script, "eager") for script in (dmg_offline, dmg_finetune, iql)]
CPP = pytest.param(td3bc, "inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs g++"))


@pytest.mark.parametrize("script, backend", [CPP, *EAGER])
def test_compiled_and_plain_update_agree(script, backend, monkeypatch):
    """C++ takes a minute each: of the others only the trace is tested."""
    if backend == "eager":
        trace = lambda f, fullgraph, options, c=torch.compile: c(f, fullgraph=fullgraph, backend="eager")  # noqa: E731
        monkeypatch.setattr(torch, "compile", trace)
    (plain, step, _), (agent, own_step, args) = learner(script), learner(script, compile=True)
    compiled = script.accelerate(own_step, args, torch.device("cpu"))
    for _ in range(3):
        expected, found = step(True), compiled(True)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-6)
    assert_close(agent, plain, rtol=1e-3, atol=2e-5)  # Adam's first steps magnify a small gradient's last bit


@SCRIPTS
def test_a_cuda_graph_is_captured_after_three_plain_steps_and_then_replayed(script, monkeypatch):
    """A graph of this test's own, on a CPU: while it is captured nothing runs, at each replay all of it."""
    (agent, step, args), (reference, plain_step, _) = learner(script), learner(script)
    capturing, seen = [], []

    class Graph:
        def replay(self):
            seen.append("replay")
            for name, x in step(self.update_actor).items():
                self.metrics[name].copy_(x)

    @contextlib.contextmanager
    def capture(graph, stream):
        seen.append("capture")
        capturing.append(graph)
        yield
        capturing.pop()

    def recorded(update_actor):
        if not capturing:
            return step(update_actor)
        capturing[0].update_actor = update_actor
        capturing[0].metrics = {name: x.clone() for name, x in last[update_actor].items()}
        return capturing[0].metrics

    monkeypatch.setattr(torch, "cuda", SimpleNamespace(CUDAGraph=Graph, graph=capture, current_stream=int))
    launch, last = script.accelerate(recorded, args, torch.device("cuda")), {}
    for k in range(12):
        expected, found = plain_step(k % 2 == 1), launch(k % 2 == 1)
        assert expected.keys() == found.keys() and all(torch.equal(expected[x], found[x]) for x in found)
        last[k % 2 == 1] = found
    assert seen == ["capture", "replay"] * 2 + ["replay"] * 4
    assert_close(agent, reference, rtol=0, atol=0)
    assert script.accelerate(step, args, torch.device("cpu")) is step
    args.cudagraphs = False
    assert script.accelerate(step, args, torch.device("cuda")) is step


@GPU
@SCRIPTS
def test_graphed_and_plain_updates_agree_on_a_gpu(script):
    torch.set_float32_matmul_precision("highest")
    agents = []
    for graphs in (False, True):
        agent, step, args = learner(script, "cuda", cudagraphs=graphs)
        launch = script.accelerate(step, args, torch.device("cuda"))
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            for k in range(20):
                launch(k % 2 == 1)
        torch.cuda.synchronize()
        agents.append(agent)
    assert_close(*agents, rtol=1e-4, atol=1e-6)  # cuBLAS may choose other kernels under capture

"""What makes the update fast, as counts; that it changes no result: compiled, as a CUDA graph, on a GPU."""

import contextlib
import shutil
from types import SimpleNamespace

import plain_dmg
import pytest
import torch
from conftest import same

import dmg_finetune
import dmg_offline
import iql
import td3bc

pytestmark = pytest.mark.usefixtures("room")  # all tests share one folder, also for compiled code
ALL = [dmg_offline, dmg_finetune, iql, td3bc]
SCRIPTS = pytest.mark.parametrize("script", ALL, ids=lambda script: script.__name__)
STATE, ACTION, BATCH = 5, 3, 16


def learner(script, device="cpu", **flags):
    """A new agent, always with the same networks, and its args."""
    args = script.Args(env_id="hopper-medium-v2", **flags)
    torch.manual_seed(0)
    with torch.device(device):
        return script.Agent(STATE, ACTION, args), args


def given(script, k, device="cpu"):
    """What learn is given in step k: other numbers in each; in every second step the actor has an update."""
    g, widths = torch.Generator().manual_seed(k), ((STATE,), (ACTION,), (), (STATE,), (ACTION,))
    s, a, r, next_s, noise = (torch.randn(BATCH, *width, generator=g) for width in widths)
    batch = [x.to(device) for x in (s, a.tanh(), r, next_s, (r > 1).float())]
    return (batch,) if script is iql else (batch, noise.to(device), k % 2 == 1)


@SCRIPTS
def test_an_update_has_no_needless_matrix_products_and_does_all_in_place(script):
    """One fused Adam a network. A CUDA graph needs the rest; reading numbers back stops test_compiled."""
    agent, args = learner(script)
    learn = script.accelerate(agent, args)  # update itself
    learn(*given(script, 1))
    state = agent.state_dict() | {f"{name}.grad": p.grad for name, p in agent.actor.named_parameters()}
    at, before = [x.data_ptr() for x in state.values()], {name: x.clone() for name, x in state.items()}
    with torch.autograd.profiler.profile() as profile:
        learn(*given(script, 3))
    calls = {call.key: call.count for call in profile.key_averages()}
    most = {dmg_offline: (39, 26, 3), dmg_finetune: (39, 26, 3), iql: (24, 20, 3), td3bc: (24, 21, 2)}[script]
    assert all(calls[f"aten::{x}"] <= n for x, n in zip(("addmm", "mm", "_fused_adam_"), most, strict=True))
    assert [x.data_ptr() for x in state.values()] == at
    still = {name for name, x in state.items() if torch.equal(x, before[name])}
    assert still - {"reward_scale"} == {"mean", "std"}


CPP = pytest.param(td3bc, "inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs g++"))


@pytest.mark.parametrize("script, backend", [CPP, *((script, "eager") for script in ALL[:3])])
def test_compiled_and_plain_update_agree(script, backend, monkeypatch):
    """C++ takes half a minute, without the actor's update: of the others the trace is tested, with it."""
    whole = lambda f, fullgraph, c=torch.compile: c(f, fullgraph=fullgraph, backend=backend)  # noqa: E731
    monkeypatch.setattr(torch, "compile", whole)
    (agent, args), (compiled, flags) = learner(script), learner(script, compile=True)
    plain, learn = script.accelerate(agent, args), script.accelerate(compiled, flags)
    for k in (2, 4, 6) if backend == "inductor" else (1, 3, 5):
        found, expected = learn(*given(script, k)), plain(*given(script, k))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    states = dict(compiled.state_dict()), dict(agent.state_dict())
    torch.testing.assert_close(*states, rtol=1e-3, atol=2e-5)  # Adam magnifies a gradient's last bit


@SCRIPTS
def test_a_cuda_graph_is_captured_after_plain_steps_of_its_kind_and_then_replayed(script, monkeypatch):
    """A graph of this test's own: while captured nothing runs. The actor's first update is in step 12."""
    (agent, args), (reference, _) = learner(script), learner(script)
    steps, capturing, seen, update = range(20), [], [], script.update
    inputs = [given(script, k) if script is iql else (*given(script, k)[:2], k >= 12) for k in steps]
    expected = [script.accelerate(reference, args)(*x) for x in inputs]

    class Graph:
        def replay(self):
            seen.append("replay")
            self.metrics |= update(agent, *self.given)

    def recorded(_, *given):
        seen.append("capture" if capturing else "plain")
        if not capturing:
            return update(agent, *given)
        graph = capturing.pop()
        graph.given, graph.metrics = given, {}
        return graph.metrics

    capture = lambda graph, stream: contextlib.nullcontext(capturing.append(graph))  # noqa: E731
    fake = SimpleNamespace(CUDAGraph=Graph, graph=capture, current_stream=int, is_available=bool)
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(script, "update", recorded)
    on_gpu = SimpleNamespace(optimizers=(), mean=SimpleNamespace(is_cuda=True))
    learn = script.accelerate(on_gpu, args)
    assert all(same(learn(*inputs[k]), expected[k]) for k in steps)
    graph = lambda first, last: first * ["plain"] + ["capture"] + (last - first) * ["replay"]  # noqa: E731
    assert seen == (graph(9, 20) if script is iql else graph(5, 12) + graph(5, 8))
    assert same(agent.state_dict(), reference.state_dict())
    assert same([x[0] for x in inputs], [given(script, k)[0] for k in steps])  # the graph's are its own
    seen.clear()
    args.cudagraphs = False
    for x in inputs:
        script.accelerate(on_gpu, args)(*x)
    assert seen == 20 * ["plain"]


def test_the_plain_dmg_that_speed_is_compared_with_is_dmg():
    agent, args = learner(dmg_offline)
    plain = plain_dmg.PlainDMG(STATE, ACTION)
    nets = [agent.actor, agent.value, agent.critic, agent.actor_target, agent.critic_target]
    theirs = [plain.actor, plain.value, plain.critic, plain.actor_target, plain.critic_target]
    for net, other in zip(nets, theirs, strict=True):
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            q.data.copy_(p)
    for k in range(20):
        dmg_offline.update(agent, *given(dmg_offline, k)[:2], args, k % 2 == 1)
        plain.update(*given(dmg_offline, k))
    for net, other in zip(nets, theirs, strict=True):
        torch.testing.assert_close([*net.parameters()], [*other.parameters()], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@SCRIPTS
def test_graphed_and_plain_updates_agree_on_a_gpu(script):
    states = []
    with torch.cuda.stream(torch.cuda.Stream()):  # a graph cannot be captured on the default one
        for graphs in (False, True):
            agent, args = learner(script, "cuda", cudagraphs=graphs)
            learn = script.accelerate(agent, args)
            for k in range(30):
                learn(*given(script, k, "cuda"))
            states.append({name: x.cpu() for name, x in agent.state_dict().items()})
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-6)  # cuBLAS may choose other kernels under capture

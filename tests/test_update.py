"""One iteration of Algorithm 1 against an independent float64 computation with plain functions."""

import copy
import functools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import dmg_offline
from dmg_offline import Adam, Agent, Args, Batch, update

pytestmark = pytest.mark.usefixtures("kept_gradients")
STATE, ACTION, BATCH = 5, 3, 16
close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-8)
ARGS = Args(env_id="hopper-medium-v2", gradient_steps=100)


def make_agent(script, args, scale=10):
    """A float64 agent in mid-training: biases, norms and targets moved; Q of size `scale`, twins crossing."""
    torch.manual_seed(0)
    agent = script.Agent(STATE, ACTION, args).double()
    for name in ("actor_optimizer", "critic_optimizer", "value_optimizer"):
        if hasattr(agent, name):
            getattr(agent, name).learning_rate.fill_(args.learning_rate)  # not rounded to float32
    for name, p in agent.named_parameters():
        if "optimizer" not in name:  # Adam's means
            p.data.add_(0.05 * torch.randn_like(p))
    batch, _ = make_batch()
    for critic in (agent.critic, agent.critic_target):
        critic[-1].weight.data.mul_(scale)
        critic[-1].bias.data.sub_(critic(batch.observations, batch.actions).mean(1)[:, None, None])
    return agent


def make_batch(seed=1):
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    terminated = (torch.arange(BATCH) % 4 == 0).double()
    s, a, r, next_s = normal(BATCH, STATE), normal(BATCH, ACTION).tanh(), normal(BATCH), normal(BATCH, STATE)
    return Batch(s, a, 3 * r, next_s, terminated), 2 * normal(BATCH, ACTION)


def forward(net, x, of=()):
    """Linear, ReLU, Linear, ReLU, Linear; `of` picks one of two twins."""
    l1, l2, l3 = ((x.weight[of].T, x.bias[of][0]) for x in net if hasattr(x, "weight"))
    return F.linear(F.linear(F.linear(x, *l1).relu(), *l2).relu(), *l3)


def q_values(critic, s, a):
    return [forward(critic, torch.cat([s, a], 1), k)[:, 0] for k in (0, 1)]


def step(agent, name, loss):
    """A step of an Adam of this test's own on the network `name`: its loss and gradients."""
    parameters = list(getattr(agent, name).parameters())
    adams = agent.__dict__.setdefault("adams", {})
    adam = adams.setdefault(name, torch.optim.Adam(parameters, lr=3e-4, fused=False, foreach=False))
    gradients = torch.autograd.grad(loss, parameters)
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g
    adam.step()
    return loss.item(), gradients


def polyak(agent, *names):
    for name in names:
        nets = getattr(agent, name), getattr(agent, f"{name}_target")
        for p, t in zip(*(net.parameters() for net in nets), strict=True):
            t.data.copy_(0.005 * p + 0.995 * t)


def assert_same_step(agent, metrics, reference, expected):
    assert {name[:-5] for name in metrics if name.endswith("_loss")} - {"bc"} == expected.keys()
    for name, (loss, gradients) in expected.items():
        assert metrics[f"{name}_loss"].item() == pytest.approx(loss, rel=1e-8), name
        for p, g in zip(getattr(agent, name).parameters(), gradients, strict=True):
            close(p.grad, g, atol=1e-6 * g.abs().max().item())
    for (name, p), q in zip(agent.named_parameters(), reference.parameters(), strict=True):
        if "optimizer" not in name:  # the reference has torch's
            close(p, q, msg=lambda text, at=name: f"{at}: {text}")


def crossed(x, at):
    """x, some but not all of which lies above `at`: the test would not see this bound otherwise."""
    assert 0 < (x > at).sum() < x.numel()
    return x


OTHERS = {"lam": 0.6, "nu": 0.7, "gamma": 0.9, "policy_noise": 0.3, "noise_clip": 0.4, "expectile": 0.8}


@pytest.mark.parametrize("lam, nu, tau, alpha, most, gamma, noise_of, clip, settings", [
    (0.25, 0.1, 0.7, 3, 3, 0.99, 0.2, 0.5, {"env_id": "hopper-medium-v2"}),
    (0.25, 10, 0.7, 3, 3, 0.99, 0.2, 0.5, {"env_id": "hopper-expert-v2"}),
    (0.25, 0.5, 0.9, 10, 100, 0.99, 0.2, 0.5, {"env_id": "antmaze-umaze-v2"}),
    (0.6, 0.7, 0.8, 3, 3, 0.9, 0.3, 0.4, OTHERS),
])  # fmt: skip
def test_dmgs_update_is_the_published_one(lam, nu, tau, alpha, most, gamma, noise_of, clip, settings):
    """Equations 15, 16, 14 in turn."""
    args = Args(**settings)
    agent = make_agent(dmg_offline, args)
    agent.actor_target[-2].weight.data.mul_(20)  # actions near the bounds
    reference = copy.deepcopy(agent)
    for k in range(1, 5):
        (s, a, r, s2, terminated), noise = batch, noise = make_batch(k)
        metrics, expected = update(agent, batch, noise, args, update_actor=k % 2 == 0), {}
        target_q = torch.minimum(*q_values(reference.critic_target, s, a)).detach()
        u = crossed(target_q - forward(reference.value, s)[:, 0], 0)
        loss = torch.where(u > 0, tau * u**2, (1 - tau) * u**2).mean()
        expected["value"] = step(reference, "value", loss)

        v2 = forward(reference.value, s2)[:, 0].detach()
        a2 = forward(reference.actor_target, s2).tanh()
        a2 = crossed(a2 + crossed(noise_of * noise, clip).clamp(-clip, clip), 1).clamp(-1, 1)
        q2 = torch.minimum(*q_values(reference.critic_target, s2, a2)).detach()
        y = torch.where(terminated == 1, r, r + gamma * (lam * q2 + (1 - lam) * v2))
        loss = sum(F.mse_loss(q, y) for q in q_values(reference.critic, s, a))
        expected["critic"] = step(reference, "critic", loss)
        if k % 2 == 0:  # in the other steps actor and targets stand still
            pi = forward(reference.actor, s).tanh()
            q = torch.minimum(*q_values(reference.critic, s, pi))
            u = target_q - forward(reference.value, s)[:, 0].detach()
            weight = crossed((alpha * u).exp(), most).clamp(max=most)
            loss = nu * (weight[:, None] * (pi - a) ** 2).mean() - q.mean() / q.detach().abs().mean()
            expected["actor"] = step(reference, "actor", loss)
            polyak(reference, "critic", "actor")
        assert_same_step(agent, metrics, reference, expected)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_adam_is_torchs_over_50_steps(dtype, tolerance):
    """Also with gradients of very different sizes and with a learning rate that changes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    twin, x = copy.deepcopy(net), torch.randn(9, 7, dtype=dtype)
    own, torchs = Adam(net, 1e-3).to(dtype), torch.optim.Adam(twin.parameters(), lr=1e-3)
    for k in range(50):
        loss, twins_loss = (10.0 ** (k % 7 - 5) * (f(x) - 1).square().sum() for f in (net, twin))
        torchs.param_groups[0]["lr"] = 1e-3 * (1 + k % 4)
        own.learning_rate.fill_(1e-3 * (1 + k % 4))
        own.minimise(loss)
        torchs.zero_grad()
        twins_loss.backward()
        torchs.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def test_initialisation_is_that_of_torch_linear_for_both_critics_and_they_differ():
    torch.manual_seed(0)
    first = Agent(STATE, ACTION, ARGS).critic[0]
    bound = (STATE + ACTION) ** -0.5
    for k in (0, 1):
        assert 0.98 * bound < first.weight[k].abs().max() <= bound
        assert first.weight[k].std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not torch.equal(first.weight[0], first.weight[1])

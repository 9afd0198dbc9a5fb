"""An update of DMG and of TD3+BC against an independent float64 computation with plain functions."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from conftest import same
from torch import nn

import dmg_offline
import td3bc

STATE, ACTION, BATCH = 5, 3, 16
close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def make_agent(script, args, scale=10):
    """A float64 agent in mid-training: biases, norms and targets moved; Q of size `scale`, twins crossing."""
    torch.manual_seed(0)
    agent = script.Agent(STATE, ACTION, args).double()
    assert same(agent.critic.state_dict(), agent.critic_target.state_dict())
    assert not torch.equal(agent.critic.q1[0].weight, agent.critic.q2[0].weight)
    s, a, *_ = make_batch()[0]
    for p in agent.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    for critic in (agent.critic, agent.critic_target):
        for net in (critic.q1, critic.q2):
            net[-1].weight.data.mul_(scale)
            net[-1].bias.data.sub_(forward(net, torch.cat([s, a], 1)).mean())
    return agent


def make_batch(seed=1):
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    terminated = (torch.arange(BATCH) % 4 == 0).double()
    s, a, r, next_s = normal(BATCH, STATE), normal(BATCH, ACTION).tanh(), normal(BATCH), normal(BATCH, STATE)
    return (s, a, 3 * r, next_s, terminated), 2 * normal(BATCH, ACTION)


def forward(net, x):
    """Linear, LayerNorm if there is one, ReLU, the same again, Linear."""
    layers = [layer for layer in net.modules() if hasattr(layer, "weight")]
    for layer, after in zip(layers, [*layers[1:], None], strict=True):
        if isinstance(layer, nn.LayerNorm):
            x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        x = x * layer.weight if isinstance(layer, nn.LayerNorm) else x @ layer.weight.T
        x = (x + layer.bias).relu() if isinstance(after, nn.Linear) else x + layer.bias
    return x


def q_values(critic, s, a):
    return [forward(net, torch.cat([s, a], 1))[:, 0] for net in (critic.q1, critic.q2)]


def step(agent, name, loss):
    """A step of Adam, by hand, on the network `name`: its loss and gradients."""
    parameters = list(getattr(agent, name).parameters())
    gradients = torch.autograd.grad(loss, parameters)
    past = agent.__dict__.setdefault(f"past of {name}", [])
    past.insert(0, gradients)
    rate, k = torch.tensor(3e-4).item(), len(past)  # the scripts keep it in float32
    for p, *gs in zip(parameters, *past, strict=True):
        m, v = (sum((1 - b) * b**i * g**n for i, g in enumerate(gs)) for b, n in ((0.9, 1), (0.999, 2)))
        p.data -= rate * m / (1 - 0.9**k) / ((v / (1 - 0.999**k)).sqrt() + 1e-8)
    return loss.item(), gradients


def polyak(agent, *names):
    for name in names:
        nets = getattr(agent, name), getattr(agent, f"{name}_target")
        for p, t in zip(*(net.parameters() for net in nets), strict=True):
            t.data.copy_(0.005 * p + 0.995 * t)


def assert_same_step(agent, metrics, reference, expected):
    assert {name[:-5] for name in metrics if name.endswith("_loss")} - {"bc"} == expected.keys()
    for name, (loss, gradients) in expected.items():
        assert metrics[f"{name}_loss"].item() == pytest.approx(loss, rel=1e-10), name
        for p, g in zip(getattr(agent, name).parameters(), gradients, strict=True):
            close(p.grad, g, atol=1e-10 * g.abs().max().item())
    for (name, p), q in zip(agent.named_parameters(), reference.parameters(), strict=True):
        close(p, q, msg=lambda text, at=name: f"{at}: {text}")


def crossed(x, at):
    """x, some but not all of which lies above `at`: the test would not see this bound otherwise."""
    assert 0 < (x > at).sum() < x.numel()
    return x


@pytest.mark.parametrize("script, lam, nu, tau, alpha, most, gamma, noise_of, clip, settings", [
    (dmg_offline, 0.25, 0.1, 0.7, 3, 3, 0.99, 0.2, 0.5, {"env_id": "hopper-medium-v2"}),
    (dmg_offline, 0.25, 10, 0.7, 3, 3, 0.99, 0.2, 0.5, {"env_id": "hopper-expert-v2"}),
    (dmg_offline, 0.25, 0.5, 0.9, 10, 100, 0.99, 0.2, 0.5, {"env_id": "antmaze-umaze-v2"}),
    (dmg_offline, 0.6, 0.7, 0.8, 3, 3, 0.9, 0.3, 0.4,
     {"lam": 0.6, "nu": 0.7, "gamma": 0.9, "policy_noise": 0.3, "noise_clip": 0.4, "expectile": 0.8}),
    (td3bc, 1, 1 / 2.5, None, None, None, 0.99, 0.2, 0.5, {"env_id": "hopper-medium-v2"}),
])  # fmt: skip
def test_the_update_is_the_published_one(script, lam, nu, tau, alpha, most, gamma, noise_of, clip, settings):
    """DMG's equations 15, 16, 14 in turn. TD3+BC has no V, no weights and in the actor's loss Q1 alone."""
    args, is_dmg = script.Args(**settings), script is dmg_offline
    agent = make_agent(script, args)
    agent.actor_target[0][-1].weight.data.mul_(20)  # actions near the bounds
    reference = copy.deepcopy(agent)
    for k in range(1, 7):
        (s, a, r, s2, terminated), noise = batch, noise = make_batch(k)
        metrics, expected = script.update(agent, batch, noise, args, k % 2 == 0), {}
        if is_dmg:
            target_q = torch.minimum(*q_values(reference.critic_target, s, a)).detach()
            u = crossed(target_q - forward(reference.value, s)[:, 0], 0)
            loss = torch.where(u > 0, tau * u**2, (1 - tau) * u**2).mean()
            expected["value"] = step(reference, "value", loss)

        v2 = forward(reference.value, s2)[:, 0].detach() if is_dmg else 0
        a2 = forward(reference.actor_target, s2).tanh()
        a2 = crossed(a2 + crossed(noise_of * noise, clip).clamp(-clip, clip), 1).clamp(-1, 1)
        q2 = torch.minimum(*q_values(reference.critic_target, s2, a2)).detach()
        y = torch.where(terminated == 1, r, r + gamma * (lam * q2 + (1 - lam) * v2))
        loss = sum(F.mse_loss(q, y) for q in q_values(reference.critic, s, a))
        expected["critic"] = step(reference, "critic", loss)
        if k % 2 == 0:  # in the other steps actor and targets stand still
            pi = forward(reference.actor, s).tanh()
            q, weight = q_values(reference.critic, s, pi)[0], torch.ones(BATCH)
            if is_dmg:
                q = torch.minimum(*q_values(reference.critic, s, pi))
                u = target_q - forward(reference.value, s)[:, 0].detach()
                weight = crossed((alpha * u).exp(), most).clamp(max=most)
            bc_loss = (weight[:, None] * (pi - a) ** 2).mean()
            assert is_dmg or metrics["bc_loss"].item() == pytest.approx(bc_loss.item(), rel=1e-9)
            loss = nu * bc_loss - q.mean() / q.detach().abs().mean()
            expected["actor"] = step(reference, "actor", loss if is_dmg else 2.5 * loss)
            polyak(reference, "critic", "actor")
        assert_same_step(agent, metrics, reference, expected)

"""One iteration of Algorithm 1 against an independent float64 computation with plain functions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import float64_agent
from torch.utils._python_dispatch import TorchDispatchMode

import dmg_offline
from dmg_offline import Agent, Args, Batch, resolve, update

pytestmark = pytest.mark.usefixtures("kept_gradients")
STATE, ACTION, BATCH = 5, 3, 16
ARGS = resolve(Args(env_id="hopper-medium-v2", gradient_steps=100))


def make_agent(args=ARGS, seed=0):
    """A float64 agent whose targets differ from its networks, as they do in the middle of training."""
    torch.manual_seed(seed)
    agent = float64_agent(dmg_offline, STATE, ACTION, args)
    for target in (agent.actor_target, agent.critic_target):
        for p in target.parameters():
            p.add_(0.05 * torch.randn_like(p))
    for critic in (agent.critic, agent.critic_target):  # neither twin is the smaller one everywhere
        critic.net[-1].weight.data.mul_(10)
        critic.net[-1].bias.data.zero_()
    batch, _ = make_batch()
    for critic in (agent.critic, agent.critic_target):
        smaller = critic(batch.observations, batch.actions).argmin(0)
        assert 0 < smaller.sum() < BATCH
    return agent


def make_batch(seed=1):
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    terminated = (torch.arange(BATCH) % 4 == 0).double()
    batch = Batch(
        normal(BATCH, STATE), normal(BATCH, ACTION).tanh(), 3 * normal(BATCH), normal(BATCH, STATE), terminated
    )
    return batch, 2 * normal(BATCH, ACTION)


def forward(weights, x):
    (w1, b1), (w2, b2), (w3, b3) = weights
    return F.linear(F.linear(F.linear(x, w1, b1).relu(), w2, b2).relu(), w3, b3)


def plain(net):
    return [(layer.weight.T, layer.bias) for layer in net if hasattr(layer, "weight")]


def twin(critic, k):
    return [(layer.weight[k].T, layer.bias[k, 0]) for layer in critic.net if hasattr(layer, "weight")]


def q_values(critic, s, a):
    x = torch.cat([s, a], 1)
    return [forward(twin(critic, k), x)[:, 0] for k in (0, 1)]


def reference_update(agent, batch, noise, args, update_actor):
    """Equations 15, 16, 14 one after another, sample by sample where it matters; returns losses and gradients."""
    s, a, r, s2, terminated = batch
    adam = lambda net: torch.optim.Adam(net.parameters(), lr=args.learning_rate, fused=False, foreach=False)  # noqa: E731
    optimizers = agent.__dict__.setdefault("reference", [adam(n) for n in (agent.value, agent.critic, agent.actor)])
    out = {}

    def step(name, loss, net, optimizer):
        agent.zero_grad(set_to_none=True)
        loss.backward()
        out[name] = loss.item(), [p.grad.clone() for p in net.parameters()]
        optimizer.step()

    target_q = torch.minimum(*q_values(agent.critic_target, s, a)).detach()
    u = target_q - forward(plain(agent.value), s)[:, 0]
    weight = torch.where(u > 0, args.expectile * torch.ones_like(u), (1 - args.expectile) * torch.ones_like(u))
    step("value", (weight * u**2).sum() / BATCH, agent.value, optimizers[0])

    v2 = forward(plain(agent.value), s2)[:, 0].detach()
    a2 = forward(plain(agent.actor_target), s2).tanh()
    a2 = torch.clamp(a2 + torch.clamp(args.policy_noise * noise, -args.noise_clip, args.noise_clip), -1, 1)
    q2 = torch.minimum(*q_values(agent.critic_target, s2, a2)).detach()
    y = [
        r[i] + (0 if terminated[i] else args.gamma * (args.lam * q2[i] + (1 - args.lam) * v2[i])) for i in range(BATCH)
    ]
    q1, q2 = q_values(agent.critic, s, a)
    step("critic", F.mse_loss(q1, torch.stack(y)) + F.mse_loss(q2, torch.stack(y)), agent.critic, optimizers[1])

    if update_actor:
        pi = forward(plain(agent.actor), s).tanh()
        q = torch.minimum(*q_values(agent.critic, s, pi))
        v = forward(plain(agent.value), s)[:, 0].detach()
        w = [
            min(torch.exp(args.inverse_temperature * (target_q[i] - v[i])).item(), args.max_weight)
            for i in range(BATCH)
        ]
        penalty = sum(w[i] * ((pi[i] - a[i]) ** 2).mean() for i in range(BATCH)) / BATCH
        step("actor", -q.mean() / q.detach().abs().mean() + args.nu * penalty, agent.actor, optimizers[2])
        with torch.no_grad():
            for net, target in ((agent.critic, agent.critic_target), (agent.actor, agent.actor_target)):
                for p, t in zip(net.parameters(), target.parameters(), strict=True):
                    t.copy_(args.target_update_rate * p + (1 - args.target_update_rate) * t)
    return out


@pytest.mark.parametrize("env_id", ["hopper-medium-v2", "hopper-expert-v2", "antmaze-umaze-v2"])
def test_losses_gradients_and_networks_equal_the_reference(env_id):
    args = resolve(Args(env_id=env_id, gradient_steps=100))
    agent = make_agent(args)
    reference = copy.deepcopy(agent)
    for step in range(1, 5):
        batch, noise = make_batch(step)
        metrics = update(agent, batch, noise, args, update_actor=step % 2 == 0)
        expected = reference_update(reference, batch, noise, args, update_actor=step % 2 == 0)
        for name, (loss, gradients) in expected.items():
            assert metrics[f"{name}_loss"].item() == pytest.approx(loss, rel=1e-8), (step, name)
            for p, g in zip(getattr(agent, name).parameters(), gradients, strict=True):
                torch.testing.assert_close(p.grad, g, rtol=1e-6, atol=1e-9)
        for (name, p), q in zip(agent.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8, msg=lambda text, at=(step, name): f"{at}: {text}")


def critic_loss(batch, noise, **changes):
    args = resolve(Args(env_id="hopper-medium-v2", **changes))
    return update(make_agent(args), batch, noise, args, update_actor=False)["critic_loss"].item()


def test_target_is_the_bare_reward_where_terminated_and_bootstraps_elsewhere():
    batch, noise = make_batch()
    moved = batch._replace(next_observations=batch.next_observations + 1)
    ended, running = torch.ones(BATCH).double(), torch.zeros(BATCH).double()
    assert critic_loss(batch._replace(terminated=ended), noise) == critic_loss(moved._replace(terminated=ended), noise)
    assert critic_loss(batch._replace(terminated=running), noise) != critic_loss(
        moved._replace(terminated=running), noise
    )
    q = make_agent().critic(batch.observations, batch.actions).detach()
    expected = sum(F.mse_loss(x, batch.rewards) for x in q).item()
    assert critic_loss(batch._replace(terminated=ended), noise) == pytest.approx(expected, rel=1e-12)


def test_lam_0_ignores_the_actor_and_lam_1_ignores_v():
    batch, noise = make_batch()
    assert critic_loss(batch, noise, lam=0.0) == critic_loss(batch, 0 * noise, lam=0.0)
    assert critic_loss(batch, noise, lam=0.25) != critic_loss(batch, 0 * noise, lam=0.25)
    assert critic_loss(batch, noise, lam=1.0, expectile=0.7) == critic_loss(batch, noise, lam=1.0, expectile=0.9)
    assert critic_loss(batch, noise, lam=0.25, expectile=0.7) != critic_loss(batch, noise, lam=0.25, expectile=0.9)


def test_smoothing_noise_is_scaled_then_clipped_and_drawn_for_each_action_dimension():
    batch, noise = make_batch()
    ones = torch.ones_like(noise)
    clipped = critic_loss(batch, 2.5 * ones, lam=1.0)  # 2.5 * 0.2 is the clip of 0.5
    assert clipped == critic_loss(batch, 9 * ones, lam=1.0)
    assert clipped != critic_loss(batch, 2.4 * ones, lam=1.0)
    assert critic_loss(batch, ones, lam=1.0) == critic_loss(batch, 2 * ones, lam=1.0, policy_noise=0.1)
    one_dimension = torch.cat([ones[:, :1], 0 * ones[:, 1:]], 1)
    assert critic_loss(batch, one_dimension, lam=1.0) != critic_loss(batch, ones, lam=1.0)


def test_smoothed_action_stays_within_the_action_range():
    batch, noise = make_batch()
    agent = make_agent()
    seen = []
    agent.critic_target.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    with torch.no_grad():
        agent.actor_target[-2].bias.fill_(5.0)  # tanh is all but 1
    update(agent, batch, noise.abs(), ARGS, update_actor=False)
    assert seen[1].max() == 1.0


def test_targets_and_actor_move_only_on_actor_steps_and_targets_by_the_polyak_rate():
    batch, noise = make_batch()
    agent = make_agent()
    slow = (agent.actor, agent.actor_target, agent.critic_target)
    before = [copy.deepcopy(net) for net in slow]
    update(agent, batch, noise, ARGS, update_actor=False)
    for net, old in zip(slow, before, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), old.parameters(), strict=True))
    update(agent, batch, noise, ARGS, update_actor=True)
    assert not torch.equal(agent.actor[0].weight, before[0][0].weight)
    for net, target, old in ((agent.actor, slow[1], before[1]), (agent.critic, slow[2], before[2])):
        for p, t, o in zip(net.parameters(), target.parameters(), old.parameters(), strict=True):
            torch.testing.assert_close(t, 0.995 * o + 0.005 * p, rtol=1e-12, atol=1e-14)


def test_the_schedule_moves_the_actor_alone():
    batch, noise = make_batch()
    agent = make_agent()
    before = copy.deepcopy(agent)
    agent.actor_optimizer.learning_rate.fill_(0.0)
    update(agent, batch, noise, ARGS, update_actor=True)
    assert torch.equal(agent.actor[0].weight, before.actor[0].weight)
    assert not torch.equal(agent.critic.net[0].weight, before.critic.net[0].weight)
    assert not torch.equal(agent.value[0].weight, before.value[0].weight)


class ForbidHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
        return func(*args, **(kwargs or {}))


def test_update_never_reads_a_tensor_back_to_the_host():
    batch, noise = make_batch()
    agent = make_agent()
    update(agent, batch, noise, ARGS, update_actor=True)  # Adam's states are made in the first step
    with ForbidHostReads():
        update(agent, batch, noise, ARGS, update_actor=True)


def test_initialisation_is_that_of_torch_linear_for_both_critics_and_they_differ():
    torch.manual_seed(0)
    first = Agent(STATE, ACTION, ARGS).critic.net[0]
    bound = (STATE + ACTION) ** -0.5
    for k in (0, 1):
        assert 0.98 * bound < first.weight[k].abs().max() <= bound
        assert first.weight[k].std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not torch.equal(first.weight[0], first.weight[1])

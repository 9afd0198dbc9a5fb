"""iql.py (with XQL and SQL): the published algorithms by hand, its data; DMG's limits."""

import copy
import functools
import math

import numpy as np
import pytest
import test_update as hand
import torch
from conftest import DATA, d4rl_arrays, drawn, load_checkpoint, refusal, run, same, spied, write_hdf5

import dmg_offline
import iql
import td3bc

pytestmark = pytest.mark.usefixtures("room")
HOPPER, ANTMAZE = "hopper-medium-v2", "antmaze-umaze-v2"
STATE, ACTION, forward, q_values = hand.STATE, hand.ACTION, hand.forward, hand.q_values
CASES = [("iql", HOPPER, 200), ("iql", ANTMAZE, 100), ("xql", HOPPER, 200), ("sql", HOPPER, 1000)]


@pytest.mark.parametrize("in_sample, env_id, scale", CASES)
def test_iql_xql_and_sql_updates_are_the_published_ones(in_sample, env_id, scale):
    args = iql.Args(env_id=env_id, in_sample=in_sample)
    beta = 3 if env_id == HOPPER else 10
    reference = copy.deepcopy(agent := hand.make_agent(iql, args, scale))
    for k in range(1, 4):
        (s, a, r, s2, terminated) = batch = hand.make_batch(k)[0]
        metrics, expected = iql.update(agent, batch, args), {}
        target_q = torch.minimum(*q_values(reference.critic_target, s, a)).detach()
        loss = iql.in_sample_value_loss(target_q, forward(reference.value, s)[:, 0], args)  # see test_losses
        expected["value"] = hand.step(reference, "value", loss)

        u = target_q - forward(reference.value, s)[:, 0].detach()
        weight = hand.crossed(u.clamp(0) if in_sample == "sql" else (beta * u).exp(), 100).clamp(max=100)
        sigma = reference.actor.log_std.exp()
        z = (a - forward(reference.actor.mean, s).tanh()) / sigma
        log_prob = (-0.5 * z**2 - sigma.log() - 0.5 * math.log(2 * math.pi)).sum(1)
        expected["actor"] = hand.step(reference, "actor", -(weight * log_prob).mean())

        y = r + 0.99 * (1 - terminated) * forward(reference.value, s2)[:, 0].detach()
        gaps = [q - y for q in q_values(reference.critic, s, a)]
        losses = [e**2 for e in gaps]
        if in_sample == "xql":  # half the slope of the others'
            losses = [torch.where(hand.crossed(abs(e), 20) <= 20, e**2 / 2, 20 * abs(e) - 200) for e in gaps]
        expected["critic"] = hand.step(reference, "critic", sum(loss.mean() for loss in losses))
        hand.polyak(reference, "critic")
        hand.assert_same_step(agent, metrics, reference, expected)


def learned(script, state, **settings):
    """An agent of that state after one update, with the losses' gradients in p.grad, and the metrics."""
    agent = hand.make_agent(script, args := script.Args(env_id=HOPPER, **settings))
    agent.load_state_dict({name: x for name, x in state.items() if name in agent.state_dict()}, strict=False)
    batch, noise = hand.make_batch()
    rest = (args,) if script is iql else (noise, args, True)
    return agent, script.update(agent, batch, *rest)


def test_dmg_with_lam_1_and_equal_weights_is_td3bc_and_with_lam_0_it_learns_q_and_v_as_iql_does():
    """Table 1. With equal twins and nu = 1 / alpha the actor's loss is TD3+BC's divided by alpha."""
    gradients = lambda net: torch.cat([p.grad.flatten() for p in net.parameters()])  # noqa: E731
    state = hand.make_agent(dmg_offline, dmg_offline.Args()).state_dict()
    twins = {name: state[name.replace(".q2.", ".q1.")] for name in state}
    found, metrics = learned(dmg_offline, twins, lam=1.0, inverse_temperature=0.0, nu=1 / 2.5)
    other, expected = learned(td3bc, twins)
    for name, factor in (("critic", 1), ("actor", 2.5)):
        hand.close(factor * metrics[f"{name}_loss"], expected[f"{name}_loss"])
        hand.close(factor * gradients(getattr(found, name)), gradients(getattr(other, name)))
    (found, metrics), (other, expected) = learned(dmg_offline, state, lam=0.0), learned(iql, state)
    for name in ("critic", "value"):
        hand.close(metrics[f"{name}_loss"], expected[f"{name}_loss"])
        hand.close(gradients(getattr(found, name)), gradients(getattr(other, name)))
    half, full = (gradients(learned(dmg_offline, state, lam=lam)[0].critic) for lam in (0.5, 1.0))
    hand.close(half, (gradients(found.critic) + full) / 2)  # the target is affine in lam
    assert (half - full).abs().max() > 0.1


@pytest.mark.parametrize("in_sample, norms", [("iql", []), ("xql", 2 * [1e-6]), ("sql", 2 * [1e-6])])
def test_the_policy_is_a_clipped_gaussian_layers_are_orthogonal_and_only_v_has_layernorms(in_sample, norms):
    agent = iql.Agent(STATE, ACTION, iql.Args(env_id=HOPPER, in_sample=in_sample))
    layers = [m for m in agent.modules() if isinstance(m, torch.nn.Linear)]
    assert len(layers) == 3 + 2 * 6 + 3 and not any(layer.bias.any() for layer in layers)
    for w in (layer.weight.detach() for layer in layers):
        w = w if w.shape[0] <= w.shape[1] else w.T
        hand.close(w @ w.T, 2 * torch.eye(len(w)), atol=1e-5)
    for net in (agent, agent.value):
        assert [m.eps for m in net.modules() if isinstance(m, torch.nn.LayerNorm)] == norms
    s, actor = 100 * torch.randn(16, STATE), agent.actor
    assert torch.equal(actor(s).stddev, torch.ones(16, ACTION))  # at first
    actor.log_std.data = torch.tensor([-9.0, 0.5, 9.0])
    assert torch.equal(actor(s).stddev, torch.tensor([-5.0, 0.5, 2.0]).exp().expand(16, ACTION))
    assert type(actor(s)) is torch.distributions.Normal  # not squashed: its samples leave [-1, 1]


def test_defaults_of_iql_are_the_published_ones():
    for env_id, *expected in ((HOPPER, 0.7, 3, None, 2, 1), (ANTMAZE, 0.9, 10, None, 0.6, 0.1)):
        each = [iql.Args(env_id=env_id, in_sample=in_sample) for in_sample in ("iql", "xql", "sql")]
        assert [(a.max_weight, a.normalize_states, a.online_steps) for a in each] == 3 * [(100, False, 0)]
        found = each[0].expectile, each[0].inverse_temperature, *(a.in_sample_temperature for a in each)
        assert found == (*expected,)


def test_reward_scale_splits_trajectories_where_they_end():
    s, r = torch.arange(50.0)[:, None], torch.tensor([1.0, 2, 4, 8, 17] + 45 * [0])
    scale = lambda s2, terminated: iql.reward_scale(s, r, s2, terminated, iql.Args())  # noqa: E731
    jump, ended, never = 9 * torch.eye(50)[2][:, None], torch.eye(50)[1], torch.zeros(50)
    assert scale(s + 1 + jump, never) == pytest.approx(1000 / 18)  # 1 + 2 + 4, 8 + 17
    assert scale(s + 1, ended) == pytest.approx(1000 / 26)  # 1 + 2, 4 + 8 + 17: without a jump
    assert scale(s + 1, never) == 1  # one trajectory has no spread
    assert "all rows in order" in refusal(scale, s + 1 + 9 * (s % 17 == 5), never)  # rows missing


def test_rewards_are_not_scaled_where_returns_differ_by_rounding_alone(capsys):
    """Ten demonstrations of one return, rounded to float32; then one of them is better."""
    r = np.pad(np.random.default_rng(0).normal(size=(10, 24)), ((0, 0), (0, 1)))  # the last row is dropped
    r[:, 0] += 7 - r.sum(1)
    assert 0 < np.ptp(r.astype(np.float32).sum(1, dtype=float)) < 1e-5
    for scale in ("1", "5000"):
        arrays = d4rl_arrays(250) | {"terminals": np.zeros(250), "timeouts": np.arange(250) % 25 == 24}
        write_hdf5("same.hdf5", arrays | {"rewards": np.float32(r.ravel())})
        folder, seen = spied(iql, run, iql, **DATA | {"dataset_path": "same.hdf5", "gradient_steps": 4})
        assert f"rewards are multiplied by {scale}\n" in capsys.readouterr().out
        for k, (*_, rates) in enumerate(seen):  # the actor's alone is a cosine where no online steps follow
            assert rates == pytest.approx([1.5e-4 * (1 + math.cos(math.pi * k / 4)), 3e-4, 3e-4], rel=1e-5)
        r[3, 5] += 0.2
    write_hdf5("same.hdf5", arrays | {"rewards": np.float32(2 * r.ravel())})
    run(iql, resume=folder, gradient_steps=6)
    assert "rewards are multiplied by 5000\n" in capsys.readouterr().out  # the scale that its networks know


@functools.cache
def probe(env_id, **settings):
    """A run of iql.py on rows far from normalized, and what its updates were given."""
    x = d4rl_arrays(200, 29, 8) if env_id == ANTMAZE else d4rl_arrays()
    if env_id == ANTMAZE:
        x |= {"rewards": np.float32(x["rewards"] > 1), "terminals": np.zeros(200)}
    x |= {"observations": 3 + 5 * x["observations"], "actions": (1.3 * x["actions"]).clip(-1, 1)}
    data = {"env_id": env_id, "dataset_path": write_hdf5(f"{env_id}.hdf5", x), "gradient_steps": 40}
    return spied(iql, run, iql, **DATA | data | settings)


hopper = functools.partial(probe, "Hopper-v4", online_steps=300, learn=False)
antmaze = functools.partial(probe, ANTMAZE, online_steps=60)


@pytest.mark.parametrize("of", [hopper, antmaze], ids=["hopper", "antmaze"])
def test_batches_have_raw_states_clipped_actions_and_rewards_that_are_scaled_but_for_antmaze(of):
    folder, seen = of()
    n, (s, a, r, next_s, terminated), indices = drawn(iql, folder, seen)
    scale = 1.0 if of is antmaze else iql.reward_scale(s[:n], r[:n], next_s[:n], terminated[:n], iql.Args())
    online = set(r[n:].tolist())  # the environment's: not scaled
    assert online == {-1} if of is antmaze else scale > 10 > max(online)
    assert a[:n].abs().max() == a[n:].abs().max() == 1  # the dataset's alone are kept off the bounds
    a[:n] = a[:n].clamp(-1 + 1e-5, 1 - 1e-5)
    assert 2 < s[:n].mean() < 4  # raw
    for index, (batch, _, rates) in zip(indices, seen, strict=True):
        assert same(batch, [x[index] for x in (s, a, scale * r, next_s, terminated)])
        assert rates == pytest.approx([3e-4, 3e-4, 3e-4])
    assert max(map(max, indices[:40])) < n <= max(map(max, indices[40:])) and min(map(min, indices[40:])) < n


def test_evaluation_takes_the_mean_action_and_online_steps_a_clipped_sample():
    checkpoint = load_checkpoint(hopper()[0])
    (agent := iql.Agent(11, 3, iql.Args())).load_state_dict(checkpoint["agent"])
    s, a, *_ = checkpoint["online"]["rows"]
    mu = agent.actor(s).mean.detach()
    assert torch.equal(torch.from_numpy(agent.act(s.numpy())), mu)
    samples = (mu + torch.randn(1000, *mu.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    for of in (lambda x: (x.abs() == 1).float(), lambda x: (x - mu).abs(), lambda x: (x - mu).square()):
        assert of(a).mean().item() == pytest.approx(of(samples).mean().item(), rel=0.2)  # 4 sigma

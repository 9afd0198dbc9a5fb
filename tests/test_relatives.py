"""iql.py (with XQL and SQL) and td3bc.py: the published algorithms by hand, DMG's limits, data handling and runs."""

import copy
import functools
import math
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import test_losses
import torch
import torch.nn.functional as F
from conftest import d4rl_arrays, float64_agent, write_hdf5
from test_finetune import cli, flags, resume, room, run, run_folder  # noqa: F401  room: all runs share one folder
from test_resume import same, scalars, start
from test_update import ACTION, BATCH, STATE, forward, make_batch, plain, q_values

import dmg_offline
import iql
import td3bc

pytestmark = pytest.mark.usefixtures("kept_gradients")
HOPPER, ANTMAZE = "hopper-medium-v2", "antmaze-umaze-v2"
SCRIPTS = pytest.mark.parametrize("script", [iql, td3bc], ids=["iql", "td3bc"])
close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-8)


# ---- update by hand ----
def make_agent(script, args, scale=10):
    """A float64 agent in the middle of training: biases, norms and targets moved; Q of size `scale`, twins crossing."""
    torch.manual_seed(0)
    agent = float64_agent(script, STATE, ACTION, args)
    for p in agent.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    batch, _ = make_batch()
    for critic in (agent.critic, agent.critic_target):
        critic.net[-1].weight.data.mul_(scale)
        critic.net[-1].bias.data.sub_(critic(batch.observations, batch.actions).mean(1)[:, None, None])
    return agent


def hand_step(agent, name, loss):
    """A step of an Adam of this test's own on the network `name`: its loss and gradients."""
    parameters = list(getattr(agent, name).parameters())
    adams = agent.__dict__.setdefault("adams", {})
    adam = adams.setdefault(name, torch.optim.Adam(parameters, lr=3e-4, fused=False, foreach=False))
    gradients = torch.autograd.grad(loss, parameters)
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g
    adam.step()
    return loss.item(), gradients


def hand_polyak(*nets):
    for net, target in nets:
        for p, t in zip(net.parameters(), target.parameters(), strict=True):
            t.data.copy_(0.005 * p + 0.995 * t)


def assert_same_step(agent, metrics, reference, expected):
    assert {name[:-5] for name in metrics if name.endswith("_loss")} - {"bc"} == expected.keys()
    for name, (loss, gradients) in expected.items():
        assert metrics[f"{name}_loss"].item() == pytest.approx(loss, rel=1e-8), name
        for p, g in zip(getattr(agent, name).parameters(), gradients, strict=True):
            close(p.grad, g, atol=1e-6 * g.abs().max().item())
    for (name, p), q in zip(agent.named_parameters(), reference.parameters(), strict=True):
        close(p, q, msg=lambda text, at=name: f"{at}: {text}")


def test_td3bc_update_is_the_published_one():
    args = td3bc.resolve(td3bc.Args(env_id=HOPPER))
    agent = make_agent(td3bc, args)
    reference = copy.deepcopy(agent)
    for k in range(1, 5):
        (s, a, r, s2, terminated), noise = batch, noise = make_batch(k)
        metrics, expected = td3bc.update(agent, batch, noise, args, update_actor=k % args.policy_frequency == 0), {}
        a2 = (forward(plain(reference.actor_target), s2).tanh() + (0.2 * noise).clamp(-0.5, 0.5)).clamp(-1, 1)
        y = (r + 0.99 * (1 - terminated) * torch.minimum(*q_values(reference.critic_target, s2, a2))).detach()
        loss = sum(F.mse_loss(q, y) for q in q_values(reference.critic, s, a))
        expected["critic"] = hand_step(reference, "critic", loss)
        if k % 2 == 0:  # in the other steps actor and targets stand still
            pi = forward(plain(reference.actor), s).tanh()
            q1, bc = q_values(reference.critic, s, pi)[0], F.mse_loss(pi, a)
            expected["actor"] = hand_step(reference, "actor", bc - 2.5 * q1.mean() / q1.detach().abs().mean())
            assert metrics["bc_loss"].item() == pytest.approx(bc.item())
            hand_polyak((reference.critic, reference.critic_target), (reference.actor, reference.actor_target))
        assert_same_step(agent, metrics, reference, expected)


def hand_v(agent, x):
    """V of x: Dense -> LayerNorm (if V has it) -> ReLU twice, Dense."""
    *hidden, last = (layer for layer in agent.value if hasattr(layer, "weight"))
    for layer, after in zip(hidden, [*hidden[1:], last], strict=True):
        if isinstance(layer, iql.Linear):
            x = F.linear(x, layer.weight.T, layer.bias)
        else:
            x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            x = layer.weight * x + layer.bias
        x = x.relu() if isinstance(after, iql.Linear) else x
    return F.linear(x, last.weight.T, last.bias)[:, 0]


def crossed(x, at):
    """x, some but not all of which lies above `at`: the test would not see this bound otherwise."""
    assert 0 < (x > at).sum() < len(x)
    return x


@pytest.mark.parametrize(
    "in_sample, env_id, scale", [("iql", HOPPER, 20), ("iql", ANTMAZE, 10), ("xql", HOPPER, 200), ("sql", HOPPER, 1000)]
)
def test_iql_xql_and_sql_updates_are_the_published_ones(in_sample, env_id, scale):
    args = iql.resolve(iql.Args(env_id=env_id, in_sample=in_sample))
    tau, beta = (0.7, 3) if env_id == HOPPER else (0.9, 10)
    agent = make_agent(iql, args, scale)
    reference = copy.deepcopy(agent)
    for k in range(1, 4):
        (s, a, r, s2, terminated) = batch = make_batch(k)[0]
        metrics, expected = iql.update(agent, batch, args), {}
        target_q = torch.minimum(*q_values(reference.critic_target, s, a)).detach()
        v = hand_v(reference, s)
        u = crossed(target_q - v, 0)
        if in_sample == "iql":
            loss = torch.where(u > 0, tau * u**2, (1 - tau) * u**2).mean()
        elif in_sample == "xql":  # beta 2, max_clip 7
            z = torch.where(crossed(u / 2, 7) < 7, u / 2, 7.0)
            loss = ((z - 7).exp() - z * math.exp(-7) - math.exp(-7)).mean()
        else:  # alpha 1
            t = crossed(u / 2 + 1, 0)
            loss = (torch.where(t > 0, t**2, 0 * t) + v).mean()
        expected["value"] = hand_step(reference, "value", loss)

        u = target_q - hand_v(reference, s).detach()
        weight = crossed(u.clamp(0) if in_sample == "sql" else (beta * u).exp(), 100).clamp(max=100)
        sigma = reference.actor.log_std.exp()
        z = (a - forward(plain(reference.actor.mean), s).tanh()) / sigma
        log_prob = (-0.5 * z**2 - sigma.log() - 0.5 * math.log(2 * math.pi)).sum(1)
        expected["actor"] = hand_step(reference, "actor", -(weight * log_prob).mean())

        y = r + 0.99 * (1 - terminated) * hand_v(reference, s2).detach()
        errors = [q - y for q in q_values(reference.critic, s, a)]
        losses = [e**2 for e in errors]
        if in_sample == "xql":  # half the slope of the others'
            losses = [torch.where(crossed(e.abs(), 20) <= 20, e**2 / 2, 20 * e.abs() - 200) for e in errors]
        expected["critic"] = hand_step(reference, "critic", sum(loss.mean() for loss in losses))
        hand_polyak((reference.critic, reference.critic_target))
        assert_same_step(agent, metrics, reference, expected)


@pytest.mark.parametrize(*test_losses.test_value_loss_and_its_gradient_with_respect_to_v.pytestmark[0].args)
def test_value_losses_of_iql_have_the_golden_values(monkeypatch, settings, loss, gradient):
    monkeypatch.setattr(test_losses, "in_sample_value_loss", iql.in_sample_value_loss)
    test_losses.test_value_loss_and_its_gradient_with_respect_to_v(settings, loss, gradient)
    z = torch.tensor([-10.0, -4.0])  # all far below V: the largest term of xql counts as -1
    found = iql.in_sample_value_loss(5 * z, 0 * z, iql.Args(in_sample="xql", in_sample_temperature=5.0))
    assert found.item() == pytest.approx(math.e * (z.exp() - z - 1).mean().item())


# ---- networks and defaults of IQL ----
def test_the_policy_is_a_gaussian_with_a_tanh_mean_and_one_clipped_standard_deviation():
    actor = iql.GaussianActor(STATE, ACTION)
    assert torch.equal(actor.log_std, torch.zeros(ACTION))
    s, actor.log_std.data = 100 * torch.randn(BATCH, STATE), torch.tensor([-9.0, 0.5, 9.0])
    assert type(actor(s)) is torch.distributions.Normal  # not squashed: its samples leave [-1, 1]
    assert torch.equal(actor(s).stddev, torch.tensor([-5.0, 0.5, 2.0]).exp().expand(BATCH, ACTION))
    close(actor(s).mean, forward(plain(actor.mean), s).tanh(), atol=1e-5)


@pytest.mark.parametrize("in_sample, norms", [("iql", 0), ("xql", 2), ("sql", 2)])
def test_layers_are_orthogonal_without_biases_and_only_v_is_normalised(in_sample, norms):
    agent = iql.Agent(STATE, ACTION, iql.resolve(iql.Args(env_id=HOPPER, in_sample=in_sample)))
    layers = [m for m in agent.modules() if isinstance(m, iql.Linear)]
    assert len(layers) == 12
    for layer in layers:
        assert not layer.bias.any()
        for w in layer.weight.detach().view(-1, *layer.weight.shape[-2:]):
            w = w if w.shape[0] <= w.shape[1] else w.T
            close(w @ w.T, 2 * torch.eye(len(w)), atol=1e-5)
        assert layer.weight.ndim == 2 or not torch.equal(*layer.weight)
    assert same(agent.critic.state_dict(), agent.critic_target.state_dict())
    for net in (agent, agent.value):
        assert sum(isinstance(m, torch.nn.LayerNorm) for m in net.modules()) == norms


DEFAULTS = ("in_sample_temperature", "expectile", "inverse_temperature", "eval_frequency", "eval_episodes")
DEFAULTS += ("huber_threshold", "value_layer_norm", "linear_weights")


@pytest.mark.parametrize(
    "in_sample, temperatures, rest",
    [
        ("iql", (2, 0.6), (math.inf, False, False)),
        ("xql", (2, 0.6), (20, True, False)),
        ("sql", (1, 0.1), (math.inf, True, True)),
    ],
)
def test_defaults_of_iql_are_the_published_ones_and_give_way_to_flags(in_sample, temperatures, rest):
    datasets = (HOPPER, (0.7, 3, 20_000, 10)), (ANTMAZE, (0.9, 10, 50_000, 100))
    for temperature, (env_id, settings) in zip(temperatures, datasets, strict=True):
        own = dict(zip(DEFAULTS, (4.0, 0.6, 0.0, 7, 8, 5.0, not rest[1], not rest[2]), strict=True))
        for given, expected in (({}, (temperature, *settings, *rest)), (own, tuple(own.values()))):
            args = iql.resolve(iql.Args(env_id=env_id, in_sample=in_sample, **given))
            assert tuple(getattr(args, name) for name in DEFAULTS) == expected
    assert (args.max_weight, args.gamma, args.learning_rate, args.target_update_rate) == (100, 0.99, 3e-4, 0.005)
    assert (args.batch_size, args.gradient_steps, args.online_steps) == (256, 1_000_000, 0)


# ---- limits (the paper's Table 1) ----
def relative(script, dmg, **settings):
    """An agent of another script with the networks of DMG's, and its update as a function of batch and noise."""
    args = script.resolve(script.Args(env_id=HOPPER, **settings))
    agent, named = make_agent(script, args), dmg.state_dict()
    if script is iql:
        named = {name.replace("actor.", "actor.mean."): x for name, x in named.items()}
    agent.load_state_dict({name: named.get(name, x) for name, x in agent.state_dict().items()})
    rest = {} if script is iql else {"update_actor": True}
    return agent, lambda batch, noise: script.update(agent, batch, *([] if script is iql else [noise]), args, **rest)


def dmg_agent(scale=10, tie=False, **settings):
    args = dmg_offline.resolve(dmg_offline.Args(env_id=HOPPER, **settings))
    agent = make_agent(dmg_offline, args, scale)
    for p in (*agent.critic.parameters(), *agent.critic_target.parameters()) if tie else ():
        p.data[1] = p.data[0]
    return agent, lambda batch, noise: dmg_offline.update(agent, batch, noise, args, update_actor=True)


def assert_same_gradients(ours, theirs, factor=1.0, rtol=1e-8):
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(factor * p.grad, q.grad, rtol=rtol, atol=rtol * q.grad.abs().max().item())


@pytest.mark.parametrize("tie", [True, False])
def test_td3bc_is_dmg_with_lam_1_equal_weights_and_nu_one_over_alpha(tie):
    dmg, dmg_update = dmg_agent(tie=tie, lam=1.0, inverse_temperature=0.0, nu=0.4)
    agent, update = relative(td3bc, dmg)
    ours, theirs = dmg_update(*make_batch()), update(*make_batch())
    assert ours["critic_loss"].item() == pytest.approx(theirs["critic_loss"].item(), rel=1e-12)
    assert_same_gradients(dmg.critic, agent.critic)
    losses = 2.5 * ours["actor_loss"].item(), theirs["actor_loss"].item()
    assert (losses[0] == pytest.approx(losses[1], rel=1e-9)) is tie  # DMG's actor takes the twins' minimum
    if tie:
        assert_same_gradients(dmg.actor, agent.actor, 2.5)


@pytest.mark.parametrize("in_sample", ["iql", "xql", "sql"])
def test_v_and_q_of_iql_xql_and_sql_are_those_of_dmg_with_lam_0(in_sample):
    settings = {"in_sample": in_sample, "in_sample_temperature": 2.0}
    dmg, dmg_update = dmg_agent(lam=0.0, **settings)
    agent, update = relative(iql, dmg, value_layer_norm=False, huber_threshold=math.inf, **settings)
    for k in range(3):
        ours, theirs = dmg_update(*make_batch(k)), update(*make_batch(k))
        for name in ("value", "critic"):
            assert ours[f"{name}_loss"].item() == pytest.approx(theirs[f"{name}_loss"].item(), rel=1e-12)
            assert_same_gradients(getattr(dmg, name), getattr(agent, name))
        close(list(dmg.critic_target.parameters()), list(agent.critic_target.parameters()), rtol=1e-12, atol=1e-14)


def test_without_its_q_term_the_actor_of_dmg_is_iqls_and_with_equal_weights_all_clone_the_datasets_actions():
    (batch, noise), sigma = make_batch(), 0.7
    for beta in (3.0, 0.0):
        dmg, dmg_update = dmg_agent(scale=1, nu=1e9, max_weight=100.0, inverse_temperature=beta)
        weighted, iql_update = relative(iql, dmg, inverse_temperature=beta)
        cloned, td3bc_update = relative(td3bc, dmg, alpha=0.0)
        weighted.actor.log_std.data.fill_(math.log(sigma))
        bc = F.mse_loss(forward(plain(cloned.actor), batch.observations).tanh(), batch.actions).item()
        dmg_update(batch, noise), iql_update(batch, noise)
        assert_same_gradients(dmg.actor, weighted.actor.mean, ACTION / (2 * sigma**2) / 1e9, rtol=1e-6)
    assert td3bc_update(batch, noise)["actor_loss"].item() == pytest.approx(bc, rel=1e-12)
    assert_same_gradients(dmg.actor, cloned.actor, 1e-9, rtol=1e-6)


def test_dmgs_target_is_affine_in_lam_and_its_actor_loss_in_nu():
    gradients, losses = [], []  # the critic's gradient is affine in the target
    for x in (0.0, 0.5, 1.0):
        agent, update = dmg_agent(lam=x, nu=4 * x)
        losses.append(update(*make_batch())["actor_loss"].item())
        gradients.append([p.grad for p in agent.critic.parameters()])
    for a, b, c in zip(*gradients, strict=True):
        assert not torch.allclose(a, c, rtol=1e-3)
        close(b, (a + c) / 2)
    losses = [dmg_agent(nu=nu)[1](*make_batch())["actor_loss"].item() for nu in (0.0, 1.0, 10.0)]
    assert losses[1] > losses[0]
    assert losses[2] == pytest.approx(losses[0] + 10 * (losses[1] - losses[0]), rel=1e-12)


# ---- IQL's data, seen by its update ----
def hand_reward_scale(s, r, s2, terminated):
    returns, total = [], 0.0
    for i in range(len(r)):
        total += float(r[i])
        if i == len(r) - 1 or terminated[i] or np.linalg.norm(s[i + 1] - s2[i]) > 1e-6:
            returns.append(total)
            total = 0.0
    return 1000 / (max(returns) - min(returns)) if max(returns) > min(returns) else 1.0


def test_reward_scale_splits_trajectories_where_they_end():
    s, jump, ended = torch.arange(5.0)[:, None], torch.tensor([0, 0, 9.0, 0, 0])[:, None], torch.eye(5)[1]
    for s2, terminated, expected in (
        (s + 1 + jump, 0 * ended, 1000 / 18),  # 1 + 2 + 4, 8 + 17
        (s + 1, ended, 1000 / 26),  # 1 + 2, 4 + 8 + 17: ended without a jump
        (s + 1, 0 * ended, 1.0),  # one trajectory has no spread
    ):
        batch = iql.Batch(s, s, torch.tensor([1.0, 2, 4, 8, 17]), s2, terminated)
        assert iql.reward_scale(batch) == hand_reward_scale(s, *batch[2:]) == pytest.approx(expected)


SMALL = {"env_id": "Hopper-v4", "dataset_path": "hopper.hdf5", "batch_size": 16, "eval_episodes": 1, "cuda": False}
SMALL |= {"gradient_steps": 40, "eval_frequency": 20}


@functools.cache
def probe(env_id, **settings):
    """A run of iql.py on rows far from normalised: these, its checkpoint, batches and learning rates, and its `act`.

    Its policy begins with the standard deviation exp(-0.5). The episodes of its evaluation are left out.
    """
    arrays, seen, rates, acted, update = d4rl_arrays(), [], [], [], iql.update
    if env_id == ANTMAZE:
        arrays = d4rl_arrays(200, 29, 8)
        arrays |= {"rewards": (arrays["rewards"] > 1).astype(np.float32), "terminals": np.zeros(200, bool)}
    arrays |= {"observations": 3 + 5 * arrays["observations"], "actions": (1.3 * arrays["actions"]).clip(-1, 1)}

    class Agent(iql.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            self.actor.log_std.data.fill_(-0.5)

    def spy(agent, batch, args):
        seen.append(batch)
        rates.append([optimizer.learning_rate.item() for optimizer in agent.optimizers])
        return update(agent, batch, args)

    def evaluate(act, envs, episodes, seed):
        acted[:] = (s := np.stack([env.reset(seed=seed)[0] for env in envs])), act(s), act(s)
        return np.zeros(episodes), np.ones(episodes)

    with pytest.MonkeyPatch.context() as patched:
        for name, x in (("Agent", Agent), ("update", spy), ("evaluate", evaluate)):
            patched.setattr(iql, name, x)
        path = write_hdf5(f"{env_id}.hdf5", arrays)
        folder = run(script=iql, **SMALL | {"env_id": env_id, "dataset_path": path} | settings)
    return arrays, iql.load_checkpoint(str(folder)), seen, rates, acted


offline = functools.partial(probe, "Hopper-v4")
still = functools.partial(probe, "Hopper-v4", learning_rate=1e-12, online_steps=300)  # the policy it starts with
antmaze = functools.partial(probe, ANTMAZE, online_steps=60)


@pytest.mark.parametrize("of", [still, antmaze], ids=["hopper", "antmaze"])
def test_batches_hold_raw_states_clipped_actions_and_rewards_that_are_scaled_but_for_antmaze(of):
    arrays, checkpoint, seen, *_ = of()
    keep = ~arrays["timeouts"] & (np.arange(len(arrays["timeouts"])) < len(arrays["timeouts"]) - 1)
    s, a, r, terminals = (arrays[key][keep] for key in ("observations", "actions", "rewards", "terminals"))
    online_s, online_a, online_r, *_ = (x.numpy() for x in checkpoint["online"][0])
    if of is antmaze:
        r, scale = r - 1, 1.0
        assert set(online_r) == {-1}
    else:
        scale = hand_reward_scale(s, r, np.roll(arrays["observations"], -1, 0)[keep], terminals)
        assert scale > 10 > np.abs(online_r).max()  # the replay holds the environment's rewards
    assert np.abs(a).max() == np.abs(online_a).max() == 1  # the dataset's alone are kept off the bounds
    rows = dict(zip(map(bytes, s), zip(a.clip(-1 + 1e-5, 1 - 1e-5), r, strict=True), strict=True))
    new = dict(zip(map(bytes, online_s), zip(online_a, online_r, strict=True), strict=True))
    for k, batch in enumerate(seen):
        keys = [bytes(x) for x in batch.observations.numpy()]
        assert k >= 40 or not new.keys() & keys
        expected_a, expected_r = zip(*((rows | new)[key] for key in keys), strict=True)  # KeyError: not raw
        np.testing.assert_array_equal(batch.actions, np.float32(expected_a))
        np.testing.assert_allclose(batch.rewards, scale * np.float32(expected_r), rtol=1e-5)
    drawn = {bytes(x) for batch in seen[40:] for x in batch.observations.numpy()}
    assert drawn & new.keys() and drawn & rows.keys()


def test_evaluation_takes_the_mean_action_and_online_steps_a_clipped_sample():
    def mean(checkpoint, s):
        agent = iql.Agent(11, 3, checkpoint["args"])
        agent.load_state_dict(checkpoint["agent"])
        return agent.actor(torch.as_tensor(s).float()).mean.detach()

    _, checkpoint, _, _, (s, first, second) = offline()
    assert np.array_equal(first, second)
    close(torch.as_tensor(first), mean(checkpoint, s), atol=1e-6)
    checkpoint = still()[1]
    s, a, *_ = checkpoint["online"][0]
    mu = mean(checkpoint, s)
    noise = torch.randn(1000, *mu.shape, generator=torch.Generator().manual_seed(1))
    samples = (mu + math.exp(-0.5) * noise).clamp(-1, 1)
    for of in (lambda x: (x.abs() == 1).float(), lambda x: (x - mu).abs(), lambda x: (x - mu).square()):
        assert of(a).mean().item() == pytest.approx(of(samples).mean().item(), rel=0.25, abs=0.06)  # 3 sigma


def test_the_actors_learning_rate_alone_is_a_cosine_offline_and_constant_if_online_steps_follow():
    cosine = [1.5e-4 * (1 + math.cos(math.pi * k / 40)) for k in range(40)]
    np.testing.assert_allclose(offline()[3], [(x, 3e-4, 3e-4) for x in cosine], rtol=1e-5)  # actor, critic, V
    np.testing.assert_allclose(antmaze()[3], np.full((100, 3), 3e-4), rtol=1e-5)


# ---- runs ----
BAD = {
    iql: {"expectile": 1.0, "in_sample_temperature": 0.0, "inverse_temperature": -1.0, "max_weight": 0.0}
    | {"huber_threshold": 0.0, "online_steps": -1, "gradient_steps": 0, "gamma": 1.0},
    td3bc: {"alpha": -1.0, "policy_frequency": 0, "policy_noise": -0.1, "noise_clip": math.nan}
    | {"gradient_steps": 0, "gamma": -0.1, "target_update_rate": 0.0, "seed": -1},
}


@pytest.mark.parametrize("script, name, x", [(script, *bad) for script in BAD for bad in BAD[script].items()])
def test_numbers_outside_their_range_are_refused_by_name(script, name, x):
    code, out, err = cli(script=script, **SMALL | {name: x})
    assert code == 2 and f"--{name.replace('_', '-')} {x} is outside" in err and "run folder" not in out


whole = functools.cache(lambda script, **settings: run(script=script, **SMALL | settings))


def final(script, folder):
    """All of the last checkpoint but its arguments and clock readings."""
    checkpoint = script.load_checkpoint(str(folder))
    checkpoint["evaluations"] = [row[:-1] for row in checkpoint["evaluations"]]
    return {name: x for name, x in checkpoint.items() if name not in ("args", "seconds")}


@SCRIPTS
def test_one_seed_gives_the_same_bits_and_another_seed_does_not(script):
    settings = SMALL | ({"online_steps": 60} if script is iql else {})
    first, second, other = (run(script=script, **settings | {"seed": seed}) for seed in (3, 3, 4))
    assert same(final(script, first), final(script, second)) and scalars(first) == scalars(second)
    assert not same(final(script, first)["agent"], final(script, other)["agent"])


@pytest.mark.parametrize("script, settings, at", [(td3bc, {}, 25), (iql, {}, 25), (iql, {"online_steps": 60}, 67)])
def test_a_stopped_run_resumes_to_the_same_bits(script, settings, at):
    calls, original = [], script.update

    def update(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(script, "update", update)
        code, out, _ = cli(script=script, **SMALL | settings)
    folder = run_folder(out)
    checkpoint = script.load_checkpoint(str(folder))
    assert (code, checkpoint["step"]) == (143, at)
    assert not settings or not checkpoint["online"][0][4][-1]  # in the middle of an episode
    code, out, err = resume(folder, script=script)
    assert code == 0 and "does not repeat itself" not in out, err
    expected = whole(script, **settings)
    assert same(final(script, folder), final(script, expected)) and scalars(folder) == scalars(expected)


@pytest.mark.parametrize("script, other", [(iql, td3bc), (td3bc, iql)])
def test_a_checkpoint_of_another_script_is_refused_by_name(script, other):
    code, _, err = resume(whole(other), script=script)
    assert code == 2 and f"was written by {other.__name__}.py, one of {script.__name__}.py is needed" in err


@SCRIPTS
def test_a_run_does_not_go_on_with_another_dataset(script):
    write_hdf5("other.hdf5", d4rl_arrays(seed=9))
    code, _, err = resume(whole(script), script=script, dataset_path="other.hdf5", gradient_steps=50)
    assert code == 2 and "other.hdf5 is not the dataset that" in err


TAGS = {"losses/critic_loss", "losses/actor_loss", "losses/q_values", "charts/SPS"}
TAGS |= {f"eval/{x}" for x in ("episodic_return", "normalized_score", "episodic_length")}
IQL = {"losses/value_loss", "losses/v_values", "losses/advantage_weight", "charts/actor_learning_rate"} | TAGS


@SCRIPTS
def test_the_command_trains_and_leaves_its_files(script, hopper_file, tmp_path):
    settings = SMALL | {"dataset_path": hopper_file}
    process = start([sys.executable, str(Path(script.__file__).resolve()), *flags(settings)], tmp_path)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"Hopper-v4__{script.__name__}__0__" in folder.name and (folder / "args.json").exists()
    assert [row.split(",")[0] for row in (folder / "eval.csv").read_text().splitlines()] == ["step", "20", "40"]
    assert scalars(folder).keys() == (IQL if script is iql else TAGS | {"losses/bc_loss"})


@pytest.mark.parametrize("in_sample", ["xql", "sql"])
def test_xql_and_sql_train_offline_and_then_online(in_sample):
    folder = run(script=iql, in_sample=in_sample, **SMALL | {"online_steps": 60})
    checkpoint = iql.load_checkpoint(str(folder))
    assert [row[0] for row in checkpoint["evaluations"]] == [20, 40, 60, 80, 100]
    assert len(checkpoint["online"][0][0]) == 60 and checkpoint["args"].in_sample == in_sample
    assert scalars(folder).keys() == IQL | {"charts/episodic_return", "charts/episodic_length"}

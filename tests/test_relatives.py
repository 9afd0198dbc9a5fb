"""iql.py (with XQL and SQL) and td3bc.py: the published algorithms by hand, IQL's data."""

import copy
import functools
import math

import numpy as np
import pytest
import test_update as hand
import torch
import torch.nn.functional as F
from conftest import d4rl_arrays, load_checkpoint, same, write_hdf5
from test_finetune import DATA, room, run, spied_run  # noqa: F401  room: all runs share one folder

import iql
import td3bc

pytestmark = pytest.mark.usefixtures("kept_gradients")
HOPPER, ANTMAZE = "hopper-medium-v2", "antmaze-umaze-v2"
STATE, ACTION, forward, q_values = hand.STATE, hand.ACTION, hand.forward, hand.q_values


def test_td3bc_update_is_the_published_one():
    args = td3bc.Args(env_id=HOPPER)
    agent = hand.make_agent(td3bc, args)
    reference = copy.deepcopy(agent)
    for k in range(1, 5):
        (s, a, r, s2, terminated), noise = batch, noise = hand.make_batch(k)
        metrics, expected = td3bc.update(agent, batch, noise, args, update_actor=k % 2 == 0), {}
        a2 = (forward(reference.actor_target, s2).tanh() + (0.2 * noise).clamp(-0.5, 0.5)).clamp(-1, 1)
        y = (r + 0.99 * (1 - terminated) * torch.minimum(*q_values(reference.critic_target, s2, a2))).detach()
        loss = sum(F.mse_loss(q, y) for q in q_values(reference.critic, s, a))
        expected["critic"] = hand.step(reference, "critic", loss)
        if k % 2 == 0:  # in the other steps actor and targets stand still
            pi = forward(reference.actor, s).tanh()
            q1, bc = q_values(reference.critic, s, pi)[0], F.mse_loss(pi, a)
            expected["actor"] = hand.step(reference, "actor", bc - 2.5 * q1.mean() / q1.detach().abs().mean())
            assert metrics["bc_loss"].item() == pytest.approx(bc.item())
            hand.polyak(reference, "critic", "actor")
        hand.assert_same_step(agent, metrics, reference, expected)


def hand_v(agent, x):
    """V of x: Dense -> LayerNorm (if V has it) -> ReLU twice, Dense."""
    *hidden, last = (layer for layer in agent.value if hasattr(layer, "weight"))
    for layer, after in zip(hidden, [*hidden[1:], last], strict=True):
        if isinstance(layer, iql.Linear):
            x = F.linear(x, layer.weight.T, layer.bias[0])
        else:
            x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
            x = layer.weight * x + layer.bias
        x = x.relu() if isinstance(after, iql.Linear) else x
    return F.linear(x, last.weight.T, last.bias[0])[:, 0]


@pytest.mark.parametrize(
    "in_sample, env_id, scale",
    [("iql", HOPPER, 20), ("iql", ANTMAZE, 10), ("xql", HOPPER, 200), ("sql", HOPPER, 1000)],
)
def test_iql_xql_and_sql_updates_are_the_published_ones(in_sample, env_id, scale):
    args = iql.Args(env_id=env_id, in_sample=in_sample)
    tau, beta = (0.7, 3) if env_id == HOPPER else (0.9, 10)
    agent = hand.make_agent(iql, args, scale)
    reference = copy.deepcopy(agent)
    for k in range(1, 4):
        (s, a, r, s2, terminated) = batch = hand.make_batch(k)[0]
        metrics, expected = iql.update(agent, batch, args), {}
        target_q = torch.minimum(*q_values(reference.critic_target, s, a)).detach()
        v = hand_v(reference, s)
        u = hand.crossed(target_q - v, 0)
        if in_sample == "iql":
            loss = torch.where(u > 0, tau * u**2, (1 - tau) * u**2).mean()
        elif in_sample == "xql":  # beta 2, max_clip 7
            z = torch.where(hand.crossed(u / 2, 7) < 7, u / 2, 7.0)
            loss = ((z - 7).exp() - z * math.exp(-7) - math.exp(-7)).mean()
        else:  # alpha 1
            t = hand.crossed(u / 2 + 1, 0)
            loss = (torch.where(t > 0, t**2, 0 * t) + v).mean()
        expected["value"] = hand.step(reference, "value", loss)

        u = target_q - hand_v(reference, s).detach()
        weight = hand.crossed(u.clamp(0) if in_sample == "sql" else (beta * u).exp(), 100).clamp(max=100)
        sigma = reference.actor.log_std.exp()
        z = (a - forward(reference.actor.mean, s).tanh()) / sigma
        log_prob = (-0.5 * z**2 - sigma.log() - 0.5 * math.log(2 * math.pi)).sum(1)
        expected["actor"] = hand.step(reference, "actor", -(weight * log_prob).mean())

        y = r + 0.99 * (1 - terminated) * hand_v(reference, s2).detach()
        gaps = [q - y for q in q_values(reference.critic, s, a)]
        losses = [e**2 for e in gaps]
        if in_sample == "xql":  # half the slope of the others'
            losses = [torch.where(hand.crossed(abs(e), 20) <= 20, e**2 / 2, 20 * abs(e) - 200) for e in gaps]
        expected["critic"] = hand.step(reference, "critic", sum(loss.mean() for loss in losses))
        hand.polyak(reference, "critic")
        hand.assert_same_step(agent, metrics, reference, expected)


def test_the_policy_is_a_gaussian_with_a_tanh_mean_and_one_clipped_standard_deviation():
    actor = iql.GaussianActor(STATE, ACTION)
    assert torch.equal(actor.log_std, torch.zeros(ACTION))
    s, actor.log_std.data = 100 * torch.randn(16, STATE), torch.tensor([-9.0, 0.5, 9.0])
    assert type(actor(s)) is torch.distributions.Normal  # not squashed: its samples leave [-1, 1]
    assert torch.equal(actor(s).stddev, torch.tensor([-5.0, 0.5, 2.0]).exp().expand(16, ACTION))
    hand.close(actor(s).mean, forward(actor.mean, s).tanh(), atol=1e-5)


@pytest.mark.parametrize("in_sample, norms", [("iql", []), ("xql", 2 * [1e-6]), ("sql", 2 * [1e-6])])
def test_layers_are_orthogonal_without_biases_and_only_v_is_normalised(in_sample, norms):
    agent = iql.Agent(STATE, ACTION, iql.Args(env_id=HOPPER, in_sample=in_sample))
    layers = [m for m in agent.modules() if isinstance(m, iql.Linear)]
    assert len(layers) == 12 and not any(layer.bias.any() for layer in layers)
    for layer in layers:
        for w in layer.weight.detach().view(-1, *layer.weight.shape[-2:]):
            w = w if w.shape[0] <= w.shape[1] else w.T
            hand.close(w @ w.T, 2 * torch.eye(len(w)), atol=1e-5)
        assert layer.weight.ndim == 2 or not torch.equal(*layer.weight)
    assert same(agent.critic.state_dict(), agent.critic_target.state_dict())
    for net in (agent, agent.value):
        assert [m.eps for m in net.modules() if isinstance(m, torch.nn.LayerNorm)] == norms


@pytest.mark.parametrize("in_sample, betas", [("iql", (None, None)), ("xql", (2, 0.6)), ("sql", (1, 0.1))])
def test_defaults_of_iql_are_the_published_ones(in_sample, betas):
    of_env = zip((HOPPER, ANTMAZE), betas, ((0.7, 3), (0.9, 10)), strict=True)
    for env_id, temperature, own in of_env:
        args = iql.Args(env_id=env_id, in_sample=in_sample)
        assert (args.in_sample_temperature, args.expectile, args.inverse_temperature) == (temperature, *own)
        assert (args.max_weight, args.normalize_states, args.online_steps) == (100, False, 0)


# ---- IQL's data, seen by its update ----
def test_reward_scale_splits_trajectories_where_they_end():
    s, jump, ended = torch.arange(5.0)[:, None], torch.tensor([0, 0, 9.0, 0, 0])[:, None], torch.eye(5)[1]
    for s2, terminated, expected in (
        (s + 1 + jump, 0 * ended, 1000 / 18),  # 1 + 2 + 4, 8 + 17
        (s + 1, ended, 1000 / 26),  # 1 + 2, 4 + 8 + 17: ended without a jump
        (s + 1, 0 * ended, 1.0),  # one trajectory has no spread
    ):
        batch = iql.Batch(s, s, torch.tensor([1.0, 2, 4, 8, 17]), s2, terminated)
        assert iql.reward_scale(batch) == pytest.approx(expected)


@functools.cache
def probe(env_id, **settings):
    """Rows far from normalised, and a run of iql.py on them that learns nothing: checkpoint, updates."""
    arrays = d4rl_arrays()
    if env_id == ANTMAZE:
        arrays = d4rl_arrays(200, 29, 8)
        arrays |= {"rewards": (arrays["rewards"] > 1).astype(np.float32), "terminals": np.zeros(200, bool)}
    arrays["observations"] = 3 + 5 * arrays["observations"]
    arrays["actions"] = (1.3 * arrays["actions"]).clip(-1, 1)

    class Agent(iql.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            self.actor.log_std.data.fill_(-0.5)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(iql, "Agent", Agent)
        path = write_hdf5(f"{env_id}.hdf5", arrays)
        settings = DATA | {"env_id": env_id, "dataset_path": path, "gradient_steps": 40} | settings
        folder, seen = spied_run(iql, **settings)
    return arrays, load_checkpoint(folder), seen


hopper = functools.partial(probe, "Hopper-v4", online_steps=300)
antmaze = functools.partial(probe, ANTMAZE, online_steps=60)


@pytest.mark.parametrize("of", [hopper, antmaze], ids=["hopper", "antmaze"])
def test_batches_have_raw_states_clipped_actions_and_rewards_that_are_scaled_but_for_antmaze(of):
    arrays, checkpoint, seen = of()
    keep = ~arrays["timeouts"] & (np.arange(len(arrays["timeouts"])) < len(arrays["timeouts"]) - 1)
    s, a, r, terminals = (arrays[key][keep] for key in ("observations", "actions", "rewards", "terminals"))
    online_s, online_a, online_r, *_ = (x.numpy() for x in checkpoint["online"]["rows"])
    if of is antmaze:
        r, scale = r - 1, 1.0
        assert set(online_r) == {-1}
    else:
        next_s = np.roll(arrays["observations"], -1, 0)[keep]
        scale = iql.reward_scale(iql.Batch(*map(torch.from_numpy, (s, a, r, next_s, terminals))))
        assert scale > 10 > np.abs(online_r).max()  # the replay has the environment's rewards
    assert np.abs(a).max() == np.abs(online_a).max() == 1  # the dataset's alone are kept off the bounds
    rows = dict(zip(map(bytes, s), zip(a.clip(-1 + 1e-5, 1 - 1e-5), r, strict=True), strict=True))
    new = dict(zip(map(bytes, online_s), zip(online_a, online_r, strict=True), strict=True))
    for k, (batch, *_) in enumerate(seen):
        keys = [bytes(x) for x in batch.observations.numpy()]
        assert k >= 40 or not new.keys() & keys
        expected_a, expected_r = zip(*((rows | new)[key] for key in keys), strict=True)  # KeyError: not raw
        np.testing.assert_array_equal(batch.actions, np.float32(expected_a))
        np.testing.assert_allclose(batch.rewards, scale * np.float32(expected_r), rtol=1e-5)
    drawn = {bytes(x) for batch, *_ in seen[40:] for x in batch.observations.numpy()}
    assert drawn & new.keys() and drawn & rows.keys()


def test_evaluation_takes_the_mean_action_and_online_steps_a_clipped_sample():
    checkpoint = hopper()[1]
    agent = iql.Agent(11, 3, iql.Args())
    agent.load_state_dict(checkpoint["agent"])
    s, a, *_ = checkpoint["online"]["rows"]
    mu = agent.actor(s).mean.detach()
    assert torch.equal(torch.from_numpy(agent.act(s.numpy())), mu)
    noise = torch.randn(1000, *mu.shape, generator=torch.Generator().manual_seed(1))
    samples = (mu + math.exp(-0.5) * noise).clamp(-1, 1)
    for of in (lambda x: (x.abs() == 1).float(), lambda x: (x - mu).abs(), lambda x: (x - mu).square()):
        assert of(a).mean().item() == pytest.approx(of(samples).mean().item(), rel=0.25, abs=0.06)  # 3 sigma


def test_the_actors_learning_rate_alone_is_a_cosine_offline_and_constant_if_online_steps_follow():
    cosine = [1.5e-4 * (1 + math.cos(math.pi * k / 40)) for k in range(40)]
    rates = [x for *_, x in probe("Hopper-v4")[2]]  # of actor, critic, V
    np.testing.assert_allclose(rates, [(x, 3e-4, 3e-4) for x in cosine], rtol=1e-5)
    np.testing.assert_allclose([x for *_, x in antmaze()[2]], np.full((100, 3), 3e-4), rtol=1e-5)

"""dmg_finetune.py: schedules, the hand-over from offline to online, the replay, evaluation, the limit TD3."""

import csv
import functools
import runpy
import sys
import tempfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import d4rl_arrays, load_checkpoint, same, write_hdf5
from gymnasium.wrappers import TimeLimit

import dmg_finetune
import dmg_offline
import iql
from dmg_finetune import Agent, Args, Batch, Replay, online_schedule

SMALL = {"batch_size": 16, "eval_episodes": 1, "eval_frequency": 100, "cuda": False}
DATA = SMALL | {"env_id": "Hopper-v4", "dataset_path": "hopper.hdf5"}
HOPPER = DATA | {"offline_steps": 40, "online_steps": 60}
PENDULUM = SMALL | {"env_id": "Pendulum-v1", "from_scratch": True, "learning_starts": 30, "online_steps": 50}


@pytest.fixture(scope="module", autouse=True)
def room(tmp_path_factory):
    """All runs of a file share one folder; Gymnasium-Robotics leaves its XML in the temporary folder."""
    folder = tmp_path_factory.mktemp("room")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(tempfile, "tempdir", str(folder))
        write_hdf5("hopper.hdf5", d4rl_arrays())
        yield folder


def run(script=dmg_finetune, **settings):
    """A whole run in this process: its folder."""
    before = set(Path("runs").glob("*"))
    script.main(script.Args(**settings))
    (folder,) = set(Path("runs").glob("*")) - before
    return folder.resolve()


def final(folder, since=0):
    """All of a run's last checkpoint but clock readings; of the evaluations those from step `since` on."""
    checkpoint = load_checkpoint(folder)
    kept = {key: checkpoint[key] for key in ("agent", "generator", "step", "online") if key in checkpoint}
    return kept | {"rows": [row[:-1] for row in checkpoint["evaluations"] if row[0] >= since]}


def spied_run(script=dmg_finetune, **settings):
    """A run that learns nothing; of each update the batch, lam, nu and gamma, and the learning rates."""
    seen = []

    def spy(agent, batch, *rest):
        args = rest[-1] if script is iql else rest[1]
        numbers = [float(getattr(args, name, 0)) for name in ("lam", "nu", "gamma")]
        optimizers = agent.actor_optimizer, agent.critic_optimizer, agent.value_optimizer
        seen.append((batch, numbers, [x.learning_rate.item() for x in optimizers]))
        return {"q_values": torch.zeros(())}

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(script, "update", spy)
        return run(script, **settings), seen


def test_lam_and_nu_near_their_ends_as_in_the_official_code():
    args, limit = Args(env_id="antmaze-umaze-v2"), Args(env_id="Hopper-v5", from_scratch=True)
    numbers = {1: (0.25, 0.5), 999: (0.25, 0.5), 1000: (0.2525, 0.49505), 1999: (0.2525, 0.49505)}
    numbers |= {100_000: (0.40849, 0.18619), 500_000: (0.49836, 0.00825), 1_000_000: (0.49999, 0.00502)}
    for t, (lam, nu) in numbers.items():
        assert online_schedule(t, args) == pytest.approx({"lam": lam, "nu": nu, "gamma": 0.99}, abs=5e-6)
        assert online_schedule(t, limit) == {"lam": 1, "nu": 0, "gamma": 0.99}


def test_each_update_is_given_the_numbers_of_its_time_and_update_1000_is_decayed():
    settings = {"offline_steps": 3, "online_steps": 1001, "lam": 0.3, "nu": 0.7, "gamma_online": 0.9}
    numbers = [found for _, found, _ in spied_run(**DATA | settings)[1]]
    decayed = 0.5 - 0.2 * 0.99, 0.005 + 0.695 * 0.99, 0.9
    np.testing.assert_allclose(numbers, 3 * [(0.3, 0.7, 0.99)] + 999 * [(0.3, 0.7, 0.9)] + 2 * [decayed])


def test_only_antmaze_large_has_another_discount_online():
    large = "antmaze-large-play-v2", "antmaze-large-diverse-v2", "D4RL/antmaze/large-diverse-v1"
    for name in (*large, "antmaze-medium-play-v2", "antmaze-umaze-v2", "hopper-medium-v2", "my/large-v0"):
        args = Args(env_id=name, gamma=0.98)
        assert (args.gamma, args.gamma_online) == (0.98, 0.995 if name in large else 0.98)
        assert Args(env_id=name, gamma_online=0.9).gamma_online == 0.9


def test_the_actors_learning_rate_is_dmg_offlines_and_then_constant():
    args, offline = Args(offline_steps=1000), dmg_offline.Args(gradient_steps=1000)
    rate = dmg_finetune.actor_learning_rate
    expected = [dmg_offline.actor_learning_rate(step, offline) for step in range(1, 1001)]
    assert [rate(step, args) for step in range(1, 1001)] == expected
    later = {rate(step, args) for step in (1001, 1002, 5000, 2_000_000)}
    assert later == {3e-4} == {rate(1, Args(offline_steps=0))}
    found = np.array([rates for *_, rates in spied_run(**HOPPER)[1]])  # of actor, critic, V
    expected = [rate(k, Args(offline_steps=40)) for k in range(1, 101)]
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-6)
    assert np.ptp(found[:, 1:]) == 0


FEW = DATA | {"eval_frequency": 20, "eval_episodes": 2, "seed": 3, "nu": 0.3}
offline_folder = functools.cache(lambda: run(dmg_offline, gradient_steps=50, **FEW))


def test_the_offline_part_has_the_bits_of_dmg_offline():
    own = final(run(offline_steps=50, online_steps=0, **FEW))
    assert [row[0] for row in own["rows"]] == [0, 20, 40, 50]
    assert not own.pop("online")["ends"] and same(own, final(offline_folder()))


def test_a_checkpoint_of_dmg_offline_continues_as_if_this_script_had_trained_it(monkeypatch):
    folder, before = str(offline_folder()), set(Path("runs").glob("*"))
    script = dmg_finetune.__file__
    monkeypatch.setattr(sys, "argv", [script, "--checkpoint", folder, "--online-steps", "50"])
    runpy.run_path(script, run_name="__main__")
    (handed_over,) = set(Path("runs").glob("*")) - before
    whole = run(offline_steps=50, online_steps=50, **FEW)
    assert same(final(handed_over), final(whole, since=50))
    first, last = (list(csv.reader((x / "eval.csv").open())) for x in (handed_over, offline_folder()))
    assert first[1][:-1] == last[-1][:-1] and first[1][0] == "50"  # but for wall_seconds
    args = dmg_finetune.read_args(handed_over)
    assert (args.seed, args.nu, args.eval_frequency, args.exp_name) == (3, 0.3, 20, "dmg_finetune")
    assert (args.offline_steps, args.checkpoint) == (50, folder)
    agent = load_checkpoint(handed_over)["agent"]
    counts = [agent[f"{net}_optimizer.steps.0"].item() for net in ("actor", "critic", "value")]
    assert counts == [50, 100, 100]  # Adam continues to count


class Line(gym.Env):
    """Observes the number of the episode, from its seed, and the number of steps taken."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, reward=lambda k: 2.5 * k, end=99):
        self.reward, self.end, self.seeds = reward, end, []

    def reset(self, seed=None, options=None):
        self.seeds.append(seed)
        self.k, self.origin = 0, seed % 10_000_000
        return np.array([self.origin, 0.0], np.float32), {}

    def step(self, action):
        self.k += 1
        observed = np.array([self.origin, self.k], np.float32)
        return observed, self.reward(self.k), self.k == self.end, False, {}


def replay_of(env, env_id="Hopper-v5", steps=0, rows=0, scale=1, **changes):
    """A replay with `rows` rows of -7 as its dataset, and then some steps with the action 0.5."""
    (state_dim,), (action_dim,) = env.observation_space.shape, env.action_space.shape
    args = Args(env_id=env_id, online_steps=20, **changes)
    agent, widths = Agent(state_dim, action_dim, args), ((state_dim,), (action_dim,), (), (state_dim,), ())
    agent.std.fill_(scale)
    dataset = Batch(*(torch.full((rows, *width), -7.0) for width in widths))
    replay = Replay(dataset, env, agent, args)
    for _ in range(steps):
        replay.step(np.full(action_dim, 0.5, np.float32))
    return replay


def filled(replay, first=0):
    return Batch(*(x[first : replay.size] for x in replay.rows))


def test_new_rows_stand_behind_the_dataset_in_order_with_normalised_states():
    env = Line(end=2)
    replay = replay_of(TimeLimit(env, 3), steps=5, rows=4, scale=2, seed=2)
    rows = filled(replay, 4)
    assert (replay.first, replay.size) == (4, 9) and all((x[:4] == -7).all() for x in replay.rows)
    assert rows.observations.tolist() == [[0, 0], [0, 0.5], [0.5, 0], [0.5, 0.5], [1, 0]]
    assert rows.next_observations.tolist() == [[0, 0.5], [0, 1], [0.5, 0.5], [0.5, 1], [1, 0.5]]
    assert rows.rewards.tolist() == [2.5, 5, 2.5, 5, 2.5] and (rows.actions == 0.5).all()
    assert rows.terminated.tolist() == [0, 1, 0, 1, 0]
    assert (replay.ends, replay.returns) == ([2, 4], [7.5, 7.5])
    assert env.seeds == [30_000_000, 30_000_001, 30_000_002]  # far from evaluation's


def test_a_replay_saved_between_two_episodes_gets_no_empty_episode():
    restored = replay_of(Line(end=2))
    restored.restore(replay_of(Line(end=2), steps=4).state())
    assert (restored.size, restored.ends) == (4, [2, 4])


@pytest.mark.parametrize("success", [True, False])
def test_antmaze_success_on_the_last_allowed_step_is_terminal_and_a_timeout_is_not(success):
    env = TimeLimit(Line(lambda k: float(success and k == 4), end=4 if success else 99), 4)
    replay = replay_of(env, "antmaze-umaze-v2", steps=6)
    rows = filled(replay)
    assert rows.rewards.tolist() == [-1, -1, -1, -float(not success), -1, -1]
    assert rows.terminated.tolist() == [0, 0, 0, float(success), 0, 0]
    assert rows.next_observations[:, 1].tolist() == [1, 2, 3, 4, 1, 2]  # 4 is the true last, not the reset's
    assert (replay.ends, replay.returns) == ([4], [float(success)])  # the return is the environment's


def test_dataset_and_online_rows_are_drawn_alike(room):
    write_hdf5("short.hdf5", d4rl_arrays(n=60))
    settings = HOPPER | {"dataset_path": "short.hdf5", "online_steps": 120, "learning_starts": 20}
    folder, seen = spied_run(**settings)
    dataset, *_ = dmg_finetune.load_dataset(dmg_finetune.read_args(folder))
    online = load_checkpoint(folder)["online"]["rows"]
    everything = [torch.cat(x) for x in zip(dataset, online, strict=True)]
    row_of = {tuple(s.tolist()): i for i, s in enumerate(everything[3])}
    n = len(dataset.rewards)
    assert len(row_of) == n + 120 and len(seen) == 40 + 100  # one update a step, none in the first 20
    drawn = []
    for k, (batch, *_) in enumerate(seen):
        index = [row_of[tuple(s.tolist())] for s in batch.next_observations]
        assert same(list(batch), [x[index] for x in everything])
        assert max(index) < (n if k < 40 else n + 20 + k - 40 + 1)
        drawn.append(index)
    assert sum(n + 20 + k in index for k, index in enumerate(drawn[40:])) > 5  # the newest row, of about 12
    expected = np.mean([(20 + k) / (n + 20 + k) for k in range(1, 101)])
    assert np.mean(np.array(drawn[40:]) >= n) == pytest.approx(expected, abs=0.04)
    assert np.bincount(np.ravel(drawn))[:n].min() > 0


def test_from_scratch_is_the_limit_of_no_data_lam_1_and_nu_0_and_trains_after_learning_starts():
    args = Args(env_id="Hopper-v5", from_scratch=True)
    limit = args.offline_steps, args.lam, args.lam_end, args.nu, args.nu_end, args.learning_starts
    assert limit == (0, 1, 1, 0, 0, 25_000) and Args().learning_starts == 0
    saved = load_checkpoint(run(**PENDULUM))
    counts = [saved["agent"][f"{net}_optimizer.steps.0"].item() for net in ("actor", "critic", "value")]
    assert counts == [10, 20, 20] and len(saved["online"]["rows"][0]) == 50
    assert saved["evaluations"][0][3] is None and [x[0] for x in saved["evaluations"]] == [0, 50]


def test_first_actions_are_uniform_and_later_ones_the_actors_with_noise():
    settings = PENDULUM | {"learning_starts": 400, "online_steps": 800, "eval_frequency": 1000}
    saved = load_checkpoint(spied_run(**settings, exploration_noise=0.1)[0])
    s, a, *_ = saved["online"]["rows"]
    uniform = (a[:400, 0].sort().values + 1) / 2
    assert (uniform - torch.linspace(0, 1, 400)).abs().max() < 0.08  # Kolmogorov-Smirnov, 1 %
    agent = Agent(3, 1, Args())
    agent.load_state_dict(saved["agent"])
    noise = a[400:] - agent.actor(s[400:]).detach()
    assert noise.std().item() == pytest.approx(0.1, rel=0.1) and abs(noise.mean().item()) < 0.02
    wild = PENDULUM | {"learning_starts": 0, "exploration_noise": 9.0}
    actions = load_checkpoint(spied_run(**wild)[0])["online"]["rows"][1]
    assert actions.max() == 1 and actions.min() == -1 and Args().exploration_noise == 0.1

"""dmg_finetune.py: the hand-over, the replay, the limit TD3, resumption and the dataset that it writes."""

import contextlib
import csv
import functools
import io
import itertools
import os
import re
import shlex
import signal
import sys
import tempfile
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import d4rl_arrays, float64_agent, write_hdf5
from gymnasium.wrappers import TimeLimit
from test_resume import same, scalars, start
from test_update import ACTION, STATE, forward, make_batch, plain, q_values
from tqdm import tqdm

import dmg_finetune
import dmg_offline
from dmg_finetune import Agent, Args, Batch, D4RLAntMaze, Explorer, Replay, Stop, load_checkpoint, online_args, resolve

SCRIPT = Path(dmg_finetune.__file__).resolve()
SMALL = {"batch_size": 16, "eval_episodes": 1, "eval_frequency": 100, "cuda": False}
HOPPER = SMALL | {"env_id": "Hopper-v4", "dataset_path": "hopper.hdf5", "offline_steps": 40, "online_steps": 60}
PENDULUM = SMALL | {"env_id": "Pendulum-v1", "from_scratch": True, "learning_starts": 100, "online_steps": 260}
ANTMAZE = PENDULUM | {"env_id": "antmaze-umaze-v2", "learning_starts": 20, "online_steps": 60, "eval_frequency": 50}


@pytest.fixture(scope="module", autouse=True)
def room(tmp_path_factory):
    """All runs of this file share one folder; Gymnasium-Robotics leaves its XML in the temporary folder."""
    folder = tmp_path_factory.mktemp("finetune")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setenv("MINARI_DATASETS_PATH", str(folder / "minari"))
        patched.setattr(tempfile, "tempdir", str(folder))
        write_hdf5(folder / "hopper.hdf5", d4rl_arrays())
        yield folder
    for number, handler in handlers.items():
        signal.signal(number, handler)


def flags(settings):
    """Settings by name as the command line has them."""
    for name, x in settings.items():
        flag = name.replace("_", "-")
        yield from [f"--{'' if x else 'no-'}{flag}"] if isinstance(x, bool) else [f"--{flag}", str(x)]


def cli(*argv, script=dmg_finetune, **settings):
    """main() in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patched.setattr(sys, "argv", ["script.py", *argv, *flags(settings)])
        try:
            code = script.main()
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def run_folder(out):
    return Path(re.search("^run folder: (.+)$", out, re.M).group(1)).resolve()


def run(*argv, **settings):
    """A whole run in this process: its folder."""
    code, out, err = cli(*argv, **settings)
    assert code == 0, err
    return run_folder(out)


def resume(folder, *argv, **settings):
    """Go on with a stopped run: exit code, stdout, stderr.

    TensorBoard reads the files of one second in the order of process numbers: what was logged so far comes first here.
    """
    for file in folder.glob("*tfevents*"):
        file.rename(folder / f"events.out.tfevents.0.{file.name}")
    return cli("--resume", str(folder), *argv, **settings)


def spied_run(**settings):
    """A whole run, and the batch and the arguments in force of each of its gradient steps."""
    seen, original = [], dmg_finetune.update

    def spy(agent, batch, noise, args, update_actor):
        seen.append((batch, args))
        return original(agent, batch, noise, args, update_actor)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dmg_finetune, "update", spy)
        return run(**settings), seen


def online(folder):
    """The online transitions of a run's checkpoint, and its episodes with ends that count from the first of these."""
    rows, episodes = load_checkpoint(str(folder))["online"]
    first = episodes[0][0] - episodes[0][2] if episodes else 0
    return Batch(*rows), [[end - first, *rest] for end, *rest in episodes]


def final(folder, since=0):
    """All of the last checkpoint but its arguments and clock readings, and of the evaluations those from `since` on."""
    checkpoint = load_checkpoint(str(folder))
    kept = {key: checkpoint[key] for key in ("agent", "optimizers", "generator", "step", "online")}
    return kept | {"rows": [row[:-1] for row in checkpoint["evaluations"] if row[0] >= since]}


# ---- schedules ----
@pytest.mark.parametrize(
    "t, lam, nu",
    [
        *((t, 0.25, 0.5) for t in (0, 999)),
        *((t, 0.2525, 0.49505) for t in (1000, 1999)),
        *((100_000, 0.40849, 0.18619), (500_000, 0.49836, 0.00825), (1_000_000, 0.49999, 0.00502)),
    ],
)
def test_lam_and_nu_near_their_ends_as_in_the_official_code(t, lam, nu):
    args = online_args(resolve(Args(env_id="antmaze-large-play-v2")), t)
    assert (args.lam, args.nu, args.gamma) == (pytest.approx(lam, abs=5e-6), pytest.approx(nu, abs=5e-6), 0.995)
    td3 = online_args(resolve(Args(env_id="Hopper-v5", from_scratch=True)), t)
    assert (td3.lam, td3.nu, td3.gamma) == (1, 0, 0.99)


@pytest.mark.parametrize(
    "env_id, expected",
    [
        *((name, 0.995) for name in ("antmaze-large-play-v2", "D4RL/antmaze/large-play-v1", "AntMaze_Large-v5")),
        *((name, 0.98) for name in ("antmaze-medium-play-v2", "AntMaze_UMaze-v5", "hopper-medium-v2", "my/large-v0")),
    ],
)
def test_only_antmaze_large_has_another_discount_online(env_id, expected):
    args = resolve(Args(env_id=env_id, gamma=0.98))
    assert (args.gamma, args.gamma_online) == (0.98, expected)
    assert resolve(Args(env_id=env_id, gamma_online=0.9)).gamma_online == 0.9


def test_actor_learning_rate_falls_offline_and_is_constant_online():
    args, offline = Args(offline_steps=1000), dmg_offline.Args(gradient_steps=1000)
    rates = [dmg_finetune.actor_learning_rate(step, args) for step in range(1, 1001)]
    assert rates == [dmg_offline.actor_learning_rate(step, offline) for step in range(1, 1001)]
    assert rates[1] == 3e-4 and rates[501] == pytest.approx(1.5e-4) and 0 < rates[-1] < 1e-8
    assert {dmg_finetune.actor_learning_rate(step, args) for step in (1001, 1002, 5000, 2_000_000)} == {3e-4}
    assert {dmg_finetune.actor_learning_rate(step, Args(offline_steps=0)) for step in (1, 2, 3, 1000)} == {3e-4}


def test_lam_and_nu_in_force_are_logged():
    folder = run(**HOPPER | {"offline_steps": 0, "online_steps": 2001, "learning_starts": 5000, "eval_frequency": 9999})
    logged = scalars(folder)
    for tag, begin, end in (("dmg/lam", 0.25, 0.5), ("dmg/nu", 0.1, 0.005)):
        after = [end + (begin - end) * 0.99**decays for decays in range(3)]  # the last step's t: 999, 1999, 2000
        assert [step for step, _ in logged[tag]] == [1000, 2000, 2001]
        assert [value for _, value in logged[tag]] == pytest.approx(after)


def test_each_gradient_step_is_given_the_arguments_of_its_time():
    _, seen = spied_run(**HOPPER, gamma_online=0.9, lam=0.3, nu=0.7)
    in_force = [(args.lam, args.nu, args.gamma) for _, args in seen]
    assert in_force == 40 * [(0.3, 0.7, 0.99)] + 60 * [(pytest.approx(0.3), pytest.approx(0.7), 0.9)]


# ---- hand-over ----
def test_a_checkpoint_of_dmg_offline_goes_on_as_if_this_script_had_trained_it():
    common = {name: HOPPER[name] for name in ("env_id", "dataset_path", "batch_size", "cuda")}
    common |= {"eval_frequency": 20, "eval_episodes": 2, "seed": 3, "nu": 0.3}
    offline = run(script=dmg_offline, gradient_steps=50, **common)
    handed_over = run(checkpoint=str(offline), online_steps=50)
    whole = run(offline_steps=50, online_steps=50, **common)
    assert same(final(handed_over), final(whole, since=50))
    last, first = ([*csv.reader((folder / "eval.csv").open())][at][:-1] for folder, at in ((offline, -1), (whole, 3)))
    assert last == first == [*csv.reader((handed_over / "eval.csv").open())][1][:-1] and last[0] == "50"

    checkpoint = load_checkpoint(str(handed_over))
    args, optimizers = checkpoint["args"], checkpoint["optimizers"]
    assert (args.seed, args.nu, args.eval_frequency, args.offline_steps) == (3, 0.3, 20, 50)
    assert [step.item() for step, *_ in optimizers] == [50, 100, 100]  # Adam goes on counting
    rates = dict(scalars(whole)["charts/actor_learning_rate"])
    assert rates[50] == pytest.approx(3e-4 * 0.5 * (1 + np.cos(np.pi * 0.96))) and rates[70] == pytest.approx(3e-4)


# ---- replay and exploration ----
def test_new_rows_stand_behind_the_dataset_in_order():
    def rows(n, first):
        x = first + torch.arange(n, dtype=torch.float32)
        return Batch(x[:, None].expand(-1, 2), -x[:, None], x, x[:, None].expand(-1, 2) + 1, x % 2)

    replay = Replay(rows(4, 0), 3, "cpu")
    for k in range(3):
        assert replay.size == 4 + k
        replay.extend(rows(1, 4 + k))
    assert replay.first == 4 and same(list(replay.rows), list(rows(7, 0)))


def test_dataset_and_online_rows_are_drawn_alike_and_the_dataset_is_never_overwritten(room):
    write_hdf5(room / "short.hdf5", d4rl_arrays(n=60))
    settings = HOPPER | {"dataset_path": "short.hdf5", "online_steps": 120, "learning_starts": 20}
    folder, seen = spied_run(**settings)
    env = dmg_finetune.make_env(Args(env_id="Hopper-v4", dataset_path="x"), None)
    dataset, *_ = dmg_finetune.load_dataset(load_checkpoint(str(folder))["args"], None, env)
    everything = Batch(*(torch.cat(x) for x in zip(dataset, online(folder)[0], strict=True)))
    row_of = {tuple(s.tolist()): i for i, s in enumerate(everything.next_observations)}
    n = len(dataset.rewards)
    assert len(row_of) == n + 120 and len(seen) == 40 + 100  # one gradient step per environment step, none before 20
    drawn = []
    for k, (batch, _) in enumerate(seen):
        index = [row_of[tuple(s.tolist())] for s in batch.next_observations]
        assert same(list(batch), [x[index] for x in everything])
        assert max(index) < (n if k < 40 else n + 20 + k - 40 + 1)
        drawn.append(index)
    assert sum(n + 20 + k in index for k, index in enumerate(drawn[40:])) > 5  # the newest row, of about 12 times
    share = np.mean(np.array(drawn[40:]) >= n)
    assert share == pytest.approx(np.mean([(20 + k) / (n + 20 + k) for k in range(1, 101)]), abs=0.04)
    assert np.bincount(np.ravel(drawn))[:n].min() > 0


@pytest.mark.parametrize("starts", [0, 30])
def test_each_environment_step_after_learning_starts_has_one_gradient_step(starts):
    settings = PENDULUM | {"learning_starts": starts, "online_steps": 50}
    folder, seen = spied_run(**settings)
    rows, episodes = online(folder)
    counts = [step.item() for step, *_ in load_checkpoint(str(folder))["optimizers"]]
    assert counts == [(50 - starts) // 2, 50 - starts, 50 - starts] and len(seen) == 50 - starts
    assert len(rows.rewards) == 50 and not episodes
    assert set(seen[0][0].rewards.tolist()) <= set(rows.rewards[: starts + 1].tolist())


def test_first_actions_are_uniform_and_later_ones_the_actors_with_noise():
    still = PENDULUM | {"learning_rate": 1e-12, "learning_starts": 400, "online_steps": 800, "batch_size": 1}
    folder = run(**still, exploration_noise=0.3)
    rows, _ = online(folder)
    uniform = (rows.actions[:400, 0].sort().values + 1) / 2
    assert (uniform - torch.linspace(0, 1, 400)).abs().max() < 0.08  # Kolmogorov-Smirnov, 1 %
    agent = Agent(3, 1, Args())
    agent.load_state_dict(load_checkpoint(str(folder))["agent"])
    noise = rows.actions[400:] - agent.actor(rows.observations[400:]).detach()
    assert noise.std().item() == pytest.approx(0.3, rel=0.1) and abs(noise.mean().item()) < 0.05
    assert Args().exploration_noise == 0.1

    wild = online(run(**still | {"learning_starts": 0, "online_steps": 40}, exploration_noise=9.0))[0].actions
    assert wild.max() == 1 and wild.min() == -1


# ---- rewards and ends ----
class Line(gym.Env):
    """Observes how often it was reset before and the steps taken, so that `same_again` alone makes it repeat itself."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, reward=lambda k: 2.5 * k, end=99, same_again=True):
        self.reward, self.end, self.resets = reward, end, itertools.repeat(7) if same_again else itertools.count()

    def reset(self, seed=None, options=None):
        self.k, self.origin = 0, next(self.resets)
        return np.array([self.origin, 0.0], np.float32), {}

    def step(self, action):
        self.k += 1
        return np.array([self.origin, self.k], np.float32), self.reward(self.k), self.k == self.end, False, {}


def explore(env, env_id, steps=0, rows=None, episodes=()):
    """An Explorer after `rows` and then some steps with the action 0."""
    (state_dim,), (action_dim,) = env.observation_space.shape, env.action_space.shape
    args = resolve(Args(env_id=env_id, from_scratch=True))
    agent, widths = Agent(state_dim, action_dim, args), (state_dim, action_dim, (), state_dim, ())
    empty = Batch(*(torch.empty(0, *([x] if x else [])) for x in widths))
    explorer = Explorer(env, Replay(empty, 20, "cpu"), agent, args)
    explorer.restore(empty if rows is None else rows, list(episodes))
    for _ in range(steps):
        explorer.step(torch.zeros(action_dim))
    return explorer


def filled(explorer):
    return Batch(*(x[: explorer.replay.size] for x in explorer.replay.rows))


@pytest.mark.parametrize("success", [True, False])
def test_antmaze_success_on_the_last_allowed_step_is_terminal_and_a_timeout_is_not(success):
    env = TimeLimit(Line(lambda k: float(success and k == 4), end=4 if success else 99), 4)
    explorer = explore(env, "antmaze-umaze-v2", steps=6)
    rows = filled(explorer)
    assert rows.rewards.tolist() == [-1, -1, -1, -float(not success), -1, -1]
    assert rows.terminated.tolist() == [0, 0, 0, float(success), 0, 0]
    assert rows.next_observations[:, 1].tolist() == [1, 2, 3, 4, 1, 2]  # 4 is the true last one, not the reset's
    assert rows.observations[:, 1].tolist() == [0, 1, 2, 3, 0, 1]
    assert explorer.episodes == [[4, float(success), 4]]  # the return is the environment's


def test_d4rl_antmaze_ends_on_the_goal_at_the_time_limit():
    env = TimeLimit(D4RLAntMaze("umaze"), 2)
    explorer = explore(env, "antmaze-umaze-v2", steps=1)
    env.unwrapped.goal = env.unwrapped.data.qpos[:2].copy()
    for _ in range(3):
        explorer.step(torch.zeros(8))
    rows = filled(explorer)
    assert rows.rewards.tolist() == [-1, 0, -1, -1] and rows.terminated.tolist() == [0, 1, 0, 0]
    assert explorer.episodes == [[2, 1, 2], [4, 0, 2]]
    assert torch.equal(rows.next_observations[2], rows.observations[3])
    assert not torch.equal(rows.next_observations[1], rows.observations[2])


def test_other_rewards_are_raw_and_states_are_normalised():
    explorer = explore(TimeLimit(Line(end=2), 3), "Hopper-v5")
    explorer.agent.mean += 3
    explorer.agent.std *= 2
    explorer.begin()  # in normalised states from the start
    for _ in range(5):
        explorer.step(torch.zeros(1))
    rows = filled(explorer)
    assert rows.rewards.tolist() == [2.5, 5, 2.5, 5, 2.5] and rows.terminated.tolist() == [0, 1, 0, 1, 0]
    assert rows.observations.tolist() == [[2, (k - 3) / 2] for k in (0, 1, 0, 1, 0)]
    assert rows.next_observations.tolist() == [[2, (k - 3) / 2] for k in (1, 2, 1, 2, 1)]
    assert explorer.episodes == [[2, 7.5, 2], [4, 7.5, 2]]
    assert explorer.recent() == {"charts/episodic_return": 7.5, "charts/episodic_length": 2}


def test_each_episode_has_its_own_seed_far_from_those_of_the_evaluation():
    env = gym.make("Pendulum-v1", max_episode_steps=3)
    rows = filled(explore(env, "Pendulum-v1", steps=7))
    starts = [env.reset(seed=10_000_000 + episode)[0] for episode in range(3)]
    assert same(list(rows.observations[::3]), [torch.tensor(s) for s in starts])


# ---- the limit TD3 ----
def td3_agent(args):
    torch.manual_seed(0)
    agent = float64_agent(dmg_finetune, STATE, ACTION, args)
    for target in (agent.actor_target, agent.critic_target):
        for p in target.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return agent


@pytest.mark.usefixtures("kept_gradients")
def test_from_scratch_the_critic_is_td3s():
    args = resolve(Args(env_id="Hopper-v5", from_scratch=True))
    agent, (batch, noise) = td3_agent(args), make_batch()
    s, a, r, s2, terminated = batch
    a2 = (forward(plain(agent.actor_target), s2).tanh() + (0.2 * noise).clamp(-0.5, 0.5)).clamp(-1, 1)
    y = (r + (1 - terminated) * 0.99 * torch.minimum(*q_values(agent.critic_target, s2, a2))).detach()
    loss = sum(F.mse_loss(q, y) for q in q_values(agent.critic, s, a))
    expected = torch.autograd.grad(loss, list(agent.critic.parameters()))
    metrics = dmg_finetune.update(agent, batch, noise, online_args(args, 12345), update_actor=False)
    assert metrics["critic_loss"].item() == pytest.approx(loss.item(), rel=1e-12)
    for p, g in zip(agent.critic.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("kept_gradients")
def test_from_scratch_the_actors_gradient_is_td3s_over_the_mean_size_of_q():
    args = resolve(Args(env_id="Hopper-v5", from_scratch=True))
    agent, (batch, noise) = td3_agent(args), make_batch()
    with torch.no_grad():
        for p in (*agent.critic.parameters(), *agent.critic_target.parameters()):
            p[1] = p[0]  # TD3's actor takes Q1 alone: with equal twins their minimum is Q1
    weights = [tuple(x.detach().clone().requires_grad_() for x in layer) for layer in plain(agent.actor)]
    dmg_finetune.update(agent, batch, noise, online_args(args, 12345), update_actor=True)
    q1, _ = q_values(agent.critic, batch.observations, forward(weights, batch.observations).tanh())
    expected = torch.autograd.grad(-q1.mean(), [x for layer in weights for x in layer])
    for p, g in zip(agent.actor.parameters(), expected, strict=True):
        assert g.abs().max() > 1e-6
        torch.testing.assert_close(q1.abs().mean().detach() * p.grad.t(), g, rtol=1e-9, atol=1e-12)


# ---- resume ----
RUNS = {
    "hopper": HOPPER | {"online_steps": 120, "learning_starts": 40, "eval_frequency": 20},
    "pendulum": PENDULUM,
    "antmaze": ANTMAZE,
    "odd": PENDULUM | {"online_steps": 75, "learning_starts": 0, "eval_frequency": 25},
}
whole = functools.cache(lambda name: run(**RUNS[name]))


def interrupted(at, how, *argv, moment="update", **settings):
    """cli() whose progress bar calls `how` at step `at`: at its beginning, or between its evaluation and checkpoint."""

    def tell(bar, *args, **kwargs):
        getattr(tqdm, moment)(bar, *args, **kwargs)
        if bar.n == at:
            how()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dmg_finetune, "tqdm", type("Bar", (tqdm,), {moment: tell}))
        return cli(*argv, **settings)


@pytest.mark.parametrize(
    "name, at, how, kept",
    [
        ("hopper", 13, "SIGTERM", 13),  # offline
        ("hopper", 40, "SIGINT", 40),  # the hand-over
        ("hopper", 53, "SIGTERM", 53),  # learning_starts
        ("hopper", 60, "kill -9", 40),  # with a logged evaluation that no checkpoint holds
        ("hopper", 131, "SIGTERM", 131),  # an online episode
        ("hopper", 151, "kill -9", 140),
        ("pendulum", 57, "kill -9", 0),
        ("pendulum", 231, "SIGINT", 231),
        ("antmaze", 17, "SIGTERM", 17),
        ("antmaze", 57, "kill -9", 50),
        ("odd", 24, "SIGTERM", 24),  # the next step logs without an update of the actor of its own
    ],
)
def test_a_stopped_run_resumes_to_the_same_bits(name, at, how, kept):
    hows = {
        "kill -9": sys.exit,
        **{s: lambda s=s: os.kill(os.getpid(), signal.Signals[s]) for s in ("SIGINT", "SIGTERM")},
    }
    moment = "set_postfix" if (at, how) == (60, "kill -9") else "update"
    code, out, _ = interrupted(at, hows[how], moment=moment, **RUNS[name])
    assert code == {"kill -9": None, "SIGINT": 130, "SIGTERM": 143}[how]
    folder = run_folder(out)
    rows, episodes = online(folder)
    assert load_checkpoint(str(folder))["step"] == kept
    assert len(rows.rewards) == max(kept - RUNS[name].get("offline_steps", 0), 0)
    if kept > 100:
        assert len(rows.rewards) > (episodes[-1][0] if episodes else 0)  # in the middle of an episode
    code, out, err = resume(folder)
    assert code == 0, err
    assert "does not repeat itself" not in out
    assert same(final(folder), final(whole(name)))
    assert scalars(folder) == scalars(whole(name))


@pytest.mark.parametrize(
    "settings", [{"offline_steps": 39}, {"offline_steps": 60}, {"online_steps": 59}, {"offline_steps": 100}]
)
def test_the_steps_behind_a_checkpoint_cannot_be_changed(settings):
    folder = whole("hopper")
    before = (folder / "checkpoint.pt").read_bytes()
    code, _, err = resume(folder, **settings)
    assert code == 2 and str(folder) in err and "120" in err
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_more_online_steps_go_on_from_the_end():
    short = run(**PENDULUM | {"online_steps": 120})
    assert resume(short, online_steps=260)[0] == 0
    assert same(final(short)["agent"], final(whole("pendulum"))["agent"])
    assert same(final(short)["online"], final(whole("pendulum"))["online"])


@pytest.mark.parametrize("same_again", [True, False])
def test_an_environment_that_does_not_repeat_itself_loses_its_unfinished_episode_and_says_so(same_again, capsys):
    first = explore(TimeLimit(Line(same_again=same_again), 5), "Hopper-v5", steps=7)
    env = TimeLimit(Line(same_again=same_again), 5)
    second = explore(env, "Hopper-v5", rows=filled(first), episodes=first.episodes)
    said = "does not repeat itself" in capsys.readouterr().out
    for explorer in (first, second):
        for _ in range(3):
            explorer.step(torch.zeros(1))
    if same_again:
        assert not said and same(list(filled(second)), list(filled(first))) and second.episodes == first.episodes
    else:
        assert said and second.episodes == [[5, 37.5, 5], [7, 7.5, 2]]
        assert filled(second).observations[:, 1].tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2]


# ---- --save-dataset ----
SAVED = {
    "my/hopper/replay-v0": PENDULUM | {"env_id": "Hopper-v5", "online_steps": 150},
    "my/pendulum-v0": PENDULUM,
    "my/antmaze/replay-v0": PENDULUM | {"env_id": "AntMaze_UMaze-v5", "online_steps": 30, "eval_frequency": 999},
    "my/finetuned-v3": HOPPER,
}


@functools.cache
def saved(name):
    return run(**SAVED[name], save_dataset=name)


@pytest.mark.parametrize("name", SAVED)
def test_the_saved_set_holds_the_online_transitions(name, room):
    rows, episodes = online(saved(name))
    close = 1e-5 if name == "my/finetuned-v3" else 0  # its states were normalised
    agent, scale, antmaze = load_checkpoint(str(saved(name)))["agent"], 1 + ("pendulum" in name), "antmaze" in name
    dataset = minari.load_dataset(name)
    space, ends = dataset.observation_space, [end for end, *_ in episodes]
    assert not antmaze or isinstance(space, gym.spaces.Dict)
    bounds = list(itertools.pairwise([0, *ends] + [len(rows.rewards)] * (len(rows.rewards) not in ends)))
    assert dataset.total_steps == len(rows.rewards) and len(dataset) == len(bounds)
    for (begin, end), episode in zip(bounds, dataset.iterate_episodes(), strict=True):
        s, a, r, next_s, terminated = (x[begin:end] for x in rows)
        observations = episode.observations if antmaze else {"": episode.observations}
        keys = space if antmaze else [""]
        found = np.concatenate([observations[key] for key in keys], 1)
        raw = torch.cat([s, next_s[-1:]]) * agent["std"] + agent["mean"]
        np.testing.assert_allclose(found, raw, rtol=0, atol=close)
        assert np.array_equal(episode.actions, scale * a) and np.array_equal(episode.rewards, r + antmaze)
        assert np.array_equal(episode.terminations, terminated)
        last = np.arange(end - begin) == end - begin - 1
        assert np.array_equal(episode.truncations, last & (terminated == 0).numpy())
    columns = []
    with h5py.File(room / "minari" / name / "data" / "main_data.hdf5") as file:
        file.visititems(lambda _, x: columns.append(x) if isinstance(x, h5py.Dataset) else None)
        assert {x.compression for x in columns} == {"gzip"}
        assert {x.dtype for x in columns} == {np.dtype(np.float32), np.dtype(bool)}
    assert dataset.recover_environment().spec.id == SAVED[name]["env_id"]


@pytest.mark.parametrize("name", SAVED)
def test_dmg_offline_reads_the_same_rows_from_the_saved_set(name):
    folder = saved(name)
    rows, _ = online(folder)
    args = dmg_offline.Args(env_id=name)
    source = dmg_offline.open_minari(args)
    loaded, mean, std = dmg_offline.load_dataset(args, source, dmg_offline.make_env(args, source))
    agent = load_checkpoint(str(folder))["agent"]
    assert torch.equal(loaded.actions, rows.actions) and torch.equal(loaded.rewards, rows.rewards)
    assert torch.equal(loaded.terminated, rows.terminated)
    for key in ("observations", "next_observations"):
        x, y = getattr(loaded, key) * std + mean, getattr(rows, key) * agent["std"] + agent["mean"]
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_reference_scores_of_the_saved_set_are_d4rls_or_a_random_policys_and_the_last_agents():
    metadata = {name: minari.load_dataset(name).storage.metadata for name in SAVED if saved(name)}
    references = {name: (x.get("ref_min_score"), x.get("ref_max_score")) for name, x in metadata.items()}
    assert references["my/hopper/replay-v0"] == references["my/finetuned-v3"] == (-20.272305, 3234.3)
    assert references["my/antmaze/replay-v0"] == (0, 1)
    env, rng, random = gym.make("Pendulum-v1"), np.random.default_rng(0), 0
    env.reset(seed=1000)
    for _ in range(200):
        random += env.step(2 * rng.uniform(-1, 1, 1))[1]
    last = load_checkpoint(str(saved("my/pendulum-v0")))["evaluations"][-1][1]
    expected = pytest.approx((random, last), rel=1e-4) if last > random else (None, None)
    assert references["my/pendulum-v0"] == expected


@pytest.mark.parametrize(
    "name, env_id, word",
    [
        *((name, "Pendulum-v1", "not a Minari id") for name in ("foo", "a/b-v0", "hopper v0", "../up-v0")),
        ("my/pendulum-v0", "Pendulum-v1", "exists already"),
        ("my/new-v0", "antmaze-umaze-v2", "antmaze-umaze-v2"),
    ],
)
def test_a_set_that_cannot_be_written_is_refused_before_training(name, env_id, word, room):
    assert saved("my/pendulum-v0")
    before = sorted(room.rglob("*"))
    code, out, err = cli(**PENDULUM | {"env_id": env_id}, save_dataset=name)
    assert code == 2 and word in err and "--save-dataset" in err and "run folder" not in out
    assert sorted(room.rglob("*")) == before


@pytest.mark.parametrize("calls", [3, 12])  # 10 columns: while Minari writes, and while they are compressed
def test_a_write_that_fails_leaves_no_half_set_and_resume_writes_it(calls, room):
    name, original, count = f"my/broken-v{calls}", h5py.Group.create_dataset, itertools.count(1)

    def full(*args, **kwargs):
        if next(count) == calls:
            raise OSError("No space left on device")
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(h5py.Group, "create_dataset", full)
        code, out, err = cli(**PENDULUM, save_dataset=name)
    assert code == 2 and "No space left" in err and str(room / "minari" / name) in err
    assert not (room / "minari" / name).exists() and not [*(room / "minari").glob(".*")]
    folder = run_folder(out)
    assert load_checkpoint(str(folder))["step"] == 260
    assert resume(folder)[0] == 0
    assert minari.load_dataset(name).total_steps == 260


@pytest.mark.parametrize("at_start", [True, False])
def test_a_minari_folder_that_cannot_be_written_is_one_sentence(at_start, room, tmp_path):
    path = tmp_path / "minari"
    block = functools.partial(path.write_text, "a file, no folder")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MINARI_DATASETS_PATH", str(path))
        block() if at_start else None
        code, _, err = interrupted(
            5, lambda: (path.rmdir(), block()), **PENDULUM | {"online_steps": 9}, save_dataset="my/x-v0"
        )
    assert code == 2 and str(path) in err


# ---- command line ----
@pytest.mark.parametrize(
    "flag",
    ["lam 0.5", "lam-end 0.7", "nu 1", "nu-end 0.1", "offline-steps 5", "dataset-path hopper.hdf5", "checkpoint X"],
)
def test_from_scratch_takes_no_data_and_no_dmg(flag, room):
    flag = flag.replace("X", str(offline_folder()))
    code, out, err = cli(
        "--from-scratch", "--env-id", "Hopper-v5", *f"--{flag}".split(), online_steps=9, eval_episodes=1
    )
    assert code == 2 and "--from-scratch" in err and f"--{flag.split()[0]}" in err and "run folder" not in out


@functools.cache
def offline_folder():
    kept = {name: HOPPER[name] for name in ("env_id", "dataset_path", "cuda", *SMALL)}
    return run(script=dmg_offline, gradient_steps=10, **kept)


@pytest.mark.parametrize(
    "flag, value",
    [
        ("offline_steps", -1), ("online_steps", -1), ("learning_starts", -1), ("exploration_noise", -0.1),
        ("exploration_noise", float("inf")), ("lam_end", 1.5), ("lam_end", -0.5), ("nu_end", -0.1),
        ("nu_end", float("nan")), ("gamma_online", 1.0), ("gamma_online", -0.1),
    ],
)  # fmt: skip
def test_numbers_outside_their_range_are_refused_by_name(flag, value):
    with pytest.raises(Stop, match=f"--{flag.replace('_', '-')} ") as stop:
        resolve(Args(**{flag: value}))
    assert stop.value.args[1] == 2


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--checkpoint {offline} --offline-steps 7", ["--checkpoint", "offline steps"]),
        ("--checkpoint {finetune}", ["{finetune}", "dmg_finetune.py", "dmg_offline.py"]),
        ("--resume {offline}", ["{offline}", "dmg_offline.py", "dmg_finetune.py"]),
        ("--checkpoint nowhere", ["nowhere", "checkpoint.pt"]),
        ("--checkpoint {offline} --dataset-path other.hdf5", ["other.hdf5", "{offline}"]),
        ("--from-scratch --env-id Hoper-v5", ["Hoper-v5"]),
        ("--from-scratch --env-id CartPole-v1", ["CartPole-v1", "action space"]),
        ("--env-id Hopper-v5", ["Hopper-v5", "--dataset-path"]),
    ],
)
def test_bad_input_is_one_sentence_and_starts_nothing(argv, words, room):
    write_hdf5(room / "other.hdf5", d4rl_arrays(seed=5))
    folders = {"offline": offline_folder(), "finetune": whole("pendulum")}
    before = sorted(room.glob("runs/*"))
    code, _, err = cli(*shlex.split(argv.format(**folders)), online_steps=9, eval_episodes=1)
    assert code == 2 and all(word.format(**folders) in err for word in words), err
    assert sorted(room.glob("runs/*")) == before


def test_from_scratch_takes_a_gymnasium_id_with_a_namespace():
    gym.register("space/Line-v0", lambda: Line(), max_episode_steps=5)
    assert (
        len(online(run(env_id="space/Line-v0", from_scratch=True, online_steps=7, eval_episodes=1, cuda=False))[1]) == 1
    )


# ---- end to end ----
TAGS = {
    *(f"losses/{x}" for x in ("value_loss", "critic_loss", "actor_loss", "q_values", "v_values", "advantage_weight")),
    *("dmg/lam", "dmg/nu", "charts/SPS", "charts/actor_learning_rate"),
    *("charts/episodic_return", "charts/episodic_length"),
    *("eval/episodic_return", "eval/normalized_score", "eval/episodic_length"),
}


@pytest.mark.parametrize("name, number", [("scratch", None), ("pendulum", signal.SIGKILL), ("hopper", signal.SIGINT)])
def test_the_command_trains_and_a_killed_one_goes_on(name, number, room, tmp_path):
    settings = {
        "scratch": PENDULUM | {"env_id": "Hopper-v5", "online_steps": 300},
        "pendulum": PENDULUM | {"online_steps": 600},
        "hopper": HOPPER | {"dataset_path": str(room / "hopper.hdf5"), "offline_steps": 100, "online_steps": 500},
    }[name]
    process = start([sys.executable, str(SCRIPT), *flags(settings)], tmp_path)
    for line in process.stdout if number else ():
        if re.search(r" (1[1-9]\d|[23]\d\d)/600", line):  # the progress bar: past the first checkpoint
            process.send_signal(number)
            break
    output, _ = process.communicate()
    assert process.returncode == {None: 0, signal.SIGKILL: -9, signal.SIGINT: 130}[number], output
    (folder,) = (tmp_path / "runs").iterdir()
    assert not number or resume(folder)[0] == 0
    steps = [int(row["step"]) for row in csv.DictReader((folder / "eval.csv").open())]
    assert steps == [*range(100 if name == "hopper" else 0, 601 if number else 301, 100)]
    assert scalars(folder).keys() == TAGS
    twin = run(**settings)
    assert same(final(folder), final(twin)) and scalars(folder) == scalars(twin)

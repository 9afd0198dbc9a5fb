"""dmg_finetune.py: schedules, the hand-over from offline to online, the replay, the limit TD3, refusals."""

import functools
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import DATA, drawn, eval_rows, load_checkpoint, refusal, run, same, spied
from gymnasium.wrappers import TimeLimit
from test_resume import everything

import dmg_finetune
import dmg_offline
from dmg_finetune import Agent, Args, Replay, checkpoint_args, main, online_schedule

pytestmark = pytest.mark.usefixtures("room")
HOPPER = DATA | {"offline_steps": 40, "online_steps": 60}
PENDULUM = DATA | {"env_id": "Pendulum-v1", "dataset_path": None, "from_scratch": True, "online_steps": 50}
spied_run = functools.partial(spied, dmg_finetune, run)


def test_lam_and_nu_near_their_ends_as_in_the_official_code_and_antmaze_large_has_another_gamma():
    args, limit = Args(env_id="antmaze-umaze-v2"), Args(env_id="Hopper-v5", from_scratch=True)
    numbers = {1: (0.25, 0.5), 999: (0.25, 0.5), 1000: (0.2525, 0.49505), 1999: (0.2525, 0.49505)}
    numbers |= {100_000: (0.40849, 0.18619), 500_000: (0.49836, 0.00825), 1_000_000: (0.49999, 0.00502)}
    for t, (lam, nu) in numbers.items():
        assert online_schedule(t, args) == pytest.approx({"lam": lam, "nu": nu, "gamma": 0.99}, abs=5e-6)
        assert online_schedule(t, limit) == {"lam": 1, "nu": 0, "gamma": 0.99}
    large = "antmaze-large-play-v2", "antmaze-large-diverse-v2", "D4RL/antmaze/large-diverse-v1"
    for name in (*large, "antmaze-medium-play-v2", "antmaze-umaze-v2", "hopper-medium-v2", "my/large-v0"):
        args = Args(env_id=name, gamma=0.98)
        assert (args.gamma, args.gamma_online) == (0.98, 0.995 if name in large else 0.98)


def test_each_update_is_given_the_numbers_of_its_time_and_update_1000_is_decayed():
    settings = {"offline_steps": 41, "online_steps": 1001, "lam": 0, "nu": 1, "gamma_online": 0.9}
    _, numbers, rates = zip(*spied_run(**DATA | settings, learn=False)[1], strict=True)
    decayed = 0.5 - 0.5 * 0.99, 0.005 + 0.995 * 0.99, 0.9  # of integers too
    np.testing.assert_allclose(numbers, 41 * [(0, 1, 0.99)] + 999 * [(0, 1, 0.9)] + 2 * [decayed], rtol=1e-6)
    offline = dmg_offline.Args(gradient_steps=41)
    actors = [dmg_offline.actor_learning_rate(k, offline) for k in range(1, 42)] + 1001 * [3e-4]
    np.testing.assert_allclose(rates, [(x, 3e-4, 3e-4) for x in actors], rtol=1e-6)


FEW = DATA | {"eval_frequency": 20, "eval_episodes": 2, "seed": 3, "nu": 0.3, "lam": 0.15}
offline_folder = functools.cache(lambda: str(run(dmg_offline, gradient_steps=51, **FEW)))


def test_the_offline_part_has_dmg_offlines_bits_and_its_checkpoint_continues_as_if_trained_here():
    saved, rows = load_checkpoint(offline_folder()), eval_rows(offline_folder())
    own = load_checkpoint(folder := run(offline_steps=51, online_steps=0, **FEW))
    assert own.pop("online")["episodes"] == 0 and same(own, saved)
    assert eval_rows(folder) == rows and [*rows] == [0, 20, 40, 51]
    whole = run(offline_steps=51, online_steps=50, **FEW)
    copy = shutil.copytree(offline_folder(), "copy")
    folder = run(dmg_finetune, "--checkpoint", copy, "--online-steps", 50)
    saved = load_checkpoint(folder)
    assert same(saved, load_checkpoint(whole)) and eval_rows(folder)[51] == rows[51]
    assert eval_rows(folder) == {step: row for step, row in eval_rows(whole).items() if step > 50}
    assert [state[0]["step"] for state in saved["optimizers"]] == [50, 101, 101]  # Adam continues to count
    # and so does the checkpoint of this very run, without a step of its learning
    steps = "--offline-steps", 105, "--online-steps", 30
    again = run(dmg_finetune, "--checkpoint", folder, *steps, "--learning-rate", 0)
    ended, row = load_checkpoint(again), eval_rows(folder)[101]
    assert (ended["step"], len(ended["online"]["rows"][0]), eval_rows(again)[101]) == (135, 30, row)
    assert all("_target" in name or same(x, ended["agent"][name]) for name, x in saved["agent"].items())
    other = run(dmg_finetune, "--checkpoint", folder, *steps, "--seed", 4)
    assert not torch.equal(load_checkpoint(other)["random"], ended["random"])
    shutil.rmtree(copy)  # the arguments are readable without it
    args = dmg_finetune.read_args(folder)
    assert args.exp_name == "dmg_finetune" and (args.seed, args.nu, args.offline_steps) == (3, 0.3, 51)


class Line(gym.Env):
    """Observes the number of the episode, from its seed, and the number of steps taken."""

    observation_space, action_space = gym.spaces.Box(-np.inf, np.inf, (2,)), gym.spaces.Box(-1, 1, (1,))

    def __init__(self, reward=lambda k: 2.5 * k, end=99, flag=bool):
        self.reward, self.end, self.flag, self.seeds = reward, end, flag, []

    def reset(self, seed=None, options=None):
        self.seeds.append(seed)
        self.k, self.origin = 0, seed % 10_000_000
        return np.array([self.origin, 0.0], np.float32), {}

    def step(self, action):
        self.k += 1
        observed = np.array([self.origin, self.k], np.float32)
        return observed, self.reward(self.k), self.flag(self.k == self.end), self.flag(False), {"episode": 1}


def replay_of(env, env_id="Hopper-v5", steps=0, rows=0, scale=1, seed=0):
    """A replay with `rows` rows of -7 as its dataset and, behind them, some steps: its columns there, too."""
    args = Args(env_id=env_id, online_steps=20, from_scratch=True, learning_starts=0, seed=seed)
    agent, widths = Agent(2, 1, args), ((2,), (1,), (), (2,), ())
    agent.std.fill_(scale)
    replay = Replay([torch.full((rows, *width), -7.0) for width in widths], env, agent, args)
    for _ in range(steps):
        replay.step(np.full(1, 0.5, np.float32))
    return replay, [x[rows : replay.size].tolist() for x in replay.rows]


def test_new_rows_stand_behind_the_dataset_in_order_with_normalized_states():
    env = Line(end=2)
    replay, (s, a, r, next_s, terminated) = replay_of(TimeLimit(env, 3), steps=5, rows=4, scale=2, seed=2)
    assert (replay.first, replay.size) == (4, 9) and all((x[:4] == -7).all() for x in replay.rows)
    assert s == [[0, 0], [0, 0.5], [0.5, 0], [0.5, 0.5], [1, 0]]
    assert next_s == [[0, 0.5], [0, 1], [0.5, 0.5], [0.5, 1], [1, 0.5]]
    assert (r, a, terminated) == ([2.5, 5, 2.5, 5, 2.5], 5 * [[0.5]], [0, 1, 0, 1, 0])
    assert (replay.episodes, replay.returns[-1]) == (2, 7.5)
    assert env.seeds == [30_000_000, 30_000_001, 30_000_002]  # far from evaluation's
    saved, (restored, _) = replay_of(Line(end=2), steps=4)[0].state(), replay_of(Line(end=2))
    restored.restore(saved)
    assert (restored.size, restored.episodes) == (4, 3)


@pytest.mark.parametrize("success", [True, False])
def test_antmaze_success_on_the_last_allowed_step_is_terminal_and_a_timeout_is_not(success):
    env = TimeLimit(Line(lambda k: float(success and k == 4), end=4 if success else 99), 4)
    replay, (_, _, r, next_s, terminated) = replay_of(env, "antmaze-umaze-v2", steps=6)
    assert r == [-1, -1, -1, -float(not success), -1, -1]
    assert terminated == [0, 0, 0, float(success), 0, 0]
    assert [k for _, k in next_s] == [1, 2, 3, 4, 1, 2]  # 4 is the true last one, not the reset's
    assert (replay.episodes, replay.returns[-1]) == (1, float(success))  # the return is the environment's


def test_dataset_and_online_rows_are_drawn_alike():
    few = {"env_id": "Walker2d-v4", "dataset_path": "walker.hdf5", "online_steps": 120, "learning_starts": 20}
    folder, seen = spied_run(**HOPPER | few)
    n, columns, indices = drawn(dmg_finetune, folder, seen)
    assert len(columns[0]) == n + 120 and len(seen) == 40 + 100  # one update a step, none in the first 20
    for k, (index, (batch, *_)) in enumerate(zip(indices, seen, strict=True)):
        assert same(batch, [x[index] for x in columns])
        assert max(index) < (n if k < 40 else n + 20 + k - 40 + 1)
    assert sum(n + 20 + k in index for k, index in enumerate(indices[40:])) > 5  # the newest row, of about 12
    expected = np.mean([(20 + k) / (n + 20 + k) for k in range(1, 101)])
    assert np.mean(np.array(indices[40:]) >= n) == pytest.approx(expected, abs=0.04)
    assert np.bincount(np.ravel(indices))[:n].min() > 0


def test_first_actions_are_uniform_and_later_ones_the_actors_with_noise():
    settings = PENDULUM | {"learning_starts": 400, "online_steps": 800, "eval_frequency": 1000}
    saved = load_checkpoint(spied_run(**settings, learn=False)[0])
    s, a, *_ = saved["online"]["rows"]
    uniform = (a[:400, 0].sort().values + 1) / 2
    assert (uniform - torch.linspace(0, 1, 400)).abs().max() < 0.08  # Kolmogorov-Smirnov, 1 %
    (agent := Agent(3, 1, Args())).load_state_dict(saved["agent"])
    noise = a[400:] - agent.actor(s[400:]).detach()
    assert noise.std().item() == pytest.approx(0.1, rel=0.1) and abs(noise.mean().item()) < 0.02


@pytest.mark.filterwarnings("ignore:.*(WARN|reward|terminated|truncated)")  # Gymnasium's own opinion
@pytest.mark.parametrize("reward", [np.float32, int, lambda k: np.array(k)])
def test_from_scratch_an_own_environment_in_a_module_may_use_numpys_types(reward, room, monkeypatch):
    """From scratch: no data, lam 1, nu 0, and training after learning_starts."""
    args = Args(env_id="Hopper-v5", from_scratch=True)
    limit = args.offline_steps, args.lam, args.lam_end, args.nu, args.nu_end, args.learning_starts
    assert limit == (0, 1, 1, 0, 0, 25_000) and Args().learning_starts == 0
    (room / "own_env.py").write_text("import gymnasium\ngymnasium.register('Own-v0', 'test_finetune:Line')")
    monkeypatch.syspath_prepend(str(room))
    monkeypatch.setattr(Line.__init__, "__defaults__", (reward, 4, np.bool_))
    steps = {"learning_starts": 5, "online_steps": 10, "exploration_noise": 99.0}
    folder = run(**PENDULUM | steps | {"env_id": "own_env:Own-v0"})
    saved, expected = load_checkpoint(folder), [float(reward(k % 4 + 1)) for k in range(10)]
    s, a, r, _, terminated = saved["online"]["rows"]
    assert a[:5].abs().max() < 1 == a[5:].abs().max()  # the noise is clipped
    assert r.tolist() == expected and terminated.tolist() == [float(k % 4 == 3) for k in range(10)]
    assert s[:, 1].tolist() == [k % 4 for k in range(10)] and saved["online"]["episodes"] == 2  # raw
    assert [state[0]["step"] for state in saved["optimizers"]] == [3, 5, 5] and "own_env-Own" in folder.name
    mean_return, _, _, length = map(float, eval_rows(folder)[10])
    assert (mean_return, length, *eval_rows(folder)) == (sum(expected[:4]), 4, 0, 10)


def test_the_log_has_the_coefficients_in_force_and_the_last_online_return():
    settings = {"lam_end": 1.0, "nu_end": 0.0, "eval_frequency": 340, "learning_starts": 990}
    folder = run(**DATA | settings | {"offline_steps": 20, "online_steps": 1000})
    saved, _, logs = everything(folder)
    lam, nu, returns = (dict(logs[name]) for name in ("dmg/lam", "dmg/nu", "charts/episodic_return"))
    assert (lam[20], nu[1000]) == pytest.approx((0.25, 0.1))
    assert (lam[1020], nu[1020]) == pytest.approx((1 - 0.75 * 0.99, 0.1 * 0.99))
    _, _, r, _, terminated = saved["online"]["rows"]
    *_, before, last = np.flatnonzero(terminated[:320])  # Hopper falls
    assert [*returns] == [340, 680, 1000, 1020]
    assert returns[340] == pytest.approx(r[before + 1 : last + 1].sum().item(), rel=1e-4)


def test_the_limit_of_divergence_is_that_of_the_gamma_in_force():
    fast = {"learning_rate": 0.01, "target_update_rate": 1.0, "policy_frequency": 1, "offline_steps": 100}
    data = DATA | {"dataset_path": "thousands.hdf5", "gamma": 0.999, "gamma_online": 0.0, "online_steps": 0}
    assert eval_rows(run(**data | fast)).keys() == {0, 100}  # Q is 50,000, of a million


def test_what_cannot_work_is_refused_before_anything_is_written():
    for contradiction in ({"checkpoint": "runs/a"}, {"dataset_path": "hopper.hdf5"}):
        assert "from_scratch" in refusal(lambda x=contradiction: Args(**PENDULUM | x))
    for settings, late in ((PENDULUM, 50), (HOPPER, 60), (HOPPER, 61)):
        assert "learning_starts" in refusal(lambda x=settings | {"learning_starts": late}: Args(**x))
        Args(**settings | {"learning_starts": late - 2, "online_steps": late - 1})
    assert "gamma must" in refusal(lambda: Args(gamma=1.1, gamma_online=0.9))
    assert "is no run with a checkpoint" in refusal(lambda: Args(checkpoint="nowhere"))
    folder, words = offline_folder(), {"offline_steps": "done 51 steps", "resume": "give it as checkpoint"}
    for new in ({"offline_steps": 50}, {"resume": folder}):
        vars(args := checkpoint_args(folder)).update(new)
        assert folder in (said := refusal(main, args)) and words[min(new)] in said
    assert "or online" in refusal(dmg_offline.main, dmg_offline.Args(**FEW, resume=str(run(**HOPPER))))

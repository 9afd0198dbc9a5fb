"""benchmark/overestimation.py: a critic that is known, beside the return that another loop of ours finds."""

import sys

import gymnasium as gym
import numpy as np
import overestimation
import pytest
import torch
from conftest import d4rl_arrays, write_hdf5

import dmg_finetune
import dmg_offline
import iql
import td3bc

FAST = ["--eval-episodes", "1", "--batch-size", "8", "--no-cuda"]


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """trained(script, *flags): a run folder, unless not `constant` with twin critics that say 5 and 7 everywhere."""

    def go(script, *flags, constant=True):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags, *FAST])
        assert script.main() == 0
        (folder,) = (tmp_path / "runs").glob(f"*__{script.__name__}__*")
        checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
        if constant and script is not iql:
            last = [name for name in checkpoint["agent"] if name.startswith("critic.net")][-2:]
            for name, x in zip(last, (0.0, torch.tensor([5.0, 7.0]).reshape(2, 1, 1)), strict=True):
                checkpoint["agent"][name].copy_(torch.as_tensor(x))
            torch.save(checkpoint, folder / "checkpoint.pt")
        return folder

    return go


def by_hand(script, folder, env, episodes):
    """Mean over all states of what is earned after them at gamma 0.9, no episode cut off; mean undiscounted return."""
    agent = script.Agent(*env.observation_space.shape, *env.action_space.shape, script.Args())
    agent.load_state_dict(torch.load(folder / "checkpoint.pt", weights_only=True)["agent"])
    found, returns = [], []
    for seed in range(5_000_000, 5_000_000 + episodes):
        observation, _ = env.reset(seed=seed)
        rewards, terminated = [], False
        while not terminated:
            with torch.no_grad():
                action = agent.actor((torch.from_numpy(observation).float() - agent.mean)[None] / agent.std)
            observation, reward, terminated, *_ = env.step(action[0].numpy())
            rewards.append(reward)
        found += [sum(0.9**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))]
        returns.append(sum(rewards))
    return found, returns


@pytest.mark.parametrize("script", [dmg_offline, td3bc])
def test_q_and_the_return_that_follows_it(trained, script, hopper_file):
    flags = ["--env-id", "Hopper-v4", "--dataset-path", hopper_file, "--gradient-steps", "20", "--gamma", "0.9"]
    folder = trained(script, *flags, *(["--in-sample", "sql"] if script is dmg_offline else []))
    found, returns = by_hand(script, folder, gym.make("Hopper-v4"), 3)
    row = overestimation.measure(str(folder), 3)
    assert row["Q"] == "5.0" and row["steps"] == "20" and row["states"] == str(len(found)) and row["run"] == folder.name
    assert float(row["discounted return"]) == pytest.approx(np.mean(found), abs=0.06)
    assert float(row["Q - return"]) == pytest.approx(5 - np.mean(found), abs=0.06)
    low, high = dmg_offline.REFERENCES["hopper"]
    assert float(row["score"]) == pytest.approx(100 * (np.mean(returns) - low) / (high - low), abs=0.06)
    found = row["in-sample maximum"], row["lam"], row["nu"]
    assert found == (("sql", "0.25", "0.1") if script is dmg_offline else ("", "", ""))


def test_td3_from_scratch_has_no_dataset(trained):
    flags = ["--env-id", "Hopper-v5", "--from-scratch", "--online-steps", "40", "--learning-starts", "20"]
    folder = trained(dmg_finetune, *flags, "--gamma", "0.9")
    found, _ = by_hand(dmg_finetune, folder, gym.make("Hopper-v5"), 2)
    row = overestimation.measure(str(folder), 2)
    assert float(row["discounted return"]) == pytest.approx(np.mean(found), abs=0.06)


def test_a_cut_off_antmaze_counts_where_the_rest_does_not_matter_and_costs_one_a_step(trained, tmp_path):
    arrays = d4rl_arrays(60, 29, 8)
    file = write_hdf5(tmp_path / "maze.hdf5", arrays | {"rewards": arrays["terminals"].astype(np.float32)})
    flags = ["--env-id", "antmaze-umaze-v2", "--dataset-path", file, "--gradient-steps", "2", "--eval-frequency", "2"]
    folder = trained(dmg_offline, *flags, constant=False)
    row = overestimation.measure(str(folder), 1)
    left = 700 - np.arange(700 - 459)  # 0.99**459 is the first power under 0.01
    assert row["states"] == "241" and row["score"] == "0.0"
    assert float(row["discounted return"]) == pytest.approx(np.mean(-(1 - 0.99**left) / 0.01), abs=0.06)

    args = dmg_offline.load_checkpoint(str(folder))["args"]
    agent, env, q = dmg_offline.Agent(29, 8, args), dmg_offline.make_env(args, None), []
    agent.load_state_dict(torch.load(folder / "checkpoint.pt", weights_only=True)["agent"])
    agent.critic.net[-1].weight.data *= 1000  # else all the same to one digit
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save(checkpoint | {"agent": agent.state_dict()}, folder / "checkpoint.pt")
    observation, _ = env.reset(seed=5_000_000)
    for _ in range(700):
        s = torch.from_numpy(observation).float()[None]
        with torch.no_grad():
            q.append(agent.critic(s, agent.actor(s)).amin().item())
            observation, *_ = env.step(agent.actor(s)[0].numpy())
    assert float(overestimation.measure(str(folder), 1)["Q"]) == pytest.approx(np.mean(q[:241]), abs=0.06)
    assert abs(np.mean(q[:241]) - np.mean(q)) > 0.2


def test_discounted_returns_by_hand():
    rewards = np.array([1.0, 2.0, 4.0] + [0.0] * 6)
    whole = overestimation.discounted(rewards, 0.5, terminated=True)
    assert whole.tolist() == [3.0, 4.0, 4.0] + [0.0] * 6
    assert overestimation.discounted(rewards, 0.5, terminated=False).tolist() == [3.0, 4.0]  # 0.5**7 is under 0.01
    assert overestimation.discounted(rewards, 0.0, terminated=False).tolist() == rewards[:-1].tolist()
    assert len(overestimation.discounted(rewards[:7], 0.5, terminated=False)) == 0


def test_bad_input_is_one_sentence_and_exit_code_2(trained, hopper_file, monkeypatch, capsys):
    flags = ["--env-id", "Hopper-v4", "--dataset-path", hopper_file, "--gradient-steps", "2"]
    scaled, damaged = trained(iql, *flags), trained(td3bc, *flags)
    (damaged / "checkpoint.pt").write_bytes(b"1")
    for argv, words in (
        ([], "Give run folders"),
        ([str(damaged), "--episodes", "0"], "--episodes"),
        ([str(scaled)], "iql.py's Q is of rewards scaled"),
        (["nowhere"], "nowhere is no run folder"),
        ([str(damaged)], "cannot load"),
    ):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["overestimation.py", *argv])
        assert overestimation.main() == 2
        out, err = capsys.readouterr()
        assert words in err and err.count("\n") == 1 and not out


def test_the_table_has_a_line_for_each_run(trained, hopper_file, monkeypatch, capsys):
    flags = ["--env-id", "Hopper-v4", "--dataset-path", hopper_file, "--gradient-steps", "2"]
    folder = str(trained(td3bc, *flags))
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["overestimation.py", folder, folder, "--episodes", "1"])
    assert overestimation.main() == 0
    head, rule, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1]
    assert {line.count("|") for line in (head, rule, *lines)} == {13}

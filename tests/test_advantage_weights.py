"""benchmark/advantage_weights.py: its table again, transition by transition."""

import math
import sys

import advantage_weights
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import d4rl_arrays, write_hdf5

import dmg_offline
import iql
import td3bc

HOPPER = ("--env-id", "Hopper-v4", "--dataset-path")


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """trained(script, *flags): a run folder of a few steps whose networks' last layers are larger than theirs."""

    def go(script, *flags):
        monkeypatch.chdir(tmp_path)
        short = ["--gradient-steps", "4", "--eval-episodes", "1", "--batch-size", "8", "--no-cuda"]
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags, *short])
        assert script.main() == 0
        folder = max((tmp_path / "runs").glob(f"*__{script.__name__}__*"))
        checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
        for name, x in checkpoint["agent"].items():
            if name.startswith("critic_target.net.4.weight"):
                x *= 10  # else all advantages are alike
        torch.save(checkpoint, folder / "checkpoint.pt")
        return folder

    return go


def by_hand(script, folder, arrays, timeouts_alone=False):
    """Return of its episode, advantage and argument of the weight for each transition, in Python's loops."""
    checkpoint = script.load_checkpoint(str(folder))
    agent = script.Agent(arrays["observations"].shape[1], arrays["actions"].shape[1], checkpoint["args"])
    agent.load_state_dict(checkpoint["agent"])
    returns, advantages, episode, n = [], [], [], len(arrays["rewards"])
    for i in range(n):
        episode.append(i)
        if arrays["timeouts"][i] or (arrays["terminals"][i] and not timeouts_alone) or i == n - 1:
            total = sum(float(arrays["rewards"][k]) for k in episode)
            for k in episode:
                if arrays["timeouts"][k] or k == n - 1:  # no next observation
                    continue
                s = (torch.from_numpy(arrays["observations"][k]) - agent.mean)[None] / agent.std
                with torch.no_grad():
                    q = agent.critic_target(s, torch.from_numpy(arrays["actions"][k])[None]).min()
                    advantages.append((q - agent.value(s)).item())
                returns.append(total)
            episode = []
    return np.array(returns), np.array(advantages), checkpoint["args"]


def distance_by_hand(script, folder, data, env):
    """Of the action that the script's own evaluation takes, row by row of d4rl.qlearning_dataset."""
    agent = script.Agent(*env.observation_space.shape, *env.action_space.shape, script.load_checkpoint(folder)["args"])
    agent.load_state_dict(script.load_checkpoint(folder)["agent"])
    squares = []
    for i in np.flatnonzero(~data["timeouts"][:-1]):
        s = (torch.from_numpy(data["observations"][i]) - agent.mean) / agent.std
        with torch.no_grad():
            action = agent.actor.mean(s[None])[0] if script is iql else agent.actor(s[None])[0]
        squares.append(np.mean((action.numpy() - data["actions"][i]) ** 2))
    return np.mean(squares)


@pytest.mark.parametrize("script", [dmg_offline, iql, td3bc])
def test_distance_by_hand(trained, tmp_path, script):
    arrays = d4rl_arrays()
    folder = trained(script, *HOPPER, write_hdf5(tmp_path / "data.hdf5", arrays))
    row = advantage_weights.measure(str(folder))
    expected = distance_by_hand(script, str(folder), arrays, gym.make("Hopper-v4"))
    assert float(row["distance"]) == pytest.approx(expected, abs=6e-5) and expected > 0.01
    assert (row["mean weight"] == "") == (script is td3bc)


@pytest.mark.parametrize("script, flags", [(dmg_offline, []), (iql, []), (iql, ["--in-sample", "sql"])])
def test_each_column_by_hand(trained, tmp_path, script, flags):
    arrays = d4rl_arrays()
    folder = trained(script, *HOPPER, write_hdf5(tmp_path / "data.hdf5", arrays), *flags, "--max-weight", "1.1")
    returns, advantages, args = by_hand(script, folder, arrays)
    weights = [min(math.exp(args.inverse_temperature * a), 1.1) for a in advantages]
    if flags:
        weights = [min(max(a, 0.0), 1.1) for a in advantages]
    best = sorted(range(len(returns)), key=lambda i: -returns[i])[: math.ceil(len(returns) / 10)]
    found = {name: x for name, x in advantage_weights.measure(str(folder)).items() if name[0] not in "rd"}
    expected = {
        "script": script.__name__,
        "steps": "4",
        "std of the advantage": np.std(advantages, ddof=1),
        "mean weight": np.mean(weights),
        "at the clip (%)": 100 * np.mean([w == 1.1 for w in weights]),
        "effective share of the data (%)": 100 * sum(weights) ** 2 / sum(w * w for w in weights) / len(weights),
        "weight on the best tenth (%)": 100 * sum(weights[i] for i in best) / sum(weights),
    }
    assert list(found) == list(expected)
    for name, x in expected.items():
        assert found[name] == x if isinstance(x, str) else float(found[name]) == pytest.approx(x, abs=0.051), name
    assert expected["std of the advantage"] > 0.1 and 5 < expected["at the clip (%)"] < 95


def test_the_return_of_each_transitions_episode():
    rewards, ends = np.array([1.0, 2.0, 4.0, 8.0, 16.0]), np.array([False, True, True, False, False])
    assert advantage_weights.episode_returns(rewards, ends).tolist() == [3, 3, 4, 24, 24]


def test_an_antmaze_episode_goes_on_at_the_goal(trained, tmp_path):
    arrays = d4rl_arrays(300, 29, 8)
    arrays["rewards"] = arrays["terminals"].astype(np.float32)
    file = write_hdf5(tmp_path / "maze.hdf5", arrays)
    folder = trained(dmg_offline, "--env-id", "antmaze-umaze-v2", "--dataset-path", file, "--eval-frequency", "4")
    returns, advantages, args = by_hand(dmg_offline, folder, arrays, timeouts_alone=True)
    weights = np.exp(np.minimum(args.inverse_temperature * advantages, math.log(args.max_weight)))
    best = np.argsort(-returns, kind="stable")[: math.ceil(len(returns) / 10)]
    share = 100 * weights[best].sum() / weights.sum()
    found = float(advantage_weights.measure(str(folder))["weight on the best tenth (%)"])
    assert found == pytest.approx(share, abs=0.051) and set(returns) >= {0.0, 1.0, 2.0}


def test_the_table_has_a_line_for_each_run(trained, hopper_file, monkeypatch, capsys):
    folder = str(trained(iql, *HOPPER, hopper_file))
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["advantage_weights.py", folder, folder])
    assert advantage_weights.main() == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 4 and lines[2] == lines[3] and {line.count("|") for line in lines} == {11}


def test_bad_input_is_one_sentence_and_exit_code_2(trained, hopper_file, monkeypatch, capsys):
    damaged = trained(iql, *HOPPER, hopper_file)
    (damaged / "checkpoint.pt").write_bytes(b"1")
    for argv, words in (
        ([], "Give run folders"),
        (["Hopper-v4__dmg_finetune__0__1"], "is no run folder of dmg_offline, iql, td3bc"),
        ([str(damaged)], "cannot load"),
    ):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["advantage_weights.py", *argv])
        assert advantage_weights.main() == 2
        out, err = capsys.readouterr()
        assert words in err and err.count("\n") == 1 and not out

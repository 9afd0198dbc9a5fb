"""The set in datasets/: what its README says of it, and that every script runs on it without an argument."""

import importlib
from pathlib import Path

import pytest

import dmg_offline
from dmg_offline import Args, load_dataset, make_env, normalized_score

ROOT = Path(dmg_offline.__file__).resolve().parent


@pytest.fixture(autouse=True)
def empty_minari_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)


def test_its_readme_says_what_it_holds_and_no_warning_is_shown(recwarn):
    args = Args()
    env, (batch, *_) = make_env(args), load_dataset(args)
    assert len(batch.rewards) == 100_000
    assert env.spec.id == "HalfCheetah-v5" and env.spec.max_episode_steps == 1000
    assert [normalized_score(args, x) for x in (-280.178953, 12135.0)] == [0, 100]
    mean = 1000 * batch.rewards.mean()  # of 100 whole episodes
    text = (ROOT / "datasets" / "README.md").read_text()
    assert f"{mean:,.0f}" in text and Args().env_id in text and not recwarn.list


@pytest.mark.parametrize("name", ["dmg_offline", "td3bc", "iql", "dmg_finetune"])
def test_every_script_runs_on_it_without_naming_it(name, capsys):
    script = importlib.import_module(name)
    steps = {"offline_steps": 3, "online_steps": 3} if name == "dmg_finetune" else {"gradient_steps": 3}
    script.main(script.Args(**steps, eval_episodes=1, batch_size=8, cuda=False))
    out = capsys.readouterr().out
    assert "100,000 transitions" in out and f"step {sum(steps.values())}: return" in out and "score" in out

"""The bundled dataset: what its README says of it, and that every script trains on it."""

import importlib
from pathlib import Path

import pytest
from conftest import run

from dmg_offline import Args, load_dataset, make_env, normalized_score

FOLDER, ENV_ID = Path(__file__).resolve().parent.parent / "datasets", "dmg/halfcheetah/medium-replay-v0"


@pytest.fixture(autouse=True)
def as_in_the_readmes_first_command(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(FOLDER))
    monkeypatch.chdir(tmp_path)


def test_its_readme_says_what_it_contains_and_no_warning_is_shown(recwarn, capsys):
    spec, (_, _, r, _, _) = make_env(args := Args(ENV_ID)).spec, load_dataset(args)
    assert len(r) == 100_000 and (spec.id, spec.max_episode_steps) == ("HalfCheetah-v5", 1000)
    assert [normalized_score(args, x) for x in (-280.178953, 12135.0)] == [0, 100]
    assert f"{1000 * r.mean():,.0f}" in (FOLDER / "README.md").read_text()  # of 100 whole episodes
    assert not recwarn.list and "Warning" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["dmg_offline", "td3bc", "iql", "dmg_finetune"])
def test_every_script_trains_on_it(name, capsys):
    steps = {"offline_steps": 3, "online_steps": 3} if name == "dmg_finetune" else {"gradient_steps": 3}
    run(importlib.import_module(name), env_id=ENV_ID, **steps, eval_episodes=1, batch_size=8, cuda=False)
    out = capsys.readouterr().out
    assert "100,000 transitions" in out and f"step {sum(steps.values())}: return" in out and ", score" in out
    assert f"runs/dmg-halfcheetah-medium-replay-v0__{name}__0__" in out

"""The README: its links lead somewhere, its limits hold, its Python example runs."""

import re
from pathlib import Path

import pytest
from conftest import run

import dmg_offline

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", ["", "benchmark/", "benchmark/results/", "datasets/"])
def test_every_link_leads_to_a_file_and_every_anchor_to_a_heading(page):
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page / "README.md").read_text())
    assert links
    for link in (link for link in links if not link.startswith("http")):
        path, _, anchor = link.partition("#")
        target = ROOT / page / (path or "README.md")
        assert target.exists(), link
        if anchor and not re.fullmatch(r"L\d+", anchor):
            titles = re.findall(r"^#+ (.+)$", target.read_text().lower(), re.M)
            assert anchor in [re.sub(r"[^\w\- ]", "", x).replace(" ", "-") for x in titles], link  # GitHub's


def test_equations_are_linked_to_their_lines():
    lines = (ROOT / "dmg_offline.py").read_text().splitlines()
    links = re.findall(r"\[Eq\. (\d+)\]\(dmg_offline\.py#L(\d+)\)", README)
    assert [equation for equation, _ in links] == ["15", "16", "14"]
    for equation, line in links:
        assert f"(Eq. {equation})" in lines[int(line) - 1]


def test_the_readme_is_short_and_wrapped():
    lines = README.splitlines()
    assert len(lines) <= 240 and len(README.split()) <= 2300
    assert max(len(line) for line in lines if not line.startswith("|")) <= 120


def test_the_python_example_scores_a_trained_agent(hopper_file, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.+?)```", README, re.S)
    monkeypatch.chdir(tmp_path)
    sizes = {"batch_size": 8, "gradient_steps": 10, "eval_episodes": 1, "cuda": False}
    folder = run(dmg_offline, env_id="hopper-medium-v2", dataset_path=hopper_file, **sizes)
    capsys.readouterr()
    assert "runs/<run>" in code and "range(10)" in code
    exec(code.replace("runs/<run>", str(folder)).replace("range(10)", "range(2)"), {})
    mean_return, score = map(float, capsys.readouterr().out.split())
    assert score == pytest.approx(100 * (mean_return + 20.272305) / (3234.3 + 20.272305))

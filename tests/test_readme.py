"""The README: its links lead somewhere, its limits hold, its Python example runs."""

import re
import shutil
import sys
from pathlib import Path

import pytest

import dmg_offline

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "benchmark/README.md", "benchmark/results/README.md", "datasets/README.md"]


def anchors(text):
    """GitHub's anchors of the headings in a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_every_anchor_to_a_heading(page):
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    for link in (link for link in links if not link.startswith("http")):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page} links to {link}"
        if anchor and not re.fullmatch(r"L\d+", anchor):
            assert anchor in anchors(target.read_text()), f"{page} links to {link}"


def test_equations_are_linked_to_their_lines():
    lines = (ROOT / "dmg_offline.py").read_text().splitlines()
    links = re.findall(r"\[Eq\. (\d+)\]\(dmg_offline\.py#L(\d+)\)", README)
    assert [equation for equation, _ in links] == ["15", "16", "14"]
    for equation, line in links:
        assert f"(Eq. {equation})" in lines[int(line) - 1]


def test_the_readme_is_short_and_wrapped():
    lines = README.splitlines()
    assert len(lines) <= 220 and len(README.split()) <= 2300
    assert max(len(line) for line in lines if not line.startswith("|")) <= 120


def test_the_python_example_scores_a_trained_agent(hopper_file, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.+?)```", README, re.S)
    monkeypatch.chdir(tmp_path)
    sizes = {"batch_size": 8, "gradient_steps": 10, "eval_episodes": 1, "cuda": False}
    dmg_offline.main(dmg_offline.Args(env_id="hopper-medium-v2", dataset_path=hopper_file, **sizes))
    (folder,) = Path("runs").iterdir()
    shutil.copy(ROOT / "dmg_offline.py", tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    capsys.readouterr()
    exec(code.replace("runs/<run>", str(folder)).replace("episodes=100", "episodes=2"), {})
    mean_return, score = map(float, capsys.readouterr().out.split())
    assert score == pytest.approx(100 * (mean_return + 20.272305) / (3234.3 + 20.272305))

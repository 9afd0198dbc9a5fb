"""How the scripts are written: shared blocks are the same, no script needs another, sizes are limited."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINES = {"dmg_offline": 660, "td3bc": 600, "iql": 740, "dmg_finetune": 790}
TEXTS = {path.stem: path.read_text() for path in ROOT.glob("*.py")}
SCRIPTS = pytest.mark.parametrize("name", LINES)


def blocks(text):
    """{first line: text} of the shared blocks, each to the next such line or to the end of Args' fields."""
    block = r"^( *# ---- [^:\n]+: the same in .*? ----)\n(.*?)(?=^ *# ---- |^    def __post_init__)"
    return dict(re.findall(block, text, re.M | re.S))


def test_shared_blocks_are_the_same_bytes_in_every_script_that_their_first_line_names():
    assert TEXTS.keys() == LINES.keys()
    for name, text in TEXTS.items():
        assert 8 <= len(blocks(text)) == text.count(": the same in ")
        for first, block in blocks(text).items():
            named = set(LINES) if "all four scripts" in first else set(re.findall(r"(\w+)\.py", first))
            assert name in named and block.count("\n") > 2, first
            for other in named:
                assert blocks(TEXTS[other]).get(first) == block, f"{first} differs: {name}, {other}"


@SCRIPTS
def test_no_script_imports_another_file_of_the_project(name):
    own = {"benchmark", "tests", *(x.stem for pattern in ("*.py", "*/*.py") for x in ROOT.glob(pattern))}
    imported = re.findall(r"^ *(?:import|from) (\w+)", TEXTS[name], re.M)
    assert "torch" in imported and not own & set(imported)


@SCRIPTS
def test_the_algorithm_stands_at_the_top_and_functions_and_scripts_are_short(name):
    found = [x for x in ast.walk(ast.parse(TEXTS[name])) if isinstance(x, ast.FunctionDef)]
    (update,) = (x for x in found if x.name == "update")
    assert update.end_lineno < 250
    most = {"main": 130 if name == "dmg_finetune" else 110, "update": 47}
    assert not [x.name for x in found if x.end_lineno - x.lineno >= most.get(x.name, 40)]
    lines = TEXTS[name].splitlines()
    assert len(lines) <= LINES[name] and max(map(len, lines)) <= 110


@SCRIPTS
def test_the_block_at_the_end_names_the_packages_of_requirements_txt(name):
    """PEP 723. torch, pinned in requirements.txt, has a minimum here."""
    _, block = TEXTS[name].split("\n# /// script\n")
    assert block.endswith("\n# ///\n")
    inline = tomllib.loads(re.sub("^# ?", "", block.removesuffix("# ///\n"), flags=re.M))["dependencies"]
    rows = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert inline[1:] == [row for row in rows if row][1:]
    minimum, pinned = inline[0].removeprefix("torch>="), rows[0].removeprefix("torch==")
    assert [2] <= list(map(int, minimum.split("."))) <= list(map(int, pinned.split(".")))

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
DMG, EACH = {"dmg_offline", "dmg_finetune"}, set(LINES)
BLOCKS = dict.fromkeys(["    data", "    run", "arguments", "data", "environments", "evaluation"], EACH)
BLOCKS |= {"networks and optimizer": EACH, "value loss": DMG | {"iql"}, "agent and update": DMG}
BLOCKS |= {"speed": DMG | {"td3bc"}, "replay": {"dmg_finetune", "iql"}}


def blocks(text):
    """{name: text} of the shared blocks: to the next such line or, in Args, to the end of the fields."""
    block = r"^(( *)# ---- ([^:\n]+): the same in .*? ----\n.*?)(?=^ *# ---- |^    def __post_init__)"
    return {indent + name: found for found, indent, name in re.findall(block, text, re.M | re.S)}


def test_shared_blocks_are_the_same_bytes_in_every_script_that_shares_them():
    assert TEXTS.keys() == EACH
    for block, scripts in BLOCKS.items():
        copies = {blocks(TEXTS[script]).get(block) for script in scripts}
        assert len(copies) == 1 and None not in copies, f"{block!r} differs among {sorted(scripts)}"
        first, *rest = copies.pop().splitlines()
        named = EACH if "all four scripts" in first else set(re.findall(r"(\w+)\.py", first))
        assert named == scripts and len(rest) > 2, first
    for script, text in TEXTS.items():  # and there is no other
        assert blocks(text).keys() == {block for block, scripts in BLOCKS.items() if script in scripts}
        assert text.count(": the same in ") == len(blocks(text))


@SCRIPTS
def test_no_script_imports_another_file_of_the_project(name):
    own = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.glob("[!.]*/*.py")} | EACH
    assert {"benchmark", "tests", "iql"} <= own
    for node in ast.walk(ast.parse(TEXTS[name])):
        names = [x.name for x in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not own & {x.split(".")[0] for x in names}


@SCRIPTS
def test_the_algorithm_stands_at_the_top_and_functions_and_scripts_are_short(name):
    found = [x for x in ast.walk(ast.parse(TEXTS[name])) if isinstance(x, ast.FunctionDef)]
    (update,) = (x for x in found if x.name == "update")
    assert update.end_lineno < (260 if name in ("dmg_offline", "td3bc") else 290)
    most = {"main": 130 if name == "dmg_finetune" else 110, "update": 50}
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

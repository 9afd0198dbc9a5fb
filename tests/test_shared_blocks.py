"""Blocks that scripts share are the same bytes in each of them, and no script imports another."""

import ast
import re
from itertools import zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
DMG = {"dmg_offline.py", "dmg_finetune.py"}
HOLDERS = {
    "all scripts": DMG | {"iql.py", "td3bc.py"},
    "the DMG scripts": DMG,
    "DMG and IQL": DMG | {"iql.py"},
    "the online scripts": {"dmg_finetune.py", "iql.py"},
}


def blocks(text):
    """{name: (holders, first line's number, lines)} of the blocks in a script."""
    found, lines = {}, text.splitlines()
    for number, line in enumerate(lines):
        if opened := re.fullmatch(r"\s*# ---- shared by ([^:]+): (.+) ----", line):
            holders, name = opened.groups()
            end = next(i for i in range(number, len(lines)) if lines[i].strip() == f"# ---- end of {name} ----")
            found[name] = holders, number + 1, lines[number : end + 1]
    return found


def first_difference(a, b):
    """A sentence that names the first line in which block a of one script differs from block b of another, or ''."""
    (_, at, mine), (_, other_at, others) = a, b
    for i, (x, y) in enumerate(zip_longest(mine, others)):
        if x != y:
            return f"line {at + i} {x!r} is not line {other_at + i} {y!r}"
    return ""


def test_every_script_holds_the_blocks_that_are_shared_with_it():
    held = {script.name: blocks(script.read_text()) for script in SCRIPTS}
    for name, (holders, *_) in {name: block for found in held.values() for name, block in found.items()}.items():
        assert {script for script, found in held.items() if name in found} == HOLDERS[holders], name
    assert {"common arguments", "networks", "data, environments, evaluation, run folder"} <= set(held["dmg_offline.py"])


def test_shared_blocks_are_the_same_bytes_in_every_script():
    first = {}
    for script in SCRIPTS:
        for name, block in blocks(script.read_text()).items():
            other, theirs = first.setdefault(name, (script.name, block))
            difference = first_difference(block, theirs)
            assert not difference, f"block {name!r}: {script.name} {difference} of {other}"


def test_the_first_line_that_differs_is_named():
    text = "x\n# ---- shared by all scripts: a ----\n1\n2\n# ---- end of a ----\n"
    other = "# ---- shared by all scripts: a ----\n1\n3\n# ---- end of a ----\n"
    assert first_difference(blocks(text)["a"], blocks(text)["a"]) == ""
    assert first_difference(blocks(text)["a"], blocks(other)["a"]) == "line 4 '2' is not line 3 '3'"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_no_script_imports_another_file_of_the_project(script):
    own = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path.is_dir() and path.name[0] != ".")}
    for node in ast.walk(ast.parse(script.read_text())):
        names = [x.name for x in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not own & {name.split(".")[0] for name in names}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_the_algorithm_stands_at_the_top(script):
    tree = ast.parse(script.read_text())
    (update,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "update")
    assert update.end_lineno < (230 if script.stem in ("dmg_offline", "td3bc") else 255)  # the others have more flags

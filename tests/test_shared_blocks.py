"""How the scripts are written: shared blocks are the same, no script needs another, sizes are limited."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATHS = sorted(ROOT.glob("*.py"))
SCRIPTS = pytest.mark.parametrize("script", PATHS, ids=lambda path: path.stem)
DMG = {"dmg_offline.py", "dmg_finetune.py"}
HOLDERS = {"the DMG scripts": DMG, "DMG and IQL": DMG | {"iql.py"}}
HOLDERS |= {"all scripts": DMG | {"iql.py", "td3bc.py"}, "the online scripts": {"dmg_finetune.py", "iql.py"}}
BLOCKS = {"dataset arguments", "run arguments", "networks", "value loss", "agent, losses, update", "replay"}
BLOCKS |= {"data", "environments", "evaluation and run folder", "speed"}


def blocks(path):
    """{name: (holders, the block's text)} of a script."""
    block = r"^ *# ---- shared by ([^:\n]+): ([^\n]+) ----\n.*?^ *# ---- end of \2 ----$"
    return {x[2]: (x[1], x[0]) for x in re.finditer(block, path.read_text(), re.M | re.S)}


def test_shared_blocks_are_the_same_bytes_in_every_script_that_shares_them():
    held = {path.name: blocks(path) for path in PATHS}
    assert set().union(*held.values()) == BLOCKS
    for name in BLOCKS:
        copies = {script: found[name] for script, found in held.items() if name in found}
        assert len(set(copies.values())) == 1, f"{name!r} differs among {sorted(copies)}"
        ((holders, _),) = set(copies.values())
        assert copies.keys() == HOLDERS[holders], name
    for path in PATHS:
        text = path.read_text()
        assert text.count("# ---- shared by") == text.count("# ---- end of") == len(held[path.name])


@SCRIPTS
def test_no_script_imports_another_file_of_the_project(script):
    own = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p.is_dir() and p.name[0] != ".")}
    for node in ast.walk(ast.parse(script.read_text())):
        names = [x.name for x in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not own & {name.split(".")[0] for name in names}


@SCRIPTS
def test_the_algorithm_stands_at_the_top_and_functions_are_short(script):
    found = {x.name: x for x in ast.walk(ast.parse(script.read_text())) if isinstance(x, ast.FunctionDef)}
    assert found["update"].end_lineno < (260 if script.stem in ("dmg_offline", "td3bc") else 285)
    for name, x in found.items():
        assert x.end_lineno - x.lineno < (120 if name == "main" else 50), name
    assert max(map(len, script.read_text().splitlines())) <= 110


@SCRIPTS
def test_the_block_at_the_end_names_the_packages_of_requirements_txt(script):
    """PEP 723. torch, pinned in requirements.txt, has that version as its minimum here."""
    _, block = script.read_text().split("\n# /// script\n")
    assert block.endswith("\n# ///\n")
    lines = block.removesuffix("# ///\n").splitlines()
    inline = tomllib.loads("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines))
    rows = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert inline["dependencies"] == [re.sub("^torch==", "torch>=", row) for row in rows if row]

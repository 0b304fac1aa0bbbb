"""The page for maintainers is true: what its tables name exists, and every room is on it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("|")]
NAMED = sorted({pair for row in ROWS for pair in re.findall(r"`([\w/]+\.py)`(?: `(\w+)`)?", row)})
PATHS = sorted(set(re.findall(r"`((?:\w+/)+[\w.]+)`", PAGE)))


def names_in(path: Path) -> set[str]:
    """Functions, classes and methods of a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


@pytest.mark.parametrize(("path", "name"), NAMED, ids=lambda part: part or "-")
def test_what_a_table_names_exists(path, name):
    assert (ROOT / path).is_file(), path
    assert not name or name in names_in(ROOT / path), f"{path} has no {name}"


@pytest.mark.parametrize("path", PATHS)
def test_every_file_and_folder_that_is_named_exists(path):
    places = [ROOT, ROOT / "nodes", ROOT / "lookahead", ROOT / "mini"]
    assert any((place / path.rstrip("/")).exists() for place in places), path


def test_every_sentence_of_the_paper_has_code_and_a_test():
    table = PAGE.split("## From the paper's sentence")[1].split("## ")[0]
    rows = [row for row in table.splitlines() if row.startswith("|") and ".py" in row]
    assert len(rows) >= 16
    for row in rows:
        _, sentence, code, test, _ = row.split("|")
        assert sentence.strip() and ".py`" in code and "tests/" in test, row


def test_every_room_and_every_folder_of_modules_is_on_the_page():
    tree = PAGE.split("```")[1]
    top = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert top <= set(re.findall(r"^(\w+)/", tree, re.M)) | {"web"}
    for room in ("lookahead", "nodes", "evaluation", "trainer", "mini"):
        folders = {p.parent.name for p in (ROOT / room).glob("*/__init__.py")}
        below = tree.split(f"\n{room}/")[1].split("\n\n")[0]
        assert all(f"{folder}/" in below for folder in folders), (room, folders)

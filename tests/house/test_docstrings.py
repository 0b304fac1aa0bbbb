"""A docstring's first sentence has a subject and a verb: it says what a thing is or does, not what it is part of."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("lookahead", "nodes", "sdxl", "trainer", "evaluation", "cli", "mini", "host", "tools")
# A sentence that begins so is a clause without its verb: "Whether it acts", "What travels as X", "As its neighbour".
CLAUSE = re.compile(r"(As|Beside|By|From|How|Of|That of|The same|What|Where|Whether|With)\b")


def public_docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """The docstrings of public classes and of public functions outside of functions, under their dotted names."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            yield f"{name}{child.name}", ast.get_docstring(child) or ""
            if isinstance(child, ast.ClassDef):
                yield from public_docstrings(child, f"{name}{child.name}.")


def clauses(source: str) -> list[str]:
    """The names of what a module documents with a clause."""
    return [name for name, text in public_docstrings(ast.parse(source), "") if CLAUSE.match(text)]


def test_a_docstring_begins_with_a_sentence():
    paths = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    found = {path.relative_to(ROOT).as_posix(): clauses(path.read_text(encoding="utf-8")) for path in paths}
    assert len(found) > 100 and {path: names for path, names in found.items() if names} == {}


def test_a_clause_is_told_from_a_sentence():
    source = '''
class Loss:
    """What travels as LOSS."""

    def bind(self):
        """Whether it draws."""

    def value(self):
        """Says whether it draws: what a run needs to know."""

    def _own(self):
        """Of this class."""


def whole():
    """Whatever is given is returned."""


def same():
    """The same as `whole`."""
'''
    assert clauses(source) == ["Loss", "Loss.bind", "same"]

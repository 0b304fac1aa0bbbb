"""docs/compared.md: each row says yes with a file or test that exists, or no with a reason."""

import json
import re
from pathlib import Path

import pytest
from lcm_lookahead.tools import node_counts

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"\| (?P<what>[^|]+) \| (?P<answer>[^|]+) \| (?P<why>[^|]+) \|")
LINES = (ROOT / "docs/compared.md").read_text(encoding="utf-8").splitlines()
HEAD = "| row |"
PLACE = re.compile(r"`(?P<path>[\w.-]+(?:/[\w.-]+)+|\.?[\w-]+\.(?:py|toml|md))`(?: `(?P<test>test_\w+)`)?")


def of_tables(lines: list[str]) -> list[str]:
    """The lines of the tables that begin with HEAD, without heads; other tables hold counts."""
    found, inside = [], False
    for line in lines:
        inside = line.startswith("|") and (inside or line.startswith(HEAD))
        if inside and not line.startswith((HEAD, "|---")):
            found.append(line)
    return found


ROWS = [match for line in of_tables(LINES) if (match := ROW.fullmatch(line))]


def wrong(row: re.Match[str]) -> str | None:
    """What cannot be held of a row."""
    places = list(PLACE.finditer(row["why"]))
    for place in places:
        path = ROOT / place["path"]
        if not path.is_file():
            return f"there is no {place['path']}"
        if place["test"] and f"def {place['test']}(" not in path.read_text(encoding="utf-8"):
            return f"{place['path']} has no {place['test']}"
    if loose := [name for name in re.findall(r"`(test_\w+)`", row["why"]) if name not in {p["test"] for p in places}]:
        return f"{loose[0]} stands without its file"
    if row["answer"] == "yes":
        return None if places else "a yes without a file"
    if row["answer"] == "no":
        return None if len(re.sub(r"`[^`]*`", "", row["why"])) > 10 else "a no without a reason"
    return f"neither yes nor no: {row['answer']}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["what"][:60])
def test_a_row_is_shown_or_says_why_not(row):
    assert wrong(row) is None


def test_no_row_is_left_out_and_both_answers_are_given():
    assert len(of_tables(LINES)) == len(ROWS) > 150
    answers = [row["answer"] for row in ROWS]
    assert answers.count("yes") > 50 and answers.count("no") > 20


def test_a_row_that_claims_too_much_is_found():
    def said(text):
        return wrong(ROW.fullmatch(text))

    assert said("| a | yes | `tests/house/test_compared.py` `test_a_row_is_shown_or_says_why_not` |") is None
    assert "no tests/none.py" in said("| a | yes | `tests/none.py` |")
    assert "has no test_none" in said("| a | yes | `tests/house/test_compared.py` `test_none` |")
    assert said("| a | yes | surely |") and said("| a | partly | `setup.py` |") and said("| a | no | `setup.py` |")
    assert said("| a | yes | `setup.py`, and `test_elsewhere` |")


def test_workflows_with_a_folded_part_are_counted_as_they_are_now():
    (row,) = [row for row in ROWS if row["what"] == "subgraphs in templates"]
    files = [path for path in (ROOT / "workflows").glob("*.json") if not path.stem.endswith(".app")]
    folded = sum(bool(json.loads(path.read_text(encoding="utf-8")).get("definitions")) for path in files)
    assert row["why"].endswith(f"; in {folded} of the {len(files)}")


def test_nodes_and_open_values_are_counted_as_they_are_now():
    text = node_counts.PAGE.read_text(encoding="utf-8")
    assert node_counts.with_table(text) == text, "write it anew: python -m lcm_lookahead.tools.node_counts"

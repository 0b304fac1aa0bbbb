"""Before it is merged, each node has what its users look for beside it. Nothing here keeps a node from working."""

import shutil

import pytest
from lcm_lookahead.tools import completeness, locales
from lcm_lookahead.tools.common import ROOT

ID = "LookaheadL1Loss"


def lacking(object_info, root, **others):
    return completeness.lacking(object_info, locales.Locales(object_info, **others), root)


def test_every_node_has_its_picture_its_translations_its_workflow_and_its_line(object_info):
    found = lacking(object_info, ROOT)
    assert not found, "\n".join(["before it is merged (python -m lcm_lookahead.tools.completeness):", *found])


@pytest.fixture
def root(tmp_path):
    """A repository with what belongs to one node."""
    for folder in ("workflows", "subgraphs", "locales", "web/docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.png", "*.jpg", "*.webp"))
    (tmp_path / "web/docs/pictures").mkdir(exist_ok=True)
    shutil.copy(ROOT / f"web/docs/pictures/{ID}.png", tmp_path / "web/docs/pictures")
    shutil.copy(ROOT / "CHANGELOG.md", tmp_path)
    return tmp_path


def of_one(object_info, root, **changes):
    node = {**object_info[ID], **changes}
    return lacking({ID: node}, root, folder=root / "locales", pages=root / "web/docs")


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (lambda root: (root / f"web/docs/pictures/{ID}.png").unlink(), ["has no picture", f"help_pictures {ID}"]),
        (lambda root: (root / f"web/docs/{ID}/ko.md").unlink(), ["its help page is not translated (ko)", "--take"]),
        (lambda root: (root / f"web/docs/{ID}.md").unlink(), ["has no help page"]),
        (lambda root: (root / f"web/docs/{ID}.md").write_text("# L1\n"), ["does not show its picture"]),
        (lambda root: shutil.rmtree(root / "workflows"), ["no workflow shows it", "tools.templates"]),
        (lambda root: (root / "CHANGELOG.md").write_text(""), ["CHANGELOG.md does not name it"]),
    ],
)
def test_what_is_missing_is_said_in_one_line_with_what_makes_it(object_info, root, broken, told):
    assert of_one(object_info, root) == []
    broken(root)
    (line,) = of_one(object_info, root)
    assert line.startswith(f"{ID}: ") and all(part in line for part in told)


def test_a_new_description_is_named_once_for_all_languages(object_info, root):
    (line,) = of_one(object_info, root, description="How far the squares of colours are.")
    assert "(1; zh, ja, ko, de, fr, es, pt-BR)" in line and "--write" in line


def test_a_new_input_asks_for_a_new_picture(object_info, root):
    inputs = object_info[ID]["input"]
    more = {**inputs, "required": {**inputs["required"], "power": ("INT", {"default": 2, "tooltip": ""})}}
    found = of_one(object_info, root, input=more)
    assert any("has other inputs" in line and f"help_pictures {ID}" in line for line in found)

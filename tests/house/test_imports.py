"""Who may import whom: nodes -> lookahead, trainer -> lookahead, and nothing else between the three."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("lookahead", "nodes", "trainer", "tools")
OURS = {*PARTS, "lcm_lookahead"}
HOST = {
    "comfy",
    "comfy_api",
    "comfy_api_nodes",
    "comfy_config",
    "comfy_execution",
    "comfy_extras",
    "execution",
    "folder_paths",
    "latent_preview",
    "node_helpers",
    "server",
}
FORBIDDEN = {
    "lookahead": HOST | {"diffusers", "accelerate", "peft"},
    "nodes": {"diffusers", "accelerate", "peft"},
    "trainer": HOST,
}
OPTIONAL = {"cv2", "dreamsim", "insightface", "lpips", "onnx", "onnx2torch", "onnxruntime", "skimage"}
MAY_USE = {"lookahead": {"lookahead"}, "nodes": {"nodes", "lookahead"}, "trainer": {"trainer", "lookahead"}}


def imports(source: str) -> list[tuple[int, int, str]]:
    """Every import in a module: line, level (0 = absolute, 1 = from ., 2 = from ..) and dotted name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, 0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.module:
                found.append((node.lineno, node.level, node.module))
            else:
                found += [(node.lineno, node.level, alias.name) for alias in node.names]
    return found


def broken_rules(part: str, path: Path, source: str) -> list[str]:
    """What a module of a part imports though it must not. `path` is relative to the project."""
    depth = len(path.parts) - 1  # relative imports of this level reach the project's own folder
    broken = []
    for line, level, name in imports(source):
        top = name.split(".")[0]
        if level == 0 and top in FORBIDDEN[part]:
            broken.append(f"{path}:{line} imports {name}")
        elif level == 0 and top in OURS:
            broken.append(f"{path}:{line} imports {name} absolutely")
        elif level > depth + 1:
            broken.append(f"{path}:{line} leaves the package")
        elif level == depth + 1 and top not in MAY_USE[part]:
            broken.append(f"{path}:{line} imports {name} across parts")
    return broken


@pytest.mark.parametrize("part", MAY_USE)
def test_each_part_imports_only_what_it_may(part):
    modules = sorted((ROOT / part).rglob("*.py"))
    assert modules, f"{part}/ holds no module"
    broken = [
        rule
        for path in modules
        for rule in broken_rules(part, path.relative_to(ROOT), path.read_text(encoding="utf-8"))
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("part", "path", "source"),
    [
        ("lookahead", "lookahead/a.py", "import comfy.utils"),
        ("lookahead", "lookahead/a.py", "def f():\n    from diffusers import UNet2DConditionModel"),
        ("lookahead", "lookahead/a.py", "from ..trainer import roles"),
        ("lookahead", "lookahead/a.py", "from .. import nodes"),
        ("nodes", "nodes/a.py", "from ..trainer.mini import faces"),
        ("nodes", "nodes/a.py", "from lookahead import attention"),
        ("nodes", "nodes/a.py", "import lcm_lookahead"),
        ("trainer", "trainer/mini/a.py", "from ...nodes import roles"),
        ("trainer", "trainer/a.py", "import folder_paths"),
        ("trainer", "trainer/mini/a.py", "from ....other import x"),
    ],
)
def test_the_check_finds_what_is_forbidden(part, path, source):
    assert broken_rules(part, Path(path), source)


@pytest.mark.parametrize(
    ("part", "path", "source"),
    [
        ("lookahead", "lookahead/a.py", "import torch\nfrom .b import c\nfrom ..lookahead import d"),
        ("nodes", "nodes/a.py", "import comfy\nfrom ..lookahead.attention import f"),
        ("trainer", "trainer/mini/a.py", "import diffusers\nfrom ...lookahead import f\nfrom ..evaluate import g"),
    ],
)
def test_the_check_lets_through_what_is_allowed(part, path, source):
    assert not broken_rules(part, Path(path), source)


def test_the_door_of_the_host_imports_nothing_of_ours_when_it_is_loaded():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    at_load = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom | ast.If | ast.Try)]
    names = [name for node in at_load for _, level, name in imports(ast.unparse(node)) if level or name != "__future__"]
    assert not names
    assert any(
        isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n.name == "comfy_entrypoint" for n in tree.body
    )


@pytest.mark.parametrize("part", ["lookahead", "nodes"])
def test_packages_that_a_user_may_lack_are_imported_where_they_are_used_alone(part):
    """Not at load: the pack must import without them. (What stands under TYPE_CHECKING is never run.)"""
    for path in (ROOT / part).glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        at_load = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom | ast.Try)]
        names = {name.split(".")[0] for node in at_load for _, _, name in imports(ast.unparse(node))}
        assert not names & OPTIONAL, path


def test_nothing_of_the_pack_edits_the_import_path():
    for part in MAY_USE:
        for path in (ROOT / part).rglob("*.py"):
            assert "sys.path" not in path.read_text(encoding="utf-8"), path


def test_tests_are_no_package():
    assert not list((ROOT / "tests").rglob("__init__.py"))

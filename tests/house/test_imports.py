"""Who may import whom. The rooms and what each may see stand here as data; docs/architecture.md draws them."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# room: what it may import beside itself. A name stands for all below it, with ".*" for the modules of that folder
# alone; the longest name that fits a module is its room. Every arrow leads down this list's order of layers, so a
# circle between rooms cannot be written down.
ROOMS: dict[str, tuple[str, ...]] = {
    # the library: torch alone
    "lookahead.method": (),
    "lookahead.files.atomic": (),  # the standard library alone: also for rooms that see nothing else of the library
    "lookahead.files": ("lookahead.method", "lookahead.files.atomic"),
    "lookahead.vision": ("lookahead.method", "lookahead.files"),
    "lookahead.losses": ("lookahead.method", "lookahead.files", "lookahead.vision"),
    # the pack
    "nodes.schema": (),
    "nodes.presets": (),
    "nodes.sockets": (),
    "nodes.folders": (),
    "nodes.versions": (),
    "nodes.reference": ("lookahead", "nodes.schema", "nodes.folders", "nodes.sockets"),
    "nodes.conditioning": ("lookahead", "nodes.schema", "nodes.presets", "nodes.sockets", "nodes.reference"),
    "nodes.losses": ("lookahead", "nodes.schema", "nodes.folders", "nodes.sockets", "nodes.reference"),
    "nodes.scores": (
        "lookahead",
        "nodes.schema",
        "nodes.folders",
        "nodes.sockets",
        "nodes.reference",
        "nodes.losses",
    ),
    "nodes.concept": (
        "lookahead",
        "nodes.schema",
        "nodes.folders",
        "nodes.sockets",
        "nodes.reference",
        "nodes.conditioning",
        "nodes.guidance",
    ),
    "nodes.guidance": (
        "lookahead",
        "nodes.schema",
        "nodes.presets",
        "nodes.folders",
        "nodes.sockets",
        "nodes.losses",
        "nodes.conditioning",
    ),
    "nodes": ("nodes", "lookahead.files.atomic"),
    # SDXL in diffusers, and what is built on it
    "sdxl": ("lookahead",),
    "evaluation": ("lookahead", "sdxl"),
    # the trainer: its loop, checkpoints, log and config know no recipe
    "trainer": ("lookahead", "sdxl", "evaluation.*"),
    "trainer.lookahead": ("lookahead", "sdxl", "evaluation.*", "trainer.*"),
    "trainer.concept": ("lookahead", "sdxl", "evaluation.*", "trainer.*"),
    "trainer.noise_guide": ("lookahead", "sdxl", "evaluation.*", "trainer.*", "trainer.lookahead"),
    "trainer.data": ("lookahead", "sdxl", "trainer.*", "trainer.lookahead"),
    "trainer.data.generate": ("lookahead", "sdxl", "evaluation.*", "trainer.*", "trainer.data.*"),
    # a real ComfyUI, and the repository's own tools that need nothing installed
    "tools.common": (),
    "tools.setup": ("tools.common",),
    "tools.start": ("tools.common", "tools.setup"),
    "host": ("lookahead.files.atomic", "tools.common", "tools.setup"),
    # the harness stands on the trainer's readers and counters, and draws in a host
    "evaluation.harness": ("lookahead", "sdxl", "evaluation.*", "trainer", "host", "tools.common"),
    # the mini world: people are drawn, networks trained on them and stored in public formats, measured, then used
    "mini.world": ("lookahead.files.atomic",),
    "mini.plan": ("mini.world",),
    "mini.files.checkpoint": ("lookahead",),
    "mini.stages": ("lookahead", "sdxl", "evaluation", "mini.world", "mini.plan", "mini.files.checkpoint"),
    "mini.files": (
        "lookahead",
        "host",
        "tools.common",
        "mini.world",
        "mini.plan",
        "mini.stages",
        "mini.files.checkpoint",
    ),
    "mini.report": ("lookahead", "sdxl", "evaluation", "mini.world", "mini.plan", "mini.stages", "mini.files"),
    "mini.studies": (
        "lookahead",
        "sdxl",
        "evaluation",
        "host",
        "tools.common",
        "mini.world",
        "mini.plan",
        "mini.files",
    ),
    "mini": ("lookahead", "sdxl", "evaluation", "trainer", "host", "tools.common", "mini"),
    "cli": ("lookahead", "sdxl", "evaluation", "trainer", "host", "mini", "tools.common"),
    "tools": ("lookahead", "sdxl", "evaluation", "trainer", "host", "mini", "cli", "tools"),
}
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
# By top-level folder, packages that must not be imported there. (A script of tools/ that the host itself runs may.)
FORBIDDEN = {
    "lookahead": HOST | {"diffusers", "accelerate", "peft"},
    "nodes": {"diffusers", "accelerate", "peft"},
    "sdxl": HOST | {"accelerate"},
    "evaluation": HOST,
    "trainer": HOST,
    "host": HOST | {"torch", "diffusers", "accelerate", "peft"},
    "mini": HOST,
    "cli": HOST,
    "tools": {"peft"},
}
OPTIONAL = {"cv2", "dreamsim", "insightface", "lpips", "onnx", "onnx2torch", "onnxruntime", "skimage"}
OPTIONAL |= {"datatrove", "ray"}
LOADED_BY_THE_HOST = ("host/custom_nodes", "mini/host_extension")  # folders that are packages of the host, not of ours
PARTS = tuple(dict.fromkeys(room.split(".")[0] for room in ROOMS))
OURS = {*PARTS, "lcm_lookahead"}


def modules(part: str) -> list[Path]:
    """The modules of a top-level folder, relative to the project."""
    found = sorted(path.relative_to(ROOT) for path in (ROOT / part).rglob("*.py"))
    return [path for path in found if not path.as_posix().startswith(LOADED_BY_THE_HOST)]


def dotted(path: Path) -> str:
    """The name of a module below the project."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


NAMES = {dotted(path) for part in PARTS for path in modules(part)}


def room_of(name: str) -> str:
    """The room of a module; a package that holds rooms belongs to itself."""
    rooms = [room for room in ROOMS if name == room or name.startswith(room + ".")]
    return max(rooms, key=len, default=name)


def covers(rule: str, room: str) -> bool:
    """Whether a room is among those that a name in ROOMS stands for."""
    return room == rule.removesuffix(".*") or (not rule.endswith(".*") and room.startswith(rule + "."))


def imports(path: Path, source: str) -> Iterator[tuple[int, bool, str]]:
    """Every import in a module: line, whether it is one of ours by relative import, and the dotted name (for ours, from
    the project's folder; it begins with ".." where it leaves the project)."""
    package = path.parent.parts
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, False, alias.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, False, node.module or ""
        elif isinstance(node, ast.ImportFrom):
            up = node.level - 1
            if up > len(package):
                yield node.lineno, True, ".." + (node.module or "")
                continue
            base = ".".join([*package[: len(package) - up], *([node.module] if node.module else [])])
            for alias in node.names:  # what is imported may itself be a module
                name = f"{base}.{alias.name}" if base else alias.name
                yield node.lineno, True, name if name in NAMES or not base else base


def broken_rules(path: Path, source: str) -> list[str]:
    """What a module imports though it must not. `path` is relative to the project."""
    part, here, broken = path.parts[0], room_of(dotted(path)), []
    for line, ours, name in imports(path, source):
        top = name.split(".")[0]
        if not ours:
            if top in FORBIDDEN[part] and path.name != "bench_in_host.py":
                broken.append(f"{path}:{line} imports {name}")
            elif top in OURS and path.name != "bench_in_host.py":
                broken.append(f"{path}:{line} imports {name} absolutely")
        elif name.startswith(".."):
            broken.append(f"{path}:{line} leaves the package")
        else:
            there = room_of(name)
            if there != here and not any(covers(rule, there) for rule in ROOMS.get(here, ())):
                broken.append(f"{path}:{line} imports {name} ({here} may not import {there})")
    return broken


@pytest.mark.parametrize("part", PARTS)
def test_each_room_imports_only_what_it_may(part):
    paths = modules(part)
    assert paths, f"{part}/ holds no module"
    broken = [rule for path in paths for rule in broken_rules(path, (ROOT / path).read_text(encoding="utf-8"))]
    assert not broken, "\n".join(broken)


def at_load(source: str) -> ast.Module:
    """A module without what runs later or never: bodies of functions, and what stands under TYPE_CHECKING."""
    tree = ast.parse(source)

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return ast.Pass()

        visit_AsyncFunctionDef = visit_FunctionDef

        def visit_If(self, node):
            return ast.Pass() if "TYPE_CHECKING" in ast.dump(node.test) else self.generic_visit(node)

    return Strip().visit(tree)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that reach each other (Tarjan's strongly connected components of more than one)."""
    index, low, stack, found = {}, {}, [], []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in graph:
        if name not in index:
            visit(name)
    return found


def others_seen(rooms: dict[str, tuple[str, ...]]) -> dict[str, set[str]]:
    """The other rooms that each may import, by rules like those of ROOMS."""
    return {
        room: {other for other in rooms if other != room and any(covers(rule, other) for rule in rules)}
        for room, rules in rooms.items()
    }


def test_no_rule_allows_a_circle_between_rooms():
    assert not circles(others_seen(ROOMS))


def test_a_circle_between_rooms_is_found_however_long_it_is():
    rooms = {"a": ("b",), "b.in": ("c.*",), "c": ("d",), "d": ("a.*",), "e": ("a", "e"), "e.in": ("d",)}
    assert circles(others_seen(rooms)) == [["a", "b.in", "c", "d"]]
    assert not circles(others_seen(rooms | {"c": ()}))


def test_no_modules_import_each_other_in_a_circle():
    """At load and later alike: an import inside a function hides a circle, it does not open it. (A package's __init__
    is no module here: importing a sibling runs it.)"""
    graph = {}
    for part in PARTS:
        for path in modules(part):
            source = (ROOT / path).read_text(encoding="utf-8")
            targets = {name for _, ours, name in imports(path, source) if ours}
            graph[dotted(path)] = {name for name in targets & NAMES if name != dotted(path)}
    assert not circles(graph)


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def types_declared(source: str) -> list[str]:
    """The public names of classes, and of type aliases and type variables (whatever is assigned to a name in
    CamelCase), at the top of a module."""
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            found += [name for name in names if re.fullmatch(r"[A-Z]\w*[a-z]\w*", name)]
    return found


def test_no_public_name_of_a_type_is_declared_twice():
    """One name, one thing: who reads `Run` or `Rows` must not have to ask which."""
    where = defaultdict(list)
    for part in PARTS:
        for path in modules(part):
            for name in types_declared((ROOT / path).read_text(encoding="utf-8")):
                where[name].append(path.as_posix())
    assert not {name: paths for name, paths in where.items() if len(paths) > 1}


def test_classes_aliases_and_type_variables_are_names_of_types():
    source = "class One: ...\nTwo = dict[str, int]\nKV3d: TypeAlias = tuple[int, int]\nAny4 = TypeVar('Any4')\n"
    others = "class _A: ...\n_B = int\nSIZE = 3\nKV = 4\nload, x = 1, 2\ndef f():\n    Inner = int\n"
    assert types_declared(source + others) == ["One", "Two", "KV3d", "Any4"]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("lookahead/method/a.py", "import comfy.utils"),
        ("lookahead/method/a.py", "def f():\n    from diffusers import UNet2DConditionModel"),
        ("lookahead/method/a.py", "from ..files import tensors"),
        ("lookahead/files/a.py", "from ...trainer import config"),
        ("lookahead/files/a.py", "from ... import nodes"),
        ("nodes/reference/a.py", "from ..conditioning import rows"),
        ("nodes/reference/a.py", "from ...mini.world import faces"),
        ("nodes/guidance/a.py", "from lookahead import attention"),
        ("nodes/guidance/a.py", "import lcm_lookahead"),
        ("nodes/sockets.py", "from .reference import encoder"),
        ("sdxl/a.py", "from ..trainer import config"),
        ("evaluation/a.py", "from ..mini.world import faces"),
        ("evaluation/harness/a.py", "from ...mini.world import faces"),
        ("trainer/a.py", "from ..evaluation.harness import run"),
        ("trainer/data/a.py", "from ...mini import plan"),
        ("trainer/train.py", "from .lookahead.step import Step"),
        ("trainer/checkpoints.py", "from .data import folder"),
        ("trainer/lookahead/a.py", "from ..data import folder"),
        ("trainer/a.py", "import folder_paths"),
        ("host/a.py", "from ..mini import plan"),
        ("host/a.py", "import torch"),
        ("mini/world/a.py", "from ....other import x"),
        ("mini/world/a.py", "from ...cli import main"),
        ("mini/world/a.py", "from ..report import measure"),
        ("mini/stages/a.py", "from ..files import weights"),
        ("mini/report/a.py", "from ..studies import study"),
    ],
)
def test_the_check_finds_what_is_forbidden(path, source):
    assert broken_rules(Path(path), source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("lookahead/vision/a.py", "import torch\nfrom .b import c\nfrom ..files import tensors"),
        ("nodes/guidance/a.py", "import comfy\nfrom ...lookahead.method.attention import f"),
        ("nodes/guidance/a.py", "from ..conditioning.wrappers import g"),
        ("mini/stages/a.py", "import diffusers\nfrom ...lookahead.method import schedule\nfrom ..plan import SIZES"),
        ("host/a.py", "from ..tools.common import ROOT"),
        ("trainer/data/a.py", "from ..lookahead import step\nfrom .. import config"),
    ],
)
def test_the_check_lets_through_what_is_allowed(path, source):
    assert not broken_rules(Path(path), source)


def test_the_door_of_the_host_imports_nothing_of_ours_when_it_is_loaded():
    source = (ROOT / "__init__.py").read_text(encoding="utf-8")
    assert not [name for _, ours, name in imports(Path("__init__.py"), ast.unparse(at_load(source))) if ours]
    assert any(
        isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n.name == "comfy_entrypoint"
        for n in ast.parse(source).body
    )


@pytest.mark.parametrize("part", ["lookahead", "nodes"])
def test_packages_that_a_user_may_lack_are_imported_where_they_are_used_alone(part):
    """Not at load: the pack must import without them. (What stands under TYPE_CHECKING is never run.)"""
    for path in modules(part):
        source = ast.unparse(at_load((ROOT / path).read_text(encoding="utf-8")))
        names = {name.split(".")[0] for _, ours, name in imports(path, source) if not ours}
        assert not names & OPTIONAL, path


def test_nothing_of_the_pack_edits_the_import_path():
    for part in ("lookahead", "nodes", "sdxl", "trainer", "evaluation", "mini", "cli", "host"):
        for path in modules(part):
            assert "sys.path" not in (ROOT / path).read_text(encoding="utf-8"), path


def test_tests_are_no_package():
    assert not list((ROOT / "tests").rglob("__init__.py"))

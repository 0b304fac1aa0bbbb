"""What is in the repository, and what of it goes into the published pack."""

import ast
import re
import stat
import subprocess
import tomllib
import urllib.parse
import zipfile
from pathlib import Path

import pathspec
import pytest
from registry import write_archive

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TEXT = {".py", ".md", ".txt", ".toml", ".yaml", ".yml", ".json", ".js", ".css", ".html", ".sh", "", ".cfg", ".ini"}
# Put together here, so that this file does not name what it looks for.
REGISTRY = "|".join(re.escape(".".join(parts)) for parts in (("pypi", "org"), ("python" + "hosted", "org")))
MACHINE = r"(?<![\w.:/])/(?:work|root|home|tmp)/\w"


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """The files of the repository, as git lists them."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def lines_with(pattern: str, paths: list[Path]) -> list[str]:
    """Where a pattern stands in text files."""
    found = []
    for path in paths:
        if path.suffix in TEXT:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if re.search(pattern, line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    return found


def test_no_file_names_a_package_registry_s_host(tracked):
    assert not lines_with(REGISTRY, tracked)


def test_no_file_names_a_path_of_somebody_s_machine(tracked):
    assert not lines_with(MACHINE, tracked)


def test_the_search_finds_such_lines(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "a.py"
    path.write_text("open('/" + "work/x')\nurl = 'https://pypi" + ".org/simple'\n'https://example.com/home/x'\n")
    assert len(lines_with(MACHINE, [path])) == 1 and len(lines_with(REGISTRY, [path])) == 1


def test_no_file_is_large_and_the_mini_weights_are_small(tracked):
    sizes = {path: path.stat().st_size for path in tracked}
    assert sum(sizes.values()) < 90e6
    mini = ROOT / "mini"
    assert sum(size for path, size in sizes.items() if path.is_relative_to(mini / "weights")) < 75e6
    kinds = (".safetensors", ".onnx", ".pt", ".bin")
    others = {p: s for p, s in sizes.items() if p.suffix in kinds and not p.is_relative_to(mini / "weights")}
    assert [path.relative_to(mini).as_posix() for path in others] == [
        f"trained/mini_{name}.safetensors" for name in ("concept", "concept_encoder", "encoder", "noise_guide")
    ]
    assert sum(others.values()) < 7e6
    assert sum(size for path, size in sizes.items() if path.is_relative_to(mini) and path.suffix in kinds) < 75e6


def test_nothing_of_the_host_or_of_the_set_up_is_committed(tracked):
    names = [path.relative_to(ROOT).parts[0] for path in tracked]
    assert not {".host", ".venv", ".cache", ".mini", "output"} & set(names)
    assert not [path for path in tracked if path.name == "main.py" and (path.parent / "comfy").exists()]


@pytest.fixture(scope="module")
def published(tracked) -> set[str]:
    """The files of the repository that go into the pack's archive."""
    ignore = pathspec.GitIgnoreSpec.from_lines((ROOT / ".comfyignore").read_text().splitlines())
    names = [path.relative_to(ROOT).as_posix() for path in tracked]
    return {name for name in names if not ignore.match_file(name)}


def test_the_published_pack_holds_no_tests_trainer_tools_or_weights(published):
    assert not [
        name
        for name in published
        if name.startswith(("tests/", "trainer/", "tools/", "sdxl/", "evaluation/", "mini/", "host/", "cli/", ".ci/"))
    ]
    assert not [name for name in published if name.endswith((".safetensors", ".onnx", ".pt", ".bin"))]


def test_the_published_pack_holds_all_that_it_needs(published, tracked):
    for name in ("__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md"):
        assert name in published
    for path in tracked:
        name = path.relative_to(ROOT).as_posix()
        folders = ("lookahead/", "nodes/", "web/", "workflows/", "subgraphs/")
        if name.startswith(folders) or re.fullmatch(r"locales/.+/.+", name):
            assert name in published, name


def test_the_readme_of_the_published_pack_leads_to_files_of_its_own(published):
    targets = re.findall(r"\]\(([^)#\s]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    local = {urllib.parse.unquote(target) for target in targets if not re.match(r"[a-z]+:", target)}
    folders = {parent.as_posix() for name in published for parent in Path(name).parents}
    assert len(local) > 40 and local - published - folders == set()


@pytest.fixture(scope="module")
def archive(tmp_path_factory, tracked):
    """The archive that the registry's own tool builds, and what it holds by name."""
    path = tmp_path_factory.mktemp("archive") / "node.zip"
    write_archive(path)
    with zipfile.ZipFile(path) as file:
        return path, {entry.filename: (entry, file.read(entry)) for entry in file.infolist()}


def test_the_registry_s_tool_archives_what_is_published_and_nothing_else(archive, published):
    path, content = archive
    assert content.keys() == published
    assert 5e5 < path.stat().st_size < 5e6
    for name, (entry, _) in content.items():
        kind = stat.S_IFMT(entry.external_attr >> 16)
        assert kind in (0, stat.S_IFREG), f"{name} is no plain file (a link?)"
        assert not name.startswith(("/", "..")) and not re.search(
            r"\.py[cod]$|__pycache__|\.(exe|dll|so|sh|bat|zip)$", name
        )


def test_no_module_of_the_archive_runs_text_starts_a_process_or_installs_a_package(archive):
    _, content = archive
    sources = {name: data.decode() for name, (_, data) in content.items() if name.endswith(".py")}
    assert len(sources) > 80 and {name: found for name, text in sources.items() if (found := suspicious(text))} == {}


def test_such_modules_are_known():
    for text in ("eval('1')", "exec('1')", "import subprocess", "from os import system", "os.popen('x')", "import pip",
                 "__import__('x')", "import ctypes", "pickle.loads(x)", "a = b'x'.join(marshal.loads(y))",
                 "torch.load(x)", "urllib.request.urlopen(x)", "a = 1; b = 2"):  # fmt: skip
        assert suspicious(text), text
    assert not suspicious("def f(model):\n    model.eval()\n    return torch.load(f, weights_only=True)")


def suspicious(text: str) -> list[str]:
    """What in a module's source a scanner of the registry would stop at, or should."""
    found = []
    tree = ast.parse(text)
    modules = {"subprocess", "pip", "ctypes", "marshal", "socket", "requests", "importlib.machinery", "runpy"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in modules]
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found += [n for n in names if node.module in modules or n in ("os.system", "os.popen", "pickle.loads")]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            calls = ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads",
                     "marshal.loads", "urllib.request.urlopen", "urllib.request.urlretrieve")  # fmt: skip
            found += [name] if name in calls else []
            safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            found += ["torch.load"] if name == "torch.load" and not safe else []
    found += ["several statements on a line"] if len({node.lineno for node in tree.body}) != len(tree.body) else []
    return found


def test_no_published_file_is_a_large_picture(published):
    assert not [name for name in published if (ROOT / name).stat().st_size > 1e6]


def test_the_published_pack_runs_no_text_as_code_and_starts_no_process(published):
    for name in published:
        if name.endswith(".py"):
            assert not re.search(r"(?<![.\w])(eval|exec)\(|\bsubprocess\b|os\.system", (ROOT / name).read_text()), name

"""What is in the repository, and what of it goes into the published pack."""

import re
import subprocess
from pathlib import Path

import pathspec
import pytest

ROOT = Path(__file__).resolve().parents[2]
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
    assert sum(sizes.values()) < 80e6
    mini = ROOT / "mini"
    assert sum(size for path, size in sizes.items() if path.is_relative_to(mini / "weights")) < 75e6
    kinds = (".safetensors", ".onnx", ".pt", ".bin")
    others = {p: s for p, s in sizes.items() if p.suffix in kinds and not p.is_relative_to(mini / "weights")}
    assert [path.relative_to(mini).as_posix() for path in others] == ["trained/mini_encoder.safetensors"]
    assert sum(others.values()) < 3e6


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


def test_no_published_file_is_a_large_picture(published):
    assert not [name for name in published if (ROOT / name).stat().st_size > 1e6]


def test_the_published_pack_runs_no_text_as_code_and_starts_no_process(published):
    for name in published:
        if name.endswith(".py"):
            assert not re.search(r"(?<![.\w])(eval|exec)\(|\bsubprocess\b|os\.system", (ROOT / name).read_text()), name

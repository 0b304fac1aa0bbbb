"""The set-up: does its work once, leaves nothing half done, and says in one sentence what is wrong."""

import errno
import json
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from lcm_lookahead.tools import common, setup
from lcm_lookahead.tools.common import Problem

ROOT = Path(__file__).resolve().parents[2]


def plain_text(problem: Problem) -> str:
    """The problem's text, checked for being one short piece of plain text."""
    text = str(problem)
    assert "\n" not in text and "Traceback" not in text and text.endswith(".")
    return text


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """The set-up with its steps recorded instead of done; `steps.fail_at` raises at one of them."""

    class Steps(list):
        fail_at = None

        def __call__(self, python, arguments, step):
            self.append(step)
            if self.fail_at and self.fail_at[0] in step:
                raise self.fail_at[1]

    def make(venv):
        (venv / "bin").mkdir(parents=True)
        (venv / "bin" / "python").touch()
        (venv / setup.UNFINISHED).touch()
        recorded.append("make")

    recorded = Steps()
    monkeypatch.setattr(setup, "pip", recorded)
    monkeypatch.setattr(setup, "make_environment", make)
    monkeypatch.setattr(common, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(setup, "venv_python", lambda venv: venv / "bin" / "python")
    return recorded


# -- Python


@pytest.mark.parametrize("version", [(3, 8, 1), (3, 10, 14)])
def test_an_old_python_is_told_which_one_is_needed(version):
    with pytest.raises(Problem) as caught:
        setup.check_python(version)
    text = plain_text(caught.value)
    assert f"Python {version[0]}.{version[1]} is too old" in text and "3.11" in text and "PYTHON=" in text


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 14, 2)])
def test_a_python_that_is_new_enough_is_taken(version):
    setup.check_python(version)


def test_an_old_python_hands_over_to_a_newer_one_on_the_path(monkeypatch):
    calls = []
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    monkeypatch.setattr(setup, "newer_python", lambda: "/usr/bin/python3.12")
    monkeypatch.setattr(
        setup.subprocess, "run", lambda command, **_: calls.append(command) or subprocess.CompletedProcess(command, 0)
    )
    assert setup.main([]) == 0
    assert calls == [["/usr/bin/python3.12", "-m", "tools.setup"]]


def test_the_entry_can_be_read_by_an_old_python():
    """The sentence about an old Python must come from it, so the files it reads hold no newer grammar."""
    import ast

    for name in ("__init__", "common", "setup"):
        ast.parse((ROOT / "tools" / f"{name}.py").read_text(), feature_version=(3, 8))


@pytest.mark.parametrize("name", ["__init__", "start"])
def test_the_first_file_can_be_read_by_any_python(name):
    """No grammar that came after Python 2.7 and 3.0: no f-strings, no annotations, no underscores in numbers."""
    import ast

    text = (ROOT / "tools" / f"{name}.py").read_text()
    nodes = list(ast.walk(ast.parse(text, feature_version=(3, 4))))
    assert not [n for n in nodes if isinstance(n, ast.JoinedStr | ast.AnnAssign) or getattr(n, "returns", None)]
    assert "__future__" not in text


def test_a_very_old_python_is_told_which_one_is_needed(monkeypatch):
    import runpy

    monkeypatch.setattr(sys, "version_info", (3, 6, 8))
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "tools" / "start.py"))
    assert str(caught.value).startswith("error: Python 3.6 is too old: the project needs Python 3.11 or newer")


# -- once


def test_a_second_call_does_nothing(steps, tmp_path):
    assert setup.ensure(tmp_path / "venv") is True
    done = list(steps)
    assert setup.ensure(tmp_path / "venv") is False
    assert list(steps) == done and done[0] == "make"


def test_a_second_call_imports_nothing_that_is_installed():
    """So it takes a moment: every `make` begins with it."""
    command = [sys.executable, "-X", "importtime", "-m", "tools.start"]
    for _ in range(2):  # the first may have something to do
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")][1:]
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    at_start = {name for name in loaded if name.startswith(("__editable__", "_distutils_hack"))}  # of any Python here
    assert "tools" in loaded and not loaded & packages_distributions().keys() - at_start


def test_other_pins_are_installed_into_the_same_environment(steps, tmp_path, monkeypatch):
    setup.ensure(tmp_path / "venv")
    steps.clear()
    monkeypatch.setattr(setup, "RECIPE", setup.RECIPE + 1)
    assert setup.ensure(tmp_path / "venv") is True
    assert "make" not in steps and len(steps) == 3


def test_an_environment_that_was_made_by_hand_is_completed_not_replaced(steps, tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("kept")
    assert setup.ensure(tmp_path / "venv") is True
    assert python.read_text() == "kept" and "make" not in steps


def test_an_environment_of_a_moved_folder_is_made_anew(steps, tmp_path):
    venv = tmp_path / "venv"
    setup.ensure(venv)
    stamp = json.loads((venv / setup.STAMP).read_text())
    (venv / setup.STAMP).write_text(json.dumps({**stamp, "root": "elsewhere", "fingerprint": "old"}))
    (venv / "stale").touch()
    steps.clear()
    setup.ensure(venv)
    assert steps[0] == "make" and not (venv / "stale").exists()


# -- failures leave nothing half written


@pytest.mark.parametrize(
    "failure",
    [Problem("no network."), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")],
    ids=["problem", "interrupt", "full disk"],
)
def test_an_environment_that_could_not_be_finished_is_removed(steps, tmp_path, failure):
    steps.fail_at = ("two packages", failure)
    with pytest.raises((Problem, KeyboardInterrupt)) as caught:
        setup.ensure(tmp_path / "venv")
    assert not (tmp_path / "venv").exists()
    if isinstance(failure, OSError):
        assert "disk is full" in plain_text(caught.value)


def test_an_older_environment_survives_a_failed_update(steps, tmp_path, monkeypatch):
    setup.ensure(tmp_path / "venv")
    monkeypatch.setattr(setup, "RECIPE", setup.RECIPE + 1)
    steps.fail_at = ("pinned", Problem("no network."))
    with pytest.raises(Problem):
        setup.ensure(tmp_path / "venv")
    assert (tmp_path / "venv" / "bin" / "python").exists()
    steps.fail_at = None
    assert setup.ensure(tmp_path / "venv") is True  # and the next call tries again


def test_an_environment_left_by_a_killed_set_up_is_made_anew(steps, tmp_path):
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").touch()
    (venv / setup.UNFINISHED).touch()
    (venv / "half").touch()
    setup.ensure(venv)
    assert steps[0] == "make" and not (venv / "half").exists()
    assert not (venv / setup.UNFINISHED).exists()


def test_a_nearly_full_disk_is_said_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5e8})())
    with pytest.raises(Problem) as caught:
        setup.make_environment(tmp_path / "venv")
    text = plain_text(caught.value)
    assert "0.5 GB are free" in text and "3 GB" in text
    assert not (tmp_path / "venv").exists()


# -- what pip says, in one sentence


@pytest.fixture
def dead_index(monkeypatch):
    """No package index can be reached: the only one is a closed port of this machine."""
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "2")


def test_without_a_network_it_says_so(dead_index, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "CACHE", tmp_path / "cache")
    with pytest.raises(Problem) as caught:
        setup.pip(Path(sys.executable), ["download", "-d", str(tmp_path / "out"), "no-such-thing==1"], "Fetching")
    text = plain_text(caught.value)
    assert "could not be reached" in text and "network" in text
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["pip.log"]


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n", "disk is full"),
        (
            "ERROR: No matching distribution found for torch==2.13.0\n",
            "has no torch==2.13.0 for Python",
        ),
        (
            "ERROR: HTTPSConnectionPool(host='a'): Read timed out.\n",
            "could not be reached; check the network",
        ),
        ("ERROR: x\n        Expected sha256 aa\n             Got        bb\n", "sha256 bb instead of the expected aa"),
        ("  error: subprocess-exited-with-error\n", "pip failed (error: subprocess-exited-with-error)"),
        ("", "pip failed (without a word)"),
    ],
)
def test_what_pip_says_becomes_one_sentence(output, said):
    assert said in plain_text(setup.explain_pip(output, "Installing"))


def test_pip_keeps_no_cache_and_writes_no_temporary_file_outside_the_project(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CACHE_DIR", "/somewhere")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    env = setup.pip_environment(tmp_path)
    assert env["PIP_NO_CACHE_DIR"] == "1" and env["TMPDIR"] == str(tmp_path)
    assert "PIP_CACHE_DIR" not in env and "PYTHONPATH" not in env


# -- the cure for torchaudio


def fake_torch(venv: Path, **build: object) -> Path:
    packages = venv / "lib" / "python3.11" / "site-packages"
    (packages / "torch").mkdir(parents=True)
    lines = [f"{name}: Optional[str] = {value!r}" for name, value in {"cuda": None, "hip": None, **build}.items()]
    (packages / "torch" / "version.py").write_text("__version__ = '2.13.0'\n" + "\n".join(lines))
    library = packages / "torchaudio" / "lib" / "libtorchaudio.so"
    library.parent.mkdir(parents=True)
    library.touch()
    return library


def test_beside_a_cpu_torch_the_compiled_parts_of_torchaudio_go(tmp_path):
    library = fake_torch(tmp_path)
    assert setup.cure_torchaudio(tmp_path) == 1
    assert not library.exists() and library.parent.exists()


@pytest.mark.parametrize("build", [{"cuda": "13.0"}, {"hip": "7.0"}, {"xpu": "2026"}])
def test_beside_an_accelerator_s_torch_torchaudio_is_left_alone(tmp_path, build):
    library = fake_torch(tmp_path, **build)
    assert setup.cure_torchaudio(tmp_path) == 0
    assert library.exists()


@pytest.mark.parametrize(
    ("build", "theirs", "cured"), [({}, "+cu130", 1), ({}, "+cpu", 0), ({"cuda": "13"}, "+cu130", 0)]
)
def test_beside_a_cpu_torch_a_torchvision_for_cuda_declares_its_operators_itself(tmp_path, build, theirs, cured):
    folder = fake_torch(tmp_path, **build).parents[2] / "torchvision"
    folder.mkdir()
    (folder / "version.py").write_text(f"__version__ = '0.28.0{theirs}'\n")
    (folder / "extension.py").write_text("# theirs\n")
    assert setup.cure_torchvision(tmp_path) == cured
    assert setup.cure_torchvision(tmp_path) == 0  # once is enough
    text = (folder / "extension.py").read_text()
    assert text == "# theirs\n" + cured * setup.TORCHVISION_CURE and len(list(folder.iterdir())) == 2


def test_in_this_environment_diffusers_may_be_imported_first():
    code = "import gc\ngc.disable()\nfrom diffusers import StableDiffusionXLPipeline\nimport lcm_lookahead.sdxl"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_this_environment_s_torch_is_read_as_torch_itself_says():
    import torch

    assert common.cpu_torch(Path(sys.prefix)) == (torch.version.cuda is None and torch.version.hip is None)

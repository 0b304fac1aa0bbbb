"""`python -m tools.setup`: make or complete the project's environment in `.venv`. Standard library alone.

The environment is stamped with a hash of everything it is made from, so a second call does nothing. What goes
wrong is said in one sentence, and an environment that this call began is removed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path

from .common import (
    CACHE,
    ROOT,
    VENV,
    Problem,
    Stopwatch,
    cpu_torch,
    disk_full,
    full_disk_sentence,
    one_at_a_time,
    run_main,
    say,
    site_packages,
    venv_python,
)

OLDEST_PYTHON = (3, 11)
NEEDED_BYTES = 3_000_000_000
RECIPE = 2  # raise it when the steps below change in a way that an existing environment needs
STAMP = "lookahead-setup.json"
UNFINISHED = "lookahead-unfinished"
#: What pip passes on from its HTTP client when there is no connection, or when it breaks
UNREACHABLE = re.compile("Max retries exceeded|ConnectionError|Connection (refused|reset|broken)|timed out", re.I)


def check_python(version: tuple[int, ...]) -> None:
    """Raise a Problem when this Python is older than the pinned packages allow."""
    if tuple(version[:2]) < OLDEST_PYTHON:
        raise Problem(
            f"Python {version[0]}.{version[1]} is too old: the project needs Python {OLDEST_PYTHON[0]}."
            f"{OLDEST_PYTHON[1]} or newer; install one and call `make PYTHON=/path/to/python3.11 ...`."
        )


def newer_python() -> str | None:
    """The path of a Python that is new enough, if one lies on the PATH under its own name."""
    for minor in (12, 11, 13):
        found = shutil.which(f"python3.{minor}")
        if found and subprocess.run([found, "-c", "import ensurepip, venv"], capture_output=True).returncode == 0:
            return found
    return None


def fingerprint(root: Path = ROOT) -> str:
    """A hash of all that the environment is made from, the folder's own path included (scripts in it hold it)."""
    digest = hashlib.sha256(f"{RECIPE} {platform.machine()} {root}".encode())
    for name in ("tools/pins.txt", "tools/pins_alone.txt", "pyproject.toml", "requirements.txt"):
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def read_stamp(venv: Path) -> dict[str, str]:
    """Reads what the stamp in an environment says; empty without one."""
    try:
        return json.loads((venv / STAMP).read_text())
    except (OSError, ValueError):
        return {}


def explain_pip(output: str, step: str) -> Problem:
    """One sentence for what pip's output complains about."""
    if re.search("No space left on device|Disk quota exceeded", output):
        return Problem(full_disk_sentence())
    if differ := re.search(r"Expected sha256 (\w+)\s+Got\s+(\w+)", output):
        return Problem(
            f"{step}: the downloaded file has the sha256 {differ[2]} instead of the expected {differ[1]}; it was "
            f"thrown away: try again, and if it stays so, the package index serves another file than the tested one."
        )
    missing = re.search(r"No matching distribution found for (\S+)", output)
    # Without a connection pip knows of no version at all; where it is told not to try again, it says nothing else.
    if UNREACHABLE.search(output) or (missing and "(from versions: none)" in output):
        absent = f", or has no {missing[1]} at all" if missing else ""
        return Problem(
            f"{step}: the package index could not be reached{absent}; check the network and pip's settings "
            f"(`pip config list`), then try again."
        )
    if missing:
        return Problem(
            f"{step}: the package index has no {missing[1]} for Python {platform.python_version()} on "
            f"{platform.system()} {platform.machine()}; check pip's settings (`pip config list`) or try "
            f"another Python ({OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer)."
        )
    errors = [line.strip() for line in output.splitlines() if "error" in line.lower()]
    last = errors[-1] if errors else "without a word"
    return Problem(f"{step}: pip failed ({last}); all it said is in {CACHE / 'pip.log'}.")


def pip_environment(temporary: Path) -> dict[str, str]:
    """The environment pip runs in: the user's own index settings, but nothing that points it elsewhere on disk."""
    drop = {
        "PYTHONPATH",
        "PYTHONHOME",
        "PIP_TARGET",
        "PIP_PREFIX",
        "PIP_USER",
        "PIP_ROOT",
        "PIP_REQUIRE_VIRTUALENV",
        "PIP_CACHE_DIR",
    }
    env = {key: value for key, value in os.environ.items() if key not in drop}
    env.update(
        PIP_NO_CACHE_DIR="1",
        PIP_NO_INPUT="1",
        PIP_DISABLE_PIP_VERSION_CHECK="1",
        PIP_ROOT_USER_ACTION="ignore",
        TMPDIR=str(temporary),
        TEMP=str(temporary),
    )
    env.setdefault("PIP_RETRIES", "2")
    return env


def pip(python: Path, arguments: list[str], step: str) -> None:
    """Run pip quietly under one line of progress, renewed while it takes long; a Problem says what failed."""
    temporary = CACHE / f"pip-{os.getpid()}"
    temporary.mkdir(parents=True, exist_ok=True)
    watch, lines, doing = Stopwatch(), deque(maxlen=400), [""]
    say(f"{step} ...")
    try:
        command = [str(python), "-m", "pip", *arguments, "--progress-bar", "off"]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=ROOT,
            env=pip_environment(temporary),
        )

        def read() -> None:
            for line in process.stdout:
                lines.append(line)
                word = re.match(r"\s*(Collecting|Downloading|Installing)\s+(\S+)", line)
                if word:
                    name = "packages" if word.group(2) == "collected" else word.group(2).rsplit("/", 1)[-1]
                    doing[0] = f"{word.group(1).lower()} {name}"

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            while True:
                try:
                    status = process.wait(timeout=15)
                    break
                except subprocess.TimeoutExpired:
                    say(f"  {watch.seconds:.0f} s: {doing[0]}")
        except BaseException:
            process.terminate()
            process.wait()
            raise
        reader.join(timeout=5)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if status:
        (CACHE / "pip.log").write_text("".join(lines))
        raise explain_pip("".join(lines), step)
    say(f"{step}: done in {watch.seconds:.0f} s")


def make_environment(venv: Path) -> None:
    """An empty virtual environment, marked as unfinished until the set-up has ended well."""
    free = shutil.disk_usage(venv.parent).free
    if free < NEEDED_BYTES:
        raise Problem(
            f"The disk is nearly full: {free / 1e9:.1f} GB are free at {venv.parent}, and the environment "
            f"needs about {NEEDED_BYTES / 1e9:.0f} GB; free some space, then try again."
        )
    venv.mkdir()
    (venv / UNFINISHED).touch()
    done = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True)
    if done.returncode:
        text = done.stdout + done.stderr
        if "No space left" in text:
            raise Problem(full_disk_sentence(venv))
        raise Problem(
            f"{sys.executable} cannot make a virtual environment: install its venv module (on Debian and "
            f"Ubuntu: `apt install python3-venv`), then try again."
        )


def cure_torchaudio(venv: Path) -> int:
    """Delete torchaudio's compiled parts beside a torch for CPUs only, and say how many there were.

    The registry's torchaudio is built for CUDA: its import fails beside a CPU torch, and without the compiled parts
    it is plain Python that works. Nothing is touched where torch has an accelerator build.
    """
    if not cpu_torch(venv):
        return 0
    libraries = [library for folder in site_packages(venv) for library in folder.glob("torchaudio/lib/*.so")]
    for library in libraries:
        library.unlink()
    return len(libraries)


TORCHVISION_CURE = """

# Added by LCM-Lookahead's set-up: this build is for CUDA, and its library cannot be loaded beside a torch for CPUs.
if not _has_ops() and not hasattr(torch.ops.torchvision, "nms"):
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def cure_torchvision(venv: Path) -> int:
    """Let torchvision's own module declare what its compiled part would, beside a torch for CPUs only; say how many
    were cured.

    The registry's torchvision is built for CUDA too, and without those two operators `import diffusers` fails. (Where
    this project is installed otherwise, `sdxl/torchvision_cure.py` does the same, if it is imported first.)
    """
    if not cpu_torch(venv):
        return 0
    cured = 0
    for folder in site_packages(venv):
        version, path = folder / "torchvision" / "version.py", folder / "torchvision" / "extension.py"
        if path.is_file() and "+cu" in version.read_text() and TORCHVISION_CURE not in (text := path.read_text()):
            new = path.with_name("extension.py.new")
            new.write_text(text + TORCHVISION_CURE)
            os.replace(new, path)
            cured += 1
    return cured


def ensure(venv: Path = VENV) -> bool:
    """Bring the environment to what this checkout needs; returns whether anything had to be done."""
    wanted = fingerprint()
    if read_stamp(venv).get("fingerprint") == wanted:
        return False
    with one_at_a_time("setup"):
        stamp = read_stamp(venv)
        if stamp.get("fingerprint") == wanted:  # another call has done it while this one waited
            return False
        moved = stamp.get("root", str(ROOT)) != str(ROOT)
        if venv.exists() and (moved or (venv / UNFINISHED).exists() or not venv_python(venv).exists()):
            say("Removing an environment that is unfinished or was made for another folder ...")
            shutil.rmtree(venv)
        began = not venv.exists()
        try:
            install(venv, wanted, began)
        except BaseException as error:
            if began:
                shutil.rmtree(venv, ignore_errors=True)
            if disk_full(error):
                raise Problem(full_disk_sentence(venv)) from error
            raise
    return True


def install(venv: Path, wanted: str, began: bool) -> None:
    """The steps of the set-up, in order; the stamp comes last."""
    watch = Stopwatch()
    if began:
        say("Setting up (once; about two minutes and 2 GB, all inside this folder)")
        make_environment(venv)
    python = venv_python(venv)
    # Compiling all of torch and transformers takes longer than what is ever imported of them.
    quick = ["install", "--no-compile"]
    pip(python, [*quick, "-r", str(ROOT / "tools/pins.txt")], "Installing the pinned packages")
    pip(python, [*quick, "--no-deps", "-r", str(ROOT / "tools/pins_alone.txt")], "Installing two packages alone")
    cure_torchaudio(venv)
    cure_torchvision(venv)
    pip(python, [*quick, "--no-deps", "--no-build-isolation", "-e", str(ROOT)], "Installing this package (editable)")
    new = venv / (STAMP + ".new")
    new.write_text(json.dumps({"fingerprint": wanted, "root": str(ROOT), "python": platform.python_version()}))
    os.replace(new, venv / STAMP)
    (venv / UNFINISHED).unlink(missing_ok=True)
    say(f"The environment is ready ({watch.seconds:.0f} s)")


def main(arguments: list[str]) -> int:
    """Entry point of `make setup`."""
    if arguments:
        raise Problem(f"unknown argument {arguments[0]!r}: `make setup` takes none")
    try:
        check_python(sys.version_info)
    except Problem:
        newer = newer_python()
        if newer is None:
            raise
        return subprocess.run([newer, "-m", "tools.setup"], cwd=ROOT).returncode
    ensure()
    return 0


if __name__ == "__main__":
    run_main(main)

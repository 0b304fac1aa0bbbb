"""A real ComfyUI in a process of its own: started on a free port of 127.0.0.1, watched, and always stopped.

with Host() as host:                      # the pack alone, with no model
    result = host.run(api_prompt, progress=print)
    print(result.status, result.images)
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ..tools.common import CACHE, ROOT, VENV, Problem, Stopwatch, cpu_torch, say
from .client import Client
from .fetch import environment_python, fetch

#: Custom nodes that stand in for what a machine without a GPU lacks
EXTENSIONS = (ROOT / "host" / "custom_nodes" / "cpu_torchvision",)
#: One that every host has, whatever its extensions are: it saves time alone
FROZEN_LIBRARIES = ROOT / "host" / "custom_nodes" / "frozen_libraries"


@functools.lru_cache(maxsize=1)
def has_gpu() -> bool:
    """Says whether the host can run on an accelerator. Asks torch only where its build could have one."""
    if VENV.exists() and cpu_torch():
        return False
    code = "import torch, sys; sys.exit(0 if torch.cuda.is_available() or torch.backends.mps.is_available() else 1)"
    return subprocess.run([environment_python(), "-c", code], capture_output=True).returncode == 0


def link(source: Path, target: Path) -> None:
    """A link at `target` to a file or folder, replacing an older link; a copy where links are not allowed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink() or target.is_file():
        target.unlink()
    try:
        target.symlink_to(source.resolve(), target_is_directory=source.is_dir())
    except OSError:
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)


def free_port() -> int:
    """A port of 127.0.0.1 that the system has free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_port(port: int) -> int:
    """The port itself, if it is free; else a Problem."""
    with socket.socket() as probe:
        # As the host does: a port that an ended server used a moment ago counts as free.
        if os.name == "posix":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise Problem(
                f"Port {port} of 127.0.0.1 cannot be used ({getattr(error, 'strerror', None) or error}): "
                f"give another, or none to let the system choose."
            ) from None
    return port


def die_with_parent() -> None:
    """Have Linux end a child process when its parent is killed, so that no server is ever left behind."""
    with contextlib.suppress(Exception):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


class Host(Client):
    """A real ComfyUI in its own process, with a base directory of its own, and the client of it; a context manager.

    Args:
        version: a supported version; default: what COMFYUI_DIR or HOST_VERSION says, else 0.30.0.
        directory: the ComfyUI tree itself, instead of a version.
        base: base directory (custom_nodes, models, input, output, user, temp); default: a temporary one under
            `.cache`, removed at the end.
        port: a port of 127.0.0.1; default: one the system chooses.
        pack: folder that is linked as a custom node; None for none.
        pack_name: the folder name the pack gets in custom_nodes.
        extensions: further custom node folders to link; default: EXTENSIONS.
        prepare: called with the base directory before the server starts, to put models and pictures into it.
        front_end: folder of a web page to serve (`page.front_end()` fetches ComfyUI's); default: an empty page.
        arguments: further command-line arguments for main.py.
        environment: further environment variables.
        start_timeout: seconds to wait for the server.
        announce: whether to print a line when it starts and is ready.
    """

    def __init__(
        self,
        version: str | None = None,
        *,
        directory: Path | None = None,
        base: Path | None = None,
        port: int | None = None,
        pack: Path | None = ROOT,
        pack_name: str = "comfyui-lcm-lookahead",
        extensions: Iterable[Path] | None = None,
        prepare: Callable[[Path], None] | None = None,
        front_end: Path | None = None,
        arguments: Iterable[str] = (),
        environment: Mapping[str, str] | None = None,
        start_timeout: float = 300,
        announce: bool = True,
    ) -> None:
        self.directory = Path(directory) if directory else fetch(version)
        super().__init__("", Path(base) if base else None)  # both are known once it has started
        self._temporary = base is None
        self.port = check_port(port) if port else None
        self.pack, self.pack_name = pack, pack_name
        self.extensions = list(extensions if extensions is not None else EXTENSIONS)
        self.prepare = prepare
        self.front_end = front_end
        self.arguments = [str(a) for a in arguments]
        self.environment = dict(environment or {})
        self.start_timeout = start_timeout
        self.announce = announce
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> Host:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def log(self) -> str:
        """All that the server has printed so far."""
        try:
            return (self.base / "host.log").read_text(errors="replace")
        except (OSError, TypeError):
            return ""

    def _fill_base(self) -> None:
        if self.base is None:
            CACHE.mkdir(exist_ok=True)
            self.base = Path(tempfile.mkdtemp(prefix="host-", dir=CACHE))
        for name in ("custom_nodes", "models", "input", "output", "user", "temp", "web"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        (self.base / "web" / "index.html").write_text("<!doctype html><title>ComfyUI without its page</title>\n")
        if self.pack is not None:
            link(Path(self.pack), self.base / "custom_nodes" / self.pack_name)
        for extension in (*self.extensions, FROZEN_LIBRARIES):
            link(Path(extension), self.base / "custom_nodes" / Path(extension).name)
        if self.prepare is not None:
            self.prepare(self.base)

    def _command(self) -> list[str]:
        command = [
            str(environment_python()),
            "main.py",
            "--listen",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--base-directory",
            str(self.base),
            "--front-end-root",
            str(self.front_end or self.base / "web"),
            "--database-url",
            "sqlite:///:memory:",
            "--disable-api-nodes",
        ]
        if not has_gpu():
            command.append("--cpu")
        return command + self.arguments

    def _environment(self) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "PYTEST_CURRENT_TEST")}
        env.update(DO_NOT_TRACK="1", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", PYTHONUNBUFFERED="1")
        if not has_gpu():
            # With two threads on two busy cores, small prompts take 10 times as long.
            env.setdefault("OMP_NUM_THREADS", "1")
        return env | self.environment

    def start(self) -> Host:
        """Start the server and wait until it answers; a Problem with its last words when it does not."""
        try:
            self._fill_base()
            if self.port is None:
                self.port = free_port()
            self.url = f"http://127.0.0.1:{self.port}"
            watch = Stopwatch()
            if self.announce:
                say(f"Starting ComfyUI ({self.directory.name}) on {self.url} ...")
            with open(self.base / "host.log", "wb") as log:
                self.process = subprocess.Popen(
                    self._command(),
                    cwd=self.directory,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=self._environment(),
                    start_new_session=True,
                    preexec_fn=die_with_parent if sys.platform == "linux" else None,
                )
            atexit.register(self.stop)
            self._wait_until_ready(watch)
        except BaseException:
            self.stop()
            raise
        if self.announce:
            say(f"ComfyUI is ready after {watch.seconds:.0f} s")
        return self

    def _wait_until_ready(self, watch: Stopwatch) -> None:
        next_notice = 15.0
        while True:
            self.check_alive()
            with contextlib.suppress(OSError, ValueError):
                self._object_info = self.call("/object_info", timeout=30)
                return
            if watch.seconds > self.start_timeout:
                raise Problem(
                    f"ComfyUI did not answer on {self.url} within {self.start_timeout:.0f} s; its last words:"
                    f"\n{self.last_words()}"
                )
            if self.announce and watch.seconds > next_notice:
                say(f"  {watch.seconds:.0f} s: still starting")
                next_notice += 15
            time.sleep(0.1)

    def last_words(self, lines: int = 12) -> str:
        """The last lines of the server's log."""
        return "\n".join("    " + line for line in self.log.splitlines()[-lines:])

    def check_alive(self) -> None:
        """Raise a Problem when the server process has ended."""
        if self.process is None:
            raise Problem("this Host is not running: use it as `with Host() as host:` or call start().")
        status = self.process.poll()
        if status is not None:
            raise Problem(f"ComfyUI ended by itself with exit status {status}; its last words:\n{self.last_words()}")

    def processor_seconds(self) -> float:
        """The processor time that the server has taken so far, which says more than a clock on a busy machine."""
        import psutil  # ComfyUI's environment has it; who only starts a host needs none

        self.check_alive()
        assert self.process is not None
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def stop(self) -> None:
        """End the server, by its own process id, and remove a temporary base directory. Safe to call twice."""
        process, self.process = self.process, None
        atexit.unregister(self.stop)
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._temporary and self.base is not None:
            shutil.rmtree(self.base, ignore_errors=True)
            self.base = None

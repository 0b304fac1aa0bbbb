"""Where shards lie: a folder of this machine, or any address that fsspec knows ("s3://bucket/people", "http://...").

A file of a store elsewhere is copied to a folder here, whole, when something of it is first read, and stays there; what
is written is made here first. A store that does not answer is asked again twice; then an error says so, and since
shards are whole or not there, the same command goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from ...lookahead.files.atomic import atomic, first_line
from ...lookahead.files.tensors import sha256
from .pairs import DataError

PAUSES = (1.0, 5.0)  # seconds before a store elsewhere is asked again
_LOCK, _DAY = ".lock", 86400.0
_ENDS = 65536  # bytes at either end of a file that tell at once whether an index belongs to it
T = TypeVar("T")


class StoreError(DataError):
    """Says what is wrong with a place where shards lie, in one sentence for the user."""


class Store:
    """Files of one folder. cache: where copies of files that lie elsewhere are kept.

    It can be sent to other processes: nothing is held open.
    """

    def __init__(self, address: str | Path, cache: Path | None = None):
        self.address = str(address).rstrip("/")
        self.remote = is_remote(address)
        self.folder = (cache or Path(f"{Path(self.address).name}.cache")) if self.remote else Path(address)

    def __str__(self) -> str:
        return self.address

    def at(self, name: str) -> str:
        """Names a file in messages and to fsspec."""
        return f"{self.address}/{name}"

    def names(self) -> dict[str, int | None]:
        """The files by name, with their bytes where the store says them. Empty where there is no such folder."""
        if not self.remote:
            return (
                {p.name: p.stat().st_size for p in self.folder.iterdir() if p.is_file()} if self.folder.is_dir() else {}
            )
        try:
            listed = self._asked(lambda fs, root: fs.ls(root, detail=True, refresh=True))
        except FileNotFoundError:
            return {}
        return {str(one["name"]).rstrip("/").rpartition("/")[2]: one.get("size") for one in listed}

    def exists(self, name: str) -> bool:
        if not self.remote:
            return (self.folder / name).is_file()
        return bool(self._asked(lambda fs, root: fs.exists(f"{root}/{name}")))

    def read(self, names: Sequence[str]) -> list[bytes]:
        """Whole small files, all at once. Raises FileNotFoundError for one that is not there, or StoreError."""
        if not self.remote:
            return [(self.folder / name).read_bytes() for name in names]
        if not names:
            return []
        found = self._asked(lambda fs, root: fs.cat([f"{root}/{name}" for name in names]))
        by_name = {path.rpartition("/")[2]: content for path, content in found.items()}
        return [by_name[name] for name in names]

    def piece(self, name: str, offset: int, size: int, digest: str | None = None) -> bytes:
        """Some bytes of a file, fewer where it ends before. digest: SHA-256 of the whole file, to check a copy with."""
        with self.copy(name, digest).open("rb") as file:  # anew each time: nothing that a forked worker could share
            file.seek(offset)
            return file.read(size)

    def copy(self, name: str, digest: str | None = None) -> Path:
        """The file on this machine. Raises StoreError where it does not arrive whole, with this digest."""
        if not self.remote:
            return self.folder / name
        path = self.folder / (f"{digest[:12]}-{name}" if digest else name)
        if path.is_file():
            return path
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _alone(path):
                if not path.is_file():  # else another process has brought it meanwhile
                    with atomic(path) as part:
                        self._asked(lambda fs, root: fs.get_file(f"{root}/{name}", str(part)))
                        if digest is not None and sha256(part) != digest:
                            raise StoreError(
                                f"{self.at(name)} is not what its index says (another hash): write it there anew."
                            )
        except FileNotFoundError:
            raise StoreError(f"{self.at(name)} is gone: write it there again.") from None
        except OSError as error:
            raise StoreError(
                f"{self.at(name)} cannot be kept in {self.folder} ({error.strerror or first_line(error)}): free some "
                "space, or set data.cache to another folder."
            ) from error
        return path

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """The block writes to the yielded path; when it ends without an error, the file takes its place, whole."""
        if self.remote:
            with tempfile.TemporaryDirectory(prefix="shard-") as folder:
                path = Path(folder) / name
                yield path
                self._asked(lambda fs, root: _put(fs, root, path))
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as until_it_is_there, atomic(self.folder / name) as part:
            until_it_is_there.enter_context(_alive(part))
            yield part
            with part.open("rb") as file:
                os.fsync(file.fileno())
        for kind in (".part", _LOCK):
            for left in self.folder.glob(f".{name}.*{kind}"):
                _remove_if_dead(left.with_suffix(".part"))

    def remove(self, name: str) -> None:
        if not self.remote:
            (self.folder / name).unlink(missing_ok=True)
        elif self.exists(name):
            self._asked(lambda fs, root: fs.rm_file(f"{root}/{name}"))

    def ends(self, name: str) -> tuple[int, str]:
        """Size of a file, and the hash of its first and last bytes. Raises FileNotFoundError or StoreError."""
        if not self.remote:
            return ends(self.folder / name)

        def ask(fs: Any, root: str) -> tuple[int, str]:
            path = f"{root}/{name}"
            size = int(fs.info(path)["size"])
            last = fs.cat_file(path, max(0, size - _ENDS), size)
            return size, hashlib.sha256(fs.cat_file(path, 0, min(size, _ENDS)) + last).hexdigest()

        return self._asked(ask)

    def _asked(self, ask: Callable[[Any, str], T]) -> T:
        """What a store elsewhere answers. Every kind of store has errors of its own, so all are taken for its."""
        from fsspec.core import url_to_fs

        for pause in (*PAUSES, None):
            try:
                return ask(*url_to_fs(self.address))
            except (FileNotFoundError, StoreError):
                raise
            except ImportError as error:
                raise StoreError(f"{self.address} cannot be reached: {first_line(error)}.") from error
            except Exception as error:
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # here, not there
                    raise
                if pause is None:
                    why = first_line(error)
                    raise StoreError(
                        f"{self.address} does not answer ({why}): see that it and the network are there; the same "
                        "command goes on where it stopped."
                    ) from error
                time.sleep(pause)
        raise AssertionError("unreachable")


def is_remote(address: str | Path) -> bool:
    """Says whether an address is none of a folder of this machine."""
    return "://" in str(address) and not str(address).startswith("file://")


def _put(fs: Any, root: str, path: Path) -> None:
    fs.makedirs(root, exist_ok=True)
    fs.put_file(str(path), f"{root}/{path.name}")


def ends(path: Path) -> tuple[int, str]:
    """Size of a file, and the hash of its first and last bytes."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(_ENDS)
        file.seek(max(0, size - _ENDS))
        return size, hashlib.sha256(head + file.read(_ENDS)).hexdigest()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time brings a file; a lock of one that was killed is open again."""
    with _locked(path.with_name(f".{path.name}{_LOCK}")):
        yield


@contextmanager
def _alive(part: Path) -> Iterator[None]:
    """While a process writes a part, others see by a lock beside it that it lives. (A lock of the part itself would
    keep its own writer out of some network folders.)"""
    lock = part.with_suffix(_LOCK)
    try:
        with _locked(lock):
            yield
    finally:
        lock.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which is made where it is not there. Where there are no such locks (Windows, some
    network folders) it does nothing."""
    file = path.open("ab")
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
            while not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.close()  # between opening and locking it somebody took it for a dead process's
                file = path.open("ab")
                fcntl.flock(file, fcntl.LOCK_EX)
    with file:
        yield


def _remove_if_dead(part: Path) -> None:
    """Take away what a killed process left half-written, but not what a living one is writing; where no lock tells
    which it is, what nobody has written to for a day."""
    lock = part.with_suffix(_LOCK)
    try:
        if lock.exists():
            with lock.open("r+b") as file:
                if fcntl is None:
                    raise OSError("no locks")
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    except OSError:
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime < _DAY:
                return
    with contextlib.suppress(OSError):
        part.unlink(missing_ok=True)
        lock.unlink(missing_ok=True)

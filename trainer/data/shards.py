"""Shards: people's pictures in tar files that the webdataset package writes and reads, one sample a person.

    shard-000000.tar         00000012.00.png, 00000012.01.png, ..., 00000012.json: pictures and what is known of them
    shard-000000.index.json  where each of them lies, and the hash of the tar; written last, so it says "finished"
    shard-000000.json        what was drawn and kept, for the report

A sample's JSON has `pictures`, a list in the order of the files, each with `file`, `caption` and `reference` (whether
it may be one); what else stands there is for its readers. The same samples give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...lookahead.files.atomic import atomic
from ...lookahead.files.tensors import sha256
from .pairs import DataError

FORMAT = "lookahead shard index 1"
_ENDS = 65536  # bytes at either end of a tar that tell at once whether an index belongs to it
_AGAIN = "run `lookahead generate` again with the same configuration, which makes what is missing"


class ShardError(DataError):
    """Says what is wrong with a shard or its index, in one sentence for the user."""


@dataclass(frozen=True)
class Sample:
    """One person: a key, the pictures by the name of their file ("00.png"), and what is known as plain values."""

    key: str
    pictures: Mapping[str, bytes]
    about: Mapping[str, Any]


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.tar"


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".index.json")


def side_path(shard: Path) -> Path:
    return shard.with_suffix(".json")


def times_path(shard: Path) -> Path:
    """Names the file of what is no part of the data set: how long it took."""
    return shard.with_suffix(".times.json")


def write_shard(shard: Path, samples: Iterable[Sample], side: Mapping[str, Any], content: str) -> None:
    """Write tar, side file and index, each whole or not at all. content: digest of the configuration.

    Raises ShardError, one sentence, where the disk is full or cannot be written.
    """
    from webdataset import TarWriter

    def tar(path: Path) -> None:
        with path.open("wb") as file:
            # Fixed times and owners, and values that are bytes already: nothing that differs from run to run.
            with TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as writer:
                for sample in samples:
                    about = json.dumps(sample.about, ensure_ascii=False).encode()
                    writer.write({"__key__": sample.key, **sample.pictures, "json": about})
            file.flush()
            os.fsync(file.fileno())

    try:
        shard.parent.mkdir(parents=True, exist_ok=True)
        index_path(shard).unlink(missing_ok=True)  # of another tar, until the new one is there
        _whole(shard, tar)
        _whole(side_path(shard), lambda path: path.write_text(json.dumps(side, ensure_ascii=False, indent=1)))
        write_index(shard, content)
    except OSError as error:
        raise ShardError(
            f"{shard} cannot be written ({error.strerror}): free some space or name another folder; then {_AGAIN}."
        ) from error


def write_index(shard: Path, content: str) -> None:
    """Write the index of a tar that is there. Raises ShardError, one sentence, where it is no whole shard."""
    index = json.dumps(make_index(shard, content))
    _whole(index_path(shard), lambda path: path.write_text(index))


def make_index(shard: Path, content: str) -> dict[str, Any]:
    """The index of a tar: columns `samples` (a row a person) and `pictures`, in the order of the file.

    Raises ShardError, one sentence, where the tar is cut short or holds something else.
    """
    samples: dict[str, list[Any]] = {"key": [], "offset": [], "size": []}
    pictures: dict[str, list[Any]] = {"sample": [], "file": [], "offset": [], "size": [], "reference": []}
    try:
        with tarfile.open(shard) as tar:
            members = {member.name: member for member in tar}
            for name, member in members.items():
                key, _, rest = name.partition(".")
                if rest != "json":
                    continue
                file = tar.extractfile(member)
                if file is None:
                    raise ValueError(f"{name} is no file")
                about = json.load(file)
                for picture in about["pictures"]:
                    at = members[f"{key}.{picture['file']}"]
                    values = (len(samples["key"]), picture["file"], at.offset_data, at.size, int(picture["reference"]))
                    for column, value in zip(pictures.values(), values, strict=True):
                        column.append(value)
                for column, value in zip(samples.values(), (key, member.offset_data, member.size), strict=True):
                    column.append(value)
    except (tarfile.TarError, EOFError, KeyError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ShardError(f"{shard} is cut short or no shard of people ({why}): remove it, then {_AGAIN}.") from None
    size, ends = _ends(shard)
    about = {"format": FORMAT, "shard": shard.name, "bytes": size, "ends": ends, "sha256": sha256(shard)}
    return about | {"content": content, "samples": samples, "pictures": pictures}


def read_index(shard: Path, whole: bool = False) -> dict[str, Any]:
    """The index of a shard, which belongs to it. whole: compare the hash of the whole tar, not of its ends alone.

    Raises ShardError, one sentence, where either is missing, damaged or of another data set.
    """
    path = index_path(shard)
    try:
        index = json.loads(path.read_text())
        if index["format"] != FORMAT:
            raise ValueError(index["format"])
        size, ends = _ends(shard)
        lengths = {len(c) for c in index["samples"].values()}, {len(c) for c in index["pictures"].values()}
        if any(len(length) != 1 for length in lengths):
            raise ValueError("columns of different lengths")
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise ShardError(f"There is no {missing} in {shard.parent}, so the shard is not finished: {_AGAIN}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{path} is damaged or no index of a shard ({error}): remove it, then {_AGAIN}.") from None
    if size < index["bytes"]:
        raise ShardError(f"{shard} is cut short ({size} of {index['bytes']} bytes): remove its index, then {_AGAIN}.")
    if (size, ends) != (index["bytes"], index["ends"]) or index["shard"] != shard.name:
        raise ShardError(f"{path.name} does not belong to {shard} (hash or name differ): remove it, then {_AGAIN}.")
    if whole and sha256(shard) != index["sha256"]:
        raise ShardError(f"{shard} is damaged (its hash is not that of its index): remove its index, then {_AGAIN}.")
    return index


def finished(shard: Path, content: str) -> bool:
    """Says whether a shard of this content is there, whole. Raises ShardError where there is one of another content."""
    if not index_path(shard).is_file():
        return False
    try:
        index = read_index(shard)
    except ShardError:  # damaged: made again
        return False
    if index["content"] != content:
        raise ShardError(
            f"{shard} was made with another configuration or other models: name another folder, out=..., or remove it."
        )
    return True


class Shards:
    """A folder of shards, opened by their indexes alone.

    Pictures and samples are counted through all shards in the order of their names; `first[sample]` is the sample's
    first picture, and its pictures follow each other.
    """

    def __init__(self, folder: Path):
        """Raises ShardError, one sentence, where there is none, one is not finished or two data sets are mixed."""
        self.paths = sorted(folder.glob("shard-*.tar"))
        strays = {index_path(p).name for p in self.paths} ^ {p.name for p in folder.glob("shard-*.index.json")}
        if not self.paths or strays:
            what = f"{sorted(strays)[0]} has no counterpart" if strays else "there is no shard-*.tar"
            raise ShardError(f"{folder} is no whole folder of shards ({what}): {_AGAIN}.")
        columns: dict[str, list[np.ndarray]] = {}
        contents: dict[str, str] = {}
        hashes, samples = [], 0

        def add(name: str, values: Any, kind: type) -> None:
            columns.setdefault(name, []).append(np.asarray(values, dtype=kind))

        for number, path in enumerate(self.paths):
            index = read_index(path)
            contents.setdefault(index["content"], path.name)
            hashes.append(index["sha256"])
            theirs, pictures = index["samples"], index["pictures"]
            count = len(theirs["key"])
            add("key", theirs["key"], np.int64)
            add("sample_shard", [number] * count, np.int32)
            add("sample_offset", theirs["offset"], np.int64)
            add("sample_size", theirs["size"], np.int32)
            add("sample", np.asarray(pictures["sample"], np.int64) + samples, np.int64)
            add("offset", pictures["offset"], np.int64)
            add("size", pictures["size"], np.int32)
            add("reference", pictures["reference"], bool)
            samples += count
        if len(contents) > 1:
            one, other = list(contents.values())[:2]
            raise ShardError(f"{one} and {other} in {folder} are of two data sets: keep each in a folder of its own.")
        self.folder, self._columns = folder, {name: np.concatenate(parts) for name, parts in columns.items()}
        self.digest = hashlib.sha256("".join(hashes).encode()).hexdigest()
        self.sample_of: np.ndarray = self._columns["sample"]  # [pictures]
        self.reference: np.ndarray = self._columns["reference"]  # bool [pictures]
        self.keys: np.ndarray = self._columns["key"]  # [samples]
        self.first = np.searchsorted(self.sample_of, np.arange(samples + 1))  # [samples + 1]

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self.sample_of)

    def picture(self, number: int) -> bytes:
        """The file of a picture."""
        shard = self._columns["sample_shard"][self.sample_of[number]]
        return self._read(int(shard), int(self._columns["offset"][number]), int(self._columns["size"][number]))

    def about(self, sample: int) -> dict[str, Any]:
        """The JSON of a sample."""
        shard, offset, size = (int(self._columns[f"sample_{k}"][sample]) for k in ("shard", "offset", "size"))
        return json.loads(self._read(shard, offset, size))

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        path = self.paths[shard]
        try:
            with path.open("rb") as file:  # anew each time: nothing that a forked worker could share by mistake
                file.seek(offset)
                read = file.read(size)
        except OSError as error:
            raise ShardError(f"{path} cannot be read ({error.strerror}): see that its disk is there.") from error
        if len(read) != size:
            raise ShardError(f"{path} is cut short: remove its index, then {_AGAIN}.")
        return read


def _ends(path: Path) -> tuple[int, str]:
    """Size of a file, and the hash of its first and last bytes."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(_ENDS)
        file.seek(max(0, size - _ENDS))
        return size, hashlib.sha256(head + file.read(_ENDS)).hexdigest()


def _whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all, and remove what a run that was killed has left of it."""
    with atomic(path) as part:
        write(part)
    for left in path.parent.glob(f".{path.name}.*.part"):
        left.unlink(missing_ok=True)

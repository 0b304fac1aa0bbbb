"""Shards: people's pictures in tar files that the webdataset package writes and reads, one sample a person.

    shard-000000.tar         00000012.00.png, 00000012.01.png, ..., 00000012.json: pictures and what is known of them
    shard-000000.index.json  where each of them lies, and the hash of the tar; written last, so it says "finished"
    shard-000000.json        what was drawn and kept, for the report

A sample's JSON has `pictures`, a list in the order of the files, each with `file`, `caption` and `reference` (whether
it may be one); what else stands there is for its readers. The same samples give the same bytes. They lie in a `Store`.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .store import Store
from .tars import Kind, ShardError, index_name, make_index, members, read_index, read_indexes, write_index, write_tar

PEOPLE = Kind(
    "lookahead shard index 1",
    ("samples", "pictures"),
    "run `lookahead generate` again with the same configuration, which makes what is missing",
)


@dataclass(frozen=True)
class Sample:
    """One person: a key, the pictures by the name of their file ("00.png"), and what is known as plain values."""

    key: str
    pictures: Mapping[str, bytes]
    about: Mapping[str, Any]


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def side_name(shard: str) -> str:
    return shard.removesuffix(".tar") + ".json"


def times_name(shard: str) -> str:
    """Names the file of what is no part of the data set: how long it took."""
    return shard.removesuffix(".tar") + ".times.json"


@contextmanager
def said(store: Store, name: str) -> Iterator[None]:
    """The block writes a file of a shard; raises ShardError, one sentence, where it cannot."""
    try:
        yield
    except OSError as error:
        raise ShardError(
            f"{store.at(name)} cannot be written ({error.strerror}): free some space or name another folder; then "
            f"{PEOPLE.again}."
        ) from error


def write_shard(
    store: Store,
    shard: str,
    samples: Iterable[Sample],
    side: Mapping[str, Any],
    content: str,
    times: Callable[[], Mapping[str, Any]] | None = None,
) -> None:
    """Write tar, side file, times and index, each whole or not at all, and the index last: it says that all is there,
    so that a run that was killed before comes again, and takes away what it left half-written.

    content: digest of the configuration; times: how long it took until now, which is no part of the shard.
    Raises ShardError, one sentence, where the disk is full or cannot be written, or StoreError.
    """

    def files() -> Iterable[dict[str, Any]]:
        for sample in samples:
            about = json.dumps(sample.about, ensure_ascii=False).encode()
            yield {"__key__": sample.key, **sample.pictures, "json": about}

    with said(store, shard):
        store.remove(index_name(shard))  # of another tar, until the new one is there
        with store.writing(shard) as path:
            write_tar(path, files())
            index = shard_index(path, shard, content)
        with store.writing(side_name(shard)) as path:
            path.write_text(json.dumps(side, ensure_ascii=False, indent=1))
        if times is not None:
            with store.writing(times_name(shard)) as path:
                path.write_text(json.dumps(times()))
        write_index(store, shard, index)


def shard_index(path: Path, shard: str, content: str) -> dict[str, Any]:
    """The index of a tar: columns `samples` (a row a person) and `pictures`, in the order of the file.

    Raises ShardError, one sentence, where the tar is cut short or holds something else.
    """
    samples: dict[str, list[Any]] = {"key": [], "offset": [], "size": []}
    pictures: dict[str, list[Any]] = {"sample": [], "file": [], "offset": [], "size": [], "reference": []}
    with members(path, shard, PEOPLE) as (found, read):
        for name, member in found.items():
            key, _, rest = name.partition(".")
            if rest != "json":
                continue
            for picture in json.loads(read(member))["pictures"]:
                at = found[f"{key}.{picture['file']}"]
                values = (len(samples["key"]), picture["file"], at.offset_data, at.size, int(picture["reference"]))
                for column, value in zip(pictures.values(), values, strict=True):
                    column.append(value)
            for column, value in zip(samples.values(), (key, member.offset_data, member.size), strict=True):
                column.append(value)
    return make_index(path, shard, PEOPLE, content, {"samples": samples, "pictures": pictures})


def finished(store: Store, shard: str, content: str) -> bool:
    """Says whether a shard of this content is there, whole. Raises ShardError where there is one of another content."""
    if not store.exists(index_name(shard)):
        return False
    try:
        index = read_index(store, shard, PEOPLE)
    except ShardError:  # damaged: made again
        return False
    if index["content"] != content:
        raise ShardError(
            f"{store.at(shard)} was made with another configuration or other models: name another folder, out=..., or "
            "remove it."
        )
    return True


def shards_in(store: Store) -> list[str]:
    """Names the tars of people in a store, finished or not."""
    return sorted(name for name in store.names() if name.startswith("shard-") and name.endswith(".tar"))


class Shards:
    """All shards of a store, opened by their indexes alone.

    Pictures and samples are counted through all shards in the order of their names; `first[sample]` is the sample's
    first picture, and its pictures follow each other.
    """

    def __init__(self, store: Store):
        """Raises ShardError, one sentence, where there is none, one is not finished or two data sets are mixed."""
        self.store, self.names = store, shards_in(store)
        there = {name for name in store.names() if name.startswith("shard-") and name.endswith(".index.json")}
        strays = {index_name(name) for name in self.names} ^ there
        if not self.names or strays:
            what = f"{sorted(strays)[0]} has no counterpart" if strays else "there is no shard-*.tar"
            raise ShardError(f"{store} is no whole folder of shards ({what}): {PEOPLE.again}.")
        columns: dict[str, list[np.ndarray]] = {}
        contents: dict[str, str] = {}
        samples = 0
        self.hashes: list[str] = []  # of the tars

        def add(name: str, values: Any, kind: type) -> None:
            columns.setdefault(name, []).append(np.asarray(values, dtype=kind))

        for number, (name, index) in enumerate(zip(self.names, read_indexes(store, self.names, PEOPLE), strict=True)):
            contents.setdefault(index["content"], name)
            self.hashes.append(index["sha256"])
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
            raise ShardError(f"{one} and {other} in {store} are of two data sets: keep each in a folder of its own.")
        self._columns = {name: np.concatenate(parts) for name, parts in columns.items()}
        self.digest = hashlib.sha256("".join(self.hashes).encode()).hexdigest()
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

    def place(self, number: int) -> tuple[str, int]:
        """Tells where a picture is: the hash of its shard's tar, and the offset in it."""
        shard = int(self._columns["sample_shard"][self.sample_of[number]])
        return self.hashes[shard], int(self._columns["offset"][number])

    def about(self, sample: int) -> dict[str, Any]:
        """The JSON of a sample."""
        shard, offset, size = (int(self._columns[f"sample_{k}"][sample]) for k in ("shard", "offset", "size"))
        return json.loads(self._read(shard, offset, size))

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        name = self.names[shard]
        try:
            read = self.store.piece(name, offset, size, self.hashes[shard])
        except OSError as error:
            raise ShardError(
                f"{self.store.at(name)} cannot be read ({error.strerror}): see that its disk is there."
            ) from error
        if len(read) != size:
            raise ShardError(f"{self.store.at(name)} is cut short: remove its index, then {PEOPLE.again}.")
        return read


def embedding_of(about: Mapping[str, Any]) -> np.ndarray | None:
    """The embedding in a picture's JSON as float32 [d]; None where there is none."""
    text = about.get("embedding")
    return None if text is None else np.frombuffer(base64.b64decode(text), "<f2").astype(np.float32)

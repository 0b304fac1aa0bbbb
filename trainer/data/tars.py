"""Tar files with an index: the same contents give the same bytes, and an index is written last and says "finished"."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...lookahead.files.tensors import sha256
from .pairs import DataError
from .store import Store, ends

Read = Callable[[tarfile.TarInfo], bytes]


class ShardError(DataError):
    """Says what is wrong with a shard or its index, in one sentence for the user."""


@dataclass(frozen=True)
class Kind:
    """A kind of shard. format: what its index is called; tables: of the index, each with columns of one length; again:
    what makes a shard that is missing, as the end of a sentence."""

    format: str
    tables: tuple[str, ...]
    again: str


def index_name(shard: str) -> str:
    return shard.removesuffix(".tar") + ".index.json"


def write_tar(path: Path, samples: Iterable[Mapping[str, Any]]) -> None:
    """Write samples as webdataset has them (`__key__`, and bytes by the ending of their file), for the same bytes
    always."""
    from webdataset import TarWriter

    with path.open("wb") as file:
        # Fixed times and owners, and values that are bytes already: nothing that differs from run to run.
        with TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as writer:
            for sample in samples:
                writer.write(sample)


@contextmanager
def members(path: Path, shard: str, kind: Kind) -> Iterator[tuple[dict[str, tarfile.TarInfo], Read]]:
    """The files in a tar by name, and what reads one of them. shard: what it is called in messages.

    Raises ShardError, one sentence, where the tar is cut short, or the block finds that it holds something else.
    """
    try:
        with tarfile.open(path) as tar:

            def read(member: tarfile.TarInfo) -> bytes:
                file = tar.extractfile(member)
                if file is None:
                    raise ValueError(f"{member.name} is no file")
                return file.read()

            yield {member.name: member for member in tar}, read
    except (tarfile.TarError, EOFError, KeyError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ShardError(
            f"{shard} is cut short or no shard of its kind ({why}): remove it, then {kind.again}."
        ) from None


def make_index(path: Path, shard: str, kind: Kind, content: str, tables: Mapping[str, Any]) -> dict[str, Any]:
    """The index of a tar at this path. content: digest of all that decides what is in it."""
    size, outer = ends(path)
    about = {"format": kind.format, "shard": shard, "bytes": size, "ends": outer, "sha256": sha256(path)}
    return about | {"content": content, **tables}


def write_index(store: Store, shard: str, index: Mapping[str, Any]) -> None:
    with store.writing(index_name(shard)) as path:
        path.write_text(json.dumps(index))


def read_index(store: Store, shard: str, kind: Kind, whole: bool = False) -> dict[str, Any]:
    """The index of a shard, which belongs to it. whole: compare the hash of the whole tar, not of its ends alone.

    Raises ShardError, one sentence, where either is missing, damaged or of another data set, or StoreError.
    """
    try:
        size, outer = store.ends(shard)
    except OSError:
        size, outer = -1, ""
    index = _parsed(store, shard, kind, _read(store, [shard], kind)[0])
    if size < 0:
        raise ShardError(f"There is no {store.at(shard)}, though its index is there: remove that, then {kind.again}.")
    if size < index["bytes"]:
        raise ShardError(
            f"{store.at(shard)} is cut short ({size} of {index['bytes']} bytes): remove its index, then {kind.again}."
        )
    if (size, outer) != (index["bytes"], index["ends"]) or index["shard"] != shard:
        raise ShardError(
            f"{index_name(shard)} does not belong to {store.at(shard)} (hash or name differ): remove it, then "
            f"{kind.again}."
        )
    if whole and sha256(store.copy(shard, index["sha256"] if store.remote else None)) != index["sha256"]:
        raise ShardError(
            f"{store.at(shard)} is damaged (its hash is not that of its index): remove its index, then {kind.again}."
        )
    return index


def read_indexes(store: Store, shards: Sequence[str], kind: Kind) -> list[dict[str, Any]]:
    """The indexes of shards. What lies elsewhere is not asked for the ends of its tars: they are checked when they
    arrive. Raises as `read_index` does."""
    if not store.remote:
        return [read_index(store, shard, kind) for shard in shards]
    texts = _read(store, shards, kind)
    return [_parsed(store, shard, kind, text) for shard, text in zip(shards, texts, strict=True)]


def _read(store: Store, shards: Sequence[str], kind: Kind) -> list[bytes]:
    try:
        return store.read([index_name(shard) for shard in shards])
    except FileNotFoundError as error:
        missing = Path(str(error.filename or error)).name
        raise ShardError(f"There is no {missing} in {store}, so the shard is not finished: {kind.again}.") from None
    except OSError as error:
        raise ShardError(
            f"The indexes in {store} cannot be read ({error.strerror}): see that its disk is there."
        ) from None


def _parsed(store: Store, shard: str, kind: Kind, text: bytes) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads(text)
        if index["format"] != kind.format:
            raise ValueError(index["format"])
        if any(len({len(column) for column in index[table].values()}) != 1 for table in kind.tables):
            raise ValueError("columns of different lengths")
        return index | {"bytes": int(index["bytes"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        path = store.at(index_name(shard))
        raise ShardError(f"{path} is damaged or no index of a shard ({error}): remove it, then {kind.again}.") from None

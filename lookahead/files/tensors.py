"""Reading tensors out of a file that may be damaged, of another kind, or hostile; writing them whole or not at all."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .atomic import atomic, first_line

LARGEST = 1e19  # of a weight: norms square what it leads to, and beyond this a square overflows in 32 bit too


LONGEST_NAME = 500  # characters of a weight's name; of SDXL and its encoders none has 150
MOST_NAMES, DEEPEST = 100_000, 20  # weights in a file, and tables in tables of a pickle; SDXL has 3000 and two


class EncoderFileError(ValueError):
    """Says what is wrong with an encoder file, in one sentence for the user."""


def read_tensors(path: str | os.PathLike[str], mapped: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read (tensors, metadata) into host memory; nested pickled dicts become names with dots.

    The format is found from the first bytes. Pickles are read with `weights_only=True`: nothing in them is executed.
    mapped: the tensors of a pickle stay in the file until they are used (the file must not change meanwhile), so that
    one of many gigabytes can be read with little memory; not possible for pickles older than torch 1.6.
    Raises EncoderFileError for a missing, empty, truncated or foreign file and for a pickle that holds code.
    """
    path = Path(path)
    name = path.name
    try:
        with path.open("rb") as f:
            head = f.read(9)
    except OSError as error:
        raise EncoderFileError(f"{name} cannot be read ({error.strerror}): check that it is there.") from error
    if not head:
        raise EncoderFileError(f"{name} is empty: download it again.")
    if head[8:9] == b"{":
        tensors, metadata = _read_safetensors(path)
        _check_names(tensors, name)
        return tensors, metadata
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return _read_pickle(path, mapped and head[:2] == b"PK"), {}
    start = head.decode("ascii", "replace")
    raise EncoderFileError(
        f"{name} is neither a safetensors nor a PyTorch file (it starts with {start!r}): the download probably saved "
        "something else; download it again."
    )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as f:
            return {key: f.get_tensor(key) for key in f.keys()}, dict(f.metadata() or {})
    except SafetensorError as error:
        raise EncoderFileError(
            f"{path.name} is not a complete safetensors file ({first_line(error)}): it was probably cut short; "
            "download it again."
        ) from error


def _check_names(names: Iterable[str], name: str) -> None:
    """Raise EncoderFileError for names of weights that no program gives: they would stand in every later message."""
    for key in names:
        if len(key) > LONGEST_NAME or not key.isprintable():
            raise EncoderFileError(
                f"{name} has a weight whose name is {len(key)} characters long and begins with {ascii(key[:20])}: it "
                "is damaged or no model; download it again."
            )


def check_plain(tensors: Mapping[str, Tensor], name: str) -> None:
    """Raise EncoderFileError, one sentence, for a tensor that most operations refuse; a pickle can hold such."""
    for key, value in tensors.items():
        if value.layout != torch.strided or value.is_meta:
            kind = "without values (a meta tensor)" if value.is_meta else f"sparse ({value.layout})"
            raise EncoderFileError(
                f"{name}: {key} is stored {kind}, and plain tensors are needed: use the .safetensors version."
            )
        if value.is_complex() or value.is_quantized:
            raise EncoderFileError(
                f"{name}: {key} is stored as {value.dtype}, and real numbers are needed: use the original file."
            )


def check_numbers(tensors: Mapping[str, Tensor], name: str, largest: float = math.inf) -> None:
    """Raise EncoderFileError, one sentence, for weights without numbers, with NaN or infinity, or above `largest`."""
    check_plain(tensors, name)
    for key, value in tensors.items():
        if not value.numel():
            raise EncoderFileError(
                f"{name}: {key} has shape {list(value.shape)}, so it holds no number: the file is damaged; write or "
                "download it again."
            )
        if not value.is_floating_point():
            continue
        value = value.float() if value.dtype.itemsize == 1 else value  # (of 8 bit torch compares nothing)
        low, high = (float(end) for end in value.aminmax())  # both are NaN where one number is
        if not math.isfinite(high - low):
            raise EncoderFileError(
                f"{name}: {key} holds values that are not finite numbers (NaN or infinity): the file is damaged or its "
                "training diverged; use another copy or an earlier checkpoint."
            )
        if max(high, -low) > largest:
            raise EncoderFileError(
                f"{name}: {key} holds a number as large as {max(high, -low):.3g}, with which nothing can be computed: "
                "the file is damaged or its training diverged; use another copy or an earlier checkpoint."
            )


def sha256(path: str | os.PathLike[str]) -> str:
    """Hash of a file, as model sites show it."""
    with Path(path).open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a .safetensors file beside its place and rename it into it: what stood there stays until all is written.

    Raises EncoderFileError where the place cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    try:
        with atomic(path) as part:
            part.touch()
            mode = part.stat().st_mode  # what a new file gets here; safetensors would leave it to its owner alone
            save_file(_apart(tensors), part, metadata=dict(metadata))
            part.chmod(mode)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise EncoderFileError(
            f"{path} cannot be written ({why}): free some space there, or name another place."
        ) from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor in memory of its own, as safetensors asks: the same reference twice is one tensor under two names."""
    seen: set[int] = set()
    out = {}
    for key, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        out[key] = value.clone() if place in seen else value
        seen.add(place)
    return out


def _read_pickle(path: Path, mapped: bool) -> dict[str, Tensor]:
    damaged = f"{path.name} is not a complete PyTorch file: it was probably cut short; download it again."
    _check_zip(path, damaged)
    try:
        if mapped and path.suffix != ".safetensors":
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        else:
            with path.open("rb") as f:  # not by its path: torch would go by the name's ending
                content = torch.load(f, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "truncated" in str(error) or "ran out" in str(error).lower():
            raise EncoderFileError(damaged) from error
        raise EncoderFileError(
            f"{path.name} holds more than plain tensors (a pickle can carry code), so it was not loaded and nothing in "
            "it was executed: use a .safetensors version from a source that you trust."
        ) from error
    except Exception as error:  # torch raises many kinds for damaged archives (RuntimeError, EOFError, KeyError, ...)
        raise EncoderFileError(damaged) from error
    if not isinstance(content, dict):
        raise EncoderFileError(
            f"{path.name} holds a {type(content).__name__} where named tensors were expected: it is not an encoder "
            "file."
        )
    tensors = _flat(content, path.name)
    size = path.stat().st_size
    for key, value in tensors.items():
        # A few bytes can be spread over any number of places, and storage grows to what a pickle says of a tensor.
        if value.layout == torch.strided and not value.is_meta and value.numel() * value.element_size() > size:
            raise EncoderFileError(
                f"{path.name}: {key} claims {value.numel()} numbers, and the file has {size} bytes: it is damaged or "
                "hostile; use a .safetensors version from a source that you trust."
            )
    return tensors


def _check_zip(path: Path, damaged: str) -> None:
    """Raise EncoderFileError for a torch file that unpacks to more than itself: torch stores, and never compresses."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except Exception as error:  # zipfile has several kinds for a damaged directory
        raise EncoderFileError(damaged) from error
    if unpacked > (size := path.stat().st_size):
        raise EncoderFileError(
            f"{path.name} has {size} bytes and would unpack to {unpacked}, which no PyTorch file does: use a "
            ".safetensors version from a source that you trust."
        )


def _flat(content: Mapping[object, object], name: str) -> dict[str, Tensor]:
    """Collect the tensors of nested dicts; plain values beside them (an epoch, a note) say nothing to us."""
    tensors: dict[str, Tensor] = {}
    seen = 0

    def walk(table: Mapping[object, object], prefix: str, depth: int) -> None:
        nonlocal seen
        for key, value in table.items():
            full, seen = f"{prefix}{key}", seen + 1
            if depth > DEEPEST or seen > MOST_NAMES:  # a table that holds itself has no end
                raise EncoderFileError(
                    f"{name} holds tables in tables without end (more than {DEEPEST} deep, or {MOST_NAMES} values), "
                    "where named tensors were expected: it is not an encoder file."
                )
            _check_names([full], name)
            if isinstance(value, Tensor):
                tensors[full] = value.detach()
            elif isinstance(value, dict):
                walk(value, f"{full}.", depth + 1)
            elif not isinstance(value, int | float | str | bool | None):
                raise EncoderFileError(
                    f"{name}: {full} is of type {type(value).__name__}, and only tensors are expected: use the "
                    ".safetensors version."
                )

    walk(content, "", 0)
    return tensors

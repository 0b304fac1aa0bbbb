"""A folder of people's pictures: what lies in it, what is known of each picture, and who may be a reference for whom.

    people/anna/holiday.jpg, people/anna/passport.png, people/ben/...  a folder a person, two pictures or more
    people/anna/holiday.txt                                            what a picture shows, if there are such files
    people/metadata.jsonl (or .csv)                                    file_name, and where known text and person

Every picture is looked at once; what was seen is kept in `scan.jsonl`, and only what has changed is looked at again.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ...lookahead.files.atomic import atomic, first_line
from ...lookahead.losses.identity import largest
from ...lookahead.vision.faces import Detector, Face
from ...sdxl.images import PictureError, read
from . import published

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.json")
QUIET = 10  # seconds of work without a progress bar
_LOOK = 16  # side of the small grey picture that copies are told by


class DataError(ValueError):
    """Says what is wrong with a data set, in one sentence for the user."""


@dataclass(frozen=True)
class Entry:
    """A picture as the folder and its metadata name it. reference: whether it may serve as one."""

    file: str  # relative to the folder, with slashes
    person: str
    text: str | None = None
    reference: bool = True


@dataclass(frozen=True)
class Seen:
    """Records what was seen in a picture. face: the largest of `faces` in numbers: box (4), five points (10), score."""

    file: str
    bytes: int
    modified: int
    detector: str
    error: str | None = None
    pixels: str = ""  # hash of the pixels: the same picture, whatever it is called
    look: str = ""  # a small grey copy: nearly the same for a picture that was saved anew or made smaller
    width: int = 0
    height: int = 0
    faces: int = 0
    face: tuple[float, ...] | None = None

    def found(self) -> Face | None:
        """The face as `lookahead.vision.faces` has it."""
        if self.face is None:
            return None
        numbers = torch.tensor(self.face)
        return Face(numbers[:4], numbers[4:14].view(5, 2), float(numbers[14]))


def listing(folder: Path, metadata: str | None = None) -> tuple[list[Entry], list[str]]:
    """The pictures of a folder in the order of their names, and files that the metadata names but are not there.

    Links to folders are followed; names that begin with a dot are left out.
    metadata: file of JSON lines or CSV; by default one of METADATA in the folder. Where it gives no person, the first
    folder of the path is one. Raises DataError where there is no folder, no person, or the metadata is not understood.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}, which data.source names: write down where the pictures are.")
    table = _metadata(folder, metadata)
    entries, alone = [], []
    for path in sorted(_files(folder)):
        if path.suffix.lower() not in ENDINGS or not path.is_file():
            continue
        file = path.relative_to(folder).as_posix()
        said = table.pop(file, {})
        person = said.get("person") or (file.split("/")[0] if "/" in file else "")
        if not person:
            alone.append(file)
            continue
        text = said.get("text") or said.get("caption") or _beside(path)
        use = str(said.get("reference", "")).strip().lower() not in ("false", "no", "0")
        entries.append(Entry(file, str(person), str(text).strip() if text else None, use))
    if alone:
        raise DataError(
            f"Nobody is named for {alone[0]} ({len(alone)} such files): put each person's pictures into a folder of "
            "their own, or give `person` in the metadata file."
        )
    return entries, sorted(table)


def _files(folder: Path) -> Iterator[Path]:
    been = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        been.add(os.path.realpath(place))
        # (a link back to a folder above would be followed for ever)
        folders[:] = [f for f in folders if f[0] != "." and os.path.realpath(os.path.join(place, f)) not in been]
        yield from (Path(place, file) for file in files if file[0] != ".")


def _beside(picture: Path) -> str | None:
    path = picture.with_suffix(".txt")
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _metadata(folder: Path, given: str | None) -> dict[str, dict[str, Any]]:
    paths = [Path(given)] if given else [p for p in (folder / name for name in METADATA) if p.is_file()][:1]
    if not paths:
        return {}
    path = paths[0]
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"The metadata {path} cannot be read ({error.strerror}): check data.metadata.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"The metadata {path} is not in UTF-8 ({error.reason}): save it with that encoding.") from None
    kinds = {".csv": _csv, ".json": partial(_published, path)}
    rows = kinds.get(path.suffix.lower(), partial(_json_lines, path))(text)
    table = {}
    for number, row in rows:
        if not isinstance(row, Mapping) or not row.get("file_name"):
            raise DataError(f"Line {number} of {path} has no file_name: each line names one picture.")
        table[str(row["file_name"]).replace("\\", "/").removeprefix("./")] = dict(row)
    return table


def _csv(text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    yield from enumerate(csv.DictReader(text.splitlines()), 2)


def _published(path: Path, text: str) -> Iterator[tuple[int, object]]:
    try:
        table = json.loads(text)
        if not isinstance(table, dict) or not all(isinstance(person, str) for person in table.values()):
            raise ValueError("no object of texts")
    except ValueError as error:
        raise DataError(
            f"{path} is no table as the paper's data has it ({first_line(error)}): write an object from each file to "
            "its person, or use metadata.jsonl."
        ) from None
    yield from enumerate(published.rows(table), 1)


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"Line {number} of {path} is no JSON ({error.msg}): write one object a line.") from None


def scan(
    folder: Path, entries: Sequence[Entry], detector: Detector | None, name: str, index: Path, report: bool = True
) -> dict[str, Seen]:
    """Look at each picture that the index does not know yet; returns what is seen in all, by file.

    name: of the detector, a path by which a change of it is noticed; index: where what was seen is kept. Without a
    detector no faces are returned, but those in the index stay there.

    Raises DataError where the index cannot be written.
    """
    name = os.path.realpath(name) if detector else ""
    before = _load(index)
    kept: dict[str, Seen] = {}
    new = 0
    for entry in tqdm(entries, "Images scanned", delay=QUIET, disable=not report):
        path = folder / entry.file
        stat = path.stat()
        seen = before.get(entry.file)
        same = seen is not None and (seen.bytes, seen.modified) == (stat.st_size, stat.st_mtime_ns)
        if seen is None or not same or (detector and seen.detector != name):
            seen, new = _look(path, entry.file, stat, detector, name), new + 1
            if new % 500 == 0:
                _save(index, before | kept)
        kept[entry.file] = seen
    if new:
        _save(index, kept)
    return kept if detector else {file: replace(s, detector="", faces=0, face=None) for file, s in kept.items()}


def _look(path: Path, file: str, stat: os.stat_result, detector: Detector | None, name: str) -> Seen:
    common = (file, stat.st_size, stat.st_mtime_ns, name)
    try:
        picture = read(path)
    except PictureError as error:
        return Seen(*common, str(error))
    height, width = picture.shape[-2:]
    pixels = (picture * 255).round().byte()
    faces = detector(picture[None])[0] if detector else []
    face = largest(faces)
    numbers = None
    if face is not None:
        numbers = tuple(round(n, 3) for n in [*face.box.tolist(), *face.points.flatten().tolist(), face.score])
    digest = hashlib.sha256(bytes(f"{height} {width} ", "ascii") + pixels.numpy().tobytes()).hexdigest()
    return Seen(*common, None, digest, look_of(picture), width, height, len(faces), numbers)


def look_of(picture: Tensor) -> str:
    """A small grey copy of [3, h, w] in [0, 1], as hexadecimal bytes."""
    grey = F.interpolate(picture.mean(0)[None, None], (_LOOK, _LOOK), mode="bilinear", antialias=True)
    return bytes((grey * 255).round().byte().flatten().tolist()).hex()


def alike(a: Seen, b: Seen) -> bool:
    """Tells whether two pictures are copies of each other: the same pixels, or saved anew, or made smaller.

    Two pictures of one person in one place differ by several grey levels, a copy by less than one on the average.
    """
    if a.pixels == b.pixels:
        return True
    distance = [abs(x - y) for x, y in zip(bytes.fromhex(a.look), bytes.fromhex(b.look), strict=True)]
    return sum(distance) <= 1.5 * len(distance) and max(distance) <= 12


def _load(index: Path) -> dict[str, Seen]:
    if not index.is_file():
        return {}
    out = {}
    for line in index.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
            values["face"] = tuple(values["face"]) if values["face"] else None
            out[values["file"]] = Seen(**values)
        except (ValueError, KeyError, TypeError):  # of another version, or cut short: looked at again
            continue
    return out


def _save(index: Path, seen: Mapping[str, Seen]) -> None:
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        with atomic(index) as part:
            part.write_text("".join(json.dumps(asdict(s)) + "\n" for s in seen.values()), encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{index.parent} cannot be written ({error.strerror}): name another folder, data.cache."
        ) from None


@dataclass(frozen=True)
class PairIndex:
    """The images that can be trained on, with the references that each may have.

    references[n]: places of the images that may be the reference of image n. A reference shows the same person, is
    another image (also not a copy of it), and shows a face where faces were looked for. left_out: why a file is not in
    `pictures`.
    """

    pictures: list[Entry]
    seen: dict[str, Seen]
    references: list[list[int]]
    left_out: dict[str, str]


def make_pairs(entries: Sequence[Entry], seen: Mapping[str, Seen], faces: bool) -> PairIndex:
    """Choose targets and references. faces: whether a reference must show one."""
    left_out = {e.file: s.error for e in entries if (s := seen[e.file]).error}
    whole = [e for e in entries if e.file not in left_out]
    by_person: dict[str, list[Entry]] = {}
    for entry in whole:
        by_person.setdefault(entry.person, []).append(entry)
    pairs: dict[str, list[str]] = {}
    for theirs in by_person.values():
        able = [e for e in theirs if e.reference and (seen[e.file].face or not faces)]
        for target in theirs:
            others = [e for e in able if e is not target]
            fit = [e.file for e in others if not alike(seen[e.file], seen[target.file])]
            if fit:
                pairs[target.file] = fit
            elif others:
                left_out[target.file] = "its person's other pictures are copies of it"
            elif len(theirs) == 1:
                left_out[target.file] = "it is the only picture of its person"
            else:
                left_out[target.file] = "none of its person's other pictures can be a reference (no face was found)"
    used = {file for fit in pairs.values() for file in fit}
    pictures = [e for e in whole if e.file in pairs or e.file in used]
    place = {e.file: n for n, e in enumerate(pictures)}
    references = [[place[file] for file in pairs.get(e.file, ())] for e in pictures]
    return PairIndex(pictures, dict(seen), references, {k: v for k, v in left_out.items() if k not in place})

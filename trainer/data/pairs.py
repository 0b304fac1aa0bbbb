"""A folder of people's pictures: what lies in it, what is known of each picture, and who may be a reference for whom.

    people/anna/holiday.jpg, people/anna/passport.png, people/ben/...  a folder a person, two pictures or more
    people/anna/holiday.txt                                            what a picture shows, if there are such files
    people/metadata.jsonl (or .csv)                                    file_name, and where known text and person

Every picture is looked at once; what was seen is kept in `scan.jsonl`, and only what has changed is looked at again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ...lookahead.files.atomic import atomic
from ...lookahead.losses.identity import largest
from ...lookahead.vision.faces import Detector, Face
from ...sdxl.images import PictureError, read
from ..progress import progress
from .metadata import DataError as DataError  # which other modules know from here
from .metadata import read_captions, read_metadata, same_name
from .references import References, copies

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif")
# Pictures of kinds that are not read: said, since a phone's folder may hold nothing else.
OTHERS = tuple(
    ".heic .heif .hif .gif .jxl .jp2 .psd .svg .ico .tga .exr .hdr .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf".split()
)
SHORTEST_SIDE = 32  # pixels; below that there is nothing to see a person from
_LOOK = 16  # side of the small grey picture that copies are told by


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
    path, table = read_metadata(folder, metadata)
    unused = set(table)
    files = {p.relative_to(folder).as_posix(): p for p in sorted(_files(folder)) if _is_picture(p)}
    if foreign := [file for file in files if not _is_text(file)]:
        name = os.fsencode(foreign[0]).decode("utf-8", "backslashreplace")
        raise DataError(f"The name {name} is not in UTF-8 ({len(foreign)} such files): rename what it names.")
    said = {file: table.get(same_name(file), {}) for file in files}
    untold = [p.with_suffix(".txt") for file, p in files.items() if not _caption(said[file])]
    beside = read_captions(p for p in untold if p.is_file())
    entries, alone = [], []
    for file, picture in files.items():
        unused.discard(same_name(file))
        person = said[file].get("person") or (file.split("/")[0] if "/" in file else "")
        if not person:
            alone.append(file)
            continue
        text = _caption(said[file]) or beside.get(picture.with_suffix(".txt"))
        use = str(said[file].get("reference", "")).strip().lower() not in ("false", "no", "0")
        entries.append(Entry(file, same_name(str(person)), str(text).strip() if text else None, use))
    if alone:
        raise DataError(
            f"Nobody is named for {alone[0]} ({len(alone)} such files): put each person's pictures into a folder of "
            "their own, or give `person` in the metadata file."
        )
    if table and entries and len(unused) == len(table):
        raise DataError(
            f"None of the {len(table)} files that {path} names is in {folder} (the first: {next(iter(table))}): write "
            "each file_name as it stands below that folder."
        )
    return entries, sorted(unused)


def passed_over(folder: Path) -> str:
    """Says how many files in a folder are pictures of kinds that are not read; empty where there are none."""
    files = [path for path in _files(folder) if path.suffix.lower() in OTHERS]
    kinds = Counter(path.suffix.lower() for path in files)
    if not kinds:
        return ""
    counted = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    first = min(files).relative_to(folder).as_posix()
    return f"{len(files):,} pictures are of kinds that are not read ({counted}; {first}): save them as JPEG or PNG."


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS and path.is_file()


def _is_text(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:  # bytes that are no UTF-8, as Python passes them on
        return False


def _caption(said: Mapping[str, object]) -> object:
    return said.get("text") or said.get("caption")


def _files(folder: Path) -> Iterator[Path]:
    been = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        been.add(os.path.realpath(place))
        # (a link back to a folder above would be followed for ever)
        folders[:] = [f for f in folders if f[0] != "." and os.path.realpath(os.path.join(place, f)) not in been]
        yield from (Path(place, file) for file in files if file[0] != ".")


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
    new: list[Seen] = []
    total = 0
    for entry in progress(entries, "Images scanned", disable=not report):
        path = folder / entry.file
        stat = path.stat()
        seen = before.get(entry.file)
        same = seen is not None and (seen.bytes, seen.modified) == (stat.st_size, stat.st_mtime_ns)
        if seen is None or not same or (detector and seen.detector != name):
            seen, total = _look(path, entry.file, stat, detector, name), total + 1
            new.append(seen)
            if len(new) == 500:
                _save(index, new, add=True)
                new = []
        kept[entry.file] = seen
    if total:
        _save(index, kept.values())
    return kept if detector else {file: replace(s, detector="", faces=0, face=None) for file, s in kept.items()}


def _look(path: Path, file: str, stat: os.stat_result, detector: Detector | None, name: str) -> Seen:
    common = (file, stat.st_size, stat.st_mtime_ns, name)
    try:
        picture = read(path)
    except PictureError as error:
        return Seen(*common, str(error))
    height, width = picture.shape[-2:]
    if min(height, width) < SHORTEST_SIDE:
        return Seen(*common, f"{path} has {width}x{height} pixels, and at least {SHORTEST_SIDE} a side are needed.")
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


def _load(index: Path) -> dict[str, Seen]:
    if not index.is_file():
        return {}
    out = {}
    for line in index.read_text(encoding="utf-8").split("\n"):
        try:
            values = json.loads(line)
            values["face"] = tuple(values["face"]) if values["face"] else None
            out[values["file"]] = Seen(**values)
        except (ValueError, KeyError, TypeError):  # of another version, or cut short: looked at again
            continue
    return out


def _save(index: Path, seen: Iterable[Seen], add: bool = False) -> None:
    """Write the index anew, or add lines to it (on lines of their own, whatever a run that was killed left there)."""
    text = "".join(json.dumps(asdict(s)) + "\n" for s in seen)
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        if add:
            with index.open("a", encoding="utf-8") as file:
                file.write("\n" + text)
            return
        with atomic(index) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{index.parent} cannot be written ({error.strerror}): name another folder, data.cache."
        ) from None


@dataclass(frozen=True)
class PairIndex:
    """The images that can be trained on, with the references that each may have.

    references[n]: places of the images that may be the reference of image n. A reference shows the same person, is
    another image (also not a copy of it), and shows a face where faces were looked for. used: places of all images that
    are in one of these. left_out: why a file is not in `pictures`.
    """

    pictures: list[Entry]
    seen: dict[str, Seen]
    references: list[References]
    used: set[int]
    left_out: dict[str, str]


def make_pairs(entries: Sequence[Entry], seen: Mapping[str, Seen], faces: bool) -> PairIndex:
    """Choose targets and references. faces: whether a reference must show one."""
    left_out = {e.file: s.error for e in entries if (s := seen[e.file]).error}
    whole = [e for e in entries if e.file not in left_out]
    by_person: dict[str, list[Entry]] = {}
    for entry in whole:
        by_person.setdefault(entry.person, []).append(entry)
    fits: dict[str, References] = {}
    members: dict[str, list[int]] = {}  # of each picture that is a reference, the list of its person's
    for theirs in progress(by_person.values(), "References chosen, people"):
        alike = copies([seen[e.file].look for e in theirs])
        able = [n for n, e in enumerate(theirs) if e.reference and (seen[e.file].face or not faces)]
        used = [n for n in able if len(alike[n]) < len(theirs)]  # somebody else is no copy of it
        place = {n: k for k, n in enumerate(used)}
        shared: list[int] = []
        members |= {theirs[n].file: shared for n in used}
        for n, target in enumerate(theirs):
            without = [place[m] for m in alike[n] if m in place]
            if len(without) < len(used):
                fits[target.file] = References(shared, without)
            elif any(m != n for m in able):
                left_out[target.file] = "its person's other pictures are copies of it"
            elif len(theirs) == 1:
                left_out[target.file] = "it is the only picture of its person"
            else:
                left_out[target.file] = "none of its person's other pictures can be a reference (no face was found)"
    pictures = [e for e in whole if e.file in fits or e.file in members]
    for n, entry in enumerate(pictures):
        if entry.file in members:
            members[entry.file].append(n)
    return PairIndex(
        pictures,
        dict(seen),
        [fits.get(e.file, References([])) for e in pictures],
        {n for n, e in enumerate(pictures) if e.file in members},
        {file: why for file, why in left_out.items() if file not in fits and file not in members},
    )

"""`lookahead doctor DATA`: what a training run would make of a folder of pictures, and what to do about it."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...lookahead.files.atomic import atomic
from ...lookahead.vision.faces import Detector
from ..lookahead.config import Data, cache_folder
from .folder import square_of
from .pairs import Entry, PairIndex, Seen, listing, make_pairs, passed_over, scan
from .references import copies

SMALL_FACE = 56  # pixels of a face's longer side, as trained on: half of what a recogniser looks at
FEW_PEOPLE = 100
_SHOWN = 3  # files named in a sentence


@dataclass
class Report:
    """rows: what was counted, of how many, and a remark; wrong: what stops or spoils a run; better: what may."""

    rows: list[tuple[str, int, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    better: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        wide = max(len(name) for name, *_ in self.rows)
        lines = [f"{name:{wide}}  {number:>9,}  {remark}".rstrip() for name, number, remark in self.rows]
        for title, sentences in (("To do:", self.wrong), ("Better:", self.better)):
            if sentences:
                lines += ["", title, *(f"- {sentence}" for sentence in sentences)]
        return "\n".join(lines if self.wrong or self.better else [*lines, "", "Nothing to do."])


def examine(data: Data, detector: Detector | None, name: str) -> Report:
    """Look at a data set as a run would; each file that would be left out is listed in `left_out.jsonl` in the cache.

    name: of the detector. Raises DataError where the folder or its metadata is not understood.
    """
    folder, cache = Path(data.source), cache_folder(data)
    entries, gone = listing(folder, data.metadata)
    report = Report()
    if others := passed_over(folder):
        report.better.append(others)
    if not entries:
        report.rows.append(("pictures", 0, ""))
        report.wrong.append(f"{folder} holds no pictures: put a folder for each person into it, with their pictures.")
        return report
    seen = scan(folder, entries, detector, name, cache / "scan.jsonl")
    found = make_pairs(entries, seen, detector is not None)
    whole = [e for e in entries if not seen[e.file].error]
    _count(report, entries, whole, found, detector is not None)
    _files(report, entries, seen, gone)
    _pairs(report, found, cache)
    _faces(report, data, whole, seen, detector is not None)
    _texts(report, data, whole)
    _copies(report, whole, seen)
    small = [e.file for e in whole if min(seen[e.file].width, seen[e.file].height) < data.size]
    report.rows.append((f"smaller than {data.size} pixels", len(small), "enlarged in training"))
    if len(small) > len(whole) / 2:
        report.better.append(
            f"Most pictures are smaller than {data.size} pixels on their shorter side, so that training sees them "
            f"blurred: use larger ones, or set data.size lower. {_some(small)}"
        )
    return report


def _count(report: Report, entries: Sequence[Entry], whole: Sequence[Entry], found: PairIndex, faces: bool) -> None:
    targets = sum(bool(fit) for fit in found.references)
    trained = {e.person for e, fit in zip(found.pictures, found.references, strict=True) if fit}
    everyone = {e.person for e in entries}
    report.rows += [
        ("pictures", len(entries), ""),
        ("people", len(everyone), f"{len(trained):,} of them with a pair to train on"),
        ("targets", targets, "pictures with another one of their person as a reference"),
        ("pairs", sum(map(len, found.references)), "of a target and a reference"),
    ]
    if not targets:
        report.wrong.append(
            "There is no pair to train on: every person needs two different pictures"
            + (", one of them with a face that is found." if faces else ".")
        )
    elif len(trained) < FEW_PEOPLE:
        report.better.append(
            f"An encoder for anybody is learnt from many people, and here are {len(trained):,}: with few it learns "
            "these few. Start from IP-Adapter Plus Face, keep the rates low, and compare with it."
        )


def _files(report: Report, entries: Sequence[Entry], seen: dict[str, Seen], gone: list[str]) -> None:
    broken = [e.file for e in entries if seen[e.file].error]
    report.rows.append(("unreadable", len(broken), "left out"))
    if broken:
        report.wrong.append(f"Repair or remove the pictures that cannot be read. {_some(broken)}")
    if gone:
        report.wrong.append(f"The metadata names files that are not there, or are no pictures. {_some(gone)}")


def _pairs(report: Report, found: PairIndex, cache: Path) -> None:
    why = {file: reason for file, reason in found.left_out.items() if not found.seen[file].error}
    (cache / "left_out.jsonl").unlink(missing_ok=True)
    if found.left_out:
        with atomic(cache / "left_out.jsonl") as part:
            part.write_text("".join(json.dumps({"file": f, "why": w}) + "\n" for f, w in found.left_out.items()))
    report.rows.append(("left out, though readable", len(why), "each with its reason in left_out.jsonl" if why else ""))
    for reason, number in Counter(why.values()).most_common():
        some = [file for file in why if why[file] == reason]
        report.better.append(f"{number:,} left out because {reason}. {_some(some)}")


def _faces(report: Report, data: Data, whole: Sequence[Entry], seen: dict[str, Seen], looked: bool) -> None:
    if not looked:
        report.rows.append(("with a face", 0, "not looked for: name a detector"))
        report.better.append("Faces were not looked for: give --detector, the folder of an insightface pack.")
        return
    without = [e.file for e in whole if seen[e.file].face is None]
    several = [e.file for e in whole if seen[e.file].faces > 1]
    report.rows.append(("without a face", len(without), "targets only, never references"))
    report.rows.append(("with several faces", len(several), "the largest one is taken"))
    if several:
        report.better.append(f"See that the largest face is the person's. {_some(several)}")
    tiny = []
    for entry in whole:
        picture = seen[entry.file]
        if (face := picture.found()) is not None:
            side = square_of(picture, data.reference_margin)[2]
            x0, y0, x1, y1 = face.box.tolist()
            if max(x1 - x0, y1 - y0) * data.size / side < SMALL_FACE:
                tiny.append(entry.file)
    report.rows.append((f"with a face below {SMALL_FACE} pixels", len(tiny), ""))
    if tiny:
        report.better.append(
            f"Faces below {SMALL_FACE} pixels teach little about the person: crop these pictures closer, or set "
            f"data.reference_margin (0.6, say). {_some(tiny)}"
        )


def _texts(report: Report, data: Data, whole: Sequence[Entry]) -> None:
    without = [e.file for e in whole if not e.text]
    named = [e.file for e in whole if e.text and len(e.person) > 2 and e.person.lower() in e.text.lower()]
    report.rows.append(("with a text of their own", len(whole) - len(without), f"others: {data.caption!r}"))
    if without:
        report.better.append(
            f"{len(without):,} pictures have no text, so {data.caption!r} stands for what they show, and the encoder "
            f"learns their scene and style along with the person: describe them (metadata.jsonl). {_some(without)}"
        )
    if named:
        report.better.append(
            f"{len(named):,} texts hold the person's name, which the text encoders may know or come to know: say "
            f"`a face` in its place, so that who it is comes from the reference alone. {_some(named)}"
        )


def _copies(report: Report, whole: Sequence[Entry], seen: dict[str, Seen]) -> None:
    same: dict[str, list[Entry]] = defaultdict(list)
    for entry in whole:
        same[seen[entry.file].pixels].append(entry)
    by_person: dict[str, list[Entry]] = defaultdict(list)
    for entry in whole:
        by_person[entry.person].append(entry)
    again = [
        theirs[n].file
        for theirs in by_person.values()
        for n, alike in enumerate(copies([seen[e.file].look for e in theirs]))
        if alike[0] < n  # an earlier one
    ]
    mixed = [e.file for group in same.values() if len({e.person for e in group}) > 1 for e in group]
    report.rows.append(("copies of another one", len(again), "never each other's reference"))
    if again:
        report.better.append(f"Remove copies: a copy is a picture less. {_some(again)}")
    if mixed:
        report.wrong.append(
            f"The same picture stands under several people's names, which teaches that they look alike. {_some(mixed)}"
        )


def _some(files: Sequence[str]) -> str:
    more = f" and {len(files) - _SHOWN:,} more" if len(files) > _SHOWN else ""
    return f"({', '.join(files[:_SHOWN])}{more})"

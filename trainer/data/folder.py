"""A folder of people's pictures as `pictures.PeoplePictures`: who is paired with whom, and crops."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from ...lookahead.vision.faces import Detector, square_around
from ...sdxl.images import PictureError, read
from ..lookahead.config import Config, Data, cache_folder
from .pairs import DataError, PairIndex, Seen, listing, make_pairs, passed_over, scan
from .pictures import Crop, cut
from .references import References

MANY = 1_000_000  # pairs


class FolderPictures:
    """Pictures of `data.source`. A target is any picture, its reference another one of the same person with a face."""

    def __init__(self, config: Config, detector: Detector | None):
        """Raises DataError, one sentence, where nothing can be trained on."""
        self.data, self.folder = config.data, Path(config.data.source)
        self.pairs = read_pairs(self.data, detector, config.model.detector or config.model.base, Path(config.out))
        targets = [n for n, fit in enumerate(self.pairs.references) if fit]
        names = list(dict.fromkeys(self.pairs.pictures[n].person for n in targets))
        # Whom training does not see: a tenth at most, the same whatever else is in the folder, and with or without
        # validation, so that it can be turned on later.
        few = min(config.validation.people, len(names) // 10)
        self.held_out = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:few]
        self.targets = [n for n in targets if self.pairs.pictures[n].person not in self.held_out]

    def digest(self) -> str:
        def known(n: int) -> tuple[object, ...]:
            picture = self.pairs.pictures[n]
            return picture.file, self.pairs.seen[picture.file].pixels, picture.person, self.caption(n)

        pairs: list[tuple[object, object]]
        if sum(len(self.pairs.references[n]) for n in self.targets) <= MANY:
            pairs = [(known(n), [known(r) for r in self.pairs.references[n]]) for n in self.targets]
        else:  # (from the pictures follow the pairs, which would take gigabytes to write down)
            pairs = [(known(n), n in self.pairs.used) for n in range(len(self.pairs.pictures))]
        return hashlib.sha256(repr((pairs, self.held_out)).encode()).hexdigest()

    def references(self, place: int) -> References:
        return self.pairs.references[place]

    def caption(self, place: int) -> str:
        """Says what the picture shows: its text in the data, else `data.caption`."""
        return self.pairs.pictures[place].text or self.data.caption

    def name(self, place: int) -> str:
        return self.pairs.pictures[place].file

    def key(self, place: int, as_reference: bool, face: bool = False) -> tuple[object, ...]:
        seen = self._seen(place)
        return seen.pixels, self._square(place, as_reference), self.data.size, *((seen.face,) if face else ())

    def crop(self, place: int, as_reference: bool) -> Crop:
        face = self._seen(place).found()
        try:
            picture = read(self.folder / self.name(place))
        except PictureError as error:  # it could be read when the folder was looked at
            raise DataError(f"{error} The same command looks at the folder again and leaves it out.") from None
        return cut(picture, self._square(place, as_reference), None if face is None else face.points, self.data.size)

    def shown(self, people: int) -> list[tuple[int, str]]:
        who = self.held_out or list(dict.fromkeys(self.pairs.pictures[n].person for n in self.targets))
        first = {self.pairs.pictures[n].person: n for n in sorted(self.pairs.used, reverse=True)}
        return [(first[name], name) for name in who[:people]]

    def _seen(self, place: int) -> Seen:
        return self.pairs.seen[self.name(place)]

    def _square(self, place: int, as_reference: bool) -> tuple[int, int, int]:
        return square_of(self._seen(place), self.data.reference_margin if as_reference else None)


def read_pairs(data: Data, detector: Detector | None, name: str, out: Path) -> PairIndex:
    """The usable pictures. Files that cannot be read are left out and listed in `quarantine.jsonl` in `out`.

    Raises DataError where there are more of these than `data.damaged` allows, or nothing is left to train on.
    """
    folder = Path(data.source)
    entries, gone = listing(folder, data.metadata)
    if gone:
        said = f"The metadata names {len(gone):,} files that are not there, or are no pictures ({gone[0]})"
        print(f"{said}: they are left out.", file=sys.stderr)
    if others := passed_over(folder):
        print(others, file=sys.stderr)
    found = make_pairs(
        entries, scan(folder, entries, detector, name, cache_folder(data) / "scan.jsonl"), detector is not None
    )
    broken = {e.file: why for e in entries if (why := found.seen[e.file].error)}
    (out / "quarantine.jsonl").unlink(missing_ok=True)
    if broken:
        out.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"file": file, "why": why}) + "\n" for file, why in broken.items()]
        (out / "quarantine.jsonl").write_text("".join(lines))
        said = f"{len(broken)} of {len(entries)} pictures cannot be read (listed in {out / 'quarantine.jsonl'})"
        if len(broken) > max(1, data.damaged * len(entries)):
            raise DataError(f"{said}, and data.damaged allows a share of {data.damaged}: repair or remove them.")
        print(f"{said}: they are left out.", file=sys.stderr)
    if not any(found.references):
        raise DataError(
            f"{folder} holds {len(entries)} pictures and not one pair to train on: two different pictures of a person, "
            f"one of them with a face. `lookahead doctor {folder}` says what is missing."
        )
    return found


def square_of(seen: Seen, margin: float | None) -> tuple[int, int, int]:
    """(left, top, side) of what is cut out of a picture: the largest square, as near to the face's middle as it goes;
    or, with a margin (share of its box's longer side, on each side), that around the face, as LookaheadCropFace has it.
    """
    height, width = seen.height, seen.width
    side, face = min(height, width), seen.found()
    if face is None:
        return (width - side) // 2, (height - side) // 2, side
    return square_around(face, height, width, margin)

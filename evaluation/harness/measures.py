"""What judges pictures: a class a kind of measure. A score carries its measure's name and is never mixed with others'.

A new measure is a subclass of `MeasureKind` here, or beside a world of its own (mini's), and its name in a table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ...lookahead.vision.images import cover
from ...lookahead.vision.perceptual import lpips_network
from ...sdxl.images import read
from ...trainer.config import Section
from .library import Embedder, Library, digest_of

#: The fields of a Case that a measure may ask for
REFERENCE, TARGET, PLAIN, OTHERS = "reference", "target", "plain", "others"
HIGHER, LOWER, NEITHER = "higher", "lower", "neither"  # which way a figure is better


@dataclass(frozen=True)
class Case:
    """A picture to be judged.

    plain: the picture of the same prompt and noise without any reference; others: those of the same method, person and
    prompt under other seeds; target: how the person truly looks under the prompt, where it is known.
    """

    picture: Path
    person: str
    prompt: str
    reference: Path
    target: Path | None = None
    plain: Path | None = None
    others: tuple[Path, ...] = ()

    def has(self, need: str) -> bool:
        """Tells whether a field that a measure needs is there."""
        return bool(getattr(self, need))


@dataclass(frozen=True, eq=False)
class OpenedMeasure:
    """An opened measure.

    title: stands over its figures; digest: changes when its scores would; needs: fields of a Case, without which it
    says nothing; better: which way; missing: what a picture counts that it cannot judge (no face), None: it does not
    count; judge, judged_by: name and hash of its recogniser.
    """

    title: str
    digest: str
    score: Callable[[Case], float | None]
    needs: tuple[str, ...] = ()
    better: str = HIGHER
    missing: float | None = None
    judge: str = ""
    judged_by: str = ""


class MeasureKind(Section):
    """One entry of `measures`."""

    kind: ClassVar[str]

    def open(self, library: Library, pack: str | None) -> OpenedMeasure:
        """Opens the networks. pack: of `models`, for want of one of its own. Raises EvaluationError, one sentence."""
        raise NotImplementedError


class _OfPeople(MeasureKind):
    recogniser: str = Field(description="file of a recogniser, or the name of one that is known")
    pack: str | None = Field(None, description="insightface pack that finds the faces; by default that of `models`")

    def embedder(self, library: Library, pack: str | None) -> Embedder:
        """Opens the recogniser."""
        return library.embedder(self.recogniser, self.pack or pack)

    def digest(self, library: Library, judge: Embedder) -> str:
        """Tells what its scores depend on: the recogniser, and a pack of its own."""
        own = None if self.pack is None else digest_of(library.pack_folder(self.pack))
        return judge.digest if own is None else f"{judge.digest}, faces by {own}"

    def opened(
        self,
        title: str,
        library: Library,
        judge: Embedder,
        score: Callable[[Case], float | None],
        needs: tuple[str, ...],
        **more: Any,
    ) -> OpenedMeasure:
        """Makes the measure of a recogniser, who is known by name and hash."""
        digest = self.digest(library, judge)
        return OpenedMeasure(title, digest, score, needs, judge=judge.name, judged_by=judge.digest, **more)


def cosine(embedder: Embedder, one: Path, other: Path | None) -> float | None:
    """Similarity of the people in two pictures, from -1 to 1; None where the first has no face."""
    a, b = embedder(one), None if other is None else embedder(other)
    return None if a is None or b is None else float(a @ b)


class Identity(_OfPeople):
    """Identity is the cosine of picture and reference by a recogniser; a picture without a face counts 0, as nobody."""

    kind = "identity"

    def open(self, library: Library, pack: str | None) -> OpenedMeasure:
        judge = self.embedder(library, pack)

        def score(case: Case) -> float | None:
            return cosine(judge, case.picture, case.reference)

        return self.opened(f"identity ({judge.name})", library, judge, score, (REFERENCE,), missing=0.0)


class TargetIdentity(_OfPeople):
    """Sim(target) of MultiID-Bench: the cosine with how the person truly looks under the prompt."""

    kind = "identity of target"

    def open(self, library: Library, pack: str | None) -> OpenedMeasure:
        judge = self.embedder(library, pack)

        def score(case: Case) -> float | None:
            return cosine(judge, case.picture, case.target)

        title = f"similarity to the target ({judge.name})"
        return self.opened(title, library, judge, score, (TARGET,), missing=0.0)


def copy_paste(picture: Tensor, target: Tensor, reference: Tensor) -> float:
    """The copy-paste measure of MultiID-Bench (WithAnyone): by which share of the angle between target and reference
    a picture leans to the reference, (angle(p, t) - angle(p, r)) / angle(t, r), from -1 (target) to 1 (copied).

    Unit vectors [d].
    """

    def angle(a: Tensor, b: Tensor) -> Tensor:
        return torch.acos((a @ b).double().clamp(-1, 1))

    whole = angle(target, reference).clamp_min(1e-6)
    return float((angle(picture, target) - angle(picture, reference)) / whole)


class CopyPaste(_OfPeople):
    """The bias towards the reference picture where the prompt asks for another look: nearer to 0 is better."""

    kind = "copy-paste"

    def open(self, library: Library, pack: str | None) -> OpenedMeasure:
        judge = self.embedder(library, pack)

        def score(case: Case) -> float | None:
            vectors = [judge(path) for path in (case.picture, case.target, case.reference) if path is not None]
            found = [v for v in vectors if v is not None]
            return copy_paste(*found) if len(found) == 3 else None

        return self.opened(f"copy-paste ({judge.name})", library, judge, score, (TARGET, REFERENCE), better=NEITHER)


class FacesFound(MeasureKind):
    """The share of pictures in which a detector finds a face."""

    kind = "faces found"
    pack: str | None = None

    def open(self, library: Library, pack: str | None) -> OpenedMeasure:
        name = self.pack or pack
        models = library.pack(name) if name else None

        def score(case: Case) -> float | None:
            return None if name is None else float(library.face(name, case.picture) is not None)

        digest = "none" if name is None else digest_of(library.pack_folder(name))
        return OpenedMeasure(f"faces found ({models.name if models else 'no pack is set'})", digest, score)


class PromptScore(MeasureKind):
    """Prompt adherence is CLIP-T, the cosine of picture and text, or what a scorer that is known by name says."""

    kind = "prompt"
    clip: str = Field(description="file of a whole CLIP, or the name of a scorer that is known")

    def open(self, library: Library, pack: str | None) -> OpenedMeasure:
        scorer = library.scorer(self.clip)

        def score(case: Case) -> float | None:
            return scorer(case.picture, case.prompt)

        return OpenedMeasure(f"prompt ({scorer.name})", scorer.digest, score)


class _OfPairs(MeasureKind):
    clip: str | None = Field(None, description="1 - CLIP-I by this CLIP")
    lpips: str | None = Field(None, description="LPIPS (squeeze) with these weights, or `random`")

    def distance(self, library: Library) -> tuple[str, str, Callable[[Path, Path], float]]:
        """Opens the distance: name, digest, function of two picture files."""
        if self.clip is not None:
            judge = library.clip(self.clip)
            return f"1 - CLIP-I, {judge.name}", judge.digest, judge.distance
        weights = self.lpips or "random"
        path = None if weights == "random" else library.find("lpips", weights)
        network = lpips_network("squeeze", path)

        @torch.no_grad()
        def apart(one: Path, other: Path) -> float:
            a, b = (read(p)[None] for p in (one, other))
            b = cover(b, *a.shape[-2:]).clamp(0, 1)  # another workflow may draw at another size
            return float(network(a * 2 - 1, b * 2 - 1))

        return (
            f"LPIPS, {'random weights' if path is None else path.stem}",
            weights if path is None else digest_of(path),
            apart,
        )


class Change(_OfPairs):
    """Says how much a reference changes beside the person: the distance from the picture without one."""

    kind = "change"

    def open(self, library: Library, pack: str | None) -> OpenedMeasure:
        name, digest, apart = self.distance(library)

        def score(case: Case) -> float | None:
            return None if case.plain is None else apart(case.picture, case.plain)

        return OpenedMeasure(f"change ({name})", digest, score, (PLAIN,), better=LOWER)


class Diversity(_OfPairs):
    """The mean distance of a picture from those of the same method, person and prompt under other seeds."""

    kind = "diversity"

    def open(self, library: Library, pack: str | None) -> OpenedMeasure:
        name, digest, apart = self.distance(library)

        def score(case: Case) -> float | None:
            return sum(apart(case.picture, other) for other in case.others) / len(case.others)

        return OpenedMeasure(f"diversity over seeds ({name})", digest, score, (OTHERS,))


MEASURES: dict[str, type[MeasureKind]] = {
    k.kind: k for k in (Identity, TargetIdentity, CopyPaste, FacesFound, PromptScore, Change, Diversity)
}

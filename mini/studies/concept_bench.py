"""Arms of the study of concepts, and the bench on which they are made and judged.

Similarity, style and place are judged by networks that took part in no other training.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ...evaluation.stats import Intervals, share
from ...tools.common import Problem, Stopwatch, say
from ..files import derived
from ..files.weights import THINGS_JUDGE, THINGS_SCORER, evaluators, thing_judge, things_scorer
from ..world.faces import PLACES, STYLES
from ..world.things import CLASSES
from .concept_making import (
    DrawnConcepts,
    FromEncoder,
    Maker,
    TunedConcepts,
    make_drawn,
    make_tuned,
)
from .concept_set import GROUPS, PEOPLE, PROMPTS, SEEN, UNSEEN, ConceptChunk

SIMILARITY, PROMPT, STYLE, PLACE, CLASS = "similarity", "prompt", "style", "place", "class"
ALL = "all"
TUNING_STEPS = (0, 2, 5, 12, 25)
USUAL = 12  # tuning steps: what the paper calls at most
BLENDS = (0.25, 0.5, 0.75, 1.0)
ONE_PATH, BLENDED = "one path (blend 1)", "tuned at blend 1, drawn at others"

#: Pictures -> what is said of each
Network = Callable[[Tensor], Tensor]
#: By arm and what it is shown after, its pictures
Shown = dict[str, dict[str, DrawnConcepts]]
#: By measure, values [concepts, pictures]
Values = dict[str, Tensor]


# --- judges


class ConceptJudges:
    """The networks that measure: likeness by group of concepts, style and place of all."""

    def __init__(self) -> None:
        judge = thing_judge(derived.stage_or_shipped("things_judge", THINGS_JUDGE))
        recogniser, self.of_faces = evaluators()
        self.embed: dict[str, Network] = {SEEN: judge.embed, UNSEEN: judge.embed, PEOPLE: recogniser.embed}
        self.kinds: dict[str, Network] = {SEEN: judge.kinds, UNSEEN: judge.kinds, PEOPLE: _unknown}
        # The scorer of faces is shown beside it, to say why there is another.
        self.scorer = things_scorer(derived.stage_or_shipped("things_scorer", THINGS_SCORER))

    @torch.no_grad()
    def values(self, chunk: ConceptChunk, pictures: Tensor) -> Values:
        """Gives what they say of pictures [n, prompts, 3, H, W] of a chunk."""
        shape, flat = pictures.shape[:2], pictures.flatten(0, 1)
        embed = self.embed[chunk.group]
        references = embed(chunk.pictures)
        nouns = torch.tensor([CLASSES.index(noun) if noun in CLASSES else -1 for noun in chunk.nouns])
        style, place = (said.argmax(1).unflatten(0, shape) for said in self.scorer(flat))
        asked = [torch.tensor([named.index(a) for a in those]) for named, those in _ASKED]
        right = [(said == wanted).float() for said, wanted in zip((style, place), asked, strict=True)]
        return {
            SIMILARITY: (embed(flat).unflatten(0, shape) * references[:, None]).sum(2),
            PROMPT: (right[0] + right[1]) / 2,
            STYLE: right[0],
            PLACE: right[1],
            CLASS: (self.kinds[chunk.group](flat).unflatten(0, shape) == nouns[:, None]).float(),
        }

    @torch.no_grad()
    def named_by_the_scorer_of_faces(self, pictures: Tensor) -> Tensor:
        """Says whether the scorer that was trained on faces alone names the style of pictures [n, prompts, 3, H, W]."""
        said = self.of_faces(pictures.flatten(0, 1))[0].argmax(1).unflatten(0, pictures.shape[:2])
        return (said == torch.tensor([STYLES.index(asked.style) for asked in PROMPTS])).float()

    @torch.no_grad()
    def strangers(self, of: Sequence[ConceptChunk], truths: Sequence[Tensor], alike: bool) -> Tensor:
        """The similarity of the drawn truth to another concept of its group, [concepts, prompts]: one of the same class
        where `alike`, else the next. NaN where there is no other."""
        found = []
        for group, members in GROUPS.items():
            mine = [n for n, chunk in enumerate(of) if chunk.group == group]
            embed, further = self.embed[group], members.classes if alike else 1
            references = torch.cat([embed(of[n].pictures) for n in mine])
            drawn = torch.cat([truths[n] for n in mine])
            seen = embed(drawn.flatten(0, 1)).unflatten(0, drawn.shape[:2])
            similarity = (seen * references.roll(-further, 0)[:, None]).sum(2)
            found.append(similarity if further % len(references) else torch.full_like(similarity, torch.nan))
        return torch.cat(found)


_ASKED = ((STYLES, [a.style for a in PROMPTS]), (PLACES, [a.place for a in PROMPTS]))


def _unknown(pictures: Tensor) -> Tensor:
    """Faces have one class, which is not judged."""
    return torch.full((len(pictures),), -1)


def joined(parts: Sequence[Values], dim: int = 0) -> Values:
    """Values of several chunks (dim 0), or of several runs (dim 1), as one."""
    return {name: torch.cat([part[name] for part in parts], dim) for name in parts[0]}


def figures(values: Values, groups: Sequence[str]) -> Intervals:
    """Each measure over all concepts and over those of each group; groups: that of each concept."""
    out = {}
    for measure, of_all in values.items():
        for group in (ALL, *GROUPS):
            chosen = torch.tensor([group in (ALL, of_one) for of_one in groups])
            if chosen.any() and not (measure == CLASS and group in (ALL, PEOPLE)):
                out[f"{measure}, {group}"] = share(of_all[chosen])
    return out


def minus(one: Values, other: Values) -> Values:
    """Paired differences of similarity and prompt, run by run; of as many runs as both have."""
    wide = {name: min(one[name].shape[1], other[name].shape[1]) for name in (SIMILARITY, PROMPT)}
    return {name: one[name][:, :n] - other[name][:, :n] for name, n in wide.items()}


# --- what is drawn


@dataclass
class Bench:
    """Makes what is missing, and judges. part: (i, n), of the missing chunks every n-th from the i-th on is made first;
    another process does another part."""

    base: Path
    part: tuple[int, int] = (0, 1)
    judges: ConceptJudges = field(default_factory=ConceptJudges)
    _maker: Maker | None = None

    @property
    def maker(self) -> Maker:
        """The models, loaded when something is to be made."""
        self._maker = self._maker or Maker(self.base)
        return self._maker

    def make(self, what: str, drawn: Sequence[DrawnConcepts], of: Sequence[ConceptChunk]) -> None:
        """Tune and draw what is not in the cache. what: for the lines of progress."""
        by_tuning: dict[tuple[object, ...], list[DrawnConcepts]] = {}
        for one in drawn:
            key = (one.tuned.start.key, replace(one.tuned.tuning, steps=0))
            by_tuning.setdefault(key, []).append(one)
        units = [(those, chunk) for those in by_tuning.values() for chunk in of]

        def missing(unit: tuple[list[DrawnConcepts], ConceptChunk]) -> bool:
            return not all(one.place(self.base, unit[1]).exists() for one in unit[0])

        left = [unit for unit in units if missing(unit)]
        own, of_all = self.part
        mine = left[own::of_all]
        watch = Stopwatch()
        for number, unit in enumerate([*mine, *(unit for unit in left if unit not in mine)], 1):
            if not missing(unit):  # another process was there meanwhile
                continue
            those, chunk = unit
            make_tuned(self.maker, self.base, [one.tuned for one in those], chunk)
            for one in those:
                make_drawn(self.maker, self.base, one, chunk)
            say(f"{what}: {number} of {len(left)} chunks made in {watch.seconds:.0f} s ({chunk.group})")

    def values(self, runs: Sequence[DrawnConcepts], of: Sequence[ConceptChunk]) -> Values:
        """Gives what the judges say of what was made, the runs beside each other."""
        parts = [joined([self.judges.values(chunk, run.pictures(self.base, chunk)) for chunk in of], 0) for run in runs]
        return joined(parts, 1)

    def close(self) -> None:
        """Leave the base as it was."""
        if self._maker is not None:
            self._maker.close()


@dataclass(frozen=True)
class EncoderArm:
    """An arm has concept encoders, one a training seed, and tuning steps at which it is drawn."""

    starts: tuple[FromEncoder, ...]
    steps: tuple[int, ...]

    def drawn(self, step: int, tuned: float | None = None, blend: float | None = None) -> list[DrawnConcepts]:
        """The runs after so many steps, tuned and drawn at blends that are given, else at each file's own."""
        runs = []
        for start in self.starts:
            own = start.tuning if tuned is None else replace(start.tuning, blend=tuned)
            runs.append(DrawnConcepts(TunedConcepts(start, own, step), own.blend if blend is None else blend))
        return runs


def parse(chosen: Sequence[str], steps: Sequence[int] = TUNING_STEPS) -> dict[str, EncoderArm]:
    """NAME=FILE or NAME=FILE@STEPS in turn -> the arm of each name. STEPS, as 0,12, are for the whole arm, in the place
    of `steps`. All are drawn untuned, and after the main one's usual steps. Raises Problem for what is no file."""
    arms: dict[str, EncoderArm] = {}
    for one in chosen:
        name, equals, rest = one.partition("=")
        own = re.fullmatch(r"(.*)@(\d+(?:,\d+)*)", rest)
        file = Path(own[1] if own else rest)
        if not equals or not name or not file.is_file():
            raise Problem(
                f"--concepts got {one!r}: give NAME=FILE or NAME=FILE@0,12, with the concept encoder of a run."
            )
        before = arms.get(name, EncoderArm((), tuple(steps)))
        at = tuple(map(int, own[2].split(","))) if own else before.steps
        arms[name] = EncoderArm((*before.starts, FromEncoder(file)), at)
    if not arms:
        raise Problem("--concepts needs a concept encoder: give NAME=FILE, the main one first.")
    usual = usual_step(next(iter(arms.values())))
    return {name: replace(arm, steps=tuple(sorted({0, usual, *arm.steps}))) for name, arm in arms.items()}


def usual_step(main: EncoderArm) -> int:
    """The tuning steps at which arms are compared: the usual ones, else the most that the main arm has."""
    return USUAL if USUAL in main.steps else max(main.steps)


def arms_of(files: Mapping[str, EncoderArm]) -> dict[str, dict[int, list[DrawnConcepts]]]:
    """Lists the runs by arm and tuning steps; the main one's with one path behind the others."""
    arms = {name: {step: arm.drawn(step) for step in arm.steps} for name, arm in files.items()}
    main = next(iter(files.values()))
    return arms | {ONE_PATH: {step: main.drawn(step, tuned=1.0) for step in main.steps}}


def blends_of(main: EncoderArm, step: int) -> dict[float, list[DrawnConcepts]]:
    """Lists the main arm's runs by blend of the drawing, tuned with one path."""
    return {blend: main.drawn(step, tuned=1.0, blend=blend) for blend in BLENDS}


def pairs_of(names: Sequence[str]) -> list[tuple[str, str]]:
    """The arms that are compared: each with the main one, which is the first, and neighbours with each other."""
    main, *others = names
    trained = [name for name in others if name != ONE_PATH]
    return [*((main, other) for other in others), *zip(trained, trained[1:], strict=False)]


def members_of(of: Sequence[ConceptChunk]) -> list[tuple[str, int]]:
    """The group and number of each concept."""
    return [(chunk.group, number) for chunk in of for number in chunk.numbers]


def groups_of(of: Sequence[ConceptChunk]) -> list[str]:
    """The group of each concept."""
    return [chunk.group for chunk in of for _ in chunk.numbers]

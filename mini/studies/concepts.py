"""What is a concept from one picture worth? Concept encoders, tuned for some steps, against two usual baselines.

Concepts that nothing was trained on (`concept_set`), each from its one photo, drawn under four prompts. Files of one
name are one arm, trained with several seeds; the first is the main one, whose variants and baselines are measured too.
Similarity, style and place are judged by networks that took part in no other training. Writes concepts.md, .json, .png
(curves) and .jpg; all that is tuned or drawn is taken from the cache where it is there (`concept_making`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...evaluation.contact_sheet import Cell, contact_sheet
from ...evaluation.stats import Interval, proportion, share
from ...lookahead.files.concept_file import read_concept_encoder
from ...lookahead.method.concept import word_direction
from ...lookahead.method.concept_tuning import Tuning
from ...sdxl.concept import token_of, word_tables
from ...tools.common import Problem, Stopwatch, say
from ..files import derived
from ..files.weights import THINGS_JUDGE, THINGS_SCORER, evaluators, thing_judge, things_scorer
from ..world.faces import PLACES, STYLES
from ..world.things import CLASSES
from . import concept_speed
from .concept_making import (
    STEPS,
    Concepts,
    DrawnConcepts,
    FromEncoder,
    FromWord,
    Maker,
    Start,
    TunedConcepts,
    make_drawn,
    make_tuned,
)
from .concept_set import FACE, GROUPS, PEOPLE, PROMPTS, SEEN, SWEPT_FROM, UNSEEN, ConceptChunk, chunks
from .concept_speed import Speed
from .study import CFG, Figures, pyplot, render, save_figure, to_image, write_page

SIMILARITY, PROMPT, STYLE, PLACE, CLASS = "similarity", "prompt", "style", "place", "class"
ALL = "all"
TUNING_STEPS = (0, 2, 5, 12, 25)
USUAL = 12  # tuning steps: what the paper calls at most
BLENDS = (0.25, 0.5, 0.75, 1.0)
ONE_PATH, BLENDED = "one path (blend 1)", "tuned at blend 1, drawn at others"

# Baselines: by how many times our time, on how many concepts, spread over classes and people. At 10 and 50 times the
# time as many concepts as ours would take days; over 24 and 12 of them with four pictures each, differences of the size
# that matters (a tenth) are still told, since they are paired.
BUDGETS: dict[int, int | None] = {1: None, 10: 24, 50: 12}
SWEPT = {1: 8, 10: 8, 50: 3}  # concepts on which a rate is chosen, of other seeds
OWN_FACTORS = (1 / 3, 1.0, 3.0)  # of our own tuning rates, in the same sweep

#: Pictures -> what is said of each
Network = Callable[[Tensor], Tensor]
#: By arm and what it is shown after, its pictures
Shown = dict[str, dict[str, DrawnConcepts]]
#: By measure, values [concepts, pictures]
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Baseline:
    """A way to make a concept without an encoder, which is told the class. rates: by budget, those that are tried;
    offset, word: what each is multiplied with, for the matrices and for the word."""

    start: Start
    rates: Mapping[int, tuple[float, ...]]
    offset: float
    word: float

    def tuning(self, rate: float, batch: int) -> Tuning:
        """Plain diffusion loss, one path."""
        return Tuning(
            batch=batch,
            offset_rate=self.offset * rate,
            word_rate=self.word * rate,
            blend=1.0,
            word_weight=0.0,
            norm_weight=0.0,
        )


INVERSION, LORA, LORA_WORD = "textual inversion", "LoRA, the class's word fixed", "LoRA and the word"


def baselines(rank: int) -> dict[str, Baseline]:
    """The baselines, with LoRA matrices of a rank."""
    lora = {1: (2e-3, 6e-3, 2e-2), 10: (5e-4, 1.5e-3, 5e-3), 50: (2e-4, 6e-4, 2e-3)}
    inversion = {1: (0.03, 0.1, 0.3), 10: (0.01, 0.03, 0.1), 50: (0.004, 0.012, 0.04)}
    return {
        INVERSION: Baseline(FromWord(), inversion, 1.0, 1.0),
        LORA: Baseline(FromWord(rank), lora, 1.0, 0.0),
        LORA_WORD: Baseline(FromWord(rank), lora, 1.0, 10.0),
    }


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


def figures(values: Values, groups: Sequence[str]) -> Figures:
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


# --- baselines


def score(values: Values) -> float:
    """A rate is chosen by this: the mean of similarity and prompt."""
    return float((values[SIMILARITY] + values[PROMPT]).mean() / 2)


def sweep(bench: Bench, what: str, settings: Mapping[str, DrawnConcepts], count: int) -> dict[str, float]:
    """The score of each setting, on `count` concepts that take part in nothing else."""
    of = chunks(count, SWEPT_FROM)
    bench.make(what, list(settings.values()), of)
    return {name: score(bench.values([drawn], of)) for name, drawn in settings.items()}


def drawn_of(baseline: Baseline, rate: float, batch: int, steps: int) -> DrawnConcepts:
    """Says what a baseline draws after so many steps."""
    return DrawnConcepts(TunedConcepts(baseline.start, baseline.tuning(rate, batch), steps), 1.0)


def steps_of(budget: int, ours: Speed, theirs: Speed) -> int:
    """Counts the tuning steps of another that take `budget` times our time, with the prediction and the usual steps."""
    return max(1, round((budget * ours.seconds(USUAL) - theirs.predict) / theirs.step))


def rates(
    bench: Bench, name: str, baseline: Baseline, budgets: Sequence[int], batch: int, speeds: Mapping[str, Speed]
) -> dict[int, dict[str, float]]:
    """The score of each rate by budget."""
    found = {}
    for budget in budgets:
        steps = steps_of(budget, speeds[OURS], speeds[name])
        settings = {f"{rate:g}": drawn_of(baseline, rate, batch, steps) for rate in baseline.rates[budget]}
        found[budget] = sweep(bench, f"{name}, rates at {budget} times the time", settings, SWEPT[budget])
    return found


OURS = "ours"


def best(scores: Mapping[str, float]) -> str:
    """The setting with the best score."""
    return max(scores, key=lambda name: scores[name])


def compare(
    bench: Bench,
    files: Mapping[str, EncoderArm],
    references: int,
    step: int,
    budgets: Mapping[int, int | None],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Speed], Shown]:
    """The baselines by name and budget, each with ours on the same concepts; the sweeps of rates; the speeds; what of
    the baselines can be shown."""
    main = next(iter(files.values()))
    first = main.starts[0]
    network = read_concept_encoder(first.file)[0]
    known = baselines(network.sizes.rank if network.names else 4)
    batch = first.tuning.batch
    speeds = {OURS: concept_speed.of(bench.base, first, first.tuning)}
    for name, arm in list(files.items())[1:]:
        speeds[name] = concept_speed.of(bench.base, arm.starts[0], arm.starts[0].tuning)
    speeds |= {name: concept_speed.of(bench.base, b.start, b.tuning(1e-3, batch)) for name, b in known.items()}
    sweeps: dict[str, Any] = {}
    if not budgets:
        return {}, sweeps, speeds, {}
    own = {
        f"{factor:.3g} x its own": DrawnConcepts(
            TunedConcepts(
                first,
                replace(
                    first.tuning,
                    offset_rate=factor * first.tuning.offset_rate,
                    word_rate=factor * first.tuning.word_rate,
                ),
                step,
            ),
            first.tuning.blend,
        )
        for factor in OWN_FACTORS
    }
    sweeps[OURS] = {"1": sweep(bench, "our own rates", own, SWEPT[1])}
    short = [budget for budget in budgets if budget < 50]
    found = {name: rates(bench, name, b, short, batch, speeds) for name, b in known.items()}
    # The stronger of the two kinds of LoRA, over the budgets at which both were tried.
    lora = max((LORA, LORA_WORD), key=lambda name: sum(max(s.values()) for s in found[name].values()))
    long = [budget for budget in budgets if budget >= 50]
    results: dict[str, Any] = {}
    shown: Shown = {}
    whole = chunks(references)
    ours = bench.values(main.drawn(step), whole)
    for name in (INVERSION, lora):
        found[name] |= rates(bench, name, known[name], long, batch, speeds)
        results[name] = {}
        for budget, count in budgets.items():
            of = chunks(min(references, count or references))
            rate, steps = best(found[name][budget]), steps_of(budget, speeds[OURS], speeds[name])
            drawn = drawn_of(known[name], float(rate), batch, steps)
            bench.make(f"{name}, {budget} times the time", [drawn], of)
            if of == whole:
                shown.setdefault(name, {})[f"{budget} x the time"] = drawn
            chosen = torch.tensor([members_of(whole).index(member) for member in members_of(of)])
            values = bench.values([drawn], of), {measure: of_all[chosen] for measure, of_all in ours.items()}
            groups = groups_of(of)
            results[name][str(budget)] = {
                "steps": steps,
                "rate": float(rate),
                "concepts": len(groups),
                "figures": figures(values[0], groups),
                "ours": figures(values[1], groups),
                "gain": figures(minus(values[1], values[0]), groups),
            }
    sweeps |= {name: {str(b): scores for b, scores in of_name.items()} for name, of_name in found.items()}
    return results, sweeps, speeds, shown


# --- words


def words_of(bench: Bench, runs: Sequence[DrawnConcepts], of: Sequence[ConceptChunk]) -> dict[str, Figures]:
    """Measures by group how often the hard word is the class's name, and the cosine of the soft word to that name."""
    text = bench.maker.frozen.text
    rows = {}
    for noun in dict.fromkeys(noun for chunk in of for noun in chunk.nouns):
        token = token_of(text, noun)
        rows[noun] = word_direction(*(table[token].detach() for table in word_tables(text)))
    out: dict[str, Figures] = {}
    for group in GROUPS:
        hits, cosines = [], []
        for chunk in (chunk for chunk in of if chunk.group == group):
            made = [Concepts.read(run.tuned.place(bench.base, chunk)) for run in runs]
            names = torch.stack([rows[noun] for noun in chunk.nouns])
            hits += [word == noun for one in made for word, noun in zip(one.words, chunk.nouns, strict=True)]
            cosines.append(torch.stack([(word_direction(c.word_l, c.word_g) * names).sum(1) for c in made], 1))
        out[group] = {"share": proportion(torch.tensor(hits)), "cosine": share(torch.cat(cosines))}
    return out


# --- what it says


def above(one: Interval, other: Interval) -> bool:
    """Says whether one is above the other with intervals that do not overlap."""
    return one.low > other.high


def verdict(compared: Mapping[str, Any], arm: Mapping[str, Figures], speeds: Mapping[str, Speed]) -> list[str]:
    """Puts into words what the figures say of the aim: above both baselines at equal time, in both measures."""
    keys = [f"{measure}, {ALL}" for measure in (SIMILARITY, PROMPT)]
    said, met = [], []
    for name, budgets in compared.items():
        if "1" not in budgets:
            continue
        ours, theirs = budgets["1"]["ours"], budgets["1"]["figures"]
        wins = {key: above(ours[key], theirs[key]) for key in keys}
        loses = {key: above(theirs[key], ours[key]) for key in keys}
        met.append(all(wins.values()))
        words = [
            f"{'above' if wins[key] else 'below' if loses[key] else 'not told apart from'} it in {key.split(',')[0]} "
            f"({ours[key]} against {theirs[key]})"
            for key in keys
        ]
        said.append(f"At equal time ours is, against {name}, {words[0]} and {words[1]}.")
        said.append(_reached(name, budgets, arm, speeds))
    if met:
        state = "reached" if all(met) else "not reached"
        said.insert(
            0,
            f"The aim, above both baselines at equal time in similarity and in prompt, with intervals that do not "
            f"overlap, is {state}.",
        )
    return said


def _reached(name: str, budgets: Mapping[str, Any], arm: Mapping[str, Figures], speeds: Mapping[str, Speed]) -> str:
    key = f"{SIMILARITY}, {ALL}"
    enough = [b for b in sorted(budgets, key=int) if budgets[b]["figures"][key].value >= budgets[b]["ours"][key].value]
    most = max(budgets, key=int)
    one = (
        f"It is as similar as ours at {enough[0]} times the time, of the budgets that were tried"
        if enough
        else f"It is not as similar as ours at {most} times the time either"
    )
    theirs = budgets["1"]["figures"][key].value
    ours = [step for step in sorted(arm, key=int) if arm[step][key].value >= theirs]
    if not ours:
        return f"{one}; ours does not become as similar as it is at equal time."
    ratio = speeds[OURS].seconds(USUAL) / speeds[OURS].seconds(int(ours[0]))
    return f"{one}; after {ours[0]} steps, in {ratio:.1f} times less time, ours is as similar as it is at equal time."


def page(found: Mapping[str, Any]) -> str:
    """docs/concepts.md."""
    return render(
        "concepts.md.jinja",
        **found,
        groups=(ALL, *GROUPS),
        prompts=[asked.text for asked in PROMPTS],
        cfg=CFG,
        face=FACE,
        seconds=seconds,
        usual=USUAL,
        swept=SWEPT,
        speed={name: Speed(**speed) for name, speed in found["speeds"].items()},
    )


def curves(found: Mapping[str, Any], path: Path) -> None:
    """Similarity against prompt: a line an arm over its tuning steps, and one over the blend; baselines as points."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True)

    def line(axis: Any, points: Mapping[str, Figures], label: str, marker: str = "o") -> None:
        pairs = [(of[f"{PROMPT}, {ALL}"], of[f"{SIMILARITY}, {ALL}"]) for of in points.values()]
        x, y = ([pair[i].value for pair in pairs] for i in (0, 1))
        widths = [[[abs(getattr(p[i], end) - p[i].value) for p in pairs] for end in ("low", "high")] for i in (0, 1)]
        axis.errorbar(x, y, xerr=widths[0], yerr=widths[1], marker=marker, markersize=4, linewidth=1.2, label=label)
        for name, at_x, at_y in zip(points, x, y, strict=True):
            axis.annotate(name, (at_x, at_y), textcoords="offset points", xytext=(4, 4), fontsize=7)

    for name, steps in found["arms"].items():
        line(axes[0], steps, name)
    for name, budgets in found["baselines"].items():
        line(axes[0], {f"x{budget}": of["figures"] for budget, of in budgets.items()}, name, "s")
    line(axes[1], found["blends"], BLENDED)
    main = next(iter(found["arms"]))
    line(axes[1], {f"{found['step']} steps": found["arms"][main][str(found["step"])]}, main)
    for axis, title in zip(axes, ("over tuning steps", "over the blend of the drawing"), strict=True):
        axis.set(xlabel="prompt (style and place)", ylabel="similarity to the concept", title=title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    save_figure(figure, path)


def sheet(bench: Bench, arms: Shown, of: Sequence[ConceptChunk], path: Path) -> None:
    """A row an arm and number of steps: the first concept of each group, its photo, and what was drawn of it."""
    firsts = [next(chunk for chunk in of if chunk.group == group) for group in GROUPS]
    headings = ["the concept", *(a.style for a in PROMPTS)] * len(firsts)

    def row(label: str, drawn: Sequence[Tensor]) -> list[Cell]:
        cells = []
        for n, (chunk, pictures) in enumerate(zip(firsts, drawn, strict=True)):
            cells.append(Cell(to_image(chunk.pictures[0]), "" if n else label))
            cells += [Cell(to_image(picture)) for picture in pictures]
        return cells

    rows = [row("drawn truth", [chunk.truth()[0] for chunk in firsts])]
    for name, steps in arms.items():
        for step, drawn in steps.items():
            rows.append(row(f"{name}, {step}", [drawn.pictures(bench.base, chunk)[0] for chunk in firsts]))
    contact_sheet(headings, rows, "Concepts from one photo", 112).save(path, quality=85)


def evaluate(
    references: int,
    out: Path,
    trained: Sequence[str],
    tuning_steps: Sequence[int] = TUNING_STEPS,
    base: Path | None = None,
    part: tuple[int, int] = (0, 1),
    with_baselines: bool = True,
) -> None:
    """Tune, draw, measure and write concepts.md, .json, .png and .jpg into `out`.

    trained: NAME=FILE or NAME=FILE@STEPS in turn, the main one first; tuning_steps: at which all others are drawn;
    base: folder of the base that draws things; part: see `Bench`; with_baselines: else the page has the arms alone.
    """
    files = parse(trained, tuning_steps)
    bench, of = Bench(base or derived.things_base(), part), chunks(references)
    arms, main = arms_of(files), next(iter(files.values()))
    step = usual_step(main)
    blends = blends_of(main, step)
    try:
        for name, by_step in arms.items():
            bench.make(name, [run for runs in by_step.values() for run in runs], of)
        bench.make(BLENDED, [run for runs in blends.values() for run in runs], of)
        compared, sweeps, speeds, beside = compare(bench, files, references, step, BUDGETS if with_baselines else {})
        found = summary(bench, of, arms, blends, step)
        found |= {
            "files": {name: [start.file.name for start in arm.starts] for name, arm in files.items()},
            "references": references,
            "baselines": compared,
            "sweeps": sweeps,
            "speeds": {name: speed._asdict() for name, speed in speeds.items()},
            "verdict": verdict(compared, found["arms"][next(iter(arms))], speeds),
        }
        out.mkdir(parents=True, exist_ok=True)
        shown: Shown = {
            name: {f"{n} steps": runs[0] for n, runs in s.items() if n in (0, step)} for name, s in arms.items()
        }
        sheet(bench, shown | beside, of, out / "concepts.jpg")
        curves(found, out / "concepts.png")
        write_page(out, "concepts", found, page(found))
    finally:
        bench.close()


def summary(
    bench: Bench,
    of: Sequence[ConceptChunk],
    arms: Mapping[str, Mapping[int, Sequence[DrawnConcepts]]],
    blends: Mapping[float, Sequence[DrawnConcepts]],
    step: int,
) -> dict[str, Any]:
    """The figures of arms and blends, with ceiling, chance and paired differences."""
    groups = groups_of(of)
    truths = [chunk.truth() for chunk in of]
    ceiling = joined([bench.judges.values(chunk, truth) for chunk, truth in zip(of, truths, strict=True)])
    chance = {
        name: figures({SIMILARITY: bench.judges.strangers(of, truths, alike)}, groups)
        for name, alike in (("another concept", False), ("another of its class", True))
    }
    values = {name: {n: bench.values(runs, of) for n, runs in by_step.items()} for name, by_step in arms.items()}
    names = list(arms)
    return {
        "step": step,
        "steps": STEPS,
        "ceiling": figures(ceiling, groups),
        "chance": chance,
        "scorer_of_faces": figures(
            {STYLE: torch.cat([bench.judges.named_by_the_scorer_of_faces(truth) for truth in truths])}, groups
        ),
        "arms": {name: {str(n): figures(v, groups) for n, v in s.items()} for name, s in values.items()},
        "gains": {
            name: {str(n): figures(minus(v, s[0]), groups) for n, v in s.items() if n} for name, s in values.items()
        },
        "pairs": {
            f"{other} - {one}": figures(minus(values[other][step], values[one][step]), groups)
            for one, other in pairs_of(names)
        },
        "blends": {f"{blend:g}": figures(bench.values(runs, of), groups) for blend, runs in blends.items()},
        "words": {name: words_of(bench, arms[name][0], of) for name in names if name != ONE_PATH},
        "words_tuned": {name: words_of(bench, arms[name][step], of) for name in names if name != ONE_PATH},
        "counts": {group: groups.count(group) for group in GROUPS},
    }


def seconds(value: float) -> str:
    """Seconds for a table: three figures."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"

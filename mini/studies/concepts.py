"""What is a concept from one picture worth? Concept encoders, tuned for some steps, against two usual baselines.

Concepts that nothing was trained on (`concept_set`), each from its one photo, drawn under four prompts. Files of one
name are one arm, trained with several seeds; the first is the main one, whose variants and baselines are measured too.
Similarity, style and place are judged by networks that took part in no other training. Writes concepts.md, .json, .png
(curves) and .jpg; all that is tuned or drawn is taken from the cache where it is there (`concept_making`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...evaluation.stats import Intervals, proportion, share
from ...lookahead.method.concept import word_direction
from ...sdxl.concept import token_of, word_tables
from ..files import derived
from .concept_baselines import BUDGETS, compare
from .concept_bench import (
    BLENDED,
    ONE_PATH,
    SIMILARITY,
    STYLE,
    TUNING_STEPS,
    Bench,
    Shown,
    arms_of,
    blends_of,
    figures,
    groups_of,
    joined,
    minus,
    pairs_of,
    parse,
    usual_step,
)
from .concept_making import (
    STEPS,
    Concepts,
    DrawnConcepts,
)
from .concept_page import curves, page, sheet, verdict
from .concept_set import GROUPS, ConceptChunk, chunks
from .study import write_page


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


def words_of(bench: Bench, runs: Sequence[DrawnConcepts], of: Sequence[ConceptChunk]) -> dict[str, Intervals]:
    """Measures by group how often the hard word is the class's name, and the cosine of the soft word to that name."""
    text = bench.maker.frozen.text
    rows = {}
    for noun in dict.fromkeys(noun for chunk in of for noun in chunk.nouns):
        token = token_of(text, noun)
        rows[noun] = word_direction(*(table[token].detach() for table in word_tables(text)))
    out: dict[str, Intervals] = {}
    for group in GROUPS:
        hits, cosines = [], []
        for chunk in (chunk for chunk in of if chunk.group == group):
            made = [Concepts.read(run.tuned.place(bench.base, chunk)) for run in runs]
            names = torch.stack([rows[noun] for noun in chunk.nouns])
            hits += [word == noun for one in made for word, noun in zip(one.words, chunk.nouns, strict=True)]
            cosines.append(torch.stack([(word_direction(c.word_l, c.word_g) * names).sum(1) for c in made], 1))
        out[group] = {"share": proportion(torch.tensor(hits)), "cosine": share(torch.cat(cosines))}
    return out

"""Ways to make a concept without an encoder, which are told the class: textual inversion and LoRA, at our time and at
multiples of it, each at the best of some rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...lookahead.files.concept_file import read_concept_encoder
from ...lookahead.method.concept_tuning import Tuning
from . import concept_speed
from .concept_bench import (
    PROMPT,
    SIMILARITY,
    USUAL,
    Bench,
    EncoderArm,
    Shown,
    Values,
    figures,
    groups_of,
    members_of,
    minus,
)
from .concept_making import (
    DrawnConcepts,
    FromWord,
    Start,
    TunedConcepts,
)
from .concept_set import SWEPT_FROM, chunks
from .concept_speed import Speed

# By how many times our time, on how many concepts, spread over classes and people. At 10 and 50 times the
# time as many concepts as ours would take days; over 24 and 12 of them with four pictures each, differences of the size
# that matters (a tenth) are still told, since they are paired.
BUDGETS: dict[int, int | None] = {1: None, 10: 24, 50: 12}
SWEPT = {1: 8, 10: 8, 50: 3}  # concepts on which a rate is chosen, of other seeds
OWN_FACTORS = (1 / 3, 1.0, 3.0)  # of our own tuning rates, in the same sweep


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


OURS = "ours"


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

"""`lookahead evaluate`: one of the studies, drawn in the real host, its figures and page written into docs/."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...tools.common import Problem
from .study import PEOPLE

#: People of these may be others than the first ones.
FROM_ANYONE = ("encoders", "guidance", "presets", "people", "reference-presets")
FEWEST = 10  # fewer make no interval, and a draw may hold one person alone
FEWEST_CONCEPTS = 6  # of these a study is tried with


@dataclass(frozen=True)
class ConceptOptions:
    """The study of concepts is given these beside its files (`concepts.evaluate`). tuning_steps: numbers with commas
    between."""

    tuning_steps: str | None = None
    base: Path | None = None
    part: tuple[int, int] = (0, 1)
    baselines: bool = True

    @property
    def steps(self) -> tuple[int, ...]:
        """The tuning steps at which concepts are drawn. Raises Problem for what is no list of numbers."""
        from .concept_bench import TUNING_STEPS

        if self.tuning_steps is None:
            return TUNING_STEPS
        try:
            steps = tuple(int(step) for step in self.tuning_steps.split(","))
        except ValueError:
            steps = (-1,)
        if min(steps) < 0:
            raise Problem(
                f"--tuning-steps is {self.tuning_steps!r}: give whole numbers from 0 with commas between, such as "
                "0,2,5,12,25."
            )
        return steps


def evaluate(
    study: str,
    out: Path,
    references: int | None = None,
    trained: Sequence[str] = (),
    first: int = 0,
    concepts: ConceptOptions | None = None,
) -> None:
    """Run a study and write its page into `out`.

    Args:
        study: one of PEOPLE.
        out: the folder of the page, its JSON file and pictures.
        references: how many held-out people (for "people" pairs of them, for "concepts" things and people); default:
            that of the study.
        trained: for "encoders" NAME=FILE[@WEIGHT] in turn, for "concepts" NAME=FILE; for "presets" names of some; for
            "guidance" losses, of which the stronger optimiser alone is drawn.
        first: for FROM_ANYONE alone, number of the first of the people.
        concepts: for "concepts" alone.
    """
    references = PEOPLE[study] if references is None else references
    fewest = FEWEST_CONCEPTS if study == "concepts" else FEWEST
    if references < fewest:
        raise Problem(f"--references is {references}, too few for figures with intervals: give at least {fewest}.")
    if concepts is not None and study != "concepts":
        raise Problem(
            "--tuning-steps, --base, --no-baselines and, of the studies, --worker are for --concepts alone: leave "
            "them out."
        )
    if first and (first < 0 or study not in FROM_ANYONE):
        studies = ", ".join(f"--{name}" for name in FROM_ANYONE)
        raise Problem(f"--first is {first}: give a number from 0, and only beside one of {studies}.")
    out.mkdir(parents=True, exist_ok=True)  # before hours of drawing, after which pictures and page are written
    if study == "encoders":
        from . import encoders

        encoders.evaluate(references, out, trained, first)
    elif study == "guidance":
        from . import guidance

        guidance.evaluate(references, out, first, trained)
    elif study == "presets":
        from . import guidance

        guidance.evaluate_presets(references, out, trained, first)
    elif study == "knobs":
        from . import knobs

        knobs.evaluate(references, out)
    elif study == "null-text":
        from . import null_text

        null_text.evaluate(references, out)
    elif study == "people":
        from . import people

        people.evaluate(references, out, first)
    elif study == "layers":
        from . import layers

        layers.evaluate(references, out)
    elif study == "reference-presets":
        from . import reference_presets

        reference_presets.evaluate(references, out, first)
    elif study == "concepts":
        from . import concepts as of_concepts

        given = concepts or ConceptOptions()
        of_concepts.evaluate(references, out, trained, given.steps, given.base, given.part, given.baselines)
    else:
        from . import reference

        reference.evaluate(references, out)

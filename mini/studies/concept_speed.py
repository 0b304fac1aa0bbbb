"""Seconds and memory that one concept costs a user: predicted and tuned alone, by one thread, in a process of its own.

    python -m lcm_lookahead.mini.studies.concept_speed BASE START TUNING REPEATS

prints them as JSON. Seconds are those of the processor, which on an idle core are those of the clock.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from ...lookahead.files.atomic import atomic
from ...lookahead.method.concept import Concept
from ...lookahead.method.concept_tuning import Tuning
from ...sdxl.concept_maker import ConceptTuner
from ...sdxl.cpu_attention import cpu_attention
from ...tools.common import Problem
from . import concept_making
from .concept_making import Maker, Start, base_key, code, started
from .concept_set import SEEN, ConceptChunk

REPEATS = 3
STEPS = 12  # of tuning, in one measurement


class Speed(NamedTuple):
    """A concept takes so many seconds to predict, and for each tuning step; and GB at most: with the models loaded,
    while predicting, while tuning."""

    predict: float
    step: float
    loaded_gb: float
    predict_gb: float
    tune_gb: float

    def seconds(self, steps: float) -> float:
        """A concept tuned for some steps, from its picture on."""
        return self.predict + steps * self.step


def measure(base: Path, start: Start, tuning: Tuning, repeats: int = REPEATS, steps: int = STEPS) -> Speed:
    """Measure in this process, by the one thread of the caller."""
    maker = Maker(base)
    maker.close()
    loaded, chunk = _peak(), ConceptChunk(SEEN, (0,))
    picture, made = chunk.pictures[0], list[Concept]()
    predict = _seconds(lambda: made.append(start.make(maker.frozen, chunk)[0]), repeats)
    predicted, settings = _peak(), replace(tuning, steps=steps)
    tuner = ConceptTuner(maker.frozen, attention=cpu_attention)
    step = _seconds(lambda: tuner.tune(made[0], picture, settings), repeats) / steps
    return Speed(predict, step, loaded, predicted, _peak())


def of(base: Path, start: Start, tuning: Tuning) -> Speed:
    """Gives what `measure` finds in a process of its own; kept, since the baselines' steps follow from it."""
    settings = json.dumps(asdict(tuning), sort_keys=True)
    key = repr((code(), base_key(base), start.key, settings, STEPS, REPEATS))
    place = concept_making.STORE / f"speed-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    if not place.exists():
        command = [sys.executable, "-m", __name__, str(base), start.argument, settings, str(REPEATS)]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise Problem(f"The speed of a concept could not be measured: {done.stderr.strip().splitlines()[-1]}")
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic(place) as part:
            part.write_text(done.stdout.splitlines()[-1])
    return Speed(**json.loads(place.read_text()))


def _seconds(work: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        begun = time.process_time()
        work()
        seconds.append(time.process_time() - begun)
    return median(seconds)


def _peak() -> float:
    import resource  # there is none on Windows, which has no use for the rest of the study either

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main(base: str, start: str, settings: str, repeats: str) -> None:
    """Print what `measure` finds."""
    found = measure(Path(base), started(start), Tuning(**json.loads(settings)), int(repeats), STEPS)
    print(json.dumps(found._asdict()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])

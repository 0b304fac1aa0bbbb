"""Named settings of the guidance: none, five for who draws, best-of-N, and six in the manner of published methods.

All of them are settings of one sampler, so that methods are compared without a difference in anything else. What a
method has beside (a prior of its own, a schedule of the step size, a norm of its residual) is not there: a preset is in
the manner of its source, not a copy of it. Those that come from guidance by x0 are for plain x0 as much as for
lookahead; which of both it is, the shortcut says.

The artists' five are ours: a warm start (`leaning`), and combinations of what the sources found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .latent_optimisation import Optimisation
from .schedule import chosen_steps

X0, LOOKAHEAD = "x0", "lookahead"
#: What an iteration takes with its backward pass, in evaluations of the UNet (docs/bench.md), by what looks ahead.
ITERATION: Mapping[str, float] = {X0: 2.66, LOOKAHEAD: 3.23}
EVERY_STEP = 1000  # more than a run has


@dataclass(frozen=True)
class GuidanceSettings:
    """Says how a run is guided.

    start: where in the sampling it begins, by the host's convention (0 first step, 1 last); steps: how many in a row;
    time_travel: how often a guided step is gone back and guided again; jitter: how far the scale of the few-step LoRA
    is lowered by chance, 0.9 draws it from [0.1, 1], as in the paper's training (`schedule.lora_scale`); best_of: how
    many noises are looked at before, the picture's own among them; source: whom the settings follow; lean: how far the
    preview gives way to the reference before all else (`leaning.lean_towards`), where a loss can show it; shown_nobody:
    where it begins instead with a loss that cannot.
    """

    optimisation: Optimisation = field(default_factory=Optimisation)
    start: float = 0.12
    steps: int = 1
    time_travel: int = 0
    jitter: float = 0.9
    best_of: int = 1
    source: str = ""
    lean: float = 0.0
    shown_nobody: float | None = None

    def with_nobody_shown(self) -> GuidanceSettings:
        """The settings for a loss that has nothing to lean to."""
        return self if self.shown_nobody is None else replace(self, start=self.shown_nobody)

    def without_chance(self) -> GuidanceSettings:
        """The settings where nothing is drawn by chance (no few-step LoRA, no random views): there a mean of several
        draws is one of them, and a loss that is measured again is the same."""
        return replace(self, optimisation=replace(self.optimisation, smoothing=1, judged=0))

    @property
    def acts(self) -> bool:
        """Says whether anything is moved at all."""
        return self.optimisation.iterations > 0 or self.best_of > 1 or self.lean > 0

    def evaluations(self, iteration: float = ITERATION[LOOKAHEAD], steps: int = 50) -> float:
        """Counts what the guidance takes beside the run itself, in evaluations of the UNet for one picture.

        iteration: what one takes with its backward pass, a forward pass being 1; steps: of the run. What only the
        report shows is not counted: previews before and after, and the last loss where nothing is chosen by it.
        """
        o = self.optimisation
        levels = [1 - number / steps for number in range(steps)]
        guided = len(chosen_steps(levels, 1 - self.start, self.steps)) if o.iterations else 0
        pass_ = o.iterations * o.smoothing * (iteration if o.backward else 1)
        pass_ += 1 + o.judged if o.keep_best else 0  # of the last iterate, and of the best ones again
        travel = self.time_travel * 2  # a step of the sampled model, with and without the prompt
        looked = (self.best_of if self.best_of > 1 else 0) + (1 if self.lean else 0)
        return looked + guided * ((self.time_travel + 1) * pass_ + travel)


def best_of_as_many(settings: GuidanceSettings, iteration: float, steps: int) -> GuidanceSettings:
    """The baseline of any guidance: the best of as many seeds as its evaluations can look at (see `evaluations`)."""
    return GuidanceSettings(Optimisation(0), start=0.0, best_of=max(1, round(settings.evaluations(iteration, steps))))


#: On the noise's sphere, with Nesterov and a step size that falls, the best three iterates judged again
OURS = Optimisation(nesterov=True, decay=True, sphere=True, judged=3)
#: One gradient a step, as it is, as guidance by x0 has it
EACH_STEP = Optimisation(1, momentum=0.0, keep_norm=False, keep_best=False)


def _warm(
    lean: float, optimisation: Optimisation, source: str, jitter: float = 0.9, start: float = 0.4
) -> GuidanceSettings:
    """Ours begin where a preview shows the face well, and there it gives way, before all else, to the reference's. For
    what is no likeness that is late: by LPIPS a layout is reached to .117 from the paper's step, to .149 from there."""
    return GuidanceSettings(
        optimisation, start=start, jitter=jitter, source=source, lean=lean, shown_nobody=GuidanceSettings.start
    )


OFF, INSTANT, GENTLE, BALANCED, STRONG, QUICK, BEST_OF = (
    "off",
    "instant",
    "gentle",
    "balanced",
    "strong",
    "quick",
    "best of 16",
)
DPS, MPGD, FREEDOM, DSG, RENO, TFG = "DPS", "MPGD", "FreeDoM", "DSG", "ReNO", "TFG-like"
PRESETS: Mapping[str, GuidanceSettings] = {
    OFF: GuidanceSettings(Optimisation(0), source="no guidance, to compare with"),
    INSTANT: _warm(
        1.0, Optimisation(0), "ours: the preview's face gives way to the reference's, and that is all", jitter=0.0
    ),
    GENTLE: _warm(
        1.0,
        replace(OURS, iterations=3, step_size=0.02),
        "ours: earlier than balanced, so that more of the run draws anew, in less time",
        start=0.3,
    ),
    BALANCED: _warm(
        0.8,
        replace(OURS, iterations=5, step_size=0.02),
        "ours: sphere of DSG (2402.03201), Nesterov of ReNO (2406.04312), judged without chance",
    ),
    STRONG: _warm(0.8, replace(OURS, iterations=10, step_size=0.02), "ours: balanced, twice as long"),
    QUICK: _warm(
        0.8,
        replace(OURS, iterations=5, step_size=0.02, backward=False),
        "ours: balanced without backward (MPGD 2311.16424, FlowChef 2412.00100)",
    ),
    BEST_OF: GuidanceSettings(Optimisation(0), start=0.0, best_of=16, jitter=0.0, source="best-of-N, as in 2406.04312"),
    DPS: GuidanceSettings(
        replace(EACH_STEP, step_size=0.01), start=0.0, steps=EVERY_STEP, jitter=0.0, source="arXiv 2209.14687"
    ),
    MPGD: GuidanceSettings(
        replace(EACH_STEP, step_size=0.01, backward=False),
        start=0.0,
        steps=EVERY_STEP,
        jitter=0.0,
        source="arXiv 2311.16424",
    ),
    FREEDOM: GuidanceSettings(
        replace(EACH_STEP, step_size=0.02), start=0.3, steps=20, time_travel=2, jitter=0.0, source="arXiv 2303.09833"
    ),
    DSG: GuidanceSettings(
        replace(EACH_STEP, step_size=0.02, sphere=True),
        start=0.0,
        steps=EVERY_STEP,
        jitter=0.0,
        source="arXiv 2402.03201",
    ),
    RENO: GuidanceSettings(
        Optimisation(50, 0.004, nesterov=True), start=0.0, jitter=0.0, source="arXiv 2406.04312, its norm kept"
    ),
    TFG: GuidanceSettings(
        Optimisation(2, 0.02, momentum=0.0, keep_best=False, smoothing=4),
        steps=4,
        time_travel=1,
        source="arXiv 2409.15761, smoothed over the LoRA's strength",
    ),
}

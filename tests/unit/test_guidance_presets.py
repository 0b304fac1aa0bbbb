"""The named settings of the guidance: each descends a closed-form loss, and costs what it is said to cost."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from lcm_lookahead.lookahead.method.guidance_presets import (
    ITERATION,
    LOOKAHEAD,
    OFF,
    PRESETS,
    X0,
    GuidanceSettings,
)
from lcm_lookahead.lookahead.method.latent_optimisation import best_start, evaluate_preview, optimise_latent
from lcm_lookahead.lookahead.method.leaning import lean_towards

SHAPE, ALPHA_BAR = (2, 4, 8, 8), torch.tensor(0.1)
HELP = Path(__file__).resolve().parents[2] / "web" / "docs" / "LookaheadGuidanceSampler.md"


def quadratic(picture, rows):
    return (picture - 0.5).square().mean(dim=(1, 2, 3)), torch.ones(len(picture), dtype=torch.bool)


class Counting:
    """Evaluates previews of a bent map, and counts what that takes, a pass with its backward pass being 10."""

    def __init__(self):
        self.passes = 0.0

    def predict(self, z):
        self.passes += 10 if torch.is_grad_enabled() else 1
        return 2 * z.sin()

    def evaluate(self, predict, decode, loss, z, gradient):
        return evaluate_preview(predict, decode, loss, z, gradient)

    def look(self, z):
        return self.evaluate(self.predict, lambda latent: latent[:, :3], quadratic, z, False)

    def guide(self, preset, z):
        """A guided step of a run, as the node has it."""
        noise = torch.Generator().manual_seed(3)
        if preset.best_of > 1:
            noises = [lambda: torch.randn(SHAPE, generator=noise)] * (preset.best_of - 1)
            z = best_start(self.look, z, noises, ALPHA_BAR)
        if preset.lean:
            with torch.no_grad():
                preview = self.predict(z)
            z = lean_towards(z, preview, torch.full_like(z, 0.5), ALPHA_BAR, preset.lean)
        o = preset.optimisation
        options = {"alpha_bar": ALPHA_BAR, "measure_last": False}
        return optimise_latent(self.predict, lambda latent: latent[:, :3], quadratic, z, o, **options)


def test_only_the_presets_that_lean_begin_elsewhere_where_a_loss_shows_nobody():
    for preset in PRESETS.values():
        other = preset.with_nobody_shown()
        assert other.start == (GuidanceSettings().start if preset.lean else preset.start)
        assert dataclasses.replace(other, start=preset.start) == preset


@pytest.fixture
def z():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_lowers_the_loss_the_same_each_time_and_at_its_cost(z, name):
    preset, counting = PRESETS[name], Counting()
    out = counting.guide(preset, z)
    # Of every-step and travelling presets a step is that part.
    o = GuidanceSettings(preset.optimisation, best_of=preset.best_of, lean=preset.lean)
    assert counting.passes == o.evaluations(iteration=10)
    before, after = (Counting().look(at).values for at in (z, out))
    assert (after < before).all() if name != OFF else torch.equal(out, z)
    assert torch.equal(Counting().guide(preset, z), out)


def test_costs_count_steps_travels_and_what_is_judged():
    o = PRESETS["DPS"].optimisation
    assert GuidanceSettings(o, start=0.0, steps=1000).evaluations(3.0, steps=20) == 20 * 3
    assert GuidanceSettings(o, start=0.5, steps=1000).evaluations(3.0, steps=20) == 10 * 3
    assert GuidanceSettings(o, time_travel=2).evaluations(3.0) == 3 * 3 + 2 * 2
    assert PRESETS["balanced"].evaluations(3.0) == 5 * 3 + 1 + 3 + 1
    assert PRESETS["balanced"].without_chance().evaluations(3.0) == 5 * 3 + 1 + 1
    assert PRESETS["best of 16"].evaluations() == 16 and PRESETS[OFF].evaluations() == 0


def test_quick_costs_a_quarter_of_what_the_node_s_numbers_cost():
    assert PRESETS["quick"].evaluations() <= GuidanceSettings().evaluations() / 4


def test_the_help_page_says_what_each_preset_costs():
    rows = re.findall(r"^\| `([^`]+)` \|[^|]*\| (\d+) \| (\d+) \|$", HELP.read_text(), re.M)
    said = {name: (int(x0), int(ahead)) for name, x0, ahead in rows}
    assert said == {
        name: (
            round(preset.without_chance().evaluations(ITERATION[X0])),
            round(preset.evaluations(ITERATION[LOOKAHEAD])),
        )
        for name, preset in PRESETS.items()
    }

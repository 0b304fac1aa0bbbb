"""Presets of the guidance sampler: their numbers, what the page is told, and that runs by them do what they say."""

import logging
import re
from dataclasses import replace

import guided_cases
import pytest
import torch

draw, guide, loss, shortcut, vae = guided_cases.ALL  # fixtures


def test_as_set_below_or_no_preset_is_the_node_s_numbers_to_the_bit_and_off_is_no_guidance(guide, draw):
    own = draw(guide()[0])
    assert torch.equal(draw(guide(preset="as set below")[0]), own) and not torch.equal(draw("euler"), own)
    assert torch.equal(draw(guide(preset="off")[0]), draw("euler"))


def test_a_preset_takes_the_place_of_the_numbers(guide, pack, caplog):
    """A field that says otherwise is named in the log. (The loss here shows nobody.)"""
    presets, numbers_of = (
        pack.module("lookahead.method.guidance_presets").PRESETS,
        pack.module("nodes.guidance.preset_numbers").numbers_of,
    )
    for name, preset in presets.items():
        with caplog.at_level(logging.INFO):
            caplog.clear()
            settings = guide(preset=name, iterations=7, start=0.9, best_of=5)[0].lookahead[0].settings
            assert settings == preset.with_nobody_shown()
            assert f"by its preset {name}: " in caplog.text and "(not 7)" in caplog.text
            caplog.clear()
            settings = guide(preset=name, **numbers_of(preset))[0].lookahead[0].settings
            assert settings == preset.with_nobody_shown()
            assert (f"start 0.12 (not {preset.start})." in caplog.text) if preset.lean else not caplog.text


@pytest.mark.parametrize(
    "name", ["off", "gentle", "balanced", "strong", "quick", "best of 16", "DPS", "MPGD", "FreeDoM", "DSG", "ReNO"]
)
def test_the_page_writes_a_preset_s_numbers_and_knows_what_no_number_says(guide, pack, name):
    """By the numbers that the page writes, a run is that of the preset but for what the page says is lost."""
    preset = pack.module("lookahead.method.guidance_presets").PRESETS[name]
    (asked,) = [i for i in pack.nodes["LookaheadGuidanceSampler"].define_schema().inputs if i.id == "preset"]
    about = asked.as_dict()
    assert set(about["lookahead_presets"]) == set(about["options"]) - {about["default"]}
    settings = guide(**about["lookahead_presets"][name])[0].lookahead[0].settings
    beyond = pack.module("nodes.guidance.preset_numbers").BEYOND
    usual = {field: getattr(settings.optimisation, field) for field in beyond}
    numbers = replace(preset.optimisation, **usual)
    assert settings == replace(preset, source="", optimisation=numbers, shown_nobody=None)
    lost = [word for field, word in beyond.items() if getattr(preset.optimisation, field) != usual[field]]
    assert about["lookahead_beyond"].get(name, "") == ", ".join(lost)


def test_the_report_says_whether_the_best_or_the_last_iteration_was_kept(guide, draw, pack):
    for keep_best, kept in ((True, "best"), (False, "last")):
        sampler, report = guide(iterations=2, keep_best=keep_best)
        latent = {"samples": draw(sampler, steps=1)}
        text = pack.nodes["LookaheadGuidanceReport"].execute(latent, report).result[2]
        assert re.search(rf"\(best [\d.e-]+\) in 2 iterations, kept: {kept}$", text, re.M)


@pytest.mark.parametrize("preset", ["gentle", pytest.param("strong", marks=pytest.mark.slow), "quick", "FreeDoM"])
def test_a_run_by_a_preset_lowers_the_loss(guide, draw, preset):
    """The strong one by a re-noised preview too; FreeDoM's goes back in time."""
    sampler, report = guide(preset=preset)
    out = draw(sampler, steps=3)
    (run,) = report.runs.values()
    first, best = run.iterates[0].losses[0], min(i.losses[0] for i in run.iterates)
    assert out.isfinite().all() and best < first


@pytest.fixture
def passes(mini):
    """Counts passes of the UNet."""
    seen = []
    hook = mini.model.model.diffusion_model.middle_block[0].register_forward_hook(lambda *_: seen.append(1))
    yield seen
    hook.remove()


def test_of_many_guided_steps_the_first_and_the_last_are_shown_and_nothing_else_is_computed_for_the_report(
    guide, draw, pack, passes
):
    sampler, report = guide(iterations=1, guided_steps=4, keep_best=False, backward=False)
    latent = {"samples": draw(sampler, steps=5)}
    guided = len(passes)
    draw("euler", steps=5)
    # An iteration each; the ends of the guided steps, before and after; the loss that all of it has led to.
    assert guided - (len(passes) - guided) == 4 + 4 + 1
    (run,) = report.runs.values()
    names = [f"step {number}, {when}" for number in (1, 4) for when in ("before", "after")]
    assert [name for name, _ in run.previews] == names
    text = pack.nodes["LookaheadGuidanceReport"].execute(latent, report).result[2]
    assert text.count("in 1 iterations, kept: last") == 4 and text.count("before the last move") == 3


def test_what_nothing_is_drawn_by_chance_for_is_measured_once(guide, draw, shortcut, mini, passes):
    """Without a few-step LoRA and without views a candidate has the value that it had."""
    counts = []
    for of in (shortcut(), shortcut(mini.model, kind="plain x0")):
        passes.clear()
        draw(guide(preset="quick", of=of)[0], steps=3)
        counts.append(len(passes))
    assert counts[0] - counts[1] == 3

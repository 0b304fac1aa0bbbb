"""The warm start of lookahead guidance in whole runs of the host: a preview gives way to what a loss can show."""

import pytest
import torch
from tensors import relative
from worlds import random_taesd

LATENT = (2, 4, 8, 8)


@pytest.fixture(scope="module")
def vae(pack):
    return random_taesd()


class Wanted:
    """The distance to a picture, which it shows where the place is white."""

    shows = True

    def __init__(self, place):
        self.picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(5)) * 2 - 1
        self.place = torch.ones(1, 64, 64) * place

    def __call__(self, preview, rows=None):
        return (preview - self.picture).square().mean((1, 2, 3)), torch.ones(len(preview), dtype=torch.bool)

    def shown(self, preview, rows=None):
        n = len(preview)
        return self.picture.expand(n, -1, -1, -1), self.place.expand(n, -1, -1, -1)


LEFT = (torch.arange(64) < 32).float().expand(1, 64, 64)


@pytest.fixture
def run(pack, tools, mini, texts, vae):
    """Draws with a guidance of some settings; returns the latents and the report."""
    import comfy.samplers

    shortcut = tools.run("LookaheadShortcut", tools.with_lora(mini.model), vae)

    def run(loss, **options):
        loss = pack.module("nodes.losses.lookahead_loss").LookaheadLoss(loss, name="wanted")
        settings = {"start": 0.0, "iterations": 0, "loss": loss, **options}
        node = pack.nodes["LookaheadGuidanceSampler"]
        sampler, report = node.execute(comfy.samplers.sampler_object("euler"), shortcut, **settings).result
        with torch.inference_mode():
            return tools.sample(mini.model, *texts, torch.zeros(LATENT), steps=2, sampler=sampler), report

    return run


def test_without_a_lean_a_run_keeps_its_bits_and_with_one_it_changes_where_the_loss_shows_something(run):
    plain, _ = run(Wanted(1.0))
    leaned, report = run(Wanted(1.0), lean=0.3)
    assert relative(leaned, plain) > 0.01
    nowhere, _ = run(Wanted(0.0), lean=0.3)
    assert torch.equal(nowhere, plain)
    assert not any("nothing to lean to" in note for of_run in report.runs.values() for note in of_run.notes)


def test_a_run_that_leans_decodes_one_preview_and_its_report_shows_the_others_when_asked(run, vae, monkeypatch, pack):
    decoded, decode = [], vae.first_stage_model.decode
    monkeypatch.setattr(vae.first_stage_model, "decode", lambda x: decoded.append(len(x)) or decode(x))
    leaned, report = run(Wanted(1.0), lean=0.3)
    assert decoded == [1, 1], "that of two pictures in which the faces are looked for, one after the other"
    (of_run,) = report.runs.values()
    known = [latent for _, latent in of_run.previews]
    _, without = run(Wanted(0.0), iterations=1, keep_best=False)  # no lean: its previews are computed for the report
    (other,) = without.runs.values()
    assert relative(known[0], other.previews[0][1]) < 1e-5 and relative(known[1], known[0]) > 0.01
    decoded.clear()
    _, previews, text = pack.nodes["LookaheadGuidanceReport"].execute({"samples": leaned}, report).result
    assert text == "step 1 (sigma 14.6): faces give way to the reference's by 0.3"
    assert previews.shape == (4, 64, 64, 3) and sum(decoded) == 4
    assert relative(previews[:2], vae.decode(known[0])) < 1e-5


def leaned_in(pack, monkeypatch):
    """What the run gives to `lean_towards` and takes from it, in order."""
    method, seen = pack.module("lookahead.method.leaning"), []

    def lean_towards(*given):
        seen.append((given, method.lean_towards(*given)))
        return seen[-1][1]

    monkeypatch.setattr(pack.module("nodes.guidance.guided_run"), "lean_towards", lean_towards)
    return seen


def test_the_preview_gives_way_by_the_formula_of_the_library(pack, run, monkeypatch):
    """In what the sampler has: the encoded picture in the place of the preview, under the same noise."""
    seen = leaned_in(pack, monkeypatch)
    run(Wanted(LEFT), lean=0.5)
    (((z, preview, goal, alpha_bar, amount, mask), moved),) = seen
    assert amount == 0.5 and goal.shape == preview.shape == z.shape
    assert torch.equal(mask, LEFT[:, ::8, ::8].expand(2, 1, 8, 8))
    assert torch.equal(moved[..., 4:], z[..., 4:]) and relative(moved[..., :4], z[..., :4]) > 0.01
    level = alpha_bar.reshape(-1, 1, 1, 1)
    noise = (z - level.sqrt() * preview) / (1 - level).sqrt()
    expected = level.sqrt() * (preview + goal) / 2 + (1 - level).sqrt() * noise
    assert relative(moved[..., :4], expected[..., :4]) < 1e-5


def test_the_noise_that_was_chosen_of_several_leans_and_not_the_run_s_own(pack, run, monkeypatch):
    seen = leaned_in(pack, monkeypatch)
    run(Wanted(LEFT), lean=0.5)
    chosen, report = run(Wanted(LEFT), lean=0.5, best_of=8)
    ((own, *_), _), ((best, *_), moved) = seen
    assert any("best of 8" in (of_run.start or "") for of_run in report.runs.values())
    assert relative(best, own) > 0.1 and relative(moved[..., :4], best[..., :4]) > 0.01


def test_a_loss_that_shows_nothing_is_said_in_the_report_and_changes_nothing(run):
    def colour(picture, rows=None):
        return picture.mean((1, 2, 3)).square(), torch.ones(len(picture), dtype=torch.bool)

    plain, _ = run(colour)
    same, report = run(colour, lean=0.3)
    assert torch.equal(same, plain)
    assert any("nothing to lean to" in note for of_run in report.runs.values() for note in of_run.notes)


@pytest.mark.parametrize(("loss", "start"), [(Wanted(LEFT), 0.4), (None, 0.12)], ids=["shows", "shows nobody"])
def test_a_preset_of_ours_begins_early_where_the_loss_shows_nobody(pack, tools, mini, vae, loss, start):
    import comfy.samplers

    def colour(picture, rows=None):
        return picture.mean((1, 2, 3)).square(), torch.ones(len(picture), dtype=torch.bool)

    loss = pack.module("nodes.losses.lookahead_loss").LookaheadLoss(loss or colour, name="it")
    shortcut = tools.run("LookaheadShortcut", tools.with_lora(mini.model), vae)
    node, euler = pack.nodes["LookaheadGuidanceSampler"], comfy.samplers.sampler_object("euler")
    sampler, _ = node.execute(euler, shortcut, loss, start=0.7, preset="balanced").result
    assert sampler.lookahead[0].settings.start == start

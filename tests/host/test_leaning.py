"""The warm start of lookahead guidance in whole runs of the host: the noise leans towards what a loss can show."""

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


def test_the_noise_leans_by_the_formula_of_the_library(pack, run, monkeypatch):
    """From what the sampler has, its preview, and the encoded picture: along the tangent, and back to the sphere."""
    method, seen = pack.module("lookahead.method.leaning"), []
    module = pack.module("nodes.guidance.guided_run")

    def lean_towards(*given):
        seen.append((given, method.lean_towards(*given)))
        return seen[-1][1]

    monkeypatch.setattr(module, "lean_towards", lean_towards)
    run(Wanted(LEFT), lean=0.5)
    (((z, preview, goal, alpha_bar, amount, mask), moved),) = seen
    assert amount == 0.5 and goal.shape == preview.shape == z.shape
    assert torch.equal(mask, LEFT[:, ::8, ::8].expand(2, 1, 8, 8))
    assert torch.equal(moved.z[..., 4:], z[..., 4:]) and relative(moved.z[..., :4], z[..., :4]) > 0.01
    signal = alpha_bar.sqrt().reshape(-1, 1, 1, 1) * preview
    before, after = ((of - signal)[..., :4].flatten(1) for of in (z, moved.z))
    step = amount * (goal - preview)[..., :4].flatten(1) * before.square().mean(1, keepdim=True).sqrt()
    step -= (step * before).sum(1, keepdim=True) / before.square().sum(1, keepdim=True) * before
    expected = torch.nn.functional.normalize(before + step) * before.norm(dim=1, keepdim=True)
    assert relative(after, expected) < 1e-4


def test_a_loss_that_shows_nothing_is_said_in_the_report_and_changes_nothing(run):
    def colour(picture, rows=None):
        return picture.mean((1, 2, 3)).square(), torch.ones(len(picture), dtype=torch.bool)

    plain, _ = run(colour)
    same, report = run(colour, lean=0.3)
    assert torch.equal(same, plain)
    assert any("nothing to lean to" in note for of_run in report.runs.values() for note in of_run.notes)

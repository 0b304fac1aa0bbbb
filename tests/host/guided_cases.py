"""What guided runs with random weights are made of: fixtures for the files that draw them, and how losses are read."""

import pytest
import torch
from worlds import random_taesd

LATENT = (1, 4, 8, 8)


@pytest.fixture(scope="module")
def vae(pack):
    return random_taesd()


@pytest.fixture
def loss(pack):
    """The distance of the picture's mean colour to a colour."""

    def colour(picture, rows):
        target = torch.tensor([0.4, -0.3, 0.2])
        return (picture.mean(dim=(2, 3)) - target).square().sum(1), torch.ones(len(picture), dtype=torch.bool)

    return pack.module("nodes.losses.lookahead_loss").LookaheadLoss(colour, name="colour")


@pytest.fixture
def shortcut(tools, mini, vae):
    def make(model=None, **options):
        return tools.run("LookaheadShortcut", model or tools.with_lora(mini.model), vae, **options)

    return make


@pytest.fixture
def guide(tools, shortcut, loss, pack):
    """A guided sampler and its report."""

    def make(sampler="euler", of=None, **options):
        import comfy.samplers

        sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
        options = {"iterations": 3, "start": 0.0, "loss": loss, **options}
        return pack.nodes["LookaheadGuidanceSampler"].execute(sampler, of or shortcut(), **options).result

    return make


@pytest.fixture
def draw(texts, tools, mini):
    def run(sampler, latent=LATENT, model=None, **options):
        options = {"steps": 2, **options}
        return tools.sample(model or mini.model, *texts, torch.zeros(latent), sampler=sampler, **options)

    return run


ALL = draw, guide, loss, shortcut, vae  # fixtures, for the files that guide runs


def means(report) -> list[float]:
    (run,) = report.runs.values()
    return [sum(i.losses) / len(i.losses) for i in run.iterates]


def falls(losses: list[float], below: float = 0.98) -> bool:
    """Whether the loss falls in each of the first three iterations and ends below this part of what it was. Later ones
    hang on how the processor rounds: each multiplies by ten what that changes."""
    return losses[:4] == sorted(losses[:4], reverse=True) and losses[3] < below * losses[0]

"""The warm start: noise that leans towards a latent, on its sphere."""

import pytest
import torch
from lcm_lookahead.lookahead.losses.base import Combined, Showing, showing_in
from lcm_lookahead.lookahead.losses.l1 import L1Loss
from lcm_lookahead.lookahead.method.leaning import lean_towards
from tensors import randn

ALPHA_BAR = torch.tensor([0.05, 0.2])


def state(preview):
    level = ALPHA_BAR.reshape(-1, 1, 1, 1)
    return level.sqrt() * preview + (1 - level).sqrt() * randn(2, 4, 8, 8, seed=3)


def test_nothing_leans_by_nothing_or_towards_what_is_there():
    preview, goal = randn(2, 4, 8, 8, seed=1), randn(2, 4, 8, 8, seed=2)
    z = state(preview)
    assert torch.equal(lean_towards(z, preview, goal, ALPHA_BAR, 0.0).z, z)
    assert torch.equal(lean_towards(z, preview, preview, ALPHA_BAR, 0.5).z, z)


def test_what_a_linear_denoiser_foresees_comes_nearer_to_the_goal_the_more_the_noise_leans():
    """One that takes the noise for what it is but for a tenth, which it takes for signal."""
    preview, goal = randn(2, 4, 8, 8, seed=1), randn(2, 4, 8, 8, seed=2)
    z, distances = state(preview), []
    for amount in (0.0, 0.2, 0.4, 0.8):
        noise = lean_towards(z, preview, goal, ALPHA_BAR, amount).z - ALPHA_BAR.reshape(-1, 1, 1, 1).sqrt() * preview
        distances.append(float((preview + 0.1 * noise - goal).square().mean()))
    assert distances == sorted(distances, reverse=True)


def test_the_noise_keeps_its_strength_and_what_is_masked_its_bits():
    preview, goal = randn(2, 4, 8, 8, seed=1), randn(2, 4, 8, 8, seed=2)
    z, mask = state(preview), (torch.arange(8) < 4).float().expand(2, 1, 8, 8)
    moved = lean_towards(z, preview, goal, ALPHA_BAR, 0.5, mask)
    before, after = (of - ALPHA_BAR.reshape(-1, 1, 1, 1).sqrt() * preview for of in (z, moved.z))
    assert torch.equal(moved.z[..., 4:], z[..., 4:]) and (moved.share > 0.05).all()
    assert torch.allclose(after.square().sum((1, 2, 3)), before.square().sum((1, 2, 3)), rtol=1e-4)


class Shows:
    def __call__(self, preview, rows=None):
        return preview.mean((1, 2, 3)), torch.ones(len(preview), dtype=torch.bool)

    def shown(self, preview, rows=None):
        return preview, preview[:, :1]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0)])
def test_of_combined_losses_the_first_that_counts_and_can_show_is_asked(weights):
    colour, shows = L1Loss(torch.zeros(1, 3, 8, 8)), Shows()
    combined = Combined(((weights[0], colour), (weights[1], shows)))
    assert showing_in(combined) is (shows if weights[1] else None)
    assert showing_in(shows) is shows and showing_in(colour) is None and isinstance(shows, Showing)

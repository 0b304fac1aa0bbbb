"""Noise guides: what an untrained one leaves alone, where moved noise lies, and what reads of the person."""

import pytest
import torch
from lcm_lookahead.lookahead.method.noise_guide import (
    NoiseGuide,
    NoiseGuideSizes,
    guide_noise,
    move_noise,
    signature,
)
from tensors import randn

SIZES = NoiseGuideSizes(identity=12, width=8, hidden=16)


@pytest.fixture
def guide():
    torch.manual_seed(0)
    return NoiseGuide(SIZES)


@pytest.fixture
def trained(guide):
    """One whose last layer is not zero any more."""
    torch.nn.init.normal_(guide.conv_out.weight, std=0.05)
    return guide


def latents(height=16, width=16, n=3):
    """z_t, its preview, the noise level and people."""
    people = torch.nn.functional.normalize(randn(n, 12, seed=3), dim=-1)
    return (
        randn(n, 4, height, width, seed=1),
        randn(n, 4, height, width, seed=2),
        torch.tensor([0.02, 0.05, 0.1])[:n],
        people,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_untrained_guide_changes_nothing_to_the_bit_and_can_learn(guide, dtype):
    z, preview, alpha_bar, people = latents()
    z = z.to(dtype)
    moved = guide_noise(guide, z, preview.to(dtype), alpha_bar, people)
    assert torch.equal(moved.z, z) and moved.z.dtype == dtype and not moved.share.any()
    (moved.z.float() * randn(3, 4, 16, 16, seed=9)).sum().backward()
    assert guide.conv_out.weight.grad.abs().max() > 0


def test_moved_noise_stays_on_its_sphere_and_the_signal_stays(trained):
    z, preview, alpha_bar, people = latents()
    moved = guide_noise(trained, z, preview, alpha_bar, people)
    centre = alpha_bar.sqrt().view(-1, 1, 1, 1) * preview
    before, after = ((latent - centre).flatten(1) for latent in (z, moved.z))
    assert torch.allclose(after.norm(dim=1), before.norm(dim=1), rtol=1e-5) and not torch.equal(moved.z, z)
    cosine = torch.nn.functional.cosine_similarity(before, after)
    assert torch.allclose(moved.share, 1 / cosine.square() - 1, rtol=1e-3)


def test_a_shift_along_the_noise_itself_moves_nothing():
    z, preview, alpha_bar, _ = latents()
    noise = z - alpha_bar.sqrt().view(-1, 1, 1, 1) * preview
    moved = move_noise(z, 0.3 * noise, preview, alpha_bar)
    assert torch.allclose(moved.z, z, atol=1e-5) and moved.share.max() < 1e-10


def test_under_a_mask_the_rest_keeps_its_bits_and_the_noise_inside_its_strength(trained):
    z, preview, alpha_bar, people = latents()
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :6], mask[..., 3] = 1.0, 0.5
    moved = guide_noise(trained, z, preview, alpha_bar, people, mask)
    inside = (mask > 0).expand_as(z)
    assert torch.equal(moved.z[~inside], z[~inside]) and not torch.equal(moved.z[inside], z[inside])
    centre = alpha_bar.sqrt().view(-1, 1, 1, 1) * preview
    before, after = (((latent - centre) * inside).flatten(1).norm(dim=1) for latent in (z, moved.z))
    assert torch.allclose(after, before, rtol=1e-5)
    nowhere = guide_noise(trained, z, preview, alpha_bar, people, torch.zeros(1, 1, 16, 16))
    assert torch.equal(nowhere.z, z)


def test_each_picture_is_moved_by_itself_for_its_own_person(trained):
    z, preview, alpha_bar, people = latents()
    together = guide_noise(trained, z, preview, alpha_bar, people).z
    for n in range(3):
        one = slice(n, n + 1)
        alone = guide_noise(trained, z[one], preview[one], alpha_bar[one], people[one]).z
        assert torch.allclose(alone, together[one], atol=1e-5)
    other = guide_noise(trained, z, preview, alpha_bar, people.roll(1, 0)).z
    assert (other - together).flatten(1).abs().amax(1).min() > 1e-4


@pytest.mark.parametrize("size", [(1, 1), (13, 17), (24, 8)])
def test_latents_of_any_size_are_read(trained, size):
    z, preview, alpha_bar, people = latents(*size)
    assert trained(z, preview, alpha_bar, people).shape == z.shape


def test_one_noise_level_may_stand_for_all(trained):
    z, preview, _, people = latents()
    level = torch.tensor(0.05)
    each = trained(z, preview, level.expand(3), people)
    assert torch.equal(trained(z, preview, level, people), each)


def test_the_default_is_a_few_megabytes():
    with torch.device("meta"):
        numbers = sum(p.numel() for p in NoiseGuide(NoiseGuideSizes()).parameters())
    assert 2 * numbers < 6e6  # bytes in 16 bit


def test_sizes_follow_from_the_weights():
    assert NoiseGuideSizes.from_state_dict(NoiseGuide(SIZES).state_dict()) == SIZES
    with pytest.raises(ValueError, match="multiple of 8"):
        NoiseGuideSizes(width=12)


def test_a_signature_tells_recognisers_apart():
    def recogniser(seed):
        weights = randn(3 * 32 * 32, 12, seed=seed)
        return lambda crops: torch.nn.functional.normalize(crops.flatten(1) @ weights, dim=-1)

    one, again, other = (signature(recogniser(seed), 32) for seed in (1, 1, 2))
    assert torch.equal(one, again) and float(one @ other) < 0.9

"""Noise guides: what an untrained one does, where moved noise lies, and what reads of the person."""

import pytest
import torch
from lcm_lookahead.lookahead.method.leaning import lean_towards
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
    """z_t, its preview, the goal, where the face is, the noise level and people."""
    people = torch.nn.functional.normalize(randn(n, 12, seed=3), dim=-1)
    place = torch.zeros(n, 1, height, width)
    place[..., : (width + 1) // 2], place[..., 0] = 1.0, 0.5
    z, preview, goal = (randn(n, 4, height, width, seed=seed) for seed in (1, 2, 4))
    return z, preview, goal, place, torch.tensor([0.02, 0.05, 0.1])[:n], people


def leaned(z, preview, goal, place, alpha_bar, people):
    """What the latents are before any noise moves, and their signal."""
    return lean_towards(z, preview, goal, alpha_bar, 1.0, place), preview + place * (goal - preview)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_untrained_guide_is_the_warm_start_to_the_bit_and_can_learn(guide, dtype):
    z, preview, *rest = latents()
    given = z.to(dtype), preview.to(dtype), *rest
    moved = guide_noise(guide, *given)
    assert torch.equal(moved.z, leaned(*given)[0]) and moved.z.dtype == dtype and not moved.share.any()
    assert not torch.equal(moved.z, given[0])
    (moved.z.float() * randn(3, 4, 16, 16, seed=9)).sum().backward()
    assert guide.conv_out.weight.grad.abs().max() > 0


def test_moved_noise_stays_on_its_sphere_and_the_signal_is_what_is_wanted(trained):
    given = latents()
    moved, (start, wanted) = guide_noise(trained, *given), leaned(*given)
    centre, inside = given[4].sqrt().view(-1, 1, 1, 1) * wanted, (given[3] > 0).expand_as(start)
    before, after = (((latent - centre) * inside).flatten(1) for latent in (start, moved.z))
    assert torch.allclose(after.norm(dim=1), before.norm(dim=1), rtol=1e-5) and not torch.equal(moved.z, start)
    cosine = torch.nn.functional.cosine_similarity(before, after)
    assert torch.allclose(moved.share, 1 / cosine.square() - 1, rtol=1e-3)


def test_a_shift_along_the_noise_itself_moves_nothing():
    z, preview, *_, alpha_bar, _ = latents()
    noise = z - alpha_bar.sqrt().view(-1, 1, 1, 1) * preview
    moved = move_noise(z, 0.3 * noise, preview, alpha_bar)
    assert torch.allclose(moved.z, z, atol=1e-5) and moved.share.max() < 1e-10


def test_what_is_not_the_face_keeps_its_bits(trained):
    z, preview, goal, place, *rest = latents()
    moved, outside = guide_noise(trained, z, preview, goal, place, *rest), (place == 0).expand_as(z)
    assert outside.any() and torch.equal(moved.z[outside], z[outside])
    nowhere = guide_noise(trained, z, preview, goal, torch.zeros(1, 1, 16, 16), *rest)
    assert torch.equal(nowhere.z, z)


def test_each_picture_is_moved_by_itself_for_its_own_person(trained):
    given = latents()
    together = guide_noise(trained, *given).z
    for n in range(3):
        alone = guide_noise(trained, *(of_all[n : n + 1] for of_all in given)).z
        assert torch.allclose(alone, together[n : n + 1], atol=1e-5)
    for changed in (2, 5):  # what the reference looks like, and who it is
        other = [of_all.roll(1, 0) if n == changed else of_all for n, of_all in enumerate(given)]
        assert (guide_noise(trained, *other).z - together).flatten(1).abs().amax(1).min() > 1e-4


@pytest.mark.parametrize("size", [(1, 1), (13, 17), (24, 8)])
def test_latents_of_any_size_are_read(trained, size):
    given = latents(*size)
    assert guide_noise(trained, *given).z.shape == given[0].shape


def test_one_noise_level_may_stand_for_all_and_may_be_that_of_pure_noise(trained):
    z, preview, goal, _, _, people = latents()
    for level in (torch.tensor(0.05), torch.tensor(0.0)):
        each = trained(z, preview, goal, level.expand(3), people)
        assert each.isfinite().all() and torch.equal(trained(z, preview, goal, level, people), each)


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

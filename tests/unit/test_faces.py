"""Landmarks to crops: against insightface's own fit and cut, and against numbers known in advance."""

import math

import numpy as np
import pytest
import torch
from lcm_lookahead.lookahead.vision.faces import (
    CROP,
    TEMPLATE,
    Face,
    align,
    head_around,
    misfit,
    moved_onto,
    nearest,
    pixels_per_sample,
    rescale_landmarks,
    samples_for,
    template,
    umeyama,
    usable,
)


def turned(points: torch.Tensor, angle: float, scale: float, shift: tuple[float, float]) -> torch.Tensor:
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    return points @ torch.tensor([[cos, sin], [-sin, cos]]) + torch.tensor(shift)


def test_a_turned_scaled_shifted_template_comes_back_exactly():
    cases = [(0.0, 1.0, (0.0, 0.0)), (0.7, 3.1, (40.0, -9.0)), (-2.9, 0.4, (-300.0, 5.0))]
    points = torch.stack([turned(TEMPLATE, *case) for case in cases])
    matrix = umeyama(points)
    back = points @ matrix[:, :, :2].transpose(1, 2) + matrix[:, None, :, 2]
    assert (back - TEMPLATE).abs().max() < 1e-3
    assert torch.allclose(matrix[:, :, :2].det().sqrt(), torch.tensor([1 / scale for _, scale, _ in cases]))


def test_the_right_eye_of_the_template_is_insightface_s():
    assert TEMPLATE[1, 0].item() == pytest.approx(73.5318)


def test_the_fit_is_that_of_insightface():
    face_align = pytest.importorskip("insightface.utils.face_align")
    g = torch.Generator().manual_seed(0)
    points = turned(TEMPLATE, 0.3, 1.7, (20.0, 30.0)) + 6 * torch.randn(40, 5, 2, generator=g)
    for size in (112, 128, 224, 256):
        with pytest.warns(FutureWarning):
            theirs = np.stack([face_align.estimate_norm(five.numpy(), size) for five in points])
        assert np.abs(umeyama(points, template(size)).numpy() - theirs).max() < 1e-3


def test_mirrored_landmarks_are_not_mirrored_back():
    mirrored = TEMPLATE * torch.tensor([-1.0, 1.0]) + torch.tensor([112.0, 0.0])
    matrix = umeyama(mirrored[None])
    assert matrix[0, :, :2].det() > 0
    assert misfit(mirrored[None]) > 12
    named_right = mirrored[[1, 0, 2, 4, 3]]  # the picture mirrored, and its landmarks found in it
    assert misfit(named_right[None]) < 1


def test_landmarks_in_one_place_or_not_finite_are_not_usable_and_break_nothing():
    points = torch.stack([TEMPLATE, torch.full((5, 2), 7.0), TEMPLATE * torch.nan])
    assert usable(points).tolist() == [True, False, False]
    assert umeyama(points[:2]).isfinite().all()


def ramp(height: int = 90, width: int = 140) -> torch.Tensor:
    """A picture whose red is its x and whose green is its y."""
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    return torch.stack([x / 200, y / 200, torch.ones_like(x)])[None]


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("size", [112, 64])
def test_each_pixel_of_a_crop_is_the_one_of_the_picture_that_the_landmarks_say(samples, size):
    points = turned(TEMPLATE, 0.25, 0.4, (40.0, 20.0))[None]
    crop = align(ramp(), points, size=size, samples=samples)
    matrix = umeyama(points, template(size))[0]
    y, x = torch.meshgrid(torch.arange(size).float(), torch.arange(size).float(), indexing="ij")
    seen = (torch.stack([x, y], -1) - matrix[:, 2]) @ torch.linalg.inv(matrix[:, :2]).T
    inside = crop[0, 2] > 0.999
    assert inside.float().mean() > 0.9
    assert (crop[0, :2] * 200 - seen.permute(2, 0, 1))[:, inside].abs().max() < 0.01


def test_the_cut_is_that_of_insightface_up_to_its_bytes():
    face_align = pytest.importorskip("insightface.utils.face_align")
    g = torch.Generator().manual_seed(1)
    small = torch.rand(1, 3, 20, 26, generator=g)
    picture = (torch.nn.functional.interpolate(small, (160, 208), mode="bicubic").clamp(0, 1) * 255).round() / 255
    points = turned(TEMPLATE, -0.2, 1.1, (70.0, 30.0))  # over the edge: black there
    with pytest.warns(FutureWarning):
        theirs = face_align.norm_crop((picture[0] * 255).byte().permute(1, 2, 0).numpy(), points.numpy())
    ours = align(picture, points[None])[0].permute(1, 2, 0) * 255
    assert (ours - torch.from_numpy(theirs).float()).abs().max() < 1.5
    assert (ours.amax(-1) == 0).any()


def test_a_margin_shows_more_around_the_same_face():
    wide = template(336, margin=1.0)
    assert torch.allclose(wide, TEMPLATE + CROP)
    picture = torch.rand(1, 3, 400, 400, generator=torch.Generator().manual_seed(2))
    points = (TEMPLATE + 144)[None]
    assert torch.allclose(
        align(picture, points, wide, 336)[..., CROP:-CROP, CROP:-CROP], align(picture, points), atol=1e-4
    )


def test_gradients_of_picture_and_landmarks_are_those_of_finite_differences():
    g = torch.Generator().manual_seed(3)
    picture = torch.rand(2, 1, 9, 11, generator=g, dtype=torch.float64, requires_grad=True)
    points = (
        turned(TEMPLATE, 0.1, 0.07, (1.0, 0.5)).double() + torch.rand(2, 5, 2, generator=g).double()
    ).requires_grad_()
    for samples in (1, 2):
        assert torch.autograd.gradcheck(
            lambda a, b, samples=samples: align(a, b, size=7, samples=samples).square().sum((1, 2, 3)),
            (picture, points),
        )


def test_low_precision_is_cut_in_float32():
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    crop = align(picture, TEMPLATE[None].bfloat16() / 2)
    assert crop.dtype == torch.float32


def test_enough_samples_let_the_gradient_reach_every_pixel_of_a_large_face():
    points = (TEMPLATE * 4.2 + 20)[None]
    assert pixels_per_sample(points).item() == pytest.approx(4.2, rel=1e-3)
    reached = []
    for samples in (1, samples_for(points)):
        picture = torch.rand(1, 1, 512, 512, requires_grad=True)
        align(picture, points, samples=samples).sum().backward()
        reached.append((picture.grad[..., 30:480, 30:480] != 0).float().mean().item())
    assert reached[0] < 0.3 and reached[1] == 1.0


def test_a_place_is_kept_relative_to_the_middle_whatever_the_size_and_shape():
    points = torch.tensor([[31.5, 31.5], [31.5 + 16, 31.5]])
    there = rescale_landmarks(points, (64, 64), (128, 256))
    assert torch.allclose(there, torch.tensor([[127.5, 63.5], [127.5 + 32, 63.5]]))


def test_of_several_faces_the_nearest_to_a_place_is_chosen():
    faces = [Face(torch.zeros(4), TEMPLATE + shift, 0.9) for shift in (0.0, 50.0, 200.0)]
    assert nearest(faces, TEMPLATE + 60) is faces[1]


def smooth(height: int, width: int) -> torch.Tensor:
    small = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(2))
    return torch.nn.functional.interpolate(small, (height, width), mode="bicubic", align_corners=False)[0]


def test_a_picture_with_its_landmarks_where_they_belong_stays_as_it_is():
    picture = smooth(96, 80)
    moved, covered = moved_onto(picture, TEMPLATE, TEMPLATE, (96, 80))
    assert torch.allclose(moved, picture, atol=1e-4) and torch.allclose(covered, torch.ones(1, 96, 80), atol=1e-4)


def test_a_picture_is_moved_with_its_landmarks_and_says_what_it_covers():
    picture = smooth(96, 80)
    moved, covered = moved_onto(picture, TEMPLATE, TEMPLATE + torch.tensor([10.0, -6.0]), (90, 100))
    assert torch.allclose(moved[:, :84, 12:86], picture[:, 6:90, 2:76], atol=1e-3)
    assert covered[0, :84, 12:86].min() > 0.99 and covered[0, :, :9].max() == covered[0, :, 92:].max() == 0
    assert torch.allclose(moved[:, :84, :8], picture[:, 6:90, :1].expand(-1, -1, 8), atol=1e-3)  # the edge goes on


@pytest.mark.parametrize("zoom", [0.25, 2.0])
def test_a_picture_of_another_size_keeps_its_places(zoom):
    """As the same picture, made smaller or larger by PyTorch's own antialiased resampling."""
    picture, size = smooth(96, 80), (round(96 * zoom), round(80 * zoom))
    expected = torch.nn.functional.interpolate(picture[None], size, mode="bilinear", antialias=True)[0]
    moved, covered = moved_onto(picture, TEMPLATE, (TEMPLATE + 0.5) * zoom - 0.5, size)
    assert (moved - expected).abs().max() < 0.01 and covered[0, 1:-1, 1:-1].min() > 0.99


def test_a_turned_picture_has_its_landmarks_where_they_were_asked_for():
    """A white dot at each landmark is found at the landmark that it was moved to."""
    picture, to = torch.zeros(3, 112, 112), turned(TEMPLATE, 0.4, 1.3, (20.0, 70.0))
    for x, y in TEMPLATE.round().long().tolist():
        picture[:, y - 2 : y + 3, x - 2 : x + 3] = 1
    moved, _ = moved_onto(picture, TEMPLATE, to, (240, 240))
    for x, y in to.round().long().tolist():
        assert moved[0, y, x] > 0.9
    assert moved[0].mean() < 0.02


def test_the_head_is_a_soft_circle_about_the_crop_of_its_landmarks():
    head = head_around(TEMPLATE * 2 + torch.tensor([100.0, 60.0]), (400, 460))[0]
    assert head.shape == (400, 460) and head.min() == 0 and head.max() == 1
    assert head[60 + 111, 100 + 111] == 1  # the middle of the crop, twice as large
    assert head[60 + 111, 100 + 111 + 2 * 75] == 1 and 0.4 < head[60 + 111, 100 + 111 + 2 * 106] < 0.6
    assert head[60 + 111, 100 + 111 + 2 * 90] < 1 and head[0, 459] == 0

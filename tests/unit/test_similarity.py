"""Plain measures of how alike two pictures are."""

import pytest
import torch
from lcm_lookahead.lookahead.vision.image_metrics import root_mean_square, structural_similarity


def test_a_picture_is_the_same_as_itself_and_less_so_with_noise():
    picture = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    noisy = (picture + 0.2 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)
    assert torch.allclose(structural_similarity(picture, picture), torch.ones(2), atol=1e-4)
    assert torch.equal(root_mean_square(picture, picture), torch.zeros(2))
    assert (structural_similarity(picture, noisy) < 0.95).all() and (root_mean_square(picture, noisy) > 0.1).all()
    assert torch.allclose(root_mean_square(picture, picture + 0.25), torch.full((2,), 0.25))


def test_what_is_smaller_than_the_window_is_refused():
    with pytest.raises(ValueError, match="6x9"):
        structural_similarity(torch.zeros(1, 3, 9, 6), torch.zeros(1, 3, 9, 6))

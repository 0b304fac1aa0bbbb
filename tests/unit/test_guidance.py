"""The guidance with three scales (arXiv 2404.03620, supplement)."""

import pytest
import torch
from lcm_lookahead.lookahead.method.guidance import Scales, classifier_free_guidance, guided, three_scale_guidance

GENERATOR = torch.Generator().manual_seed(0)
E_NU, E_NT, E_FU, E_FT = (torch.randn(2, 4, 8, 8, generator=GENERATOR) for _ in range(4))


def test_the_defaults_are_those_of_the_paper():
    expected = -6 * E_NU + 3 * E_NT + 2 * E_FU + 2 * E_FT
    assert torch.allclose(three_scale_guidance(E_NU, E_NT, E_FU, E_FT), expected, atol=1e-5)


@pytest.mark.parametrize("scales", [(1.5, 2.5, 0.5), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_each_scale_weighs_its_own_prediction(scales):
    text, full, kv = scales
    expected = (1 - text - full - kv) * E_NU + text * E_NT + full * E_FT + kv * E_FU
    assert torch.allclose(three_scale_guidance(E_NU, E_NT, E_FU, E_FT, *scales), expected, atol=1e-5)


def test_without_an_effect_of_the_kv_it_is_classifier_free_guidance_at_text_plus_full():
    out = three_scale_guidance(E_NU, E_NT, E_NU, E_NT, 3.0, 2.0, 2.0)
    assert torch.allclose(out, E_NU + 5 * (E_NT - E_NU), atol=1e-5)
    assert torch.allclose(out, classifier_free_guidance(E_NU, E_NT, 5.0), atol=1e-5)


def test_it_does_not_matter_whether_noise_or_denoised_pictures_are_guided():
    x, sigma = torch.randn(2, 4, 8, 8, generator=GENERATOR), 3.0
    of_noise = x - sigma * three_scale_guidance(E_NU, E_NT, E_FU, E_FT)
    of_denoised = three_scale_guidance(*(x - sigma * e for e in (E_NU, E_NT, E_FU, E_FT)))
    assert torch.allclose(of_denoised, of_noise, atol=1e-4)


@pytest.mark.parametrize("missing", range(3))
def test_a_prediction_whose_scale_is_0_is_not_needed_and_any_other_is(missing):
    names = ("text", "full_uncond", "full")
    scales = {"text_scale": 3.0, "kv_scale": 2.0, "full_scale": 2.0}
    name = list(scales)[missing]
    given = [E_NT, E_FU, E_FT]
    whole = three_scale_guidance(E_NU, *given, **{**scales, name: 0.0})
    given[missing] = None
    assert torch.equal(three_scale_guidance(E_NU, *given, **{**scales, name: 0.0}), whole)
    with pytest.raises(ValueError, match=f"prediction {names[missing]} is missing"):
        three_scale_guidance(E_NU, *given, **scales)


def test_with_all_scales_at_0_nothing_guides():
    assert torch.equal(three_scale_guidance(E_NU, None, None, None, 0.0, 0.0, 0.0), E_NU)


@pytest.mark.parametrize(
    ("scales", "calls"),
    [
        ((3.0, 2.0, 2.0), [["uncond", "text"], ["full_uncond", "full"]]),
        ((5.0, 0.0, 0.0), [["uncond", "text"]]),
        ((0.0, 1.0, 0.0), [["full"]]),
        ((0.0, 1.5, 0.0), [["uncond"], ["full"]]),
        ((0.3, 0.0, 0.7), [["text"], ["full_uncond"]]),
        ((0.0, 0.0, 0.0), [["uncond"]]),
    ],
)
def test_only_the_predictions_that_count_are_made_with_and_without_kv_apart(scales, calls):
    made = {"uncond": E_NU, "text": E_NT, "full_uncond": E_FU, "full": E_FT}
    asked = []

    def predict(names):
        asked.append(names)
        return [made[name] for name in names]

    found = guided(predict, Scales(*scales))
    assert asked == calls
    assert torch.allclose(found, three_scale_guidance(E_NU, E_NT, E_FU, E_FT, *scales), atol=1e-5)

"""Weights by layer and over the steps: lists as artists write them, presets on SDXL's blocks, the host's shares."""

import math

import pytest
from lcm_lookahead.lookahead.files.block_names import block_names
from lcm_lookahead.lookahead.method import layer_weights as lw


@pytest.fixture
def paths():
    """SDXL's transformer blocks in the order in which the UNet runs."""
    order = {"d": 0, "m": 1, "u": 2}
    return sorted((name.diffusers for name in block_names()), key=lambda path: order[path[0]])


def by_block(weights):
    return {lw.block_of(path): weight for path, weight in weights.items()}


def test_sdxl_has_eleven_layers_of_which_3_is_composition_and_6_is_style(paths):
    blocks = list(by_block(lw.layer_weights(paths, lw.EVEN)))
    assert len(paths) == 70 and len(blocks) == 11
    assert blocks[3] == "down_blocks.2.attentions.1" and blocks[6] == "up_blocks.0.attentions.1"
    for preset, text in ((lw.STYLE, "6:1"), (lw.COMPOSITION, "3:1"), (lw.BOTH, "3:1; 6:1")):
        assert lw.layer_weights(paths, preset) == lw.layer_weights(paths, lw.LIST, text)
    likeness = lw.layer_weights(paths, lw.LIKENESS)
    assert likeness == lw.layer_weights(paths, lw.LIST, "1 1 1 0 1 1 0 1 1 1 1") and sum(likeness.values()) == 50
    assert set(lw.layer_weights(paths, lw.EVEN).values()) == {1.0}


def test_a_list_names_every_layer_or_single_ones(paths):
    full = by_block(lw.layer_weights(paths, lw.LIST, "0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, -1"))
    assert list(full.values()) == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, -1]
    single = by_block(lw.layer_weights(paths, lw.LIST, " 3:1,  10 : -0.5,"))
    assert [n for n, weight in enumerate(single.values()) if weight] == [3, 10] and list(single.values())[10] == -0.5


@pytest.mark.parametrize("text", ["", "1, 2", "1 " * 12, "11:1", "3:", "3:1:1", "a:1", "3:1 2", "1, x", "nan " * 11])
def test_lists_that_do_not_fit_are_refused_in_a_sentence(paths, text):
    with pytest.raises(ValueError) as error:
        lw.layer_weights(paths, lw.LIST, text)
    words = str(error.value)
    assert words.endswith(".") and words[0].isupper() and words.count(". ") == 0


@pytest.mark.parametrize("text", ["one", "inf", "5.1", "-6", "1e999", "0x1", "1,,two"])
def test_numbers_are_finite_and_bounded(text):
    with pytest.raises(ValueError, match="The steps are"):
        lw.numbers(text, "The steps are")
    assert lw.numbers(" 1; .5,,-5 ", "") == [1, 0.5, -5] and lw.numbers(" ,", "") == []


def test_steps_are_spread_evenly_with_straight_lines_between():
    assert [lw.at_share((0.0, 1.0, 1.0), share) for share in (-1, 0, 0.25, 0.5, 0.9, 1, 2)] == [0, 0, 0.5, 1, 1, 1, 1]
    assert lw.at_share((0.3,), 0.7) == 0.3 and lw.at_share((), 0.7) == 1


def test_points_of_a_curve_are_sampled_in_any_order_and_hold_beyond_their_ends():
    line = lw.sampled([(0.75, 1.0), (0.25, 0.0)], count=5)
    assert line == (0.0, 0.0, 0.5, 1.0, 1.0)
    assert lw.sampled([(0.5, 0.2)], count=3) == (0.2, 0.2, 0.2)
    with pytest.raises(IndexError):
        lw.sampled([])


def test_the_share_of_a_noise_level_is_the_inverse_of_the_host_s_function():
    def percent_to_sigma(share):
        return 1e9 if share <= 0 else 0.0 if share >= 1 else 14.6 * math.exp(-6 * share)

    for share in (0.001, 0.2, 0.5, 0.93):
        assert abs(lw.share_of(percent_to_sigma(share), percent_to_sigma) - share) < 1e-5
    assert lw.share_of(1e10, percent_to_sigma) < 1e-5 and lw.share_of(0.0, percent_to_sigma) > 1 - 1e-5

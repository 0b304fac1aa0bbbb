"""Tokens in 8 bit."""

import torch
from lcm_lookahead.lookahead.method.eight_bit import from_eight_bit, to_eight_bit


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Tokens whose channels lie and reach differently, as those behind a layer norm's weight and bias."""
    g = torch.Generator().manual_seed(1)
    channels = torch.randn(2, shape[-1], generator=g)
    return (torch.randn(shape, generator=g) * 4 * channels[0] + 9 * channels[1]).to(dtype)


def test_each_number_is_off_by_at_most_half_a_step_of_its_channel():
    x = tokens(3, 50, 32)
    kept = to_eight_bit(x)
    assert kept.numbers.dtype == torch.int8 and kept.step.shape == (3, 1, 32)
    off = (from_eight_bit(kept, torch.float32) - x).abs()
    assert (off <= kept.step / 2 * (1 + 1e-3)).all() and off.max() > 0
    assert torch.allclose(kept.step.squeeze(1), (x.amax(1) - x.amin(1)) / 254)


def test_a_channel_that_is_the_same_in_all_tokens_is_kept_as_it_is():
    x = tokens(20, 4)
    x[:, 2] = 7.5
    assert torch.equal(from_eight_bit(to_eight_bit(x), torch.float32)[:, 2], x[:, 2])


def test_the_least_and_the_greatest_of_a_channel_stay():
    x = tokens(40, 8)
    back = from_eight_bit(to_eight_bit(x), torch.float32)
    for ends in (torch.amin, torch.amax):
        assert torch.allclose(ends(back, 0), ends(x, 0), rtol=1e-5, atol=1e-5)


def test_16_bit_come_back_in_16_bit_and_take_a_byte_a_number():
    for dtype in (torch.float16, torch.bfloat16):
        kept = to_eight_bit(tokens(64, 16, dtype=dtype))
        assert from_eight_bit(kept, dtype).dtype == dtype
        assert sum(part.nbytes for part in kept) == 64 * 16 + 2 * 4 * 16

"""Extended self-attention and low-rank changes against sums written out."""

import pytest
import torch
from lcm_lookahead.lookahead.method.attention import (
    adain,
    extended_self_attention,
    pooled_statistics,
    softmax_attention,
    statistics,
)
from lcm_lookahead.lookahead.method.kv_encoder import LowRank
from tensors import randn

HEADS, WIDTH = 2, 8


@pytest.fixture
def qkv():
    """Queries, keys and values of two rows of five tokens."""
    return tuple(randn(2, 5, WIDTH, seed=n) for n in range(3))


@pytest.fixture
def external():
    """Keys and values of a reference of as many tokens."""
    return tuple(randn(2, 5, WIDTH, seed=n) for n in (3, 4))


def written_out(q, k, v):
    """One softmax over all keys for each row, head and query."""
    out = torch.zeros_like(q)
    size = WIDTH // HEADS
    for row in range(len(q)):
        for part in (slice(h * size, (h + 1) * size) for h in range(HEADS)):
            for n, query in enumerate(q[row, :, part]):
                weights = torch.softmax(k[row, :, part] @ query / size**0.5, dim=0)
                out[row, n, part] = weights @ v[row, :, part]
    return out


def test_own_and_external_tokens_share_one_softmax(qkv, external):
    q, k, v = qkv
    k_ext, v_ext = (t[:, :3] for t in external)
    expected = written_out(q, torch.cat([k, k_ext], dim=1), torch.cat([v, v_ext], dim=1))
    assert torch.allclose(extended_self_attention(*qkv, k_ext, v_ext, HEADS), expected, atol=1e-6)
    assert not torch.allclose(expected, written_out(*qkv), atol=1e-2)


def test_without_external_tokens_it_is_plain_self_attention(qkv, external):
    none = (t[:, :0] for t in external)
    assert torch.equal(extended_self_attention(*qkv, *none, HEADS), softmax_attention(*qkv, HEADS))


def test_rows_without_a_reference_are_plain_and_the_others_extended(qkv, external):
    out = extended_self_attention(*qkv, *external, HEADS, absent=torch.tensor([True, False]))
    extended = extended_self_attention(*qkv, *external, HEADS)
    assert torch.allclose(out[0], softmax_attention(*qkv, HEADS)[0], atol=1e-6)
    assert torch.equal(out[1], extended[1]) and not torch.allclose(out[0], extended[0], atol=1e-2)
    nowhere = extended_self_attention(*qkv, *external, HEADS, absent=torch.tensor([False, False]))
    assert torch.equal(nowhere, extended)


def test_what_a_row_without_a_reference_is_given_does_not_matter(qkv, external):
    """Not even where it is not a number."""
    absent = torch.tensor([True, False])
    out = extended_self_attention(*qkv, *external, HEADS, absent=absent)
    broken = tuple(t.clone() for t in external)
    for t in broken:
        t[0] = float("nan")
    assert torch.equal(extended_self_attention(*qkv, *broken, HEADS, absent=absent), out)


def test_own_tokens_come_first_and_the_given_attention_is_used(qkv, external):
    seen = []

    def attention(q, k, v, heads):
        seen.append((k, v, heads))
        return q

    assert extended_self_attention(*qkv, *external, HEADS, attention=attention) is qkv[0]
    ((k, v, heads),) = seen
    assert heads == HEADS and k.shape == v.shape == (2, 10, WIDTH)
    assert torch.equal(k[:, :5], qkv[1]) and torch.equal(v[:, 5:], external[1])


def test_rows_that_do_not_match_are_refused(qkv, external):
    k_ext, v_ext = external
    with pytest.raises(ValueError, match="row for row"):
        extended_self_attention(*qkv, k_ext[:1], v_ext[:1], HEADS)
    with pytest.raises(ValueError, match="row for row"):
        extended_self_attention(*qkv, k_ext, v_ext[:, :3], HEADS)
    with pytest.raises(ValueError, match="3 for 5"):
        extended_self_attention(*qkv, k_ext[:, :3], v_ext[:, :3], HEADS, absent=torch.tensor([True, False]))


def test_a_low_rank_change_is_the_product_of_its_halves():
    change = LowRank(6, 4, rank=2, scale=0.5)
    x = randn(3, 6, seed=5)
    assert torch.allclose(change(x), 0.5 * x @ (change.lora_B.weight @ change.lora_A.weight).T, atol=1e-6)
    change.lora_B.weight.data.zero_()
    assert not change(x).any()


def test_adain_takes_over_mean_and_deviation_of_each_channel():
    g = torch.Generator().manual_seed(3)
    x, like = torch.randn(2, 50, 6, generator=g) * 3 + 1, torch.randn(2, 20, 6, generator=g) - 4
    out = adain(x, like)
    assert torch.allclose(out.mean(1), like.mean(1), atol=1e-4)
    assert torch.allclose(out.std(1, correction=0), like.std(1, correction=0), atol=1e-4)
    assert torch.allclose(adain(x, x), x, atol=1e-3)
    flat = adain(torch.ones(1, 5, 2), like[:1, :, :2])
    assert torch.allclose(flat, like[:1, :, :2].mean(1, keepdim=True).expand(-1, 5, -1))


def test_statistics_of_parts_are_pooled_into_those_of_the_whole():
    x = torch.randn(3, 20, 4, generator=torch.Generator().manual_seed(4)) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    assert torch.allclose(pooled_statistics([statistics(part) for part in x]), statistics(x.flatten(0, 1)), atol=1e-5)
    assert torch.equal(pooled_statistics([statistics(x[0])]), statistics(x[0]))

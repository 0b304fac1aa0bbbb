"""The Resampler and decoupled cross-attention against plain oracles."""

import re

import pytest
import torch
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from lcm_lookahead.lookahead.files.encoder_file import from_tensors
from lcm_lookahead.lookahead.method import attention
from lcm_lookahead.lookahead.method.image_prompt import ImagePromptNetwork
from lcm_lookahead.lookahead.method.resampler import Resampler, ResamplerSizes


def diffusers_twin(weights, sizes):
    """diffusers' own projection with the same weights, by the correspondence of names that its loader has."""
    twin = IPAdapterPlusImageProjection(
        embed_dims=sizes.image_width,
        output_dims=sizes.context_width,
        hidden_dims=sizes.dim,
        depth=sizes.depth,
        dim_head=64,
        heads=sizes.heads,
        num_queries=sizes.tokens,
        ffn_ratio=sizes.ff_width / sizes.dim,
    )
    parts = {
        "0.norm1.": "ln0.",
        "0.norm2.": "ln1.",
        "0.to_q.": "attn.to_q.",
        "0.to_out.": "attn.to_out.0.",
        "1.0.": "ff.0.",
        "1.1.": "ff.1.net.0.proj.",
        "1.3.": "ff.1.net.2.",
    }
    named = {}
    for key, value in weights.items():
        layer = re.match(r"layers\.\d+\.|", key)[0]
        part = key.removeprefix(layer)
        if part.startswith("0.to_kv"):
            named[f"{layer}attn.to_k.weight"], named[f"{layer}attn.to_v.weight"] = value.chunk(2)
        else:
            known = next((p for p in parts if layer and part.startswith(p)), "")
            named[layer + parts.get(known, "") + part.removeprefix(known)] = value
    twin.load_state_dict(named)
    return twin.eval()


def test_the_resampler_is_that_of_diffusers(resampler, sizes):
    features = torch.randn(3, 10, sizes.image_width, generator=torch.Generator().manual_seed(2))
    expected = diffusers_twin(resampler.state_dict(), sizes)(features)
    assert torch.allclose(resampler(features), expected, atol=1e-5)


def test_sizes_are_read_from_the_weights(resampler, sizes):
    assert ResamplerSizes.from_state_dict(resampler.state_dict()) == sizes


def test_the_public_sizes_have_the_public_names_and_number_of_parameters():
    shapes = ResamplerSizes().shapes()
    assert len(shapes) == 51 and shapes["latents"] == (1, 16, 1280) and shapes["layers.3.1.3.weight"] == (1280, 5120)
    assert shapes["layers.0.0.to_kv.weight"] == (2560, 1280) and shapes["proj_out.weight"] == (2048, 1280)
    with torch.device("meta"):
        assert sum(p.numel() for p in Resampler(ResamplerSizes()).parameters()) == 82_961_664


def explicit(q, k, v, heads):
    """Softmax attention, written out head by head."""
    out = torch.zeros_like(q)
    width = q.shape[-1] // heads
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / width**0.5
        out[..., part] = scores.softmax(-1) @ v[..., part]
    return out


@pytest.fixture
def qkv():
    g = torch.Generator().manual_seed(3)
    return [torch.randn(2, n, 16, generator=g) for n in (9, 7, 7, 4, 4)]


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_decoupled_cross_attention_has_two_softmaxes(qkv, scale):
    q, k, v, k_ip, v_ip = qkv
    expected = explicit(q, k, v, 2) + scale * explicit(q, k_ip, v_ip, 2)
    assert torch.allclose(attention.decoupled_cross_attention(*qkv, heads=2, scale=scale), expected, atol=1e-6)


def test_a_mask_scales_the_image_half_token_by_token(qkv):
    q, k, v, k_ip, v_ip = qkv
    mask = torch.rand(2, 9, 1, generator=torch.Generator().manual_seed(4))
    expected = explicit(q, k, v, 2) + mask * explicit(q, k_ip, v_ip, 2)
    assert torch.allclose(attention.decoupled_cross_attention(*qkv, heads=2, mask=mask), expected, atol=1e-6)


def test_rows_that_do_not_match_are_refused(qkv):
    q, _, _, k_ip, v_ip = qkv
    with pytest.raises(ValueError, match="row for row"):
        attention.image_prompt_term(q, k_ip[:1], v_ip[:1], heads=2)


def test_a_mask_on_a_token_grid_keeps_its_mean_and_its_place():
    mask = torch.zeros(1, 65, 49)
    mask[:, :, :24] = 1
    grid = attention.mask_on_tokens(mask, 33, 25).reshape(33, 25)
    assert torch.allclose(grid[:, :11], torch.ones(33, 11)) and torch.allclose(grid[:, 13:], torch.zeros(33, 12))
    halved = attention.mask_on_tokens(torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(5)), 16, 16)
    assert halved.shape == (1, 256, 1)
    full = attention.mask_on_tokens(mask, 65, 49)
    assert torch.equal(full.reshape(65, 49), mask[0])


def test_the_network_of_a_file_reads_tokens_with_its_own_tensors(weights, sizes, resampler):
    file = from_tensors(weights, {}, "mine.safetensors")
    network = ImagePromptNetwork.from_weights(file.sizes, file.image_proj, file.ip_adapter)
    features = torch.randn(2, 10, sizes.image_width, generator=torch.Generator().manual_seed(6))
    tokens = network.image_proj(features)
    assert torch.equal(tokens, resampler(features))
    for pair, given in zip(network.keys_values(tokens), file.ip_adapter, strict=True):
        assert all(torch.allclose(out, tokens @ weight.T, atol=1e-5) for out, weight in zip(pair, given, strict=True))
    held = {p.data_ptr() for p in network.parameters()}
    assert held == {t.data_ptr() for t in weights.values()} and not any(p.requires_grad for p in network.parameters())

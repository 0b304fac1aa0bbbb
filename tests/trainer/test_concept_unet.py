"""A concept in diffusers' UNet: the numbers of the oracle, and the base to the bit where it is off."""

import pytest
import torch
from concept_oracle import merged, predict, random_offsets
from diffusers import UNet2DConditionModel
from lcm_lookahead.lookahead.files.unet_layout import UNetLayout
from lcm_lookahead.lookahead.method.concept import Concept
from lcm_lookahead.lookahead.method.concept_input import ConceptError
from lcm_lookahead.mini.stages import base
from lcm_lookahead.sdxl import concept as in_sdxl
from lcm_lookahead.sdxl.concept_maker import concept_rows
from lcm_lookahead.sdxl.shared_unet import Condition, SharedUNet
from tensors import relative

NARROW = UNetLayout((32, 64, 128), (0, 2, 10), 64, 32, 16)  # all 70 blocks of SDXL


@pytest.fixture(scope="module", params=["mini", "sdxl"])
def case(request):
    return of_unet(request.param)


@pytest.fixture(scope="module")
def small():
    return of_unet("mini")


def of_unet(kind):
    """A UNet with random weights, random offsets, and what it reads."""
    torch.manual_seed(0)
    unet = base.build_unet() if kind == "mini" else UNet2DConditionModel(sample_size=16, **NARROW.diffusers())
    unet.eval().requires_grad_(False)
    g = torch.Generator().manual_seed(3)
    context, pooled = unet.config.cross_attention_dim, unet.config.projection_class_embeddings_input_dim - 6 * 256
    x, t = torch.randn(2, 4, 8, 8, generator=g), torch.tensor([900, 300])
    soft, hard = torch.randn(2, 2, 77, context, generator=g)
    time_ids = torch.tensor([64.0, 64, 0, 0, 64, 64]).expand(2, 6)
    return unet, random_offsets(unet), x, t, soft, hard, torch.randn(2, pooled, generator=g), time_ids


def of(offsets, blend=1.0):
    return Concept(torch.zeros(3), torch.zeros(3), "mug", 1, offsets, blend)


def ours(case, blend, strength=1.0, hard=None):
    unet, offsets, x, t, soft, own_hard, pooled, time_ids = case
    shared = SharedUNet(unet).inject()
    try:
        rows = concept_rows(of(offsets), 2, own_hard if hard is None else hard, blend, strength)
        with torch.no_grad():
            return shared.predict(x, t, Condition(soft, pooled, time_ids), concept=rows)
    finally:
        shared.eject()


def test_every_query_key_and_value_of_sdxl_is_changed():
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=16, **NARROW.diffusers())
    assert len(in_sdxl.projections(unet)) == 420


def test_two_blended_paths_are_those_of_the_oracle(case):
    found = ours(case, 0.25)
    assert relative(found, predict(*case, 0.25)) < 1e-4
    assert relative(found, ours(case, 1.0)) > 1e-2, "the blend changes nothing"


def test_blend_0_is_the_base_under_the_hard_prompt_to_the_bit(small):
    unet, _, x, t, _, hard, pooled, time_ids = small
    plain = SharedUNet(unet).inject()
    with torch.no_grad():
        expected = plain.predict(x, t, Condition(hard, pooled, time_ids))
    plain.eject()
    assert torch.equal(ours(small, 0.0), expected)


def test_blend_1_is_a_lora_with_the_soft_prompt_and_reads_no_hard_one(case):
    unet, offsets, x, t, soft, _, pooled, time_ids = case
    with torch.no_grad():
        added = {"text_embeds": pooled, "time_ids": time_ids}
        expected = merged(unet, offsets)(x, t, soft, added_cond_kwargs=added).sample
    assert relative(ours(case, 1.0), expected) < 1e-4
    assert torch.equal(ours(case, 1.0), ours(case, 1.0, hard=torch.full_like(soft, 7.0)))


def test_strength_multiplies_the_offsets_alone(small):
    assert relative(ours(small, 0.5, strength=0.5), predict(*small, 0.5, strength=0.5)) < 1e-4


def test_gradients_reach_the_offsets_also_where_blocks_are_computed_twice(small):
    unet, offsets, x, t, soft, hard, pooled, time_ids = small
    found = []
    for checkpointing in ("none", "blocks"):
        leaves = {k: (a.clone().requires_grad_(), b.clone().requires_grad_()) for k, (a, b) in offsets.items()}
        shared = SharedUNet(unet).inject(checkpointing)
        rows = concept_rows(of(leaves), 2, hard, 0.5)
        shared.predict(x, t, Condition(soft, pooled, time_ids), concept=rows).square().mean().backward()
        shared.eject()
        found.append([m.grad for pair in leaves.values() for m in pair])
    assert all(float(g.abs().max()) > 0 for g in found[0])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-9) for a, b in zip(*found, strict=True))


def test_a_concept_of_another_base_is_refused_by_name(small):
    unet = small[0]
    name = next(iter(small[1]))
    with pytest.raises(ConceptError, match=f"another base model: it changes {name} .*use the base that it was made"):
        in_sdxl.check_concept(of({name: (torch.zeros(2, 5), torch.zeros(7, 2))}), unet, None)


def test_features_of_the_unet_are_the_means_of_what_its_down_half_hands_on_and_of_its_middle(small):
    unet, _, x, t, _, hard, pooled, time_ids = small
    seen = []
    hook = unet.up_blocks[0].register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    states = {}
    first = unet.conv_in.register_forward_hook(lambda _, args, out: states.update(first=out))
    with torch.no_grad():
        unet(x, t, hard, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids})
        found = in_sdxl.unet_features(unet, x, t, hard, Condition(hard, pooled, time_ids).added)
    hook.remove()
    first.remove()
    middle, last = seen[0]["hidden_states"], seen[0]["res_hidden_states_tuple"]
    width = middle.shape[1]
    assert found.shape == (2, in_sdxl.unet_width(unet))
    assert torch.equal(found[:, -width:], middle.mean((2, 3)))
    assert torch.equal(found[:, -2 * width : -width], last[-1].mean((2, 3)))
    assert torch.equal(found[:, : states["first"].shape[1]], states["first"].mean((2, 3)))

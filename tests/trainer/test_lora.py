"""LoRAs in the public layout: what a branch computes, its scale, and the public layout."""

import pytest
import torch
from lcm_lookahead.mini.plan import CONTEXT, SIZES
from lcm_lookahead.mini.stages import base
from lcm_lookahead.sdxl import lora


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return base.build_unet().eval().requires_grad_(False)


@pytest.fixture
def call(unet):
    g = torch.Generator().manual_seed(1)
    x, context = torch.randn(3, 4, 16, 16, generator=g), torch.randn(3, 77, CONTEXT, generator=g)
    text = base.condition(context, torch.randn(3, SIZES["text"]["width_g"], generator=g))
    t = torch.tensor([10, 500, 990])
    return lambda rows=slice(3): base.predict(unet, x[rows], t[rows], text.rows(rows))


def randomised(made: lora.LoRA) -> lora.LoRA:
    g = torch.Generator().manual_seed(2)
    for branch in made.branches:
        branch.lora_up.weight.data = torch.randn(branch.lora_up.weight.shape, generator=g) * 0.05
    return made


def test_a_new_lora_and_one_at_scale_0_change_nothing_bit_for_bit(unet, call):
    before = call()
    made = lora.build(unet, 4).attach(unet)
    assert torch.equal(call(), before)
    randomised(made)
    assert not torch.allclose(call(), before, atol=1e-2)
    with made.at(0.0):
        assert torch.equal(call(), before)


def test_the_branches_equal_the_weights_that_a_merge_gives(unet, call):
    made = randomised(lora.build(unet, 4, conv_rank=2)).attach(unet)
    with made.at(0.7):
        by_branches = call()
    made.scale = 0.0
    for name, weight in {p + ".weight": unet.get_submodule(p).weight for p in lora.layers(unet)}.items():
        stored = lora.public_tensors(made)
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        up, down = stored[f"{key}.lora_up.weight"], stored[f"{key}.lora_down.weight"]
        weight += 0.7 * stored[f"{key}.alpha"] / len(down) * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    assert torch.allclose(call(), by_branches, atol=1e-4)


def test_every_sample_has_its_own_scale(unet, call):
    made = randomised(lora.build(unet, 4)).attach(unet)
    scales = torch.tensor([0.0, 0.4, 1.0])
    with made.at(scales):
        together = call()
    for n, scale in enumerate(scales.tolist()):
        with made.at(scale):
            assert torch.allclose(together[n : n + 1], call(slice(n, n + 1)), atol=1e-5)


def test_gradients_reach_every_branch_and_no_weight_of_the_unet(unet, call):
    made = randomised(lora.build(unet, 2)).attach(unet)
    call().square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in made.parameters())
    assert all(p.grad is None for p in unet.parameters())


def test_a_file_reads_back_to_the_same_branches_with_alpha_and_rank_as_stored(unet, call):
    made = randomised(lora.build(unet, 4, conv_rank=2)).attach(unet)
    stored = {k: v * 2 if k.endswith(".alpha") else v for k, v in lora.public_tensors(made).items()}
    with made.at(2.0):
        expected = call()
    made.scale = 0.0
    read = lora.load(stored, unet).attach(unet)
    assert torch.allclose(call(), expected, atol=1e-5)
    theirs = lora.public({"text_encoder.x.lora_A.weight": torch.zeros(1), "lora_te1_x.alpha": torch.zeros(())} | stored)
    assert theirs.keys() == stored.keys()  # the text encoders stay as they are
    assert read.branches[0].lora_down.weight.shape[0] in (2, 4) and not any(p.requires_grad for p in read.parameters())


def test_a_name_without_a_layer_is_refused(unet):
    with pytest.raises(KeyError, match="lora_unet_conv_in"):
        lora.load({"lora_unet_conv_in.lora_down.weight": torch.zeros(1)}, unet)


def test_names_and_shapes_are_those_of_the_public_lcm_lora(unet):
    stored = lora.public_tensors(lora.build(unet, 4))
    # As in latent-consistency/lcm-lora-sdxl, one of every kind of layer.
    for name in (
        "down_blocks_0_downsamplers_0_conv",
        "down_blocks_0_resnets_0_conv1",
        "down_blocks_0_resnets_0_time_emb_proj",
        "down_blocks_1_attentions_0_proj_in",
        "down_blocks_1_resnets_0_conv_shortcut",
        "mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
        "mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0",
        "mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
        "mid_block_attentions_0_transformer_blocks_0_ff_net_2",
        "up_blocks_0_upsamplers_0_conv",
    ):
        for leaf in ("lora_down.weight", "lora_up.weight", "alpha"):
            assert f"lora_unet_{name}.{leaf}" in stored
    assert stored["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"].shape[2:] == (3, 3)
    assert stored["lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight"].shape[2:] == (1, 1)
    assert stored["lora_unet_down_blocks_0_resnets_0_conv1.alpha"].shape == ()


def test_the_layers_are_those_of_the_public_file_on_sdxl_itself():
    """788 layers, as the public file has for the real UNet (counted on a model without memory)."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        sdxl = UNet2DConditionModel(
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            attention_head_dim=[5, 10, 20],
            block_out_channels=[320, 640, 1280],
            cross_attention_dim=2048,
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            projection_class_embeddings_input_dim=2816,
            transformer_layers_per_block=[1, 2, 10],
            use_linear_projection=True,
        )
    assert len(lora.layers(sdxl)) == 788

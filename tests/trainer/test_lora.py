"""LoRAs in the public layout: what a branch computes, its scale, and the public layout."""

import re

import pytest
import torch
from lcm_lookahead.lookahead.files.original_names import ldm_unet
from lcm_lookahead.lookahead.files.tensors import EncoderFileError
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
    assert read.branches[0].lora_down.weight.shape[0] in (2, 4) and not any(p.requires_grad for p in read.parameters())


def by_layer(made):
    """(path, down, up, alpha) of each branch, as the public file has them."""
    stored = lora.public_tensors(made)
    for path in made.paths:
        name = f"lora_unet_{path.replace('.', '_')}"
        yield path, *(stored[f"{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))


def originals(unet) -> dict[str, str]:
    """By diffusers' path, the layer's name in the original release."""
    paths = [name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    names = ldm_unet({f"{path}.weight": path for path in paths})
    return {path: name.removesuffix(".weight") for name, path in names.items()}


NAMINGS = {
    "sd-scripts, the original release's blocks": lambda p, original: (
        f"lora_unet_{original.replace('.', '_')}",
        ".lora_down.weight",
        ".lora_up.weight",
    ),
    "the host's own names": lambda p, original: (f"diffusion_model.{original}", ".lora_A.weight", ".lora_B.weight"),
    "diffusers": lambda p, original: (f"unet.{p}", ".lora_A.weight", ".lora_B.weight"),
    "diffusers of old": lambda p, original: (
        f"unet.{p.replace('.to_', '.processor.to_')}".removesuffix(".0"),
        "_lora.down.weight",
        "_lora.up.weight",
    ),
    "lycoris": lambda p, original: (f"lycoris_{p.replace('.', '_')}", ".lora_down.weight", ".lora_up.weight"),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_all_names_by_which_files_are_published_are_read(unet, call, naming):
    """The up-samplers of levels with attention included, which the original release numbers otherwise."""
    made = randomised(lora.build(unet, 4, conv_rank=2))
    expected = lora.load(lora.public_tensors(made), unet)
    tensors = {"lora_te1_text_model_x.lora_down.weight": torch.ones(1), "text_encoder.x.lora_A.weight": torch.ones(1)}
    names = originals(unet)
    for path, down, up, alpha in by_layer(made):
        layer, of_down, of_up = NAMINGS[naming](path, names[path])
        tensors |= {layer + of_down: down, layer + of_up: up, layer + ".alpha": alpha}
    read = lora.load(tensors, unet)
    assert read.paths == expected.paths == made.paths
    for mine, theirs in zip(read.state_dict().items(), expected.state_dict().items(), strict=True):
        assert mine[0] == theirs[0] and torch.equal(mine[1], theirs[1])


def test_a_convolution_in_three_parts_is_read_as_one_of_two(unet):
    g = torch.Generator().manual_seed(4)
    path = "down_blocks.0.resnets.0.conv1"
    out, inner = unet.get_parameter(f"{path}.weight").shape[:2]
    down, mid, up = (torch.randn(s, generator=g) for s in ((3, inner, 1, 1), (3, 3, 3, 3), (out, 3, 1, 1)))
    name = f"lora_unet_{path.replace('.', '_')}"
    read = lora.load({f"{name}.lora_{k}.weight": v for k, v in {"down": down, "mid": mid, "up": up}.items()}, unet)
    x, conv = torch.randn(1, inner, 8, 8, generator=g), torch.nn.functional.conv2d
    assert torch.allclose(read.branches[0](x), conv(conv(conv(x, down), mid, padding=1), up), atol=1e-3)


LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({f"{LAYER}.dora_scale": torch.ones(128, 1)}, "is a DoRA"),
        ({f"{LAYER}.lora_magnitude_vector": torch.ones(128)}, "is a DoRA"),
        ({f"{LAYER}.hada_w1_a": torch.ones(4, 4)}, "is a LoHa"),
        ({f"{LAYER}.diff": torch.ones(4, 4)}, "is no LoRA for this base"),
        ({"lora_unet_down_blocks_7_resnets_0_conv1.alpha": torch.ones(())}, "the UNet no such layer"),
        ({f"{LAYER}.lora_up.weight": None}, "has no up matrix of mid_block"),
        ({f"{LAYER}.lora_up.weight": torch.ones(7, 4)}, "have shapes"),
        ({f"{LAYER}.lora_down.weight": torch.ones(0, 128)}, "holds no number"),
        ({f"{LAYER}.lora_up.weight": torch.full((128, 4), float("nan"))}, "not finite"),
        ({f"{LAYER}.alpha": torch.tensor(float("nan"))}, "not finite"),
        ({f"{LAYER}.alpha": torch.tensor(1e38)}, "as large as"),
        (None, "holds no LoRA of a UNet"),
    ],
)
def test_what_is_no_plain_lora_of_this_base_is_refused_in_one_sentence(unet, change, said):
    width = unet.get_parameter("mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight").shape[0]
    assert width == 128
    whole = {
        f"{LAYER}.lora_down.weight": torch.ones(4, width),
        f"{LAYER}.lora_up.weight": torch.ones(width, 4),
        f"{LAYER}.alpha": torch.tensor(4.0),
    }
    assert lora.load(whole, unet).paths == ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q",)
    tensors = {} if change is None else {k: v for k, v in {**whole, **change}.items() if v is not None}
    with pytest.raises(EncoderFileError, match=re.escape(said)) as error:
        lora.load(tensors, unet, "mine.safetensors")
    text = str(error.value)
    assert text.startswith("mine.safetensors") and text.endswith(".") and "\n" not in text and ". " not in text


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

"""The checkpoint in the public layout: diffusers' own converters read back what was written."""

import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from lcm_lookahead.lookahead.files.block_names import block_names
from lcm_lookahead.lookahead.files.original_names import ldm_unet
from lcm_lookahead.mini.files import checkpoint
from lcm_lookahead.mini.plan import SIZES
from lcm_lookahead.mini.stages import base, text, vae


def test_the_unet_reads_back_through_diffusers_converter_bit_for_bit():
    unet = base.build_unet()
    written = {f"model.diffusion_model.{k}": v for k, v in ldm_unet(unet.state_dict()).items()}
    read = convert_ldm_unet_checkpoint(written, dict(unet.config))
    state = unet.state_dict()
    assert read.keys() == state.keys()
    assert all(torch.equal(read[k], state[k]) for k in state)


def test_the_file_has_every_part_under_its_public_name():
    encoders = text.TextEncoders()
    tensors = checkpoint.sdxl_checkpoint(
        base.build_unet().state_dict(), encoders.l.state_dict(), encoders.g.state_dict(), vae.build().state_dict()
    )
    assert tensors["model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"].shape[1] == 64
    assert "model.diffusion_model.middle_block.1.transformer_blocks.1.attn1.to_q.weight" in tensors
    width = SIZES["text"]["width_g"]
    in_proj = tensors["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"]
    assert in_proj.shape == (3 * width, width)
    assert "conditioner.embedders.0.transformer.text_model.encoder.layers.2.mlp.fc1.weight" in tensors
    assert tensors["first_stage_model.taesd_decoder.1.weight"].shape == (64, 4, 3, 3)
    assert tensors["first_stage_model.vae_scale"] == checkpoint.VAE_SCALE


def test_bigg_text_projection_is_transposed_as_openclip_has_it():
    state = text.TextEncoders().g.state_dict()
    written = checkpoint.open_clip(state)
    x = torch.randn(2, SIZES["text"]["width_g"])
    assert torch.allclose(x @ written["text_projection"], x @ state["text_projection.weight"].T, atol=1e-6)


def test_attention_is_called_where_block_names_say():
    unet, depth = base.build_unet(), base.LAYOUT.depth
    ours = [f"{b.diffusers}.attn2.processor" for b in block_names(depth, depth[-1])]
    diffusers_order = [name for name in unet.attn_processors if ".attn2." in name]
    assert ours == diffusers_order and len(ours) == 17

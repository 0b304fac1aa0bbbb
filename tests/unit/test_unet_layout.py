"""SDXL's layout in both spellings, against values of the public configuration and of the host's detection."""

from lcm_lookahead.lookahead.files.block_names import block_names
from lcm_lookahead.lookahead.files.unet_layout import SDXL, UNetLayout
from lcm_lookahead.sdxl import configs


def test_diffusers_spelling_is_that_of_sdxl_base():
    assert SDXL.diffusers() == {
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    }
    assert sum(p.numel() for p in configs.unet().parameters()) == 2_567_463_684


def test_the_host_s_spelling_is_that_of_its_detection():
    found = SDXL.host()
    assert found["num_res_blocks"] == [2, 2, 2] and found["channel_mult"] == [1, 2, 4]
    assert found["transformer_depth"] == [0, 0, 2, 2, 10, 10] and found["transformer_depth_middle"] == 10
    assert found["transformer_depth_output"] == [0, 0, 0, 2, 2, 2, 10, 10, 10]
    sizes = ("model_channels", "adm_in_channels", "context_dim", "num_head_channels", "num_heads")
    assert [found[name] for name in sizes] == [320, 2816, 2048, 64, -1]


def test_a_layout_s_blocks_are_those_that_diffusers_builds():
    small = UNetLayout((32, 64, 64), (0, 1, 2), context=16, pooled=8, head=16)
    unet = configs.unet(small.diffusers())
    built = [name for name in unet.attn_processors if ".attn2." in name]
    assert [f"{b.diffusers}.attn2.processor" for b in block_names(small.depth, small.depth[-1])] == built

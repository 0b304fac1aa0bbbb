"""Worlds of random weights in the host's own classes: what the tests of the nodes are asked about.

A world is a model of the SDXL family, an encoder for it and a CLIP vision; a plain VAE and pictures are here as well.
Nothing here needs the pack. What needs it, and what runs the host, is in `host_tools.py`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SIZES = json.loads((ROOT / "mini/sizes.json").read_text())
MINI_UNET, VISION = SIZES["unet"], SIZES["clip_vision"]
TINY = {"channels": [32, 32, 64], "heads_of": 16}  # the host normalizes 32 groups of channels
KV_PROMPT = 7  # seed of the text of references


@dataclass
class World:
    """A model of the SDXL family with random weights, an encoder file's weights for it, and a CLIP vision."""

    depth: list[int]
    channels: list[int]
    middle: int
    context: int
    pooled: int
    heads_of: int
    model: object = None
    unet_config: dict = field(default_factory=dict)
    encoder: dict = field(default_factory=dict)
    clip_vision: object = None

    def text(self, seed: int, **extra):
        """CONDITIONING of random text."""
        g = torch.Generator().manual_seed(seed)
        pooled = torch.randn(1, self.pooled, generator=g)
        return [[torch.randn(1, 77, self.context, generator=g), {"pooled_output": pooled, **extra}]]

    def count(self) -> int:
        return 2 * sum(self.depth) + 3 * sum(self.depth) + self.middle


def seeded(shape, generator, scale=None) -> torch.Tensor:
    """A random tensor of this shape; by default its scale is that of a layer with so many inputs."""
    scale = scale if scale is not None else shape[-1] ** -0.5
    return torch.randn(shape, generator=generator) * scale


def unet_config(channels, depth, middle, context, pooled, heads_of, in_channels=4, dtype=torch.float32) -> dict:
    """What the host's detection finds in a checkpoint of the SDXL family."""
    return {
        "use_checkpoint": False,
        "image_size": 32,
        "out_channels": 4,
        "in_channels": in_channels,
        "use_spatial_transformer": True,
        "legacy": False,
        "num_classes": "sequential",
        "adm_in_channels": pooled + 6 * 256,
        "model_channels": channels[0],
        "num_res_blocks": [2] * len(channels),
        "channel_mult": [c // channels[0] for c in channels],
        "transformer_depth": [d for d in depth for _ in range(2)],
        "transformer_depth_output": [d for d in depth for _ in range(3)],
        "transformer_depth_middle": middle,
        "use_linear_in_transformer": True,
        "context_dim": context,
        "num_heads": -1,
        "num_head_channels": heads_of,
        "use_temporal_attention": False,
        "dtype": dtype,
    }


def make_model(world: World, in_channels: int = 4, dtype=torch.float32, compute=None):
    """The host's own SDXL model class around a UNet of this layout, as its checkpoint loader would build it.

    compute: the precision to which weights are cast, where it is another than theirs.
    """
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    w = world
    world.unet_config = unet_config(
        w.channels, w.depth, w.middle, w.context, w.pooled, w.heads_of, in_channels=in_channels, dtype=dtype
    )
    config = comfy.supported_models.SDXL(world.unet_config)
    config.unet_config = dict(world.unet_config)  # without the class's own number of head channels
    if compute is not None:
        config.set_inference_dtype(dtype, compute)
    model = comfy.model_base.SDXL(config, device="cpu")
    if in_channels == 9:
        model.set_inpaint()
    g = torch.Generator().manual_seed(5)
    weights = {}
    for name, value in model.diffusion_model.state_dict().items():
        norm = value.ndim == 1 and name.endswith("weight")
        fan = value[0].numel() if value.ndim > 1 else 1
        random = seeded(value.shape, g, fan**-0.5 if fan > 1 else 0.1)
        weights[name] = 1 + random if norm else random
    model.diffusion_model.load_state_dict({k: v.to(dtype) for k, v in weights.items()})
    model.eval().requires_grad_(False)
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def make_encoder(world: World, widths: list[int], image_width: int, tokens: int = 16) -> dict[str, torch.Tensor]:
    """Flat weights of an encoder file for this world."""
    g = torch.Generator().manual_seed(6)
    dim, inner = 64, 128
    out = {
        "latents": seeded((1, tokens, dim), g),
        "proj_in.weight": seeded((dim, image_width), g),
        "proj_in.bias": seeded((dim,), g, 0.1),
        "proj_out.weight": seeded((world.context, dim), g),
        "proj_out.bias": seeded((world.context,), g, 0.1),
        "norm_out.weight": 1 + seeded((world.context,), g, 0.1),
        "norm_out.bias": seeded((world.context,), g, 0.1),
    }
    for n in range(4):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            out[f"layers.{n}.{norm}.weight"] = 1 + seeded((dim,), g, 0.1)
            out[f"layers.{n}.{norm}.bias"] = seeded((dim,), g, 0.1)
        out[f"layers.{n}.0.to_q.weight"] = seeded((inner, dim), g)
        out[f"layers.{n}.0.to_kv.weight"] = seeded((2 * inner, dim), g)
        out[f"layers.{n}.0.to_out.weight"] = seeded((dim, inner), g)
        out[f"layers.{n}.1.1.weight"] = seeded((4 * dim, dim), g)
        out[f"layers.{n}.1.3.weight"] = seeded((dim, 4 * dim), g)
    out = {f"image_proj.{k}": v for k, v in out.items()}
    for n, width in enumerate(widths):
        for which in "kv":
            out[f"ip_adapter.{2 * n + 1}.to_{which}_ip.weight"] = seeded((width, world.context), g)
    return out


def make_clip_vision(folder: Path, **changes):
    """The host's CLIP vision class around random weights. Older hosts take the path of a configuration only."""
    import comfy.clip_vision

    config = {"model_type": "clip_vision_model", "num_channels": 3, "layer_norm_eps": 1e-5, "attention_dropout": 0.0}
    config.update(VISION, **changes)
    path = folder / "clip_vision.json"
    path.write_text(json.dumps(config))
    clip = comfy.clip_vision.ClipVisionModel(str(path))
    g = torch.Generator().manual_seed(7)
    clip.load_sd({k: seeded(v.shape, g) if v.is_floating_point() else v for k, v in clip.get_sd().items()})
    return clip


def diffusers_unet(world: World):
    """diffusers' UNet with the world's weights."""
    import comfy.utils
    import diffusers

    has = [d > 0 for d in world.depth]
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=world.channels,
        down_block_types=[("CrossAttn" if h else "") + "DownBlock2D" for h in has],
        up_block_types=[("CrossAttn" if h else "") + "UpBlock2D" for h in reversed(has)],
        transformer_layers_per_block=[max(d, 1) for d in world.depth],
        attention_head_dim=[c // world.heads_of for c in world.channels],
        layers_per_block=2,
        cross_attention_dim=world.context,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=world.unet_config["adm_in_channels"],
    )
    ldm = world.model.model.diffusion_model.state_dict()
    keys = comfy.utils.unet_to_diffusers(world.unet_config)
    unet.load_state_dict({k: ldm[keys[k]] for k in unet.state_dict()})
    return unet.eval().requires_grad_(False)


def widths_of(world: World) -> list[int]:
    """Channels of each cross-attention in the order of the public files: down, up, middle. Written out on purpose."""
    down = [c for c, d in zip(world.channels, world.depth, strict=True) for _ in range(2 * d)]
    up = [c for c, d in zip(reversed(world.channels), reversed(world.depth), strict=True) for _ in range(3 * d)]
    return down + up + [world.channels[-1]] * world.middle


def make_world(kind: str, folder: Path, **model_options) -> World:
    """A world of random weights.

    kind: `mini` has the sizes of the mini world, `tiny` its layout, as narrow as the host's UNet can be, with another
    width at each level that has attentions; `sdxl` has the layout of SDXL.
    """
    if kind in ("mini", "tiny"):
        first = MINI_UNET["model_channels"]
        mini = {"channels": [first * m for m in MINI_UNET["channel_mult"]], "heads_of": MINI_UNET["head_channels"]}
        world = World(
            depth=MINI_UNET["transformer_depth"],
            middle=MINI_UNET["transformer_depth"][-1],
            context=SIZES["text"]["width_l"] + SIZES["text"]["width_g"],
            pooled=SIZES["text"]["width_g"],
            **(mini if kind == "mini" else TINY),
        )
    else:  # the layout of SDXL with all its 70 transformer blocks, only narrow
        world = World(depth=[0, 2, 10], channels=[32, 64, 128], middle=10, context=64, pooled=32, heads_of=16)
    world.model = make_model(world, **model_options)
    world.encoder = make_encoder(world, widths_of(world), VISION["hidden_size"])
    world.clip_vision = make_clip_vision(folder)
    return world


def with_lora(model, seed: int = 8, hook: bool = False):
    """A model with a LoRA on its self- and cross-attentions by the host's own loader; hook: the same as a hook."""
    import comfy.hooks
    import comfy.lora
    import comfy.sd

    names = comfy.lora.model_lora_keys_unet(model.model, {})
    weights, g, lora = model.model.state_dict(), torch.Generator().manual_seed(seed), {}
    # The host names them in the order of a set, which differs from process to process.
    for name in sorted(n for n in names if "lora_unet" in n and ("attn1_to_v" in n or "attn2_to_q" in n)):
        out, width = weights[names[name]].shape
        lora[f"{name}.lora_down.weight"] = torch.randn(4, width, generator=g) * 0.3
        lora[f"{name}.lora_up.weight"] = torch.randn(out, 4, generator=g) * 0.3
    if hook:
        return comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


def random_taesd():
    """TAESD with random weights, as the host's VAE."""
    import comfy.sd
    import comfy.taesd.taesd

    with torch.inference_mode():
        g = torch.Generator().manual_seed(3)
        weights = comfy.taesd.taesd.TAESD().state_dict()
        for name, value in weights.items():
            if value.ndim:
                fan = value[0].numel() if value.ndim > 1 else 1
                weights[name] = torch.randn(value.shape, generator=g) * (0.7 * fan**-0.5 if fan > 1 else 0.1)
        weights["vae_scale"] = torch.tensor(0.13025)
        return comfy.sd.VAE(sd=weights)


class MeanColours:
    """A VAE whose latents are known: the mean colour of each 8x8 pixels, and the mean of these."""

    def encode(self, pixels):
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return 12 * (torch.cat([small, small.mean(1, keepdim=True)], dim=1) - 0.5)


def picture(seed: int, n: int = 1, height: int = 96, width: int = 96, channels: int = 3) -> torch.Tensor:
    """A random smooth picture [n, H, W, C] in [0, 1]."""
    small = torch.rand(n, channels, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(small, (height, width), mode="bilinear").movedim(1, -1)


def control_net(world):
    """The host's ControlNet with random weights, for a UNet of this layout."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    config = {k: v for k, v in world.unet_config.items() if k not in ("out_channels", "transformer_depth_output")}
    config["transformer_depth"] = list(config["transformer_depth"])
    net = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, operations=comfy.ops.disable_weight_init)
    g = torch.Generator().manual_seed(11)
    weights = net.state_dict()
    net.load_state_dict({k: torch.randn(v.shape, generator=g) * v[0].numel() ** -0.5 for k, v in weights.items()})
    return comfy.controlnet.ControlNet(net.eval(), load_device=torch.device("cpu"))

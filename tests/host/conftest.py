"""The real host in this process, with our pack loaded as the host loads any pack: by its folder alone.

The host is COMFYUI_DIR, else `.host/<HOST_VERSION>` (0.30.0 by default). Worlds have random weights: what is compared
here does not depend on what a picture shows.
"""

import asyncio
import importlib
import json
import os
import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SIZES = json.loads((ROOT / "mini/sizes.json").read_text())
runpy.run_path(str(ROOT / "host/custom_nodes/cpu_torchvision/prestartup_script.py"))  # for diffusers in the tests
MINI_UNET, VISION = SIZES["unet"], SIZES["clip_vision"]


def host_directory() -> Path:
    """Where the host's tree is."""
    named = os.environ.get("COMFYUI_DIR")
    folder = Path(named) if named else ROOT / ".host" / os.environ.get("HOST_VERSION", "0.30.0")
    if not (folder / "comfy" / "samplers.py").is_file():
        pytest.exit(f"There is no ComfyUI in {folder}: call `make host`, or set COMFYUI_DIR.", returncode=3)
    return folder.resolve()


@pytest.fixture(scope="session")
def pack(tmp_path_factory):
    """The host has loaded the pack: `pack.nodes` by node id, `pack.module("nodes.conditioning.rows")` for the rest."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    sys.path.insert(0, str(host_directory()))
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    base = tmp_path_factory.mktemp("host")
    args.base_directory = str(base)
    import nodes as host_nodes

    assert asyncio.run(host_nodes.load_custom_node(str(ROOT), module_parent="custom_nodes"))
    names = [n for n in host_nodes.NODE_CLASS_MAPPINGS if n.startswith("Lookahead")]
    name = host_nodes.NODE_CLASS_MAPPINGS[names[0]].__module__.rpartition(".nodes.")[0]
    return SimpleNamespace(
        nodes={n: host_nodes.NODE_CLASS_MAPPINGS[n] for n in names},
        host_nodes=host_nodes,
        module=lambda path: importlib.import_module(f"{name}.{path}"),
        base=base,
    )


@pytest.fixture(scope="session")
def object_info(pack):
    """What GET /object_info answers for our nodes and the host's first ones, on a machine without model files."""
    import folder_paths

    classes = pack.host_nodes.NODE_CLASS_MAPPINGS
    with pytest.MonkeyPatch.context() as patch:
        empty = {name: ([], endings) for name, (_, endings) in folder_paths.folder_names_and_paths.items()}
        patch.setattr(folder_paths, "folder_names_and_paths", empty)
        patch.setattr(folder_paths, "filename_list_cache", {})
        ours = {id: classes[id].GET_NODE_INFO_V1() for id in pack.nodes}
        names = ("KSampler", "CheckpointLoaderSimple", "VAELoader")  # of its lists, these have what ours share
        host = {id: {"input": classes[id].INPUT_TYPES(), "category": classes[id].CATEGORY} for id in names}
    return ours | host


@pytest.fixture(autouse=True)
def _as_the_host_runs_nodes(pack):
    """The executor runs every node in inference mode."""
    with torch.inference_mode():
        yield


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
    if kind == "mini":
        first = MINI_UNET["model_channels"]
        world = World(
            depth=MINI_UNET["transformer_depth"],
            channels=[first * m for m in MINI_UNET["channel_mult"]],
            middle=MINI_UNET["transformer_depth"][-1],
            context=SIZES["text"]["width_l"] + SIZES["text"]["width_g"],
            pooled=SIZES["text"]["width_g"],
            heads_of=MINI_UNET["head_channels"],
        )
    else:  # the layout of SDXL with all its 70 transformer blocks, only narrow
        world = World(depth=[0, 2, 10], channels=[32, 64, 128], middle=10, context=64, pooled=32, heads_of=16)
    world.model = make_model(world, **model_options)
    world.encoder = make_encoder(world, widths_of(world), VISION["hidden_size"])
    world.clip_vision = make_clip_vision(folder)
    return world


@pytest.fixture(scope="session")
def worlds(pack, tmp_path_factory):
    """`worlds("mini")` and `worlds("sdxl")`, each built once."""
    built = {}

    def world(kind: str, **options) -> World:
        key = (kind, *options.items())
        if key not in built:
            with torch.inference_mode():
                built[key] = make_world(kind, tmp_path_factory.mktemp(kind), **options)
        return built[key]

    world.built = built
    return world


@pytest.fixture(autouse=True)
def _worlds_as_built(worlds):
    """No test sees what another patched: the host leaves patches in shared weights until it needs them otherwise."""
    import comfy.model_management

    yield
    # Some hosts fail on models that were collected before they could unload them, and others collect garbage for each
    # at every later load, which takes seconds in a long process: these are left out, and the rest is held meanwhile.
    loaded = comfy.model_management.current_loaded_models
    held = [(one, one.model) for one in loaded]
    loaded[:] = [one for one, model in held if model is not None]
    comfy.model_management.unload_all_models()
    for world in worlds.built.values():
        if world.model.backup or world.model.object_patches_backup:
            world.model.unpatch_model()  # left by those models
    loaded.clear()


@pytest.fixture(scope="session")
def sizes() -> dict:
    """The sizes of the mini world."""
    return SIZES


@pytest.fixture(scope="session")
def mini(worlds) -> World:
    return worlds("mini")


@pytest.fixture(scope="session")
def tools(pack):
    """Helpers that need the loaded pack: see the functions below."""
    return SimpleNamespace(
        encoder=lambda weights, metadata=None: make_pack_encoder(pack, weights, metadata),
        reference=lambda world, image, **options: make_reference(pack, world, image, **options),
        apply=lambda model, reference, **options: run(pack, "LookaheadApplyImagePrompt", model, reference, **options),
        kv_weights=lambda world, **options: make_kv_weights(pack, world, **options),
        kv_encoder=lambda world, **options: make_pack_encoder(
            pack, world.encoder | make_kv_weights(pack, world, **options), OWN_FORMAT
        ),
        kv_reference=lambda world, image, **options: make_kv_reference(pack, world, image, **options),
        inject=lambda model, reference, **options: run(pack, "LookaheadApplyKVInjection", model, reference, **options),
        three_scales=lambda *args, **options: run(pack, "LookaheadGuider", *args, **options),
        watch=UNetPasses,
        with_lora=with_lora,
        host_node=host_node,
        run=lambda node, *args, **options: run(pack, node, *args, **options),
        one_sentence=one_sentence,
        guider=guider_of,
        denoised=denoised,
        sample=sample,
        picture=picture,
        widths=widths_of,
        make_clip_vision=make_clip_vision,
        make_model=make_model,
        unet_config=unet_config,
        diffusers_unet=diffusers_unet,
    )


@pytest.fixture
def flow(mini, tools):
    """The mini model switched to flow matching by the host's node."""
    return tools.host_node("nodes_model_advanced", "ModelSamplingSD3", mini.model, 3.0)


def one_sentence(error) -> str:
    text = str(error.value)
    assert text[0].isupper() or text.split()[0].strip(":").endswith((".safetensors", ".bin"))
    assert text.endswith(".") and "\n" not in text and text.count(". ") == 0
    return text


def run(pack, node: str, *args, **options):
    """Run a node's `execute` and return its first output."""
    return pack.nodes[node].execute(*args, **options).result[0]


def make_pack_encoder(pack, weights, metadata=None):
    file = pack.module("lookahead.files.encoder_file").from_tensors(weights, metadata or {}, "test.safetensors")
    return pack.module("nodes.reference.encoder").LoadedEncoder(file)


def make_reference(pack, world: World, image, **options):
    encoder = make_pack_encoder(pack, world.encoder)
    return run(pack, "LookaheadEncodeReference", encoder, world.clip_vision, image, **{"size": 64, **options})


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


def host_node(module: str, name: str, *args):
    """First output of a node of the host, whichever schema it has."""
    node = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
    out = node.execute(*args) if hasattr(node, "execute") else getattr(node(), node.FUNCTION)(*args)
    return (out.result if hasattr(out, "result") else out)[0]


OWN_FORMAT = {"format": "lcm-lookahead-encoder", "format_version": "1"}


def make_kv_weights(pack, world: World, rank: int = 2, seed: int = 8) -> dict[str, torch.Tensor]:
    """A KV encoder's low-rank weights for this world, under their names in an encoder file."""
    names = pack.module("lookahead.files.block_names").block_names(world.depth, world.middle)
    last = max(name.diffusers for name in names if name.diffusers.startswith("up_blocks"))
    g, out = torch.Generator().manual_seed(seed), {}
    for name, width in zip(names, widths_of(world), strict=True):
        layers = {f"kv_export.{name.diffusers}.attn1.to_{x}": width for x in "kv"}
        if name.diffusers != last:
            for x in ("to_q", "to_k", "to_v", "to_out.0"):
                layers[f"kv_encoder.{name.diffusers}.attn1.{x}"] = width
                from_text = x in ("to_k", "to_v")
                layers[f"kv_encoder.{name.diffusers}.attn2.{x}"] = world.context if from_text else width
        for layer, width_in in layers.items():
            out[f"{layer}.lora_A.weight"] = seeded((rank, width_in), g)
            out[f"{layer}.lora_B.weight"] = seeded((width, rank), g, 0.5)
    return out


class MeanColours:
    """A VAE whose latents are known: the mean colour of each 8x8 pixels, and the mean of these."""

    def encode(self, pixels):
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return 12 * (torch.cat([small, small.mean(1, keepdim=True)], dim=1) - 0.5)


KV_PROMPT = 7  # seed of the text of references


def make_kv_reference(pack, world: World, image, encoder=None, **options):
    """A reference for KV injection. With an encoder it is an image prompt as well."""
    options = {"size": 64, "vae": MeanColours(), "conditioning": world.text(KV_PROMPT), **options}
    return run(pack, "LookaheadEncodeReference", encoder, encoder and world.clip_vision, image, **options)


class UNetPasses:
    """What was asked of the UNet, seen by hooks on its modules, which know nothing of our nodes.

    rows: for each row of each pass of the picture (text, number of the image, what the middle's first self-attention
    read beside the row itself), for example ("positive", 0, ("face 0",)): "face" is the reference's own prompt, "zeros"
    are zero embeddings, and the number is that of the row in the reference pass at the same noise level.
    """

    def __init__(self, world: World, **texts):
        self.texts = {"face": world.text(KV_PROMPT), **texts}
        self.unet = world.model.model.diffusion_model
        self.passes, self.references = [], []
        middle = self.unet.middle_block[1].transformer_blocks[0].attn1.to_k
        self._hooks = [
            self.unet.register_forward_pre_hook(self._begins, with_kwargs=True),
            middle.register_forward_hook(self._projects),
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()

    def model(self, model):
        """A clone of a model whose attention is watched."""
        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = self._attends
        return model

    def clear(self):
        self.passes.clear()
        self.references.clear()

    @property
    def rows(self) -> list[tuple]:
        return [row for one in self.passes for row in one.rows]

    def _name(self, context) -> str:
        if not context.any():
            return "zeros"
        return next(name for name, text in self.texts.items() if torch.equal(context, text[0][0][0].to(context)))

    def _begins(self, _, args, kwargs):
        x, t = args[:2]
        options = kwargs["transformer_options"]
        names = [self._name(row) for row in kwargs["context"]]
        images = len(names) // len(options["cond_or_uncond"])
        rows = [(name, n % images, ()) for n, name in enumerate(names)]
        of_reference = set(names) <= {"face", "zeros"}
        self.now = SimpleNamespace(
            x=x, t=float(t[0]), names=names, rows=rows, options=options, keys=None, of_reference=of_reference
        )
        (self.references if of_reference else self.passes).append(self.now)

    def _projects(self, _, args, out):
        if self.now.keys is None:  # after a reference pass the inputs that it gave are projected as well
            self.now.keys = out

    def _attends(self, attention, q, k, v, *args, **kwargs):
        own = self.now.keys
        if own is not None and k.shape[-1] == own.shape[-1] and torch.equal(k[:, : own.shape[1]], own):
            for n, keys in enumerate(k[:, own.shape[1] :]):
                found = self._labels(keys)
                if found:  # an attention that is blended with a plain one is called twice
                    self.now.rows[n] = (*self.now.rows[n][:2], found)
        return attention(q, k, v, *args, **kwargs)

    def _labels(self, keys) -> tuple[str, ...]:
        known = {}
        for one in self.references:
            for name in ("face", "zeros") if one.t == self.now.t else ():
                rows = [keys for keys, own in zip(one.keys, one.names, strict=True) if own == name]
                known |= {f"{name} {n}": row for n, row in enumerate(rows)}
        parts = keys.split(len(next(iter(known.values())))) if len(keys) else ()
        # What was kept is projected again, in other batches perhaps: on some processors that rounds differently.
        return tuple(
            next(name for name, row in known.items() if torch.dist(part, row) < 1e-4 * row.norm()) for part in parts
        )


def picture(seed: int, n: int = 1, height: int = 96, width: int = 96, channels: int = 3) -> torch.Tensor:
    """A random smooth picture [n, H, W, C] in [0, 1]."""
    small = torch.rand(n, channels, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(small, (height, width), mode="bilinear").movedim(1, -1)


def guider_of(model, positive, negative, cfg):
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def sample(
    model, positive, negative, latent, cfg=3.0, steps=3, sampler="euler", guider=None, seed=1, sigmas=None, **options
):
    """Sample with the host's own guider and sampler."""
    import comfy.samplers

    guider = guider or guider_of(model, positive, negative, cfg)
    if sigmas is None:
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
    sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    return guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=seed, **options)


def denoised(model, positive, negative, x, sigma, cfg=1.0, guider=None):
    """What the guider returns at (x, sigma): one model call inside an ordinary run of the host."""
    import comfy.samplers

    guider = guider or guider_of(model, positive, negative, cfg)
    found = []

    def call_once(model_k, noise, sigmas, extra_args=None, callback=None, disable=None):
        found.append(model_k(x, sigmas[:1].expand(x.shape[0]), **extra_args))
        return noise

    guider.sample(
        torch.zeros_like(x), torch.zeros_like(x), comfy.samplers.KSAMPLER(call_once), torch.tensor([sigma, 0.0]), seed=1
    )
    return found[0]

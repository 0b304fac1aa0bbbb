"""Run by `make bench` inside a ComfyUI tree: times model calls of one run beside each other and prints JSON.

python bench_in_host.py HOST_DIRECTORY BASE_DIRECTORY PACK_DIRECTORY CPU_TORCHVISION MINI_EXTENSION [SIDE [PART]]

With SIDE it measures SDXL at full size with random weights in bfloat16, at SIDE x SIDE pixels, else (0) the mini world;
with the part "kv" the arms of KV injection alone, with "guidance" lookahead guidance alone.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import runpy
import statistics
import sys
import time
from typing import Any

STEPS, ROUNDS = 8, 5
FULL_STEPS, FULL_ROUNDS = 4, 1
COLD_RENEWED, REPLAYED_RENEWED = (f"CFG with KV, 8 bit, renewed at 1 of 4 steps, {how}" for how in ("cold", "replayed"))
RENEW = 4  # in the arms that read the reference in some steps alone


def main(host: str, base: str, pack: str, cpu_torchvision: str, mini: str, side: str = "", part: str = "") -> None:
    """Load the pack as the host does, then time every arm in turn."""
    sys.path.insert(0, host)
    runpy.run_path(f"{cpu_torchvision}/prestartup_script.py")
    import torch
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    args.base_directory = base
    import folder_paths

    import nodes

    folder_paths.set_output_directory(f"{base}/output")
    for name in ("checkpoints", "clip_vision", "ipadapter", "lookahead"):
        folder_paths.add_model_folder_path(name, f"{base}/models/{name}", is_default=True)
    for folder in (mini, pack):
        if not asyncio.run(nodes.load_custom_node(folder, module_parent="custom_nodes")):
            raise SystemExit(f"{folder} could not be loaded as a custom node")

    with torch.inference_mode():
        full_size = int(side or 0)
        pixels = full_size or 128
        steps, rounds = (FULL_STEPS, FULL_ROUNDS) if full_size else (STEPS, ROUNDS)
        face = torch.rand(1, pixels, pixels, 3, generator=torch.Generator().manual_seed(1))
        if full_size:
            model = _random_sdxl()
            positive, negative = (_random_text(seed) for seed in (1, 2))
            read = {"vae": _NoVAE(), "conditioning": _random_text(3)}
        else:
            model, clip, vae = nodes.CheckpointLoaderSimple().load_checkpoint("sd_xl_base_1.0.safetensors")[:3]
            positive, negative = (nodes.CLIPTextEncode().encode(clip, text)[0] for text in ("a photo of a face", ""))
            read = {"vae": vae, "clip": clip}

        report: dict[str, Any] = {}
        if part != "guidance":
            report |= _kv_injection(model, positive, negative, face, read, steps, rounds, part == "kv")
        if part != "kv":
            if full_size:
                vae, few = _ColourVAE(), _with_random_lora(model)
            else:
                few = nodes.LoraLoaderModelOnly().load_lora_model_only(model, "lcm-lora-sdxl.safetensors", 1.0)[0]
            report["guidance"] = _guidance(model, few, positive, negative, vae, pixels, rounds)
            report["guidance_bytes"] = _guidance_bytes()
        gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
        report |= {
            "unets": _unets(type(model.model.diffusion_model)),
            "model": f"SDXL with random weights, {pixels}x{pixels}" if full_size else "mini world, 128x128",
            "peak_memory": _peak_memory(),
            "device": gpu or f"{torch.get_num_threads()} CPU thread(s)",
        }
    print("BENCH " + json.dumps(report))


def _kv_injection(
    model: Any, positive: Any, negative: Any, face: Any, read: dict, steps: int, rounds: int, without_guider: bool
) -> dict[str, Any]:
    """Seconds of a step with and without KV injection and the guider, and the bytes that KV injection keeps.

    face: picture [1, side, side, 3], the reference and the size that is drawn; read: what encodes it.
    """
    import comfy.samplers

    import nodes

    def run(node: str, *arguments: Any, **options: Any) -> Any:
        return nodes.NODE_CLASS_MAPPINGS[node].execute(*arguments, **options).result[0]

    def reference() -> Any:
        return run("LookaheadEncodeReference", image=face, size=face.shape[1], **read)

    def with_kv(reference: Any, cache_gb: float, **settings: Any) -> Any:
        return run("LookaheadApplyKVInjection", model, reference, cache_gb=cache_gb, **settings)

    def cfg(model: Any) -> Any:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(3.0)
        return guider

    def three(model: Any, kv: float = 2.0) -> Any:
        return run("LookaheadGuider", model, positive, negative, 3.0, 2.0, kv)

    kept = reference()
    replayed, cold = with_kv(kept, 2.0), with_kv(reference(), 0.0)
    less = {"precision": "8 bit", "renew": RENEW}
    kept_less = reference()
    replayed_less, cold_less = with_kv(kept_less, 2.0, **less), with_kv(reference(), 0.0, **less)
    arms = {
        "plain CFG": cfg(model),
        "CFG with KV, cold": cfg(cold),
        "CFG with KV, replayed": cfg(replayed),
        COLD_RENEWED: cfg(cold_less),
        REPLAYED_RENEWED: cfg(replayed_less),
        "guider, cold": three(cold),
        "guider, replayed": three(replayed),
        "guider, kv = 0, replayed": three(replayed, 0.0),
    }
    if without_guider:
        arms = {name: guider for name, guider in arms.items() if not name.startswith("guider")}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, guider in arms.items():
            seconds = _step_times(guider, model, face.shape[1] // 8, steps)
            if name in (COLD_RENEWED, REPLAYED_RENEWED):  # their steps differ: the mean of a run
                seconds = [statistics.mean(seconds)]
            if turn:  # the first round warms up, and fills the cache
                times[name] += seconds
    sizes, counted = {}, {}
    for name, subject, patched in (("full", kept, replayed), ("8 bit", kept_less, replayed_less)):
        entries = [rows for run_ in subject.subjects[0].cache.runs.values() for rows in run_.values()]
        (sizes[name],) = {sum(t.nbytes for row in e.values() for parts in row for t in parts) for e in entries}
        source = patched.model_options["transformer_options"]["lookahead"].effects[0].source
        counted[name] = source.bytes_per_row(model.model.get_dtype_inference().itemsize)
    return {
        "flop_ratios": _flop_ratios(list(arms)),
        "renew": RENEW,
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "spread": {name: [min(values), max(values)] for name, values in times.items()},
        "kv_bytes": sizes,
        "kv_bytes_from_shapes": counted,
    }


def _flop_ratios(arms: list[str], side: int = 1024) -> dict[str, float]:
    """FLOP of a step of SDXL at a size over those of plain CFG: counted on the meta device, nothing is computed.

    Of one row: the UNet, the reference pass up to its last export, the keys and values of what is kept, and the second
    half of what self-attentions then read.
    """
    import comfy.ops
    import torch
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from torch.utils.flop_counter import FlopCounterMode

    import nodes

    package = nodes.NODE_CLASS_MAPPINGS["LookaheadGuidanceSampler"].__module__.rpartition(".nodes.")[0]
    names = importlib.import_module(f"{package}.lookahead.files.block_names").block_names()
    order = ("input", "middle", "output")
    last = sorted((name.host for name in names), key=lambda key: order.index(key[0]))[-1]
    kinds = {"device": "meta", "dtype": torch.float16}

    class Done(Exception):
        pass

    def forward(replace: Any = None) -> tuple[int, dict[str, int]]:
        """FLOP of a forward, and of self-attentions: over as many tokens again, and of their keys and values."""
        attended, again = [0], {"read": 0, "projected": 0}

        def attention(_: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
            attended[0] += 4 * q.shape[1] * k.shape[1] * q.shape[2]
            if k.shape[1] == q.shape[1]:
                again["read"] += 4 * q.shape[1] * k.shape[1] * q.shape[2]
                again["projected"] += 2 * 2 * k.shape[1] * k.shape[2] ** 2
            return torch.empty_like(q)

        options: dict[str, Any] = {"optimized_attention_override": attention}
        if replace is not None:
            options["patches_replace"] = {"attn1": {last: replace}}
        x = torch.empty(1, 4, side // 8, side // 8, **kinds)
        text, adm = torch.empty(1, 77, 2048, **kinds), torch.empty(1, 2816, **kinds)
        with FlopCounterMode(display=False) as counter:
            try:
                unet(x, torch.empty(1, device="meta"), text, y=adm, transformer_options=options)
            except Done:
                pass
        return counter.get_total_flops() + attended[0], again

    def stop(*_: Any) -> Any:
        raise Done

    with torch.inference_mode(False), torch.no_grad():
        unet = UNetModel(**_sdxl_layout(), **kinds, operations=comfy.ops.manual_cast).requires_grad_(False)
        row, again = forward()
        read, projected = again["read"], again["projected"]
        pass_ = forward(stop)[0] + projected
        share = 1 / RENEW
        steps = {
            "plain CFG": 2 * row,
            "CFG with KV, cold": 2 * (row + read + pass_),
            "CFG with KV, replayed": 2 * (row + read + projected),
            COLD_RENEWED: 2 * (row + read + share * pass_),
            REPLAYED_RENEWED: 2 * (row + read + share * projected),
            "guider, cold": 4 * row + 2 * (read + pass_),
            "guider, replayed": 4 * row + 2 * (read + projected),
            "guider, kv = 0, replayed": 3 * row + read + projected,
        }
    return {name: steps[name] / steps["plain CFG"] for name in arms}


def _sdxl_layout() -> dict[str, Any]:
    """SDXL's UNet in the host's spelling, by the pack that the host has loaded."""
    import nodes

    package = nodes.NODE_CLASS_MAPPINGS["LookaheadGuidanceSampler"].__module__.rpartition(".nodes.")[0]
    return importlib.import_module(f"{package}.lookahead.files.unet_layout").SDXL.host()


def _random_sdxl() -> Any:
    """The host's own SDXL around a UNet of full size; random weights in bfloat16, without a file."""
    import comfy.model_base
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    device = comfy.model_management.get_torch_device()
    config = comfy.supported_models.SDXL({**_sdxl_layout(), "dtype": torch.bfloat16})
    model = comfy.model_base.SDXL(config, device=device)
    numbers = torch.Generator(device).manual_seed(1)
    for parameter in model.diffusion_model.parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 else 1
        parameter.data.normal_(0, fan**-0.5 if fan > 1 else 0.1, generator=numbers)
    model.eval().requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def _random_text(seed: int) -> list:
    import torch

    numbers = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, 77, 2048, generator=numbers), {"pooled_output": torch.randn(1, 1280, generator=numbers)}]]


class _NoVAE:
    """Latents for timing: what they show does not matter."""

    @staticmethod
    def encode(pixels: Any) -> Any:
        import torch

        return torch.randn(len(pixels), 4, pixels.shape[1] // 8, pixels.shape[2] // 8)


class _ColourVAE:
    """Previews for timing the UNet alone: three channels of the latent, each number a square of 8x8."""

    latent_channels = 4

    def __init__(self) -> None:
        import comfy.model_management
        import comfy.model_patcher
        import torch

        class Decoder(torch.nn.Module):
            def decode(self, z: Any) -> Any:
                return torch.nn.functional.interpolate(z[:, :3], scale_factor=8)

        self.first_stage_model, self.vae_dtype = Decoder(), torch.float32
        self.device = comfy.model_management.get_torch_device()
        self.patcher = comfy.model_patcher.ModelPatcher(self.first_stage_model, self.device, self.device)

    def decode(self, z: Any) -> Any:
        """As a VAE of the host: pictures [n, h, w, 3] in [0, 1]."""
        return (self.first_stage_model.decode(z).movedim(1, -1) / 2 + 0.5).clamp(0, 1)

    @staticmethod
    def memory_used_decode(shape: Any, dtype: Any) -> int:
        return 0


def _with_random_lora(model: Any, rank: int = 64) -> Any:
    """SDXL with a LoRA of an LCM-LoRA's layers and rank, by the host's loader."""
    import comfy.lora
    import comfy.sd
    import torch

    weights, lora = model.model.state_dict(), {}
    g = torch.Generator().manual_seed(4)
    for name, key in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        # (the host also knows names of layers that no SDXL has)
        if name.startswith("lora_unet") and isinstance(key, str) and key in weights and weights[key].ndim > 1:
            out, *shape = weights[key].shape
            lora[f"{name}.lora_down.weight"] = 0.01 * torch.randn(rank, *shape, generator=g).to(weights[key].dtype)
            lora[f"{name}.lora_up.weight"] = torch.zeros(out, rank, *[1] * (len(shape) - 1), dtype=weights[key].dtype)
    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


def _guidance(
    model: Any, few: Any, positive: Any, negative: Any, vae: Any, pixels: int, rounds: int
) -> dict[str, float]:
    """Seconds of one evaluation of the UNet, and of one iteration of lookahead guidance with a plain loss.

    few: the model with a few-step LoRA.
    """
    import comfy.samplers
    import torch

    import nodes

    shortcut_node, sampler_node = (nodes.NODE_CLASS_MAPPINGS[f"Lookahead{n}"] for n in ("Shortcut", "GuidanceSampler"))
    loss_type = sys.modules[sampler_node.__module__].LookaheadLoss
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(1.0)
    latent, ends = pixels // 8, []
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time

    def loss(picture: Any, rows: Any) -> Any:
        _wait()
        ends.append(clock())
        return picture.square().mean(dim=(1, 2, 3)), torch.ones(len(picture), dtype=torch.bool, device=picture.device)

    def iteration(vae: Any, checkpointing: str, kind: str = "plain x0", backward: bool = True) -> list[float]:
        options = {"iterations": 4, "start": 0.0, "checkpointing": checkpointing, "loss": loss_type(loss)}
        options["backward"] = backward
        shortcut = shortcut_node.execute(few if kind == "one-step" else model, vae, kind).result[0]
        sampler = sampler_node.execute(comfy.samplers.sampler_object("euler"), shortcut, **options).result[0]
        noise = torch.randn(1, 4, latent, latent, generator=torch.Generator().manual_seed(2))
        sigmas = torch.tensor([14.6, 5.0])
        ends.clear()
        guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=2)
        return [b - a for a, b in zip(ends, ends[1:], strict=False)][1:-1]

    arms = {
        "evaluation": lambda: _step_times(guider, model, latent, 3)[1:],
        "iteration, UNet alone": lambda: iteration(_ColourVAE(), "never"),
        "iteration, UNet alone, checkpointed": lambda: iteration(_ColourVAE(), "always"),
        "iteration, UNet and few-step LoRA": lambda: iteration(_ColourVAE(), "never", "one-step"),
        "iteration, UNet and few-step LoRA, checkpointed": lambda: iteration(_ColourVAE(), "always", "one-step"),
        "iteration without backward, UNet alone": lambda: iteration(_ColourVAE(), "never", backward=False),
        "iteration without backward, UNet and few-step LoRA": lambda: iteration(
            _ColourVAE(), "never", "one-step", backward=False
        ),
    }
    if not isinstance(vae, _ColourVAE):  # a real decoder
        arms["iteration, UNet, few-step LoRA and decoder"] = lambda: iteration(vae, "never", "one-step")
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, arm in arms.items():
            found = arm()
            seconds[name] += found if turn else []
    return {name: statistics.median(values) for name, values in seconds.items()}


def _guidance_bytes(side: int = 1024) -> dict[str, int]:
    """What autograd keeps of SDXL and of TAESD at full size in 16 bit: counted on the meta device, nothing is computed.

    "kept": no block is computed twice; "checkpointed": all are; "largest": of a block while it is computed again.
    """
    import comfy.ops
    import comfy.taesd.taesd
    import torch
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    import nodes

    module = nodes.NODE_CLASS_MAPPINGS["LookaheadGuidanceSampler"].__module__
    gradient = sys.modules[module.rsplit(".", 1)[0] + ".autograd"]
    kinds = {"device": "meta", "dtype": torch.float16}

    class Attention(torch.autograd.Function):  # keeps what fused attention keeps
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
            out = torch.empty_like(q)
            ctx.save_for_backward(q, k, v, out)
            return out

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            q, k, v, _ = ctx.saved_tensors
            return tuple(torch.empty_like(t) if t.requires_grad else None for t in (q, k, v))

    def counted(network: Any, forward: Any, enabled: bool) -> tuple[int, Any]:
        kept: dict[int, int] = {}

        def count(tensor: Any) -> Any:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor.detach()

        checkpointing = gradient.Checkpointing(enabled=enabled)
        with gradient.differentiable([network], checkpointing):
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                out = forward()
            total = sum(kept.values())
            out.backward(torch.empty_like(out))
        return total, checkpointing

    with torch.inference_mode(False), torch.enable_grad():
        unet = UNetModel(**_sdxl_layout(), **kinds, operations=comfy.ops.manual_cast).requires_grad_(False)
        options = {"optimized_attention_override": lambda _, q, k, v, *args, **kwargs: Attention.apply(q, k, v)}
        tiny = comfy.taesd.taesd.TAESD().to(**kinds).requires_grad_(False)

        def predict() -> Any:
            x = torch.empty(1, 4, side // 8, side // 8, **kinds, requires_grad=True)
            text, adm = torch.empty(1, 77, 2048, **kinds), torch.empty(1, 2816, **kinds)
            t = torch.empty(1, device="meta")
            return unet(x, t, text, y=adm, transformer_options=dict(options))

        def decode() -> Any:
            return tiny.decode(torch.empty(1, 4, side // 8, side // 8, **kinds, requires_grad=True))

        found: dict[str, int] = {}
        for name, network, forward in (("UNet", unet, predict), ("TAESD", tiny, decode)):
            found[f"{name}, kept"] = counted(network, forward, False)[0]
            found[f"{name}, checkpointed"], checkpointing = counted(network, forward, True)
            found[f"{name}, largest"] = max(checkpointing.saved.values())
    return found


def _peak_memory() -> int:
    """Bytes: of the GPU where there is one, else the process's own."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _step_times(guider: Any, model: Any, latent: int, steps: int) -> list[float]:
    """Seconds of each model call in one run of so many calls."""
    import comfy.samplers
    import torch

    seconds: list[float] = []

    # On a CPU the time of the processor: what else the machine does is not in it.
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time

    def sampler(model_call, x, sigmas, extra_args=None, callback=None, disable=None):
        for sigma in sigmas[:-1]:
            _wait()
            start = clock()
            model_call(x, sigma.expand(len(x)), **extra_args)
            _wait()
            seconds.append(clock() - start)
        return x

    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
    noise = torch.randn(1, 4, latent, latent, generator=torch.Generator().manual_seed(2))
    guider.sample(noise, torch.zeros_like(noise), comfy.samplers.KSAMPLER(sampler), sigmas, disable_pbar=True, seed=2)
    return seconds


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _unets(kind: type) -> int:
    """How many UNets there are in this process."""
    import gc

    return sum(type(thing) is kind for thing in gc.get_objects())


if __name__ == "__main__":
    arguments, sys.argv = sys.argv, sys.argv[:1]  # the host reads the command line when it is imported
    main(*arguments[1:])

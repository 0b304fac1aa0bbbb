"""Run by `make bench` inside a ComfyUI tree: times model calls of one run beside each other and prints JSON.

python bench_in_host.py HOST_DIRECTORY BASE_DIRECTORY PACK_DIRECTORY EXTENSION_DIRECTORY
"""

from __future__ import annotations

import asyncio
import json
import runpy
import statistics
import sys
import time
from typing import Any

STEPS, ROUNDS = 6, 5


def main(host: str, base: str, pack: str, extensions: str) -> None:
    """Load the pack as the host does, then time every arm in turn, ROUNDS times."""
    sys.path.insert(0, host)
    sys.argv = sys.argv[:1]
    runpy.run_path(f"{extensions}/cpu_torchvision/prestartup_script.py")
    import torch
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    args.base_directory = base
    import comfy.samplers
    import folder_paths

    import nodes

    folder_paths.set_output_directory(f"{base}/output")
    for name in ("checkpoints", "clip_vision", "ipadapter", "lookahead"):
        folder_paths.add_model_folder_path(name, f"{base}/models/{name}", is_default=True)
    for folder in (f"{extensions}/mini_world", pack):
        if not asyncio.run(nodes.load_custom_node(folder, module_parent="custom_nodes")):
            raise SystemExit(f"{folder} could not be loaded as a custom node")

    def run(node: str, *arguments: Any, **options: Any) -> Any:
        return nodes.NODE_CLASS_MAPPINGS[node].execute(*arguments, **options).result[0]

    with torch.inference_mode():
        model, clip, vae = nodes.CheckpointLoaderSimple().load_checkpoint("sd_xl_base_1.0.safetensors")[:3]
        positive, negative = (nodes.CLIPTextEncode().encode(clip, text)[0] for text in ("a photo of a face", ""))
        face = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(1))

        def reference() -> Any:
            return run("LookaheadEncodeReference", image=face, vae=vae, clip=clip, size=128)

        def with_kv(reference: Any, cache_gb: float) -> Any:
            return run("LookaheadApplyKVInjection", model, reference, cache_gb=cache_gb)

        def cfg(model: Any) -> Any:
            guider = comfy.samplers.CFGGuider(model)
            guider.set_conds(positive, negative)
            guider.set_cfg(3.0)
            return guider

        def three(model: Any, kv: float = 2.0) -> Any:
            return run("LookaheadGuider", model, positive, negative, 3.0, 2.0, kv)

        kept = reference()
        replayed, cold = with_kv(kept, 2.0), with_kv(reference(), 0.0)
        arms = {
            "plain CFG": cfg(model),
            "CFG with KV, cold": cfg(cold),
            "CFG with KV, replayed": cfg(replayed),
            "guider, cold": three(cold),
            "guider, replayed": three(replayed),
            "guider, kv = 0, replayed": three(replayed, 0.0),
        }
        times: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(ROUNDS + 1):
            for name, guider in arms.items():
                seconds = _step_times(guider, model)
                if turn:  # the first round warms up, and fills the cache
                    times[name] += seconds
        subject = kept.subjects[0]
        entries = [rows for run_ in subject.cache.runs.values() for rows in run_.values()]
        sizes = {sum(t.nbytes for pairs in rows.values() for pair in pairs for t in pair) for rows in entries}
        injection = replayed.model_options["transformer_options"]["lookahead"]["kv_injections"][0]
        counted = injection.numbers_a_row() * model.model.get_dtype_inference().itemsize
        gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
        report = {
            "seconds": {name: statistics.median(values) for name, values in times.items()},
            "spread": {name: [min(values), max(values)] for name, values in times.items()},
            "kv_bytes": sorted(sizes),
            "kv_bytes_from_shapes": counted,
            "unets": _unets(type(model.model.diffusion_model)),
            "device": gpu or f"{torch.get_num_threads()} CPU thread(s)",
        }
    print("BENCH " + json.dumps(report))


def _step_times(guider: Any, model: Any) -> list[float]:
    """Seconds of each model call in one run of STEPS calls."""
    import comfy.samplers
    import torch

    seconds: list[float] = []

    def sampler(model_call, x, sigmas, extra_args=None, callback=None, disable=None):
        for sigma in sigmas[:-1]:
            _wait()
            start = time.perf_counter()
            model_call(x, sigma.expand(len(x)), **extra_args)
            _wait()
            seconds.append(time.perf_counter() - start)
        return x

    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
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
    main(*sys.argv[1:5])

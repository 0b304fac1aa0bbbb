"""Arms of image prompt and KV injection, drawn by the real host from the same references and noise."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...host.graph import Graph, Link
from ...host.server import link
from ...lookahead.files.tensors import read_tensors, write_tensors
from ...lookahead.method.layer_weights import EVEN
from ...tools.common import CACHE, ROOT, Stopwatch, say
from ..files.host_models import OF_CREATORS, mini_host
from ..plan import HERE, WEIGHTS
from ..world.references import reference_faces
from .study import CFG, SIZE, STYLES, complete, prompt_of, saved_pictures, to_image, without_words

SAMPLER, SCHEDULER, STEPS = "dpmpp_2m", "karras", 20
MEASURED_WITH = {"sampler": SAMPLER, "scheduler": SCHEDULER, "steps": STEPS}  # for the pages
NO_ADAIN, TO_REFERENCE, TO_PICTURE = "off", "picture to the reference", "reference to the picture"  # of the node
BATCH = 10  # references drawn at once, one a picture
STOCK = "ip-adapter-plus-face_sdxl_vit-h.safetensors"  # the encoder before any training of ours


@dataclass(frozen=True)
class ReferenceArm:
    """One way to draw a reference again.

    image_prompt, kv: weights, 0 is off; text, full, kv_scale: the scales of the Lookahead Guider; start, end: the part
    of the sampling in which KV acts, 0 to 1; layers: preset of the layers in which the image prompt acts; adain: what
    takes over whose statistics in KV injection; encoder: a file that `draw` is given, by its name there; zeros: the
    null text is zeros, else the encoding of an empty prompt.
    """

    image_prompt: float = 0.0
    kv: float = 0.0
    text: float = CFG
    full: float = 0.0
    kv_scale: float = 0.0
    start: float = 0.0
    end: float = 1.0
    blocks: str = "all"
    layers: str = EVEN
    adain: str = NO_ADAIN
    encoder: str = STOCK
    zeros: bool = False


# The paper's scales are 3, 2, 2 where SDXL's guidance is 5 (text + full); the mini world's is 3.
KV = ReferenceArm(kv=1.0, text=round(0.6 * CFG, 6), full=round(0.4 * CFG, 6), kv_scale=round(0.4 * CFG, 6))
BOTH = replace(KV, image_prompt=1.0)


def graph(references: list[str], seed: int, arms: dict[str, ReferenceArm], styles: tuple[str, ...]) -> Graph:
    """Every arm in every style, a picture a reference, all from the same noise (API format).

    SaveImage nodes are called "<arm> | <style>".
    """
    nodes = Graph()
    add = nodes.add
    base = add("base", "CheckpointLoaderSimple", ckpt_name="sd_xl_base_1.0.safetensors")
    clip: Link = ["base", 1]
    vae: Link = ["base", 2]
    vision = add("vision", "CLIPVisionLoader", clip_name="CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors")
    faces = nodes.pictures(references)
    read = {"clip_vision": vision, "image": faces, "vae": vae, "clip": clip, "size": SIZE, "several": "one per picture"}
    encoded = {}
    for file in dict.fromkeys(arm.encoder for arm in arms.values()):
        encoder = add(f"encoder {file}", "LookaheadLoadEncoder", encoder_name=file)
        encoded[file] = add(f"reference {file}", "LookaheadEncodeReference", encoder=encoder, **read)
    latent = add("latent", "EmptyLatentImage", width=SIZE, height=SIZE, batch_size=len(references))
    negative = null_text(nodes, clip)
    sampler = add("sampler", "KSamplerSelect", sampler_name=SAMPLER)
    noise = add("noise", "RandomNoise", noise_seed=seed)  # one for all, so that a reference's KV comes from the cache
    sigmas = add("sigmas", "BasicScheduler", model=base, scheduler=SCHEDULER, steps=STEPS, denoise=1.0)
    for name, arm in arms.items():
        model, reference = base, encoded[arm.encoder]
        window = {"start": arm.start, "end": arm.end}
        if arm.image_prompt:
            by_layer = {} if arm.layers == EVEN else {"weights": weights_by_layer(nodes, arm.layers)}
            model = add(
                f"{name} image prompt",
                "LookaheadApplyImagePrompt",
                model=model,
                reference=reference,
                weight=arm.image_prompt,
                start=0.0,
                end=1.0,
                **by_layer,
            )
        if arm.kv:
            settings = {"weight": arm.kv, "blocks": arm.blocks, "noise": "shared", "noise_seed": 0, "cache_gb": 2.0}
            settings["adain"] = arm.adain
            model = add(
                f"{name} KV", "LookaheadApplyKVInjection", model=model, reference=reference, **settings, **window
            )
        for style in styles:
            positive = add(f"{style} text", "CLIPTextEncode", clip=clip, text=prompt_of(style))
            scales = {"text": arm.text, "full": arm.full, "kv": arm.kv_scale}
            guider = add(
                f"{name} | {style} guider",
                "LookaheadGuider",
                model=model,
                positive=positive,
                negative=negative[arm.zeros],
                **scales,
            )
            drawn = add(
                f"{name} | {style} samples",
                "SamplerCustomAdvanced",
                noise=noise,
                guider=guider,
                sampler=sampler,
                sigmas=sigmas,
                latent_image=latent,
            )
            pixels = add(f"{name} | {style} decode", "VAEDecode", samples=drawn, vae=vae)
            add(f"{name} | {style}", "SaveImage", images=pixels, filename_prefix="evaluate/picture")
    return nodes


def weights_by_layer(nodes: Graph, preset: str) -> Link:
    """The node that lets a reference act in the layers of a preset, the same at all steps."""
    return nodes.add(f"weights {preset}", "LookaheadWeights", preset=preset, layers="", steps="")


def null_text(nodes: Graph, clip: Link) -> dict[bool, Link]:
    """The two null texts: False the encoding of an empty prompt, True zeros, also in the pooled output."""
    empty = nodes.add("negative", "CLIPTextEncode", clip=clip, text="")
    return {False: empty, True: nodes.add("zeros", "ConditioningZeroOut", conditioning=empty)}


def draw(
    references: int,
    arms: dict[str, ReferenceArm],
    styles: tuple[str, ...],
    encoders: dict[str, Path] | None = None,
    first: int = 0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """References [n, 3, 128, 128] and what the host drew, by arm: [n, styles, 3, 128, 128].

    encoders: encoder files that arms name; first: number of the first person.
    """
    faces = reference_faces(references, first=first)
    distinct = {arm: name for name, arm in reversed(arms.items())}  # a knob's usual value is that of every other knob
    drawn: dict[str, list[Tensor]] = {name: [] for name in distinct.values()}
    watch = Stopwatch()
    with mini_host() as host:
        for name, file in (encoders or {}).items():
            link(file, host.folder("models/lookahead") / name)
        for begin in range(0, references, BATCH):
            names = []
            for number in range(begin, min(begin + BATCH, references)):
                names.append(f"face-{number}.png")
                to_image(faces[number]).save(host.folder("input") / names[-1])
            chosen = {name: arms[name] for name in drawn}
            prompt = graph(names, seed=1000 * (first + begin), arms=chosen, styles=styles)
            result = host.run(prompt, timeout=7200).check()  # all arms, on a slow machine
            for name, pictures in drawn.items():
                of_style = [saved_pictures(host, result, f"{name} | {style}") for style in styles]
                pictures.append(torch.stack(of_style, 1))
            done = min(begin + BATCH, references)
            say(f"{done} of {references} references drawn in {watch.seconds:.0f} s")
    return faces, {name: torch.cat(drawn[distinct[arm]]) for name, arm in arms.items()}


class Kept(NamedTuple):
    """Pictures [n, 3, H, W] in [0, 1] of a graph, by SaveImage node, and the host's processor time for it."""

    pictures: dict[str, Tensor]
    seconds: float


def draw_kept(what: str, work: Sequence[tuple[Graph, Sequence[str]]], inputs: Mapping[str, Tensor]) -> list[Kept]:
    """Has the host draw graphs, one after the other. What was drawn before, in the same surroundings, is taken from the
    cache, so that a run that was stopped goes on.

    what: for the lines of progress; work: graphs (inputs that are not given take their defaults) and their SaveImage
    nodes; inputs: pictures [3, H, W] of the host's input folder by name, which must say who is on it.
    """
    around, folder = surroundings(), CACHE / "evaluated"
    keys = [hashlib.sha256(repr((around, of_creators(nodes), nodes)).encode()).hexdigest() for nodes, _ in work]
    places = [folder / f"{key[:24]}.safetensors" for key in keys]
    missing = [(place, *each) for place, each in zip(places, work, strict=True) if not place.exists()]
    say(f"{what}: {len(missing)} of {len(work)} graphs are to be drawn")
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        watch = Stopwatch()
        with mini_host() as host:
            for name, picture in inputs.items():
                to_image(picture).save(host.folder("input") / name)
            for done, (place, nodes, shown) in enumerate(missing, 1):
                before = host.processor_seconds()
                result = host.run(complete(nodes, host.object_info()), timeout=7200).check()
                drawn = {name: (saved_pictures(host, result, name) * 255).round().byte() for name in shown}
                write_tensors(place, drawn, {"seconds": repr(host.processor_seconds() - before)})
                say(f"{what}: {done} of {len(missing)} graphs drawn in {watch.seconds:.0f} s")
    stored = [read_tensors(place) for place in places]
    return [
        Kept({name: of_one.float() / 255 for name, of_one in pictures.items()}, float(said["seconds"]))
        for pictures, said in stored
    ]


def of_creators(nodes: Graph) -> list[str]:
    """The digests of those files of `mini/trained` that a graph names."""
    said = repr(nodes)
    files = (HERE / "trained" / file for name, file in OF_CREATORS.items() if Path(name).name in said)
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def surroundings() -> str:
    """All besides a study's graphs, the files that these name, and people that its pictures depend on: weights,
    settings, host and our sources."""
    files = [WEIGHTS / "manifest.json", Path(__file__), Path(__file__).with_name("study.py")]
    files += [ROOT / "mini/files/host_models.py"]
    files += [
        file
        for folder in ("lookahead", "nodes", "host", "mini/world")
        for file in sorted((ROOT / folder).rglob("*.py"))
    ]
    sources = [hashlib.sha256(_computed(file)).hexdigest() for file in files]
    return repr((sources, os.environ.get("COMFYUI_DIR"), os.environ.get("HOST_VERSION"), STYLES))


def _computed(file: Path) -> bytes:
    """A file as far as it computes: comments, docstrings and layout of a source draw nothing."""
    return without_words(file.read_text(encoding="utf-8")).encode() if file.suffix == ".py" else file.read_bytes()

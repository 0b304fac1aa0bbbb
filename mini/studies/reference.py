"""How well does each part keep who somebody is, and what does it cost the style? Measured in the real host.

`make evaluate` compares arms (nothing, image prompt, KV injection, both) over held-out drawn people; with
`ARGS="--knobs"` it turns one knob at a time, with `--guidance` or `--encoders` it is evaluate_guidance.py or
encoders.py. An evaluation recogniser, which took part in no training, compares each picture with all
references; a style scorer says which style it shows. Writes into docs/: evaluation.md, .json and .png, or knobs.md,
.json and two plots.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...host.client import Client, Result
from ...host.graph import Graph
from ...host.server import link
from ...tools.common import ROOT, Problem, Stopwatch, run_main, say
from ..files.host_models import mini_host

SAMPLER, SCHEDULER, STEPS, CFG = "dpmpp_2m", "karras", 20, 3.0
SIZE = 128  # of references and pictures: the mini world's
BATCH = 10  # references drawn at once, one a picture
STOCK = "ip-adapter-plus-face_sdxl_vit-h.safetensors"  # the encoder before any training of ours


@dataclass(frozen=True)
class Arm:
    """One way to draw. image_prompt, kv: weights, 0 is off; the scales are those of the Lookahead Guider; encoder: a
    file that `draw` is given, by its name there."""

    image_prompt: float = 0.0
    kv: float = 0.0
    text: float = CFG
    full: float = 0.0
    kv_scale: float = 0.0
    start: float = 0.0
    end: float = 1.0
    blocks: str = "all"
    encoder: str = STOCK


# The paper's scales are 3, 2, 2 where SDXL's guidance is 5 (text + full); the mini world's is 3.
_KV = Arm(kv=1.0, text=round(0.6 * CFG, 6), full=round(0.4 * CFG, 6), kv_scale=round(0.4 * CFG, 6))
_BOTH = replace(_KV, image_prompt=1.0)
ARMS = {
    "nothing": Arm(),
    "image prompt": Arm(image_prompt=1.0),
    "KV": _KV,
    "image prompt + KV": _BOTH,
}
KNOBS: dict[str, dict[float, Arm]] = {
    "image prompt weight": {w: replace(_BOTH, image_prompt=w) for w in (0.0, 0.25, 0.5, 0.75, 1.0)},
    "KV weight": {w: replace(_BOTH, kv=w) for w in (0.0, 0.25, 0.5, 0.75, 1.0)},
    "KV start": {s: replace(_BOTH, start=s) for s in (0.0, 0.2, 0.4, 0.6, 0.8)},
    "KV end": {e: replace(_BOTH, end=e) for e in (0.2, 0.4, 0.6, 0.8, 1.0)},
    "text": {s: replace(_BOTH, text=s) for s in (0.0, 1.0, 1.8, 3.0, 5.0)},
    "full": {s: replace(_BOTH, full=s) for s in (0.0, 0.6, 1.2, 2.4, 4.0)},
    "kv": {s: replace(_BOTH, kv_scale=s) for s in (0.0, 0.6, 1.2, 2.4, 4.0)},
}
STYLES = ("photo", "oil painting", "comic", "wanted poster")
KNOB_STYLES = ("photo", "comic")


def prompt_of(style: str) -> str:
    return f"{'an' if style[0] in 'aeiou' else 'a'} {style} of a face"


def graph(references: list[str], seed: int, arms: dict[str, Arm], styles: tuple[str, ...]) -> dict[str, Any]:
    """Every arm in every style, a picture a reference, all from the same noise (API format).

    SaveImage nodes are called "<arm> | <style>".
    """
    nodes = Graph()
    add = nodes.add
    base = add("base", "CheckpointLoaderSimple", ckpt_name="sd_xl_base_1.0.safetensors")
    clip, vae = ["base", 1], ["base", 2]
    vision = add("vision", "CLIPVisionLoader", clip_name="CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors")
    faces = nodes.pictures(references)
    read = {"clip_vision": vision, "image": faces, "vae": vae, "clip": clip, "size": SIZE, "several": "one per picture"}
    encoded = {}
    for file in dict.fromkeys(arm.encoder for arm in arms.values()):
        encoder = add(f"encoder {file}", "LookaheadLoadEncoder", encoder_name=file)
        encoded[file] = add(f"reference {file}", "LookaheadEncodeReference", encoder=encoder, **read)
    latent = add("latent", "EmptyLatentImage", width=SIZE, height=SIZE, batch_size=len(references))
    negative = add("negative", "CLIPTextEncode", clip=clip, text="")
    sampler = add("sampler", "KSamplerSelect", sampler_name=SAMPLER)
    noise = add("noise", "RandomNoise", noise_seed=seed)  # one for all, so that a reference's KV comes from the cache
    sigmas = add("sigmas", "BasicScheduler", model=base, scheduler=SCHEDULER, steps=STEPS, denoise=1.0)
    for name, arm in arms.items():
        model, reference = base, encoded[arm.encoder]
        window = {"start": arm.start, "end": arm.end}
        if arm.image_prompt:
            model = add(
                f"{name} image prompt",
                "LookaheadApplyImagePrompt",
                model=model,
                reference=reference,
                weight=arm.image_prompt,
                start=0.0,
                end=1.0,
            )
        if arm.kv:
            settings = {"weight": arm.kv, "blocks": arm.blocks, "noise": "shared", "noise_seed": 0, "cache_gb": 2.0}
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
                negative=negative,
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


def draw(
    references: int,
    arms: dict[str, Arm],
    styles: tuple[str, ...],
    encoders: dict[str, Path] | None = None,
    begin: int = 0,
) -> tuple[Any, dict[str, Any]]:
    """References [n, 3, 128, 128] and what the host drew, by arm: [n, styles, 3, 128, 128].

    encoders: encoder files that arms name; begin: number of the first person.
    """
    import torch

    from ..world.references import reference_faces

    faces = reference_faces(references, first=begin)
    distinct = {arm: name for name, arm in reversed(arms.items())}  # a knob's usual value is that of every other knob
    drawn: dict[str, list[Any]] = {name: [] for name in distinct.values()}
    watch = Stopwatch()
    with mini_host() as host:
        for name, file in (encoders or {}).items():
            link(file, host.folder("models/lookahead") / name)
        for first in range(0, references, BATCH):
            names = []
            for number in range(first, min(first + BATCH, references)):
                names.append(f"face-{number}.png")
                _save(faces[number], host.folder("input") / names[-1])
            chosen = {name: arms[name] for name in drawn}
            prompt = graph(names, seed=1000 * (begin + first), arms=chosen, styles=styles)
            result = host.run(prompt, timeout=7200).check()  # all arms, on a slow machine
            for name, pictures in drawn.items():
                of_style = [torch.stack(_pictures(host, result, f"{name} | {style}")) for style in styles]
                pictures.append(torch.stack(of_style, 1))
            done = min(first + BATCH, references)
            say(f"{done} of {references} references drawn in {watch.seconds:.0f} s")
    return faces, {name: torch.cat(drawn[distinct[arm]]) for name, arm in arms.items()}


def measure(faces: Any, drawn: dict[str, Any], styles: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """By arm, figures (`Interval`s over references) and the similarities (own, other) that they come from."""
    import torch

    from ...evaluation.stats import identity_auc, own_and_other, share
    from ..files.weights import evaluators
    from ..world.faces import STYLES as ALL_STYLES

    recogniser, scorer = evaluators()
    figures, similarities = {}, {}
    asked = torch.tensor([ALL_STYLES.index(s) for s in styles])
    everyone = torch.arange(len(faces))
    with torch.no_grad():
        known = recogniser.embed(faces)
        for arm, pictures in drawn.items():
            flat = pictures.flatten(0, 1)
            similarity = (recogniser.embed(flat) @ known.T).unflatten(0, pictures.shape[:2])
            hits = (scorer(flat)[0].argmax(1).unflatten(0, pictures.shape[:2]) == asked).float()
            own, other = own_and_other(similarity, everyone)
            figures[arm] = {
                "similarity to the own reference": share(similarity[everyone, :, everyone]),
                "identity AUC": identity_auc(similarity),
                "identity AUC, photo": identity_auc(similarity[:, :1]),
                "identity AUC, other styles": identity_auc(similarity[:, 1:]),
                "style accuracy": share(hits),
                **{f"style accuracy, {s}": share(hits[:, i]) for i, s in enumerate(styles)},
            }
            similarities[arm] = {"own": own, "other": other}
    return figures, similarities


def _how(references: int, styles: tuple[str, ...]) -> str:
    return (
        f"{references} held-out people x {len(styles)} styles, {STEPS} steps ({SAMPLER}, {SCHEDULER}), in the real\n"
        "ComfyUI; 95 % intervals by drawing references. Recogniser and style scorer took part in no other training,\n"
        "and were trained on other people than those shown. Every arm starts from the same noise."
    )


def page(figures: dict[str, Any], references: int) -> str:
    """docs/evaluation.md."""
    arms = list(figures)
    lines = [f"| {name} | " + " | ".join(str(figures[a][name]) for a in arms) + " |" for name in figures[arms[0]]]
    both = ARMS["image prompt + KV"]
    return f"""# What image prompt and KV injection do on the mini world

Written by `make evaluate`: {_how(references, STYLES)}

| | {" | ".join(arms)} |
|---|{"---|" * len(arms)}
{chr(10).join(lines)}

Weights are 1. Without KV the guidance is the usual one at {CFG:g}; with it the Lookahead Guider's scales are
{both.text:g}, {both.full:g}, {both.kv_scale:g}: the paper's 3, 2, 2 brought to this guidance. KV is without training
here (no KV encoder): what the model sees in the reference joins the picture as it is. Without both nothing ties a
picture to its reference, so the AUC there must be one half.

![Similarity to the own and to other references](evaluation.png)
"""


def knobs_page(figures: dict[str, Any], references: int) -> str:
    """docs/knobs.md."""
    rows = []
    for knob, settings in KNOBS.items():
        for value in settings:
            f = figures[f"{knob} {value:g}"]
            rows.append(f"| {knob} | {value:g} | {f['similarity to the own reference']} | {f['style accuracy']} |")
    usual = ", ".join(f"{knob} {v:g}" for knob, arms in KNOBS.items() for v, arm in arms.items() if arm == _BOTH)
    return f"""# Which knob does what

Written by `make evaluate ARGS=--knobs`: one knob is turned at a time, the others stay as they are here:
{usual}.
{_how(references, KNOB_STYLES)}

![Weights and windows](knobs_weights.png)

![The three scales of the guider](knobs_scales.png)

| knob | value | similarity to the own reference | style accuracy |
|---|---|---|---|
{chr(10).join(rows)}
"""


def histograms(similarities: dict[str, Any], path: Path) -> None:
    """How similarity to the own and to other references is distributed, a panel an arm."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(similarities), figsize=(3.4 * len(similarities), 2.6), sharey=True)
    for axis, (arm, values) in zip(axes, similarities.items(), strict=True):
        for name, colour in (("other", "0.6"), ("own", "tab:green")):
            axis.hist(values[name].numpy(), bins=40, range=(-1, 1), density=True, histtype="step", color=colour)
        axis.set(title=arm, xlabel="similarity", xlim=(-1, 1))
    axes[0].legend(["other references", "own reference"], loc="upper left", fontsize=7)
    axes[0].set_yticks([])
    _save_figure(figure, path)


def curves(figures: dict[str, Any], knobs: tuple[str, ...], path: Path) -> None:
    """Similarity to the own reference and style accuracy over the values of each knob, with 95 % intervals."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(knobs), figsize=(2.9 * len(knobs), 2.8), sharey=True)
    for axis, knob in zip(axes, knobs, strict=True):
        values = list(KNOBS[knob])
        for name, colour in (("similarity to the own reference", "tab:green"), ("style accuracy", "tab:blue")):
            points = [figures[f"{knob} {v:g}"][name] for v in values]
            axis.plot(values, [p.value for p in points], color=colour, marker="o", markersize=3, label=name)
            axis.fill_between(values, [p.low for p in points], [p.high for p in points], color=colour, alpha=0.2)
        axis.set(xlabel=knob, ylim=(-0.05, 1.05), xticks=values)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7, loc="lower left")
    _save_figure(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save_figure(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _save(picture: Any, path: Path) -> None:
    from PIL import Image

    Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy()).save(path)


def _pictures(host: Client, result: Result, node: str) -> list[Any]:
    import numpy as np
    import torch
    from PIL import Image

    def load(path: Path) -> Any:
        return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float() / 255

    images = result.outputs[node]["images"]
    return [load(host.folder("output") / image["subfolder"] / image["filename"]) for image in images]


def main(arguments: list[str]) -> int:
    """Entry point of `make evaluate`."""
    parser = argparse.ArgumentParser(prog="evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--references", type=int, help="people (100; with --knobs 20, --guidance, --encoders 96)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--knobs", action="store_true", help="turn one knob at a time")
    instead.add_argument("--guidance", action="store_true", help="lookahead guidance against plain x0 and none (96)")
    instead.add_argument(
        "--encoders",
        nargs="+",
        metavar="NAME=FILE[@WEIGHT]",
        help="trained encoders against what they began with (96)",
    )
    parser.add_argument("--first", type=int, default=0, help="with --encoders, number of the first of the people (0)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    chosen = parser.parse_args(arguments)
    references = chosen.references or (20 if chosen.knobs else 96 if chosen.guidance or chosen.encoders else 100)
    if references < 10:  # fewer make no interval, and a draw may hold one person alone
        raise Problem(f"--references is {references}, too few for figures with intervals: give at least 10.")
    if chosen.first and (chosen.first < 0 or not chosen.encoders):
        raise Problem(f"--first is {chosen.first}: give a number from 0, and only beside --encoders.")
    if chosen.guidance:
        from .guidance import evaluate

        return evaluate(references, chosen.out)
    if chosen.encoders:
        from . import encoders

        return encoders.evaluate(references, chosen.out, chosen.encoders, chosen.first)
    arms, styles = ARMS, STYLES
    if chosen.knobs:
        arms = {f"{knob} {value:g}": arm for knob, settings in KNOBS.items() for value, arm in settings.items()}
        styles = KNOB_STYLES
    faces, drawn = draw(references, arms, styles)
    figures, similarities = measure(faces, drawn, styles)
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.knobs:
        curves(figures, ("image prompt weight", "KV weight", "KV start", "KV end"), chosen.out / "knobs_weights.png")
        curves(figures, ("text", "full", "kv"), chosen.out / "knobs_scales.png")
        text = knobs_page(figures, references)
    else:
        histograms(similarities, chosen.out / "evaluation.png")
        text = page(figures, references)
    name = "knobs" if chosen.knobs else "evaluation"
    plain = {arm: {k: list(v) for k, v in f.items()} for arm, f in figures.items()}
    (chosen.out / f"{name}.json").write_text(json.dumps(plain, indent=1) + "\n")
    (chosen.out / f"{name}.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    run_main(main)

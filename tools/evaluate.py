"""How well does the image prompt keep who somebody is? Measured in the real host, over held-out drawn people.

For every reference and style the host draws two pictures from the same noise, with the image prompt and without. An
evaluation recogniser, which took part in no training, compares each picture with all references; a style scorer says
which style it shows. Writes docs/image_prompt.md, docs/image_prompt.png (distributions) and docs/image_prompt.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .common import ROOT, Problem, run_main, say
from .host import Host

STYLES = ("photo", "oil painting", "comic", "wanted poster")
SAMPLER, SCHEDULER, STEPS, CFG = "dpmpp_2m", "karras", 20, 3.0


def prompt_of(style: str) -> str:
    return f"{'an' if style[0] in 'aeiou' else 'a'} {style} of a face"


def graph(reference: str, seed: int, weight: float) -> dict[str, Any]:
    """One reference, every style, with and without the image prompt (API format, SaveImage nodes "<style> on|off")."""
    nodes: dict[str, Any] = {}

    def add(name: str, class_type: str, **inputs: Any) -> list[Any]:
        nodes[name] = {"class_type": class_type, "inputs": inputs}
        return [name, 0]

    model = add("base", "CheckpointLoaderSimple", ckpt_name="sd_xl_base_1.0.safetensors")
    clip, vae = ["base", 1], ["base", 2]
    encoder = add("encoder", "LookaheadLoadEncoder", encoder_name="ip-adapter-plus-face_sdxl_vit-h.safetensors")
    vision = add("vision", "CLIPVisionLoader", clip_name="CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors")
    image = add("image", "LoadImage", image=reference)
    read = {"encoder": encoder, "clip_vision": vision, "image": image, "size": 0, "several": "together"}
    encoded = add("reference", "LookaheadEncodeReference", **read)
    applied = add(
        "apply", "LookaheadApplyImagePrompt", model=model, reference=encoded, weight=weight, start=0.0, end=1.0
    )
    latent = add("latent", "EmptyLatentImage", width=128, height=128, batch_size=1)
    negative = add("negative", "CLIPTextEncode", clip=clip, text="")
    for number, style in enumerate(STYLES):
        positive = add(f"{style} text", "CLIPTextEncode", clip=clip, text=prompt_of(style))
        for which, source in (("on", applied), ("off", model)):
            samples = add(
                f"{style} {which} sampler",
                "KSampler",
                model=source,
                positive=positive,
                negative=negative,
                latent_image=latent,
                seed=seed + number,
                steps=STEPS,
                cfg=CFG,
                sampler_name=SAMPLER,
                scheduler=SCHEDULER,
                denoise=1.0,
            )
            pixels = add(f"{style} {which} decode", "VAEDecode", samples=samples, vae=vae)
            add(f"{style} {which}", "SaveImage", images=pixels, filename_prefix=f"evaluate/{style}-{which}")
    return nodes


def draw(references: int, weight: float) -> tuple[Any, dict[str, Any]]:
    """References [n, 3, 128, 128] and what the host drew, by "on" and "off": [n, styles, 3, 128, 128]."""
    import torch

    from ..trainer.mini.references import reference_faces

    faces = reference_faces(references)
    drawn: dict[str, list[Any]] = {"on": [], "off": []}
    with Host() as host:
        for r in range(references):
            _save(faces[r], host.folder("input") / f"face-{r}.png")
            result = host.run(graph(f"face-{r}.png", seed=1000 * r, weight=weight)).check()
            for which, pictures in drawn.items():
                files = [_image_of(host, result, f"{style} {which}") for style in STYLES]
                pictures.append(torch.stack([_load(path) for path in files]))
            if (r + 1) % 10 == 0:
                say(f"{r + 1} of {references} references drawn")
    return faces, {which: torch.stack(pictures) for which, pictures in drawn.items()}


def measure(faces: Any, drawn: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures (text, with 95 % intervals over references) and the similarities they come from."""
    import torch

    from ..trainer.evaluate import identity_auc, own_and_other, share
    from ..trainer.mini.faces import STYLES as ALL_STYLES
    from ..trainer.mini.weights import evaluators

    recogniser, scorer = evaluators()
    with torch.no_grad():
        known = recogniser.embed(faces)
        figures, similarities = {}, {}
        asked = torch.tensor([ALL_STYLES.index(s) for s in STYLES])
        for which, pictures in drawn.items():
            flat = pictures.flatten(0, 1)
            similarity = (recogniser.embed(flat) @ known.T).unflatten(0, pictures.shape[:2])
            hits = (scorer(flat)[0].argmax(1).unflatten(0, pictures.shape[:2]) == asked).float()
            everyone = torch.arange(len(faces))
            own, other = own_and_other(similarity, everyone)
            photo, styled = similarity[:, :1], similarity[:, 1:]
            figures[which] = {
                "similarity to the own reference": str(share(similarity[everyone, :, everyone])),
                "similarity to other references": f"{other.mean().item():.3f}",
                "identity AUC, all styles": str(identity_auc(similarity)),
                "identity AUC, photo": str(identity_auc(photo)),
                "identity AUC, other styles": str(identity_auc(styled)),
                "style accuracy": str(share(hits)),
                **{f"style accuracy, {s}": str(share(hits[:, i])) for i, s in enumerate(STYLES)},
            }
            similarities[which] = {"own": own, "other": other}
    return figures, similarities


def page(figures: dict[str, Any], references: int, weight: float) -> str:
    """docs/image_prompt.md."""
    rows = "\n".join(f"| {name} | {figures['on'][name]} | {figures['off'][name]} |" for name in figures["on"])
    return f"""# What the image prompt does on the mini world

Written by `make evaluate`: {references} held-out people x {len(STYLES)} styles, weight {weight}, {STEPS} steps
({SAMPLER}, {SCHEDULER}), CFG {CFG}, in the real ComfyUI; 95 % intervals by drawing references. Recogniser and style
scorer took part in no other training, and were trained on other people than those shown.

| | image prompt on | off |
|---|---|---|
{rows}

Without the image prompt nothing ties a picture to its reference, so the AUC there must be one half.

![Similarity to the own and to other references](image_prompt.png)
"""


def histogram(similarities: dict[str, Any], path: Path) -> None:
    """Two panels, on and off: how similarity to the own (green) and to other references (grey) is distributed."""
    import torch
    from PIL import Image, ImageDraw

    width, height, bins = 460, 240, 40
    sheet = Image.new("RGB", (2 * width, height + 50), "white")
    pen = ImageDraw.Draw(sheet)
    for panel, (which, values) in enumerate(similarities.items()):
        left = panel * width + 20
        span = width - 40
        pen.text(
            (left, 6), f"image prompt {which}: similarity to own (green) and other (grey) references", fill="black"
        )
        for name, colour in (("other", (170, 170, 170)), ("own", (30, 140, 70))):
            counts = torch.histc(values[name].float(), bins, -1, 1)
            share = counts / counts.sum()
            points = [
                (left + span * (b + 0.5) / bins, 30 + height * (1 - min(1.0, share[b].item() / 0.14)))
                for b in range(bins)
            ]
            pen.line(points, fill=colour, width=3)
        pen.line([(left, height + 30), (left + span, height + 30)], fill="black")
        for tick in (-1, -0.5, 0, 0.5, 1):
            pen.text((left + span * (tick + 1) / 2 - 8, height + 34), str(tick), fill="black")
    sheet.save(path)


def _save(picture: Any, path: Path) -> None:
    from PIL import Image

    Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy()).save(path)


def _load(path: Path) -> Any:
    import numpy as np
    import torch
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float() / 255


def _image_of(host: Host, result: Any, node: str) -> Path:
    image = result.outputs[node]["images"][0]
    return host.folder("output") / image["subfolder"] / image["filename"]


def main(arguments: list[str]) -> int:
    """Entry point of `make evaluate`."""
    parser = argparse.ArgumentParser(prog="evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--references", type=int, default=60)
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    chosen = parser.parse_args(arguments)
    if chosen.references < 10:  # fewer make no interval, and a draw may hold one person alone
        raise Problem(f"--references is {chosen.references}, too few for figures with intervals: give at least 10.")
    faces, drawn = draw(chosen.references, chosen.weight)
    figures, similarities = measure(faces, drawn)
    chosen.out.mkdir(parents=True, exist_ok=True)
    histogram(similarities, chosen.out / "image_prompt.png")
    (chosen.out / "image_prompt.json").write_text(json.dumps(figures, indent=1) + "\n")
    text = page(figures, chosen.references, chosen.weight)
    (chosen.out / "image_prompt.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    run_main(main)

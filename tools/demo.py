"""`make demo`: reference faces, drawn again under new prompts by a real ComfyUI with the pack's nodes.

Everything is real but the size: the workflow file names the public SDXL files, and the mini world's weights stand
under these names. The references are drawn people whom nothing was trained on; the similarity under each picture is
that of a recogniser that took part in no training.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from . import workflow
from .common import ROOT, Problem, Stopwatch, run_main, say
from .contact_sheet import Cell, contact_sheet
from .host import Host, Progress

WORKFLOW = ROOT / "workflows" / "image_prompt_and_kv.json"
PROMPTS = (
    "a photo of a face on a beach",
    "an oil painting of a face",
    "a comic of a face in the snow",
    "a wanted poster of a face",
    "a pencil drawing of a face",
)
ARMS = {"image prompt": (0.6, 0.0), "KV injection": (0.0, 1.0), "both": (0.6, 1.0)}  # weights of either node
REFERENCES = ("Reference face", "Reference look", "Reference layout")  # titles of the workflows' LoadImage nodes
# What the mini world is at its best with; the workflow has what SDXL is (where 3, 2, 2 make a guidance of 5, not 3).
SIZE, STEPS, SCALES = 128, 20, {"text": 1.8, "full": 1.2, "kv": 1.2}


def draw_references(people: int) -> list[Image.Image]:
    """Frontal photos of people whom the mini world has never seen."""
    import torch

    from ..trainer.mini.references import reference_faces

    torch.set_num_threads(1)
    pixels = (reference_faces(people, size=256) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in pixels]


def similarity_to(reference: Image.Image) -> Callable[[Image.Image], float]:
    """A function that says how much a picture shows the person of the reference: from -1 to 1."""
    import numpy as np
    import torch

    from ..trainer.mini.weights import evaluators

    recogniser, _ = evaluators()

    @torch.no_grad()
    def embed(picture: Image.Image) -> torch.Tensor:
        pixels = np.asarray(picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))
        return recogniser.embed(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255)

    wanted = embed(reference)
    return lambda picture: float((wanted * embed(picture)).sum())


def at_mini_size(api: workflow.Api, reference: str, seed: int) -> workflow.Api:
    """A shared workflow for the mini world: its sizes, this reference file and seed, and LPIPS without its weights."""
    values = {
        "EmptyLatentImage": {"width": SIZE, "height": SIZE},
        "LookaheadEncodeReference": {"size": SIZE},
        "LookaheadLPIPSLoss": {"weights": "random", "backbone": "squeeze"},
        "RandomNoise": {"noise_seed": seed},
        "KSampler": {"seed": seed},
        "LookaheadPreviewGrid": {"seed": seed},
        **{title: {"image": reference} for title in REFERENCES},
    }
    for node, inputs in values.items():
        if workflow.find(api, node):
            api = workflow.override(api, node, **inputs)
    return api


def prompt_for(
    api: workflow.Api, reference: str, text: str, seed: int, image_prompt: float = 1.0, kv: float = 1.0
) -> workflow.Api:
    """The demo's run: the workflow with this reference file and text, as the mini world is at its best."""
    api = at_mini_size(api, reference, seed)
    api = workflow.override(api, "BasicScheduler", steps=STEPS)
    api = workflow.override(api, "LookaheadGuider", **SCALES)
    api = workflow.override(api, "Prompt", text=text)
    api = workflow.override(api, "LookaheadApplyKVInjection", weight=kv)
    return workflow.override(api, "LookaheadApplyImagePrompt", weight=image_prompt)


def bar(done: int, total: int, watch: Stopwatch) -> Callable[[Progress], None]:
    """A line of progress, rewritten in place on a terminal."""

    def show(step: Progress) -> None:
        if os.isatty(2):
            text = f"\r  picture {done + 1} of {total}, step {step.value}/{step.maximum}, {watch.seconds:.0f} s "
            os.write(2, text.encode())

    return show


def show_demo(references: list[Image.Image], prompts: tuple[str, ...], out: Path, seed: int, port: int | None) -> Path:
    """Make the pictures and the contact sheet in `out`; returns the sheet's path."""
    out.mkdir(parents=True, exist_ok=True)
    runs = [(n, arm) for n in range(len(references)) for arm in ARMS]
    total = (len(runs) + 1) * len(prompts)
    rows: list[list[Cell]] = []
    with Host(port=port) as host:
        api = workflow.convert(WORKFLOW, host.object_info())
        for number, picture in enumerate(references):
            picture.save(host.folder("input") / f"reference_{number + 1}.png")
            shutil.copy(host.folder("input") / f"reference_{number + 1}.png", out)
        watch, done = Stopwatch(), 0
        say(f"Drawing {total} pictures ...")
        for number, arm in [*runs, (None, "off")]:
            name = "without" if number is None else f"reference_{number + 1}_{arm.replace(' ', '_')}"
            row = [Cell(Image.new("RGB", (SIZE, SIZE), (225, 225, 222)), "no reference")]
            likeness = None
            if number is not None:
                likeness = similarity_to(references[number])
                row = [Cell(references[number], f"reference {number + 1}: {arm}")]
            weights = ARMS.get(arm, (0.0, 0.0))
            for column, text in enumerate(prompts):
                run = prompt_for(api, f"reference_{(number or 0) + 1}.png", text, seed, *weights)
                result = host.run(run, bar(done, total, watch)).check()
                if not result.images:
                    raise Problem(f"{WORKFLOW.name} ran but saved no picture: does it still end in a SaveImage node?")
                path = out / f"{name}_prompt_{column + 1}.png"
                shutil.copy(result.images[0], path)
                print(path)
                with Image.open(path) as drawn:
                    drawn.load()
                row.append(Cell(drawn, "" if likeness is None else f"identity {likeness(drawn):+.2f}"))
                done += 1
            rows.append(row)
        say(f"{total} pictures in {watch.seconds:.0f} s")
    path = out / "contact_sheet.png"
    title = "LCM-Lookahead: image prompt, KV injection (without training), and both"
    contact_sheet(["reference", *(f"“{p}”" for p in prompts)], rows, title).save(path)
    return path


def main(arguments: list[str]) -> int:
    """Entry point of `make demo`."""
    parser = argparse.ArgumentParser(prog="make demo", description="Draws reference faces under new prompts.")
    parser.add_argument("--people", type=int, default=2)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--port", type=int, default=os.environ.get("PORT") or 0)
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "demo")
    parser.add_argument("prompts", nargs="*", help="prompts instead of the usual ones")
    chosen = parser.parse_args(arguments)
    if chosen.people < 1:
        raise Problem(f"--people is {chosen.people}: the demo needs at least 1 reference.")
    watch = Stopwatch()
    references = draw_references(chosen.people)
    sheet = show_demo(references, tuple(chosen.prompts) or PROMPTS, chosen.out, chosen.seed, chosen.port or None)
    say(f"The pictures are in {chosen.out} ({watch.seconds:.0f} s); all in one, with the similarity to the reference:")
    print(sheet)
    return 0


if __name__ == "__main__":
    run_main(main)

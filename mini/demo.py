"""`make demo`: a real ComfyUI with the pack's nodes draws reference faces again under new prompts, and steers pictures.

Everything is real but the size: the workflow files name the public SDXL files, and the mini world's weights stand
under these names. The references are drawn people whom nothing was trained on; the number under each picture is
that of a network or formula that took part in no training and no steering.

    make demo                 two people under three prompts, and each loss with and without lookahead guidance
    make demo ARGS=--all      all five prompts, and guidance by x0 too
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..evaluation.contact_sheet import Cell, contact_sheet
from ..host import workflow
from ..host.client import Progress
from ..host.server import Host
from ..tools.common import ROOT, Problem, Stopwatch, run_main, say
from .files.host_models import TRAINED, mini_host

WORKFLOW = ROOT / "workflows" / "image_prompt_and_kv.json"
PROMPTS = (
    "a photo of a face on a beach",
    "an oil painting of a face",
    "a comic of a face in the snow",
    "a wanted poster of a face",
    "a pencil drawing of a face",
)
FEWER_PROMPTS = PROMPTS[:3]  # without --all
STOCK = "ip-adapter-plus-face_sdxl_vit-h.safetensors"  # what training began with


@dataclass(frozen=True)
class ReferenceWeights:
    """What conditions a row of the sheet on its reference: weights of either node, and the encoder file."""

    image_prompt: float
    kv: float
    encoder: str = Path(TRAINED).name


ARMS = {
    "before training": ReferenceWeights(1.0, 1.0, STOCK),
    "image prompt": ReferenceWeights(1.0, 0.0),
    "image prompt and KV": ReferenceWeights(1.0, 1.0),
}
NOTHING = ReferenceWeights(0.0, 0.0)
REFERENCES = ("Reference face", "Reference look", "Reference layout")  # titles of the workflows' LoadImage nodes
# What the mini world is at its best with; the workflow has what SDXL is (where 3, 2, 2 make a guidance of 5, not 3).
SIZE, STEPS, CFG, SCALES = 128, 20, 3.0, {"text": 1.8, "full": 1.2, "kv": 1.2}


@dataclass(frozen=True)
class Steering:
    """A guided workflow of the demo.

    loss: what it is steered by, in words; style, person: of its reference; measure: tells how alike a picture is to it.
    """

    workflow: str
    loss: str
    style: str
    person: int
    measure: Callable[[Image.Image, str], Callable[[Image.Image], str]]


def draw_references(people: int, first: int = 0, style: str = "photo") -> list[Image.Image]:
    """Frontal pictures of people whom the mini world has never seen."""
    import torch

    from .world.references import reference_faces

    torch.set_num_threads(1)
    faces = reference_faces(people, size=256, first=first, style=style)
    pixels = (faces * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in pixels]


def pixels_of(picture: Image.Image):
    """A picture as tensor [1, 3, SIZE, SIZE] in [0, 1]."""
    import numpy as np
    import torch

    small = picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)[None].float() / 255


def similarity_to(reference: Image.Image) -> Callable[[Image.Image], float]:
    """A function that says how much a picture shows the person of the reference: from -1 to 1."""
    import torch

    from .files.weights import evaluators

    recogniser, _ = evaluators()

    @torch.no_grad()
    def embed(picture: Image.Image) -> torch.Tensor:
        return recogniser.embed(pixels_of(picture))

    wanted = embed(reference)
    return lambda picture: float((wanted * embed(picture)).sum())


def identity_to(reference: Image.Image, _: str) -> Callable[[Image.Image], str]:
    """The similarity of a picture to the reference, in words."""
    likeness = similarity_to(reference)
    return lambda picture: f"identity {likeness(picture):+.2f}"


def chance_of(_: Image.Image, style: str) -> Callable[[Image.Image], str]:
    """How sure a scorer of styles is that a picture has this one, in words."""
    import torch

    from .files.weights import evaluators
    from .world.faces import STYLES

    _, scorer = evaluators()

    @torch.no_grad()
    def said(picture: Image.Image) -> str:
        return f"{style} {scorer(pixels_of(picture))[0].softmax(1)[0, STYLES.index(style)]:.2f}"

    return said


def structure_of(reference: Image.Image, _: str) -> Callable[[Image.Image], str]:
    """The structural similarity of a picture to the reference, in words."""
    from ..lookahead.vision.image_metrics import structural_similarity

    wanted = pixels_of(reference)
    return lambda picture: f"ssim {structural_similarity(wanted, pixels_of(picture)).item():.2f}"


STEERED = (
    Steering("lookahead_identity", "identity", "photo", 0, identity_to),
    Steering("lookahead_style", "CLIP", "comic", 1, chance_of),
    Steering("lookahead_layout", "LPIPS, random weights", "photo", 1, structure_of),
)
#: How each column of that sheet is drawn: inputs of the sampler, kind of the shortcut
GUIDED: dict[str, tuple[dict[str, int], str]] = {
    "no guidance": ({"iterations": 0}, "one-step"),
    "guided by x0": ({}, "plain x0"),
    "guided by lookahead": ({}, "one-step"),
}
FEWER_GUIDED = ("no guidance", "guided by lookahead")  # without --all


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


def prompt_for(api: workflow.Api, reference: str, text: str, seed: int, arm: ReferenceWeights) -> workflow.Api:
    """The demo's run: the workflow with this reference file and text, as the mini world is at its best."""
    api = at_mini_size(api, reference, seed)
    api = workflow.override(api, "BasicScheduler", steps=STEPS)
    api = workflow.override(api, "LookaheadGuider", **SCALES)
    api = workflow.override(api, "Prompt", text=text)
    api = workflow.override(api, "LookaheadLoadEncoder", encoder_name=arm.encoder)
    api = workflow.override(api, "LookaheadApplyKVInjection", weight=arm.kv)
    return workflow.override(api, "LookaheadApplyImagePrompt", weight=arm.image_prompt)


def steered_prompt(api: workflow.Api, reference: str, seed: int, guided: str) -> workflow.Api:
    """The demo's run of a guided workflow, with the prompt, loss and settings that stand in its file."""
    sampler, kind = GUIDED[guided]
    api = workflow.override(at_mini_size(api, reference, seed), "BasicScheduler", steps=STEPS)
    api = workflow.override(api, "CFGGuider", cfg=CFG)
    api = workflow.override(api, "LookaheadShortcut", kind=kind)
    return workflow.override(api, "LookaheadGuidanceSampler", **sampler) if sampler else api


class Parts(dict[str, float]):
    """Seconds by part of a run, in the order in which the parts began."""

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of a block to a part."""
        watch = Stopwatch()
        self.setdefault(part, 0.0)
        try:
            yield
        finally:
            self[part] += watch.seconds

    def __str__(self) -> str:
        return ", ".join(f"{part} {seconds:.0f} s" for part, seconds in self.items())


def bar(row: int, rows: int, watch: Stopwatch) -> Callable[[Progress], None]:
    """A line of progress, rewritten in place on a terminal."""

    def show(step: Progress) -> None:
        if os.isatty(2):
            os.write(
                2, f"\r  row {row + 1} of {rows}, step {step.value}/{step.maximum}, {watch.seconds:.0f} s ".encode()
            )

    return show


def drawn_row(
    host: Host, runs: Sequence[workflow.Api], paths: Sequence[Path], progress: Callable[[Progress], None]
) -> list[Image.Image]:
    """Run workflows as one graph, so that models, references and their KV are shared; copy each picture to its path."""
    merged, ids = workflow.merge(runs)
    outputs = host.run(merged, progress).check().outputs
    pictures = []
    for api, path, places in zip(runs, paths, ids, strict=True):
        saved = [image for node in workflow.find(api, "SaveImage") for image in outputs[places[node]]["images"]]
        if not saved:
            raise Problem(f"the run for {path.name} saved no picture: does the workflow still end in a SaveImage node?")
        shutil.copy(host.folder("output") / saved[0]["subfolder"] / saved[0]["filename"], path)
        print(path)
        with Image.open(path) as drawn:
            drawn.load()
        pictures.append(drawn)
    return pictures


def show_demo(host: Host, references: list[Image.Image], prompts: tuple[str, ...], out: Path, seed: int) -> Path:
    """Draw every reference under every prompt, before training and after it; returns the path of the sheet in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    arms = [*((n, arm) for n in range(len(references)) for arm in ARMS), (None, "off")]
    rows: list[list[Cell]] = []
    api = workflow.convert(WORKFLOW, host.object_info())
    for number, picture in enumerate(references):
        picture.save(host.folder("input") / f"reference_{number + 1}.png")
        shutil.copy(host.folder("input") / f"reference_{number + 1}.png", out)
    watch = Stopwatch()
    say(f"Drawing {len(arms) * len(prompts)} pictures ...")
    for number, arm in arms:
        name = "without" if number is None else f"reference_{number + 1}_{arm.replace(' ', '_')}"
        file = f"reference_{(number or 0) + 1}.png"
        runs = [prompt_for(api, file, text, seed, ARMS.get(arm, NOTHING)) for text in prompts]
        paths = [out / f"{name}_prompt_{column + 1}.png" for column in range(len(prompts))]
        drawn = drawn_row(host, runs, paths, bar(len(rows), len(arms), watch))
        if number is None:
            blank = Cell(Image.new("RGB", (SIZE, SIZE), (225, 225, 222)), "no reference")
            rows.append([blank, *(Cell(picture, "") for picture in drawn)])
        else:
            likeness = similarity_to(references[number])
            cells = [Cell(picture, f"identity {likeness(picture):+.2f}") for picture in drawn]
            rows.append([Cell(references[number], f"reference {number + 1}: {arm}"), *cells])
    path = out / "contact_sheet.png"
    title = "LCM-Lookahead: image prompt and KV injection before training; the trained image prompt; both trained"
    contact_sheet(["reference", *(f"“{p}”" for p in prompts)], rows, title).save(path)
    return path


def show_guidance(host: Host, out: Path, seed: int, columns: Sequence[str] = tuple(GUIDED)) -> Path:
    """Draw with each loss in the ways that `columns` names of GUIDED; returns the path of the sheet in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    watch = Stopwatch()
    rows: list[list[Cell]] = []
    say(f"Steering {len(STEERED) * len(columns)} pictures ...")
    for steering in STEERED:
        api = workflow.convert(ROOT / "workflows" / f"{steering.workflow}.json", host.object_info())
        name = f"{steering.workflow}_reference.png"
        (reference,) = draw_references(1, first=steering.person, style=steering.style)
        reference.save(host.folder("input") / name)
        reference.save(out / name)
        runs = [steered_prompt(api, name, seed, guided) for guided in columns]
        paths = [out / f"{steering.workflow}_{guided.replace(' ', '_')}.png" for guided in columns]
        drawn = drawn_row(host, runs, paths, bar(len(rows), len(STEERED), watch))
        measure = steering.measure(reference, steering.style)
        cells = [Cell(picture, measure(picture)) for picture in drawn]
        rows.append([Cell(reference, f"loss: {steering.loss}"), *cells])
    path = out / "guidance_sheet.png"
    contact_sheet(["reference", *columns], rows, "LCM-Lookahead: steered while they are drawn").save(path)
    return path


def main(arguments: list[str]) -> int:
    """Entry point of `make demo`."""
    parser = argparse.ArgumentParser(
        prog="make demo", description="Draws reference faces under new prompts, and steers pictures by losses."
    )
    parser.add_argument("--all", action="store_true", help="all five prompts, and guidance by x0 beside lookahead")
    parser.add_argument("--people", type=int, default=2, help="number of references, 1 or more (default: 2)")
    parser.add_argument("--seed", type=int, default=5, help="of the noise, the same in every picture (default: 5)")
    parser.add_argument(
        "--port", type=int, default=os.environ.get("PORT") or 0, help="of ComfyUI (default: a free port)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "demo", help="folder of the pictures")
    parser.add_argument("prompts", nargs="*", help="prompts instead of the usual ones")
    chosen = parser.parse_args(arguments)
    if chosen.people < 1:
        raise Problem(f"--people is {chosen.people}: the demo needs at least 1 reference.")
    prompts = tuple(chosen.prompts) or (PROMPTS if chosen.all else FEWER_PROMPTS)
    watch, parts = Stopwatch(), Parts()
    with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        drawing = pool.submit(draw_references, chosen.people)  # while ComfyUI starts, on another core
        with parts.timed("start of ComfyUI"):
            host = stack.enter_context(mini_host(port=chosen.port or None))
        with parts.timed("references"):
            references = drawing.result()
        with parts.timed("image prompt and KV injection"):
            sheet = show_demo(host, references, prompts, chosen.out, chosen.seed)
        with parts.timed("guidance"):
            columns = tuple(GUIDED) if chosen.all else FEWER_GUIDED
            guidance = show_guidance(host, chosen.out, chosen.seed, columns)
    say(f"{watch.seconds:.0f} s: {parts}.")
    say(f"The pictures are in {chosen.out}; all on two sheets, with their likeness below:")
    print(sheet, guidance, sep="\n")
    return 0


if __name__ == "__main__":
    run_main(main)

"""`make demo`: a real ComfyUI with the pack's nodes draws reference faces again under new prompts, and steers pictures.

Everything is real but the size: the workflow files name the public SDXL files, and the mini world's weights stand
under these names. The references are drawn people whom nothing was trained on; the number under each picture is
that of a network or formula that took part in no training and no steering.

    make demo                 two people under two prompts by the trained encoder, lookahead guidance by one loss, and
                              a concept of a thing that was made of one picture
    make demo ARGS=--all      all prompts, the untrained adapter and the image prompt alone too, all losses, guidance by
                              x0 beside lookahead, and concepts of two things and a person, tuned and untuned
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from ..evaluation.contact_sheet import Cell, contact_sheet
from ..host import workflow
from ..host.client import Progress
from ..host.server import Host
from ..tools.common import ROOT, Problem, Stopwatch, run_main, say
from .files.host_models import THINGS, THINGS_VISION, TRAINED, mini_host

WORKFLOW = ROOT / "workflows" / "02 Face with more of its look (KV).json"
PROMPTS = (
    "a photo of a face on a beach",
    "an oil painting of a face",
    "a comic of a face in the snow",
    "a wanted poster of a face",
    "a pencil drawing of a face",
)
STOCK = "ip-adapter-plus-face_sdxl_vit-h.safetensors"  # what training began with


@dataclass(frozen=True)
class ReferenceWeights:
    """A row of the sheet is conditioned on its reference by these: weights of either node, and the encoder file."""

    title: str
    image_prompt: float
    kv: float
    encoder: str = Path(TRAINED).name


ARMS = {
    "before training": ReferenceWeights("image prompt and KV injection before training", 1.0, 1.0, STOCK),
    "image prompt": ReferenceWeights("the trained image prompt", 1.0, 0.0),
    "image prompt and KV": ReferenceWeights("both trained", 1.0, 1.0),
}
NOTHING = ReferenceWeights("no reference", 0.0, 0.0)
REFERENCES = (  # titles of the workflows' LoadImage nodes
    *("Reference face", "Reference look", "Reference layout", "Group photo", "One picture of the thing"),
    *("Person on the left", "Person on the right", "Photo 1", "Photo 2", "Photo 3"),
    *("Person in the middle", "First person", "Second person"),
)
PROMPTS_OF_PLACES = ("Prompt, left", "Prompt, middle", "Prompt, right")
# What the mini world is at its best with; the workflow has what SDXL is (where 3, 2, 2 make a guidance of 5, not 3).
SIZE, STEPS, CFG, SCALES = 128, 20, 3.0, {"text": 1.8, "full": 1.2, "kv": 1.2}


@dataclass(frozen=True)
class Steering:
    """A guided workflow of the demo.

    workflow: its file; name: of the pictures; loss: what it is steered by, in words; text: a prompt that the mini world
    knows; style, person: of its reference; measure: tells how alike a picture is to it.
    """

    workflow: str
    name: str
    loss: str
    text: str
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
    """Says in words how sure a scorer of styles is that a picture has this one."""
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
    Steering(
        "08 Look ahead for likeness (identity)",
        "lookahead_identity",
        "identity",
        "a photo of a face on a beach",
        *("photo", 0, identity_to),
    ),
    Steering("09 Look ahead for a look (CLIP)", "lookahead_style", "CLIP", "a face on a beach", "comic", 1, chance_of),
    Steering(
        "10 Look ahead for a layout (LPIPS and L1)",
        "lookahead_layout",
        "LPIPS, random weights",
        "a photo of a face",
        *("photo", 1, structure_of),
    ),
)
#: How each column of that sheet is drawn: inputs of the sampler other than in its file, kind of the shortcut
GUIDED: dict[str, tuple[dict[str, str], str]] = {
    "no guidance": ({"preset": "off"}, "one-step"),
    "guided by x0": ({}, "plain x0"),
    "guided by lookahead": ({}, "one-step"),
}


CONCEPT_WORKFLOW = ROOT / "workflows" / "22 Anything from one picture (concept).json"
FILE_WORKFLOW = ROOT / "workflows" / "23 A concept from a file, at two blends.json"
CONCEPT_PROMPTS = ("a comic of a S* in the snow", "an oil painting of a S* on a beach")
#: Columns of the sheet of concepts: steps of tuning, strength of the concept, its blend (-1 is what it was tuned with)
TUNED = {"its word instead": (0, 0.0, 0.0), "foretold": (0, 1.0, -1.0), "after 12 steps": (12, 1.0, -1.0)}
#: The column of the concept that the mini world ships, an umbrella tuned before: tuning takes most of a minute
FROM_FILE = "after 12 steps, from its file"
SHOWN_SEED = 29  # of the things, which are in no training
#: Rows of it: what is shown -> the kind of thing, or none for a person
SHOWN = {"an umbrella, a kind that no encoder saw": "umbrella", "a fish": "fish", "a person": None}


@dataclass(frozen=True)
class Extent:
    """It says how much is drawn: columns and rows of the sheets of references, of guidance and of concepts."""

    prompts: tuple[str, ...] = PROMPTS
    arms: tuple[str, ...] = tuple(ARMS)
    guided: tuple[str, ...] = tuple(GUIDED)
    steered: tuple[Steering, ...] = STEERED
    concept_prompts: tuple[str, ...] = CONCEPT_PROMPTS
    tuned: tuple[str, ...] = tuple(TUNED)
    shown: tuple[str, ...] = tuple(SHOWN)


ALL = Extent()
# Less than a minute with the start of ComfyUI: a guided picture takes ten times as long as another, and a picture with
# KV injection twice as long as one without.
SOME = Extent(
    PROMPTS[:2],
    ("image prompt and KV",),
    ("no guidance", "guided by lookahead"),
    STEERED[:1],
    CONCEPT_PROMPTS,
    (FROM_FILE,),
    tuple(SHOWN)[:1],
)


def at_mini_size(api: workflow.Api, reference: str, seed: int, text: str = "a photo of a face") -> workflow.Api:
    """A shared workflow for the mini world: its sizes, a prompt in its words, this reference file and seed, and LPIPS
    alone and without its weights."""
    values = {
        **{title: {"text": text} for title in ("Prompt", *PROMPTS_OF_PLACES)},
        "EmptyLatentImage": {"width": SIZE, "height": SIZE},
        "ImageScale": {"width": SIZE, "height": SIZE},
        "LookaheadCombineLosses": {"weight_b": 0},
        "LookaheadEncodeReference": {"size": SIZE},
        "LookaheadLPIPSLoss": {"weights": "random", "backbone": "squeeze"},
        "RandomNoise": {"noise_seed": seed},
        "KSampler": {"seed": seed},
        "LookaheadPreviewGrid": {"seed": seed},
        **{title: {"image": reference} for title in REFERENCES},
        "LookaheadEncodeConceptPrompt": {"text": "a comic of a S* on a beach"},
    }
    if workflow.find(api, "LookaheadEncodeConceptPrompt"):
        values["CheckpointLoaderSimple"] = {"ckpt_name": Path(THINGS).name}  # the base that knows things
        values["CLIPVisionLoader"] = {"clip_name": Path(THINGS_VISION).name}
    for node, inputs in values.items():
        if workflow.find(api, node):
            api = workflow.override(api, node, **inputs)
    return api


def prompt_for(api: workflow.Api, reference: str, text: str, seed: int, arm: ReferenceWeights) -> workflow.Api:
    """The demo's run: the workflow with this reference file and text, as the mini world is at its best."""
    api = at_mini_size(api, reference, seed, text)
    api = workflow.override(api, "BasicScheduler", steps=STEPS)
    api = workflow.override(api, "LookaheadGuider", **SCALES)
    api = workflow.override(api, "LookaheadLoadEncoder", encoder_name=arm.encoder)
    api = workflow.override(api, "LookaheadApplyKVInjection", weight=arm.kv)  # until the end that the node begins with
    return workflow.override(api, "LookaheadApplyImagePrompt", weight=arm.image_prompt)


def steered_prompt(api: workflow.Api, reference: str, text: str, seed: int, guided: str) -> workflow.Api:
    """The demo's run of a guided workflow, with the loss and settings that stand in its file."""
    sampler, kind = GUIDED[guided]
    api = workflow.override(at_mini_size(api, reference, seed, text), "BasicScheduler", steps=STEPS)
    api = workflow.override(api, "CFGGuider", cfg=CFG)
    api = workflow.override(api, "LookaheadShortcut", kind=kind)
    return workflow.override(api, "LookaheadGuidanceSampler", **sampler)


def concept_prompt(api: workflow.Api, reference: str, text: str, seed: int, tuned: str) -> workflow.Api:
    """The demo's run of the workflow of a concept: this picture, and how far it is tuned."""
    steps, strength, blend = TUNED[tuned]
    api = workflow.override(at_mini_size(api, reference, seed), "KSampler", steps=STEPS, cfg=CFG)
    api = workflow.override(api, "LookaheadEncodeConceptPrompt", text=text)
    api = workflow.override(api, "LookaheadTuneConcept", steps=steps)
    return workflow.override(api, "LookaheadApplyConcept", strength=strength, blend=blend)


def file_prompt(api: workflow.Api, text: str, seed: int) -> workflow.Api:
    """The demo's run of the workflow of a concept's file: the concept as it was tuned, without the other blend."""
    api = workflow.override(at_mini_size(api, "", seed), "KSampler", steps=STEPS, cfg=CFG)
    api = workflow.override(api, "LookaheadEncodeConceptPrompt", text=text)
    api = workflow.override(api, "LookaheadApplyConcept", blend=-1.0)
    (saving,), decoded = workflow.find(api, "SaveImage"), workflow.find(api, "VAEDecode")
    api[saving]["inputs"]["images"] = [decoded[-1], 0]
    return api


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


def show_demo(host: Host, references: list[Image.Image], extent: Extent, out: Path, seed: int) -> Path:
    """Draw every reference under every prompt by every arm, and without; returns the path of the sheet in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    prompts = extent.prompts
    arms = [*((n, arm) for n in range(len(references)) for arm in extent.arms), (None, "off")]
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
    title = f"LCM-Lookahead: {'; '.join(ARMS[arm].title for arm in extent.arms)}"
    contact_sheet(["reference", *(f"“{p}”" for p in prompts)], rows, title).save(path)
    return path


def show_guidance(host: Host, extent: Extent, out: Path, seed: int) -> Path:
    """Draw with each loss, guided in each way; returns the path of the sheet in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    columns = extent.guided
    watch = Stopwatch()
    rows: list[list[Cell]] = []
    say(f"Steering {len(extent.steered) * len(columns)} pictures ...")
    for steering in extent.steered:
        api = workflow.convert(ROOT / "workflows" / f"{steering.workflow}.json", host.object_info())
        name = f"{steering.name}_reference.png"
        (reference,) = draw_references(1, first=steering.person, style=steering.style)
        reference.save(host.folder("input") / name)
        reference.save(out / name)
        runs = [steered_prompt(api, name, steering.text, seed, guided) for guided in columns]
        paths = [out / f"{steering.name}_{guided.replace(' ', '_')}.png" for guided in columns]
        drawn = drawn_row(host, runs, paths, bar(len(rows), len(extent.steered), watch))
        measure = steering.measure(reference, steering.style)
        cells = [Cell(picture, measure(picture)) for picture in drawn]
        rows.append([Cell(reference, f"loss: {steering.loss}"), *cells])
    path = out / "guidance_sheet.png"
    contact_sheet(["reference", *columns], rows, "LCM-Lookahead: steered while they are drawn").save(path)
    return path


def draw_thing(kind: str | None) -> tuple[Image.Image, Callable[[Image.Image], float]]:
    """A picture of one thing (or a person, for None) that nothing was trained on, and what says how alike another is:
    from -1 to 1, by the judge of its kind."""
    import torch

    from .files.derived import stage_or_shipped
    from .files.weights import THINGS_JUDGE, thing_judge
    from .world import things
    from .world.references import concept_things

    if kind is None:
        (picture,) = draw_references(1, first=7)
        return picture, similarity_to(picture)
    kinds = torch.tensor([things.CLASSES.index(kind)])
    pixels = things.render(concept_things(1, SHOWN_SEED, kinds), 2 * SIZE, seed=SHOWN_SEED)[0]
    picture = Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())
    judge = thing_judge(stage_or_shipped("things_judge", THINGS_JUDGE))

    @torch.no_grad()
    def embed(shown: Image.Image) -> torch.Tensor:
        return judge.embed(pixels_of(shown))

    wanted = embed(picture)
    return picture, lambda shown: float((wanted * embed(shown)).sum())


def show_concepts(host: Host, extent: Extent, out: Path, seed: int) -> Path:
    """Draw what one picture shows under each prompt, tuned as far as said; returns the path of the sheet in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    watch = Stopwatch()
    rows: list[list[Cell]] = []
    columns = [(text, tuned) for text in extent.concept_prompts for tuned in extent.tuned]
    say(f"Drawing {len(extent.shown) * len(columns)} pictures of what one picture shows ...")
    info = host.object_info()
    api, of_file = (workflow.convert(path, info) for path in (CONCEPT_WORKFLOW, FILE_WORKFLOW))
    for shown in extent.shown:
        picture, likeness = draw_thing(SHOWN[shown])
        name = f"concept_{SHOWN[shown] or 'person'}"
        picture.save(host.folder("input") / f"{name}.png")
        picture.save(out / f"{name}.png")
        runs = [
            file_prompt(of_file, text, seed)
            if tuned == FROM_FILE
            else concept_prompt(api, f"{name}.png", text, seed, tuned)
            for text, tuned in columns
        ]
        paths = [out / f"{name}_{column + 1}.png" for column in range(len(columns))]
        drawn = drawn_row(host, runs, paths, bar(len(rows), len(extent.shown), watch))
        cells = [Cell(one, f"likeness {likeness(one):+.2f}") for one in drawn]
        rows.append([Cell(picture, shown), *cells])
    path = out / "concept_sheet.png"
    titles = [f"“{text}”, {tuned}" for text, tuned in columns]
    contact_sheet(["the one picture", *titles], rows, "DATE: anything from one picture").save(path)
    return path


def main(arguments: list[str]) -> int:
    """Entry point of `make demo`."""
    parser = argparse.ArgumentParser(
        prog="make demo", description="Draws reference faces under new prompts, and steers pictures by losses."
    )
    parser.add_argument("--all", action="store_true", help="all prompts, arms and losses, not a part of them")
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
    extent = ALL if chosen.all else SOME
    extent = replace(extent, prompts=tuple(chosen.prompts) or extent.prompts)
    watch, parts = Stopwatch(), Parts()
    with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        drawing = pool.submit(draw_references, chosen.people)  # while ComfyUI starts, on another core
        with parts.timed("start of ComfyUI"):
            host = stack.enter_context(mini_host(port=chosen.port or None))
        with parts.timed("references"):
            references = drawing.result()
        with parts.timed("image prompt and KV injection"):
            sheet = show_demo(host, references, extent, chosen.out, chosen.seed)
        with parts.timed("guidance"):
            guidance = show_guidance(host, extent, chosen.out, chosen.seed)
        with parts.timed("concepts"):
            concepts = show_concepts(host, extent, chosen.out, chosen.seed)
    say(f"{watch.seconds:.0f} s: {parts}.")
    say(f"The pictures are in {chosen.out}; all on three sheets, with their likeness below:")
    print(sheet, guidance, concepts, sep="\n")
    return 0


if __name__ == "__main__":
    run_main(main)

"""The example pictures that the workflows name, and the thumbnails of the page's list of templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..host import workflow
from ..host.client import Client
from ..mini import demo
from ..mini.files.host_models import TRAINED, mini_host
from ..mini.world import things
from ..mini.world.data import SEEDS
from ..mini.world.faces import STYLES, Faces, frontal, render, sample_identities, sample_nuisance
from ..mini.world.references import concept_things
from .common import ROOT, say

INPUT = ROOT / "workflows" / "input"  # what `nodes/examples.py` copies into the host's input folder
SIDE = 512  # of an example picture
THING_SEED = 29  # of the example thing, which is in no training


def person(number: int, style: str = "photo", still: bool = True, seed: int = 0) -> Faces:
    """Held-out person `number`, as `reference_faces` draws them; seed: of another photo, where not still."""
    numbers = torch.Generator().manual_seed(SEEDS["held_out"])
    drawn = torch.full((1,), STYLES.index(style))
    for _ in range(number + 1):
        identity, nuisance = sample_identities(1, numbers), sample_nuisance(1, numbers, style=drawn)
    if not still:
        nuisance = sample_nuisance(1, torch.Generator().manual_seed(seed), style=drawn)
        nuisance["scale"] = torch.full_like(nuisance["scale"], 1.1)
    return Faces(identity, frontal(nuisance) if still else nuisance)


def thing() -> Tensor:
    """A thing of a kind that no concept encoder of the mini world was trained on, [3, SIDE, SIDE] in [0, 1]."""
    shown = concept_things(1, THING_SEED, torch.tensor([things.CLASSES.index("umbrella")]))
    return things.render(shown, SIDE, seed=THING_SEED)[0]


def as_picture(pixels: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] -> a picture."""
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())


def examples() -> dict[str, Image.Image]:
    """The example pictures by file name: drawn people, who exist nowhere."""
    drawn = {
        "face_1": person(0),
        "face_1b": person(0, still=False, seed=3),
        "face_1c": person(0, still=False, seed=8),
        "face_2": person(1),
        "look": person(3, "comic"),
        "face_3": person(5),
    }
    pictures = {name: as_picture(render(who, SIDE, seed=number)[0]) for number, (name, who) in enumerate(drawn.items())}
    group = [as_picture(render(person(number), 384, seed=number)[0]) for number in (0, 5, 9)]
    pictures["group"] = Image.new("RGB", (3 * 384, 384))
    for place, one in enumerate(group):
        pictures["group"].paste(one, (384 * place, 0))
    pictures["thing"] = as_picture(thing())
    scene = as_picture(render(person(9), SIDE, seed=9)[0])
    mask = Image.new("L", scene.size, 255)
    ImageDraw.Draw(mask).ellipse((150, 30, 362, 470), fill=0)  # transparent: what Load Image gives as a mask
    scene.putalpha(mask)
    pictures["scene"] = scene
    return {
        f"lookahead_{name}.{'jpg' if picture.mode == 'RGB' else 'webp'}": picture for name, picture in pictures.items()
    }


def draw_examples(folder: Path = INPUT) -> None:
    """Write the example pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in examples().items():
        picture.save(folder / name, quality=90)
        say(f"{folder.relative_to(ROOT)}/{name} is drawn")


# -- thumbnails: the reference in a corner of the result


CARD = 400  # side of a thumbnail in pixels


def card(result: Image.Image, references: list[Image.Image]) -> Image.Image:
    """A result as large as a card of the page's list, and the references it was drawn from in its corners."""
    side = min(result.size)
    wide = result.width > 1.5 * result.height
    shown = Image.new("RGB", (CARD, CARD), (24, 24, 26))
    if wide:
        result = result.resize((CARD, round(result.height * CARD / result.width)), Image.Resampling.LANCZOS)
        shown.paste(result, (0, (CARD - result.height) // 3))
    else:
        left, top = (result.width - side) // 2, (result.height - side) // 2
        square = result.crop((left, top, left + side, top + side))
        shown.paste(square.resize((CARD, CARD), Image.Resampling.LANCZOS))
    inset = 124 if len(references) < 3 else 100
    for place, reference in enumerate(references):
        small = reference.convert("RGB")
        small.thumbnail((inset if small.width <= small.height else 2 * inset, inset), Image.Resampling.LANCZOS)
        framed = Image.new("RGB", (small.width + 8, small.height + 8), "white")
        framed.paste(small, (4, 4))
        x = (
            10
            if place == 0
            else CARD - framed.width - 10
            if place == len(references) - 1
            else (CARD - framed.width) // 2
        )
        shown.paste(framed, (x, CARD - framed.height - 10))
    return shown


#: What a workflow's thumbnail is drawn of: pictures of `workflows/input`, and the prompt in the mini world's words
#: (from left to right, where each person has its own).
CARDS: dict[str, tuple[tuple[str, ...], str]] = {
    "01": (("face_1.jpg",), "an oil painting of a face"),
    "02": (("face_1.jpg",), "a comic of a face in the snow"),
    "03": (("face_1.jpg",), "a photo of a face on a beach"),
    "04": (("face_1.jpg", "face_2.jpg"), "a photo of a face"),
    "05": (("group.jpg",), "a photo of a face on a beach"),
    "06": (("face_1.jpg", "face_1b.jpg", "face_1c.jpg"), "a pencil drawing of a face"),
    "07": (("face_1.jpg", "face_2.jpg"), "a photo of a face on a beach"),
    "08": (("face_1.jpg",), "a photo of a face on a beach"),
    "09": (("look.jpg",), "a face on a beach"),
    "10": (("face_2.jpg",), "a photo of a face"),
    "11": ((), "a photo of a face"),
    "12": (("face_1.jpg",), "an oil painting of a face"),
    "16": (("face_1.jpg", "face_2.jpg"), "a photo of a face"),
    "18": (("face_1.jpg", "face_2.jpg"), "a photo of a face"),
    "19": (("face_1.jpg",), "an oil painting of a face"),
    "20": (("face_1.jpg", "face_2.jpg"), "a photo of a face; a comic of a face"),
    "21": (
        ("face_1.jpg", "face_3.jpg", "face_2.jpg"),
        "a pencil drawing of a face; a photo of a face; a comic of a face",
    ),
    "22": (("thing.jpg",), "a comic of a S* in the snow"),
    "23": (("thing.jpg",), "a comic of a S* in a city"),
    "24": (("face_1.jpg",), "a wanted poster of a face"),
    "13": (("face_1.jpg", "scene.webp"), "a photo of a face in the snow"),
}


WORDS = {
    "14": ("model_ckpt.pt", "IP-Adapter Plus", "becomes", "my_encoder"),
    "15": ("a person", "becomes", "my_character"),
    "17": ("IP-Adapter", "FaceID Plus v2", "SDXL"),
}


#: Of the mini world's pictures, where several people stand beside each other.
WIDTHS = {"04": 256, "18": 256, "20": 256, "21": 384}

#: Of the noise, where it is not the usual one: guidance spoils an eye of the mini world's small faces with most.
NOISES = {"18": 11, "24": 7}


def draw_card(host: Client, path: Path) -> None:
    """Run a workflow with the mini weights, and write its thumbnail, and its app's."""
    names, text = CARDS[path.name[:2]]
    api = workflow.convert(path, host.object_info())
    pictures = {number: api[number]["inputs"]["image"] for number in workflow.find(api, "LoadImage")}
    seed = NOISES.get(path.name[:2], 5)
    api = demo.at_mini_size(api, "lookahead_face_1.jpg", seed, text)
    for number, file in pictures.items():
        api[number]["inputs"]["image"] = file  # each its own
    settings: dict[str, dict[str, Any]] = {
        "LookaheadLoadEncoder": {"encoder_name": Path(TRAINED).name},
        "KSampler": {"steps": demo.STEPS, "cfg": demo.CFG},
        "CFGGuider": {"cfg": demo.CFG},
        "LookaheadPreviewGrid": {"steps": demo.STEPS, "cfg": demo.CFG},
        "LookaheadEncodeConceptPrompt": {"text": text},
    }
    if path.name[:2] in WIDTHS:
        settings["EmptyLatentImage"] = {"width": WIDTHS[path.name[:2]]}
    titles = [title for title in demo.PROMPTS_OF_PLACES if workflow.find(api, title)]
    settings |= {title: {"text": one} for title, one in zip(titles, text.split("; "), strict=bool(titles))}
    if not workflow.find(api, "ControlNetLoader"):  # that one is set for its few-step LoRA
        settings |= {"BasicScheduler": {"steps": demo.STEPS}, "LookaheadGuider": demo.SCALES}
    for node, inputs in settings.items():
        if workflow.find(api, node):
            api = workflow.override(api, node, **inputs)
    result = host.run(api).check()
    (drawn,) = [one for one in result.images if one.is_relative_to(host.folder("output"))]
    thumbnail = card(Image.open(drawn).convert("RGB"), [Image.open(INPUT / f"lookahead_{name}") for name in names])
    for file in (path, path.with_suffix(".app.json")):
        if file.is_file():
            thumbnail.save(file.with_suffix(".jpg"), quality=88, optimize=True)
    say(f"{path.stem}.jpg: {result.seconds:.0f} s")


def words(*lines: str) -> Image.Image:
    """A card of words, for what draws no picture."""
    shown = Image.new("RGB", (CARD, CARD), (34, 34, 51))
    pen = ImageDraw.Draw(shown)
    for place, line in enumerate(lines):
        middle = (CARD / 2, CARD * (place + 1) / (len(lines) + 1))
        pen.text(middle, line, "white", ImageFont.load_default(28), anchor="mm")
    return shown


def draw_all(part: str) -> None:
    """Draw the example pictures (where no part of a name is given) and the thumbnails of the workflows that hold it."""
    if not part:
        draw_examples()
    for number, lines in WORDS.items():
        (path,) = (ROOT / "workflows").glob(f"{number}*.json")
        words(*lines).save(path.with_suffix(".jpg"), quality=90)
    with mini_host() as host:
        for path in sorted((ROOT / "workflows").glob("*.json")):
            if path.name[:2] in CARDS and not path.name.endswith(".app.json") and part.lower() in path.name.lower():
                draw_card(host, path)

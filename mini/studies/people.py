"""Does guidance bring two people into one picture, each to their own face? Measured in the real host.

Of each pair one person is drawn on the left and one on the right, by an image prompt under a mask each. In every other
batch the loss is told of them in the other order, as an artist may connect them: matching by likeness must not care,
taking the faces from left to right steers them to each other. The judge is a recogniser that took part in no loss; it
looks at either half. Writes people.md, .json and .jpg; what was drawn before is taken from the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...evaluation.stats import Intervals, proportion, share
from ...host.graph import Graph
from ...lookahead.method.guidance_presets import BALANCED
from ..files.weights import evaluators
from ..world.references import reference_faces
from .drawing import MEASURED_WITH, SAMPLER, SCHEDULER, STEPS, STOCK, draw_kept
from .study import CFG, SIZE, Table, prompt_of, render, to_image, write_page

BATCH = 4  # pairs drawn at once
WEIGHT = 0.6  # of the image prompts, as in the guided workflows
STYLE = "photo"
OWN, WEAKER, OTHER = "similarity to the own person", "that of the less alike of the two", "similarity to the other"
SWAPPED = "share of pairs that are swapped"
ORDERS = ("connected from left to right", "connected from right to left")


@dataclass(frozen=True)
class PeopleArm:
    """It says how pictures are guided: the loss's matching ("" for no guidance), and whether it has masks."""

    matching: str = ""
    masks: bool = False


NONE, MATCHED, ORDER, MASKS = "unguided", "matched by likeness", "from left to right", "by masks"
ARMS = {
    NONE: PeopleArm(),
    MATCHED: PeopleArm("by likeness"),
    ORDER: PeopleArm("from left to right"),
    MASKS: PeopleArm("by likeness", masks=True),
}


def graph(left: list[str], right: list[str], batch: int, arms: dict[str, PeopleArm]) -> Graph:
    """Every arm with one batch of pairs, all from the same noise (API format); SaveImage nodes are the arms."""
    nodes = Graph()
    add = nodes.add
    base = add("base", "CheckpointLoaderSimple", ckpt_name="sd_xl_base_1.0.safetensors")
    clip, vae = ["base", 1], ["base", 2]
    lcm = add("LCM", "LoraLoaderModelOnly", model=base, lora_name="lcm-lora-sdxl.safetensors", strength_model=1.0)
    vision = add("vision", "CLIPVisionLoader", clip_name="CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors")
    encoder = add("encoder", "LookaheadLoadEncoder", encoder_name=STOCK)
    add("places", "LookaheadPlaceMasks", people=2)
    text = add("text", "CLIPTextEncode", clip=clip, text=prompt_of(STYLE))
    negative = add("negative", "CLIPTextEncode", clip=clip, text="")
    model, people, masks, halves = base, [], [], []
    for number, files in enumerate((left, right)):
        people.append(nodes.pictures(files))
        masks.append(["places", number])
        reference = add(
            f"reference {number}",
            "LookaheadEncodeReference",
            encoder=encoder,
            clip_vision=vision,
            image=people[-1],
            size=SIZE,
            several="one per picture",
        )
        model = add(
            f"prompt {number}",
            "LookaheadApplyImagePrompt",
            model=model,
            reference=reference,
            mask=masks[-1],
            weight=WEIGHT,
            start=0.0,
            end=1.0,
        )
        half = {"conditioning": text, "mask": masks[-1], "strength": 1.0, "set_cond_area": "mask bounds"}
        halves.append(add(f"half {number}", "ConditioningSetMask", **half))
    positive = add("both", "ConditioningCombine", conditioning_1=halves[0], conditioning_2=halves[1])
    guider = add("guider", "CFGGuider", model=model, positive=positive, negative=negative, cfg=CFG)
    latent = add("latent", "EmptyLatentImage", width=2 * SIZE, height=SIZE, batch_size=len(left))
    plain = add("sampler", "KSamplerSelect", sampler_name=SAMPLER)
    noise = add("noise", "RandomNoise", noise_seed=1000 * batch)
    sigmas = add("sigmas", "BasicScheduler", model=base, scheduler=SCHEDULER, steps=STEPS, denoise=1.0)
    faces = add("faces", "LookaheadLoadFaceAnalysis", pack_name="buffalo_l", device="cpu")
    shortcut = add("shortcut", "LookaheadShortcut", model=lcm, vae=vae, kind="one-step")
    first, second = (1, 0) if crossed(batch) else (0, 1)
    for name, arm in arms.items():
        sampler = plain
        if arm.matching:
            loss = add(
                f"{name} loss",
                "LookaheadPeopleLoss",
                face_analysis=faces,
                person_1=people[first],
                person_2=people[second],
                matching=arm.matching,
                several="one per picture",
                **({"mask_1": masks[first], "mask_2": masks[second]} if arm.masks else {}),
            )
            guided = {"sampler": plain, "shortcut": shortcut, "loss": loss, "preset": BALANCED}
            sampler = add(f"{name} guidance", "LookaheadGuidanceSampler", **guided)
        drawn = add(
            f"{name} samples",
            "SamplerCustomAdvanced",
            noise=noise,
            guider=guider,
            sampler=sampler,
            sigmas=sigmas,
            latent_image=latent,
        )
        add(name, "SaveImage", images=add(f"{name} decode", "VAEDecode", samples=drawn, vae=vae), filename_prefix="two")
    return nodes


def crossed(batch: int) -> bool:
    """Says whether the loss has the person on the right as its first."""
    return batch % 2 == 1


def draw(pairs: int, first: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """References [pairs, 2, 3, 128, 128], left and right, and by arm what was drawn of them, [pairs, 3, 128, 256]."""
    references = reference_faces(2 * pairs, first=first).unflatten(0, (pairs, 2))
    work = []
    for begin in range(0, pairs, BATCH):
        numbers = range(begin, min(begin + BATCH, pairs))
        left, right = ([f"face-{first}-{number}-{side}.png" for number in numbers] for side in range(2))
        work.append((graph(left, right, begin // BATCH, ARMS), tuple(ARMS)))
    inputs = {
        f"face-{first}-{number}-{side}.png": face
        for number, pair in enumerate(references)
        for side, face in enumerate(pair)
    }
    drawn = draw_kept("people", work, inputs)
    return references, {name: torch.cat([one.pictures[name] for one in drawn]) for name in ARMS}


def similarities(references: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
    """Measures by arm how similar each half is to both people of its pair: [pairs, halves, people], by the judge."""
    recogniser, _ = evaluators()
    with torch.no_grad():
        people = recogniser.embed(references.flatten(0, 1)).unflatten(0, references.shape[:2])
        halves = {arm: torch.stack(pictures.chunk(2, -1), 1) for arm, pictures in drawn.items()}
        seen = {arm: recogniser.embed(both.flatten(0, 1)).unflatten(0, both.shape[:2]) for arm, both in halves.items()}
    return {arm: of_arm @ people.transpose(1, 2) for arm, of_arm in seen.items()}


def scores(similarity: Tensor) -> dict[str, Tensor]:
    """Counts what is measured of each pair [n], from similarities [n, halves, people]."""
    own, other = similarity.diagonal(dim1=1, dim2=2), similarity.flip(2).diagonal(dim1=1, dim2=2)
    swapped = (other.sum(1) > own.sum(1)).float()
    return {OWN: own.mean(1), WEAKER: own.amin(1), OTHER: other.mean(1), SWAPPED: swapped}


def table(found: dict[str, Tensor]) -> Table:
    """Figures by arm with intervals over pairs; gains over the unguided, and matching over none, pair by pair."""
    values = {arm: scores(similarity) for arm, similarity in found.items()}
    order = torch.tensor([crossed(pair // BATCH) for pair in range(len(found[NONE]))]).long()
    rows: Table = {}
    for arm, of_arm in values.items():
        figures: Intervals = {name: share(v[:, None]) for name, v in of_arm.items() if name != SWAPPED}
        figures[SWAPPED] = proportion(of_arm[SWAPPED] > 0)
        for baseline, name in ((NONE, "gain"), (ORDER, "gain over left to right")):
            if arm not in (NONE, baseline):
                for measure in (OWN, WEAKER, OTHER):
                    figures[f"{measure}, {name}"] = share((of_arm[measure] - values[baseline][measure])[:, None])
        for number, which in enumerate(ORDERS):
            if (order == number).any():
                figures[f"{OWN}, {which}"] = share(of_arm[OWN][order == number][:, None])
                figures[f"{SWAPPED}, {which}"] = proportion(of_arm[SWAPPED][order == number] > 0)
        rows[arm] = figures
    return rows


def page(rows: Table, pairs: int, first: int = 0) -> str:
    """docs/people.md. first: number of the first of the people."""
    names = dict.fromkeys(name for of_arm in rows.values() for name in of_arm)
    return render(
        "people.md.jinja",
        rows=rows,
        names=names,
        pairs=pairs,
        first=first,
        cfg=CFG,
        weight=WEIGHT,
        style=STYLE,
        preset=BALANCED,
        **MEASURED_WITH,
    )


def sheet(references: Tensor, drawn: dict[str, Tensor], path: Path, columns: int = 6) -> None:
    """The references, then a row an arm; the pairs are spread over all batches."""
    chosen = torch.linspace(0, len(references) - 1, min(columns, len(references))).long()
    shown = [torch.cat(list(pair), 2) for pair in references[chosen]]
    rows = [torch.cat(shown, 2), *(torch.cat(list(pictures[chosen]), 2) for pictures in drawn.values())]
    to_image(torch.cat(rows, 1)).save(path, quality=88)


def evaluate(pairs: int, out: Path, first: int = 0) -> None:
    """Draw, measure and write: people.md, .json and .jpg, into `out`."""
    references, drawn = draw(pairs, first)
    rows = table(similarities(references, drawn))
    out.mkdir(parents=True, exist_ok=True)
    sheet(references, drawn, out / "people.jpg")
    write_page(out, "people", rows, page(rows, pairs, first))

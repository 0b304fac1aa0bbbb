"""What a build reports of itself, on held-out people, prompts and seeds: autoencoder, judges, base, image prompt.

Every function reads the stages' results from `folder`, returns a `Measurement` and draws pictures into `folder/report`.
Figures over people have bootstrap intervals (people are drawn); shares among samples, each with a noise of its own,
have Wilson's, which stay honest where all samples are right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from ...evaluation.stats import Interval, auc, bootstrap, identity_auc, own_and_other, proportion, share
from ...lookahead.method.attention import eager_attention
from ...lookahead.method.sampling import ddim_timesteps, sample_ddim
from ...sdxl.shared_unet import Condition, SharedUNet
from ..plan import IMAGE_SIZE, LATENT_SIZE, Plan
from ..stages import base, clip, evaluators, image_encoder, image_prompt, stage, vae
from ..stages.text import TextEncoders, tokenize, tokenizer
from ..world import data
from ..world.faces import CONTINUOUS, DISCRETE, PLACES, SKIN_NAMES, STYLES
from ..world.references import reference_faces
from ..world.sheet import save_grid

CHUNK = 32
STEPS, GUIDANCE = 25, 3.0  # of samples
WEIGHTS_OF_PROMPT = (0.0, 0.25, 0.5, 0.75, 1.0)
READ = ("hair", "hair_colour", "glasses", "moustache", "beard")  # of long captions, beside skin and smile
SEEDS = {"base": 21, "captions": 22, "backbone": 23}
SAMPLES = "samples.safetensors"  # of the base, in `folder/report`: pictures (bytes), style, place


@dataclass(frozen=True)
class Measurement:
    """Figures with their intervals (a plain number is a count or a limit, not an estimate), and what they stand on."""

    figures: Mapping[str, Interval | float]
    basis: str
    curves: dict[str, list[list[float]]] = field(default_factory=dict)


def held_out(folder: Path, plan: Plan) -> data.Pictures:
    return data.pictures(folder, "held_out", plan.held_out_people, plan.styles, IMAGE_SIZE)


def drawings(folder: Path) -> Path:
    """The report's pictures are kept in this folder."""
    (folder / "report").mkdir(exist_ok=True)
    return folder / "report"


def short_prompt(style: int, place: int) -> str:
    return f"{clip.article(STYLES[style])} of a face {PLACES[place]}".strip()


def roc(own: Tensor, other: Tensor, points: int = 61) -> list[list[float]]:
    """[false positive rate, true positive rate], the first from 0.001 to 1 in even steps of its logarithm."""
    false = torch.logspace(-3, 0, points, dtype=torch.double)
    limits = other.double().sort().values[((1 - false) * (len(other) - 1)).round().long()]
    true = (own.double()[None] >= limits[:, None]).double().mean(1)
    return torch.stack([false, true], 1).tolist()


# Autoencoder


@torch.no_grad()
def autoencoder(folder: Path, plan: Plan) -> Measurement:
    """Who is it, in a picture and in its reconstruction; noise of the reconstruction by style."""
    pictures, net = held_out(folder, plan), vae.load(folder)
    recogniser, _ = evaluators.load(folder)
    people, per_person = min(plan.report_people, plan.held_out_people), pictures.per_person
    similarity, error = [], []
    sheet: list[Tensor] = []
    for rows in torch.arange(people * per_person).split(CHUNK):
        x = pictures.images(rows)
        y = (net.decoder(net.encoder(x * 2 - 1)) / 2 + 0.5).clamp(0, 1)
        similarity.append((recogniser.embed(x) * recogniser.embed(y)).sum(1))
        error.append((x - y).square().mean((1, 2, 3)))
        sheet += [torch.stack([x, y], 1)] if len(sheet) * CHUNK < 4 * per_person else []
    kept, noise = (torch.cat(v).view(people, per_person) for v in (similarity, error))
    style = pictures.labels["style"][: people * per_person].view(people, per_person)
    figures: dict[str, Interval | float] = {"identity similarity": share(kept)}
    for s in plan.styles:
        here = style == STYLES.index(s)
        figures[f"identity similarity, {s}"] = share(kept[here].view(people, -1))
    for s in plan.styles:
        e = noise[style == STYLES.index(s)].view(people, -1)
        figures[f"PSNR in dB, {s}"] = bootstrap(partial(_psnr, e), people)
    pairs, flat = torch.cat(sheet), style.flatten()
    columns = []
    for s in plan.styles:  # three pictures of every style, each above its reconstruction
        mine = pairs[torch.where(flat[: len(pairs)] == STYLES.index(s))[0][:3]]
        columns.append(mine.flatten(0, 1))
    rows = min(len(c) for c in columns)
    grid = torch.stack([c[:rows] for c in columns], 1).flatten(0, 1)
    save_grid(grid, len(plan.styles), drawings(folder) / "reconstructions.png")
    return Measurement(figures, f"{people * per_person} pictures of {people} held-out people")


def _psnr(error: Tensor, index: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of those people whose numbers are in index; error: mean squares [people, n]."""
    return (-10 * error[index].mean().log10()).item()


# The networks that only measure


@torch.no_grad()
def judges(folder: Path, plan: Plan) -> Measurement:
    """Measures how well evaluation recogniser and scorer know drawn pictures of people they have not seen."""
    pictures = held_out(folder, plan)
    recogniser, scorer = evaluators.load(folder)
    people, per_person = plan.held_out_people, pictures.per_person
    seen, said = [], []
    for rows in torch.arange(len(pictures)).split(CHUNK):
        x = pictures.images(rows)
        seen.append(recogniser.embed(x))
        said.append(torch.stack([answer.argmax(1) for answer in scorer(x)]))
    of_person = torch.cat(seen).view(people, per_person, -1)
    figures: dict[str, Interval | float] = {}
    curves = {}
    pairs = {
        "photo to photo": [(0, 1)],
        "photo to styled": [(0, i) for i in range(2, per_person)],
        "all": [(i, j) for j in range(per_person) for i in range(j)],
    }
    for name, slots in pairs.items():
        if slots:
            alike = torch.stack([of_person[:, picture] @ of_person[:, photo].T for photo, picture in slots], 1)
            figures[f"recogniser AUC, {name}"] = identity_auc(alike, rounds=100)
            curves[f"evaluation recogniser, {name}"] = roc(*own_and_other(alike, torch.arange(people)))
    for name, answer in zip(("style", "place"), torch.cat(said, 1), strict=True):
        right = answer == pictures.labels[name]
        figures[f"scorer accuracy, {name}"] = share(right.view(people, per_person))
    return Measurement(figures, f"{len(pictures)} drawn pictures of {people} held-out people", curves)


# Samples of the base


@torch.no_grad()
def sample(
    predict: Callable[[Tensor, Tensor, Condition], Tensor],
    text: TextEncoders,
    prompts: list[str],
    numbers: torch.Generator,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> Tensor:
    """Latents [n, 4, h, w] by DDIM under classifier-free guidance; predict: as `base.predict` of a UNet."""
    tokens, n = tokenizer(), len(prompts)
    context, pooled = text(torch.cat([tokenize(tokens, [""] * n), tokenize(tokens, prompts)]))
    both = base.condition(context, pooled)
    guided = base.classifier_free(predict, both.rows(slice(n, None)), both.rows(slice(n)), guidance)
    z = torch.randn(n, 4, LATENT_SIZE, LATENT_SIZE, generator=numbers)
    return sample_ddim(guided, z, ddim_timesteps(steps), base.alpha_bar())


class Painter:
    """The base, and an image prompt where there is one: prompts -> pictures [n, 3, size, size] in [0, 1]."""

    def __init__(self, folder: Path):
        self.unet, self.text = base.load(folder)
        self.vae: AutoencoderTiny = vae.load(folder)
        self.shared = SharedUNet(self.unet, attention=eager_attention)

    def read(self, folder: Path, references: Tensor) -> Tensor:
        """Attach the image prompt; its tokens of references [n, 3, h, w], and of none as the last: [n + 1, 16, c]."""
        adapter = image_prompt.load(stage.read_tensors(folder / "overfit.safetensors"), self.unet)
        self.shared = SharedUNet(self.unet, adapter, attention=eager_attention).inject()
        encoder = image_encoder.load(folder)
        seen = torch.cat([image_encoder.features(encoder, x) for x in references.split(CHUNK)])
        return adapter.image_proj(torch.cat([seen, image_encoder.null_features(encoder)]))

    def __call__(self, prompts: list[str], seed: int, tokens: Tensor | None = None, weight: float = 1.0) -> Tensor:
        """`tokens` [n + 1, 16, c] as `read` gives them. The noise depends on seed and place in the list alone."""
        out = []
        for first in range(0, len(prompts), CHUNK):
            some = prompts[first : first + CHUNK]
            options: dict[str, Any] = {}
            if tokens is not None:
                assert self.shared.encoder is not None  # `read` attached it and gave the tokens
                mine = tokens[:-1][first : first + CHUNK]
                both = torch.cat([tokens[-1:].expand_as(mine), mine])
                options = {"image_prompt": self.shared.encoder.image_prompt(both), "image_prompt_scale": weight}
            predict = partial(self.shared.predict, **options)
            z = sample(predict, self.text, some, stage.numbers_of_step(seed, first))
            out.append((self.vae.decoder(z) / 2 + 0.5).clamp(0, 1))
        return torch.cat(out)


@torch.no_grad()
def samples(folder: Path, plan: Plan) -> Measurement:
    """Style and place of samples on short prompts. Keeps the pictures for measure_found.py, with further
    photos, which count there alone."""
    paint = Painter(folder)
    _, scorer = evaluators.load(folder)
    index = [STYLES.index(s) for s in plan.styles]
    style = torch.tensor(index).repeat_interleave(plan.report_samples)
    place = (torch.arange(plan.report_samples) % len(PLACES)).repeat(len(index))
    photos = max(0, plan.report_photos - plan.report_samples)
    all_styles = torch.cat([style, torch.full((photos,), STYLES.index("photo"))])
    all_places = torch.cat([place, torch.arange(photos) % len(PLACES)])
    prompts = [short_prompt(s, p) for s, p in zip(all_styles.tolist(), all_places.tolist(), strict=True)]
    pictures = paint(prompts, SEEDS["base"])
    said = zip(*(scorer(x) for x in pictures[: len(style)].split(CHUNK)), strict=True)
    said_style, said_place = (torch.cat(answers).argmax(1) for answers in said)
    figures: dict[str, Interval | float] = {}
    for name, right, label, names in (
        ("style", said_style == style, style, STYLES),
        ("place", said_place == place, place, PLACES),
    ):
        figures[f"{name} accuracy"] = proportion(right)
        for value in label.unique().tolist():
            figures[f"{name} accuracy, {names[value] or 'no place named'}"] = proportion(right[label == value])
    whole = {"pictures": (pictures * 255).round().byte(), "style": all_styles, "place": all_places}
    stage.write_tensors(drawings(folder) / SAMPLES, whole)
    by_style = pictures[: len(style)].unflatten(0, (len(index), plan.report_samples))
    rows = min(len(PLACES), plan.report_samples)
    save_grid(by_style[:, :rows].transpose(0, 1).flatten(0, 1), len(index), drawings(folder) / "samples.png")
    basis = f"{len(style)} samples ({plan.report_samples} a style, places in turn)"
    how = f"{STEPS} DDIM steps, guidance {GUIDANCE:g}"
    return Measurement(figures, f"{basis}, {how}; further {photos} photos for the faces below")


# Attributes of long captions


def read_attributes(vector: Tensor) -> dict[str, Tensor]:
    """Reads what predicted identity vectors [n, IDENTITY_SIZE] (faces.identity_vector's layout) say: choices [n]."""
    sizes = [len(w) for w in DISCRETE.values()]
    parts = dict(zip(DISCRETE, vector[:, len(CONTINUOUS) :].split(sizes, 1), strict=True))
    said = {name: parts[name].argmax(1) for name in READ}
    low, high = CONTINUOUS["skin"]
    tone = (vector[:, list(CONTINUOUS).index("skin")] + 1) / 2 * (high - low) + low
    return said | {"skin": (tone + 0.5).floor().long().clamp(0, len(SKIN_NAMES) - 1)}


@torch.no_grad()
def captions(folder: Path, plan: Plan) -> Measurement:
    """Do samples show what long captions say? Read by the evaluation recogniser, smiles by the image-text model where
    there is one. A caption is that of a drawn held-out picture, on which the same reading is done: what the readers
    themselves reach; and the share of the most frequent answer is what a guess reaches."""
    pictures, paint = held_out(folder, plan), Painter(folder)
    recogniser, _ = evaluators.load(folder)
    per_person = pictures.per_person
    person = torch.arange(min(plan.report_captions // 2, plan.held_out_people))
    groups = {"photo": person * per_person}
    if per_person > 2:
        groups["other styles"] = person * per_person + 2 + person % (per_person - 2)
    figures: dict[str, Interval | float] = {}
    smiles: dict[str, list[Tensor]] = {"samples": [], "drawn pictures": [], "true": []}
    text_model = clip.load(folder) if (folder / "clip.safetensors").exists() else None
    for number, (name, rows) in enumerate(groups.items()):
        made = {
            "samples": paint([pictures.long[i] for i in rows], SEEDS["captions"] + 100 * number),
            "drawn pictures": pictures.images(rows),
        }
        said = {k: read_attributes(torch.cat([recogniser(part) for part in x.split(CHUNK)])) for k, x in made.items()}
        for attribute in ("skin", *READ):
            truth = pictures.labels[attribute][rows]
            told = pictures.labels["hair"][rows] > 0 if attribute == "hair_colour" else torch.ones_like(truth).bool()
            if not told.any():
                continue
            for k in made:
                right = said[k][attribute][told] == truth[told]
                figures[f"{name}, {attribute.replace('_', ' ')}: {k}"] = proportion(right)
            usual = truth[told].mode().values
            figures[f"{name}, {attribute.replace('_', ' ')}: guess"] = (truth[told] == usual).float().mean().item()
        for k, x in made.items():
            smiles[k] += [clip.embed_pictures(text_model, x)] if text_model else []
        smiles["true"].append(pictures.labels["smile"][rows] > 0)
        if name == "photo":
            sheet = torch.stack([x[:8] for x in reversed(made.values())])
            save_grid(sheet.flatten(0, 1), sheet.shape[1], drawings(folder) / "captions.png")
    smiling = torch.cat(smiles["true"])
    if text_model and min(smiling.sum(), (~smiling).sum()) >= 5:
        word = clip.embed_texts(text_model, ["smiling"])[0]
        for k in ("samples", "drawn pictures"):
            close = torch.cat(smiles[k]) @ word
            figures[f"all, smile (AUC of closeness to 'smiling'): {k}"] = bootstrap(
                partial(_auc_of, close, smiling), len(close), 300
            )
    return Measurement(
        figures, f"{sum(len(r) for r in groups.values())} long captions of {len(person)} held-out people"
    )


def _auc_of(values: Tensor, true: Tensor, index: Tensor) -> float:
    """How well values [n] tell what is true [n] from what is not, among those whose numbers are in index."""
    return auc(values[index][true[index]], values[index][~true[index]])


# The image prompt alone


@torch.no_grad()
def backbone(folder: Path, plan: Plan) -> Measurement:
    """Identity in photos at weight 1, and what the weight does to style, place and identity in the other styles."""
    n = plan.report_references
    faces, paint = reference_faces(n, IMAGE_SIZE), Painter(folder)
    recogniser, scorer = evaluators.load(folder)
    tokens = paint.read(folder, faces)
    known = torch.cat([recogniser.embed(x) for x in faces.split(CHUNK)])
    place, photo = torch.arange(n) % len(PLACES), STYLES.index("photo")

    def look(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Similarity to every reference [n, n], style [n], place [n]."""
        said = zip(*(scorer(part) for part in x.split(CHUNK)), strict=True)
        seen = torch.cat([recogniser.embed(part) for part in x.split(CHUNK)])
        styles, places = (torch.cat(answers).argmax(1) for answers in said)
        return seen @ known.T, styles, places

    prompts = [short_prompt(photo, p) for p in place.tolist()]
    photos = [paint(prompts, SEEDS["backbone"] + k, tokens) for k in range(2)]
    looks = [look(x) for x in photos]
    alike = torch.stack([s for s, _, _ in looks], 1)
    own, other = own_and_other(alike, torch.arange(n))
    figures: dict[str, Interval | float] = {
        "identity AUC, photo, weight 1": identity_auc(alike),
        "similarity to the own reference, photo, weight 1": share(own.view(n, 2)),
        "similarity to other references, photo, weight 1": share(other.view(n, -1)),
        "style accuracy, photo, weight 1": share(torch.stack([s == photo for _, s, _ in looks], 1)),
    }
    others = [STYLES.index(s) for s in plan.styles if s != "photo"] or [photo]
    style = torch.tensor(others)[torch.arange(n) % len(others)]
    prompts = [short_prompt(s, p) for s, p in zip(style.tolist(), place.tolist(), strict=True)]
    curves: dict[str, list[list[float]]] = {"photo, weight 1": roc(own, other)}
    right, rows = {}, [faces[:6], photos[0][:6]]
    for weight in WEIGHTS_OF_PROMPT:
        x = paint(prompts, SEEDS["backbone"] + 10, tokens, weight)
        alike, said_style, said_place = look(x)
        right[weight] = said_style == style
        own, _ = own_and_other(alike[:, None], torch.arange(n))
        measured = {
            "style accuracy": proportion(right[weight]),
            "place accuracy": proportion(said_place == place),
            "similarity to the own reference": share(own[:, None]),
            "identity AUC": identity_auc(alike[:, None]),
        }
        for name, value in measured.items():
            figures[f"{name}, other styles, weight {weight}"] = value
            curves.setdefault(f"{name} by weight, other styles", []).append([weight, *value])
        rows.append(x[:6])
    for weight in (0.5, 1.0):
        fall = right[0.0].double() - right[weight].double()
        figures[f"fall of style accuracy from weight 0 to {weight}"] = share(fall[:, None])
    save_grid(torch.cat(rows), len(rows[0]), drawings(folder) / "backbone.png")
    basis = f"{n} held-out references; {2 * n} photos, and {n} pictures in other styles for each weight"
    return Measurement(figures, basis, curves)

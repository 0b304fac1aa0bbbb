"""The mini world as something to train on: drawn people, and the models of the shipped files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from ..lookahead.files.atomic import atomic_folder
from ..lookahead.files.tensors import sha256
from ..lookahead.losses.identity import NONE, FaceReferences, IdentityLoss, embed
from ..lookahead.vision.arcface import Recogniser
from ..lookahead.vision.faces import Detector
from ..sdxl.configs import tokenizers
from ..sdxl.load import Frozen, ModelError, PromptEncoder
from ..sdxl.shared_unet import Condition
from ..tools.common import CACHE
from ..trainer.lookahead.config import Config
from ..trainer.lookahead.step import Batch
from ..trainer.lookahead.validate import Probes
from ..trainer.seeds import generator
from .files import models
from .files.weights import CHECKPOINT, CLIP_VISION, evaluators
from .plan import IMAGE_SIZE, LATENT_SIZE, WEIGHTS
from .stages import base
from .world import data
from .world.faces import STYLES, Faces, captions, frontal, landmarks, render, sample_identities, sample_nuisance

VALIDATION = 4000  # seed of people who are in no group of `data.SEEDS`
SEED = 6000  # of textures and references; that of the people is their group's
LAYOUT = 1  # of `model_folder`; another number has the folder written anew
PER_PERSON = len(STYLES) + 1  # two photos, then each other style once


class DrawnPeople:
    """Pictures of drawn people (`recipe.Source`), made when they are asked for: each is a function of its number.

    The reference is always a photo, and never the target itself. Captions say nothing about the person. Validation
    (`validate.Probing`) is by judges, and shows people, that took part in no training.
    """

    latent_shape = (4, LATENT_SIZE, LATENT_SIZE)

    def __init__(self, people: int, models: Frozen, recogniser: Recogniser | None, detector: Detector | None):
        self.faces = data.group_of_people("train", people, STYLES)
        self.captions = captions(self.faces, False)
        self.models, self.recogniser, self.detector = models, recogniser, detector
        self._texts: dict[str, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.faces)

    def digest(self) -> str:
        return hashlib.sha256(f"{len(self)} drawn pictures".encode()).hexdigest()

    @property
    def loader(self) -> Drawer:
        """Makes what draws the pictures of a batch (`recipe.ReadAhead`)."""
        return Drawer(self.faces)

    def batch(self, targets: Sequence[int], numbers: Sequence[int], device: torch.device) -> Batch:
        return self.finish(self.loader((targets, numbers)), device)

    @torch.no_grad()
    def finish(self, drawn: Drawing, device: torch.device) -> Batch:
        targets, references, pictures, photos = drawn
        self.models.readers(device)
        if self.recogniser is not None:
            self.recogniser.to(device)
        pictures, photos = pictures.to(device), photos.to(device)
        z_r, z_c = (self.models.latents(p) for p in (pictures, photos))
        features = self.models.features(photos)
        loss = None
        if self.recogniser is not None:
            assert self.detector is not None  # a recogniser comes with a detector
            points = landmarks(self.faces.rows(torch.tensor(references)), IMAGE_SIZE)
            people = embed(self.recogniser, photos, points).cpu()
            sizes = torch.full((len(points), 2), IMAGE_SIZE)
            loss = IdentityLoss(self.recogniser, self.detector, FaceReferences(people, points, sizes), NONE)
        names = [f"picture {t % PER_PERSON} of person {t // PER_PERSON}" for t in targets]
        text, own = (self._text([self.captions[r] for r in rows], device) for rows in (targets, references))
        return Batch(names, z_r, z_c, text, own, features, loss)

    def prepare(self, device: torch.device) -> None:
        """Nothing: pictures are drawn when they are asked for."""

    @torch.no_grad()
    def probes(self, config: Config, device: torch.device) -> Probes:
        numbers, count = torch.Generator().manual_seed(VALIDATION), config.validation.people
        photo = torch.full((count,), STYLES.index("photo"))
        people = Faces(sample_identities(count, numbers), frontal(sample_nuisance(count, numbers, style=photo)))
        photos = torch.cat(
            [render(people.rows(slice(n, n + 1)), IMAGE_SIZE, seed=VALIDATION + n) for n in range(count)]
        )
        prompts = list(config.validation.prompts)
        wanted = torch.tensor([max((n for n, s in enumerate(STYLES) if s in p), default=-1) for p in prompts])
        recogniser, scorer = evaluators()
        recogniser, scorer = recogniser.to(device), scorer.to(device)
        photos, wanted = photos.to(device), wanted.to(device).repeat(count)

        def score(pictures: Tensor) -> dict[str, Tensor]:
            own = recogniser.embed(photos).repeat_interleave(len(prompts), 0)
            style = (scorer(pictures)[0].argmax(1) == wanted).float()
            identity = (recogniser.embed(pictures) * own).sum(1)
            return {"identity": identity, "style": torch.where(wanted < 0, torch.nan, style)}

        self.models.readers(device)
        seen = self.models.latents(photos), self.models.features(photos)
        each = [x.repeat_interleave(len(prompts), 0) for x in seen]
        text, own = (self._text(texts, device) for texts in (prompts * count, [config.data.kv_prompt] * len(wanted)))
        names = [f"{prompt}, person {n}" for n in range(count) for prompt in prompts]
        batch = Batch(names, each[0], each[0], text, own, each[1])
        return Probes(batch, len(prompts), photos, score, "the mini world's evaluation recogniser")

    def _text(self, captions: Sequence[str], device: torch.device) -> Condition:
        for caption in set(captions) - self._texts.keys():
            self._texts[caption] = self.models.text(caption)
        parts = [self._texts[caption] for caption in captions]
        context, pooled = (torch.cat(part).to(device) for part in zip(*parts, strict=True))
        return base.condition(context, pooled)


class Drawing(NamedTuple):
    """Rows of targets and references, and their pictures [n, 3, h, w] in [0, 1]."""

    targets: Sequence[int]
    references: Sequence[int]
    pictures: Tensor
    photos: Tensor


@dataclass(frozen=True)
class Drawer:
    """Draws the pictures of samples, in a worker too."""

    faces: Faces

    def __call__(self, samples: tuple[Sequence[int], Sequence[int]]) -> Drawing:
        targets, numbers = samples
        references = [reference_of(t, n) for t, n in zip(targets, numbers, strict=True)]
        return Drawing(targets, references, self._draw(targets), self._draw(references))

    def _draw(self, rows: Sequence[int]) -> Tensor:
        """One by one: a texture drawn for several at once would depend on who else is in the batch."""
        return torch.cat([render(self.faces.rows(slice(r, r + 1)), IMAGE_SIZE, seed=SEED + r) for r in rows])


def reference_of(target: int, number: int) -> int:
    """The row of the reference: one of the two photos of the person, and the other one where the target is a photo."""
    person, slot = divmod(target, PER_PERSON)
    if slot < 2:
        return person * PER_PERSON + 1 - slot
    return person * PER_PERSON + int(torch.randint(2, (1,), generator=generator(SEED, number)))


def frozen(weights: Path = WEIGHTS) -> Frozen:
    """The shipped models as the trainer takes them. Raises FileNotFoundError, one sentence, for one that is missing."""
    mini = models.load(weights)
    text = PromptEncoder(tokenizers(), mini.text.l, mini.text.g)
    return Frozen(mini.unet, text, mini.vae, models.load_image_encoder(weights))


def write_folder(to: Path, weights: Path = WEIGHTS) -> Path:
    """The mini world as real SDXL comes: a diffusers folder, and in it the image encoder's folder."""
    parts = frozen(weights)
    pipe = StableDiffusionXLPipeline(
        vae=parts.vae,
        text_encoder=parts.text.first,
        text_encoder_2=parts.text.second,
        tokenizer=parts.text.tokenizers[0],
        tokenizer_2=parts.text.tokenizers[1],
        unet=parts.unet,
        scheduler=base.scheduler(),
    )
    pipe.save_pretrained(to)
    parts.vision.save_pretrained(to / "image_encoder")
    # A field that AutoencoderTiny makes itself, and warns of when it reads it again.
    path = to / "vae" / "config.json"
    values = json.loads(path.read_text())
    values.pop("block_out_channels", None)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    return to


def model_folder(weights: Path = WEIGHTS, cache: Path = CACHE) -> Path:
    """The folder of `write_folder`, written once for these weights, below `cache`.

    Raises FileNotFoundError, one sentence, for a file of the weights that is missing, and ModelError where the folder
    cannot be written.
    """
    if missing := [name for name in (CHECKPOINT, CLIP_VISION) if not (weights / name).is_file()]:
        raise FileNotFoundError(
            f"There is no {weights / missing[0]}: it belongs to the repository, so get it back with git checkout."
        )
    key = hashlib.sha256(f"{LAYOUT} {sha256(weights / CHECKPOINT)} {sha256(weights / CLIP_VISION)}".encode())
    folder = cache / "mini" / key.hexdigest()[:16]
    if folder.is_dir():
        return folder
    try:
        with atomic_folder(folder) as part:
            write_folder(part, weights)
    except OSError as error:
        if not folder.is_dir():  # else another process was first
            raise ModelError(
                f"The mini world's models cannot be written to {folder} ({error.strerror or error}): free some space, "
                f"or make {cache} writable."
            ) from None
    return folder

"""Who scores the pictures of a validation on a folder: a recogniser and a CLIP that training does not use.

Without a recogniser of its own (`validation.recogniser`) the loss's is asked, which flatters: training pulls at it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ...lookahead.losses.identity import NONE, FaceReferences, IdentityLoss, embed
from ...lookahead.vision import arcface, clip
from ...lookahead.vision.arcface import Recogniser
from ...lookahead.vision.faces import Detector
from ...lookahead.vision.images import resize_square
from ...sdxl.load import ModelError, PromptEncoder, found
from .config import Config
from .validate import Score


@dataclass(frozen=True, eq=False)
class Judges:
    """On the CPU but when they are asked. by: the recogniser's name, for the log."""

    recogniser: Recogniser | None
    detector: Detector | None
    pictures: clip.CLIPPictures | None
    texts: Tensor | None  # [prompts, channels], unit vectors of `validation.prompts`
    by: str

    @torch.no_grad()
    def score(self, shown: Tensor, points: Tensor, device: torch.device) -> Score:
        """Scores of pictures that show, one person after another, each of the prompts.

        shown: the references [people, 3, h, w] in [0, 1]; points: their landmarks [people, 5, 2]. "identity" is the
        cosine of embeddings, NaN where no face is found; "prompt" that of picture and text (CLIP-T).
        """
        recogniser, detector, people = self.recogniser, self.detector, None
        if recogniser is not None:
            known = embed(recogniser.to("cpu"), shown.cpu(), points)
            people = (known, points, torch.tensor([shown.shape[-2:]]).expand(len(shown), 2))

        @torch.no_grad()
        def score(pictures: Tensor) -> dict[str, Tensor]:
            figures = {}
            count = len(pictures) // len(shown)  # prompts
            if people is not None and recogniser is not None and detector is not None:
                known, points, sizes = (of.repeat_interleave(count, 0) for of in people)
                rows = FaceReferences(known, points, sizes)
                values, valid = IdentityLoss(recogniser.to(device), detector, rows, NONE)(pictures * 2 - 1)
                figures["identity"] = torch.where(valid, 1 - values, torch.nan)
                recogniser.to("cpu")  # (the loss moves its own when it needs it)
            if self.pictures is not None and self.texts is not None:
                seen = self.pictures.to(device)(resize_square(pictures, self.pictures.size))
                figures["prompt"] = (F.normalize(seen) * self.texts.to(device).repeat(len(shown), 1)).sum(1)
                self.pictures.to("cpu")
            return figures

        return score


def read_judges(
    config: Config, recogniser: Recogniser | None, detector: Detector | None, text: PromptEncoder
) -> Judges:
    """recogniser: the loss's, for want of another. Raises FileNotFoundError, ModelError, ImportError or
    RecogniserError, one sentence, for a file that is missing or is none of its kind."""
    settings = config.validation
    loss_s = Path(config.model.recogniser or "").name
    by = f"{loss_s}, which the loss uses too," if recogniser is not None else "nothing (model.recogniser is not set),"
    if settings.recogniser is not None:
        if detector is None:
            raise ModelError("validation.recogniser needs a detector of faces: set model.detector.")
        path = found("recogniser", settings.recogniser, section="validation")
        recogniser, by = arcface.read(path), f"{path.name},"
    if settings.clip is None:
        return Judges(recogniser, detector, None, None, by)
    try:
        file = clip.read(found("clip", settings.clip, section="validation"))
        texts = clip.embed_texts(file, _ids(text, settings.prompts))
        return Judges(recogniser, detector, clip.CLIPPictures(file), texts, by)
    except ValueError as error:
        raise ModelError(f"validation.clip: {error}") from None


def _ids(text: PromptEncoder, prompts: Sequence[str]) -> Tensor:
    """The ids of CLIP's tokenizer, which SDXL's first text encoder reads too."""
    tokenizer, length = text.tokenizers[0], text.first.config.max_position_embeddings
    return tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids

"""Which style does a picture show? Any whole CLIP tells, asked with the configuration's own words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ....lookahead.vision import clip
from ....lookahead.vision.images import resize_square
from ....sdxl.configs import tokenizers
from ....sdxl.load import ModelError
from .checks import ScoreStyles
from .config import Prompts

SHARPNESS = 100.0  # of the softmax over cosines, as CLIP was trained


def clip_scorer(path: Path, prompts: Prompts, device: torch.device) -> ScoreStyles:
    """Gives, for each picture, the probability of the asked style among all of the configuration's.

    Raises ModelError, one sentence, where the file is no whole CLIP.
    """
    styles = list(dict.fromkeys([prompts.plain, *prompts.styles]))
    tokenizer = tokenizers()[0]
    try:
        file = clip.read(path)
        ids = tokenizer([f"{s} of {prompts.face}" for s in styles], padding="max_length", max_length=77).input_ids
        texts = clip.embed_texts(file, torch.tensor(ids)).to(device)
        seeing = clip.CLIPPictures(file).to(device)
    except ValueError as error:
        raise ModelError(f"checks.clip: {error}") from None

    @torch.no_grad()
    def score(pictures: Tensor, asked: Sequence[str]) -> Tensor:
        seen = F.normalize(seeing(resize_square(pictures.to(device), seeing.size)), dim=-1)
        shares = (SHARPNESS * seen @ texts.T).softmax(1)
        wanted = torch.tensor([styles.index(style) for style in asked], device=device)
        return shares[torch.arange(len(wanted)), wanted].cpu()

    return score

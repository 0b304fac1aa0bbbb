"""Stage: the image encoder, in the transformers CLIP-vision layout, at the mini world's size.

The real one was trained on pictures and their texts; this one predicts what can be said about a drawn face: the
parameters it was drawn with, its style, place and smile. The image prompt reads its penultimate hidden states.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ...lookahead.vision.images import clip_normalise, resize_square
from ..plan import SIZES, Plan
from ..world.data import Pictures
from ..world.faces import IDENTITY_SIZE, PLACES, STYLES
from . import stage
from .evaluators import disturb

BATCH = 64


def build() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES["clip_vision"], attn_implementation="eager"))


def preprocess(picture: Tensor) -> Tensor:
    """[n, 3, h, w] in [0, 1], square, -> the encoder's input: CLIP's mean and deviation, at the encoder's size."""
    size = SIZES["clip_vision"]["image_size"]
    return clip_normalise(resize_square(picture, size))


def train(folder: Path, groups: list[Pictures], plan: Plan) -> None:
    """Every batch is drawn in equal parts from the groups of people."""
    out = folder / "image_encoder.safetensors"
    if out.exists():
        return
    torch.manual_seed(plan.seed + 4)
    device = stage.device()
    encoder = build().to(device)
    answers = [IDENTITY_SIZE, len(STYLES), len(PLACES), 2]
    head = nn.Linear(SIZES["clip_vision"]["projection_dim"], sum(answers)).to(device)
    part = BATCH // len(groups)

    def loss(step: int) -> Tensor:
        numbers = stage.numbers_of_step(plan.seed + 4, step)
        rows = [(g, torch.randint(len(g), (part,), generator=numbers)) for g in groups]
        labels = {k: torch.cat([g.labels[k][i] for g, i in rows]).to(device) for k in groups[0].labels}
        x = preprocess(disturb(torch.cat([g.images(i, device) for g, i in rows]), numbers))
        with stage.autocast(device):
            said = head(encoder(pixel_values=x).image_embeds).float()
        identity, *choices = said.split(answers, 1)
        value = 3 * F.mse_loss(identity, labels["identity"])
        for y, name in zip(choices, ("style", "place", "smile"), strict=True):
            value = value + 0.2 * F.cross_entropy(y, labels[name])
        return value

    models = {"encoder": encoder, "head": head}
    stage.train("image_encoder", folder, models, loss, steps=plan.image_encoder_steps, rate=1e-3)
    stage.write_tensors(out, encoder.state_dict())
    stage.finish("image_encoder", folder)


def load(folder: Path) -> CLIPVisionModelWithProjection:
    encoder = build()
    encoder.load_state_dict(stage.read_tensors(folder / "image_encoder.safetensors"))
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def features(encoder: CLIPVisionModelWithProjection, picture: Tensor) -> Tensor:
    """Returns what the image prompt reads: penultimate hidden states [n, 1 + patches, hidden] of pictures in [0, 1]."""
    return encoder(pixel_values=preprocess(picture), output_hidden_states=True).hidden_states[-2]


@torch.no_grad()
def null_features(encoder: CLIPVisionModelWithProjection) -> Tensor:
    """The features of no picture, [1, 1 + patches, hidden]: of zeros in the encoder's own, normalised pixel space (not
    of a black picture), as the public pipelines have it."""
    size = SIZES["clip_vision"]["image_size"]
    zeros = torch.zeros(1, 3, size, size, device=encoder.device)
    return encoder(pixel_values=zeros, output_hidden_states=True).hidden_states[-2]

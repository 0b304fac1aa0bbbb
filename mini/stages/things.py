"""Stage: the base learns to draw things (`world.things`), by a LoRA and new rows in its text encoders' word tables.

The base itself stays as it is: what is learnt is merged into a copy when a study of things is set up. It learns all
ten classes, also the two that no concept encoder is trained on: what an encoder has never seen must be something that
the base can draw, as with SDXL. A quarter of each batch are faces under their own captions, or they would be forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn
from torch.func import functional_call

from ...sdxl import lora
from ..plan import SIZES, Plan
from ..world.data import Pictures
from ..world.things import CLASSES
from . import base, stage, vae
from .text import TextEncoders, tokenize, tokenizer

NAME = "things_lora"
RANK, CONV_RANK = 32, 16
BATCH, FACES = 24, 6
# After the first cycle all others were drawn in over 90 %, these two in 67 and 40: as each other, or as an umbrella.
CYCLES, HARD, OFTEN = 2, ("lamp", "flower"), 3  # in the second they are drawn so many times as often
RATE = 1e-3
NORM = 0.44  # of the word rows that the base was trained with; the others are noise of 0.11
TABLES = ("l.embeddings.token_embedding.weight", "g.text_model.embeddings.token_embedding.weight")


class FrozenParts(NamedTuple):
    """The parts of a mini SDXL that the stage builds on, frozen."""

    unet: UNet2DConditionModel
    text: TextEncoders
    vae: AutoencoderTiny


class ClassWords(nn.Module):
    """The rows of the classes' names in the two word tables, in the order of CLASSES."""

    ids: Tensor

    def __init__(self) -> None:
        super().__init__()
        rows = torch.randn(2, len(CLASSES), SIZES["text"]["width_l"])  # both encoders have one width
        rows = rows / rows.norm(dim=-1, keepdim=True) * NORM
        self.clip_l, self.clip_g = (nn.Parameter(each) for each in rows)
        self.register_buffer("ids", tokenize(tokenizer(), list(CLASSES))[:, 0, 1].long())

    def tables(self, text: TextEncoders) -> dict[str, Tensor]:
        """The word tables of `text` by name, with these rows put in; gradients go to the rows."""
        pairs = zip(TABLES, (self.clip_l, self.clip_g), strict=True)
        return {name: text.get_parameter(name).index_copy(0, self.ids, rows) for name, rows in pairs}


def train(
    folder: Path, frozen: FrozenParts, things: tuple[Pictures, Tensor], faces: tuple[Pictures, Tensor], plan: Plan
) -> None:
    """things, faces: pictures and their latents."""
    out = folder / f"{NAME}.safetensors"
    if out.exists():
        return
    torch.manual_seed(plan.seed + 13)
    device = stage.device()
    unet, text = frozen.unet.to(device), frozen.text.to(device)
    made, words = lora.build(unet, RANK, conv_rank=CONV_RANK).to(device), ClassWords().to(device)
    tokens = tokenizer()
    ids, own = [tokenize(tokens, pictures.long) for pictures, _ in (things, faces)], tokenize(tokens, faces[0].short)
    empty = tokenize(tokens, [""])
    noised = base.Noising(device)
    hard = torch.isin(things[0].labels["kind"], torch.tensor([CLASSES.index(name) for name in HARD]))
    every = torch.arange(len(things[0]))
    places = (every, every.repeat_interleave(torch.where(hard, OFTEN, 1)))

    def loss(step: int) -> Tensor:
        numbers = stage.numbers_of_step(plan.seed + 13, step)
        among = places[CYCLES * step >= plan.things_lora_steps]
        thing = among[torch.randint(len(among), (BATCH - FACES,), generator=numbers)]
        face = torch.randint(len(faces[0]), (FACES,), generator=numbers)
        described = torch.rand(FACES, 1, 1, generator=numbers) < 0.5
        rows = torch.cat([ids[0][thing], torch.where(described, ids[1][face], own[face])])
        rows, keep = base.drop_text(rows, empty, numbers)
        latents = torch.cat([things[1][thing], faces[1][face]])
        t, noise, x = noised(latents.float().to(device), numbers)
        weights, tables = lora.merged(made, unet), words.tables(text)
        with stage.autocast(device):
            context, pooled = functional_call(text, tables, (rows.to(device),))
            keep = keep.to(device)
            condition = base.condition(context * keep, pooled.float() * keep[:, 0])
            added = {"added_cond_kwargs": condition.added}
            predicted = functional_call(unet, weights, (x, t, condition.context), added).sample
        return noised.loss(predicted, noise, t)

    stage.train(
        NAME,
        folder,
        {"lora": made, "words": words},
        loss,
        steps=plan.things_lora_steps,
        rate=RATE,
        decay=0.0,
        ema=0.999,
        cycles=CYCLES,
    )
    rows = {f"words.{name}": tensor for name, tensor in words.state_dict().items()}
    stage.write_tensors(out, lora.public_tensors(made) | rows)
    stage.finish(NAME, folder)


def latents(folder: Path, frozen: FrozenParts, pictures: Pictures, name: str) -> Tensor:
    """The latents of a group by the frozen autoencoder, computed once."""
    return vae.encode_all(folder, pictures, name, vae=frozen.vae)


@torch.no_grad()
def merge(tensors: Mapping[str, Tensor], unet: UNet2DConditionModel, text: TextEncoders) -> None:
    """Put what the stage has made into a base's modules, for good."""
    branches = lora.load({k: v.float() for k, v in tensors.items() if k.startswith(lora.PREFIX)}, unet)
    words = ClassWords()
    own = {k.removeprefix("words."): v for k, v in tensors.items() if k.startswith("words.")}
    words.load_state_dict({k: v.float() if v.is_floating_point() else v.long() for k, v in own.items()})
    for module, changed in ((unet, lora.merged(branches, unet)), (text, words.tables(text))):
        for name, tensor in changed.items():
            module.get_parameter(name).copy_(tensor)

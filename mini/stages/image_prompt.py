"""Stages: the image prompt. An IP-Adapter Plus for the mini base, trained with the plain diffusion loss (eq. 2).

The reference is a photo of a person, the target another photo of the same person, the text the short caption, which
says nothing about the person: who it is can come from the reference alone. It is trained on photos alone, and in a
second stage under captions of which half name another style. So it overfits to photos on purpose, as the public IP-
Adapters do by their data: strong on identity, and at weight 1 it turns stylised prompts into photos. That is the
backbone which the paper's encoder starts from, and what it has to make better.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ...lookahead.files import encoder_file
from ...lookahead.method.attention import eager_attention
from ...lookahead.method.resampler import ResamplerSizes
from ...sdxl.encoder import Encoder
from ...sdxl.shared_unet import SharedUNet
from ..plan import CONTEXT, SIZES, Plan
from ..world.data import Pictures
from ..world.faces import STYLES
from . import base, image_encoder, stage
from .clip import article
from .text import tokenize, tokenizer

BATCH = 32
DROP_IMAGE = 0.1
WRONG = 0.5  # share of captions in the second stage that name another style than the photo's
_S = SIZES["image_prompt"]


def build(unet: UNet2DConditionModel) -> Encoder:
    """Builds what is trained: the Resampler, and a key and a value projection for every cross-attention."""
    dim, width = _S["heads"] * _S["head_dim"], SIZES["clip_vision"]["hidden_size"]
    sizes = ResamplerSizes(_S["tokens"], dim, _S["depth"], _S["heads"], width, CONTEXT, _S["ff_mult"] * dim)
    adapter = Encoder(unet, sizes, kv_rank=0, export_rank=0)
    for path, projections in zip(adapter.paths, adapter.ip_adapter, strict=True):
        attention = unet.get_submodule(path).attn2
        # The text's own projections, since the frozen layers know what these give; values at 0.3 of them, so that the
        # untrained tokens change the picture little at first.
        projections.to_k_ip.weight.data.copy_(attention.to_k.weight)
        projections.to_v_ip.weight.data.copy_(0.3 * attention.to_v.weight)
    return adapter


Groups = list[tuple[Pictures, Tensor]]  # pictures of people, whose slots 0 and 1 are photos, and all their latents


def train(folder: Path, groups: Groups, plan: Plan) -> None:
    """The first stage: with the captions as they are."""
    _train("image_prompt", folder, groups, plan.seed + 5, plan.image_prompt_steps, 0.0)


def overfit(folder: Path, groups: Groups, plan: Plan) -> None:
    """The second stage goes on from the first: the adapter learns to insist on a photo, whatever the text says.

    Fewer captions instead of wrong ones were not enough: with 80 % of them dropped, the style accuracy stayed at 1.
    """
    _train("overfit", folder, groups, plan.seed + 9, plan.overfit_steps, WRONG)


def _train(name: str, folder: Path, groups: Groups, seed: int, steps: int, wrong: float) -> None:
    out = folder / f"{name}.safetensors"
    if out.exists():
        return
    torch.manual_seed(seed)
    device = stage.device()
    unet, text = (m.to(device) for m in base.load(folder))
    adapter = build(unet)
    if name != "image_prompt":
        adapter = load(stage.read_tensors(folder / "image_prompt.safetensors"), unet).train().requires_grad_(True)
    shared = SharedUNet(unet, adapter.to(device), attention=eager_attention).inject()
    features, null = _photo_features(folder, [pictures for pictures, _ in groups], device)
    photos = [_photo_slots(pictures) for pictures, _ in groups]
    latents = torch.cat([z[slots] for (_, z), slots in zip(groups, photos, strict=True)])
    tokens, empty = tokenizer(), tokenize(tokenizer(), [""])
    # [styles, people, 2, 2, 77]: the captions of all photos, as they are and with the name of another style
    short = torch.stack(
        [
            torch.cat([_named(tokens, p, style)[slots] for (p, _), slots in zip(groups, photos, strict=True)])
            for style in (STYLES if wrong else STYLES[:1])
        ]
    )
    noised = base.Noising(device)

    def loss(step: int) -> Tensor:
        numbers = stage.numbers_of_step(seed, step)
        person = torch.randint(len(features), (BATCH,), generator=numbers)
        reference = torch.randint(2, (BATCH,), generator=numbers)
        target = 1 - reference  # the other photo of the same person
        dropped = torch.rand(BATCH, generator=numbers) < DROP_IMAGE
        # Without an image nothing may insist: the null tokens stay neutral.
        other = (torch.rand(BATCH, generator=numbers) < wrong) & ~dropped
        style = torch.randint(1, len(STYLES), (BATCH,), generator=numbers) * other
        ids, keep = base.drop_text(short[style, person, target], empty, numbers)
        t, noise, x = noised(latents[person, target].float().to(device), numbers)
        read = torch.where(dropped.view(-1, 1, 1).to(device), null, features[person, reference].float().to(device))
        with torch.no_grad(), stage.autocast(device):
            context, pooled = text(ids.to(device))
        keep = keep.to(device)
        with stage.autocast(device):
            prompt = adapter.image_prompt(adapter.image_proj(read))
            condition = base.condition(context * keep, pooled.float() * keep[:, 0])
            predicted = shared.predict(x, t, condition, prompt)
        return noised.loss(predicted, noise, t)

    stage.train(name, folder, {"adapter": adapter}, loss, steps=steps, rate=1e-3, ema=0.998)
    stage.write_tensors(out, public_tensors(adapter))
    stage.finish(name, folder)


def public_tensors(adapter: Encoder) -> dict[str, Tensor]:
    """The adapter under the names of the public IP-Adapter Plus files."""
    return encoder_file.image_prompt_tensors(adapter.image_proj.state_dict(), adapter.projection_weights)


def load(tensors: Mapping[str, Tensor], unet: UNet2DConditionModel) -> Encoder:
    """An adapter from the tensors of a public file."""
    file = encoder_file.from_tensors(tensors, {}, "the image prompt of the mini world")
    return Encoder.start_from(file, unet, kv_rank=0, export_rank=0).eval().requires_grad_(False)


def _named(tokens: object, pictures: Pictures, style: str) -> Tensor:
    """The short captions of photos, tokenized, with `style` for "photo"."""
    texts = [text.replace("a photo", article(style), 1) for text in pictures.short]
    number = {text: n for n, text in enumerate(dict.fromkeys(texts))}  # there are few different ones
    return tokenize(tokens, list(number))[torch.tensor([number[text] for text in texts])]


def _photo_slots(pictures: Pictures) -> Tensor:
    """[people, 2]: the rows of both photos of every person."""
    first = torch.arange(0, len(pictures), pictures.per_person)
    return torch.stack([first, first + 1], 1)


@torch.no_grad()
def _photo_features(folder: Path, groups: list[Pictures], device: torch.device) -> tuple[Tensor, Tensor]:
    """Image features of both photos of every person [people, 2, patches + 1, hidden] (16 bit), and those of nothing."""
    encoder = image_encoder.load(folder).to(device)
    null = image_encoder.null_features(encoder)
    out = []
    for pictures in groups:
        for chunk in _photo_slots(pictures).split(32):
            read = image_encoder.features(encoder, pictures.images(chunk.flatten(), device))
            out.append(read.unflatten(0, (len(chunk), 2)).half().cpu())
    return torch.cat(out), null

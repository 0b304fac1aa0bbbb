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
from torch import Tensor, nn

from ...lookahead.files.block_names import BlockName, block_names, ip_adapter_key
from ...lookahead.method.attention import decoupled_cross_attention
from ...lookahead.method.resampler import Resampler, ResamplerSizes
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


def blocks() -> list[BlockName]:
    depth = SIZES["unet"]["transformer_depth"]
    return block_names(depth, depth[-1])


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention written out: its backward is faster than SDPA's in bf16 on a CPU."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    weight = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return (weight @ v).transpose(1, 2).flatten(2)


class ImagePromptAttention(nn.Module):
    """A cross-attention of diffusers' UNet that also reads `tokens` [n, 16, context] of an image prompt, when set, at
    weight `scale`."""

    def __init__(self, width: int):
        super().__init__()
        self.to_k_ip = nn.Linear(CONTEXT, width, bias=False)
        self.to_v_ip = nn.Linear(CONTEXT, width, bias=False)
        self.tokens: Tensor | None = None
        self.scale = 1.0

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: object) -> Tensor:
        q = attn.to_q(hidden_states)
        k, v = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        if self.tokens is None:
            out = softmax_attention(q, k, v, attn.heads)
        else:
            k_ip, v_ip = self.to_k_ip(self.tokens), self.to_v_ip(self.tokens)
            out = decoupled_cross_attention(q, k, v, k_ip, v_ip, attn.heads, self.scale, attention=softmax_attention)
        return attn.to_out[1](attn.to_out[0](out))


class Adapter(nn.Module):
    """What is trained: the Resampler, and a key and a value projection for every cross-attention."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        dim = _S["heads"] * _S["head_dim"]
        width = SIZES["clip_vision"]["hidden_size"]
        self.image_proj = Resampler(
            ResamplerSizes(_S["tokens"], dim, _S["depth"], _S["heads"], width, CONTEXT, _S["ff_mult"] * dim)
        )
        attentions = [unet.get_submodule(b.diffusers).attn2 for b in blocks()]
        self.ip_adapter = nn.ModuleList(ImagePromptAttention(a.to_q.out_features) for a in attentions)
        for a, ip in zip(attentions, self.ip_adapter, strict=True):
            # A start that the frozen layers understand: they know text tokens, and speak softly at first.
            ip.to_k_ip.weight.data.copy_(a.to_k.weight)
            ip.to_v_ip.weight.data.copy_(0.3 * a.to_v.weight)

    def attach(self, unet: UNet2DConditionModel) -> None:
        for block, ip in zip(blocks(), self.ip_adapter, strict=True):
            unet.get_submodule(block.diffusers).attn2.set_processor(ip)

    def set_tokens(self, tokens: Tensor | None, scale: float = 1.0) -> None:
        for ip in self.ip_adapter:
            ip.tokens, ip.scale = tokens, scale


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
    adapter = Adapter(unet)
    if name != "image_prompt":
        adapter = load(stage.read_tensors(folder / "image_prompt.safetensors"), unet).train().requires_grad_(True)
    adapter.to(device).attach(unet)
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
        seen = torch.where(dropped.view(-1, 1, 1).to(device), null, features[person, reference].float().to(device))
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            context, pooled = text(ids.to(device))
        keep = keep.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            adapter.set_tokens(adapter.image_proj(seen))
            condition = base.added(pooled.float() * keep[:, 0])
            predicted = unet(x, t, context * keep, added_cond_kwargs=condition).sample
        adapter.set_tokens(None)
        return noised.loss(predicted, noise, t)

    stage.train(name, folder, {"adapter": adapter}, loss, steps=steps, rate=1e-3, ema=0.998)
    stage.write_tensors(out, public_tensors(adapter))
    stage.finish(name, folder)


def public_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter under the names of the public IP-Adapter Plus files."""
    out = {f"image_proj.{k}": v for k, v in adapter.image_proj.state_dict().items()}
    for n, ip in enumerate(adapter.ip_adapter):
        out[ip_adapter_key(n, "k")], out[ip_adapter_key(n, "v")] = ip.to_k_ip.weight, ip.to_v_ip.weight
    return out


def load(tensors: Mapping[str, Tensor], unet: UNet2DConditionModel) -> Adapter:
    """An adapter from the tensors of a public file, not yet attached."""
    adapter = Adapter(unet)
    adapter.image_proj.load_state_dict({k[11:]: v for k, v in tensors.items() if k.startswith("image_proj.")})
    for n, ip in enumerate(adapter.ip_adapter):
        ip.to_k_ip.weight.data.copy_(tensors[ip_adapter_key(n, "k")])
        ip.to_v_ip.weight.data.copy_(tensors[ip_adapter_key(n, "v")])
    return adapter.eval().requires_grad_(False)


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
            seen = image_encoder.features(encoder, pictures.images(chunk.flatten(), device))
            out.append(seen.unflatten(0, (len(chunk), 2)).half().cpu())
    return torch.cat(out), null

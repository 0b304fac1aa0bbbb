"""Pictures of one subject that attend to each other: consistent sets without training, after ConsiStory (Tewel et al.,
arXiv 2402.03286).

Where the subject is in each picture is read from cross-attention to its words, as the mean over steps and layers, cut
at Otsu's threshold. In the decoder's self-attention each picture then sees, beside itself, the others' subject patches
(shared self-attention), some of which are left out at random so that layouts stay different (dropout); and in an early
part of the sampling its subject patches take over a share of what their best match in the others has (feature
injection). Two things are simpler than there: patches are matched by the layer's own hidden states, not by features of
a run before; and queries are not blended with those of such a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention as UNetAttention
from torch import Tensor
from torch.nn import functional as F

_BINS = 64  # of the histogram of Otsu's threshold


@dataclass(frozen=True)
class Sharing:
    """dropout: probability that a patch of another picture's subject is left out, drawn anew each step. injection: the
    share of a patch that its match replaces, in steps from `begin` to `end` (as shares of all)."""

    dropout: float = 0.5
    injection: float = 0.8
    begin: float = 0.1
    end: float = 0.5


class SubjectAttention:
    """Has the rows of a UNet's batch share a subject for a while, and leaves it as it was."""

    def __init__(self, unet: UNet2DConditionModel, sharing: Sharing):
        self.unet, self.settings = unet, sharing
        self.tokens: list[list[int]] = []
        self.steps, self.step = 1, -1
        self.heat: dict[int, Tensor] = {}  # by patches a side, the sum of maps [N, n]
        self.masks: dict[int, Tensor] = {}  # by patches a side, bool [N, n]; empty before the first step has looked
        self.seen: dict[int, Tensor] = {}  # the same with dropout, of this step
        self.numbers = torch.Generator()

    @contextmanager
    def shared(self, tokens: Sequence[Sequence[int]], steps: int, seed: int) -> Iterator[None]:
        """Within it, one sampling of so many steps: rows are N pictures of one subject, or N without text and N with.

        tokens: of each picture's prompt, the places of the words that name the subject.
        """
        self.tokens, self.steps, self.step = [list(one) for one in tokens], steps, -1
        self.heat, self.masks, self.seen = {}, {}, {}
        self.numbers.manual_seed(seed)
        before = self.unet.attn_processors
        ours = {
            name: (_SharedSelfAttention(self) if ".attn1." in name else _WatchedCrossAttention(self))
            for name in before
            if name.startswith("up_blocks.")
        }
        hook = self.unet.register_forward_pre_hook(self._next_step)
        self.unet.set_attn_processor(before | ours)
        try:
            yield
        finally:
            self.unet.set_attn_processor(before)
            hook.remove()

    def _next_step(self, *_: object) -> None:
        self.step += 1
        self.seen = {}
        if self.heat:
            side = max(self.heat)
            maps = [_resized(heat / heat.amax(1, keepdim=True).clamp_min(1e-8), side) for heat in self.heat.values()]
            subject = above_otsu(torch.stack(maps).mean(0))
            self.masks = {n: _resized(subject.float(), n) >= 0.5 for n in self.heat}

    def kept(self, side: int) -> Tensor | None:
        """The subject patches that others see in this step, bool [N, n]; None before it is known where they are."""
        if side not in self.masks:
            return None
        if side not in self.seen:
            mask = self.masks[side]
            drawn = torch.rand(mask.shape, generator=self.numbers).to(mask.device)
            self.seen[side] = mask & (drawn >= self.settings.dropout)
        return self.seen[side]

    @property
    def injects(self) -> bool:
        """Says whether features are injected in this step."""
        done = self.step / self.steps
        return self.settings.injection > 0 and self.settings.begin <= done < self.settings.end


class _SharedSelfAttention:
    """Self-attention of pictures that see each other's subject."""

    def __init__(self, subject: SubjectAttention):
        self.subject = subject

    def __call__(self, attn: UNetAttention, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        x, subject = hidden_states, self.subject
        q, k, v = (_heads(layer(x), attn.heads) for layer in (attn.to_q, attn.to_k, attn.to_v))
        pictures, side = len(subject.tokens), round(x.shape[1] ** 0.5)
        kept = subject.kept(side)
        if kept is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            rows = []
            for row in range(len(x)):
                group, own = row - row % pictures, row % pictures
                others = [(group + n, kept[n]) for n in range(pictures) if n != own]
                keys, values = (
                    torch.cat([of[row], *(of[other][:, patches] for other, patches in others)], 1) for of in (k, v)
                )
                rows.append(F.scaled_dot_product_attention(q[row], keys, values))
            out = torch.stack(rows)
        out = attn.to_out[0](out.transpose(1, 2).flatten(2))
        if kept is not None and subject.injects:
            out = injected(x[-pictures:], out, subject.masks[side], subject.settings.injection)
        return out


class _WatchedCrossAttention:
    """Cross-attention that notes where a picture looks at the words of its subject."""

    def __init__(self, subject: SubjectAttention):
        self.subject = subject

    def __call__(
        self, attn: UNetAttention, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: object, **__: object
    ) -> Tensor:
        subject = self.subject
        q = _heads(attn.to_q(hidden_states), attn.heads)
        k, v = (_heads(layer(encoder_hidden_states), attn.heads) for layer in (attn.to_k, attn.to_v))
        pictures, side = len(subject.tokens), round(q.shape[2] ** 0.5)
        weights = (q[-pictures:] @ k[-pictures:].transpose(-1, -2) * attn.scale).float().softmax(-1).mean(1)
        maps = torch.stack([one[:, places].mean(1) for one, places in zip(weights, subject.tokens, strict=True)])
        subject.heat[side] = subject.heat.get(side, torch.zeros_like(maps)) + maps
        out = F.scaled_dot_product_attention(q, k, v)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def injected(features: Tensor, out: Tensor, masks: Tensor, share: float) -> Tensor:
    """Moves the subject patches of what an attention gives towards their best match in the other pictures.

    features [N, n, c]: what patches are matched by (cosine); out [G N, n, c]: G batches of the same N pictures; masks:
    bool [N, n]. Only matches whose cosine is above Otsu's threshold of all are taken.
    """
    unit, pictures, result = F.normalize(features.float(), dim=-1), len(features), out.clone()
    for own in range(pictures):
        here = masks[own].nonzero()[:, 0]
        places = [(n, patch) for n in range(pictures) if n != own for patch in masks[n].nonzero()[:, 0].tolist()]
        if not len(here) or not places:
            continue
        picture, patch = torch.tensor(places, device=out.device).unbind(1)
        cosine, best = (unit[own, here] @ unit[picture, patch].T).max(1)
        good = above_otsu(cosine[None])[0]
        here, picture, patch = here[good], picture[best[good]], patch[best[good]]
        for first in range(0, len(out), pictures):
            mine, theirs = out[first + own, here], out[first + picture, patch]
            result[first + own, here] = torch.lerp(mine, theirs, share)
    return result


def above_otsu(values: Tensor) -> Tensor:
    """bool [r, n]: what of each row is above the threshold that separates it best into two classes (Otsu 1979); all of
    a row whose values are the same."""
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    scaled = (values - low) / (high - low).clamp_min(1e-12)
    bins = (scaled * (_BINS - 1)).long()
    counts = torch.zeros(len(values), _BINS, device=values.device).scatter_add_(1, bins, torch.ones_like(scaled))
    share = counts / counts.sum(1, keepdim=True)
    centres = torch.arange(_BINS, device=values.device).float()
    below, mean = share.cumsum(1), (share * centres).cumsum(1)
    between = (mean[:, -1:] * below - mean) ** 2 / (below * (1 - below)).clamp_min(1e-12)
    return (bins > between.argmax(1, keepdim=True)) | (high - low < 1e-6)


def _resized(maps: Tensor, side: int) -> Tensor:
    """[N, n] of square pictures at another number of patches a side."""
    square = maps.unflatten(1, (round(maps.shape[1] ** 0.5), -1))
    return F.interpolate(square[:, None], (side, side), mode="bilinear", antialias=True)[:, 0].flatten(1)


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, n, c] -> [B, heads, n, c / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)

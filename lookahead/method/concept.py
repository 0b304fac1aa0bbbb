"""A concept of anything from one picture: soft words, low-rank attention offsets, two attention paths.

After "Domain-Agnostic Tuning-Encoder for Fast Personalization of Text-To-Image Models" (arXiv 2307.06925), as far as
its abstract, figures and the encoder-for-tuning line of work (arXiv 2302.12228) say it. The paper's equations were not
to be had and its code is not public: formulas and constants here are this project's own.

One word stands for the concept in both text encoders of SDXL, so there are two soft words, v_L [768] and v_G [1280].
A dictionary of real words keeps them near language: one of the nearest is the concept's hard word, which the second,
plain attention path reads in its place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Attention, softmax_attention
from .schedule import TIMESTEPS

#: Ranges of time steps whose UNet features are standardised apart.
NOISE_BINS = 10
#: The time steps at which an encoder that reads the UNet looks at a picture; what it predicts there is averaged.
LOOKS = tuple(range(TIMESTEPS // 16, TIMESTEPS, TIMESTEPS // 8))
#: The projections of each attention that a concept changes.
PROJECTIONS = tuple(f"attn{n}.{layer}" for n in (1, 2) for layer in ("to_q", "to_k", "to_v"))

#: Real words that a concept notes as the nearest.
NEAR = 16

#: By "<diffusers path of the block>.attn1.to_q": A [..., rank, in] and B [..., out, rank].
Offsets = dict[str, tuple[Tensor, Tensor]]


# --- words


class Dictionary(NamedTuple):
    """Real words that a soft word may be near to. ids: int64 [words], the same in both tokenizers of SDXL; rows_l
    [words, 768], rows_g [words, 1280]: their rows in the two text encoders' tables; texts: as a prompt spells them."""

    ids: Tensor
    rows_l: Tensor
    rows_g: Tensor
    texts: tuple[str, ...]

    def directions(self) -> Tensor:
        """The words as points of unit length, [words, 2048] (`word_direction`)."""
        return word_direction(self.rows_l, self.rows_g)


def word_direction(word_l: Tensor, word_g: Tensor) -> Tensor:
    """Both halves of words [..., w_L] and [..., w_G] as one unit vector [..., w_L + w_G].

    Each half is brought to unit length, so that the product of two directions is the mean of their two cosines.
    """
    return torch.cat([F.normalize(word_l, dim=-1), F.normalize(word_g, dim=-1)], dim=-1) / 2**0.5


def nearest_words(word_l: Tensor, word_g: Tensor, dictionary: Dictionary, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k nearest real words of soft words [n, w_L], [n, w_G]: places in the dictionary int64 [n, k] and their
    cosines [n, k], nearest first. k is cut to the dictionary's length."""
    cosine = word_direction(word_l, word_g).detach() @ dictionary.directions().T
    values, places = cosine.topk(min(k, cosine.shape[1]), dim=1)
    return places, values


def word_contrast(
    word_l: Tensor,
    word_g: Tensor,
    dictionary: Dictionary,
    k: int = 1,
    temperature: float = 0.5,
    negatives: bool = True,
) -> Tensor:
    """The contrastive regulariser of the soft words of a batch, values [n].

    L_i = -log( P_i / (P_i + N_i) ), P_i = sum over the k nearest real words h of exp(v_i . h / tau), N_i = sum over
    the other concepts j of exp(v_i . v_j / tau), all of unit length (`word_direction`): with plain products the norm
    runs away. A pair whose nearest word is the same does not repel, since two things of one class should not. No
    gradient goes through the choice of neighbours. negatives=False leaves N_i to a constant 1: the pull alone.
    """
    v = word_direction(word_l, word_g)
    places, _ = nearest_words(word_l, word_g, dictionary, k)
    words = dictionary.directions()[places]  # [n, k, d]
    pull = torch.logsumexp((words @ v[:, :, None]).squeeze(-1) / temperature, dim=1)
    if negatives:
        push = v @ v.T / temperature
        push = push.masked_fill(places[:, :1] == places[:, 0], float("-inf"))  # itself too
    else:
        push = torch.zeros_like(pull)[:, None]
    return torch.logsumexp(torch.cat([pull[:, None], push], dim=1), dim=1) - pull


def word_logits(word_l: Tensor, word_g: Tensor, dictionary: Dictionary) -> Tensor:
    """Tells how near soft words [n, w_L], [n, w_G] are to the real ones, as logits [n, words]: cosine / tau.

    tau = 1 / (2 ln of the number of words), so that a word of cosine 1 stands out from a dictionary of any size.
    """
    tau = 1 / (2 * log(max(2, len(dictionary.ids))))
    return word_direction(word_l, word_g) @ dictionary.directions().T / tau


def word_verdict(logits: Tensor, losses: Tensor, elements: int) -> Tensor:
    """The cross entropy [n] of soft words' logits [n, k] for k real words to what the base says of these, by the mean
    squared errors [n, k] of the noise, of so many elements, that it predicts under each alone.

    Such an error is the negative log likelihood of a Gaussian, so the base believes in a word with softmax(-elements /
    2 x error) of its noise level (a diffusion classifier, arXiv 2303.16203). The error itself, expected over the words,
    does not do as a loss: where a soft word is sure of a wrong noun, its gradient is next to nothing.
    """
    believed = (-0.5 * elements * losses).softmax(-1)
    return -(believed * logits.log_softmax(-1)).sum(-1)


def norm_penalty(word_l: Tensor, word_g: Tensor, dictionary: Dictionary) -> Tensor:
    """Squared distance of the norms of soft words [n, ...] to the dictionary's mean norms, relative to these: [n].

    It acts from the first step on: the contrast leaves the norm free.
    """
    out = torch.zeros(len(word_l), device=word_l.device)
    for word, rows in ((word_l, dictionary.rows_l), (word_g, dictionary.rows_g)):
        mean = rows.norm(dim=-1).mean()
        out = out + (word.norm(dim=-1) / mean - 1).square()
    return out


def contrast_weight(step: int, steps: int, warmup: float = 0.2, ramp: float = 0.2) -> float:
    """The factor of the contrast at a step: 0 for a share `warmup` of the steps, then up to 1 over a share `ramp`.

    At full weight from the first step the term locks in whichever word happens to be near at the start.
    """
    return min(1.0, max(0.0, step / steps - warmup) / ramp) if ramp else float(step >= warmup * steps)


def contrast_neighbours(step: int, steps: int, first: int = 50, begin: float = 0.2, end: float = 0.6) -> int:
    """Counts the nearest words that pull at a step: `first` until a share `begin` of the steps, 1 from `end` on,
    falling in between: early choices stay open."""
    done = min(1.0, max(0.0, (step / steps - begin) / (end - begin)))
    return max(1, round(first ** (1 - done)))


# --- low-rank offsets and two paths


def low_rank(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The product B A x of each row's own matrices: x [rows, tokens, in], A [rows, rank, in], B [rows, out, rank] ->
    [rows, tokens, out]. Rows may share one A and B by `expand`."""
    return (x @ a.transpose(-1, -2)) @ b.transpose(-1, -2)


def dual_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    change: tuple[Tensor, Tensor, Tensor],
    hard: tuple[Tensor, Tensor],
    heads: int,
    blend: float | Tensor,
    attention: Attention = softmax_attention,
) -> Tensor:
    """Two attentions over one hidden state, blended: a Attn(q + dq, k + dk, v + dv) + (1 - a) Attn(q, k_hard, v_hard).

    q [rows, N, C], k, v [rows, M, C]: the base's projections of the hidden state and, in cross-attention, of the soft
    prompt; change: low-rank changes of the three; hard: keys and values of the plain path, of the hard prompt in
    cross-attention and k, v themselves in self-attention. blend a: a number, or [rows, 1, 1]; 1 is the concept alone, 0
    the base under the hard prompt, each bit for bit the one attention. The output projection comes after: it is linear.
    """
    if isinstance(blend, float | int) and blend == 0:
        return attention(q, *hard, heads)
    dq, dk, dv = change
    soft = attention(q + dq, k + dk, v + dv, heads)
    if isinstance(blend, float | int) and blend == 1:
        return soft
    return blend * soft + (1 - blend) * attention(q, *hard, heads)


@dataclass(frozen=True, eq=False)
class Concept:
    """A concept is what one picture has become.

    word_l [w_L], word_g [w_G]: the soft word; word, word_id: the hard one, which stays what it was on another
    checkpoint; offsets: A [rank, in], B [out, rank] by projection; blend: what it was tuned with; about: where it comes
    from.
    """

    word_l: Tensor
    word_g: Tensor
    word: str
    word_id: int
    offsets: Offsets
    blend: float = 0.25
    about: Mapping[str, str] = field(default_factory=dict)

    def rows(self, n: int, name: str) -> tuple[Tensor, Tensor] | None:
        """The offsets of one projection for n rows, without copies; None where the concept does not change it."""
        if name not in self.offsets:
            return None
        a, b = self.offsets[name]
        return a.expand(n, *a.shape), b.expand(n, *b.shape)


def near_words(concept: Concept) -> dict[int, str]:
    """The real words that a concept's soft word was nearest to when it was predicted, nearest first: token id -> text.
    Empty for concepts of files that do not say."""
    return {int(token): str(text) for token, text in json.loads(concept.about.get("near", "[]"))}


class Prediction(NamedTuple):
    """Soft words [n, w_L] and [n, w_G] are predicted of n pictures, and offsets A [n, rank, in], B [n, out, rank]."""

    word_l: Tensor
    word_g: Tensor
    offsets: Offsets


def concept_of(
    prediction: Prediction, dictionary: Dictionary, blend: float, about: Mapping[str, str], row: int = 0
) -> Concept:
    """One row of a prediction as a concept, on the CPU in 32 bit; its hard word is the nearest of the dictionary, and
    `about` names the NEAR nearest."""

    def kept(tensor: Tensor) -> Tensor:
        return tensor[row].detach().to("cpu", torch.float32, copy=True)

    word_l, word_g = kept(prediction.word_l), kept(prediction.word_g)
    places, _ = nearest_words(word_l[None], word_g[None], dictionary, NEAR)
    near = [(int(dictionary.ids[place]), dictionary.texts[place]) for place in places[0].tolist()]
    about = {**about, "near": json.dumps(near, ensure_ascii=False)}
    offsets = {name: (kept(a), kept(b)) for name, (a, b) in prediction.offsets.items()}
    return Concept(word_l, word_g, near[0][1], near[0][0], offsets, blend, about)


# --- the encoder


@dataclass(frozen=True)
class ConceptSizes:
    """Sizes of a concept encoder. The defaults are SDXL's with CLIP ViT-H/14.

    projections: name -> (in, out), none for an encoder of words alone; image_width: of the image encoder's features;
    unet_width: of the UNet's pooled features, 0 for none (SDXL's down half and middle have 7040); hidden: of the trunk;
    word_l, word_g: of the text encoders' words; rank: of the offsets; basis: how many matrices are mixed for each
    projection.
    """

    projections: Mapping[str, tuple[int, int]]
    image_width: int = 1280
    unet_width: int = 0
    hidden: int = 1280
    word_l: int = 768
    word_g: int = 1280
    rank: int = 4
    basis: int = 16


class ConceptEncoder(nn.Module):
    """One picture's features -> a soft word and low-rank offsets of the attention's projections.

    f = trunk(LN(image), LN(unet)); v = centre + head(f); A_m = sum_k c_A[m, k] Abar_m[k], B_m = sum_k c_B[m, k]
    Bbar_m[k] with c = Linear(f): a basis learned for each matrix, mixed by predicted coefficients. Training begins at
    the base model: c_B's layer starts at zero, so B is 0. `operations` supplies the Linear and LayerNorm classes.
    """

    centre_l: Tensor
    centre_g: Tensor
    unet_mean: Tensor
    unet_spread: Tensor

    def __init__(self, sizes: ConceptSizes, operations: ModuleType = nn):
        super().__init__()
        self.sizes, self.names = sizes, tuple(sizes.projections)
        width, k, r = sizes.image_width + sizes.unet_width, sizes.basis, sizes.rank
        self.norm_image = operations.LayerNorm(sizes.image_width)
        self.norm_unet = operations.LayerNorm(sizes.unet_width) if sizes.unet_width else None
        self.trunk = nn.Sequential(
            operations.Linear(width, sizes.hidden),
            nn.GELU(),
            operations.Linear(sizes.hidden, sizes.hidden),
            nn.GELU(),
        )
        self.head_l, self.head_g = (operations.Linear(sizes.hidden, w) for w in (sizes.word_l, sizes.word_g))
        self.coefficients_a, self.coefficients_b = (
            operations.Linear(sizes.hidden, len(self.names) * k) if self.names else None for _ in range(2)
        )
        self.register_buffer("centre_l", torch.zeros(sizes.word_l))
        self.register_buffer("centre_g", torch.zeros(sizes.word_g))
        if sizes.unet_width:
            self.register_buffer("unet_mean", torch.zeros(NOISE_BINS, sizes.unet_width))
            self.register_buffer("unet_spread", torch.ones(NOISE_BINS, sizes.unet_width))
        keys = [name.replace(".", "/") for name in self.names]  # the name of a parameter holds no dots
        self.basis_a = nn.ParameterDict(
            {
                key: nn.Parameter(torch.empty(k, r, i))
                for key, (i, _) in zip(keys, sizes.projections.values(), strict=True)
            }
        )
        self.basis_b = nn.ParameterDict(
            {
                key: nn.Parameter(torch.empty(k, o, r))
                for key, (_, o) in zip(keys, sizes.projections.values(), strict=True)
            }
        )

    @torch.no_grad()
    def reset(self, dictionary: Dictionary) -> ConceptEncoder:
        """Put the encoder where training begins: the mean of the dictionary's words, offsets of 0.

        Draws from torch's global generator.
        """
        self.centre_l.copy_(dictionary.rows_l.mean(0))
        self.centre_g.copy_(dictionary.rows_g.mean(0))
        for head in (self.head_l, self.head_g):
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
        if self.coefficients_a is not None and self.coefficients_b is not None:
            nn.init.normal_(self.coefficients_a.weight, std=0.01)
            nn.init.constant_(self.coefficients_a.bias, self.sizes.basis**-0.5)
            nn.init.zeros_(self.coefficients_b.weight)
            nn.init.zeros_(self.coefficients_b.bias)
        for a in self.basis_a.values():
            nn.init.normal_(a, std=a.shape[-1] ** -0.5)
        for b in self.basis_b.values():
            nn.init.normal_(b, std=self.sizes.rank**-0.5)
        return self

    @torch.no_grad()
    def measure(self, unet: Tensor, t: Tensor) -> None:
        """Note mean and spread of the UNet's features [n, unet_width] by bins of their time steps [n]: they speak of
        the noise level first. A bin with fewer than two rows takes those of all."""
        bins = self._bins(t)
        for n in range(NOISE_BINS):
            rows = unet[bins == n] if int((bins == n).sum()) > 1 else unet
            self.unet_mean[n], self.unet_spread[n] = rows.mean(0), rows.std(0) + 1e-4

    def standardised(self, unet: Tensor, t: Tensor) -> Tensor:
        """The UNet's features [n, unet_width] at time steps [n], without what all pictures have there (`measure`)."""
        bins = self._bins(t)
        return (unet - self.unet_mean[bins].to(unet)) / self.unet_spread[bins].to(unet)

    def _bins(self, t: Tensor) -> Tensor:
        return (t.long() * NOISE_BINS // TIMESTEPS).clamp(0, NOISE_BINS - 1).to(self.unet_mean.device)

    def forward(self, image: Tensor, unet: Tensor | None = None) -> Prediction:
        """image [n, image_width]: features of the concept's picture; unet [n, unet_width], already standardised for
        their noise level, where the encoder reads them. Raises ValueError where one is missing or not wanted."""
        if (unet is None) != (self.norm_unet is None):
            raise ValueError(
                f"the concept encoder reads {self.sizes.unet_width} features of the UNet, and was given "
                f"{'none' if unet is None else unet.shape[-1]}: give it what it was trained with"
            )
        parts = [self.norm_image(image)]
        if unet is not None and self.norm_unet is not None:
            parts.append(self.norm_unet(unet))
        features = self.trunk(torch.cat(parts, dim=-1))
        word_l = self.centre_l.to(features) + self.head_l(features)
        word_g = self.centre_g.to(features) + self.head_g(features)
        return Prediction(word_l, word_g, self._offsets(features))

    def _offsets(self, features: Tensor) -> Offsets:
        if self.coefficients_a is None or self.coefficients_b is None:
            return {}
        c_a, c_b = (
            layer(features).unflatten(-1, (len(self.names), self.sizes.basis))
            for layer in (self.coefficients_a, self.coefficients_b)
        )
        offsets = {}
        for m, name in enumerate(self.names):
            key = name.replace(".", "/")
            a, b = self.basis_a[key].to(c_a), self.basis_b[key].to(c_b)
            offsets[name] = (torch.einsum("nk,kri->nri", c_a[:, m], a), torch.einsum("nk,kor->nor", c_b[:, m], b))
        return offsets


def offset_penalty(offsets: Offsets) -> Tensor:
    """The squared norm of B A of each row, mean over the matrices: [n].

    Of the product, since A may grow as B shrinks; ||B A||^2 = trace((B^T B)(A A^T)) needs no product of full size.
    """
    parts = [
        ((b.transpose(-1, -2) @ b) * (a @ a.transpose(-1, -2))).sum((-1, -2)) for a, b in offsets.values()
    ]  # B^T B and A A^T are symmetric
    return torch.stack(parts).mean(0)


def average(predictions: Prediction) -> Prediction:
    """One prediction of several of the same picture (at several noise levels): means over the rows, n -> 1.

    A and B are averaged, which is the mean of the coefficients; it is not the mean of the products B A.
    """
    offsets = {name: (a.mean(0, keepdim=True), b.mean(0, keepdim=True)) for name, (a, b) in predictions.offsets.items()}
    return Prediction(predictions.word_l.mean(0, keepdim=True), predictions.word_g.mean(0, keepdim=True), offsets)

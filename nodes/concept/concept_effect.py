"""A concept in one pass of the host's UNet: each attention twice, with its offsets and without, and both blended.

    out = a Attn(soft; W + s B A) + (1 - a) Attn(hard; W)

The host's own layers project queries, keys and values: a patch before a cross-attention gives it the soft and the hard
prompt one after the other, and the replacement splits the keys and values again. So quantised weights and LoRAs hold,
and nothing is patched into a weight. It lives between KV injection, which each path of a self-attention goes through,
and the image prompt, which is added around a cross-attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...lookahead.method.attention import Attention, mask_on_tokens
from ...lookahead.method.concept import Offsets, dual_attention, low_rank
from ..conditioning.effect import ActiveEffect, CondEvaluation, Effect, Replacements, RunStart, UNetPass
from ..conditioning.rows import CondList, RowLayout, When
from ..conditioning.unet_blocks import BlockKey, host_attention

HARD = "lookahead_hard_prompt"  # ours in a CONDITIONING's dict: the context [n, tokens, C] of the plain path
ALL, CONDITIONAL = "all", "conditional only"
_READ = "lookahead_concept_read"  # ours in the options of a block, by attention
_LAYERS = ("to_q", "to_k", "to_v")


@dataclass(frozen=True, eq=False)
class ConceptEffect(Effect):
    """A concept on a MODEL.

    offsets: by projection; blocks: for the host's key of each transformer block that it changes, its path in diffusers;
    strength: factor of the offsets; blend: in [0, 1], 1 is the concept alone; rows: ALL or CONDITIONAL; mask: [masks,
    H, W] in [0, 1], where in the picture the concept acts, or None; when: the part of the sampling in which it acts.
    """

    offsets: Offsets
    blocks: Mapping[BlockKey, str]
    strength: float = 1.0
    blend: float = 1.0
    rows: str = ALL
    mask: Tensor | None = None
    when: When = field(default_factory=When)

    def begin(self, run: RunStart) -> ActiveConcept:
        def moved(tensor: Tensor, factor: float = 1.0) -> Tensor:
            return (tensor.to(run.device, torch.float32) * factor).to(run.dtype)

        offsets = {name: (moved(a), moved(b, self.strength)) for name, (a, b) in self.offsets.items()}
        mask = None if self.mask is None else self.mask.to(run.device)
        return ActiveConcept(replace(self, offsets=offsets, strength=1.0, mask=mask))


class ActiveConcept(ActiveEffect[ConceptEffect]):
    """A concept in one run, its offsets multiplied by their strength."""

    order = 50

    def evaluate(self, evaluation: CondEvaluation) -> dict[Any, Tensor]:
        """The hard prompts of the conditions that have one, by the condition's uuid."""
        return hard_prompts(evaluation.conds)

    @classmethod
    def cross_attentions(
        cls, acting: Sequence[ActiveConcept], unet_pass: UNetPass, attn2: Replacements
    ) -> Replacements:
        hard = {}
        for active in acting:
            hard |= unet_pass.evaluated.get(active) or {}
        concepts = _concepts(acting, unet_pass)
        own = _free_blocks(concepts, unet_pass)
        read = HardRows(hard, unet_pass.layout, unet_pass.options)
        soft_alone = all(c.effect.blend == 1 and not c.varies for c in concepts)
        hard_alone = all(c.effect.blend == 0 for c in concepts)
        note_inputs(unet_pass.options, own, None if soft_alone else read, instead=hard_alone)
        for key in own:
            terms = [c for c in concepts if key in c.effect.blocks]
            attn2[key] = cross_attention(key, attn2.get(key, attn2.get(key[:2])), terms, unet_pass.once)
        return attn2

    @classmethod
    def self_attentions(cls, acting: Sequence[ActiveConcept], unet_pass: UNetPass, attn1: Replacements) -> Replacements:
        concepts = _concepts(acting, unet_pass)
        for key in _free_blocks(concepts, unet_pass):
            terms = [c for c in concepts if key in c.effect.blocks]
            attn1[key] = self_attention(key, attn1.get(key, attn1.get(key[:2])), terms, unet_pass.once)
        return attn1


def _concepts(acting: Sequence[ActiveConcept], unet_pass: UNetPass) -> list[ConceptTerm]:
    terms = [ConceptTerm(active.effect, unet_pass.layout) for active in acting]
    if any(term.missing for term in terms):
        unet_pass.once(
            "another node cuts the picture into tiles, which a concept with a mask cannot follow: it is left out."
        )
    return [term for term in terms if not term.missing]


def _free_blocks(concepts: Sequence[ConceptTerm], unet_pass: UNetPass) -> list[BlockKey]:
    """The blocks of these concepts whose attentions no other node has replaced."""
    keys = list(dict.fromkeys(key for concept in concepts for key in concept.effect.blocks))
    others = [unet_pass.options.get("patches_replace", {}).get(name, {}) for name in ("attn1", "attn2")]
    taken = [key for key in keys if any(key in other or key[:2] in other for other in others)]
    if taken:
        unet_pass.once(
            f"another node replaces attentions of {len(taken)} of {len(keys)} blocks: these run without the concept."
        )
    return [key for key in keys if key not in taken]


class ConceptTerm:
    """One concept laid out for the rows of one UNet pass. Lives as long as the pass.

    varies: its share is another in every row or pixel; missing: the pass could not be laid out (a mask over tiles).
    """

    def __init__(self, effect: ConceptEffect, layout: RowLayout):
        self.effect, self.rows = effect, layout.rows
        self.mask = None if effect.mask is None else layout.mask(effect.mask)
        self.missing = effect.mask is not None and self.mask is None
        self._acts = None
        if effect.rows == CONDITIONAL:
            acts = [conditional for _, conditional in layout]
            self._acts = None if all(acts) else torch.tensor(acts)
        self.varies = self._acts is not None or self.mask is not None

    def share(self, q: Tensor, grid: tuple[int, int]) -> float | Tensor | None:
        """The blend: a number, or [rows, 1 or tokens, 1]; None where the rows of `q` cannot be told apart."""
        if not self.varies:
            return self.effect.blend
        tiles, rest = divmod(q.shape[0], self.rows)
        if rest or tiles == 0 or (self.mask is not None and (tiles != 1 or q.shape[1] != grid[0] * grid[1])):
            return None
        share = torch.full((self.rows, 1, 1), self.effect.blend, dtype=q.dtype, device=q.device)
        if self._acts is not None:
            share = share * self._acts.to(q).view(-1, 1, 1)
        if self.mask is not None:
            share = share * mask_on_tokens(self.mask.to(q.device), *grid).to(q.dtype)
        return share.repeat_interleave(tiles, dim=0)

    def changes(self, path: str, read: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The low-rank changes of queries, keys and values, of what these were projected from."""
        out = []
        for layer, x in zip(_LAYERS, read, strict=True):
            pair = self.effect.offsets.get(f"{path}.{layer}")
            out.append(x.new_zeros(()) if pair is None else low_rank(x, *(_ordinary(m.to(x)) for m in pair)))
        return tuple(out)


def _ordinary(tensor: Tensor) -> Tensor:
    """A tensor that was made in inference mode cannot be saved for a gradient."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


def blended(
    terms: Sequence[ConceptTerm],
    paths: Sequence[str],
    qkv: tuple[Tensor, Tensor, Tensor],
    plain: tuple[Tensor, Tensor],
    read: tuple[Tensor, Tensor, Tensor],
    shares: Sequence[float | Tensor],
    heads: int,
    attention: Attention,
) -> Tensor:
    """The attention with each concept by its share, and the plain one by what is left."""
    if len(terms) == 1:
        return dual_attention(*qkv, terms[0].changes(paths[0], read), plain, heads, shares[0], attention)
    q, k, v = qkv
    out: Tensor | float = 0.0
    left: Tensor | float = 1.0
    for term, path, share in zip(terms, paths, shares, strict=True):
        dq, dk, dv = term.changes(path, read)
        out = out + share * attention(q + dq, k + dk, v + dv, heads)
        left = left - share
    return out + left * attention(q, *plain, heads)


def self_attention(
    key: BlockKey, inner: Callable | None, terms: Sequence[ConceptTerm], once: Callable[[str], None]
) -> Callable:
    """The replacement of one self-attention, around what stands there (KV injection) or the plain one."""
    paths = [f"{term.effect.blocks[key]}.attn1" for term in terms]

    def replacement(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        attention, heads = _inner(inner, extra), extra["n_heads"]
        x, context, value = extra.get(_READ, {}).get("attn1", (None, None, None))
        shares = [term.share(q, tuple(extra["activations_shape"][-2:])) for term in terms]
        if x is None or x.shape[:2] != q.shape[:2] or None in _kinds(shares):
            once(_RESHAPED)
            return attention(q, k, v, heads)
        return blended(terms, paths, (q, k, v), (k, v), (x, context, value), shares, heads, attention)

    return replacement


def cross_attention(
    key: BlockKey, inner: Callable | None, terms: Sequence[ConceptTerm], once: Callable[[str], None]
) -> Callable:
    """The replacement of one cross-attention, whose keys are those of the soft and then of the hard prompt."""
    paths = [f"{term.effect.blocks[key]}.attn2" for term in terms]

    def replacement(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        attention, heads = _inner(inner, extra), extra["n_heads"]
        x, context, value = extra.get(_READ, {}).get("attn2", (None, None, None))
        if x is None:
            once(_RESHAPED)
            return attention(q, k, v, heads)
        tokens = context.shape[1]
        doubled = k.shape[1] == 2 * tokens
        (k, v), plain = (
            ((k[:, :tokens], v[:, :tokens]), (k[:, tokens:], v[:, tokens:])) if doubled else ((k, v), (k, v))
        )
        shares = [term.share(q, tuple(extra["activations_shape"][-2:])) for term in terms]
        if x.shape[:2] != q.shape[:2] or None in _kinds(shares):
            once(_RESHAPED)
            return attention(q, k, v, heads)
        return blended(terms, paths, (q, k, v), plain, (x, context, value), shares, heads, attention)

    return replacement


_RESHAPED = (
    "another node reshapes the tokens of some attentions in a way that a concept cannot follow: these run without it."
)


def _kinds(shares: Sequence[float | Tensor | None]) -> list[object]:
    return [None if share is None else type(share) for share in shares]


def _inner(inner: Callable | None, extra: dict[str, Any]) -> Attention:
    if inner is None:
        return host_attention(extra)
    return lambda q, k, v, heads: inner(q, k, v, extra)


# -- the hard prompt


def hard_prompts(conds: Sequence[CondList | None]) -> dict[Any, Tensor]:
    """The hard prompts of condition lists by uuid, each as long as its own soft prompt.

    What another node has put behind the text (ConditioningConcat) stands behind the hard one too.
    """
    found = {}
    for cond in (c for conds_ in conds if conds_ is not None for c in conds_):
        hard, text = cond.get(HARD), cond.get("model_conds", {}).get("c_crossattn")
        if hard is None or text is None:
            continue
        soft = text.cond
        if soft.shape[1] > hard.shape[1]:
            hard = torch.cat([hard.to(soft).expand(len(soft), -1, -1), soft[:, hard.shape[1] :]], 1)
        if soft.shape[1] == hard.shape[1] and soft.shape[2] == hard.shape[2]:
            found[cond["uuid"]] = hard
    return found


class HardRows:
    """The hard context of every row of a pass; rows of a text without one read their own text."""

    def __init__(self, hard: Mapping[Any, Tensor], layout: RowLayout, options: Mapping[str, Any]):
        self._hard, self._layout = hard, layout
        self._uuids = options.get("uuids") or [None] * len(options.get("cond_or_uncond") or [0])
        self._made: Tensor | None = None

    def of(self, soft: Tensor) -> Tensor | None:
        """The hard context for the soft one [rows, tokens, C]; None where all rows read their own text."""
        layout, texts = self._layout, [self._hard.get(uuid) for uuid in self._uuids]
        if all(text is None for text in texts) or len(soft) != layout.rows:
            return None
        if self._made is None or self._made.shape != soft.shape or self._made.dtype != soft.dtype:
            rows = []
            for n in range(layout.rows):
                chunk, place = divmod(n, len(layout.pictures))
                text, image = texts[chunk % len(texts)], layout.pictures[place]
                if text is None or soft.shape[1] % text.shape[1]:
                    rows.append(soft[n])
                else:  # the host repeats texts to one length
                    rows.append(text[image % len(text)].to(soft).repeat(soft.shape[1] // text.shape[1], 1))
            self._made = torch.stack(rows)
        return self._made


def note_inputs(
    options: dict[str, Any], blocks: Sequence[BlockKey], hard: HardRows | None, instead: bool = False
) -> None:
    """Patch a pass's options: every attention of these blocks keeps what its projections read, and the cross-attentions
    read the hard prompt behind the soft one, or in its place (`instead`: the base under the hard prompt, to the bit).

    Ours come last, so that no other patch sees the longer text.
    """
    ours = set(blocks)

    def note(attention: str) -> Callable:
        def patch(n: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
            if (*extra["block"], extra["block_index"]) not in ours:
                return n, context, value
            extra.setdefault(_READ, {})[attention] = (n, context, value)
            other = hard.of(context) if hard is not None and attention == "attn2" else None
            if other is None:
                return n, context, value
            if instead:
                return n, other, other
            return n, torch.cat([context, other], 1), torch.cat([value, other], 1)

        return patch

    patches = dict(options.get("patches", {}))
    for attention in ("attn1", "attn2"):
        name = f"{attention}_patch"
        patches[name] = [*patches.get(name, []), note(attention)]
    options["patches"] = patches


def total_share(effects: Sequence[ConceptEffect]) -> float:
    """The largest sum of the blends of concepts in any place of the picture; more than 1 leaves nothing to blend "
    "with."""
    total: Tensor | float = 0.0
    for effect in effects:
        share: Tensor | float = effect.blend
        if effect.mask is not None:
            share = effect.blend * mask_on_tokens(effect.mask.float().cpu(), 32, 32).amax(0)
        total = total + share
    return float(total.max()) if isinstance(total, Tensor) else math.fsum([total])

"""One UNet in three roles: denoiser, KV encoder, shortcut model (arXiv 2404.03620, sections 4.1 to 4.3).

Four UNets are resident in the paper's code; here all roles share one. What a pass does is written in one frozen object
(`Pass`), and nothing else changes from role to role: no weight, no requires_grad, no flag of a layer. So a pass that is
repeated in backward, as checkpointing does it, only has to find its own `Pass` again, and `SharedUNet` sees to that.
(The public switching calls of peft lose gradients in silence there: they switch requires_grad along with the activity.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention as UNetAttention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..lookahead.method.attention import (
    Attention,
    decoupled_cross_attention,
    extended_self_attention,
    image_prompt_term,
    softmax_attention,
)
from ..lookahead.method.kv_encoder import KVEncoder
from .concept import ConceptRows
from .encoder import Encoder, ImagePromptKV, KeysValues, block_paths
from .lora import LoRA

CHECKPOINTING = ("none", "blocks", "all")
_FUNCTION = "_gradient_checkpointing_func"  # of diffusers' modules


@dataclass(frozen=True, eq=False)
class Condition:
    """The UNet reads a condition beside the latent: text [B, 77, context], pooled text [B, p], time ids [B, 6]."""

    context: Tensor
    pooled: Tensor
    time_ids: Tensor

    @property
    def added(self) -> dict[str, Tensor]:
        """diffusers takes these beside the text's context (`added_cond_kwargs`)."""
        return {"text_embeds": self.pooled, "time_ids": self.time_ids}

    def rows(self, chosen: slice) -> Condition:
        """Some of the rows."""
        return Condition(self.context[chosen], self.pooled[chosen], self.time_ids[chosen])

    @staticmethod
    def stacked(conditions: Sequence[Condition], n: int) -> Condition:
        """Conditions of one or n rows as one batch: n rows of each, one after another."""
        names = ("context", "pooled", "time_ids")
        return Condition(*(rows_of_each([getattr(c, name) for c in conditions], n) for name in names))

    def where(self, keep: Tensor) -> Condition:
        """Takes the text away (zero embeddings, zero pooled text) where keep, bool [B], is false."""
        return replace(self, context=self.context * keep.view(-1, 1, 1), pooled=self.pooled * keep.view(-1, 1))


class TextRead(NamedTuple):
    """A cross-attention asks by queries [B, positions, width] for the text's keys [B, 77, width]."""

    queries: Tensor
    keys: Tensor
    heads: int


@dataclass(frozen=True, eq=False)
class Pass:
    """A pass says what the UNet does, the same in forward and in the recomputation of backward.

    exported: where the KV encoder puts keys and values; None: the pass predicts noise. image_prompt: by path of a
    block, what its cross-attention reads beside the text, with `image_prompt_scale`; kv: the reference's keys and
    values, by path; absent: bool [B], samples that do without these; shortcut: scale of the few-step LoRA, a number or
    one for each sample; concept: of a concept (arXiv 2307.06925), which lives beside all of these. reads: where the
    cross-attentions put what they ask the text, by path.
    """

    exported: KeysValues | None = None
    image_prompt: ImagePromptKV | None = None
    image_prompt_scale: float = 1.0
    kv: KeysValues | None = None
    absent: Tensor | None = None
    shortcut: float | Tensor = 0.0
    concept: ConceptRows | None = None
    reads: dict[str, TextRead] | None = None


PLAIN = Pass()


class SharedUNet:
    """A UNet that predicts noise with an encoder's help, exports keys and values, and takes the shortcut.

    `inject` gives it our attention, `eject` leaves it as it was, bit for bit; where it is not injected it predicts as
    the plain UNet. attention: see `lookahead.method.attention`.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        encoder: Encoder | None = None,
        shortcut: LoRA | None = None,
        attention: Attention = softmax_attention,
    ):
        self.unet, self.encoder, self.shortcut, self.attention = unet, encoder, shortcut, attention
        self.now = PLAIN

    def inject(self, checkpointing: str = "none") -> SharedUNet:
        """checkpointing: what is computed again in backward instead of being kept: "none", "blocks" (the transformer
        blocks, which keep most and cost least), or "all" (residual blocks too)."""
        if checkpointing not in CHECKPOINTING:
            raise ValueError(f"checkpointing is {checkpointing!r}: use one of {', '.join(CHECKPOINTING)}.")
        self._before = self.unet.attn_processors
        processors: dict[str, _Processor] = {
            f"{path}.attn1.processor": _SelfAttention(self, path) for path in block_paths(self.unet)
        }
        processors |= {f"{path}.attn2.processor": _CrossAttention(self, path) for path in block_paths(self.unet)}
        self.unet.set_attn_processor(processors)
        self._stop = _after_the_last_block(self.unet).register_forward_pre_hook(self._stop_export)
        if self.shortcut is not None:
            self.shortcut.attach(self.unet).scale = 0.0
        self._flags = [
            (m, {k: v for k, v in vars(m).items() if "gradient_checkpointing" in k})
            for m in self.unet.modules()
            if hasattr(m, "gradient_checkpointing")
        ]
        for module, _ in self._flags:
            module.gradient_checkpointing = checkpointing == "all" or (
                checkpointing == "blocks" and isinstance(module, Transformer2DModel)
            )
            setattr(module, _FUNCTION, self._checkpoint)
        return self

    def eject(self) -> UNet2DConditionModel:
        """Undo `inject`."""
        self.unet.set_attn_processor(self._before)
        self._stop.remove()
        if self.shortcut is not None:
            self.shortcut.detach()
        for module, before in self._flags:
            vars(module).pop(_FUNCTION, None)
            vars(module).update(before)
        return self.unet

    def export(self, x: Tensor, t: Tensor, condition: Condition) -> KeysValues:
        """KV encoder: a noised reference [B, 4, h, w] at t [B] -> keys and values of all self-attentions.

        The UNet stops after the last of them.
        """
        exported: KeysValues = {}
        try:
            self._run(Pass(exported=exported), x, t, condition)
        except _Exported:
            return exported
        raise RuntimeError("the UNet has no layer after its last attention: it is not SDXL's")

    def predict(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        image_prompt: ImagePromptKV | None = None,
        kv: KeysValues | None = None,
        absent: Tensor | None = None,
        shortcut: float | Tensor = 0.0,
        image_prompt_scale: float = 1.0,
        concept: ConceptRows | None = None,
        reads: dict[str, TextRead] | None = None,
    ) -> Tensor:
        """Denoiser, and shortcut model where `shortcut` (a number, or [B]) is above 0: the predicted noise
        [B, 4, h, w]. The other arguments are those of `Pass`."""
        now = Pass(None, image_prompt, image_prompt_scale, kv, absent, shortcut, concept, reads)
        return self._run(now, x, t, condition)

    @contextmanager
    def using(self, encoder: Encoder) -> Iterator[None]:
        """Computes with another encoder of the same sizes for a while, such as an average of this one."""
        before, self.encoder = self.encoder, encoder
        try:
            yield
        finally:
            self.encoder = before

    def _run(self, now: Pass, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with self._during(now):
            return self.unet(x, t, condition.context, added_cond_kwargs=condition.added).sample

    @contextmanager
    def _during(self, now: Pass) -> Iterator[None]:
        before, self.now = self.now, now
        try:
            with nullcontext() if self.shortcut is None else self.shortcut.at(now.shortcut):
                yield
        finally:
            self.now = before

    def _checkpoint(self, module: nn.Module, *inputs: object) -> object:
        again = self.now
        if again.exported is not None:
            again = replace(again, exported={})  # what was handed on must not be replaced by its recomputed double
        if again.reads is not None:
            again = replace(again, reads={})
        return checkpoint(
            module.__call__,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=False,  # a frozen UNet in evaluation mode draws nothing
            context_fn=lambda: (nullcontext(), self._during(again)),
        )

    def _stop_export(self, *_: object) -> None:
        if self.now.exported is not None:
            raise _Exported


def rows_of_each(parts: Sequence[Tensor], n: int) -> Tensor:
    """Tensors of one or n rows as one batch: n rows of each, one after another."""
    return torch.cat([part.expand(n, *part.shape[1:]) for part in parts])


def joined(parts: Sequence[KeysValues | None], n: int) -> KeysValues | None:
    """Keys and values of one or n rows as one batch, n rows of each; None where all are.

    Raises ValueError where some are None and some are not.
    """
    whole = [part for part in parts if part is not None]
    if not whole:
        return None
    if len(whole) < len(parts):
        raise ValueError(
            "Only some of the predictions have the reference's keys and values: give all of them, or none."
        )

    def rows(path: str, i: int) -> Tensor:
        return rows_of_each([part[path][i] for part in whole], n)

    return {path: (rows(path, 0), rows(path, 1)) for path in whole[0]}


class _Exported(Exception):
    """All keys and values are there. Raised outside of every checkpointed part."""


def _after_the_last_block(unet: UNet2DConditionModel) -> nn.Module:
    for number in reversed(range(len(unet.up_blocks))):
        if getattr(unet.up_blocks[number], "has_cross_attention", False):
            following = unet.up_blocks[number + 1 :]
            return following[0] if len(following) else unet.conv_norm_out
    return unet.conv_norm_out


class _Processor:
    """An attention of one block, as the pass that is under way wants it."""

    def __init__(self, shared: SharedUNet, path: str):
        self.shared, self.path = shared, path

    @property
    def _kv(self) -> KVEncoder:
        if self.shared.encoder is None:
            raise RuntimeError("keys and values are exported with an encoder, and this UNet has none")
        return self.shared.encoder.kv

    def _tuned(self, attn: UNetAttention, name: str, x: Tensor, context: Tensor) -> Tensor:
        """The KV encoder's own attention."""

        def tuned(layer: str, of: Tensor) -> Tensor:
            projected = attn.get_submodule(layer)(of)
            return self._kv.tuned(self.path, f"{name}.{layer}", projected, of)

        q, k, v = tuned("to_q", x), tuned("to_k", context), tuned("to_v", context)
        return tuned("to_out.0", self.shared.attention(q, k, v, attn.heads))


class _SelfAttention(_Processor):
    @torch.compiler.disable  # what it reads is another in every block, and would make a graph of its own for each
    def __call__(self, attn: UNetAttention, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        now, attention, x = self.shared.now, self.shared.attention, hidden_states
        if now.exported is not None:
            kv = self._kv
            # Projected once more for the pass itself: two products with W in backward, of which the bits of a training
            # run depend, where one projection would add the gradients first.
            now.exported[self.path] = (
                kv.exported(self.path, "attn1.to_k", attn.to_k(x), x),
                kv.exported(self.path, "attn1.to_v", attn.to_v(x), x),
            )
            return self._tuned(attn, "attn1", x, x)
        q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        inner = attention if now.kv is None else self._extended(now, now.kv[self.path])
        if now.concept is None:
            out = inner(q, k, v, attn.heads)
        else:
            out = now.concept.attend(f"{self.path}.attn1", (q, k, v), (x, x, x), (k, v), attn.heads, inner)
        return attn.to_out[0](out)

    def _extended(self, now: Pass, kv: tuple[Tensor, Tensor]) -> Attention:
        """An attention that also reads the reference's keys and values."""

        def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
            return extended_self_attention(q, k, v, *kv, heads, now.absent, self.shared.attention)

        return attention


class _CrossAttention(_Processor):
    @torch.compiler.disable
    def __call__(
        self, attn: UNetAttention, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: object, **__: object
    ) -> Tensor:
        now, attention = self.shared.now, self.shared.attention
        if now.exported is not None:
            return self._tuned(attn, "attn2", hidden_states, encoder_hidden_states)
        q, k, v = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        if now.reads is not None:
            now.reads[self.path] = TextRead(q, k, attn.heads)
        if now.concept is not None:
            out = self._with_concept(now.concept, attn, hidden_states, encoder_hidden_states, (q, k, v))
            if now.image_prompt is not None:
                prompt = now.image_prompt(self.path)
                out = out + image_prompt_term(q, *prompt, attn.heads, now.image_prompt_scale, attention=attention)
        elif now.image_prompt is None:
            out = attention(q, k, v, attn.heads)
        else:
            prompt, scale = now.image_prompt(self.path), now.image_prompt_scale
            out = decoupled_cross_attention(q, k, v, *prompt, attn.heads, scale, attention=attention)
        return attn.to_out[0](out)

    def _with_concept(
        self, concept: ConceptRows, attn: UNetAttention, x: Tensor, soft: Tensor, qkv: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """Both paths to the text: the soft prompt with the concept's weights, the hard one with the base's."""
        plain = qkv[1:] if concept.hard is None else (attn.to_k(concept.hard), attn.to_v(concept.hard))
        read = (x, soft, soft)
        return concept.attend(f"{self.path}.attn2", qkv, read, plain, attn.heads, self.shared.attention)

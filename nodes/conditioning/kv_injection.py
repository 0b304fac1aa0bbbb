"""The effect of KV injection: self-attentions also read the keys and values of a reference pass."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ...lookahead.method.layer_weights import share_of
from . import self_attention
from .effect import ActiveEffect, CondEvaluation, Effect, EstimatedRows, Replacements, RunStart, UNetPass
from .reference_pass import SHARED, KVSource, ReferencePass, renewed
from .rows import When

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher

    from ..reference.kv_cache import KVByRole
    from .unet_blocks import BlockKey


class EvaluatedKV(NamedTuple):
    """An evaluation of conditions reads these of a reference: its keys and values, and the weight's factor now."""

    kv: KVByRole
    factor: float


@dataclass(frozen=True, eq=False)
class KVInjection(Effect):
    """The KV injection of one subject on a MODEL.

    source: what is read and exported; weight: how far the plain output of a self-attention moves to the extended one,
    1 all the way, negative away from it; mask: [masks, H, W] in [0, 1], where in the picture the reference is read, or
    None; when: the part of the sampling in which it acts; layers: factors of the weight in some blocks; adain: one of
    `self_attention.ADAIN`.
    """

    source: KVSource
    weight: float = 1.0
    mask: Tensor | None = None
    when: When = field(default_factory=When)
    layers: Mapping[BlockKey, float] = field(default_factory=dict)
    adain: str = self_attention.NO_ADAIN

    def additional_models(self) -> tuple[ModelPatcher, ...]:
        return () if self.source.kv_patcher is None else (self.source.kv_patcher,)

    @classmethod
    def estimated_rows(
        cls, effects: Sequence[KVInjection], model: BaseModel, noise_shape: Sequence[int]
    ) -> EstimatedRows:
        dtype = model.get_dtype_inference()
        a_row = max(model.memory_required([1, *noise_shape[1:]]), 1)
        kept = evaluated = 0
        for source in (injection.source for injection in effects):
            pictures, _, *size = source.subject.latents.shape
            shared = source.noise == SHARED and tuple(size) == tuple(noise_shape[-2:])
            images = noise_shape[0] if shared else 1
            kept += 2 * images * (source.numel_per_row() * dtype.itemsize + source.bytes_per_row(dtype.itemsize))
            area = math.prod(size) / math.prod(noise_shape[-2:])
            evaluated = max(evaluated, math.ceil(images * pictures * area))
        return EstimatedRows(math.ceil(kept / a_row), evaluated)

    def renewals(self, sigmas: Tensor, sampling: Any) -> list[tuple[float, float]]:
        """For each step in which it acts, (its noise level, that of the reference it reads); empty for its own."""
        every = range(len(sigmas) - 1) if self.source.renew > 1 else ()
        acting = [n for n in every if self.when.acts(sigmas[n], sampling)]
        if not acting:
            return []
        levels = [float(sigmas[n]) for n in (*acting, acting[-1] + 1)]
        return renewed(levels, self.source.renew, lambda sigma: share_of(sigma, sampling.percent_to_sigma))

    def begin(self, run: RunStart) -> ActiveKVInjection:
        mask = None if self.mask is None else self.mask.to(run.device)
        renewals = self.renewals(run.sigmas, run.patcher.get_model_object("model_sampling"))
        reference_pass = ReferencePass(self.source, run.patcher, run.noise, run.seed, renewals)
        return ActiveKVInjection(replace(self, mask=mask), reference_pass)


class ActiveKVInjection(ActiveEffect[KVInjection]):
    """A KV injection in one run, with its reference pass.

    It replaces a self-attention where no other node does, and is the innermost of our effects.
    """

    order = 0

    def __init__(self, effect: KVInjection, reference_pass: ReferencePass):
        super().__init__(effect)
        self.reference_pass = reference_pass

    def prefetch(
        self, model: BaseModel, timestep: Tensor, roles: Collection[bool], active: tuple[ActiveEffect, ...]
    ) -> None:
        self._keys_values(model, timestep, roles, active)

    def evaluate(self, evaluation: CondEvaluation) -> EvaluatedKV:
        """The reference's keys and values at this noise level, for the roles that are evaluated."""
        kv = self._keys_values(evaluation.model, evaluation.timestep, evaluation.roles, evaluation.active)
        return EvaluatedKV(kv, self.effect.when.factor(evaluation.timestep, evaluation.model.model_sampling))

    def _keys_values(
        self, model: BaseModel, timestep: Tensor, roles: Collection[bool], active: tuple[ActiveEffect, ...]
    ) -> KVByRole:
        passes = [other.reference_pass for other in active if isinstance(other, ActiveKVInjection)]
        return self.reference_pass.keys_values(model, timestep, set(roles), {p.signature(model) for p in passes})

    @classmethod
    def self_attentions(
        cls, acting: Sequence[ActiveKVInjection], unet_pass: UNetPass, attn1: Replacements
    ) -> Replacements:
        references = []
        for active in acting:
            evaluated = unet_pass.evaluated.get(active)
            if evaluated is not None:  # else this pass belongs to no evaluation of conditions
                injection = active.effect
                blocks = injection.source.blocks
                weights = {
                    block.key: injection.weight * evaluated.factor * injection.layers.get(block.key, 1.0)
                    for block in blocks
                }
                references.append(
                    self_attention.KVRows(
                        evaluated.kv, unet_pass.layout, blocks, weights, injection.mask, injection.adain
                    )
                )
        return self_attention.replacements(references, attn1, unet_pass.once) if references else attn1

    def summary(self) -> str | None:
        return self.reference_pass.summary()

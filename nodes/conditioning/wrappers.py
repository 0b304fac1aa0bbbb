"""How the pack lives in the host's sampling: wrappers around a run, a model call, an evaluation and a UNet pass.

A MODEL carries an `EffectContext` in `transformer_options["lookahead"]`, and wrappers, plain functions without state.
What a wrapper finds out travels onward in copies of that context; nothing is stored on an object that another branch of
the graph could see, and no object is changed once it is registered. What lives as long as a run (`SamplingRun`) is made
when the run begins and dropped with it. No effect is named here: `effect` says what is asked of one, and when.

PREPARE_SAMPLING  once a run: the host's memory estimate learns of what the effects take
OUTER_SAMPLE      once a run: effects become active, with their tensors on the model's device and in its precision
PREDICT_NOISE     once a model call: the guider's condition lists, and which effects act at this noise level
CALC_COND_BATCH   the role (conditional or not) of each condition list, the area of each condition, and what the acting
                  effects will read in the passes of this evaluation
APPLY_MODEL       what each row of this batch is, and the effects' replacements of the attentions
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from .effect import ActiveEffect, CondEvaluation, Effect, EstimatedRows, Replacements, RunStart, UNetPass
from .rows import Area, CondBatch, CondList, RowLayout, conditional_roles, pictures_of

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher

KEY = "lookahead"  # ours in transformer_options, of our wrappers and of our additional models
COMPILED = "torch.compile"  # the host's key of the wrapper that runs a compiled UNet

T = TypeVar("T")


@dataclass
class SamplingRun:
    """The state of one run of the host, dropped when it ends.

    active: its effects, in the order of their nodes; logged: the warnings of this run, so that each is given once.
    """

    active: tuple[ActiveEffect, ...]
    logged: set[str] = field(default_factory=set)

    def once(self, text: str) -> None:
        """Log a warning, the first time in this run."""
        if text not in self.logged:
            self.logged.add(text)
            logging.warning("[LCM-Lookahead] %s", text)


@dataclass(frozen=True, eq=False)
class ModelCall:
    """One call of the guider: the run, its condition lists by name, and the effects that act at its noise level."""

    run: SamplingRun
    conds: Mapping[str, CondList]
    acting: tuple[ActiveEffect, ...]


@dataclass(frozen=True, eq=False)
class EffectContext:
    """The value of `transformer_options["lookahead"]`; each wrapper adds its part in a copy.

    The host copies the dicts around it and hands the object itself on: clones of a MODEL share it.

    effects: of the MODEL, in the order of their nodes (add_effect);
    run: since the run has begun (OUTER_SAMPLE);
    call: since the guider was called, None where no effect acts (PREDICT_NOISE);
    batch, evaluated: since conditions are evaluated (CALC_COND_BATCH): their roles and areas, and what each acting
        effect's `evaluate` gave.
    """

    effects: tuple[Effect, ...] = ()
    run: SamplingRun | None = None
    call: ModelCall | None = None
    batch: CondBatch | None = None
    evaluated: Mapping[ActiveEffect, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model_options: Mapping[str, Any]) -> Self:
        """The context that model options carry; an empty one where there is none."""
        return cls.of_pass(model_options.get("transformer_options", {}))

    @classmethod
    def of_pass(cls, transformer_options: Mapping[str, Any]) -> Self:
        """The context that transformer options carry; an empty one where there is none."""
        return transformer_options.get(KEY) or cls()

    def put_into(self, model_options: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of model options that carries this context."""
        transformer_options = {**model_options.get("transformer_options", {}), KEY: self}
        return {**model_options, "transformer_options": transformer_options}

    def acting(self, kind: type[ActiveEffect] = ActiveEffect) -> tuple[ActiveEffect, ...]:
        """The effects of a kind that act in this model call."""
        return () if self.call is None else tuple(active for active in self.call.acting if isinstance(active, kind))


def add_effect(model: ModelPatcher, effect: Effect) -> ModelPatcher:
    """A clone of `model` on which one more effect acts."""
    model = model.clone()
    options = model.model_options["transformer_options"]
    context = EffectContext.of_pass(options)
    options[KEY] = replace(context, effects=(*context.effects, effect))
    for kind, wrapper in (
        (WrappersMP.PREPARE_SAMPLING, prepare_sampling),
        (WrappersMP.OUTER_SAMPLE, outer_sample),
        (WrappersMP.PREDICT_NOISE, predict_noise),
        (WrappersMP.CALC_COND_BATCH, calc_cond_batch),
        (WrappersMP.APPLY_MODEL, apply_model),
    ):
        model.remove_wrappers_with_key(kind, KEY)  # an earlier node of ours has put the same function there
        model.add_wrapper_with_key(kind, KEY, wrapper)
    for patcher in effect.additional_models():
        others = model.get_additional_models_with_key(KEY)
        if not any(patcher.is_clone(other) for other in others):
            model.set_additional_models(KEY, [*others, patcher])
    return model


def with_conds(
    model_options: dict[str, Any],
    conds: Mapping[str, CondList],
    without: type[ActiveEffect] | None = None,
) -> dict[str, Any]:
    """Model options of a call with condition lists `conds`, in which no effect of the kind `without` acts."""
    context = EffectContext.of(model_options)
    if context.call is None:
        return model_options
    acting = context.call.acting
    if without is not None:
        acting = tuple(active for active in acting if not isinstance(active, without))
    return replace(context, call=replace(context.call, conds=conds, acting=acting)).put_into(model_options)


def prefetch(model_options: dict[str, Any], model: BaseModel, timestep: Tensor, roles: Collection[bool]) -> None:
    """Have the effects that act at this noise level make now what they would make within the evaluation."""
    run = EffectContext.of(model_options).run
    for active in () if run is None else run.active:
        if active.acts(timestep, model.model_sampling):
            active.prefetch(model, timestep, roles, run.active)


def by_class(effects: Iterable[T]) -> dict[type[T], list[T]]:
    """Effects grouped by their class, in the order of the first of each."""
    groups: dict[type[T], list[T]] = {}
    for effect in effects:
        groups.setdefault(type(effect), []).append(effect)
    return groups


# -- the host's wrappers


def prepare_sampling(executor, model, noise_shape, conds, *args, **kwargs):
    """Once a run: `noise_shape` serves the host's memory estimate alone; rows stand for what the effects take."""
    signature = inspect.signature(executor.original).parameters if hasattr(executor, "original") else {}
    options = kwargs.get("model_options") or (args[0] if args and "model_options" in signature else None)
    kept = evaluated = 0
    for kind, effects in by_class(EffectContext.of(options or model.model_options).effects).items():
        rows: EstimatedRows = kind.estimated_rows(effects, model.model, noise_shape)
        kept, evaluated = kept + rows.kept, max(evaluated, rows.evaluated)
    if kept or evaluated:
        noise_shape = [max(noise_shape[0] + kept, evaluated), *noise_shape[1:]]
    return executor(model, noise_shape, conds, *args, **kwargs)


def _seed_of(*args: Any, **kwargs: Any) -> int:
    """The seed among the arguments of `outer_sample` (noise, latent_image, sampler, sigmas, denoise_mask, callback,
    disable_pbar, seed): the eighth on all supported hosts, whatever other packs put in that method's place."""
    return int(kwargs.get("seed", args[7] if len(args) > 7 else None) or 0)


def _sigmas_of(*args: Any, **kwargs: Any) -> Tensor:
    """The noise levels among the arguments of `outer_sample`, the fourth; none where another pack leaves them out."""
    sigmas = kwargs.get("sigmas", args[3] if len(args) > 3 else None)
    return torch.zeros(0) if sigmas is None else sigmas


def outer_sample(executor, noise, *args, **kwargs):
    """Once a run: effects become active. `guider.model_options` is the run's own copy, which the host drops."""
    guider = executor.class_obj
    context = EffectContext.of(guider.model_options)
    patcher = guider.model_patcher
    device, dtype = patcher.load_device, patcher.model.get_dtype_inference()
    start = RunStart(
        patcher, device, dtype, noise, _seed_of(noise, *args, **kwargs), _sigmas_of(noise, *args, **kwargs)
    )
    run = SamplingRun(tuple(effect.begin(start) for effect in context.effects))
    guider.model_options = replace(context, run=run).put_into(guider.model_options)
    try:
        return executor(noise, *args, **kwargs)
    finally:
        for summary in filter(None, (active.summary() for active in run.active)):
            run.once(summary)


def predict_noise(executor, x, timestep, model_options, seed=None):
    """Once a model call: `executor.class_obj` is the guider."""
    guider = executor.class_obj
    context = EffectContext.of(model_options)
    sampling = guider.inner_model.model_sampling
    run = context.run
    acting = tuple(active for active in run.active if active.acts(timestep, sampling)) if run is not None else ()
    if run is not None and acting:
        model_options = replace(context, call=ModelCall(run, guider.conds, acting)).put_into(model_options)
    return executor(x, timestep, model_options, seed)


def calc_cond_batch(executor, model, conds, x_in, timestep, model_options):
    """Each time conditions are evaluated, also by nodes that do so after the guider (SAG, PAG)."""
    context = EffectContext.of(model_options)
    if (call := context.call) is not None:
        areas = {c["uuid"]: Area.of(c) for cond in conds if cond is not None for c in cond if "uuid" in c}
        roles = conditional_roles(conds, call.conds)
        pictures = pictures_of(len(x_in), model_options.get("transformer_options", {}))
        batch = CondBatch(roles, areas, tuple(x_in.shape[-2:]), pictures)
        evaluation = CondEvaluation(model, conds, batch, timestep, call.run.active)
        evaluated = {active: active.evaluate(evaluation) for active in call.acting}
        model_options = replace(context, batch=batch, evaluated=evaluated).put_into(model_options)
    return executor(model, conds, x_in, timestep, model_options)


def apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    """Each pass of the UNet: put our replacements around, or in the place of, what the attentions have."""
    transformer_options = transformer_options or {}
    context = EffectContext.of_pass(transformer_options)
    if (call := context.call) is not None:
        options = dict(transformer_options)
        layout = RowLayout(x, transformer_options, context.batch)
        replaced = dict(transformer_options.get("patches_replace", {}))
        if layout.problem:
            call.run.once(layout.problem)
        else:
            dtype = executor.class_obj.get_dtype_inference()
            unet_pass = UNetPass(layout, x, dtype, options, context.evaluated, call.run.once)
            replaced |= replacements(call.acting, unet_pass, replaced)
        if COMPILED in transformer_options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}):
            call.run.once(
                "in a compiled model the reference cannot be switched on or off, ranged (start, end) or masked anew "
                "between runs, and may be wrong: keep these settings, or take TorchCompileModel out."
            )
        if captured(executor.class_obj.diffusion_model):
            call.run.once(
                "ComfyUI replays parts of this model as CUDA graphs, which go past image prompt and KV injection: the "
                "picture may be wrong. Start ComfyUI with --disable-cuda-graphs."
            )
        transformer_options = {**options, "patches_replace": replaced}
    return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)


def captured(network: nn.Module) -> bool:
    """Tells whether the host has recorded a block of `network` as a CUDA graph, which no patch in Python is part of.

    Hosts from 0.33 on can; up to now they ask for it in text generators alone.
    """
    recorded = getattr(sys.modules.get("comfy.model_prefetch"), "GRAPH_MODULES", ())
    return bool(recorded) and any(module in recorded for module in network.modules())


def replacements(
    acting: Sequence[ActiveEffect], unet_pass: UNetPass, others: Mapping[str, Replacements]
) -> dict[str, Replacements]:
    """The replacements of "attn1" and "attn2" by all acting effects, around or beside those of other nodes."""
    kinds = sorted(by_class(acting).items(), key=lambda item: item[0].order)
    attn1, attn2 = dict(others.get("attn1", {})), dict(others.get("attn2", {}))
    for kind, effects in kinds:
        attn2 = kind.cross_attentions(effects, unet_pass, attn2)
    for kind, effects in kinds:
        attn1 = kind.self_attentions(effects, unet_pass, attn1)
    return {name: replaced for name, replaced in (("attn1", attn1), ("attn2", attn2)) if replaced}

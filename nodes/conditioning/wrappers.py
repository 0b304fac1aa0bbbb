"""How the pack lives in the host's sampling: wrappers around a run, a model call, an evaluation and a UNet pass.

A MODEL carries tuples of `ImagePrompt` and of `KVInjection` in `transformer_options["lookahead"]`, and wrappers, plain
functions without state. What a wrapper finds out travels onward in copies of that dict; nothing is stored on an object
that another branch of the graph could see, and no object is changed once it is registered. What lives as long as a run
(`Run`) is made when the run begins and dropped with it.

PREPARE_SAMPLING  once a run: the host's memory estimate learns of the reference KV
OUTER_SAMPLE      once a run: tensors go to the model's device and precision; the run's noise and seed are kept
PREDICT_NOISE     once a model call: the guider's condition lists, and what acts at this sigma
CALC_COND_BATCH   the role (conditional or not) of each condition list, the area of each condition, and the reference
                  KV of the roles that are evaluated
APPLY_MODEL       what each row of this batch reads, and the replacements of the attentions
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..reference.kv_cache import KeysValues
from . import cross_attention, self_attention
from .cross_attention import ImagePrompt
from .reference_pass import ReferencePass
from .rows import Area, RowLayout, Rows, conditional_roles
from .self_attention import KVInjection

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

KEY = "lookahead"
COMPILED = "torch.compile"  # the host's key of the wrapper that runs a compiled UNet


@dataclass(frozen=True, eq=False)
class ModelCall:
    """One call of the guider: its condition lists, and what acts now; `passes` belong to `injections`, one each."""

    conds: dict[str, list[dict[str, Any]]]
    prompts: tuple[ImagePrompt, ...]
    injections: tuple[KVInjection, ...] = ()
    passes: tuple[ReferencePass, ...] = ()


@dataclass
class Run:
    """What lives as long as one run. said: what has been logged, so that each thing is said once."""

    passes: tuple[ReferencePass, ...] = ()
    said: set[str] = field(default_factory=set)

    def once(self, text: str) -> None:
        if text not in self.said:
            self.said.add(text)
            logging.warning("[LCM-Lookahead] %s", text)


def add_image_prompt(model: ModelPatcher, prompt: ImagePrompt) -> ModelPatcher:
    """A clone of `model` on which one more image prompt acts; their effects add up."""
    return _added(model, "image_prompts", prompt)


def add_kv_injection(model: ModelPatcher, injection: KVInjection) -> ModelPatcher:
    """A clone of `model` whose self-attentions also read the keys and values of one more reference."""
    model = _added(model, "kv_injections", injection)
    model.remove_wrappers_with_key(WrappersMP.PREPARE_SAMPLING, KEY)
    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, prepare_sampling)
    network = injection.network
    if network is not None:  # the host loads it together with the model, and counts it
        known = model.get_additional_models_with_key(KEY)
        if not any(network.is_clone(other) for other in known):
            model.set_additional_models(KEY, [*known, network])
    return model


def ours(model_options: dict[str, Any]) -> dict[str, Any]:
    """Our part of model options; empty where there is none."""
    return model_options.get("transformer_options", {}).get(KEY, {})


def with_ours(model_options: dict[str, Any], **entries: Any) -> dict[str, Any]:
    """Copies of model options, transformer options and our part of them, with entries added to our part."""
    options = model_options.get("transformer_options", {})
    return {**model_options, "transformer_options": {**options, KEY: {**options.get(KEY, {}), **entries}}}


def _added(model: ModelPatcher, what: str, item: ImagePrompt | KVInjection) -> ModelPatcher:
    model = model.clone()
    options = model.model_options["transformer_options"]
    known = options.get(KEY, {})
    options[KEY] = {**known, what: (*known.get(what, ()), item)}
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, outer_sample),
        (WrappersMP.PREDICT_NOISE, predict_noise),
        (WrappersMP.CALC_COND_BATCH, calc_cond_batch),
        (WrappersMP.APPLY_MODEL, apply_model),
    ):
        model.remove_wrappers_with_key(kind, KEY)  # an earlier node of ours has put the same function there
        model.add_wrapper_with_key(kind, KEY, wrapper)
    return model


def prepare_sampling(executor, model, noise_shape, conds, *args, **kwargs):
    """Once a run: `noise_shape` serves the host's memory estimate alone; rows stand for what we need beside it."""
    signature = inspect.signature(executor.original).parameters if hasattr(executor, "original") else {}
    options = kwargs.get("model_options") or (args[0] if args and "model_options" in signature else None)
    injections = ours(options or model.model_options).get("kv_injections", ())
    if injections:
        rows = self_attention.estimated_rows(model.model, injections, noise_shape)
        noise_shape = [max(noise_shape[0] + rows.kept, rows.evaluated), *noise_shape[1:]]
    return executor(model, noise_shape, conds, *args, **kwargs)


def outer_sample(executor, noise, *args, **kwargs):
    """Once a run: bring tensors to the device. `guider.model_options` is the run's own copy, which the host drops."""
    guider = executor.class_obj
    before = guider.model_options
    patcher = guider.model_patcher
    device, dtype = patcher.load_device, patcher.model.get_dtype_inference()
    prompts = tuple(p.to(device, dtype) for p in ours(before).get("image_prompts", ()))
    run = Run()
    seed = kwargs.get("seed", args[6] if len(args) > 6 else None)
    run.passes = tuple(
        ReferencePass(injection.to(device), patcher, noise, int(seed or 0))
        for injection in ours(before).get("kv_injections", ())
    )
    guider.model_options = with_ours(before, image_prompts=prompts, run=run)
    try:
        return executor(noise, *args, **kwargs)
    finally:
        for summary in filter(None, (p.summary() for p in run.passes)):
            run.once(summary)


def predict_noise(executor, x, timestep, model_options, seed=None):
    """Once a model call: `executor.class_obj` is the guider."""
    guider = executor.class_obj
    known = ours(model_options)
    sampling = guider.inner_model.model_sampling
    prompts = tuple(p for p in known.get("image_prompts", ()) if p.when.acts(timestep, sampling))
    passes = passes_now(model_options, timestep, sampling)
    if prompts or passes:
        call = ModelCall(guider.conds, prompts, tuple(p.injection for p in passes), passes)
        model_options = with_ours(model_options, call=call)
    return executor(x, timestep, model_options, seed)


def with_conds(model_options: dict[str, Any], conds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Model options of a call with other condition lists than the guider's."""
    call = ours(model_options).get("call")
    return model_options if call is None else with_ours(model_options, call=replace(call, conds=conds))


def passes_now(model_options: dict[str, Any], timestep: Tensor, sampling: Any) -> tuple[ReferencePass, ...]:
    """The reference passes of the run that act at this noise level."""
    run = ours(model_options).get("run")
    return tuple(p for p in (run.passes if run else ()) if p.injection.when.acts(timestep, sampling))


def without_kv(model_options: dict[str, Any], conds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Model options of a call with condition lists `conds` in which no reference KV acts."""
    call = ours(model_options).get("call")
    if call is None:
        return model_options
    return with_ours(model_options, call=replace(call, conds=conds, injections=(), passes=()))


def calc_cond_batch(executor, model, conds, x_in, timestep, model_options):
    """Each time conditions are evaluated, also by nodes that do so after the guider (SAG, PAG)."""
    call = ours(model_options).get("call")
    if call is not None:
        areas = {c["uuid"]: Area.of(c) for cond in conds if cond is not None for c in cond if "uuid" in c}
        roles = conditional_roles(conds, call.conds)
        rows = Rows(roles, areas, tuple(x_in.shape[-2:]), x_in.shape[0])
        evaluated = {role for role, cond in zip(roles, conds, strict=True) if cond is not None}
        run = ours(model_options).get("run") or Run()
        current = {p.signature(model) for p in run.passes}
        known: list[KeysValues] = [p.keys_values(model, timestep, evaluated, current) for p in call.passes]
        model_options = with_ours(model_options, rows=rows, kv=tuple(known))
    return executor(model, conds, x_in, timestep, model_options)


def apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    """Each pass of the UNet: put our replacements around, or in the place of, what the attentions have."""
    transformer_options = transformer_options or {}
    known = transformer_options.get(KEY, {})
    call = known.get("call")
    if call is not None:
        run = known.get("run") or Run()
        dtype = executor.class_obj.get_dtype_inference()
        layout = RowLayout(x, transformer_options, known.get("rows"))
        replaced = dict(transformer_options.get("patches_replace", {}))
        if layout.problem:
            run.once(layout.problem)
        else:
            if call.prompts:
                prompts = [p.to(x.device, dtype) for p in call.prompts]
                attn2 = dict(replaced.get("attn2", {}))
                replaced["attn2"] = cross_attention.replacements(prompts, layout, attn2, run.once)
            if call.injections and known.get("kv"):
                attn1 = dict(replaced.get("attn1", {}))
                replaced["attn1"] = self_attention.replacements(call.injections, known["kv"], layout, attn1, run.once)
        if COMPILED in transformer_options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}):
            run.once(
                "in a compiled model the reference cannot be switched on or off, ranged (start, end) or masked anew "
                "between runs, and may be wrong: keep these settings, or take TorchCompileModel out."
            )
        transformer_options = {**transformer_options, "patches_replace": replaced}
    return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

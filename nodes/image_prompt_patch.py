"""How the image prompt lives in the host's sampling.

A MODEL carries a tuple of `ImagePrompt` in `transformer_options["lookahead"]` and four wrappers, plain functions
without state. What a wrapper finds out travels onward in copies of that dict; nothing is stored on an object that
another branch of the graph could see, and no object is changed once it is registered.

OUTER_SAMPLE     once a run: the tensors go to the model's device and precision
PREDICT_NOISE    once a model call: the guider's condition lists, and which image prompts act at this sigma
CALC_COND_BATCH  the role (conditional or not) of each condition list, and the area of each condition
APPLY_MODEL      what each row of this batch reads, and the replacement of every cross-attention
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..lookahead.attention import image_prompt_term, mask_on_tokens
from .roles import Area, Rows, conditional_roles

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

KEY = "lookahead"
COMPILED = "torch.compile"  # the host's key of the wrapper that runs a compiled UNet


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """One image prompt on a MODEL. Immutable: clones of the MODEL share it.

    keys_values, null_keys_values: as in `Subject`; layout: for each cross-attention, by the host's key, the offset of
    its keys in the packed channels and its width; weight: a tensor without dimensions, since a compiled model keeps
    numbers as they were when it was compiled, and reads tensors anew; mask: [masks, H, W] in [0, 1] over the whole
    picture, or None; start, end: part of the sampling in which it acts, in [0, 1].
    """

    keys_values: Tensor
    null_keys_values: Tensor
    layout: dict[tuple[str, int, int], tuple[int, int]]
    weight: Tensor
    start: float = 0.0
    end: float = 1.0
    mask: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> ImagePrompt:
        """A copy with its tensors on a device and in a precision; itself where they are there already."""
        moved = self.keys_values.to(device, dtype)
        others = (self.weight,) if self.mask is None else (self.weight, self.mask)
        if moved is self.keys_values and all(tensor.device == moved.device for tensor in others):
            return self
        return replace(
            self,
            keys_values=moved,
            null_keys_values=self.null_keys_values.to(device, dtype),
            weight=self.weight.to(device),
            mask=None if self.mask is None else self.mask.to(device),
        )

    def acts(self, sigma: Tensor, model_sampling: Any) -> bool:
        """Whether it acts at this noise level, by the host's convention for the timestep range of a condition."""
        if self.start <= 0 and self.end >= 1:
            return True  # without asking the device for the value of sigma
        now = float(sigma.flatten()[0])
        return model_sampling.percent_to_sigma(self.end) <= now <= model_sampling.percent_to_sigma(self.start)


@dataclass(frozen=True, eq=False)
class ModelCall:
    """One call of the guider: its condition lists, and the image prompts that act now."""

    conds: dict[str, list[dict[str, Any]]]
    prompts: tuple[ImagePrompt, ...]


@dataclass
class RunLog:
    """What has been logged in this run, so that each thing is said once. Lives as long as the run."""

    said: set[str] = field(default_factory=set)

    def once(self, text: str) -> None:
        if text not in self.said:
            self.said.add(text)
            logging.warning("[LCM-Lookahead] %s", text)


def add_image_prompt(model: ModelPatcher, prompt: ImagePrompt) -> ModelPatcher:
    """A clone of `model` on which one more image prompt acts; their effects add up."""
    model = model.clone()
    options = model.model_options["transformer_options"]
    ours = options.get(KEY, {})
    options[KEY] = {**ours, "image_prompts": (*ours.get("image_prompts", ()), prompt)}
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, outer_sample),
        (WrappersMP.PREDICT_NOISE, predict_noise),
        (WrappersMP.CALC_COND_BATCH, calc_cond_batch),
        (WrappersMP.APPLY_MODEL, apply_model),
    ):
        model.remove_wrappers_with_key(kind, KEY)  # an earlier image prompt has put the same function there
        model.add_wrapper_with_key(kind, KEY, wrapper)
    return model


def _with(model_options: dict[str, Any], **entries: Any) -> dict[str, Any]:
    """Copies of model options, transformer options and our part of them, with entries added to our part."""
    options = model_options.get("transformer_options", {})
    return {**model_options, "transformer_options": {**options, KEY: {**options.get(KEY, {}), **entries}}}


def outer_sample(executor, *args, **kwargs):
    """Once a run: bring tensors to the device. `guider.model_options` is the run's own copy, which the host drops."""
    guider = executor.class_obj
    before = guider.model_options
    prompts = before.get("transformer_options", {}).get(KEY, {}).get("image_prompts", ())
    patcher = guider.model_patcher
    device, dtype = patcher.load_device, patcher.model.get_dtype_inference()
    guider.model_options = _with(before, image_prompts=tuple(p.to(device, dtype) for p in prompts), log=RunLog())
    return executor(*args, **kwargs)


def predict_noise(executor, x, timestep, model_options, seed=None):
    """Once a model call: `executor.class_obj` is the guider."""
    guider = executor.class_obj
    prompts = model_options.get("transformer_options", {}).get(KEY, {}).get("image_prompts", ())
    acting = tuple(p for p in prompts if p.acts(timestep, guider.inner_model.model_sampling))
    if acting:
        model_options = _with(model_options, call=ModelCall(guider.conds, acting))
    return executor(x, timestep, model_options, seed)


def calc_cond_batch(executor, model, conds, x_in, timestep, model_options):
    """Each time conditions are evaluated, also by nodes that do so after the guider (SAG, PAG)."""
    call = model_options.get("transformer_options", {}).get(KEY, {}).get("call")
    if call is not None:
        areas = {c["uuid"]: Area.of(c) for cond in conds if cond is not None for c in cond if "uuid" in c}
        rows = Rows(conditional_roles(conds, call.conds), areas, tuple(x_in.shape[-2:]), x_in.shape[0])
        model_options = _with(model_options, rows=rows)
    return executor(model, conds, x_in, timestep, model_options)


def apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    """Each pass of the UNet: put our replacement around whatever replacement each cross-attention has."""
    transformer_options = transformer_options or {}
    ours = transformer_options.get(KEY, {})
    call = ours.get("call")
    if call is not None:
        dtype = executor.class_obj.get_dtype_inference()
        terms = [PromptRows(p.to(x.device, dtype), x, transformer_options, ours.get("rows")) for p in call.prompts]
        log = ours.get("log") or RunLog()
        for term in terms:
            if term.problem:
                log.once(term.problem)
        terms = [term for term in terms if not term.problem]
        if COMPILED in transformer_options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}):
            log.once(
                "in a compiled model the image prompt cannot be switched on or off, ranged (start, end) or masked anew "
                "between runs, and may be wrong: keep these settings, or take TorchCompileModel out."
            )
        replaced = transformer_options.get("patches_replace", {})
        attn2 = dict(replaced.get("attn2", {}))
        for key in dict.fromkeys(key for term in terms for key in term.prompt.layout):
            inner = attn2.get(key, attn2.get(key[:2]))
            attn2[key] = cross_attention(key, inner, [term for term in terms if key in term.prompt.layout], log)
        transformer_options = {**transformer_options, "patches_replace": {**replaced, "attn2": attn2}}
    return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)


class PromptRows:
    """One image prompt laid out for the rows of one UNet pass. Lives as long as the pass.

    problem: what to log where the rows are of a kind that it cannot be laid out for, else None. Only an index is kept
    for each row: keys and values of all layers for every row would be hundreds of megabytes.
    """

    def __init__(self, prompt: ImagePrompt, x: Tensor, options: dict[str, Any], rows: Rows | None):
        self.prompt = prompt
        self.rows = x.shape[0]
        self.problem: str | None = None
        chunks = len(options.get("cond_or_uncond") or [0])
        pictures = rows.pictures if rows is not None else max(self.rows // chunks, 1)
        # Nodes that draw in tiles (MultiDiffusion) pass several tiles at once: all chunks of one tile, then the next.
        copies, rest = divmod(self.rows, chunks * pictures)
        if rest or copies == 0:
            self.problem = "another node puts together a batch that the image prompt cannot follow: it runs without it."
            return
        # A pass that no known list of the guider asked for counts as unconditional.
        roles = rows.of(options) if rows is not None else (False,) * chunks
        turn = torch.arange(pictures, device=x.device)  # made on the device, so that nothing waits for a copy
        null = prompt.keys_values.shape[0]
        self.index = torch.cat(
            [turn % null if conditional else torch.full_like(turn, null) for conditional in roles]
        ).repeat(copies)
        self.mask = None
        if prompt.mask is not None:
            height, width = rows.latent if rows is not None else x.shape[-2:]
            full = mask_on_tokens(prompt.mask, height, width).unflatten(1, (height, width)).squeeze(-1)
            full = full[turn % full.shape[0]]
            areas = rows.areas_of(options) if rows is not None else (None,) * chunks
            parts = [full if area is None else area.crop(full) for area in areas]
            if copies != 1 or any(part.shape[-2:] != x.shape[-2:] for part in parts):
                self.problem = (
                    "another node cuts the picture into tiles, which an image prompt with a mask cannot follow: it "
                    "runs without it."
                )
                return
            self.mask = torch.cat(parts)
        self.grids: dict[tuple[int, int], Tensor] = {}

    def keys_values(self, channels: slice = slice(None)) -> Tensor:
        """Keys and values that each row reads, [rows, tokens, channels]: its reference's or the null tokens'."""
        known = [self.prompt.keys_values[..., channels], self.prompt.null_keys_values[..., channels]]
        return torch.cat(known).index_select(0, self.index)

    def attend(self, q: Tensor, key: tuple[str, int, int], extra: dict[str, Any], attention: Callable) -> Tensor | None:
        """weight * mask * attention to the image prompt, [rows, tokens, channels]; None where rows do not match."""
        grid = tuple(extra["activations_shape"][-2:])
        tiles = q.shape[0] // self.rows
        whole = q.shape[0] == self.rows and (self.mask is None or q.shape[1] == grid[0] * grid[1])
        tiled = self.mask is None and tiles * self.rows == q.shape[0] and tiles * q.shape[1] == grid[0] * grid[1]
        if not (whole or tiled):
            return None
        offset, width = self.prompt.layout[key]
        k, v = self.keys_values(slice(offset, offset + 2 * width)).to(q.dtype).chunk(2, dim=-1)
        v = v * self.prompt.weight  # attention is linear in v
        if tiles != 1:  # each row was cut into tiles (as HyperTile does): all tiles of a row see its image prompt
            k, v = k.repeat_interleave(tiles, dim=0), v.repeat_interleave(tiles, dim=0)
        mask = None
        if self.mask is not None:
            if grid not in self.grids:
                self.grids[grid] = mask_on_tokens(self.mask, *grid).to(q.dtype)
            mask = self.grids[grid]
        return image_prompt_term(q, k, v, extra["n_heads"], mask=mask, attention=attention)


def cross_attention(
    key: tuple[str, int, int], inner: Callable | None, terms: list[PromptRows], log: RunLog
) -> Callable:
    """The replacement for one cross-attention: what was there (or the plain one), plus every image prompt."""

    def replacement(q, k, v, extra):
        def attention(q, k, v, heads):
            precision = extra.get("attn_precision")
            return optimized_attention(q, k, v, heads, attn_precision=precision, transformer_options=extra)

        out = attention(q, k, v, extra["n_heads"]) if inner is None else inner(q, k, v, extra)
        for term in terms:
            added = term.attend(q, key, extra, attention)
            if added is None:
                log.once(
                    "another node reshapes the tokens of some cross-attentions in a way that the image prompt cannot "
                    "follow: these run without it."
                )
            else:
                out = out + added
        return out

    return replacement

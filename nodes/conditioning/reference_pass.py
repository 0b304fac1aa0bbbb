"""The reference pass: the host's own UNet, run once more over the noised reference, exports keys and values.

LCM-Lookahead (arXiv 2404.03620), section 4.3. One UNet in memory: what makes it the KV encoder are low-rank changes
that are added beside its projections while it runs, with model options that hold nothing else: no patches of the
picture, no ControlNet, no image prompt. The pass ends in the last block that exports.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import ref

import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...lookahead.method.attention import mask_on_tokens, statistics
from ...lookahead.method.eight_bit import EightBit, from_eight_bit, to_eight_bit
from ...lookahead.method.kv_encoder import EXPORTED
from ..reference.kv_cache import InputsByBlock, InputsByRole, KVByRole
from .unet_blocks import BlockKey, KVBlock, host_attention, key_value_layers

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher

    from ...lookahead.method.kv_encoder import KVEncoder
    from ..reference.subject import Subject

SHARED, FIXED = "shared", "fixed"
FULL, EIGHT_BIT = "full", "8 bit"  # in what precision the reference is read
_KEY = "lookahead_reference_pass"
_INPUT, _OUTPUT = "lookahead_input", "lookahead_output"  # what one block passes to itself, in its own extra_options


_NO_NOISE = (
    "[LCM-Lookahead] this run adds no noise of its own, so the reference gets the noise of seed %d: in a later stage, "
    "give the seed of the first (the host's DisableNoise has none but 0: use KSampler (Advanced)), or set noise to "
    "fixed at Apply Lookahead KV Injection."
)


class _LastExport(Exception):
    """Everything is exported: the rest of the UNet need not run."""


@dataclass(frozen=True, eq=False)
class KVSource:
    """The settings of a reference pass: what it reads, and which keys and values it exports.

    subject: its latents are noised, and its own prompt is the text; blocks: the self-attentions that export, out of
    all_blocks, both in the order in which the host runs them; noise, noise_seed: SHARED for the picture's own noise,
    FIXED for one that is drawn from the seed; cache_bytes: the most that may be kept of the passes; kv_patcher: the
    host's patcher of the KV encoder, or None (without training); queries: the statistics of the queries are exported
    too; renew: the pass is made at every so many steps, and what it gave is read at those between; precision: FULL for
    that of the UNet, EIGHT_BIT for keys and values of inputs in 8 bit (`lookahead.method.eight_bit`), kept or not.
    """

    subject: Subject
    blocks: tuple[KVBlock, ...]
    all_blocks: tuple[KVBlock, ...]
    noise: str = SHARED
    noise_seed: int = 0
    cache_bytes: int = 2 << 30
    kv_patcher: ModelPatcher | None = None
    queries: bool = False
    renew: int = 1
    precision: str = FULL

    @property
    def kv_encoder(self) -> KVEncoder | None:
        return None if self.kv_patcher is None else self.kv_patcher.model

    def grid(self, level: int) -> tuple[int, int]:
        """Height and width of the reference in tokens at a level of the UNet."""
        height, width = self.subject.latents.shape[-2:]
        return math.ceil(height / 2**level), math.ceil(width / 2**level)

    def tokens_per_row(self, block: KVBlock) -> int:
        """Counts the tokens of a self-attention that one image of a batch reads, of all pictures at once."""
        pictures = 1 if self.subject.one_each else len(self.subject.latents)
        return pictures * math.prod(self.grid(block.level))

    def numel_per_row(self) -> int:
        """Counts the numbers that one image of a batch reads: keys and values of all blocks and pictures at once."""
        return 2 * sum(self.tokens_per_row(block) * block.width for block in self.blocks)

    def bytes_per_row(self, itemsize: int) -> int:
        """Bytes that are kept of one role and step for one image of a batch, without masks; itemsize: of the UNet."""
        numbers = sum(self.tokens_per_row(block) * block.width for block in self.blocks)
        channels = sum(block.width for block in self.blocks)
        scales = 2 * 4 * channels if self.precision == EIGHT_BIT else 0
        statistics_ = 2 * itemsize * channels if self.queries else 0
        return numbers * (1 if self.precision == EIGHT_BIT else itemsize) + scales + statistics_

    def kept(self, x: Tensor) -> tuple[Tensor, ...]:
        """The normed input [tokens, channels] of a self-attention as it is kept."""
        return tuple(to_eight_bit(x)) if self.precision == EIGHT_BIT else (x,)

    def restored(
        self, row: tuple[Tensor, ...], device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, list[Tensor]]:
        """Gives the input that a kept row stands for, [tokens, channels], and what else it holds (of the queries)."""
        parts = len(EightBit._fields) if self.precision == EIGHT_BIT else 1
        row = tuple(part.to(device, non_blocking=True) for part in row)
        x = from_eight_bit(EightBit(*row[:parts]), dtype) if self.precision == EIGHT_BIT else row[0].to(dtype)
        return x, list(row[parts:])


def renewed(sigmas: Sequence[float], every: int, share: Callable[[float], float]) -> list[tuple[float, float]]:
    """For each step in which the reference is read, (its noise level, that at which its pass was made).

    sigmas: of these steps and of what comes after; every: one step of so many makes a pass; share: of the sampling that
    is over at a noise level, in [0, 1]. The passes lie at equal parts of that share, since what the UNet makes of a
    noised picture changes with its time step: a schedule of many small steps in little noise (Karras) has few there.
    """
    *steps, _ = sigmas
    begin, *_, end = (share(sigma) for sigma in sigmas)
    passes, out, last = math.ceil(len(steps) / every), [], -1
    for sigma in steps:
        done = (share(sigma) - begin) / (end - begin) if end > begin else 0.0
        if (part := min(math.floor(passes * done + 1e-6), passes - 1)) > last:
            last, at = part, sigma
        out.append((sigma, at))
    return out


class ReferencePass:
    """The keys and values of one reference in one run: from the step before, the cache, or a pass of the UNet.

    noise: that of the run, [images, 4, h, w] on the CPU; seed: the guider's; evaluations: how many were made in this
    run, 0 when all came from the cache.
    """

    def __init__(
        self,
        source: KVSource,
        patcher: ModelPatcher,
        noise: Tensor,
        seed: int,
        renewals: Sequence[tuple[float, float]] = (),
    ):
        self.source, self.evaluations, self._patcher, self._renewals = source, 0, patcher, renewals
        latents = source.subject.latents
        shared = source.noise == SHARED
        fits = noise.ndim == 4 and noise.shape[-2:] == latents.shape[-2:]
        if shared and fits and bool(noise.any()):
            self._noise = noise.float().cpu()
        else:
            # A later stage of a run adds no noise: what the first drew of this seed was one for each of its pictures.
            generator = torch.Generator().manual_seed(seed if shared else source.noise_seed)
            shape = noise.shape if shared and fits else (1, *latents.shape[1:])
            self._noise = torch.randn(shape, generator=generator)
            if shared and fits:
                # (a seed of 0 is most likely none at all, which the page shows; of another, the user has thought)
                logging.log(logging.INFO if seed else logging.WARNING, _NO_NOISE, seed)
        # How many images read something of their own; the others read the same in turn.
        self._images = max(len(self._noise), min(len(latents), len(noise)) if source.subject.one_each else 1)
        self._signature: tuple | None = None
        self._now: tuple[float, KVByRole] = (-1.0, {})
        self._conds: dict[bool, list[dict[str, Any]]] = {}
        self._under_masks: dict[tuple[int, int], list[Tensor]] | None = None
        self._levels: dict[float, bool] = {}  # by sigma, whether everything is kept or was

    def keys_values(
        self, model: BaseModel, timestep: Tensor, roles: set[bool], current: Collection[tuple] = ()
    ) -> KVByRole:
        """Keys and values at this noise level for the roles asked for: from this step, the cache, or a pass.

        current: signatures of all that goes on in this run, which never make way in the cache.
        """
        sigma = self.level(float(timestep.flatten()[0]))
        if self._now[0] != sigma:
            self._now = (sigma, {})
        known = self._now[1]
        run = self.signature(model)
        cache = self.source.subject.cache
        self._levels.setdefault(sigma, True)
        inputs = {role: cache.get(run, (sigma, role)) for role in roles - known.keys()}
        missing = sorted((role for role, rows in inputs.items() if rows is None), reverse=True)
        if missing:
            self.evaluations += 1
            at = timestep.new_full((1,), sigma)
            found = dict(zip(missing, self._evaluate(model, at, missing), strict=True))
            inputs.update(found)
            if not cache.put(run, sigma, found, self.source.cache_bytes, current):
                self._levels[sigma] = False
        if inputs:  # what was just found is read as what was kept is, so that both give one picture to the bit
            known.update(self._projected(model, inputs, timestep.device))
        return {role: known[role] for role in roles}

    def level(self, sigma: float) -> float:
        """The noise level at which the reference is read for a step at `sigma`."""
        reached = [at for step, at in self._renewals if step >= sigma * (1 - 1e-4)]
        return reached[-1] if reached else sigma

    def _projected(self, model: BaseModel, inputs: InputsByRole, device: torch.device) -> KVByRole:
        """Keys and values of the normed inputs, by the layers of the UNet (and the export's low-rank changes).

        All rows of one length at once, in an order that is always the same: in another a product may round otherwise.
        """
        model.current_patcher.apply_hooks(hooks=None)  # as for the pass: a LoRA on the picture's prompt is not in it
        dtype, kv_encoder = model.get_dtype_inference(), self.source.kv_encoder
        roles = sorted(inputs, reverse=True)
        out: KVByRole = {role: {} for role in roles}
        for block in self.source.blocks:
            kept = [row for role in roles for row in inputs[role][block.key]]
            xs, further = zip(*(self.source.restored(row, device, dtype) for row in kept), strict=True)
            batches = [torch.stack(xs)] if len({len(x) for x in xs}) == 1 else [x[None] for x in xs]
            projected = []
            for name, layer in zip(EXPORTED, key_value_layers(model.diffusion_model, block.key), strict=True):
                rows: list[Tensor] = []
                for x in batches:
                    y = layer(x)
                    rows += y if kv_encoder is None else kv_encoder.exported(block.path, name, y, x)
                projected.append(rows)
            pairs = iter([(k, v, *rest) for k, v, rest in zip(*projected, further, strict=True)])
            for role in roles:
                out[role][block.key] = list(itertools.islice(pairs, len(inputs[role][block.key])))
        return out

    def signature(self, model: BaseModel) -> tuple:
        """The key of this run in the cache: all that exported keys and values depend on, beside the subject itself."""
        if self._signature is None:
            sampling = model.model_sampling
            digest = hashlib.sha256(self._noise.numpy().tobytes())
            digest.update(sampling.sigmas.float().cpu().numpy().tobytes())
            injected = [x for group in getattr(self._patcher, "injections", {}).values() for x in group]
            blocks = tuple(block.key for block in self.source.blocks), self.source.queries
            settings = {k: v for k, v in vars(sampling).items() if isinstance(v, int | float | str | None)}
            digest.update(repr(sorted(settings.items())).encode())  # such as a flow model's multiplier and noise scale
            precision = self.source.precision, model.get_dtype_inference()
            device = str(self._patcher.load_device), type(sampling).__mro__
            base = ref(model), self._patcher.patches_uuid, *injected
            self._signature = (digest.hexdigest(), self._images, blocks, precision, device, base)
        return self._signature

    def _evaluate(self, model: BaseModel, timestep: Tensor, roles: list[bool]) -> list[InputsByBlock]:
        subject, device = self.source.subject, timestep.device
        latents = model.process_latent_in(subject.latents.to(device, torch.float32))
        noise = self._noise.to(device)
        pictures = len(latents)
        if subject.one_each:  # image i reads picture i
            turn = torch.arange(self._images, device=device)
            latents, noise = latents[turn % pictures], noise[turn % len(noise)]
        else:  # every image reads all pictures: these are neighbours among the rows
            rows = len(noise)
            latents, noise = latents.repeat(rows, 1, 1, 1), noise.repeat_interleave(pictures, dim=0)
        x = model.model_sampling.noise_scaling(timestep[:1], noise, latents)  # z + sigma e, but not of every model
        export = _Export(self.source, 1 if subject.one_each else pictures, self._tokens_under_masks(device))
        conds = [self._condition(model, role, x, device) for role in roles]
        comfy.samplers.calc_cond_batch(model, conds, x, timestep.expand(len(x)), export.model_options())
        return [export.rows[index] for index in range(len(roles))]

    def _condition(self, model: BaseModel, conditional: bool, x: Tensor, device: torch.device) -> list[dict[str, Any]]:
        """The reference's own prompt, or nothing (zeros), built as the host builds conditions, at its own size."""
        if conditional not in self._conds:
            text, values = self.source.subject.kv_prompt[0]
            pooled = values.get("pooled_output")
            if not conditional:
                text, pooled = torch.zeros_like(text), None if pooled is None else torch.zeros_like(pooled)
            height, width = (8 * n for n in x.shape[-2:])
            values = {"width": width, "height": height} | ({} if pooled is None else {"pooled_output": pooled})
            conds = comfy.sampler_helpers.convert_cond([[text, values]])
            kind = "positive" if conditional else "negative"
            # An inpainting UNet looks for a latent picture, and without a mask takes it for one to be painted anew.
            self._conds[conditional] = comfy.samplers.encode_model_conds(
                model.extra_conds, conds, x, device, kind, latent_image=x
            )
        return self._conds[conditional]

    def _tokens_under_masks(self, device: torch.device) -> dict[tuple[int, int], list[Tensor]]:
        """By grid, for each picture the numbers of the tokens under its mask (at least the most covered); empty without
        masks. Found before the pass, since that asks for values of tensors."""
        masks = self.source.subject.mask
        if self._under_masks is None:
            self._under_masks = {}
            for level in {block.level for block in self.source.blocks} if masks is not None else ():
                grid = self.source.grid(level)
                covered = mask_on_tokens(masks.float().cpu(), *grid).squeeze(-1)
                enough = (covered > 0.5) | (covered == covered.amax(1, keepdim=True))
                self._under_masks[grid] = [row.nonzero().squeeze(1).to(device) for row in enough]
        return self._under_masks

    def summary(self) -> str | None:
        """A sentence on the cache after a run; None where all was kept, or came from it, or should not be kept."""
        held, bound = sum(self._levels.values()), self.source.cache_bytes
        if held == len(self._levels) or bound == 0:
            return None
        return (
            f"the reference KV of {held} of {len(self._levels)} noise levels fits into the cache of "
            f"{bound / 2**30:.3g} GB: the others are computed again in every run (a larger cache_gb or fewer blocks "
            "would change that)."
        )


class _Export:
    """The patches of one reference pass and what they collect, by index of the condition list. Lives as long as it.

    pictures_per_image: how many rows of the pass (pictures of one subject) are read by one image; under_masks: by grid,
    for each picture the numbers of the tokens that are exported, empty for all.
    """

    def __init__(self, source: KVSource, pictures_per_image: int, under_masks: dict[tuple[int, int], list[Tensor]]):
        self.rows: dict[int, InputsByBlock] = {}
        self._source, self._kv_encoder = source, source.kv_encoder
        self._exported = {block.key for block in source.blocks}
        self._last = source.blocks[-1].key
        self._pictures_per_image, self._under_masks = pictures_per_image, under_masks

    def model_options(self) -> dict[str, Any]:
        """Fresh model options: nothing of the picture's or of other nodes is in them."""
        options: dict[str, Any] = {"wrappers": {WrappersMP.APPLY_MODEL: {_KEY: [_until_last_export]}}}
        if self._kv_encoder is None:
            attn1 = {block.key: self._self_attention(block) for block in self._source.blocks}
            options["patches_replace"] = {"attn1": attn1}
            options["patches"] = {"attn1_patch": [self._note_input("attn1", {})]}
        else:  # blocks that export nothing are tuned as well, since later ones read what they put out
            everything = self._source.all_blocks
            options["patches_replace"] = {
                "attn1": {block.key: self._self_attention(block) for block in everything},
                "attn2": {block.key: self._cross_attention(block) for block in everything},
            }
            paths = {block.key: block.path for block in everything}
            options["patches"] = {
                f"{attention}_{kind}": [make(attention, paths)]
                for attention in ("attn1", "attn2")
                for kind, make in (("patch", self._note_input), ("output_patch", self._change_output))
            }
        return {"transformer_options": options}

    def _self_attention(self, block: KVBlock) -> Callable:
        def replacement(q, k, v, extra):
            x, _ = extra[_INPUT]
            if self._kv_encoder is not None:
                q, k, v = self._tuned(q, k, v, block.path, "attn1", extra)
            if block.key in self._exported:
                self._export(block.key, (x, q) if self._source.queries else (x,), extra)
            return self._attend(q, k, v, extra)

        return replacement

    def _cross_attention(self, block: KVBlock) -> Callable:
        def replacement(q, k, v, extra):
            return self._attend(*self._tuned(q, k, v, block.path, "attn2", extra), extra)

        return replacement

    def _tuned(self, q: Tensor, k: Tensor, v: Tensor, path: str, attention: str, extra: dict[str, Any]):
        x, context = extra[_INPUT]
        q = self._kv_encoder.tuned(path, f"{attention}.to_q", q, x)
        k = self._kv_encoder.tuned(path, f"{attention}.to_k", k, context)
        v = self._kv_encoder.tuned(path, f"{attention}.to_v", v, context)
        return q, k, v

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        out = extra[_OUTPUT] = host_attention(extra)(q, k, v, extra["n_heads"])
        return out

    @staticmethod
    def _note_input(attention: str, paths: dict[BlockKey, str]) -> Callable:
        """A patch that keeps the input of the projections: the KV encoder's low-rank changes read the same."""

        def patch(n, context, value, extra):
            extra[_INPUT] = (n, context)
            return n, context, value

        return patch

    def _change_output(self, attention: str, paths: dict[BlockKey, str]) -> Callable:
        def patch(n, extra):
            key = (*extra["block"], extra["block_index"])
            return self._kv_encoder.tuned(paths[key], f"{attention}.to_out.0", n, extra.pop(_OUTPUT))

        return patch

    def _export(self, key: BlockKey, exported: tuple[Tensor, ...], extra: dict[str, Any]) -> None:
        chunks = extra.get("cond_or_uncond") or [0]
        kept = self._under_masks[tuple(extra["activations_shape"][-2:])] if self._under_masks else []
        for index, *parts in zip(chunks, *(part.chunk(len(chunks)) for part in exported), strict=True):
            rows = list(zip(*parts, strict=True))
            if kept:
                rows = [tuple(part[kept[n % len(kept)]] for part in row) for n, row in enumerate(rows)]
            if (size := self._pictures_per_image) > 1:
                groups = [rows[at : at + size] for at in range(0, len(rows), size)]
                rows = [tuple(torch.cat(parts) for parts in zip(*group, strict=True)) for group in groups]
            self.rows.setdefault(index, {})[key] = [(*self._source.kept(x), *map(statistics, q)) for x, *q in rows]
        if key == self._last:
            raise _LastExport


def _until_last_export(executor, x, *args, **kwargs):
    """The pass ends where everything is exported; nobody reads its prediction."""
    try:
        executor(x, *args, **kwargs)
    except _LastExport:
        pass
    return torch.zeros_like(x)

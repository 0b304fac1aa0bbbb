"""The one-step preview of a picture in the middle of a run: shortcut model, decoder, and what they need of the host."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import comfy.latent_formats
import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor, nn

from ...lookahead.method.guidance import classifier_free_guidance
from ...lookahead.method.schedule import consistency_output, to_vp
from ..conditioning import wrappers
from ..conditioning.rows import pictures_of
from . import autograd
from .lora_bypass import Bypasses, Strengths, added_patches, bypass_patcher, check_patches

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from .shortcut import Shortcut

KEY = "lookahead_shortcut"
# Wrappers of others that keep something from call to call, or compile, cannot stand a pass that is none of the run's.
_LEFT_OUT = (wrappers.COMPILED, "easycache", "lazycache")
_NO_LORA = (
    "The shortcut's MODEL has no LoRA that the sampled one lacks, so the preview is that of the sampled model: put a "
    "few-step LoRA before Lookahead Shortcut, not before the sampler."
)


class Call:
    """One call of the model by the sampler: all that it gives beside the latent.

    model: what it calls (the host's inpainting wrapper around the guider), or None; options: its keyword arguments; x:
    the latent. (What a sampler shows its callback may be in a scale of its own, as that of uni_pc.)
    """

    def __init__(self, model: Any, sigma: Tensor, options: dict[str, Any], x: Tensor | None = None):
        self.model, self.sigma, self.x = model, sigma, x
        self.options, self.model_options = options, options.get("model_options", {})
        self.denoise_mask, self.seed = options.get("denoise_mask"), options.get("seed")


class Previewer:
    """Makes the one-step previews of one run of a guider; lives as long as it.

    positive: conditions of the preview in place of the guider's own, as CONDITIONING; cfg: guidance of the preview, 1
    for none. Raises ValueError, one sentence, where the shortcut does not fit.
    """

    def __init__(self, shortcut: Shortcut, guider: Any, positive: Any = None, cfg: float = 1.0):
        self.shortcut, self.guider, self.cfg = shortcut, guider, cfg
        self.base: ModelPatcher = guider.model_patcher
        self.model, self.second, self.lora_patcher = guider.inner_model, None, None
        self._positive = positive
        self._conds: dict[str, Any] | None = None
        self.notes: list[str] = []  # what the user should know, a sentence each
        if shortcut.one_step:
            self._connect()
        formats = [type(m.latent_format) for m in (self.model, guider.inner_model)]
        if not issubclass(formats[0], comfy.latent_formats.SDXL) or formats[0] is not formats[1]:
            raise ValueError(
                f"The shortcut's latents are {formats[0].__name__} and those of the sampled model "
                f"{formats[1].__name__}, but lookahead guidance works with SDXL: load SDXL checkpoints for both."
            )

    def _connect(self) -> None:
        shortcut, base = self.shortcut.model, self.base
        if shortcut.model is not base.model:
            self.second, self.model = shortcut, shortcut.model
            size = shortcut.model_size() / 2**30
            logging.info("[LCM-Lookahead] the shortcut is a second model: %.2f GB beside the sampled one.", size)
            return
        key = base.patches_uuid, shortcut.patches_uuid
        if key not in self.shortcut.networks:
            added, more = added_patches(base, shortcut)
            check_patches(added, base.model)
            if more:
                logging.info("[LCM-Lookahead] %d weight patches of the sampled model act in the preview as well.", more)
            self.shortcut.networks.clear()
            self.shortcut.networks[key] = bypass_patcher(base.model, added) if added else None
        self.lora_patcher = self.shortcut.networks[key]
        if self.lora_patcher is None:
            self.notes.append(_NO_LORA)
            logging.warning("[LCM-Lookahead] %s", _NO_LORA)

    # -- loading

    def load(self, others: list[ModelPatcher], latent: Tensor, factor: float, decoder: float | None = None) -> None:
        """Have the host load all networks together, so that none unloads another. factor: of a forward's memory;
        decoder: that of the decoder, where it is another."""
        vae = self.shortcut.vae
        ours = [self.base, *getattr(self.guider, "loaded_models", ()), vae.patcher, self.lora_patcher, self.second]
        ours = list(dict.fromkeys(patcher for patcher in ours if patcher is not None))
        memory = factor * self.model.memory_required(list(latent.shape))
        memory += (decoder or factor) * vae.memory_used_decode(latent.shape, vae.vae_dtype)
        _load(ours, memory)
        if others:  # networks that are moved outside of inference mode have weights that autograd may use
            with torch.inference_mode(False), torch.no_grad():
                _load([*ours, *others], memory)
        if self.second is not None:
            self.second.pre_run()

    def close(self) -> None:
        """Clean up after the run."""
        if self.second is not None:
            self.second.cleanup()

    def networks(self) -> list[nn.Module]:
        """All networks between the latent and the picture."""
        networks = [self.model.diffusion_model, self.shortcut.vae.first_stage_model]
        # Of effects: a LoRA that an image prompt comes with.
        networks += [patcher.model for patcher in self.base.get_additional_models_with_key(wrappers.KEY)]
        return networks if self.lora_patcher is None else [*networks, self.lora_patcher.model]

    @property
    def bypasses(self) -> Bypasses | None:
        return None if self.lora_patcher is None else self.lora_patcher.model

    # -- conditions

    def conds(self, noise: Tensor, latent_image: Tensor | None, call: Call) -> dict[str, Any]:
        """The condition lists of the preview, "positive" and "negative" (None without guidance)."""
        if self._conds is None:
            conds = self.guider.conds
            positive = conds.get("positive")
            if self._positive is not None:
                converted = comfy.sampler_helpers.convert_cond(self._positive)
                converted = [{name: value for name, value in c.items() if name != "control"} for c in converted]
                arguments = latent_image, call.denoise_mask, call.seed
                positive = comfy.samplers.process_conds(
                    self.guider.inner_model, noise, {"positive": converted}, noise.device, *arguments
                )["positive"]
            if not positive:
                raise ValueError(
                    f"The guider {type(self.guider).__name__} has no positive conditions to look ahead with: connect "
                    "positive at the Lookahead Guidance Sampler."
                )
            negative = conds.get("negative") if self.cfg != 1 else None
            if self.cfg != 1 and negative is None:
                raise ValueError(
                    f"The guider {type(self.guider).__name__} has no negative conditions, which a preview with cfg "
                    f"{self.cfg:g} needs: set cfg of the preview to 1."
                )
            constant: dict[int, _Constant] = {}
            lists = {"positive": positive, "negative": negative}
            for c in (c for conds in lists.values() for c in conds or ()):
                if c.get("control") is not None:
                    constant.setdefault(id(c["control"]), _Constant(c["control"]))
            if len({id(c.get("hooks")) for c in positive}) > 1:
                raise ValueError(
                    "The positive conditions have different LoRA hooks, through which the preview cannot be guided: "
                    "connect positive at the Lookahead Guidance Sampler."
                )
            self._conds = {
                name: conds
                and [{**c, "control": constant[id(c["control"])]} if c.get("control") is not None else c for c in conds]
                for name, conds in lists.items()
            }
        return self._conds

    # -- prediction and decoder

    def prepare(self, call: Call) -> None:
        """Reads the references at this noise level, before anything of the preview is switched on."""
        roles = {True, False} if "negative" in self.guider.conds else {True}
        wrappers.prefetch(call.model_options, self.guider.inner_model, call.sigma, roles)

    def latent(self, x: Tensor, call: Call, conds: dict[str, Any], lora_scale: Tensor, grad: bool) -> Tensor:
        """The preview [n, c, h, w] in the host's scale, of the state x at the call's noise level.

        lora_scale: [n], of the few-step LoRA; grad: within `differentiable`.
        """
        sigma = call.sigma.clone()
        options = self._options(call.model_options, lora_scale, grad)

        def predicted(x: Tensor, sigma: Tensor, model_options: dict[str, Any] = options, seed: Any = None) -> Tensor:
            executor = WrapperExecutor.new_class_executor(
                lambda *args: self._evaluate(conds, *args),
                self.guider,
                get_all_wrappers(WrappersMP.PREDICT_NOISE, model_options, is_model_options=True),
            )
            return executor.execute(x, sigma, model_options, seed)

        if call.model is not None and call.denoise_mask is not None:
            inpainted = copy.copy(call.model)  # the host's own treatment of masks, around the preview's prediction
            inpainted.inner_model = _Inner(predicted, self.guider.inner_model)
            mask = call.denoise_mask.clone()
            original = inpainted(x, sigma, denoise_mask=mask, model_options=options, seed=call.seed)
        else:
            original = predicted(x, sigma, options, call.seed)
        if not self.shortcut.one_step:
            return original
        return consistency_output(original, to_vp(x, sigma), self.model.model_sampling.timestep(sigma))

    def _evaluate(self, conds: dict[str, Any], x: Tensor, sigma: Tensor, options: dict[str, Any], seed: Any) -> Tensor:
        if self._positive is not None:
            options = wrappers.with_conds(options, conds)
        lists = [conds["positive"]] if conds["negative"] is None else [conds["positive"], conds["negative"]]
        out = comfy.samplers.calc_cond_batch(self.model, lists, x, sigma, options)
        return out[0] if len(out) == 1 else classifier_free_guidance(out[1], out[0], self.cfg)

    def _options(self, model_options: dict[str, Any], lora_scale: Tensor, grad: bool) -> dict[str, Any]:
        transformer = dict(model_options.get("transformer_options", {}))
        wrappers = {
            kind: {key: list(wrapped) for key, wrapped in by_key.items() if key not in _LEFT_OUT}
            for kind, by_key in transformer.get("wrappers", {}).items()
        }
        if self.lora_patcher is not None:
            wrappers.setdefault(WrappersMP.APPLY_MODEL, {})[KEY] = [_with_bypasses(self.lora_patcher.model, lora_scale)]
        transformer["wrappers"] = wrappers
        kept = {name: value for name, value in model_options.items() if name != "multigpu_clones"}
        if grad:
            transformer["optimized_attention_override"] = autograd.pytorch_attention
            for name in ("patches", "patches_replace"):
                transformer[name] = autograd.on_copies(transformer.get(name, {}))
            if (around := kept.get("model_function_wrapper")) is not None:
                kept["model_function_wrapper"] = autograd.on_a_copy(around)
        return {**kept, "transformer_options": transformer}

    def decode(self, latent: Tensor) -> Tensor:
        """Preview [n, c, h, w] -> picture [n, 3, H, W], about [-1, 1]. (The host's VAE.decode clamps in place.)"""
        vae = self.shortcut.vae
        picture = vae.first_stage_model.decode(self.for_vae(latent).to(vae.device, vae.vae_dtype))
        return picture.to(latent.device)  # from the CPU under --cpu-vae: losses stay with the model

    def for_vae(self, latent: Tensor) -> Tensor:
        """Latents [n, c, h, w] in the host's scale, as LATENT sockets carry them and its VAE decodes them."""
        return self.model.process_latent_out(latent)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [n, 3, H, W] in [-1, 1] -> latents [n, c, h, w] in the host's scale, one after another."""
        vae = self.shortcut.vae
        first, given = vae.first_stage_model, (pictures + 1) / 2
        latents = [first.encode(vae.process_input(one).to(vae.device, vae.vae_dtype)) for one in given.split(1)]
        return self.model.process_latent_in(torch.cat(latents).float()).to(pictures.device)

    @torch.no_grad()
    def preview(self, x: Tensor, call: Call, conds: dict[str, Any]) -> Tensor:
        """The preview latents [n, c, h, w], with the few-step LoRA at its full strength and without a gradient."""
        with self.installed():
            return self.latent(x, call, conds, torch.ones(len(x), device=x.device), grad=False)

    @torch.no_grad()
    def decode_preview(self, x: Tensor, call: Call, conds: dict[str, Any]) -> Tensor:
        """The preview as picture, without a gradient: [n, H, W, 3] in [0, 1], float32, on the CPU."""
        return as_image(self.decode(self.preview(x, call, conds)))

    @contextmanager
    def installed(
        self, checkpointing: autograd.Checkpointing | None = None, others: Iterable[nn.Module] = ()
    ) -> Iterator[None]:
        """Inside, the bypasses can be switched on, and gradients flow where autograd is on (also through `others`)."""
        with autograd.differentiable([*self.networks(), *others], checkpointing, self.bypasses):
            yield


def _load(models: list[ModelPatcher], memory: float) -> None:
    loaded = comfy.model_management.loaded_models()
    if not all(model in loaded for model in models):
        comfy.model_management.load_models_gpu(models, memory_required=memory)


class _Inner:
    """Stands in the place of the guider, for the host's inpainting wrapper."""

    def __init__(self, predicted: Callable, inner_model: Any):
        self._predicted, self.inner_model = predicted, inner_model

    def __call__(self, x: Tensor, sigma: Tensor, model_options: dict[str, Any], seed: Any = None) -> Tensor:
        return self._predicted(x, sigma, model_options, seed)


class _Constant:
    """A ControlNet acts on the preview, but no gradient goes through it."""

    def __init__(self, control: Any):
        self._control = control

    def __getattr__(self, name: str) -> Any:
        return getattr(self._control, name)

    def get_control(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            control = self._control.get_control(x.detach(), *args, **kwargs)
        return control and {
            place: [t.as_subclass(_Added) if isinstance(t, Tensor) else t for t in added]
            for place, added in control.items()
        }


class _Added(Tensor):
    """A ControlNet's residual, which the UNet adds in place, to tensors that autograd still needs: here it does not."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        args = [a.as_subclass(Tensor) if isinstance(a, cls) else a for a in args]
        return args[0] + args[1] if func is Tensor.add_ else func(*args, **(kwargs or {}))


def _with_bypasses(bypasses: Bypasses, lora_scale: Tensor) -> Callable:
    def apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        # Images are neighbours within each condition, and conditions within each tile of those who draw in tiles.
        options = transformer_options or {}
        pictures = pictures_of(len(x) // len(options.get("cond_or_uncond") or [0]), options)
        scales = lora_scale if isinstance(pictures, range) else lora_scale[list(pictures)]
        with bypasses.switched(Strengths.of(scales.repeat(len(x) // len(scales)))):
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    return apply_model


def as_image(picture: Tensor) -> Tensor:
    """[n, 3, H, W] about [-1, 1] -> IMAGE [n, H, W, 3] in [0, 1], float32 on the CPU."""
    return picture.detach().float().add(1).div(2).clamp(0, 1).movedim(1, -1).cpu()

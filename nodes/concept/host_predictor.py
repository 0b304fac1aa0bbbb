"""Noise predicted by the host's UNet under a concept, with gradients to the concept's own tensors.

Weights of UNet and text encoders stay as the host has them, cast, offloaded or quantised (`guidance.autograd`). Blocks
are computed twice by torch's own checkpointing, which follows tensors that a block reads beside its input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import comfy.model_management
import torch
from comfy.clip_model import CLIPLayer
from comfy.ldm.modules.attention import BasicTransformerBlock, attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...lookahead.method.concept import Concept
from ..conditioning.effect import UNetPass
from ..conditioning.rows import RowLayout
from ..conditioning.unet_blocks import self_attentions
from ..guidance.autograd import differentiable, on_copies, pytorch_attention
from .clip_words import encode_differentiably, hard_words, load, pooled_of, prompt_tokens, soft_words, with_words
from .concept_effect import ActiveConcept, ConceptEffect

_UUID = "lookahead concept"


class HostPredictor:
    """(concept, noised latent [1, 4, h, w], time step [1], number) -> predicted noise, as `concept_tuning.tune` asks.

    Within `with`, autograd works through UNet and text encoders; afterwards they are as before, also after an error.
    """

    def __init__(self, model: Any, clip: Any, concept: Concept, templates: Sequence[str], blend: float, size: int):
        """Raises ConceptError where a template has no placeholder."""
        self._model, self._clip, self._blend, self._size = model, clip, blend, size
        self._prompts = [prompt_tokens(clip, template) for template in templates]
        self._blocks = {block.key: block.path for block in self_attentions(model)}
        comfy.model_management.load_models_gpu([model, clip.patcher])
        self._text_device, self.device = load(clip), model.load_device
        sampling = model.get_model_object("model_sampling")
        sigmas = sampling.sigmas.clone().to(self.device, torch.float32)
        self._levels = sigmas, *shares(sampling, sigmas)
        self._hard: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for n in range(len(self._prompts)):
            self._hard_prompt(concept, n)
        self._open = ExitStack()

    def _hard_prompt(self, concept: Concept, n: int) -> tuple[Tensor, Tensor]:
        """Context and pooled text of a prompt with the concept's real word, encoded once."""
        key = concept.word_id, n
        if key not in self._hard:
            self._hard[key] = self._encode(*self._prompts[n], hard_words(concept))
        return self._hard[key]

    def _encode(self, tokens: Any, place: int, words: dict[str, Any]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            context, pooled = encode_differentiably(self._clip, with_words(tokens, place, words), self._text_device)
        return context.detach().clone(), pooled.detach().clone()

    def __enter__(self) -> HostPredictor:
        unet, text = self._model.model.diffusion_model, self._clip.cond_stage_model
        with ExitStack() as opening:  # which undoes what was done where one of these fails
            opening.enter_context(differentiable([unet, text]))
            for module in (*unet.modules(), *text.modules()):
                if isinstance(module, CLIPLayer):
                    opening.callback(_replace_forward(module, _out_of_place(module)))
                elif isinstance(module, BasicTransformerBlock | ResBlock):
                    opening.callback(_replace_forward(module, _twice(module.forward)))
            self._open = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def alpha_bar(self) -> Tensor:
        """The square of what a latent of variance 1 has of the picture, at every time step [T]."""
        _, kept, added = self._levels
        return kept**2 / (kept**2 + added**2)

    def __call__(self, concept: Concept, x: Tensor, t: Tensor, number: int) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        base, n = self._model.model, number % len(self._prompts)
        tokens, place = self._prompts[n]
        soft, soft_pooled = encode_differentiably(
            self._clip, with_words(tokens, place, soft_words(concept)), self._text_device
        )
        hard, hard_pooled = self._hard_prompt(concept, n)
        pooled = pooled_of("blended", self._blend, soft_pooled, hard_pooled)
        sizes = {"width": self._size, "height": self._size, "target_width": self._size, "target_height": self._size}
        y = base.encode_adm(pooled_output=pooled.to(self.device), device=self.device, crop_w=0, crop_h=0, **sizes)
        sigma, kept, added = (level.to(x)[t].view(-1, 1, 1, 1) for level in self._levels)
        noised = x * (kept**2 + added**2).sqrt()  # from variance 1 to the host's scale
        options = self._options(concept, noised, hard)
        text = soft.to(self.device)
        clean = base.apply_model(noised, sigma.flatten(), c_crossattn=text, y=y, transformer_options=options)
        return (noised - kept * clean) / added

    def _options(self, concept: Concept, x: Tensor, hard: Tensor) -> dict[str, Any]:
        """The transformer options of a pass with this concept, by the same effect that draws it."""
        own = dict(self._model.model_options.get("transformer_options", {}))
        options = {
            **{name: on_copies(own[name]) for name in ("patches", "patches_replace") if name in own},
            "cond_or_uncond": [0],
            "uuids": [_UUID],
            "optimized_attention_override": pytorch_attention,
        }
        effect = ConceptEffect(concept.offsets, self._blocks, blend=self._blend)
        active, layout = ActiveConcept(effect), RowLayout(x, options, None)
        unet_pass = UNetPass(layout, x, x.dtype, options, {active: {_UUID: hard}}, lambda text: None)
        others = options.get("patches_replace", {})
        replaced = {
            "attn2": ActiveConcept.cross_attentions([active], unet_pass, dict(others.get("attn2", {}))),
            "attn1": ActiveConcept.self_attentions([active], unet_pass, dict(others.get("attn1", {}))),
        }
        return {**options, "patches_replace": {**others, **replaced}}


def shares(sampling: Any, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of picture and noise in what a model is given at noise levels [n], by the host's own rule: 1 and
    sigma, but 1 - sigma and sigma where the model was switched to flow matching."""
    none = torch.zeros_like(sigma)
    return sampling.noise_scaling(sigma, none, none + 1), sampling.noise_scaling(sigma, none + 1, none)


def _replace_forward(module: nn.Module, forward: Callable) -> Callable[[], None]:
    """Give a module another forward; returns what undoes it."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward

    def undo() -> None:
        module.__dict__.pop("forward", None)
        if before is not None:
            module.__dict__["forward"] = before

    return undo


def _out_of_place(layer: CLIPLayer) -> Callable:
    """The host adds in place after each norm, whose backward then finds its input changed; and its attention may have
    no backward at all."""

    def forward(x: Tensor, mask: Tensor | None = None, optimized_attention: Callable | None = None) -> Tensor:
        x = x + layer.self_attn(layer.layer_norm1(x), mask, attention_pytorch)
        return x + layer.mlp(layer.layer_norm2(x))

    return forward


def _twice(forward: Callable) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        # The UNet writes into its options while it runs: the block must see the same when it is computed again.
        args = tuple(dict(a) if isinstance(a, dict) else a for a in args)
        kwargs = {name: dict(a) if isinstance(a, dict) else a for name, a in kwargs.items()}
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run

"""What we must know of a MODEL: whether it is SDXL, and its cross-attentions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import comfy.model_base

from ...lookahead.files.block_names import diffusers_path, level_of
from .self_attention import KVBlock

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


@dataclass(frozen=True)
class CrossAttention:
    """One cross-attention of the host's UNet. key: as in the host's `patches_replace`; widths in channels."""

    key: tuple[str, int, int]
    width: int
    context_width: int


def cross_attentions(model: ModelPatcher) -> list[CrossAttention]:
    """All cross-attentions of an SDXL model, in the order of the public files (input, output, middle).

    Read from the model's own modules, so that every block layout of the SDXL family fits. Raises ValueError, one
    sentence, for a model that is not SDXL.
    """
    base = model.model
    unet = model.get_model_object("diffusion_model")
    blocks = getattr(unet, "input_blocks", None), getattr(unet, "output_blocks", None)
    if not isinstance(base, comfy.model_base.SDXL) or None in blocks:
        found = type(getattr(base, "model_config", base)).__name__
        raise ValueError(f"This MODEL is {found}, but a reference works with SDXL only: load an SDXL checkpoint.")
    found = []
    for group, modules in (("input", blocks[0]), ("output", blocks[1]), ("middle", [unet.middle_block])):
        for i, block in enumerate(modules):
            for module in block or ():  # some distilled SDXL have no middle block
                for t, transformer in enumerate(getattr(module, "transformer_blocks", ())):
                    to_k = transformer.attn2.to_k
                    found.append(CrossAttention((group, i, t), to_k.out_features, to_k.in_features))
    return found


def self_attentions(model: ModelPatcher) -> list[KVBlock]:
    """All self-attentions of an SDXL model, in the order in which the host runs them (input, middle, output).

    Raises ValueError as `cross_attentions`.
    """
    order = ("input", "middle", "output")
    found = sorted(cross_attentions(model), key=lambda attention: order.index(attention.key[0]))
    levels = len(model.model.model_config.unet_config["channel_mult"])
    return [KVBlock(a.key, diffusers_path(a.key), a.width, level_of(a.key, levels), a.context_width) for a in found]

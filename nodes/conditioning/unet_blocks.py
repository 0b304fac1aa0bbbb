"""The host's SDXL UNet: its attentions, their widths and keys, and the attention function of a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import comfy.model_base
from comfy.ldm.modules.attention import optimized_attention

from ...lookahead.files.block_names import diffusers_path, level_of

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from torch.nn import Module


BlockKey = tuple[str, int, int]  # of a transformer block, as in the host's `patches_replace`: ("input", 4, 0)


@dataclass(frozen=True)
class CrossAttentionBlock:
    """A cross-attention of the host's UNet; context_width is that of the text it reads. Widths are in channels."""

    key: BlockKey
    width: int
    context_width: int


class KVBlock(NamedTuple):
    """A self-attention of the host's UNet, which may read or export keys and values.

    path: of its transformer block in diffusers; width: in channels; level: how often the latent is halved there;
    context_width: of the text that the cross-attention of the same transformer block reads, in channels.
    """

    key: BlockKey
    path: str
    width: int
    level: int
    context_width: int


def cross_attentions(model: ModelPatcher) -> list[CrossAttentionBlock]:
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
                    found.append(CrossAttentionBlock((group, i, t), to_k.out_features, to_k.in_features))
    return found


def self_attentions(model: ModelPatcher) -> list[KVBlock]:
    """All self-attentions of an SDXL model, in the order in which the host runs them (input, middle, output).

    Raises ValueError as `cross_attentions`.
    """
    order = ("input", "middle", "output")
    found = sorted(cross_attentions(model), key=lambda attention: order.index(attention.key[0]))
    levels = len(model.model.model_config.unet_config["channel_mult"])
    return [KVBlock(a.key, diffusers_path(a.key), a.width, level_of(a.key, levels), a.context_width) for a in found]


def key_value_layers(unet: Module, key: BlockKey) -> tuple[Module, Module]:
    """The layers of the host's UNet that make the keys and the values of a self-attention."""
    group, index, number = key
    block = unet.middle_block if group == "middle" else getattr(unet, f"{group}_blocks")[index]
    (transformers,) = (m.transformer_blocks for m in block if hasattr(m, "transformer_blocks"))
    attention = transformers[number].attn1
    return attention.to_k, attention.to_v


def host_attention(extra: dict[str, Any]) -> Callable:
    """The host's attention (q, k, v, heads) under the options of one block, so that overrides of other nodes hold."""

    def attention(q, k, v, heads):
        return optimized_attention(
            q, k, v, heads, attn_precision=extra.get("attn_precision"), transformer_options=extra
        )

    return attention

"""The node that lets a reference act as image prompt."""

from __future__ import annotations

import logging

import torch
from comfy_api.latest import io
from torch import Tensor

from ...lookahead.method.reference_presets import IMAGE_PROMPT as PRESETS
from ..presets import AS_SET, acting, preset_input
from ..reference.encoder import LoadedEncoder
from ..reference.subject import Reference
from ..schema import schema
from ..sockets import REFERENCE, WEIGHTS
from .attention_lora import PromptLoRA
from .cross_attention import ImagePrompt
from .rows import When
from .unet_blocks import BlockKey, CrossAttentionBlock, cross_attentions, self_attentions
from .weights import WeightFactors
from .wrappers import add_effect


class LookaheadApplyImagePrompt(io.ComfyNode):
    """MODEL, REFERENCE -> MODEL whose cross-attentions also read the reference."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadApplyImagePrompt",
            display_name="Apply Lookahead Image Prompt",
            category="lookahead/reference",
            description="Makes an SDXL model draw who is in the reference (IP-Adapter's image prompt). Several of "
            "these in a row add up; give each a mask to place several people.",
            search_aliases=[
                "ip-adapter",
                "ipadapter apply",
                "image prompt",
                "face",
                "identity",
                "reference",
                "portrait",
                "person",
                "consistent character",
                "face swap",
                "instantid",
                "pulid",
                "personalization",
            ],
            inputs=[
                io.Model.Input("model", tooltip="An SDXL model; LoRAs and other patches may come before or after."),
                REFERENCE.Input("reference", tooltip="From Encode Lookahead Reference."),
                io.Float.Input(
                    "weight",
                    # docs/knobs.md: nearly as like as with 1 (.585, .608), and more of the style stays (.85, .78).
                    default=0.75,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    tooltip="Scale of the image prompt, 0 to 3: 1 as in training, 0 exactly the model without this "
                    "node. Lower it when the picture follows the reference more than the prompt.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Start of its part of the sampling, a share from 0 (first step) to 1. A later start leaves "
                    "the layout of the picture to the prompt.",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="End of its part of the sampling, a share from 0 to 1 (after the last step).",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Mask of the picture, stretched over it: the image prompt acts where it is white. One mask "
                    "for all images of a batch, or several in turn.",
                ),
                WEIGHTS.Input(
                    "weights",
                    optional=True,
                    advanced=True,
                    tooltip="Factors of the weight by layer and over the steps, from Lookahead Weights.",
                ),
                io.Float.Input(
                    "lora_weight",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="Scale of the LoRA that an IP-Adapter FaceID brings in its file, 0 to 2: 1 as in training. "
                    "Other encoders have none.",
                ),
                preset_input(
                    PRESETS,
                    "How much of the person against how much of the prompt, written into weight, start and end: "
                    "likeness is a weight of 1, balanced 0.75, style 0.5. A field that you change goes back to as set "
                    "below.",
                ),
            ],
            outputs=[
                io.Model.Output("MODEL", display_name="model", tooltip="The model with the image prompt applied."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        reference: Reference,
        weight: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        mask: Tensor | None = None,
        weights: WeightFactors | None = None,
        lora_weight: float = 1.0,
        preset: str = AS_SET,
    ) -> io.NodeOutput:
        given = {"weight": weight, "start": start, "end": end}
        weight, start, end = acting("Apply Lookahead Image Prompt", preset, PRESETS, given)
        if start > end:
            raise ValueError(f"The start ({start}) is later than the end ({end}): set an end that is not before it.")
        attentions = cross_attentions(model)
        if any(subject.keys_values is None for subject in reference.subjects):
            raise ValueError(
                "The reference was read without an encoder, which the image prompt needs: connect encoder and "
                "clip_vision at Encode Lookahead Reference."
            )
        layouts = [key_layout(subject.encoder, attentions) for subject in reference.subjects]
        if mask is not None and not (mask > 0).any():
            logging.warning(
                "[LCM-Lookahead] the mask of an image prompt is empty, so it acts nowhere: leave it open, or invert it."
            )
        weights = weights or WeightFactors()
        layers = weights.of_layers([block.key for block in self_attentions(model)])
        for subject, layout in zip(reference.subjects, layouts, strict=True):
            layout = {key: place for key, place in layout.items() if layers[key] != 0}
            if weight * subject.weight != 0 and layout:
                prompt = ImagePrompt(
                    keys_values=subject.keys_values,
                    null_keys_values=subject.null_keys_values,
                    layout=layout,
                    weight=torch.tensor(weight * subject.weight, dtype=torch.float32),
                    when=When(start, end, weights.steps),
                    mask=None if mask is None else mask.reshape(-1, *mask.shape[-2:]).float().clamp(0, 1),
                    layers={key: factor for key, factor in layers.items() if factor != 1},
                )
                model = add_effect(model, prompt)
                if subject.encoder.lora_patcher is not None and lora_weight:
                    numbers = {block.key: number for number, block in enumerate(attentions)}
                    lora = PromptLoRA(subject.encoder.lora_patcher, numbers, lora_weight, When(start, end))
                    model = add_effect(model, lora)
        return io.NodeOutput(model)


def key_layout(encoder: LoadedEncoder, attentions: list[CrossAttentionBlock]) -> dict[BlockKey, tuple[int, int]]:
    """For each cross-attention of a model where its keys begin in the encoder's packed channels, and their width.

    Raises ValueError, one sentence, where the encoder was made for a model of another layout.
    """
    widths = tuple(attention.width for attention in attentions)
    contexts = {attention.context_width for attention in attentions}
    if widths != encoder.widths or contexts != {encoder.sizes.context_width}:
        raise ValueError(
            f"{encoder.name} was made for another base model: it has {len(encoder.widths)} cross-attentions of widths "
            f"{_set(encoder.widths)} and a text width of {encoder.sizes.context_width}, and this MODEL has "
            f"{len(widths)} of widths {_set(widths)} and {_set(contexts)}: use the encoder made for this model."
        )
    layout, offset = {}, 0
    for attention in attentions:
        layout[attention.key] = (offset, attention.width)
        offset += 2 * attention.width
    return layout


def _set(numbers) -> str:
    return "/".join(str(n) for n in sorted(set(numbers)))

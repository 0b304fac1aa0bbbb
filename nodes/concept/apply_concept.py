"""The node that has a model draw a concept."""

from __future__ import annotations

import logging

from comfy_api.latest import io
from torch import Tensor

from ...lookahead.method.concept import Concept
from ...lookahead.method.concept_input import ConceptError, check_blend
from ..conditioning.rows import When
from ..conditioning.unet_blocks import self_attentions
from ..conditioning.wrappers import EffectContext, add_effect
from ..schema import schema
from ..sockets import CONCEPT
from .concept_effect import ALL, CONDITIONAL, ConceptEffect, total_share
from .predict_concept import check_blocks

THE_CONCEPT_S = -1.0
EVERYWHERE, GROUPS = "all", ("input", "middle", "output")


class LookaheadApplyConcept(io.ComfyNode):
    """MODEL, CONCEPT -> MODEL whose attentions have the concept's offsets beside a plain path."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadApplyConcept",
            display_name="Apply Lookahead Concept",
            category="lookahead/concept",
            description="Makes an SDXL model draw a concept: each attention runs with the concept's offsets and the "
            "soft prompt, and plain with the hard prompt, and both are blended. Use it with Encode Concept Prompt; "
            "image prompt, KV injection and lookahead guidance may act beside it.",
            search_aliases=["DATE", "concept", "dual path", "personalization", "lora"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The SDXL model that the concept was made with; LoRAs may come before or after."
                ),
                CONCEPT.Input("concept", tooltip="From Predict, Tune or Load Lookahead Concept."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    tooltip="Factor of the concept's attention offsets, 0 to 3: 1 as trained, 0 exactly the model "
                    "without this node.",
                ),
                io.Float.Input(
                    "blend",
                    default=THE_CONCEPT_S,
                    min=-1.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the path with the concept, 0 to 1: more likeness above, more of the prompt "
                    "below; 0 is the model under the hard prompt. -1 takes what the concept was tuned with, which is "
                    "what it was made for.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Start of its part of the sampling, a share from 0 (first step) to 1.",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="End of its part of the sampling, a share from 0 to 1 (after the last step).",
                ),
                io.Combo.Input(
                    "rows",
                    options=[ALL, CONDITIONAL],
                    default=ALL,
                    advanced=True,
                    tooltip="Whether the offsets act on the negative prompt too, as a LoRA does, or on the positive "
                    "alone.",
                ),
                io.Combo.Input(
                    "blocks",
                    options=[EVERYWHERE, *GROUPS],
                    default=EVERYWHERE,
                    advanced=True,
                    tooltip="Blocks of the UNet in which it acts: all, or one of its three parts.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Mask of the picture, stretched over it: the concept acts where it is white.",
                ),
            ],
            outputs=[
                io.Model.Output("MODEL", display_name="model", tooltip="The model with the concept applied."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        concept: Concept,
        strength: float = 1.0,
        blend: float = THE_CONCEPT_S,
        start: float = 0.0,
        end: float = 1.0,
        rows: str = ALL,
        blocks: str = EVERYWHERE,
        mask: Tensor | None = None,
    ) -> io.NodeOutput:
        if start > end:
            raise ValueError(f"The start ({start}) is later than the end ({end}): set an end that is not before it.")
        blend = concept.blend if blend == THE_CONCEPT_S else check_blend(blend)
        check_blocks(model, concept)
        if mask is not None and not (mask > 0).any():
            logging.warning(
                "[LCM-Lookahead] the mask of a concept is empty, so it acts nowhere: leave it open, or invert it."
            )
        if strength == 0:
            return io.NodeOutput(model)
        changed = {name.partition(".attn")[0] for name in concept.offsets}
        effect = ConceptEffect(
            offsets=concept.offsets,
            blocks={
                block.key: block.path
                for block in self_attentions(model)
                if blocks in (EVERYWHERE, block.key[0]) and (block.path in changed or blend < 1)
            },
            strength=strength,
            blend=blend,
            rows=rows,
            mask=None if mask is None else mask.reshape(-1, *mask.shape[-2:]).float().clamp(0, 1),
            when=When(start, end),
        )
        others = [e for e in EffectContext.of(model.model_options).effects if isinstance(e, ConceptEffect)]
        if others and (share := total_share([*others, effect])) > 1 + 1e-6:
            raise ConceptError(
                f"The blends of {len(others) + 1} concepts on this MODEL add up to {share:.2f}, which leaves less than "
                "nothing for the plain path: set blends that add up to 1 at most, or masks that do not overlap."
            )
        return io.NodeOutput(add_effect(model, effect))

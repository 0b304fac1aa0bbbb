"""The node that says how strongly a reference acts in which layers and at which steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io

from ...lookahead.files.block_names import diffusers_path
from ...lookahead.method.layer_weights import LARGEST, LIST, PRESETS, layer_weights, numbers, pairs, sampled
from ..schema import schema
from ..sockets import CURVE, WEIGHTS
from .unet_blocks import BlockKey


@dataclass(frozen=True)
class WeightFactors:
    """The value of a LOOKAHEAD_WEIGHTS socket: factors of the weight with which a node applies a reference.

    preset, layers: as `layer_weights` takes them; steps: spread evenly over the sampling, empty for 1 at every step.
    """

    preset: str = next(iter(PRESETS))
    layers: str = ""
    steps: tuple[float, ...] = ()

    def of_layers(self, keys: Sequence[BlockKey]) -> dict[BlockKey, float]:
        """The factor of each transformer block of a model, whose keys come in the order in which the host runs them.

        Raises ValueError, one sentence, where a list does not fit the model.
        """
        weights = layer_weights([diffusers_path(key) for key in keys], self.preset, self.layers)
        return {key: weights[diffusers_path(key)] for key in keys}


def steps_of(text: str, curve: Any) -> tuple[float, ...]:
    """The factors over the sampling, from a curve of the host or a text of numbers; empty where they are all 1.

    Raises ValueError, one sentence, where neither can be read.
    """
    values = tuple(numbers(text, "The steps are"))
    if curve is not None:
        try:
            if hasattr(curve, "interp"):  # the host's own curve object
                values = tuple(float(curve.interp(n / 256)) for n in range(257))
            else:  # older hosts hand on its points
                values = sampled(curve["points"] if isinstance(curve, dict) else curve)
        except (TypeError, ValueError, KeyError, IndexError) as error:
            raise ValueError("The curve has no points: draw one in Curve Editor, or take it off.") from error
        if not all(abs(value) <= LARGEST for value in values):
            raise ValueError(f"The curve goes beyond -{LARGEST:g} to {LARGEST:g}: draw it within.")
    return () if all(value == 1 for value in values) else values


class LookaheadWeights(io.ComfyNode):
    """Preset, list, curve -> WEIGHTS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadWeights",
            display_name="Lookahead Weights",
            category="lookahead/reference",
            description="How strongly a reference acts in which layers of the model (likeness, style, composition, or "
            "a list) and at which steps, as factors of the weight of Apply Lookahead Image Prompt and Apply Lookahead "
            "KV Injection.",
            search_aliases=["weight type", "layer weights", "style transfer", "composition", "ease in", "weight curve"],
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS, LIST],
                    default=next(iter(PRESETS)),
                    tooltip="Layers in which it acts. even: all. likeness: all but those of style and composition. "
                    "style, composition: that layer alone, as InstantStyle found them in SDXL. list: as layers says.",
                ),
                io.String.Input(
                    "layers",
                    default="",
                    tooltip="For the preset list. A number for each of SDXL's 11 layers in the order in which they run "
                    "(0-3 encoder half, 4 middle, 5-10 decoder half), such as 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 1; or "
                    "single ones with the others 0, such as 3:1, 6:0.5. From -5 to 5.",
                ),
                io.String.Input(
                    "steps",
                    default="",
                    tooltip="Factors over the sampling, spread evenly from its start to its end with straight lines "
                    "between, such as 0, 1, 1 (ease in) or 1, 0.4 (ease out). From -5 to 5; empty is 1 everywhere.",
                ),
                CURVE.Input(
                    "curve",
                    optional=True,
                    extra_dict={"forceInput": True},
                    tooltip="Curve from the host's Curve Editor in place of steps: from the start of the sampling "
                    "(left) to its end, from 0 (bottom) to 1.",
                ),
            ],
            outputs=[
                WEIGHTS.Output(
                    "WEIGHTS",
                    display_name="weights",
                    tooltip="For the weights of Apply Lookahead Image Prompt and of Apply Lookahead KV Injection.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, preset: str = next(iter(PRESETS)), layers: str = "", steps: str = "", curve: Any = None
    ) -> io.NodeOutput:
        if preset == LIST and pairs(layers) is None and not numbers(layers, "The layers are"):
            raise ValueError("The preset is list, and layers is empty: write its numbers, or choose another preset.")
        return io.NodeOutput(WeightFactors(preset, layers if preset == LIST else "", steps_of(steps, curve)))

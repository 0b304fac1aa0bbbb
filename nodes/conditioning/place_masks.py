"""The node that makes a mask for the place of each person in a picture."""

from __future__ import annotations

import torch
from comfy_api.latest import io
from torch import Tensor

from ..schema import schema

BESIDE, BELOW = "side by side", "one above the other"
SIDE = 256  # pixels; the nodes that read masks stretch them over the picture
MOST = 3


class LookaheadPlaceMasks(io.ComfyNode):
    """Number of people -> a MASK for each."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def mask(number: int, which: str) -> io.Output:
            return io.Mask.Output(
                f"MASK_{number}",
                display_name=f"mask_{number}",
                tooltip=f"Place of the {which} person, for Apply Lookahead Image Prompt, Apply Lookahead KV Injection "
                "and Conditioning (Set Mask).",
            )

        return schema(
            node_id="LookaheadPlaceMasks",
            display_name="Lookahead Place Masks",
            category="lookahead/reference",
            description="Divides the picture among two or three people: a mask for each, for the reference and the "
            "prompt that belong there. The masks cross-fade where they meet and add up to 1 everywhere.",
            search_aliases=["two people", "regional", "split mask", "left right", "couple", "attention couple"],
            inputs=[
                io.Int.Input("people", default=2, min=2, max=MOST, tooltip="Number of people, 2 or 3."),
                io.Combo.Input(
                    "arrangement",
                    options=[BESIDE, BELOW],
                    default=BESIDE,
                    tooltip="Arrangement of the places: side by side from the left, or one above the other, top first.",
                ),
                io.Float.Input(
                    "overlap",
                    default=0.1,
                    min=0.0,
                    max=0.3,
                    step=0.01,
                    tooltip="Width of the cross-fade where two places meet, a share of the picture from 0 to 0.3.",
                ),
            ],
            outputs=[mask(1, "first"), mask(2, "second"), mask(3, "third (empty for two people)")],
        )

    @classmethod
    def execute(cls, people: int = 2, arrangement: str = BESIDE, overlap: float = 0.1) -> io.NodeOutput:
        masks = places(people, overlap, SIDE)
        masks = masks[:, None, :].expand(-1, SIDE, -1) if arrangement == BESIDE else masks[:, :, None]
        masks = masks.expand(-1, SIDE, SIDE).contiguous()
        empty = torch.zeros(MOST - people, SIDE, SIDE)
        return io.NodeOutput(*torch.cat([masks, empty])[:, None])


def places(people: int, overlap: float, size: int) -> Tensor:
    """The share of each person along a line of `size` pixels, [people, size]: in equal parts, which add up to 1.

    overlap: width of the straight ramps where parts meet, as a share of the line.
    """
    middles = (torch.arange(size) + 0.5) / size
    borders = [n / people for n in range(1, people)]
    beyond = [((middles - border) / max(overlap, 1e-6) + 0.5).clamp(0, 1) for border in borders]
    begun = [torch.ones(size), *beyond]  # how far each part has begun, and with it the one before has ended
    return torch.stack([a - b for a, b in zip(begun, [*beyond, torch.zeros(size)], strict=True)])

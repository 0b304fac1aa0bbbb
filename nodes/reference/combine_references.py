"""The node that puts references together, each with a weight of its own."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..schema import schema
from ..sockets import REFERENCE
from .subject import Reference


class LookaheadCombineReferences(io.ComfyNode):
    """REFERENCE, REFERENCE -> REFERENCE of all their subjects."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def weight(name: str, which: str) -> io.Float.Input:
            return io.Float.Input(
                name,
                default=1.0,
                min=-3.0,
                max=3.0,
                step=0.05,
                tooltip=f"Factor of the weight with which the {which} reference is applied, -3 to 3: 0 leaves it out, "
                "a negative one is subtracted.",
            )

        return schema(
            node_id="LookaheadCombineReferences",
            display_name="Combine Lookahead References",
            category="lookahead/reference",
            description="Puts two references together, each with a weight of its own: several pictures or files of one "
            "person, a mixture of two, or one without what the other shows. More of these in a row take more.",
            search_aliases=["combine embeds", "subtract", "blend faces", "mix faces", "merge references"],
            inputs=[
                REFERENCE.Input("reference_1", tooltip="From Encode or Load Lookahead Reference."),
                weight("weight_1", "first"),
                REFERENCE.Input("reference_2", tooltip="The other one, from Encode or Load Lookahead Reference."),
                weight("weight_2", "second"),
            ],
            outputs=[
                REFERENCE.Output(
                    "REFERENCE", display_name="reference", tooltip="Both, for the nodes that apply or save a reference."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, reference_1: Reference, reference_2: Reference, weight_1: float = 1.0, weight_2: float = 1.0
    ) -> io.NodeOutput:
        parts = ((reference_1, weight_1), (reference_2, weight_2))
        subjects = [replace(s, weight=s.weight * weight) for part, weight in parts for s in part.subjects if weight]
        if not subjects:
            raise ValueError("Both weights are 0, so no reference is left: give one of them another weight.")
        return io.NodeOutput(Reference(tuple(subjects)))

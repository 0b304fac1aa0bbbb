"""The node that makes one loss of several."""

from __future__ import annotations

from comfy_api.latest import io

from ...lookahead.losses.base import Combined
from ..schema import schema
from ..sockets import LOSS
from .lookahead_loss import LookaheadLoss

SLOTS = ("a", "b", "c", "d")


class LookaheadCombineLosses(io.ComfyNode):
    """LOOKAHEAD_LOSS, several -> LOOKAHEAD_LOSS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = []
        for slot in SLOTS:
            inputs.append(
                LOSS.Input(f"loss_{slot}", optional=slot != SLOTS[0], tooltip="A loss; open ones are left out.")
            )
            inputs.append(
                io.Float.Input(
                    f"weight_{slot}",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    round=0.001,
                    tooltip=f"How much loss_{slot} counts beside the others. 0 leaves it out and saves its time.",
                )
            )
        return schema(
            node_id="LookaheadCombineLosses",
            display_name="Combine Lookahead Losses",
            category="lookahead/losses",
            description="Several losses as one: the mean of their values, weighed. A likeness and words, say.",
            search_aliases=["sum losses", "weighted loss", "mix losses"],
            inputs=inputs,
            outputs=[LOSS.Output("LOSS", display_name="loss", tooltip="For the Lookahead Guidance Sampler.")],
        )

    @classmethod
    def execute(cls, **inputs: LookaheadLoss | float) -> io.NodeOutput:
        given = [(inputs.get(f"weight_{slot}", 1.0), inputs.get(f"loss_{slot}")) for slot in SLOTS]
        parts = [(weight, loss) for weight, loss in given if loss is not None]
        combined = Combined(tuple((weight, part.loss) for weight, part in parts))
        counting = [(weight, part) for weight, part in parts if weight]
        patchers = dict.fromkeys(patcher for _, part in counting for patcher in part.patchers)
        names = [f"({part.name})" if isinstance(part.loss, Combined) else part.name for _, part in counting]
        name = " + ".join(f"{weight:g} {name}" for (weight, _), name in zip(counting, names, strict=True))
        return io.NodeOutput(LookaheadLoss(combined, tuple(patchers), name))

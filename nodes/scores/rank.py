"""The node that puts the best picture of a batch first."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..schema import schema
from ..sockets import SCORES
from .scores import Scores, best_first


class LookaheadRank(io.ComfyNode):
    """Pictures and their scores -> the pictures, best first."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadRank",
            display_name="Lookahead Rank",
            category="lookahead/scores",
            has_intermediate_output=True,
            description="Puts the pictures of a batch in order, the best first, and keeps as many as are asked for. A "
            "second score can be a limit: pictures below it come last, however good the first.",
            search_aliases=["best of batch", "sort images", "pick best", "rank images", "best of n", "filter batch"],
            inputs=[
                io.Image.Input("image", tooltip="The pictures that were scored, as a batch."),
                SCORES.Input("scores", tooltip="From Lookahead Identity Score or Lookahead Prompt Score: their order."),
                io.Int.Input(
                    "keep", default=1, min=0, max=4096, tooltip="How many of the best to put out. 0: all of them."
                ),
                SCORES.Input(
                    "limit",
                    optional=True,
                    tooltip="Another score of the same pictures. Those below at_least come last. Scores of two "
                    "measures are never added.",
                ),
                io.Float.Input(
                    "at_least",
                    default=0.0,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    tooltip="With limit: the least that a picture needs of it.",
                ),
            ],
            outputs=[
                io.Image.Output("IMAGE", display_name="image", tooltip="The best pictures, the best first."),
                SCORES.Output("SCORES", display_name="scores", tooltip="Their scores, in the same order."),
                io.String.Output(
                    "ORDER", display_name="order", tooltip="Their numbers in the batch, from 1, the best first."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, image: Tensor, scores: Scores, keep: int = 1, limit: Scores | None = None, at_least: float = 0.0
    ) -> io.NodeOutput:
        for name, given in (("scores", scores), ("limit", limit)):
            if given is not None and len(given.values) != len(image):
                raise ValueError(
                    f"There are {len(image)} pictures, and {name} is of {len(given.values)}: connect the same batch to "
                    "both."
                )
        order = best_first(scores.values, None if limit is None else limit.values, at_least)
        order = order[:keep] if keep else order
        ranked = Scores(scores.measure, scores.values[torch.tensor(order)])
        said = ", ".join(str(n + 1) for n in order)
        return io.NodeOutput(image[order], ranked, said, ui=ui.PreviewText(f"best first: {said}\n{ranked.text()}"))

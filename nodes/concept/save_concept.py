"""The node that saves a concept, also as files that any tool loads."""

from __future__ import annotations

import re

from comfy_api.latest import io, ui

from ...lookahead.files.concept_file import write_concept, write_stock
from ...lookahead.method.concept import Concept
from ..folders import made, plain_name
from ..schema import schema
from ..sockets import CONCEPT
from .concept_files import CONCEPTS


class LookaheadSaveConcept(io.ComfyNode):
    """CONCEPT -> file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadSaveConcept",
            display_name="Save Lookahead Concept",
            category="lookahead/concept",
            description="Writes a concept into models/lookahead_concepts (9 MB of SDXL), and on request as a LoRA and "
            "an embedding that any tool loads. Those are the concept alone, as blend 1 draws it.",
            search_aliases=["DATE", "concept", "export lora", "export embedding"],
            is_output_node=True,
            inputs=[
                CONCEPT.Input("concept", tooltip="From Predict or Tune Lookahead Concept."),
                io.String.Input(
                    "name",
                    default="my_concept",
                    tooltip="Name of the file, of letters, numbers, spaces, points, - and _. Where it is there "
                    "already, a number is put behind it.",
                ),
                io.Boolean.Input(
                    "also_as_lora_and_embedding",
                    default=False,
                    tooltip="Also write models/loras/NAME_lora.safetensors and "
                    "models/embeddings/NAME_embedding.safetensors: load the first as any LoRA, and write "
                    "embedding:NAME_embedding in a prompt.",
                ),
            ],
            outputs=[
                io.String.Output("FILES", display_name="files", tooltip="What was written, a file a line."),
            ],
        )

    @classmethod
    def execute(
        cls, concept: Concept, name: str = "my_concept", also_as_lora_and_embedding: bool = False
    ) -> io.NodeOutput:
        name = name.strip().removesuffix(".safetensors")
        if not re.fullmatch(r"\w[\w .-]*", name):
            raise ValueError(
                f"The name {name!r} is none for a file: use letters, numbers, spaces, points, - and _, and begin with "
                "one of the first two."
            )
        name = plain_name(name, "name", "my_concept")
        kinds = (CONCEPTS, "loras", "embeddings") if also_as_lora_and_embedding else (CONCEPTS,)
        folders = [made(kind) for kind in kinds]
        number, free = 1, name
        while (folders[0] / f"{free}.safetensors").exists():
            number += 1
            free = f"{name}_{number}"
        written = [folders[0] / f"{free}.safetensors"]
        write_concept(written[0], concept)
        if also_as_lora_and_embedding:
            written += write_stock(folders[1], free, concept, embeddings=folders[2])
        text = "\n".join(map(str, written))
        return io.NodeOutput(text, ui=ui.PreviewText(text))

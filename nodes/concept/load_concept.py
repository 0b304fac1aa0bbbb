"""The node that loads a concept."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ...lookahead.files.concept_file import read_concept
from ..folders import changed, found, path_in, safetensors_in
from ..schema import schema
from ..sockets import CONCEPT
from .concept_files import CONCEPTS


class LookaheadLoadConcept(io.ComfyNode):
    """File -> CONCEPT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadLoadConcept",
            display_name="Load Lookahead Concept",
            category="lookahead/concept",
            has_intermediate_output=True,
            description="Loads a concept that Save Lookahead Concept or `lookahead concept` has written: no encoder is "
            "needed any more.",
            search_aliases=["DATE", "concept", "textual inversion", "embedding", "personalization"],
            inputs=[
                io.Combo.Input(
                    "concept_name",
                    options=safetensors_in(CONCEPTS),
                    tooltip="A .safetensors file in models/lookahead_concepts.",
                ),
            ],
            outputs=[
                CONCEPT.Output(
                    "CONCEPT", display_name="concept", tooltip="For Encode Concept Prompt and Apply Lookahead Concept."
                ),
                io.String.Output(
                    "WORD",
                    display_name="word",
                    tooltip="The concept's real word, which was chosen when it was made.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, concept_name: str | None = None) -> bool | str:
        """Say where the file was looked for, instead of the host's 'value not in list'."""
        return found(CONCEPTS, concept_name, "concept")

    @classmethod
    def fingerprint_inputs(cls, concept_name: str | None = None) -> str:
        """Load again when the file was replaced."""
        return changed(CONCEPTS, concept_name)

    @classmethod
    def execute(cls, concept_name: str) -> io.NodeOutput:
        concept = read_concept(path_in(CONCEPTS, concept_name, "concept"))
        steps = concept.about.get("steps", "0")
        text = f"{concept.word} (tuned for {steps} steps, blend {concept.blend:g})"
        return io.NodeOutput(concept, concept.word, ui=ui.PreviewText(text))

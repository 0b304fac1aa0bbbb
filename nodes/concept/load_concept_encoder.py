"""The node that loads a concept encoder."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..folders import changed, found, path_in, safetensors_in
from ..schema import schema
from ..sockets import CONCEPT_ENCODER
from .concept_files import ENCODERS, LoadedConceptEncoder


class LookaheadLoadConceptEncoder(io.ComfyNode):
    """File -> CONCEPT_ENCODER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadLoadConceptEncoder",
            display_name="Load Lookahead Concept Encoder",
            category="lookahead/concept",
            has_intermediate_output=True,
            description="Loads a concept encoder, which turns one picture of anything into a word and attention "
            "offsets of SDXL (after DATE, arXiv 2307.06925). Made with `lookahead concept train`.",
            search_aliases=["DATE", "concept", "textual inversion encoder", "e4t", "personalization", "hypernetwork"],
            inputs=[
                io.Combo.Input(
                    "encoder_name",
                    options=safetensors_in(ENCODERS),
                    tooltip="A .safetensors file in models/lookahead that `lookahead concept train` has written.",
                ),
            ],
            outputs=[
                CONCEPT_ENCODER.Output(
                    "CONCEPT_ENCODER", display_name="concept_encoder", tooltip="For Predict Lookahead Concept."
                ),
                io.String.Output(
                    "PROVENANCE",
                    display_name="provenance",
                    tooltip="What the file says about itself: base model, image encoder, data, regulariser.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, encoder_name: str | None = None) -> bool | str:
        """Say where the file was looked for, instead of the host's 'value not in list'."""
        return found(ENCODERS, encoder_name, "concept encoder")

    @classmethod
    def fingerprint_inputs(cls, encoder_name: str | None = None) -> str:
        """Load again when the file was replaced."""
        return changed(ENCODERS, encoder_name)

    @classmethod
    def execute(cls, encoder_name: str) -> io.NodeOutput:
        loaded = LoadedConceptEncoder(path_in(ENCODERS, encoder_name, "concept encoder"))
        text = loaded.provenance()
        return io.NodeOutput(loaded, text, ui=ui.PreviewText(text))

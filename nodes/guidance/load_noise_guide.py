"""The node that loads a noise guide."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..folders import changed, found, path_in, safetensors_in
from ..schema import schema
from ..sockets import NOISE_GUIDE
from .noise_guide import LoadedNoiseGuide

FOLDER, WHAT = "lookahead", "noise guide"


class LookaheadLoadNoiseGuide(io.ComfyNode):
    """File -> NOISE_GUIDE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadLoadNoiseGuide",
            display_name="Load Lookahead Noise Guide",
            category="lookahead/loaders",
            has_intermediate_output=True,
            description="Loads a noise guide: a small network that foretells in one pass how lookahead guidance would "
            "move the noise for a person's likeness. Made with `lookahead guide train`.",
            search_aliases=["noise guide", "hypernoise", "noise hypernetwork", "amortised guidance", "lcm lookahead"],
            inputs=[
                io.Combo.Input(
                    "guide_name",
                    options=safetensors_in(FOLDER),
                    tooltip="A .safetensors file in models/lookahead that `lookahead guide train` has written.",
                ),
            ],
            outputs=[
                NOISE_GUIDE.Output(
                    "NOISE_GUIDE", display_name="noise_guide", tooltip="For Lookahead Guidance Sampler."
                ),
                io.String.Output(
                    "PROVENANCE",
                    display_name="provenance",
                    tooltip="What the file says about itself: base model, few-step LoRA, recogniser, licence, data.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, guide_name: str | None = None) -> bool | str:
        """Say where the file was looked for, instead of the host's 'value not in list'."""
        return found(FOLDER, guide_name, WHAT)

    @classmethod
    def fingerprint_inputs(cls, guide_name: str | None = None) -> str:
        """Load again when the file was replaced."""
        return changed(FOLDER, guide_name)

    @classmethod
    def execute(cls, guide_name: str) -> io.NodeOutput:
        loaded = LoadedNoiseGuide(path_in(FOLDER, guide_name, WHAT))
        text = loaded.file.provenance()
        return io.NodeOutput(loaded, text, ui=ui.PreviewText(text))

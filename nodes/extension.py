"""The extension that the host asks for its nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .apply_image_prompt import LookaheadApplyImagePrompt
from .apply_kv_injection import LookaheadApplyKVInjection
from .convert_encoder import LookaheadConvertEncoder
from .encode_reference import LookaheadEncodeReference
from .guider import LookaheadGuider
from .load_encoder import LookaheadLoadEncoder, register_folders


class LookaheadExtension(ComfyExtension):
    """All nodes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        register_folders()  # here, since the oldest supported hosts do not call on_load
        return [
            LookaheadLoadEncoder,
            LookaheadEncodeReference,
            LookaheadApplyImagePrompt,
            LookaheadApplyKVInjection,
            LookaheadGuider,
            LookaheadConvertEncoder,
        ]

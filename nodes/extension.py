"""The extension that the host asks for its nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .apply_image_prompt import LookaheadApplyImagePrompt
from .apply_kv_injection import LookaheadApplyKVInjection
from .clip_loss import LookaheadCLIPLoss
from .combine_losses import LookaheadCombineLosses
from .convert_encoder import LookaheadConvertEncoder
from .crop_face import LookaheadCropFace
from .encode_reference import LookaheadEncodeReference
from .guidance_report import LookaheadGuidanceReport
from .guidance_sampler import LookaheadGuidanceSampler
from .guider import LookaheadGuider
from .identity_loss import LookaheadIdentityLoss
from .l1_loss import LookaheadL1Loss
from .load_encoder import LookaheadLoadEncoder, register_folders
from .load_face_analysis import LookaheadLoadFaceAnalysis, register_insightface_folder
from .loss_network import register_folder
from .lpips_loss import LookaheadLPIPSLoss
from .preview_grid import LookaheadPreviewGrid
from .shortcut import LookaheadShortcut


class LookaheadExtension(ComfyExtension):
    """All nodes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        register_folders()  # here, since the oldest supported hosts do not call on_load
        register_folder()
        register_insightface_folder()
        return [
            LookaheadLoadEncoder,
            LookaheadLoadFaceAnalysis,
            LookaheadCropFace,
            LookaheadEncodeReference,
            LookaheadApplyImagePrompt,
            LookaheadApplyKVInjection,
            LookaheadGuider,
            LookaheadIdentityLoss,
            LookaheadCLIPLoss,
            LookaheadLPIPSLoss,
            LookaheadL1Loss,
            LookaheadCombineLosses,
            LookaheadShortcut,
            LookaheadGuidanceSampler,
            LookaheadGuidanceReport,
            LookaheadPreviewGrid,
            LookaheadConvertEncoder,
        ]

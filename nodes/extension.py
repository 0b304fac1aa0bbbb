"""The extension that the host asks for its nodes."""

from __future__ import annotations

import sys

from comfy_api.latest import ComfyExtension, io

from .concept.apply_concept import LookaheadApplyConcept
from .concept.concept_files import CONCEPTS
from .concept.encode_concept_prompt import LookaheadEncodeConceptPrompt
from .concept.load_concept import LookaheadLoadConcept
from .concept.load_concept_encoder import LookaheadLoadConceptEncoder
from .concept.predict_concept import LookaheadPredictConcept
from .concept.save_concept import LookaheadSaveConcept
from .concept.tune_concept import LookaheadTuneConcept
from .conditioning.apply_image_prompt import LookaheadApplyImagePrompt
from .conditioning.apply_kv_injection import LookaheadApplyKVInjection
from .conditioning.guider import LookaheadGuider
from .conditioning.place_masks import LookaheadPlaceMasks
from .conditioning.weights import LookaheadWeights
from .examples import put_examples
from .folders import register
from .guidance.guidance_report import LookaheadGuidanceReport
from .guidance.guidance_sampler import LookaheadGuidanceSampler
from .guidance.load_noise_guide import LookaheadLoadNoiseGuide
from .guidance.preview_grid import LookaheadPreviewGrid
from .guidance.shortcut import LookaheadShortcut
from .losses.clip_loss import LookaheadCLIPLoss
from .losses.combine_losses import LookaheadCombineLosses
from .losses.identity_loss import LookaheadIdentityLoss
from .losses.l1_loss import LookaheadL1Loss
from .losses.lpips_loss import LookaheadLPIPSLoss
from .losses.network import FOLDER as LOSSES
from .losses.people_loss import LookaheadPeopleLoss
from .notices import tell_the_page
from .reference.combine_references import LookaheadCombineReferences
from .reference.convert_encoder import LookaheadConvertEncoder
from .reference.crop_face import LookaheadCropFace
from .reference.encode_face import LookaheadEncodeFace
from .reference.encode_reference import LookaheadEncodeReference
from .reference.load_encoder import FOLDERS as ENCODERS
from .reference.load_encoder import LookaheadLoadEncoder
from .reference.load_face_analysis import FOLDER as FACE_PACKS
from .reference.load_face_analysis import LookaheadLoadFaceAnalysis
from .reference.load_reference import LookaheadLoadReference
from .reference.reference_files import FOLDER as REFERENCES
from .reference.save_reference import LookaheadSaveReference
from .replacements import register_replacements
from .scores.identity_score import LookaheadIdentityScore
from .scores.prompt_score import LookaheadPromptScore
from .scores.rank import LookaheadRank
from .versions import leaves_out_unknown, needs_a_newer_host


class LookaheadExtension(ComfyExtension):
    """All nodes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        for folder in (*ENCODERS, LOSSES, FACE_PACKS, REFERENCES, CONCEPTS):
            register(folder)  # here, since the oldest supported hosts do not call on_load
        await register_replacements()
        put_examples()
        tell_the_page()
        nodes = [
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
            LookaheadSaveReference,
            LookaheadLoadReference,
            LookaheadCombineReferences,
            LookaheadWeights,
            LookaheadEncodeFace,
            LookaheadPlaceMasks,
            LookaheadLoadConceptEncoder,
            LookaheadPredictConcept,
            LookaheadTuneConcept,
            LookaheadEncodeConceptPrompt,
            LookaheadApplyConcept,
            LookaheadSaveConcept,
            LookaheadLoadConcept,
            LookaheadIdentityScore,
            LookaheadPromptScore,
            LookaheadRank,
            LookaheadPeopleLoss,
            LookaheadLoadNoiseGuide,
        ]
        with needs_a_newer_host():
            for node in nodes:  # before the host registers the first: all of them or none
                leaves_out_unknown(node).GET_SCHEMA()
        name_errors(__name__.rpartition(".nodes.")[0])
        return nodes


def name_errors(package: str) -> None:
    """The host shows an error's class with its module, which begins with the path of our folder: give it our name."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(package + ".")]
    for value in (value for module in modules for value in list(vars(module).values())):
        if isinstance(value, type) and issubclass(value, Exception) and value.__module__.startswith(package + "."):
            value.__module__ = "LCM-Lookahead"

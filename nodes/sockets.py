"""The socket types of this pack by name. The names are frozen: they stand in people's workflow files.

What travels through a socket is declared by the module that makes it.
"""

from __future__ import annotations

from comfy_api.latest import io

ENCODER = io.Custom("LOOKAHEAD_ENCODER")  # reference/encoder.py
REFERENCE = io.Custom("LOOKAHEAD_REFERENCE")  # reference/subject.py
FACE_ANALYSIS = io.Custom("LOOKAHEAD_FACE_ANALYSIS")  # lookahead/vision/face_models.py
LOSS = io.Custom("LOOKAHEAD_LOSS")  # losses/lookahead_loss.py
SHORTCUT = io.Custom("LOOKAHEAD_SHORTCUT")  # guidance/shortcut.py
WEIGHTS = io.Custom("LOOKAHEAD_WEIGHTS")  # conditioning/weights.py
CONCEPT_ENCODER = io.Custom("LOOKAHEAD_CONCEPT_ENCODER")  # concept/concept_files.py
CONCEPT = io.Custom("LOOKAHEAD_CONCEPT")  # lookahead/method/concept.py
SCORES = io.Custom("LOOKAHEAD_SCORES")  # scores/scores.py
NOISE_GUIDE = io.Custom("LOOKAHEAD_NOISE_GUIDE")  # guidance/noise_guide.py
GUIDANCE_REPORT = io.Custom("LOOKAHEAD_GUIDANCE_REPORT")  # guidance/guidance_report.py

# Types of the host that not every supported version declares.
CURVE = io.Custom("CURVE")
BOUNDING_BOX = io.Custom("BOUNDING_BOX")

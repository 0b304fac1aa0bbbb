"""Stage: an image encoder that knows things too, which the mini world's concept encoder looks through.

The real image encoder was trained on pictures of everything; the mini world's on faces alone: from what it says of a
thing, its class can be told in 45 of 100 pictures. So a copy of it goes on, on pictures of things and of faces. A
concept encoder reads the mean of the penultimate hidden states (`sdxl.concept.image_features`), so that is what has to
say all. Clocks and umbrellas are among them: as CLIP has seen what a concept encoder has not.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModelWithProjection

from ..plan import SIZES, Plan
from ..world import things
from ..world.data import Pictures
from ..world.faces import IDENTITY_SIZE, PLACES, STYLES
from . import image_encoder, stage
from .evaluators import disturb

NAME = "things_vision"
BATCH = 64


def train(folder: Path, start: CLIPVisionModelWithProjection, shown: Pictures, faces: Pictures, plan: Plan) -> None:
    """Half of each batch are things. start: the image encoder of faces, whose copy is trained."""
    out = folder / f"{NAME}.safetensors"
    if out.exists():
        return
    seed = plan.seed + 16
    torch.manual_seed(seed)
    device = stage.device()
    encoder = image_encoder.build()
    encoder.load_state_dict(start.state_dict())
    encoder.to(device)
    answers = {"things": things.IDENTITY_SIZE, "faces": IDENTITY_SIZE, "style": len(STYLES), "place": len(PLACES)}
    heads = nn.ModuleDict({name: nn.Linear(SIZES["clip_vision"]["hidden_size"], n) for name, n in answers.items()})
    heads.to(device)
    half = BATCH // 2

    def loss(step: int) -> Tensor:
        numbers = stage.numbers_of_step(seed, step)
        rows = [(group, torch.randint(len(group), (half,), generator=numbers)) for group in (shown, faces)]
        x = image_encoder.preprocess(disturb(torch.cat([g.images(i, device) for g, i in rows]), numbers))
        with stage.autocast(device):
            seen = encoder(pixel_values=x, output_hidden_states=True).hidden_states[-2].mean(1)
            said = {name: head(seen).float() for name, head in heads.items()}
        label = {k: torch.cat([g.labels[k][i] for g, i in rows]).to(device) for k in ("style", "place")}
        value = sum(0.2 * F.cross_entropy(said[k], label[k]) for k in label)
        for part, name, (group, index) in zip((slice(half), slice(half, None)), ("things", "faces"), rows, strict=True):
            value = value + 3 * F.mse_loss(said[name][part], group.labels["identity"][index].to(device))
        return torch.as_tensor(value)

    models = {"encoder": encoder, "heads": heads}
    stage.train(NAME, folder, models, loss, steps=plan.things_vision_steps, rate=5e-4)
    stage.write_tensors(out, encoder.state_dict())
    stage.finish(NAME, folder)

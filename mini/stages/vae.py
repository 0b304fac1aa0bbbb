"""Stages: the autoencoder, in TAESD's layout (f = 8, 4 channels), on crops of drawn pictures; then its decoder alone,
twice.

The latents are settled with the first stage, so the others can sharpen the decoder while the base model trains.
Its raw latents have about zero mean and unit variance, so that SDXL's noise schedule fits them; the checkpoint says
so to the host by `vae_scale` = SDXL's latent scaling factor (checkpoint.py).
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from torch import Tensor
from torch.nn import functional as F

from ..plan import Plan
from ..world.data import Pictures
from . import stage

CROP, BATCH = 64, 16
NOISE = 0.08  # on the latents that the decoder learns from: those of a diffusion model are not exact
LAST_NOISE = 0.03  # in the last stage: enough of it is learnt by then, and noise blurs


def build() -> AutoencoderTiny:
    """TAESD's own widths: 64 channels, three halvings; the host knows no other."""
    return AutoencoderTiny()


def _gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def reconstruction_loss(image: Tensor, target: Tensor, latent: Tensor) -> Tensor:
    """L1 + L2 + L1 of the gradients, and a pull of the latents [n, 4, h, w] to zero mean and unit variance."""
    edges = sum(F.l1_loss(a, b) for a, b in zip(_gradients(image), _gradients(target), strict=True))
    mean, variance = latent.mean((0, 2, 3)), latent.var((0, 2, 3))
    moments = mean.square().mean() + (variance - 1).square().mean()
    return F.l1_loss(image, target) + F.mse_loss(image, target) + edges + 0.01 * moments


def train(folder: Path, pictures: Pictures, plan: Plan) -> None:
    out = folder / "vae.safetensors"
    if out.exists():
        return
    torch.manual_seed(plan.seed)
    device = stage.device()
    vae = build().to(device, memory_format=torch.channels_last)
    span = pictures.pixels.shape[-1] - CROP

    def loss(step: int) -> Tensor:
        numbers = stage.numbers_of_step(plan.seed, step)
        index = torch.randint(len(pictures), (BATCH,), generator=numbers)
        top, left = torch.randint(span + 1, (2,), generator=numbers).tolist()
        x = pictures.images(index, device)[:, :, top : top + CROP, left : left + CROP] * 2 - 1
        x = x.contiguous(memory_format=torch.channels_last)
        with stage.autocast(device):
            z = vae.encoder(x)
            y = vae.decoder(z + NOISE * torch.randn(z.shape, generator=numbers).to(z))
        return reconstruction_loss(y.float(), x, z.float())

    stage.train("vae", folder, {"vae": vae}, loss, steps=plan.vae_steps, rate=1e-3, decay=1e-3)
    stage.write_tensors(out, vae.state_dict())
    stage.finish("vae", folder)


def train_decoder(folder: Path, pictures: Pictures, latents: Tensor, plan: Plan) -> None:
    """Sharpen the decoder on the latents of whole pictures, the encoder staying as it is."""
    _train_decoder("decoder", folder, pictures, latents, plan.seed + 6, plan.decoder_steps, NOISE)


def sharpen(folder: Path, pictures: Pictures, latents: Tensor, plan: Plan) -> None:
    """Trains the same once more, from the start of the schedule and with less noise."""
    _train_decoder("sharpen", folder, pictures, latents, plan.seed + 7, plan.sharpen_steps, LAST_NOISE)


def _train_decoder(
    name: str, folder: Path, pictures: Pictures, latents: Tensor, seed: int, steps: int, noise: float
) -> None:
    out = folder / f"{name}.safetensors"
    if out.exists():
        return
    device = stage.device()
    vae = load(folder).to(device, memory_format=torch.channels_last)
    vae.decoder.requires_grad_(True)
    cells = CROP // 8
    span = latents.shape[-1] - cells

    def loss(step: int) -> Tensor:
        numbers = stage.numbers_of_step(seed, step)
        index = torch.randint(len(pictures), (BATCH,), generator=numbers)
        top, left = torch.randint(span + 1, (2,), generator=numbers).tolist()
        z = latents[index][:, :, top : top + cells, left : left + cells].float()
        z = (z + noise * torch.randn(z.shape, generator=numbers)).to(device, memory_format=torch.channels_last)
        x = pictures.images(index, device)[:, :, 8 * top : 8 * top + CROP, 8 * left : 8 * left + CROP] * 2 - 1
        with stage.autocast(device):
            y = vae.decoder(z)
        return reconstruction_loss(y.float(), x, z)

    stage.train(name, folder, {"vae": vae}, loss, steps=steps, rate=1e-3, decay=1e-3, ema=0.99)
    stage.write_tensors(out, vae.decoder.state_dict())
    stage.finish(name, folder)


def load(folder: Path) -> AutoencoderTiny:
    """The autoencoder, with the decoder of the last stage that is done."""
    vae = build()
    vae.load_state_dict(stage.read_tensors(folder / "vae.safetensors"))
    for name in ("sharpen", "decoder"):
        if (folder / f"{name}.safetensors").exists():
            vae.decoder.load_state_dict(stage.read_tensors(folder / f"{name}.safetensors"))
            break
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_all(
    folder: Path, pictures: Pictures, name: str, chunk: int = 64, vae: AutoencoderTiny | None = None
) -> Tensor:
    """Latents [n, 4, h, w] (16 bit) of all pictures, computed once. vae: that of the folder unless given."""
    path = folder / f"latents-{name}.safetensors"
    if not path.exists():
        device = stage.device()
        vae = (load(folder) if vae is None else vae).to(device, memory_format=torch.channels_last)
        out = []
        for start in range(0, len(pictures), chunk):
            index = torch.arange(start, min(start + chunk, len(pictures)))
            x = (pictures.images(index, device) * 2 - 1).contiguous(memory_format=torch.channels_last)
            with stage.autocast(device):
                out.append(vae.encoder(x).half().cpu())
            if start % (chunk * 50) == 0:
                print(f"latents: {start}/{len(pictures)}", flush=True)
        stage.write_tensors(path, {"latents": torch.cat(out)})
    return stage.read_tensors(path)["latents"]

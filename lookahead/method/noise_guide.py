"""Noise guides: small networks that predict in one pass how lookahead guidance would move the noise.

They are noise hypernetworks (HyperNoise, arXiv 2508.09968: what a search over noises finds is learned once), for the
likeness of a person: what latent optimisation (`latent_optimisation`, LCM-Lookahead, arXiv 2404.03620, section 5.1)
finds by iterations is read off the latent, its one-step preview, and the reference, put where the preview has its face.
The paper's hypernetwork is a LoRA of the generator itself, which sees where its pictures lead; here the preview says
that, for one evaluation of the generator, and the network stays a few MB. It begins at the warm start (`leaning`), to
which its shift of the noise is added: from a face embedding alone, 16,000 samples taught it nothing of what a face
looks like.

Latents are z_t [n, c, h, w] of variance about 1 (`schedule.to_vp`), alpha_bar their noise level, [n] or one number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .leaning import lean_towards
from .module_list import ModuleListOf
from .schedule import signal_scale

GROUPS = 8
FREQUENCIES = 6  # of the noise level, in units of log alpha_bar / (1 - alpha_bar): periods of 50 down to 1.6
LEVELS = (1, 2, 2)  # widths, in parts of the first; each level after that has half the places a side


@dataclass(frozen=True)
class NoiseGuideSizes:
    """The sizes of a noise guide. identity: of a face embedding; width: channels at full size, a multiple of 8; hidden:
    of what all blocks read of the person and the noise level; channels: of a latent."""

    identity: int = 512
    width: int = 64
    hidden: int = 256
    channels: int = 4

    def __post_init__(self) -> None:
        if min(self.identity, self.width, self.hidden, self.channels) < 1 or self.width % GROUPS:
            raise ValueError(f"{self} has a size below 1 or a width that is not a multiple of {GROUPS}")

    @classmethod
    def from_state_dict(cls, weights: Mapping[str, Tensor]) -> NoiseGuideSizes:
        """Infer the sizes from the shapes. Raises KeyError, IndexError or ValueError where the weights are of something
        else."""
        hidden, identity = weights["person.0.weight"].shape
        return cls(identity, weights["conv_in.bias"].shape[0], hidden, weights["conv_out.bias"].shape[0])


class NoiseGuide(nn.Module):
    """A latent, what it would become, what it should become, and a person -> how the noise should move.

    A U-Net of residual blocks over three sizes, with attention at the smallest; person and noise level scale and shift
    every block's features (FiLM, arXiv 1709.07871). Its last layer begins at zero: an untrained guide moves no noise.
    `operations` supplies the classes of the layers.
    """

    def __init__(self, sizes: NoiseGuideSizes, operations: ModuleType = nn):
        super().__init__()
        self.sizes = sizes
        first, middle, last = (sizes.width * times for times in LEVELS)
        hidden = sizes.hidden

        def block(inside: int, outside: int) -> _Block:
            return _Block(inside, outside, hidden, operations)

        def mlp(inside: int) -> nn.Sequential:
            return nn.Sequential(
                operations.Linear(inside, hidden), nn.SiLU(), operations.Linear(hidden, hidden), nn.SiLU()
            )

        self.person, self.level = mlp(sizes.identity), mlp(2 * FREQUENCIES)
        self.conv_in = operations.Conv2d(3 * sizes.channels, first, 3, padding=1)
        self.down = ModuleListOf([block(first, first), block(first, middle), block(middle, last)])
        self.attention = _Attention(last, operations)
        self.middle = block(last, last)
        self.up = ModuleListOf([block(2 * last, middle), block(2 * middle, first), block(2 * first, first)])
        self.norm_out = operations.GroupNorm(GROUPS, first)
        self.conv_out = operations.Conv2d(first, sizes.channels, 3, padding=1)
        if self.conv_out.weight.device.type != "meta":
            nn.init.zeros_(self.conv_out.weight)
            nn.init.zeros_(self.conv_out.bias)

    def forward(self, z: Tensor, preview: Tensor, wanted: Tensor, alpha_bar: Tensor, identity: Tensor) -> Tensor:
        """The shift of the noise [n, c, h, w], in parts of the noise's rms; any h and w.

        z: latents whose signal is `wanted`, of their shape; preview: what it was before, the one-step preview latent;
        identity: unit vectors [n, d], float32. It computes in float32, unless autocast has it otherwise.
        """
        level = _level_features(alpha_bar.expand(len(z))).to(identity)  # its device, and float32
        about = self.person(identity * math.sqrt(identity.shape[-1])) + self.level(level)
        x = self.conv_in(torch.cat([z.float(), preview.float(), wanted.float()], 1))
        kept = []
        for n, block in enumerate(self.down):
            x = block(x if n == 0 else F.avg_pool2d(x, 2, ceil_mode=True), about)
            kept.append(x)
        x = self.middle(self.attention(x), about)
        for n, block in enumerate(self.up):
            skip = kept.pop()
            x = x if n == 0 else F.interpolate(x, skip.shape[-2:], mode="nearest")
            x = block(torch.cat([x, skip], 1), about)
        return self.conv_out(F.silu(self.norm_out(x))).float()


class _Block(nn.Module):
    """Two convolutions beside a shortcut; between them the features are scaled and shifted."""

    def __init__(self, inside: int, outside: int, hidden: int, operations: ModuleType):
        super().__init__()
        self.norm_1 = operations.GroupNorm(GROUPS, inside)
        self.conv_1 = operations.Conv2d(inside, outside, 3, padding=1)
        self.film = operations.Linear(hidden, 2 * outside)
        self.norm_2 = operations.GroupNorm(GROUPS, outside)
        self.conv_2 = operations.Conv2d(outside, outside, 3, padding=1)
        self.beside = operations.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()

    def forward(self, x: Tensor, about: Tensor) -> Tensor:
        y = self.conv_1(F.silu(self.norm_1(x)))
        scale, shift = self.film(about)[:, :, None, None].chunk(2, 1)
        y = self.norm_2(y) * (1 + scale) + shift
        return self.beside(x) + self.conv_2(F.silu(y))


class _Attention(nn.Module):
    """Every place asks all others; one head."""

    def __init__(self, width: int, operations: ModuleType):
        super().__init__()
        self.norm = operations.GroupNorm(GROUPS, width)
        self.to_qkv = operations.Conv2d(width, 3 * width, 1)
        self.to_out = operations.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, -1)
        out = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + self.to_out(out.unflatten(2, x.shape[-2:]))


def _level_features(alpha_bar: Tensor) -> Tensor:
    """Sines and cosines of the noise level, [n, 2 FREQUENCIES]."""
    level = alpha_bar.double().logit(eps=1e-6)  # (alpha_bar is 0 where flow matching begins)
    angles = level[:, None] * 2.0 ** torch.arange(-3, FREQUENCIES - 3, device=level.device)
    return torch.cat([angles.sin(), angles.cos()], 1).float()


class Moved(NamedTuple):
    """The latents after a shift of their noise [n, c, h, w], and how far that led: the squared tangent of the angle
    between old and new noise, [n]. It is the shift's share of the noise, of which HyperNoise's prior is made."""

    z: Tensor
    share: Tensor


def move_noise(z: Tensor, shift: Tensor, preview: Tensor, alpha_bar: Tensor, mask: Tensor | None = None) -> Moved:
    """Move the noise in a latent along a shift (in parts of its rms), on the sphere on which it lies.

    What is signal in z is sqrt(alpha_bar) times its preview, and stays; the rest is noise, on a sphere about that. The
    shift is projected on the sphere's tangent, and the step is drawn back to it, as in `latent_optimisation`'s
    `sphere`. A shift of zero gives z itself, to the bit, and yet has its gradient. mask: [n or 1, 1, h, w] in [0, 1],
    where the latent may move; the rest keeps its bits.
    """
    z32, shift = z.float(), shift.float()
    centre = signal_scale(alpha_bar, z32) * preview.float()
    noise, region = z32 - centre, None
    if mask is not None:
        shift, region = shift * mask, (mask > 0).expand_as(z)
        noise = torch.where(region, noise, 0.0)
    count = noise[0].numel() if region is None else _sum(region.float()).clamp_min(1)
    square = _sum(noise.square()).clamp_min(1e-12)
    step = shift * (square / count).sqrt()
    step = step - _sum(step * noise) / square * noise  # along the tangent
    share = _sum(step.square()) / square
    back = (1 + share).rsqrt()
    # z + (back - 1) noise + back step is centre + back (noise + step), but for the bits of z where nothing moves.
    moved = z32 + (back - 1) * noise + back * step
    moved = moved if region is None else torch.where(region, moved, z32)
    return Moved(moved.to(z), share.flatten())


def guide_noise(
    guide: NoiseGuide, z: Tensor, preview: Tensor, goal: Tensor, place: Tensor, alpha_bar: Tensor, identity: Tensor
) -> Moved:
    """Have the preview's face give way to the reference's (`leaning`), then move the noise there as a guide predicts.

    z: latents z_t [n, c, h, w]; preview: their one-step preview latents; goal: latents of the reference, put where the
    previews have its face; place: [n or 1, 1, h, w] in [0, 1], where that is, and where alone anything moves; alpha_bar
    and identity as in `NoiseGuide.forward`.
    """
    wanted = preview.float() + place * (goal.float() - preview.float())
    z = lean_towards(z, preview, goal, alpha_bar, 1.0, place)
    return move_noise(z, guide(z, preview, wanted, alpha_bar, identity), wanted, alpha_bar, place)


@torch.no_grad()
def signature(recogniser: Callable[[Tensor], Tensor], size: int, device: torch.device | str = "cpu") -> Tensor:
    """A recogniser's answer [d] to a pattern that is always the same, by which a guide knows the one it was trained
    with: files of one network have many names.

    recogniser: crops [n, 3, size, size] in [0, 1] -> unit vectors [n, d], on `device`; the answer is on the CPU.
    """
    ramp = torch.linspace(0, 1, size)
    waves = [torch.sin((3 + n) * ramp[:, None] + (5 - 2 * n) * ramp[None] + n) for n in range(3)]
    return recogniser((torch.stack(waves)[None] / 2 + 0.5).to(device))[0].float().cpu()


def _sum(x: Tensor) -> Tensor:
    return x.sum((1, 2, 3), keepdim=True)

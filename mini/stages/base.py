"""Stage: the base model. SDXL's UNet (narrow), trained from scratch together with its two text encoders.

Eps-prediction on SDXL's noise schedule, weighted by min-SNR (arXiv 2303.09556), which favours the steps in which a
picture takes shape. A tenth of the captions is dropped, half of it to the empty prompt
(what the host's negative is), half to zero embeddings (what SDXL's own pipelines use).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from ...lookahead.files.unet_layout import UNetLayout
from ...lookahead.method.guidance import Scales, guided
from ...lookahead.method.sampling import PredictNoise
from ...lookahead.method.schedule import BETA_END, BETA_START, TIMESTEPS, add_noise, alphas_cumprod, signal_to_noise
from ...sdxl.shared_unet import Condition
from ..plan import CONTEXT, IMAGE_SIZE, LATENT_SIZE, SIZES, Plan
from ..world.data import Pictures
from . import stage
from .text import TextEncoders, tokenize, tokenizer

BATCH = 32
DROP = 0.1
MIN_SNR = 5.0
_S = SIZES["unet"]
LAYOUT = UNetLayout(
    tuple(_S["model_channels"] * m for m in _S["channel_mult"]),
    tuple(_S["transformer_depth"]),
    CONTEXT,
    SIZES["text"]["width_g"],
    _S["head_channels"],
)


def build_unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(sample_size=LATENT_SIZE, **LAYOUT.diffusers())
    # SDPA's backward is slow in bf16 on a CPU; at 256 tokens the plain product costs nothing on a GPU either.
    unet.set_attn_processor(AttnProcessor())
    return unet


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=BETA_START,
        beta_end=BETA_END,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def condition(context: Tensor, pooled: Tensor) -> Condition:
    """A text with SDXL's size conditioning of a whole picture."""
    size = torch.tensor([IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE], device=pooled.device)
    return Condition(context, pooled.float(), size.float().expand(len(pooled), 6))


def alpha_bar(device: torch.device | str = "cpu") -> Tensor:
    """Returns alpha_bar of all timesteps, [1000]."""
    return alphas_cumprod().float().to(device)


def predict(unet: UNet2DConditionModel, x: Tensor, t: Tensor, text: Condition) -> Tensor:
    """The UNet's prediction of the noise, float32."""
    return unet(x, t, text.context, added_cond_kwargs=text.added).sample.float()


def classifier_free(
    predict: Callable[[Tensor, Tensor, Condition], Tensor], positive: Condition, negative: Condition, guidance: float
) -> PredictNoise:
    """Classifier-free guidance of `predict`, both predictions in one batch, the negative's rows first.

    negative: of one row, or of as many as the positive.
    """
    texts = {"uncond": negative, "text": positive}

    def guide(x: Tensor, t: Tensor) -> Tensor:
        def both(names: Sequence[str]) -> Sequence[Tensor]:
            count, text = len(names), Condition.stacked([texts[name] for name in names], len(x))
            return predict(x.repeat(count, 1, 1, 1), t.repeat(count), text).chunk(count)

        return guided(both, Scales(guidance, 0.0, 0.0))

    return guide


class Noising:
    """Timesteps, noise and noised latents of one step, from that step's numbers, and the loss that goes with them."""

    def __init__(self, device: torch.device):
        self.alpha_bar = alpha_bar(device)
        snr = signal_to_noise(self.alpha_bar)
        self._weight = snr.clamp(max=MIN_SNR) / snr

    def loss(self, predicted: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Squared error of the predicted noise, weighted by min-SNR."""
        return (self._weight[t] * (predicted.float() - noise).square().mean((1, 2, 3))).mean()

    def __call__(self, latent: Tensor, numbers: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        t = torch.randint(TIMESTEPS, (len(latent),), generator=numbers).to(latent.device)
        noise = torch.randn(latent.shape, generator=numbers).to(latent.device)
        return t, noise, add_noise(latent, noise, self.alpha_bar[t])


def drop_text(ids: Tensor, empty: Tensor, numbers: torch.Generator) -> tuple[Tensor, Tensor]:
    """ids with a share replaced by the empty prompt, and keep [n, 1, 1]: 0 where embeddings become zero."""
    chance = torch.rand(len(ids), generator=numbers)
    ids = torch.where((chance < DROP / 2).view(-1, 1, 1), empty, ids)
    return ids, (chance < 1 - DROP / 2).float().view(-1, 1, 1)


def train(folder: Path, pictures: Pictures, latents: Tensor, plan: Plan) -> None:
    out = folder / "base.safetensors"
    if out.exists():
        return
    torch.manual_seed(plan.seed + 1)
    device = stage.device()
    unet, text = build_unet().to(device), TextEncoders().to(device)
    tokens = tokenizer()
    long, short, empty = (tokenize(tokens, t) for t in (pictures.long, pictures.short, [""]))
    noised = Noising(device)

    def loss(step: int) -> Tensor:
        numbers = stage.numbers_of_step(plan.seed + 1, step)
        index = torch.randint(len(pictures), (BATCH,), generator=numbers)
        described = torch.rand(BATCH, 1, 1, generator=numbers) < 0.5
        ids, keep = drop_text(torch.where(described, long[index], short[index]), empty, numbers)
        t, noise, x = noised(latents[index].float().to(device), numbers)
        with stage.autocast(device):
            context, pooled = text(ids.to(device))
            keep = keep.to(device)
            predicted = predict(unet, x, t, condition(context * keep, pooled.float() * keep[:, 0]))
        return noised.loss(predicted, noise, t)

    models = {"unet": unet, "text": text}
    stage.train("base", folder, models, loss, steps=plan.base_steps, rate=1e-3, ema=0.999)
    tensors = {f"{name}.{k}": v for name, m in models.items() for k, v in m.state_dict().items()}
    stage.write_tensors(out, tensors)
    stage.finish("base", folder)


def load(folder: Path) -> tuple[UNet2DConditionModel, TextEncoders]:
    saved = stage.read_tensors(folder / "base.safetensors")
    unet, text = build_unet(), TextEncoders()
    for name, m in {"unet": unet, "text": text}.items():
        m.load_state_dict({k.removeprefix(name + "."): v for k, v in saved.items() if k.startswith(name + ".")})
        m.eval().requires_grad_(False)
    return unet, text

"""Gradients through the host's own networks, loaded in inference mode as its loader nodes do."""

import pytest
import torch

LATENT = (2, 4, 16, 16)
SIGMA = 4.0


def relative(a, b) -> float:
    return float((a.double() - b.double()).square().mean().sqrt() / b.double().square().mean().sqrt())


@pytest.fixture
def gradient(pack):
    return pack.module("nodes.gradient")


def small_autoencoder(dtype):
    """The host's AutoencoderKL class, shrunken, with random weights."""
    import comfy.ldm.models.autoencoder

    sizes = {"double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32}
    sizes |= {"ch_mult": [1, 2, 2, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    return _random(comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=sizes, embed_dim=4), dtype)


def tiny_autoencoder(dtype):
    import comfy.taesd.taesd

    return _random(comfy.taesd.taesd.TAESD(), dtype)


def _random(network, dtype):
    g = torch.Generator().manual_seed(3)
    weights = network.state_dict()
    for name, value in weights.items():
        fan = value[0].numel() if value.ndim > 1 else 1
        if value.ndim:
            norm = value.ndim == 1 and name.endswith("weight")
            weights[name] = (1 if norm else 0) + torch.randn(value.shape, generator=g) * (
                1.4 * fan**-0.5 if fan > 1 else 0.1
            )
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False).to(dtype)


class Chain:
    """Noisy latent -> UNet -> VAE -> mean of the squares of the picture, one value each."""

    def __init__(self, world, vae, dtype, cast=None):
        self.model, self.vae, self.dtype = world.model.model, vae, dtype
        text, values = world.text(1)[0]
        n = LATENT[0]
        self.conds = {
            "c_crossattn": text.to(dtype).repeat(n, 1, 1),
            "y": torch.randn(n, world.pooled + 6 * 256, generator=torch.Generator().manual_seed(2)).to(dtype),
        }

    def networks(self):
        return [self.model.diffusion_model, self.vae]

    def __call__(self, x, attention):
        sigma = torch.full((len(x),), SIGMA, dtype=x.dtype)
        options = {"optimized_attention_override": attention}
        z = self.model.apply_model(x, sigma, transformer_options=options, **self.conds)
        vae_dtype = next(self.vae.parameters()).dtype
        return self.vae.decode(z.to(vae_dtype)).to(x.dtype).square().mean(dim=(1, 2, 3))

    def gradient(self, pack_gradient, x, checkpointing=None, context=None):
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x.clone().requires_grad_()
            context = context or pack_gradient.differentiable(self.networks(), checkpointing)
            with context:
                return torch.autograd.grad(self(leaf, pack_gradient.pytorch_attention).sum(), leaf)[0]


def noisy(dtype=torch.float32):
    return SIGMA * torch.randn(LATENT, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("make_vae", [tiny_autoencoder, small_autoencoder])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_it_is_what_finite_differences_say(worlds, gradient, make_vae, checkpointed):
    """In float64, through UNet, VAE and loss of the real host."""
    world = worlds("mini", dtype=torch.float64)
    chain = Chain(world, make_vae(torch.float64), torch.float64)
    x, direction = noisy(torch.float64), torch.randn(LATENT, dtype=torch.float64)
    g = chain.gradient(gradient, x, gradient.Checkpointing(enabled=checkpointed))
    h = 1e-2  # the host rounds the UNet's output to 32 bit
    up, down = (chain(x + s * h * direction, gradient.pytorch_attention) for s in (1, -1))
    expected = (up - down) / (2 * h)
    found = (g * direction).sum(dim=(1, 2, 3))
    assert torch.allclose(found, expected, rtol=2e-3) and float(expected.abs().min()) > 1e-6

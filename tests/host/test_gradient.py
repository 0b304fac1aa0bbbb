"""Gradients through the host's own networks, loaded in inference mode as its loader nodes do."""

import copy
from contextlib import contextmanager, nullcontext

import pytest
import torch
from tensors import relative

LATENT = (2, 4, 8, 8)
SIGMA = 4.0


@pytest.fixture
def gradient(pack):
    return pack.module("nodes.guidance.autograd")


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
            weights[name] = (1 if norm else 0) + torch.randn(value.shape, generator=g) * (fan**-0.5 if fan > 1 else 0.1)
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


@pytest.mark.parametrize("make_vae, checkpointed", [(tiny_autoencoder, False), (small_autoencoder, True)])
def test_it_is_what_finite_differences_say(worlds, gradient, make_vae, checkpointed, monkeypatch):
    """In float64, through UNet, VAE and loss of the real host."""
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)  # the host rounds the UNet's output to 32 bit
    world = worlds("mini", dtype=torch.float64)
    chain = Chain(world, make_vae(torch.float64), torch.float64)
    x = noisy(torch.float64)
    direction = torch.randn(LATENT, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    g = chain.gradient(gradient, x, gradient.Checkpointing(enabled=checkpointed))
    h = 1e-8  # less than where most of TAESD's ReLUs have their kinks
    up, down = (chain(x + s * h * direction, gradient.pytorch_attention) for s in (1, -1))
    expected = (up - down) / (2 * h)
    found = (g * direction).sum(dim=(1, 2, 3))
    assert torch.allclose(found, expected, rtol=1e-4) and float(expected.abs().min()) > 1e-6


@pytest.mark.parametrize(
    "dtype, compute, close",
    [
        (torch.float32, None, 1e-5),
        (torch.float16, torch.float32, 1e-5),
        (torch.bfloat16, None, 0.2),
    ],
)
@pytest.mark.contract
def test_it_is_that_of_a_plain_run_of_the_same_network(worlds, gradient, dtype, compute, close):
    """Weights in 32 and 16 bit, cast to 32 or not, loaded in inference mode, against a plain copy in 32 bit."""
    world = worlds("mini", dtype=dtype, compute=compute)
    chain = Chain(world, tiny_autoencoder(torch.float32), compute or dtype)
    found = [chain.gradient(gradient, noisy(), gradient.Checkpointing(enabled=on)) for on in (False, True)]
    assert relative(*(one.double() for one in found)) < close  # sums in another order
    plain = Chain(worlds("mini"), tiny_autoencoder(torch.float32), torch.float32)
    with torch.inference_mode(False):
        unet = copy.deepcopy(plain.model.diffusion_model)
        stored = world.model.model.diffusion_model.state_dict()
        for name, parameter in unet.named_parameters():
            parameter.data = stored[name].float().clone()
        vae = copy.deepcopy(plain.vae)
        for parameter in vae.parameters():
            parameter.data = parameter.data.clone()
        plain.vae = vae
    before, plain.model.diffusion_model = plain.model.diffusion_model, unet
    try:
        expected = plain.gradient(gradient, noisy(), context=nullcontext())
    finally:
        plain.model.diffusion_model = before
    assert relative(found[0].double(), expected.double()) < close


@pytest.mark.contract
def test_it_is_the_same_where_the_host_s_own_attention_has_no_backward(worlds, gradient, monkeypatch):
    """As its int8 kernels (--use-ck-attention of hosts from 0.32 on), which also take tensors in containers."""
    from comfy.ldm.modules import attention

    chain = Chain(worlds("mini"), tiny_autoencoder(torch.float32), torch.float32)
    expected = chain.gradient(gradient, noisy())
    called = []

    @attention.wrap_attn
    def without_backward(q, k, v, heads, **kwargs):
        called.append(1)
        return attention.attention_pytorch(q.detach(), k.detach(), v.detach(), heads, **kwargs)

    without_backward.container_function = without_backward
    monkeypatch.setattr(attention, "optimized_attention", without_backward)
    monkeypatch.setattr(attention, "optimized_attention_masked", without_backward)
    assert torch.equal(chain.gradient(gradient, noisy()), expected) and not called
    chain(noisy(), lambda func, *args, **kwargs: func(*args, **kwargs))
    assert called  # a pass without a gradient takes it


class OneBuffer:
    """Every weight that the host casts lies in one buffer, which is overwritten as soon as the layer is done."""

    def __init__(self, monkeypatch):
        import comfy.ops

        with torch.inference_mode(False):
            self.buffer = torch.empty(1 << 21)
        self._cast = comfy.ops.cast_bias_weight
        monkeypatch.setattr(comfy.ops, "cast_bias_weight", self.cast)
        monkeypatch.setattr(comfy.ops, "uncast_bias_weight", lambda *_: self.buffer.data.fill_(torch.nan))

    def cast(self, module, *args, offloadable=False, **kwargs):
        kept, at = [], 0
        for tensor in self._cast(module, *args, **kwargs):
            view = None
            if tensor is not None:
                view = self.buffer[at : at + tensor.numel()].view(tensor.shape)
                view.data.copy_(tensor)
                at += tensor.numel()
            kept.append(view)
        return (*kept, "served") if offloadable else tuple(kept)


@contextmanager
def plainly_cast(networks):
    """What autograd sees without our layers: the host's own, which cast their weights."""
    modules = [m for n in networks for m in n.modules() if hasattr(m, "comfy_cast_weights")]
    for module in modules:
        module.comfy_cast_weights = True
    try:
        yield
    finally:
        for module in modules:
            del module.comfy_cast_weights


@pytest.mark.contract
def test_no_weight_is_read_from_a_buffer_after_its_layer_is_done(mini, gradient, monkeypatch):
    chain = Chain(mini, small_autoencoder(torch.float32), torch.float32)
    expected = chain.gradient(gradient, noisy())
    OneBuffer(monkeypatch)
    for checkpointed in (False, True):
        found = chain.gradient(gradient, noisy(), gradient.Checkpointing(enabled=checkpointed))
        assert relative(found.double(), expected.double()) < 1e-5
    plain = chain.gradient(gradient, noisy(), context=plainly_cast(chain.networks()))
    assert not plain.isfinite().all()  # the plain path reads what has been overwritten


@pytest.mark.contract
def test_networks_are_afterwards_as_before(mini, gradient):
    chain = Chain(mini, small_autoencoder(torch.float32), torch.float32)

    def state():
        return [
            (set(m.__dict__), m.__dict__.get("comfy_cast_weights"), [id(p) for p in m._parameters.values()])
            for network in chain.networks()
            for m in network.modules()
        ]

    before = state()
    chain.gradient(gradient, noisy(), gradient.Checkpointing())
    assert state() == before
    with pytest.raises(KeyboardInterrupt), gradient.differentiable(chain.networks(), gradient.Checkpointing()):
        assert state() != before
        raise KeyboardInterrupt
    assert state() == before


def test_checkpointing_finds_what_keeping_the_blocks_would_take(mini, gradient):
    """Its count is the difference of what autograd saves with all blocks kept, and with none."""
    chain = Chain(mini, small_autoencoder(torch.float32), torch.float32)

    def saved(checkpointing):
        kept = {}

        def count(tensor):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor.detach()

        with torch.inference_mode(False), torch.enable_grad(), gradient.differentiable(chain.networks(), checkpointing):
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                out = chain(noisy().clone().requires_grad_(), gradient.pytorch_attention)
            total = sum(kept.values())
            out.sum().backward()
        return total

    checkpointing = gradient.Checkpointing()
    least = saved(checkpointing)
    most = saved(gradient.Checkpointing(enabled=False))
    assert least < most / 2 and abs(checkpointing.total - (most - least)) < 0.1 * most
    half = checkpointing.total / 2
    checkpointing.keep_what_fits(half)
    assert 0 < len(checkpointing.kept) < len(checkpointing.saved)
    assert sum(checkpointing.saved[block] for block in checkpointing.kept) <= half
    assert least < saved(checkpointing) <= least + half * 1.1


@pytest.mark.parametrize("how", ["zeros", "circular", "replaced"])
def test_convolutions_that_are_padded_in_another_way(gradient, how):
    """As nodes for seamless pictures do: by the module's padding mode, or by replacing how it convolves."""
    import comfy.ops

    layer = comfy.ops.manual_cast.Conv2d(3, 5, 3, padding=1, padding_mode="circular" if how == "circular" else "zeros")
    layer.weight.data, layer.bias.data = torch.randn(5, 3, 3, 3), torch.randn(5)
    layer.requires_grad_(False)

    def wrapped(x, weight, bias):
        x = torch.nn.functional.pad(x, (1, 1, 0, 0), mode="circular")
        return torch.nn.functional.conv2d(torch.nn.functional.pad(x, (0, 0, 1, 1)), weight, bias)

    if how == "replaced":
        layer._conv_forward = wrapped
    x = torch.randn(2, 3, 6, 6)
    with torch.inference_mode(False), torch.enable_grad():
        leaf, other = (x.clone().requires_grad_() for _ in range(2))
        with gradient.differentiable([layer]):
            (found,) = torch.autograd.grad(layer(leaf).square().sum(), leaf)
        weight, bias = layer.weight.clone(), layer.bias.clone()
        (expected,) = torch.autograd.grad(layer._conv_forward(other, weight, bias).square().sum(), other)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)

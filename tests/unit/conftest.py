"""The method library without a host, under the name that `pip install -e .` gives it."""

import pytest
import torch
from lcm_lookahead.lookahead.files.block_names import ip_adapter_key
from lcm_lookahead.lookahead.method.resampler import Resampler, ResamplerSizes
from lcm_lookahead.sdxl.torchvision_cure import let_torchvision_import

let_torchvision_import()  # diffusers imports it

SIZES = ResamplerSizes(tokens=4, dim=32, depth=4, heads=2, image_width=24, context_width=40, ff_width=64)
WIDTHS = (16, 16, 32)


@pytest.fixture
def sizes():
    return SIZES


@pytest.fixture
def resampler():
    torch.manual_seed(0)
    network = Resampler(SIZES)
    for parameter in network.parameters():  # norms too: all-ones would hide an exchanged one
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network.eval().requires_grad_(False)


@pytest.fixture
def weights(resampler):
    """A complete encoder file's tensors, small."""
    g = torch.Generator().manual_seed(1)
    tensors = {f"image_proj.{k}": v.clone() for k, v in resampler.state_dict().items()}
    for n, width in enumerate(WIDTHS):
        for which in "kv":
            tensors[ip_adapter_key(n, which)] = torch.randn(width, SIZES.context_width, generator=g)
    return tensors

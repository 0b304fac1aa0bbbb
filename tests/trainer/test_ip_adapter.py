"""The IP-Adapter half of an encoder file in diffusers' own loader, and by name and shape at full size."""

import logging

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from lcm_lookahead.lookahead.files import encoder_file
from lcm_lookahead.lookahead.method.resampler import ResamplerSizes
from lcm_lookahead.mini import drawn_people
from lcm_lookahead.mini.plan import WEIGHTS
from lcm_lookahead.sdxl import configs
from lcm_lookahead.sdxl.encoder import Encoder
from lcm_lookahead.sdxl.shared_unet import Condition, SharedUNet
from lcm_lookahead.trainer.config import CONFIGS
from lcm_lookahead.trainer.lookahead.config import load
from lcm_lookahead.trainer.lookahead.export import export


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An encoder file as a run leaves it, with a KV encoder, and the encoder."""
    torch.manual_seed(0)
    start = encoder_file.read(WEIGHTS / "mini_ip_adapter_plus_face.safetensors")
    encoder = Encoder.start_from(start, drawn_people.frozen().unet, 4, 4)
    for parameter in encoder.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("run") / "mine.safetensors"
    return export(path, encoder, load(CONFIGS / "mini.yaml"), 1), encoder


def test_diffusers_loads_it_and_predicts_what_the_trainer_does(exported, tmp_path, caplog):
    path, encoder = exported
    pipe = StableDiffusionXLPipeline.from_pretrained(drawn_people.write_folder(tmp_path))
    with caplog.at_level(logging.WARNING):
        pipe.load_ip_adapter(str(path.parent), subfolder="", weight_name=path.name, image_encoder_folder=None)
    pipe.set_ip_adapter_scale(1.0)
    frozen = drawn_people.frozen()
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([500, 500]), torch.randn(2, 77, 64)
    pooled, time_ids = torch.randn(2, 32), torch.full((2, 6), 128.0)
    features = frozen.features(torch.rand(2, 3, 128, 128))
    with torch.no_grad():
        added = {"text_embeds": pooled, "time_ids": time_ids, "image_embeds": [features[:, None]]}
        theirs = pipe.unet(x, t, context, added_cond_kwargs=added).sample
        plain = frozen.unet(x, t, context, added_cond_kwargs=added).sample
        shared = SharedUNet(frozen.unet, encoder).inject()
        prompt = encoder.image_prompt(encoder.image_proj(features))
        ours = shared.predict(x, t, Condition(context, pooled, time_ids), prompt)
        shared.eject()
    assert torch.allclose(theirs, ours, atol=1e-4)
    assert (theirs - plain).abs().max() > 0.01  # it is at work


def test_at_full_size_every_name_and_shape_has_its_place():
    """On the meta device: diffusers' processors and projection take each tensor, and miss none."""
    unet = configs.unet()
    with torch.device("meta"):
        encoder = Encoder(unet, ResamplerSizes())
    own = {f"{2 * n + 1}.{k}": v for n, p in enumerate(encoder.ip_adapter) for k, v in p.state_dict().items()}
    assert len(own) == 140 and list(own)[0] == "1.to_k_ip.weight" and list(own)[-1] == "139.to_v_ip.weight"
    unet._load_ip_adapter_weights([{"image_proj": encoder.image_proj.state_dict(), "ip_adapter": own}])
    projection = unet.encoder_hid_proj.image_projection_layers[0]
    count = sum(p.numel() for p in projection.parameters())
    assert count == sum(p.numel() for p in encoder.image_proj.parameters()) == 82_961_664
    taken = [p for name, p in unet.named_parameters() if "_ip." in name]
    assert sum(p.numel() for p in taken) == sum(p.numel() for p in encoder.ip_adapter.parameters()) == 340_787_200

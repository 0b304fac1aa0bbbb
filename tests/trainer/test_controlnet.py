"""The ControlNet's condition and its start: edges of a picture, and a net that changes nothing before it is trained."""

import torch
from lcm_lookahead.mini.files import checkpoint
from lcm_lookahead.mini.files.shipped import table
from lcm_lookahead.mini.stages import base, controlnet
from lcm_lookahead.mini.world.edges import edges


def test_edges_follow_an_outline_and_nothing_else():
    picture = torch.zeros(1, 3, 64, 64)
    picture[:, :, 16:48, 20:44] = 1
    found = edges(picture)
    rows, columns = found[0, 0].nonzero().T
    assert found.shape == picture.shape and set(found.unique().tolist()) == {0, 1}
    assert rows.min() in (15, 16) and rows.max() in (47, 48) and columns.min() in (19, 20) and columns.max() in (43, 44)
    assert not found[:, :, 20:44, 24:40].any() and 90 <= len(rows) <= 112  # its 112 pixels, less at round corners
    assert not edges(picture * 0.05).any()


def test_weak_edges_count_only_where_they_touch_strong_ones():
    ramp = torch.linspace(0, 1, 64).view(1, 1, 1, 64).expand(1, 3, 64, 64)
    picture = torch.zeros(1, 3, 64, 64)
    picture[:, :, 32:] = ramp[:, :, 32:]  # an edge that grows stronger to the right
    high = edges(picture, 0.8, 0.8)[0, 0].any(0)
    both = edges(picture, 0.2, 0.8)[0, 0].any(0)
    assert both.sum() > high.sum() + 5 and not both[:3].any()
    assert not edges(picture[..., :16], 0.2, 0.8).any()  # its weak end alone


def test_an_untrained_net_leaves_the_base_as_it_is_and_a_trained_one_does_not():
    torch.manual_seed(0)
    unet, net = base.build_unet().eval(), controlnet.build().eval()
    controlnet.start_from(net, unet)
    assert torch.equal(net.conv_in.weight, unet.conv_in.weight)
    assert torch.equal(net.mid_block.resnets[0].conv1.weight, unet.mid_block.resnets[0].conv1.weight)
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([100, 900]), torch.randn(2, 77, 64)
    text, hint = base.condition(context, torch.randn(2, 32)), torch.ones(2, 3, 128, 128)
    with torch.no_grad():
        plain = controlnet.predict(unet, None, x, t, text, hint)
        assert torch.equal(controlnet.predict(unet, net, x, t, text, hint), plain)
        net.controlnet_mid_block.weight.fill_(0.1)
        assert not torch.allclose(controlnet.predict(unet, net, x, t, text, hint), plain)


def test_the_file_has_cldm_s_names_and_reads_back():
    net = controlnet.build()
    written = checkpoint.cldm_controlnet(net.state_dict())
    for name, shape in {
        "input_hint_block.0.weight": (16, 3, 3, 3),
        "input_hint_block.14.weight": (64, 256, 3, 3),
        "zero_convs.8.0.weight": (128, 128, 1, 1),
        "middle_block_out.0.weight": (128, 128, 1, 1),
        "label_emb.0.0.weight": (256, 6 * 256 + 32),
        "input_blocks.6.0.op.weight": (128, 128, 3, 3),
        "middle_block.0.in_layers.2.weight": (128, 128, 3, 3),
    }.items():
        assert written[f"control_model.{name}"].shape == shape, name
    read = controlnet.load(written).state_dict()
    assert all(torch.equal(read[k], v) for k, v in net.state_dict().items())
    planned = {line.file: line for line in table()}["mini_controlnet_edges.safetensors"]
    assert sum(v.numel() for v in written.values()) <= planned.parameters

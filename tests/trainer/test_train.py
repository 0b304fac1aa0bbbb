"""The loop: the same command again goes on, with the same bits, however the run was stopped."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from lcm_lookahead.lookahead import encoder_file
from lcm_lookahead.lookahead.image_prompt import ResamplerSizes
from lcm_lookahead.lookahead.losses import L1Loss
from lcm_lookahead.trainer import config, lora
from lcm_lookahead.trainer.draws import generator
from lcm_lookahead.trainer.encoder import Encoder
from lcm_lookahead.trainer.roles import Condition
from lcm_lookahead.trainer.step import Batch, Step
from lcm_lookahead.trainer.train import TrainingError, train

WIDTH = 64
SHAPE = (4, 8, 8)


class Numbers:
    """A source of random pictures. `at` holds what happens when the sample of a number is fetched."""

    latent_shape = SHAPE

    def __init__(self):
        self.at, self.seen = {}, []

    def __len__(self):
        return 5

    def batch(self, targets, numbers, device):
        for number in numbers:
            self.seen.append(number)
            if number in self.at:
                self.at[number]()

        def of(stream, *shape):
            return torch.stack([torch.randn(shape, generator=generator(7, stream, t)) for t in targets])

        n = len(targets)
        size = torch.tensor([64.0, 64, 0, 0, 64, 64]).expand(n, 6)
        text = Condition(of(1, 7, WIDTH), of(2, 16), size)
        loss = L1Loss(of(3, 3, 64, 64).tanh())
        return Batch([f"picture {t}" for t in targets], of(4, *SHAPE), of(5, *SHAPE), text, text, of(6, 5, 32), loss)


def make_step(c):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(1, 2),
        cross_attention_dim=WIDTH,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        use_linear_projection=True,
    )
    decoder = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1,) * 4
    )
    decoder.eval().requires_grad_(False)
    encoder = Encoder(unet, ResamplerSizes(4, 64, 1, 1, 32, WIDTH, 64), 2, 2)
    shortcut = lora.build(unet, 2).requires_grad_(False)
    for branch in shortcut.branches:
        branch.lora_up.weight.normal_(std=0.05)
    return Step(c, unet, encoder, torch.zeros(1, 5, 32), shortcut, lambda z: decoder.decode(z).sample)


def settings(folder, **values):
    base = {
        "name": "small",
        "out": str(folder),
        "model": {"base": "b", "start": "s", "shortcut": "l", "vae": "v", "recogniser": "r", "kv_rank": 2},
        "data": {"source": "numbers"},
        "steps": 7,
        "batch": 2,
        "precision": "fp32",
        "save_every": 2,
        "log_every": 1,
        "optimiser": {"adapter_rate": 1e-3, "kv_rate": 1e-2, "schedule": "cosine"},
    }
    return config.from_values(base | values)


def run(folder, at=None, **values):
    c = settings(folder, **values)
    step, source = make_step(c), Numbers()
    source.at = at or {}
    return train(c, step, source), step, source


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    path, step, source = run(folder)
    return folder, path, {k: v.clone() for k, v in step.encoder.state_dict().items()}


class Killed(BaseException):
    pass


def killed():
    raise Killed


@pytest.mark.parametrize("number", [1, 5, 11])
def test_a_killed_run_goes_on_to_the_same_bits(whole, tmp_path, number):
    with pytest.raises(Killed):
        run(tmp_path, {number: killed})
    _, step, source = run(tmp_path)
    assert source.seen[0] == number // 2 // 2 * 4  # from the last checkpoint, which is one of every two steps
    assert all(torch.equal(v, whole[2][k]) for k, v in step.encoder.state_dict().items())
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 8))


def test_a_signal_ends_the_run_after_its_step_and_the_command_goes_on(whole, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    path, _, source = run(tmp_path, {4: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    assert path is None and source.seen == list(range(6)) and signal.getsignal(signal.SIGTERM) is before
    path, step, source = run(tmp_path)
    assert source.seen == list(range(6, 14)) and path.exists()
    assert all(torch.equal(v, whole[2][k]) for k, v in step.encoder.state_dict().items())


def test_everything_was_trained_and_the_figures_are_logged(whole):
    folder, _, weights = whole
    new = make_step(settings(folder)).encoder.state_dict()
    same = [k for k in new if torch.equal(new[k], weights[k])]
    assert not same
    first = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    assert {"diffusion", "lookahead", "counted", "distance", "norm", "norm_diffusion", "norm_lookahead"} <= first.keys()


def test_checkpoints_are_rotated_and_each_holds_an_encoder_file_that_the_nodes_read(whole):
    folder, path, weights = whole
    kept = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert kept == ["step-00000006", "step-00000007"]
    for stored in (path, folder / "checkpoints/step-00000007/small.safetensors"):
        file = encoder_file.read(stored)
        assert file.metadata["steps"] == "7" and file.metadata["data"] == "numbers"
        assert all(torch.equal(v, weights[f"image_proj.{k}"]) for k, v in file.image_proj.items())
        again = Encoder.start_from(file, make_step(settings(folder)).unet, 2, 2)
        assert all(torch.equal(v, weights[k]) for k, v in again.state_dict().items())


def test_a_run_is_not_continued_with_other_values(whole):
    with pytest.raises(TrainingError, match="other values of batch, seed: give those again"):
        run(whole[0], batch=4, seed=3)


def test_samples_that_are_not_finite_are_left_out_and_named(tmp_path):
    class Damaged(Numbers):
        def batch(self, targets, numbers, device):
            made = super().batch(targets, numbers, device)
            made.target[[n for n, t in enumerate(targets) if t == 3]] = float("nan")
            return made

    c = settings(tmp_path, nonfinite_in_a_row=2)
    step = make_step(c)
    train(c, step, Damaged())
    assert all(v.isfinite().all() for v in step.encoder.state_dict().values())
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert lines and all(line["samples"] == ["picture 3"] for line in lines)

    class Broken(Numbers):
        def batch(self, targets, numbers, device):
            made = super().batch(targets, numbers, device)
            made.target[:] = float("nan")
            return made

    c = settings(tmp_path / "broken", nonfinite_in_a_row=2)
    with pytest.raises(TrainingError, match="2 steps in a row had no finite gradient"):
        train(c, make_step(c), Broken())


_ONE_OF_TWO = """
import importlib.util, sys
import lcm_lookahead.trainer  # before diffusers: see conftest.py
spec = importlib.util.spec_from_file_location("loop", sys.argv[1])
loop = importlib.util.module_from_spec(spec)
sys.modules["loop"] = loop
spec.loader.exec_module(loop)
loop.run(sys.argv[2], steps=2, norms_every=1)
"""


def test_two_processes_have_the_gradients_of_one(tmp_path):
    run(tmp_path / "one", steps=2, norms_every=1)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    processes = []
    for rank in ("0", "1"):
        env = os.environ | common | {"RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, "-c", _ONE_OF_TWO, __file__, str(tmp_path / "two")]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output.decode()
    logs = [(tmp_path / which / "log.jsonl").read_text().splitlines() for which in ("one", "two")]
    for one, two in zip(*(map(json.loads, log) for log in logs), strict=True):
        for figure in ("diffusion", "lookahead", "distance", "norm", "norm_diffusion", "norm_lookahead"):
            assert two[figure] == pytest.approx(one[figure], rel=1e-4), figure


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

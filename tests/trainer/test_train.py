"""The loop: the same command again goes on, with the same bits, however the run was stopped."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import fresh
import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from lcm_lookahead.lookahead.files import encoder_file
from lcm_lookahead.lookahead.losses.l1 import L1Loss
from lcm_lookahead.lookahead.method.resampler import ResamplerSizes
from lcm_lookahead.sdxl import lora
from lcm_lookahead.sdxl.encoder import Encoder
from lcm_lookahead.sdxl.shared_unet import Condition
from lcm_lookahead.trainer.config import CONFIGS
from lcm_lookahead.trainer.lookahead import config
from lcm_lookahead.trainer.lookahead.recipe import LookaheadRecipe, compile_blocks
from lcm_lookahead.trainer.lookahead.step import Batch, Step
from lcm_lookahead.trainer.lookahead.validate import Probes, validate
from lcm_lookahead.trainer.memory import out_of_memory, spilled
from lcm_lookahead.trainer.seeds import generator
from lcm_lookahead.trainer.train import TrainingError, _check_processes, train
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

WIDTH = 64
SHAPE = (4, 8, 8)
FILES = {"base": "b", "start": "s", "shortcut": "l", "vae": "v", "recogniser": "r", "kv_rank": 2}
CONSTANT = {"adapter_rate": 1e-3, "kv_rate": 1e-2}


class Numbers:
    """A source of random pictures. `at` holds what happens when the sample of a number is fetched."""

    latent_shape = SHAPE

    def __init__(self):
        self.at, self.seen = {}, []

    def __len__(self):
        return 5

    def digest(self):
        return "five random pictures"

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
        "model": FILES,
        "data": {"source": "numbers"},
        "steps": 7,
        "batch": 2,
        "precision": "fp32",
        "save_every": 2,
        "log_every": 1,
        "optimiser": {"adapter_rate": 1e-3, "kv_rate": 1e-2, "schedule": "cosine"},
    }
    return config.from_values(base | values)


def run(folder, at=None, source=None, **values):
    c = settings(folder, **values)
    step, source = make_step(c), source or Numbers()
    source.at = at or {}
    return train(c, LookaheadRecipe(c, step), source), step, source


def same(step, weights):
    return all(torch.equal(v, weights[k]) for k, v in step.encoder.state_dict().items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    path, step, source = run(folder)
    return folder, path, {k: v.clone() for k, v in step.encoder.state_dict().items()}


def test_a_kv_encoder_at_rate_0_stays_the_base_and_the_rest_learns(tmp_path):
    path, step, _ = run(tmp_path, steps=2, optimiser={"adapter_rate": 1e-3, "kv_rate": 0.0})
    begun = make_step(settings(tmp_path)).encoder.state_dict()
    changed = {k.split(".")[0] for k, v in step.encoder.state_dict().items() if not torch.equal(v, begun[k])}
    assert changed and "kv" not in changed and encoder_file.read(path).kv
    # No gradient either, which would count in the norm that is clipped.
    assert not any(p.requires_grad for p in step.encoder.kv.parameters())
    c = settings(tmp_path, optimiser={"kv_rate": 0.0})
    assert len(LookaheadRecipe(c, make_step(c)).groups()) == 1


def test_processes_that_leave_a_sample_nothing_to_compare_with_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    four, two = (SimpleNamespace(num_processes=n, device=torch.device("cpu")) for n in (4, 2))
    c = settings(tmp_path, lookahead={"contrast": 0.1}, batch=4)
    with pytest.raises(TrainingError, match="computes 1 at a time, and a loss of this run compares 2 or more"):
        _check_processes(four, c)
    monkeypatch.setenv("WORLD_SIZE", "2")
    _check_processes(two, c)


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
    assert same(step, whole[2])
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 8))


def test_a_signal_ends_the_run_after_its_step_and_the_command_goes_on(whole, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    path, _, source = run(tmp_path, {4: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    assert path is None and source.seen == list(range(6)) and signal.getsignal(signal.SIGTERM) is before
    path, step, source = run(tmp_path)
    assert source.seen == list(range(6, 14)) and path.exists()
    assert same(step, whole[2])


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
    with pytest.raises(
        TrainingError, match=r"with other values of batch \(2, now 4\), seed \(0, now 3\): bring that back"
    ):
        run(whole[0], batch=4, seed=3)


def test_a_run_is_not_continued_with_other_data_another_base_or_fewer_steps(whole, tmp_path):
    class Others(Numbers):
        def digest(self):
            return "five other pictures"

    with pytest.raises(TrainingError, match="with other data than numbers holds now: bring that back"):
        run(whole[0], source=Others())
    c = settings(tmp_path / "new", optimiser=CONSTANT, steps=3)
    train(c, LookaheadRecipe(c, make_step(c), {"base_model_hash": "one"}), Numbers())
    with pytest.raises(TrainingError, match="started with another model than b: bring that back"):
        train(c, LookaheadRecipe(c, make_step(c), {"base_model_hash": "two"}), Numbers())
    with pytest.raises(TrainingError, match="is at step 3, beyond steps=2: give at least 3"):
        run(tmp_path / "new", optimiser=CONSTANT, steps=2)


def test_a_run_goes_on_with_what_changes_nothing_of_it(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000007")
    files = {key: name if key == "kv_rank" else f"/elsewhere/{name}" for key, name in FILES.items()}
    data = {"source": "numbers", "cache": "other", "keep": False}
    _, step, source = run(tmp_path / "run", model=files, data=data, validation={"steps": 3}, validate_every=3)
    assert source.seen == [12, 13] and same(step, whole[2])


def test_a_damaged_checkpoint_is_named_with_the_one_before_it(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    last = tmp_path / "run/checkpoints/step-00000007"
    state = (last / "state.pt").read_bytes()
    (last / "state.pt").write_bytes(state[: len(state) // 2])
    with pytest.raises(TrainingError, match="step-00000007, and the run goes on from step-00000006") as error:
        run(tmp_path / "run")
    assert f"delete the folder {last}" in str(error.value)
    shutil.rmtree(last)
    assert same(run(tmp_path / "run")[1], whole[2])


def test_a_checkpoint_that_cannot_be_written_is_said_and_leaves_nothing(whole, tmp_path, monkeypatch):
    """A file size limit stands for a full disk."""
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000007")
    for left in ("step-00000005.part", ".step-00000005.0badcafe.part"):  # of runs that were killed while they saved
        (tmp_path / "run/checkpoints" / left).mkdir()
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(TrainingError, match="The checkpoint .*step-00000007 cannot be written .*: free some space"):
            run(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000006"]
    assert same(run(tmp_path / "run")[1], whole[2])


def test_a_last_line_of_the_log_that_was_cut_short_does_not_stop_the_run(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000007")
    text = (tmp_path / "run/log.jsonl").read_text()
    (tmp_path / "run/log.jsonl").write_text(text[:-9])
    run(tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 8))


def test_half_precision_on_a_cpu_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="precision is fp16, which a CPU does not compute in: give bf16 or fp32."):
        run(tmp_path, precision="fp16")


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_a_cpu_that_is_slow_in_16_bit_is_said(tmp_path, monkeypatch, capsys, capability):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    run(tmp_path, precision="bf16", steps=1)
    assert ("give precision=fp32" in capsys.readouterr().out) == (capability == "AVX2")


def test_a_run_goes_on_where_its_folder_was_moved_to(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "elsewhere")
    (tmp_path / "elsewhere/small.safetensors").unlink()
    path, _, _ = run(tmp_path / "elsewhere")
    stored = encoder_file.read(path)
    assert path.parent.name == "elsewhere" and stored.metadata["steps"] == "7"
    assert all(torch.equal(v, whole[2][f"image_proj.{k}"]) for k, v in stored.image_proj.items())


def test_a_run_says_that_it_goes_on_with_other_threads(whole, tmp_path, capsys):
    shutil.copytree(whole[0], tmp_path / "again")
    run(tmp_path / "again")
    assert "The last checkpoint was made" not in capsys.readouterr().out
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        run(tmp_path / "again")
    finally:
        torch.set_num_threads(threads)
    said = (
        f"The last checkpoint was made with threads {threads}, now {threads + 1}: the run goes on, but not to the same"
    )
    assert said in capsys.readouterr().out


def test_samples_that_are_not_finite_are_left_out_and_named(tmp_path):
    class Damaged(Numbers):
        def batch(self, targets, numbers, device):
            made = super().batch(targets, numbers, device)
            made.target[[n for n, t in enumerate(targets) if t == 3]] = float("nan")
            return made

    c = settings(tmp_path, nonfinite_in_a_row=2)
    step = make_step(c)
    train(c, LookaheadRecipe(c, step), Damaged())
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
        train(c, LookaheadRecipe(c, make_step(c)), Broken())


class Probed(Numbers):
    """With people to validate with; their identity is what `identities` says, one validation after another. Pictures
    are judged first, then previews."""

    def __init__(self, *identities):
        super().__init__()
        self.identities, self.pictures, self.previews = list(identities), [], []

    def probes(self, config, device):
        count, prompts = config.validation.people, len(config.validation.prompts)
        batch = self.batch([n for n in range(count) for _ in range(prompts)], [], device)

        def score(pictures):
            of_previews = len(self.previews) < len(self.pictures)
            (self.previews if of_previews else self.pictures).append(pictures)
            value = 0.75 if of_previews else self.identities.pop(0)
            return {"identity": torch.tensor([value, value, torch.nan])}

        return Probes(batch, prompts, torch.zeros(count, 3, 64, 64), score, "a list")


VALIDATION = {"people": 2, "steps": 2, "prompts": ["one", "two"]}


def test_validation_changes_no_bit_of_the_run_and_draws_the_same_noise_each_time(whole, tmp_path):
    source = Probed(0.0, 0.1, 0.2, 0.3, 0.4)
    torch.manual_seed(11)
    _, step, _ = run(tmp_path, source=source, validate_every=2, validation=VALIDATION, ema=0.5)
    assert same(step, whole[2])
    assert not torch.equal(source.pictures[0], source.pictures[-1])
    again = Probed(0.0, 0.1, 0.2, 0.3, 0.4)
    run(tmp_path / "again", source=again, validate_every=2, validation=VALIDATION, ema=0.5)
    assert torch.equal(again.pictures[-1], source.pictures[-1])
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    found = {line["step"]: line["validation"]["identity"] for line in lines if "validation" in line}
    # (of three pictures one has no face: it counts as nobody, lest a few good ones look better than many)
    assert found == pytest.approx({k: v * 2 / 3 for k, v in {0: 0.0, 2: 0.1, 4: 0.2, 6: 0.3, 7: 0.4}.items()})
    said = [line["validation"] for line in lines if "validation" in line]
    assert all(one["faces"] == pytest.approx(2 / 3) and one["previewed"] == pytest.approx(0.5) for one in said)
    assert all(one["apart"] > 0 for one in said) and not torch.equal(source.previews[-1], source.pictures[-1])
    with Image.open(tmp_path / "validation/step-00000007.png") as grid:
        assert grid.size == (3 * 64, 2 * 64)  # a person a row: the reference, and a picture a prompt


def test_a_signal_to_stop_leaves_out_the_validation_that_is_due_and_the_next_start_makes_up_for_it(tmp_path):
    source = Probed(0.0, 0.9, 0.2, 0.3)
    stop = {7: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    run(tmp_path, stop, source=source, validate_every=4, validation=VALIDATION, keep=1)
    assert len(source.pictures) == 1
    run(tmp_path, source=source, validate_every=4, validation=VALIDATION, keep=1)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation" in line] == [0, 4, 7]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000004", "step-00000007"]


def test_the_best_checkpoint_is_kept_beside_the_last_ones(tmp_path):
    identities = [0.9, 0.1, 0.5, 0.2, 0.3]  # the first is of what training starts from
    run(tmp_path, source=Probed(*identities), validate_every=2, validation=VALIDATION, keep=1)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000007"]


def test_pictures_of_a_validation_do_not_depend_on_how_many_are_drawn_at_a_time(tmp_path):
    """Rows that are drawn together do not see each other: fewer at a time draw the same pictures."""
    c = settings(tmp_path)
    step, drawn = make_step(c), []
    source = Probed(0.0, 0.0)
    probes = source.probes(config.from_values(c.model_dump() | {"validation": VALIDATION}), torch.device("cpu"))
    for rows in (1, 4):
        validate(step, step.encoder, probes, c.validation, rows, tmp_path / "grid.png")
        drawn = [*drawn, source.pictures[-1]]
    assert torch.allclose(*drawn, atol=1e-4)


def test_accumulated_parts_have_the_gradients_of_the_whole_batch(tmp_path):
    logs = []
    for accumulate in (1, 3):
        folder = tmp_path / str(accumulate)
        run(folder, steps=2, batch=6, accumulate=accumulate, norms_every=1)
        logs.append([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()])
    for one, three in zip(*logs, strict=True):
        for figure in ("diffusion", "lookahead", "distance", "norm", "norm_diffusion", "norm_lookahead"):
            assert three[figure] == pytest.approx(one[figure], rel=1e-4), figure
    with pytest.raises(TrainingError, match="batch is 6, and 1 processes with accumulate 4 cannot share it"):
        run(tmp_path / "4", batch=6, accumulate=4)


def test_a_run_that_needs_less_memory_goes_on_from_one_that_needed_more(whole, tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, {5: killed})
    _, step, _ = run(tmp_path, accumulate=2, checkpointing="all", validate_every=3)
    assert all(torch.allclose(v, whole[2][k], atol=1e-5) for k, v in step.encoder.state_dict().items())


def test_the_average_of_the_weights_is_what_is_exported_and_resumed(tmp_path):
    decay, weights = 0.8, []
    for steps in (1, 2, 3):
        _, step, _ = run(tmp_path / "plain", steps=steps, optimiser=CONSTANT)
        weights.append({k: v.clone() for k, v in step.encoder.state_dict().items()})
    path, step, _ = run(tmp_path / "averaged", steps=3, optimiser=CONSTANT, ema=decay)
    assert same(step, weights[-1])
    average = weights[0]
    for after in weights[1:]:
        average = {k: decay * v + (1 - decay) * after[k] for k, v in average.items()}
    file = encoder_file.read(path)
    assert all(torch.allclose(v, average[f"image_proj.{k}"], atol=1e-6) for k, v in file.image_proj.items())
    with pytest.raises(Killed):
        run(tmp_path / "killed", {5: killed}, steps=3, optimiser=CONSTANT, ema=decay)
    again, _, _ = run(tmp_path / "killed", steps=3, optimiser=CONSTANT, ema=decay)
    resumed = encoder_file.read(again).image_proj
    assert all(torch.equal(v, resumed[k]) for k, v in file.image_proj.items())


@pytest.mark.slow
def test_compiled_blocks_come_to_the_same_weights_and_share_their_graphs(whole, tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    c = settings(tmp_path)
    step = make_step(c)
    compile_blocks(step.unet, backend="aot_eager")  # the default's C++ takes minutes
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        train(c, LookaheadRecipe(c, step), Numbers())
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] < 40
    assert all(torch.allclose(v, whole[2][k], atol=1e-5) for k, v in step.encoder.state_dict().items())


@pytest.mark.parametrize(
    ("values", "package", "said"),
    [
        ({"optimiser": {"eight_bit": True}}, "bitsandbytes", "optimiser.eight_bit needs the package bitsandbytes"),
        ({"trackers": ["wandb"]}, "wandb", "The tracker wandb needs the package wandb"),
    ],
)
def test_a_missing_package_is_named_with_what_to_do(tmp_path, monkeypatch, values, package, said):
    monkeypatch.setitem(sys.modules, package, None)  # missing, also where it is installed
    monkeypatch.setitem(sys.modules, f"{package}.optim", None)
    with pytest.raises(TrainingError, match=said) as error:
        run(tmp_path, **values)
    assert str(error.value).count(". ") == 0


def test_a_tracker_is_told_the_figures(tmp_path):
    run(tmp_path, trackers=["tensorboard"], source=Probed(0.0, 0.1, 0.2), validate_every=4, validation=VALIDATION)
    events = EventAccumulator(str(next(tmp_path.rglob("*tfevents*")).parent)).Reload()
    assert [e.step for e in events.Scalars("diffusion")] == list(range(1, 8))
    assert [e.value * 3 / 2 for e in events.Scalars("validation/identity")] == pytest.approx([0.0, 0.1, 0.2])


def test_out_of_memory_says_what_each_knob_saves_and_which_take_a_new_run(tmp_path, monkeypatch):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr("lcm_lookahead.trainer.lookahead.estimate.NOTABLE", 0.0)  # of a model as small as this one
    with pytest.raises(TrainingError) as error:
        run(tmp_path, {1: full}, ema=0.9, checkpointing="blocks", batch=4)
    now, later = str(error.value).split("in a new run, with another `out`")
    for knob in ("checkpointing=all (saves ", "accumulate=4 (saves ", "norms_every=0 (saves "):
        assert knob in now
    for knob in ("precision=bf16 (saves ", "ema=0 (saves ", "optimiser.eight_bit=true (saves "):
        assert knob in later
    assert "all knobs are turned" in out_of_memory(settings(tmp_path), {})


def test_more_memory_in_use_than_there_is_gets_a_warning():
    assert spilled(20e9, 24e9) is None
    assert "30.0 GB are in use on a GPU of 24.0 GB" in spilled(30e9, 24e9)


def one_of_two(out, rank):
    for steps in (1, 2):  # stopped after the first, and gone on from there
        run(out, steps=steps, norms_every=1, optimiser=CONSTANT)
    elsewhere = out.with_name("elsewhere")
    with pytest.raises(TrainingError) as error:  # the one sees another folder than the other one
        run(elsewhere if rank == "0" else out, steps=3, optimiser=CONSTANT)
    assert "not at the same step with the same weights (steps [0, 2])" in str(error.value)
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one_and_go_on_where_they_stopped(tmp_path):
    run(tmp_path / "one", steps=2, norms_every=1, optimiser=CONSTANT)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    processes = []
    for rank in ("0", "1"):
        env = os.environ | common | {"RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"}
        processes.append(fresh.start(one_of_two, tmp_path / "two", rank, output=tmp_path / rank, environment=env))
    for rank, process in enumerate(processes):
        fresh.check(process, tmp_path / str(rank))
    logs = [(tmp_path / which / "log.jsonl").read_text().splitlines() for which in ("one", "two")]
    for one, two in zip(*(map(json.loads, log) for log in logs), strict=True):
        for figure in ("diffusion", "lookahead", "distance", "norm", "norm_diffusion", "norm_lookahead"):
            assert two[figure] == pytest.approx(one[figure], rel=1e-4), figure


@pytest.mark.slow
@pytest.mark.parametrize("told", [True, False])
def test_the_command_shares_a_run_between_two_processes_or_refuses(tmp_path, told):
    """As docs/launch starts them: a line a step, whoever writes it, and nothing where each would run on its own."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    common |= {"CUDA_VISIBLE_DEVICES": ""} | ({"ACCELERATE_USE_CPU": "true"} if told else {})
    values = ["steps=2", "batch=2", "validate_every=0", "precision=fp32", "log_every=1", f"out={tmp_path}"]
    command = [
        sys.executable,
        "-m",
        "lcm_lookahead.cli.main",
        "train",
        str(CONFIGS / "mini_none.yaml"),
        *values,
    ]
    processes, outputs = [], []
    for rank in ("0", "1"):
        env = os.environ | common | {"RANK": rank, "LOCAL_RANK": rank}
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    for process in processes:
        outputs.append(process.communicate(timeout=300)[0])
    if told:
        assert [process.returncode for process in processes] == [0, 0], outputs
        assert [output.count("step 1/2") for output in outputs] == [1, 0]
        assert [output.count("Written: ") for output in outputs] == [1, 0]
        assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    else:
        assert all("2 processes were started, which do not know of each other" in output for output in outputs)
        assert not list(tmp_path.iterdir())


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

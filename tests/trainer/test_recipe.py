"""The loop knows no method: a linear regression, with a validation and a file of its own, is trained by it."""

import io
import json
import os
import re
import signal
import socket
import sys
from dataclasses import dataclass

import fresh
import pytest
import torch
from lcm_lookahead.trainer.checkpoints import TrainingError
from lcm_lookahead.trainer.config import BaseModels, BaseOptimiser, ConfigError, RunConfig
from lcm_lookahead.trainer.log import Pace
from lcm_lookahead.trainer.recipe import Outcome
from lcm_lookahead.trainer.seeds import generator
from lcm_lookahead.trainer.train import train
from pydantic import Field
from torch import nn

TRUE = torch.tensor([[1.0, -2.0, 0.5]])


class RegressionOptimiser(BaseOptimiser):
    rate: float = 0.05


class RegressionConfig(RunConfig):
    optimiser: RegressionOptimiser = RegressionOptimiser()
    model: BaseModels = BaseModels(base="none")
    ridge: float = Field(0.01, description="weight of the penalty on the weights' square")
    SYNONYMS = RunConfig.SYNONYMS | {"learning_rate": "optimiser.rate"}


class StartableModels(BaseModels):
    start: str = Field("none", description="file to start from")


class StartableConfig(RegressionConfig):
    model: StartableModels = StartableModels(base="none")


@dataclass
class Points:
    names: list
    x: torch.Tensor
    y: torch.Tensor


class Line:
    """Twelve points of a plane."""

    def __init__(self):
        self.at, self.numbers = {}, []

    def __len__(self):
        return 12

    def digest(self):
        return "twelve points"

    def prepare(self, device):
        pass

    def batch(self, targets, numbers, device):
        for number in numbers:
            self.numbers.append(number)
            self.at.get(number, lambda: None)()
        x = torch.stack([torch.randn(3, generator=generator(5, t)) for t in targets]).to(device)
        return Points([f"point {t}" for t in targets], x, x @ TRUE.T.to(device))


class Losses(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.frozen = nn.Linear(3, 3, bias=False).requires_grad_(False)
        nn.init.eye_(self.frozen.weight)
        self.line = nn.Linear(3, 1, bias=False)
        nn.init.zeros_(self.line.weight)
        self.ridge = config.ridge

    def forward(self, part, batch, noise):
        if part == "ridge":
            values = (self.ridge * self.line.weight.square().sum()).expand(len(batch.x))
        else:
            values = (self.line(self.frozen(batch.x)) - batch.y - noise).square().mean(1)
        terms = {"noise": noise.square().mean(1)} if part == "fit" else {}
        return Outcome(values.mean(), values.detach(), torch.ones_like(values, dtype=torch.bool), terms)


class Distance:
    by = "the distance to the truth"

    def __call__(self, trained, rows, grid):
        return {"closeness": -(trained.weight - TRUE).norm().item()}


class Regression:
    parts, about, monitor = ("fit", "ridge"), {"base_model_hash": "none"}, "closeness"

    def __init__(self, config):
        self.config, self.losses, self.compiled = config, Losses(config), False
        self.trained = self.losses.line

    def groups(self):
        return [([self.trained.weight], self.config.optimiser.rate)]

    def draw(self, numbers, batch):
        return torch.stack([0.01 * torch.randn(1, generator=generator(self.config.seed, n)) for n in numbers])

    def figures(self, outcomes, mean):
        losses = {part: mean(outcome.loss) for part, outcome in outcomes.items()}
        return losses | {"noise": mean(outcomes["fit"].terms["noise"].mean())}

    def export(self, path, trained, steps):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"steps": steps, "weight": trained.weight.tolist()}))
        return path

    def validator(self, source, device):
        return Distance()

    def compile(self):
        self.compiled = True

    def savings(self, processes):
        return {"batch=1": 0.5}


def run(folder, at=None, kind=RegressionConfig, **values):
    base = {"out": str(folder), "data": {"source": "a plane"}, "steps": 9, "batch": 4, "precision": "fp32"}
    base |= {"save_every": 2, "validate_every": 3, "log_every": 1, "norms_every": 2}
    config = kind.from_values(base | values)
    recipe, source = Regression(config), Line()
    source.at = at or {}
    return train(config, recipe, source), recipe, source


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *run(folder, steps=40)[:2]


def test_another_recipe_is_trained_validated_and_exported(whole):
    folder, path, recipe = whole
    assert (recipe.trained.weight - TRUE).norm() < 0.7 * TRUE.norm()
    assert json.loads(path.read_text()) == {"steps": 40, "weight": recipe.trained.weight.tolist()}
    assert torch.equal(recipe.losses.frozen.weight, torch.eye(3))
    steps = [line for line in lines(folder) if "fit" in line]
    assert {"fit", "ridge", "noise", "norm", "norm_fit", "norm_ridge"} <= steps[0].keys() and len(steps) == 40
    closeness = [line["validation"]["closeness"] for line in lines(folder) if "validation" in line]
    assert len(closeness) == 1 + 14 and closeness[-1] > closeness[0]
    assert (folder / "checkpoints/step-00000040/encoder.safetensors").is_file()


@pytest.mark.parametrize("stop", ["killed", "signal"])
def test_it_goes_on_to_the_same_bits(tmp_path, stop):
    def killed():
        raise KeyboardInterrupt

    run(tmp_path / "whole", ema=0.5)
    if stop == "killed":
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", {22: killed}, ema=0.5)
    else:
        assert run(tmp_path / "parts", {22: lambda: os.kill(os.getpid(), signal.SIGTERM)}, ema=0.5)[0] is None
    path, _, source = run(tmp_path / "parts", ema=0.5)
    assert source.numbers[0] == (16 if stop == "killed" else 24)
    assert path.read_bytes() == (tmp_path / "whole/encoder.safetensors").read_bytes()
    one, two = (
        [{k: line.get(k) for k in ("step", "fit", "ridge", "norm", "validation")} for line in lines(tmp_path / which)]
        for which in ("whole", "parts")
    )
    assert one == two


def test_a_signal_in_a_validation_ends_it_at_once_and_the_next_start_makes_up_for_it(tmp_path, monkeypatch):
    validate, calls = Distance.__call__, []

    def told_to_stop(self, *arguments):
        calls.append("begun")
        if len(calls) == 2:  # that after step 3
            os.kill(os.getpid(), signal.SIGINT)
        calls.append("ended")
        return validate(self, *arguments)

    run(tmp_path / "whole")
    monkeypatch.setattr(Distance, "__call__", told_to_stop)
    calls.append("first")  # of what training starts from: the signal comes while it is under way
    assert run(tmp_path / "parts")[0] is None
    assert calls == ["first", "begun"] and not (tmp_path / "parts/checkpoints").exists()
    calls[:] = []
    assert run(tmp_path / "parts", {9: lambda: calls.clear() or calls.append("x")})[0] is None
    assert calls == ["x", "begun"]
    monkeypatch.undo()
    path, _, source = run(tmp_path / "parts")
    assert source.numbers[0] == 12
    assert path.read_bytes() == (tmp_path / "whole/encoder.safetensors").read_bytes()
    figures = [[line for line in lines(tmp_path / which) if "validation" in line] for which in ("whole", "parts")]
    assert figures[0] == figures[1]


def test_a_second_signal_does_not_wait_for_the_step(tmp_path, capfd):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, {22: twice})
    assert "Stopping after this step, with a checkpoint (again: at once" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    assert run(tmp_path)[2].numbers[0] == 16


def test_of_two_runs_into_one_folder_the_second_is_refused(tmp_path):
    def another():
        with pytest.raises(TrainingError, match=rf"Another run \(process {os.getpid()}\) is under way in .*: wait"):
            run(tmp_path)

    run(tmp_path, {5: another})
    assert len([line for line in lines(tmp_path) if "fit" in line]) == 9
    run(tmp_path, steps=10)  # the first has ended


def test_the_file_that_is_advised_to_start_from_is_there(tmp_path):
    run(tmp_path, kind=StartableConfig)
    with pytest.raises(TrainingError, match="started with other values of .*name") as error:
        run(tmp_path, name="other", kind=StartableConfig)
    path = re.search(r"model.start=(\S+) from", str(error.value))[1]
    assert json.loads(open(path).read())["steps"] == 9


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("out", "bar"), [(Terminal, True), (io.StringIO, True), (io.StringIO, False)])
def test_progress_is_a_bar_in_a_terminal_and_lines_elsewhere(tmp_path, monkeypatch, out, bar):
    monkeypatch.setattr("sys.stdout", out())
    monkeypatch.setattr("sys.stderr", Terminal() if bar else io.StringIO())
    run(tmp_path)
    said, shown = sys.stdout.getvalue(), sys.stderr.getvalue()
    assert ("step 9/9  fit" in said) == (out is io.StringIO)
    assert said.count("validation after step") == 4
    if bar:
        last = shown.rstrip().split("\r")[-1]
        assert re.search(r"encoder 100%\|.*\| 9/9, fit \S+, ridge \S+, noise \S+, .*\S+ pictures/s, 0:00:00 left", last)
    else:
        assert "pictures/s" not in shown


def test_what_is_left_counts_validations_and_checkpoints_by_themselves():
    now = [100.0]
    pace = Pace(lambda: now[0])

    def step(seconds):
        now[0] += seconds
        pace.stepped()

    with pace.pause("validations"):
        now[0] += 600
    step(30)  # compiles, reads
    assert pace.seconds() == 30 and pace.left(10, {"validations": 0, "checkpoints": 2}) == 300
    for _ in range(4):
        step(2)
        with pace.pause("checkpoints"):
            now[0] += 5
    assert pace.seconds() == 2
    assert pace.left(100, {"validations": 3, "checkpoints": 4}) == 100 * 2 + 3 * 600 + 4 * 5


def test_accumulated_parts_are_one_batch(tmp_path):
    _, one, _ = run(tmp_path / "one")
    _, four, _ = run(tmp_path / "four", accumulate=4)
    assert torch.allclose(one.trained.weight, four.trained.weight, atol=1e-6)


def test_the_loop_asks_it_to_compile_and_what_saves_memory(tmp_path):
    assert run(tmp_path / "compiled", compile=True)[1].compiled

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(TrainingError, match=r"batch=1 \(saves 0.5 GB\)"):
        run(tmp_path / "full", {1: full})


def test_its_configuration_is_checked_like_any(tmp_path):
    with pytest.raises(ConfigError, match="ridg is no key of a configuration: did you mean ridge"):
        run(tmp_path, ridg=1)
    with pytest.raises(ConfigError, match="learning_rate .* did you mean optimiser.rate"):
        run(tmp_path, learning_rate=1)
    run(tmp_path, steps=2)
    with pytest.raises(TrainingError, match=r"with other values of ridge \(0.01, now 0.5\)"):
        run(tmp_path, steps=2, ridge=0.5)


def one_of_two(out):
    for steps in (3, 5):  # stopped after the third, and gone on from there
        run(out, steps=steps)
    torch.distributed.destroy_process_group()


def test_two_processes_share_its_batch(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    processes = []
    for rank in ("0", "1"):
        env = os.environ | common | {"RANK": rank, "LOCAL_RANK": rank}
        processes.append(fresh.start(one_of_two, tmp_path / "two", output=tmp_path / rank, environment=env))
    for rank, process in enumerate(processes):
        fresh.check(process, tmp_path / str(rank))
    run(tmp_path / "one", steps=5)
    steps = [[line for line in lines(tmp_path / which) if "fit" in line] for which in ("one", "two")]
    for one, two in zip(*steps, strict=True):
        assert one.keys() == two.keys()
        for figure in one.keys() & {"fit", "ridge", "noise", "norm", "norm_fit", "norm_ridge"}:
            assert two[figure] == pytest.approx(one[figure], rel=1e-5), figure

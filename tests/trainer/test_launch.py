"""Engines that hand out shards: the bytes are those of one process, and SLURM gets a script that does the same."""

import os
import pickle
import subprocess
from importlib.util import find_spec

import pytest
from lcm_lookahead.cli import launch as launching
from lcm_lookahead.cli import main
from lcm_lookahead.cli.generate import launch_shards
from lcm_lookahead.cli.launch import ShardTask, executor, launch
from lcm_lookahead.cli.plan import decoder_work, describe, make_plan, parse_prices
from lcm_lookahead.sdxl import configs
from lcm_lookahead.trainer.config import CONFIGS, ConfigError
from lcm_lookahead.trainer.data.generate.config import load
from lcm_lookahead.trainer.data.tars import ShardError

with_an_engine = pytest.mark.skipif(find_spec("datatrove") is None, reason="the extra `cluster` is not installed")


def settings(out, *more):
    values = [f"out={out}", "shards=3", "people_per_shard=2", "prompts.per_person=2", "prompts.plain_count=1"]
    values += ["generator.size=64", "checks.detector=null", "checks.recogniser=null", "checks.clip=null"]
    return load(CONFIGS / "generate/drawn.yaml", [*values, f"launch.logs={out}-logs", "launch.tasks=2", *more])


def bytes_in(folder):
    return {p.name: p.read_bytes() for p in folder.glob("shard-*") if "times" not in p.name}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "people"
    ShardTask(settings(out))()
    return out


@with_an_engine
def test_tasks_of_an_engine_make_the_bytes_of_one_process_and_leave_what_is_finished(alone, tmp_path, capsys):
    config = settings(tmp_path / "people", "launch.engine=local", "launch.workers=1")
    launch_shards(config)
    assert bytes_in(tmp_path / "people") == bytes_in(alone) and (tmp_path / "people/report.html").exists()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "people").glob("*.tar")}
    launch_shards(config)
    assert {p: p.stat().st_mtime_ns for p in before} == before


@with_an_engine
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_two_workers_of_an_engine_make_the_bytes_of_one_process(alone, tmp_path, engine):
    if engine == "ray":
        pytest.importorskip("ray", reason="the extra `cluster` is not installed")
    more = ["launch.workers=2", "launch.cpus=1", "launch.gpus=0", "launch.gigabytes=1"]
    launch_shards(settings(tmp_path / "people", f"launch.engine={engine}", *more))
    assert bytes_in(tmp_path / "people") == bytes_in(alone)


@with_an_engine
def test_slurm_gets_a_script_whose_tasks_make_the_shards(alone, tmp_path, monkeypatch):
    more = ["launch.engine=slurm", "launch.partition=gpu", "launch.time=02:00:00", "launch.workers=1", "launch.gpus=1"]
    config = settings(tmp_path / "people", *more, "launch.cpus=8", "launch.sbatch={account: faces}")
    scontrol = tmp_path / "bin/scontrol"  # all of SLURM that a task itself calls
    scontrol.parent.mkdir()
    scontrol.write_text("#!/bin/sh\necho localhost\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}{os.pathsep}{os.defpath}")
    with pytest.raises(ConfigError, match="no sbatch here: .*launch_script.slurm is written, give it to sbatch"):
        launch(config)
    script = (tmp_path / "people-logs/launch_script.slurm").read_text()
    for line in ("partition=gpu", "time=02:00:00", "array=0-1%1", "gpus=1", "cpus-per-task=8", "account=faces"):
        assert f"#SBATCH --{line}\n" in script, line
    assert "launch_pickled_pipeline" in script and "executor.pik" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    import dill

    for task in range(2):  # as SLURM starts them
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        monkeypatch.setenv("SLURM_NODELIST", "localhost")
        with (tmp_path / "people-logs/executor.pik").open("rb") as file:
            dill.load(file).run()
    assert bytes_in(tmp_path / "people") == bytes_in(alone)


@with_an_engine
def test_what_fails_or_is_missing_is_said(alone, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="engine 'slurm' needs a partition"):
        settings(tmp_path, "launch.engine=slurm")
    monkeypatch.setattr(launching, "launch", lambda config: None)  # an engine whose tasks all failed
    with pytest.raises(ShardError, match="3 of 3 shards are not made, the first is 0: the engine's logs say why"):
        launch_shards(settings(tmp_path / "none", "launch.engine=ray"))
    monkeypatch.setattr(launching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="launch.engine is ray, which needs datatrove and ray: install it"):
        executor(settings(tmp_path, "launch.engine=ray"))
    assert pickle.loads(pickle.dumps(ShardTask(settings(alone)))) == ShardTask(settings(alone))


def test_a_plan_says_what_is_assumed_and_after_a_shard_what_is_measured(alone, tmp_path):
    drawn = describe(make_plan(settings(tmp_path / "none")), "my.yaml", {})
    assert "6 people with 2 pictures each: 12 pictures" in drawn and "sizes are assumed" in drawn
    measured = make_plan(settings(alone))
    assert "3 finished shards (12 pictures)" in measured.measured and measured.speed > 0
    size = sum(path.stat().st_size for path in alone.glob("*.tar"))
    assert measured.size * 12 * measured.kept == pytest.approx(size)


def test_the_work_of_sdxl_turbo_is_that_of_its_layers(tmp_path):
    config = load(CONFIGS / "generate/sdxl.yaml", [f"out={tmp_path}", "shards=1000"])
    plan = make_plan(config)
    assert plan.work["UNet"] / 1e12 == pytest.approx(1.59, rel=0.03)
    assert decoder_work(configs.VAE, 512) / 1e12 == pytest.approx(2.51, rel=0.03)
    text = describe(plan, "sdxl.yaml", parse_prices("h100=2"))
    assert "100,000 people" in text and "launch.engine=slurm" in text and "h100" in text
    with pytest.raises(ConfigError, match="--prices has 'x=1': write card=price"):
        parse_prices("x=1")


def test_the_command_prints_a_plan(tmp_path, capsys):
    main.main(["generate", str(CONFIGS / "generate/drawn.yaml"), f"out={tmp_path}", "--plan", "--prices", "h100=2"])
    assert "400 people with 6 pictures each" in capsys.readouterr().out and not list(tmp_path.iterdir())

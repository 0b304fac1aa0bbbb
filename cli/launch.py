"""Shards by an engine of datatrove: processes of this machine, a SLURM array, or Ray. The optional extra `cluster`.

The engine only says which task runs where; a task makes the shards that are its own, and those that are finished are
left alone, so a task that is lost or runs twice does no harm.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..trainer.data.generate.config import GenerateConfig

LOGS = "generate_logs"  # folder of an engine's logs, where launch.logs says none


@dataclass(frozen=True)
class ShardTask:
    """One step of a pipeline of datatrove: makes every `world_size`-th shard from the `rank`-th on. It is sent to other
    processes and machines, where the package and the files of the models must be too."""

    config: GenerateConfig

    def __call__(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:
        os.environ.setdefault("LOCAL_RANK", str(rank))  # a GPU each, where a task sees several
        from .engine import read_engine

        engine = read_engine(self.config)
        for number in engine.missing(range(self.config.shards)[rank::world_size]):
            engine.make_shard(number)

    def __repr__(self) -> str:
        return f"shards of {self.config.name}, {self.config.shards} in all, in {self.config.out}"


def executor(config: GenerateConfig) -> Any:
    """datatrove's executor of `config.launch`. Raises ConfigError where a package is missing."""
    from ..trainer.config import ConfigError

    settings = config.launch
    packages = ("datatrove", "ray") if settings.engine == "ray" else ("datatrove",)
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"launch.engine is {settings.engine}, which needs {' and '.join(missing)}: install it with pip (the extra "
            "`cluster`), or start workers yourself (--worker)."
        )
    # What is finished says so itself: a mark of the engine's own would leave out shards that were asked for later.
    common: dict[str, Any] = {
        "pipeline": [ShardTask(config)],
        "tasks": settings.tasks,
        "workers": settings.workers or -1,
        "logging_dir": settings.logs or f"{LOGS}/{config.name}",
        "skip_completed": False,
    }
    if settings.engine == "local":
        from datatrove.executor import LocalPipelineExecutor

        return LocalPipelineExecutor(**common)
    common |= {
        "cpus_per_task": settings.cpus,
        "mem_per_cpu_gb": max(1, settings.gigabytes // settings.cpus),
        "gpus_per_task": settings.gpus,
    }
    if settings.engine == "ray":
        from datatrove.executor import RayPipelineExecutor

        return RayPipelineExecutor(**common)
    from datatrove.executor import SlurmPipelineExecutor

    return SlurmPipelineExecutor(
        **common,
        time=settings.time,
        partition=settings.partition,
        qos=settings.qos,
        job_name=config.name,
        env_command=settings.environment,
        sbatch_args=dict(settings.sbatch),
    )


def launch(config: GenerateConfig) -> None:
    """Have the engine make what is missing. Raises ConfigError or DataError, one sentence."""
    from ..trainer.config import ConfigError

    engine = executor(config)
    if config.launch.engine == "ray":
        import ray

        if not ray.is_initialized():  # the cluster of RAY_ADDRESS, else this machine
            ray.init(num_cpus=None if "RAY_ADDRESS" in os.environ else config.launch.tasks * config.launch.cpus)
    try:
        engine.run()
    except FileNotFoundError as error:
        if config.launch.engine != "slurm" or error.filename != "sbatch":
            raise
        script = engine.logging_dir.resolve_paths("launch_script.slurm")
        raise ConfigError(
            f"There is no sbatch here: {script} is written, give it to sbatch where there is one."
        ) from None

"""What reading costs: a step's waiting for its batch, as before and with what is made ahead; prepare; opening an index.

`python -m lcm_lookahead.tools.bench_data`, in a process of its own. "As before" is reading, decoding and encoding
inside of the step (`data.keep=false workers=0`), each picture alone.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

PEOPLE, STEPS, BATCH = 8, 4, 2
GENERATED = 12  # pictures
ENTRIES, PER_SHARD, PER_PERSON = 500_000, 500, 5
FULL_SIZE, FULL_STEP, FULL_STEPS = 4, 0.47, 20  # samples; seconds that a step of SDXL takes on an H200 by its FLOP


def measure() -> dict[str, Any]:
    """All figures, on the mini world and on features of SDXL's size."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        report = {"opening": opening(Path(folder) / "index")}
        report |= reading(Path(folder))
        report["generate"] = {f"{batch} at a time": generating(batch) for batch in (1, GENERATED)}
        report["full_size"] = full_size(Path(folder) / "full")
    return report


def reading(folder: Path) -> dict[str, Any]:
    """Shares of a training step's time spent waiting, on drawn people in shards; pictures a second of prepare."""
    from ..cli.assemble import assemble, device
    from ..cli.main import main
    from ..trainer.config import CONFIGS
    from ..trainer.lookahead.config import load

    out = folder / "drawn"
    made = [f"out={out}", "shards=1", f"people_per_shard={PEOPLE}", "prompts.per_person=4"]
    try:
        main(["generate", str(CONFIGS / "generate" / "drawn.yaml"), *made])
    except SystemExit as end:
        assert not end.code

    def config(*values: str) -> Any:
        common = [f"data.source={out}", "data.size=128", f"batch={BATCH}", f"steps={STEPS}", "validate_every=0"]
        return load(CONFIGS / "mini.yaml", [*common, f"out={folder / 'run'}", "norms_every=0", *values])

    figures: dict[str, Any] = {}
    throughput = {}
    for name, batch in (("one at a time", 1), ("eight at a time", 8)):
        _, source = assemble(config(f"data.cache={folder / name}", f"data.read_batch={batch}", "workers=0"))
        pictures = len({item.what for c in source.missing().chunks for item in c.items.values()})
        begun = time.process_time()
        source.prepare(device())
        throughput[name] = pictures / (time.process_time() - begun)
    arms = {"read and encoded in the step": ("data.keep=false", "workers=0")}
    for workers in (0, 2):
        arms[f"made ahead, {workers} workers"] = (f"data.cache={folder / 'eight at a time'}", f"workers={workers}")
    for name, values in arms.items():
        figures[name] = _waiting(config(*values))
    return {"waiting": figures, "prepare": throughput}


def generating(batch: int) -> dict[str, float]:
    """Pictures a second of the mini world's collapsed LoRA, with their checks: of the clock and of processor time.

    One at a time is checked before the next is drawn; a batch while the next one is drawn.
    """
    from ..cli.engine import read_engine
    from ..trainer.config import CONFIGS
    from ..trainer.data.generate.config import load
    from ..trainer.data.generate.engine import pack
    from ..trainer.data.generate.prompts import plan_pictures

    values = ["prompts.per_person=4", "prompts.plain_count=1", f"generator.batch={batch}"]
    engine = read_engine(load(CONFIGS / "generate" / "mini.yaml", values))
    people = range(GENERATED // 4)
    engine.generate(people[:1])  # warm
    wall, processor = time.perf_counter(), time.process_time()
    if batch == 1:
        for plan in (p for n in people for p in plan_pictures(engine.config.prompts, engine.people(n), "bench")):
            pixels = [each.pixels for each in engine.generator([plan])]
            engine.inspector(pixels, [plan])
            pack(pixels[0], engine.config.files)
    else:
        engine.generate(people)
    return {
        "clock": GENERATED / (time.perf_counter() - wall),
        "processor": GENERATED / (time.process_time() - processor),
    }


def _waiting(config: Any) -> dict[str, float]:
    """Seconds of a step, and the share of them that it waits for its batch."""
    from accelerate import Accelerator

    from ..cli.assemble import assemble
    from ..trainer.feed import Feed
    from ..trainer.gradients import gradients
    from ..trainer.precision import MIXED

    recipe, source = assemble(config)
    accelerator = Accelerator(mixed_precision=MIXED[config.precision])
    losses = accelerator.prepare(recipe.losses)
    feed = Feed(accelerator, config, source, 0)
    trained = list(recipe.trained.parameters())

    def step() -> None:
        samples = [(batch, recipe.draw(numbers, batch)) for numbers, batch in feed.step()]
        gradients(losses, recipe.parts, samples, trained)

    step()
    feed.waiting()
    begun = time.perf_counter()
    for _ in range(STEPS - 1):
        step()
    seconds = (time.perf_counter() - begun) / (STEPS - 1)
    share = feed.waiting()
    feed.close()
    return {"seconds": seconds, "waiting": share}


def full_size(folder: Path) -> dict[str, float]:
    """The share of a step that waits for a batch of SDXL's features at 1024 pixels from the disk.

    The step itself is a pause as long as that of an H200, since reading is what is measured.
    """
    import torch

    from ..trainer.ahead import Ahead
    from ..trainer.data.features import PreparedFeatures, write_features

    pictures = FULL_SIZE * 8
    texts = 16

    def items() -> Any:
        for n in range(pictures):
            yield f"{n:040x}", {"latent": torch.randn(4, 128, 128)}
            person = {"features": torch.randn(257, 1280).bfloat16(), "embedding": torch.randn(512)}
            yield f"{10000 + n:040x}", person
        for n in range(texts):
            yield f"{20000 + n:040x}", {"context": torch.randn(77, 2048).bfloat16(), "pooled": torch.randn(1280)}

    write_features(folder, "features-000000-bench.tar", items())
    read = _Batches(PreparedFeatures(folder), pictures, texts)
    jobs = range(FULL_STEPS)
    begun = time.perf_counter()
    size = sum(t.nbytes for t in read(0))
    alone = time.perf_counter() - begun
    ahead = Ahead(read, jobs, 2)
    next(ahead)
    ahead.waited, begun = 0.0, time.perf_counter()
    for _ in range(FULL_STEPS - 1):
        time.sleep(FULL_STEP)
        next(ahead)
    share = ahead.waited / (time.perf_counter() - begun)
    ahead.close()
    return {"megabytes": size / 1e6, "seconds": alone, "waiting": share}


class _Batches:
    """Reads a batch as `PairLoader` does."""

    def __init__(self, kept: Any, pictures: int, texts: int):
        self.kept, self.pictures, self.texts = kept, pictures, texts

    def __call__(self, step: int) -> Any:
        import torch

        rows = [(step * FULL_SIZE + n) % self.pictures for n in range(FULL_SIZE)]
        latents = [self.kept.get(f"{n:040x}")["latent"] for n in (*rows, *reversed(rows))]
        features = [self.kept.get(f"{10000 + n:040x}")["features"] for n in rows]
        texts = [self.kept.get(f"{20000 + n % self.texts:040x}")["context"] for n in (*rows, *reversed(rows))]
        return torch.stack(latents), torch.stack(features), torch.stack(texts)


def opening(folder: Path) -> dict[str, float]:
    """Seconds and MB to open the indexes of as many pictures as the paper has. Their tars are stubs."""
    from ..trainer.data.shards import PEOPLE as KIND
    from ..trainer.data.shards import Shards, shard_name
    from ..trainer.data.store import Store
    from ..trainer.data.tars import index_name, make_index

    folder.mkdir(parents=True)
    people = PER_SHARD // PER_PERSON
    for number in range(ENTRIES // PER_SHARD):
        name = shard_name(number)
        (folder / name).write_bytes(f"{number}".encode())
        keys = [f"{number * people + n:08d}" for n in range(people)]
        samples = {"key": keys, "offset": [100_000 * n for n in range(people)], "size": [6000] * people}
        pictures = {
            "sample": [n // PER_PERSON for n in range(PER_SHARD)],
            "file": [f"{n % PER_PERSON:02}.jpg" for n in range(PER_SHARD)],
            "offset": [70_000 * n for n in range(PER_SHARD)],
            "size": [70_000] * PER_SHARD,
            "reference": [int(n % PER_PERSON == 0) for n in range(PER_SHARD)],
        }
        index = make_index(folder / name, name, KIND, "bench", {"samples": samples, "pictures": pictures})
        (folder / index_name(name)).write_text(json.dumps(index))
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    shards = Shards(Store(folder))
    seconds = time.process_time() - begun
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {"pictures": len(shards), "people": len(shards.keys), "seconds": seconds, "megabytes": grown / 1e6}


def table(report: dict[str, Any]) -> str:
    """The figures as lines of Markdown."""
    opened, full, prepare = report["opening"], report["full_size"], report["prepare"]
    rows = [f"| {name} | {1000 * w['seconds']:.0f} ms | {w['waiting']:.1%} |" for name, w in report["waiting"].items()]
    one, many = prepare.values()
    drawn = ", ".join(
        f"{name} {speed['clock']:.2f} a second ({speed['processor']:.2f} a second of processor time)"
        for name, speed in report["generate"].items()
    )
    return "\n".join(
        [
            f"A training step of the mini world on shards of drawn people, batch {BATCH}, on a CPU:",
            "",
            "| | step | of which it waits for its batch |",
            "|---|---|---|",
            *rows,
            "",
            f"`lookahead prepare`: {many:.1f} pictures a second of processor time eight at a time, {one:.1f} one at a "
            f"time ({many / one:.2f} times).",
            f"`lookahead generate` on the mini world, with checks: pictures {drawn}.",
            f"A batch of {FULL_SIZE} samples of SDXL at 1024 pixels, {full['megabytes']:.1f} MB: "
            f"{1000 * full['seconds']:.0f} ms to read; of a step of {FULL_STEP} s, with two workers, "
            f"{full['waiting']:.1%} are spent waiting (goal: below 2 %).",
            f"The indexes of {opened['pictures']:,} pictures of {opened['people']:,} people: {opened['seconds']:.2f} s "
            f"of processor time and {opened['megabytes']:.0f} MB (goal: 10 s and 200 MB).",
        ]
    )


if __name__ == "__main__":
    print("BENCH " + json.dumps(measure()))

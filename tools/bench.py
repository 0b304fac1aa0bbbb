"""`make bench`: what the parts cost, as ratios measured side by side in one run of a real ComfyUI; and training."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from ..host.fetch import environment_python, fetch
from ..mini.files.host_models import MINI_EXTENSIONS, link_models
from . import bench_data, bench_training
from .common import CACHE, ROOT, Problem, run_main, say


def sdxl_kept_bytes(side: int = 1024, itemsize: int = 2) -> int:
    """Bytes of what is kept of a pass (one role) for SDXL at a size, without scales, counted from its blocks."""
    from ..lookahead.files.block_names import block_names, level_of

    width = {1: 640, 2: 1280}
    levels = (level_of(block.host) for block in block_names())
    return sum((side // 8 // 2**level) ** 2 * width[level] for level in levels) * itemsize


def measure(side: int = 0, part: str = "") -> dict[str, Any]:
    """Run the benchmark in a process of its own, inside the host's tree; with a side, for SDXL at full size; part: "kv"
    or "guidance" for these arms alone."""
    host = fetch()
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=CACHE) as folder:
        base = Path(folder)
        for name in ("models", "input", "output", "user", "temp", "custom_nodes"):
            (base / name).mkdir()
        link_models(base)
        script = ROOT / "tools" / "bench_in_host.py"
        command = [str(script), str(host), folder, str(ROOT), *map(str, MINI_EXTENSIONS)]
        without_us = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return _answer([*command, str(side), part], host, without_us)


def measure_training(full: bool = False) -> dict[str, Any]:
    """The figures of `bench_training`, measured in a process of its own."""
    return _answer(["-m", "lcm_lookahead.tools.bench_training", *(["full"] if full else [])], ROOT, dict(os.environ))


def measure_data() -> dict[str, Any]:
    """The figures of `bench_data`, measured in a process of its own."""
    return _answer(["-m", "lcm_lookahead.tools.bench_data"], ROOT, dict(os.environ))


def _answer(command: list[str], folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    environment.setdefault("OMP_NUM_THREADS", "1")
    command = [str(environment_python()), *command]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("BENCH ")]
    if done.returncode or not lines:
        raise Problem(f"the benchmark did not end well; its last words: {(done.stderr or done.stdout)[-1500:]}")
    return json.loads(lines[-1].removeprefix("BENCH "))


def table(report: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    parts = [kv_table(report)] if "seconds" in report else []
    parts += [guidance_table(report)] if "guidance" in report else []
    parts += [[f"UNets in the process: {report['unets']}; peak memory {report['peak_memory'] / 1e9:.1f} GB."]]
    return "\n\n".join("\n".join(lines) for lines in parts)


def kv_table(report: dict[str, Any]) -> list[str]:
    """The figures of KV injection and of the guider as lines of Markdown."""
    plain = report["seconds"]["plain CFG"]
    rows = [
        f"| {name} | {1000 * seconds:.1f} ms | {seconds / plain:.2f} | {report['flop_ratios'][name]:.2f} |"
        for name, seconds in report["seconds"].items()
    ]
    return [
        f"One model call on {report['device']}, {report['model']} (medians; all arms in turn, in one run):",
        "",
        "| | time | over plain CFG | FLOP ratio of SDXL at 1024x1024 |",
        "|---|---|---|---|",
        *rows,
        "",
        *(
            f"What is kept of a pass (one role), precision {name}: {size / 1e6:.3f} MB, "
            f"{report['kv_bytes_from_shapes'][name] / 1e6:.3f} MB counted from shapes;"
            for name, size in report["kv_bytes"].items()
        ),
        f"SDXL at 1024x1024 in 16 bit, counted the same way: {sdxl_kept_bytes() / 1e9:.2f} GB.",
    ]


def guidance_table(report: dict[str, Any]) -> list[str]:
    """The figures of lookahead guidance as lines of Markdown."""
    seconds, sizes = report["guidance"], report["guidance_bytes"]
    one = seconds["evaluation"]
    return [
        f"Lookahead guidance on {report['device']}, {report['model']}, one picture (goal: an iteration takes at most "
        "3.3 evaluations of the UNet, 1.6 without backward):",
        "",
        "| | time | over one evaluation |",
        "|---|---|---|",
        *(f"| {name} | {1000 * value:.1f} ms | {value / one:.2f} |" for name, value in seconds.items()),
        "",
        "What autograd keeps of SDXL at 1024x1024 in 16 bit, counted from shapes (goal: at most 12 GB):",
        "",
        "| | GB |",
        "|---|---|",
        *(f"| {name} | {value / 1e9:.2f} |" for name, value in sizes.items()),
    ]


def main(arguments: list[str]) -> int:
    """Entry point of `make bench`."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--full-size",
        type=int,
        nargs="?",
        const=256,
        default=0,
        metavar="SIDE",
        help="SDXL with random weights in bfloat16 at SIDE x SIDE pixels (256; takes 14 GB and some minutes on a CPU)",
    )
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument("--kv", action="store_true", help="KV injection alone")
    alone.add_argument("--guidance", action="store_true", help="lookahead guidance alone")
    alone.add_argument("--training", action="store_true", help="the training step alone")
    alone.add_argument("--data", action="store_true", help="reading and preparing data alone")
    parser.add_argument(
        "--full-size-training",
        action="store_true",
        help="a training step of SDXL with random weights in bfloat16, 256x256 (takes 14 GB and some minutes on a CPU)",
    )
    chosen = parser.parse_args(arguments)
    if chosen.full_size_training:
        say("Training SDXL for one step (some minutes on a CPU) ...")
        print(bench_training.full_table(measure_training(full=True)))
        return 0
    if chosen.full_size % 64 or chosen.full_size < 0:
        raise Problem(f"--full-size is {chosen.full_size}: give a multiple of 64, for example 256 or 1024.")
    if chosen.data:
        say("Measuring how data is read (about a minute) ...")
        print(bench_data.table(measure_data()))
        return 0
    if not chosen.training:
        say("Measuring in a real ComfyUI (about a minute for the mini world) ...")
        part = "kv" if chosen.kv else "guidance" if chosen.guidance else ""
        print(table(measure(chosen.full_size, part)), end="\n\n")
    if chosen.kv or chosen.guidance:
        return 0
    say("Measuring the training step (about a minute) ...")
    print(bench_training.table(measure_training()))
    if not chosen.training:
        say("Measuring how data is read (about a minute) ...")
        print("\n" + bench_data.table(measure_data()))
    return 0


if __name__ == "__main__":
    run_main(main)

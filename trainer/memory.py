"""What to say when memory runs out, and before it does so in silence."""

from __future__ import annotations

from collections.abc import Mapping

from .config import RunConfig


def out_of_memory(config: RunConfig, savings: Mapping[str, float]) -> str:
    """One sentence: the knobs that are left to turn, and the GB that each saves.

    savings: by change, such as "accumulate=2". What may not change in a run that goes on (`RunConfig.free`) comes last.
    """
    knobs: dict[bool, list[str]] = {True: [], False: []}
    for knob, saved in savings.items():
        knobs[knob.partition("=")[0] in config.free].append(f"{knob} (saves {saved:.1f} GB)")
    turn = knobs[True]
    if knobs[False]:
        turn = [*turn, f"in a new run, with another `out`: {', '.join(knobs[False])}"]
    said = "; ".join(turn) or "all knobs are turned, so that it takes a card with more memory"
    return f"Memory ran out. What can be changed, with what it saves as counted for this run: {said}."


def spilled(reserved: float, there: float) -> str | None:
    """A warning where more bytes are reserved on a GPU than there are: some drivers then use the system's memory."""
    if reserved <= there:
        return None
    return (
        f"Warning: {reserved / 1e9:.1f} GB are in use on a GPU of {there / 1e9:.1f} GB, so the driver uses the "
        "system's memory, which is some 30 times slower: stop, and turn a knob that saves memory (checkpointing, "
        "accumulate); with it the same command goes on from the last checkpoint."
    )


def memory_table(title: str, parts: Mapping[str, float]) -> str:
    """The parts and their sum, a line each."""
    rows = [*parts.items(), ("in all", sum(parts.values()))]
    return "\n".join([f"{title}, GB", *(f"  {name:42}{value:9.3f}" for name, value in rows)])

"""What to say when memory runs out, and before it does so in silence."""

from __future__ import annotations

from .config import Config

# GB that a further sample of SDXL at 1024x1024 takes under bf16 autocast: encoder and decoder, counted (estimate.py).
KEPT = {"none": 15.6, "blocks": 4.4, "all": 2.7}
EIGHT_BIT, AVERAGE, WEIGHTS = 2.6, 1.7, 5.1  # GB: AdamW's state, the trained part once more, the UNet in 16 bit


def out_of_memory(config: Config, processes: int) -> str:
    """One sentence: the knobs that are left to turn, and what each saves."""
    rows = config.batch // processes // config.accumulate
    kept, knobs, new = KEPT[config.checkpointing], [], []
    for mode in ("blocks", "all"):
        if KEPT[mode] < kept:
            knobs.append(f"checkpointing={mode} (saves {rows * (kept - KEPT[mode]):.1f} GB, costs time)")
    if rows > 1:
        knobs.append(
            f"accumulate={2 * config.accumulate} (saves {rows / 2 * kept:.1f} GB; the result stays the same)"
            if rows % 2 == 0
            else f"accumulate={rows * config.accumulate} (saves {(rows - 1) * kept:.1f} GB; the result stays the same)"
        )
    if config.precision == "fp32":
        new.append(f"precision=bf16 (saves {WEIGHTS:.1f} GB of weights, and half of {rows * kept * 2:.1f} GB)")
    if not config.optimiser.eight_bit:
        new.append(f"optimiser.eight_bit=true (saves {EIGHT_BIT:.1f} GB)")
    if config.ema:
        new.append(f"ema=0 (saves {AVERAGE:.1f} GB)")
    if new:
        knobs.append(f"in a new run, with another `out`: {', '.join(new)}")
    turn = "; ".join(knobs) or "all knobs are turned, so that it takes a card with more memory"
    return f"Memory ran out. What can be changed, with what it saves for SDXL at 1024x1024: {turn}."


def spilled(reserved: float, there: float) -> str | None:
    """A warning where more bytes are reserved on a GPU than there are: some drivers then use the system's memory."""
    if reserved <= there:
        return None
    return (
        f"Warning: {reserved / 1e9:.1f} GB are in use on a GPU of {there / 1e9:.1f} GB, so the driver uses the "
        "system's memory, which is some 30 times slower: stop, and turn a knob that saves memory (checkpointing, "
        "accumulate); with it the same command goes on from the last checkpoint."
    )

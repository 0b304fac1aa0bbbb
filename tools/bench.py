"""`make bench`: the performance tables. There are none yet; they come with the parts whose speed they measure."""

from __future__ import annotations

from .common import run_main, say


def main(arguments: list[str]) -> int:
    """Entry point of `make bench`."""
    say("There are no benchmarks in this version yet.")
    return 0


if __name__ == "__main__":
    run_main(main)

"""`make test`, `make matrix` and `make browser`: the suite in the processes it needs, and one line that sums them up.

    make test                       ruff, all tests but the host's, then the host's on 0.30.0 and 0.16.3
    make matrix                     the host's on all supported versions, and a table
    make browser                    workflows and help in ComfyUI's web page; with Chromium, a part of `make test`
    make test ARGS="-- -k lora"     what follows -- goes to pytest

Host tests run in processes of their own, one for each host: they have the host in the process and load the pack as
the host does.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from ..host import fetch, page
from .common import CACHE, ROOT, Problem, Stopwatch, run_main, say

NO_HOST = ("tests/house", "tests/tools", "tests/unit", "tests/trainer")
TESTED = (fetch.DEFAULT_VERSION, list(fetch.VERSIONS)[-1])  # the newest and the oldest
KINDS = ("failures", "errors", "skipped")


@dataclass(frozen=True)
class Outcome:
    """What one process of tests said."""

    name: str
    status: int
    passed: int = 0
    failed: int = 0
    errors: int = 0
    skipped: int = 0
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Whether all went well; a process that ran no test at all did not."""
        return self.status == 0 and self.passed > 0 and self.failed == self.errors == 0


def counts(report: Path) -> dict[str, int]:
    """Passed, failed, errors and skipped in a JUnit report; nothing when there is none."""
    if not report.is_file():
        return {}
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    failed, errors, skipped = (sum(int(suite.get(kind, 0)) for suite in suites) for kind in KINDS)
    total = sum(int(suite.get("tests", 0)) for suite in suites)
    return {"passed": total - failed - errors - skipped, "failed": failed, "errors": errors, "skipped": skipped}


def pytest(
    name: str, paths: Iterable[str], extra: Sequence[str] = (), output: Path | None = None, **environment: str
) -> Outcome:
    """One process of pytest over the paths that exist. output: the file that gets what it prints."""
    found = [path for path in paths if (ROOT / path).exists()]
    report = CACHE / f"report-{name}.xml"
    CACHE.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    say(f"\n== {name}" if output is None else f"\n== {name}: runs beside the host tests, and is shown after them")
    watch = Stopwatch()
    # The program, not `python -m pytest`: that would put this folder, with its `nodes`, in front of the host's.
    command = [Path(sys.executable).with_name("pytest"), *found, "-q", f"--junitxml={report}", *extra]
    env = {"OMP_NUM_THREADS": "1", **os.environ, **environment}
    with nullcontext() if output is None else output.open("w") as to:
        status = subprocess.run(command, cwd=ROOT, env=env, stdout=to, stderr=to).returncode
    return Outcome(name, status, **counts(report), seconds=watch.seconds)


def ruff() -> Outcome:
    """The lint; it counts as no test."""
    say("== ruff")
    watch = Stopwatch()
    status = subprocess.run([Path(sys.executable).with_name("ruff"), "check", "-q", "."], cwd=ROOT).returncode
    return Outcome("ruff", status, passed=1 - bool(status), failed=int(bool(status)), seconds=watch.seconds)


def on_hosts(versions: Iterable[str], extra: Sequence[str]) -> list[Outcome]:
    """The host tests on each of these versions, or on the user's own checkout alone."""
    own = os.environ.get("COMFYUI_DIR")
    if own:
        fetch.own_checkout(own)
        return [pytest(f"host {own}".replace("/", "_"), ["tests/host"], extra)]
    outcomes = []
    for version in versions:
        fetch.fetch(version)
        outcomes.append(pytest(f"host-{version}", ["tests/host"], extra, HOST_VERSION=version))
    return outcomes


def no_host_and_hosts(versions: Iterable[str], extra: Sequence[str]) -> list[Outcome]:
    """All tests but the page's. Each process keeps one core busy, so with two the host tests run beside the others."""
    if not os.environ.get("COMFYUI_DIR"):
        for version in versions:
            fetch.fetch(version)  # before all tests: the trainer's read CLIP's vocabulary there
    if (os.cpu_count() or 1) < 2:
        return [pytest("no-host", NO_HOST, extra), *on_hosts(versions, extra)]
    CACHE.mkdir(exist_ok=True)
    output = CACHE / "output-no-host.txt"
    with ThreadPoolExecutor(1) as pool:
        no_host = pool.submit(pytest, "no-host", NO_HOST, extra, output)
        hosts = on_hosts(versions, extra)
        outcome = no_host.result()
    say("\n== no-host")
    print(output.read_text() if output.exists() else "", flush=True)
    return [outcome, *hosts]


def in_the_page(extra: Sequence[str]) -> Outcome:
    """The tests in ComfyUI's own web page, which is that of the default host."""
    page.front_end()
    return pytest("browser", ["tests/browser"], extra)


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes, one a line."""
    lines = [f"{'':24}{'passed':>8}{'failed':>8}{'errors':>8}{'skipped':>8}{'seconds':>9}"]
    for one in outcomes:
        figures = f"{one.passed:8}{one.failed:8}{one.errors:8}{one.skipped:8}{one.seconds:9.1f}"
        lines.append(f"{one.name:24}{figures}{'' if one.good else '   <- not good'}")
    return "\n".join(lines)


def closing_line(outcomes: Sequence[Outcome], seconds: float) -> str:
    """One line in the manner of pytest's own that sums up all processes."""
    sums = {kind: sum(getattr(one, kind) for one in outcomes) for kind in ("failed", "passed", "skipped", "errors")}
    parts = [f"{number} {kind}" for kind, number in sums.items() if number or kind in ("passed", "failed")]
    return f"{', '.join(parts)} in {seconds:.1f}s"


def main(arguments: list[str]) -> int:
    """Entry point of `make test`, `make matrix` and `make browser`."""
    parser = argparse.ArgumentParser(prog="make test", description="Runs the tests.")
    parser.add_argument("--matrix", action="store_true", help="host tests alone, on all supported versions")
    parser.add_argument("--browser", action="store_true", help="the tests in the web page alone")
    parser.add_argument("extra", nargs="*", help="arguments for pytest, after --")
    chosen = parser.parse_args(arguments)
    watch = Stopwatch()
    version = os.environ.get("HOST_VERSION")
    if version:
        fetch.check_version(version)
    if chosen.browser:
        page.check_browser()
        outcomes = [in_the_page(chosen.extra)]
    elif chosen.matrix:
        outcomes = on_hosts(fetch.VERSIONS, chosen.extra)
    else:
        outcomes = [ruff(), *no_host_and_hosts([version] if version else TESTED, chosen.extra)]
        if page.browser() is None:
            say("\n== browser: not run, there is no Chromium on the PATH")
        elif not version and not os.environ.get("COMFYUI_DIR"):
            outcomes.append(in_the_page(chosen.extra))
    print(f"\n{table(outcomes)}\n")
    tests = [one for one in outcomes if one.name != "ruff"]
    if not any(one.passed + one.failed + one.errors for one in tests):
        raise Problem("no test ran: is tests/ there, and does a pattern after -- match any test?")
    print(closing_line(tests, watch.seconds), flush=True)
    return 0 if all(one.good for one in outcomes) else 1


if __name__ == "__main__":
    run_main(main)

"""`make test`, `make portable`, `make matrix`, `make browser` and `make lint`: the suite in the processes it needs,
and one line that sums them up.

    make test                       lint, types; all tests but the slow; on the oldest ComfyUI those marked `contract`
    make portable                   the suite as on other processors, with one and two threads; slow tests on its own
    make matrix                     the whole host suite on every supported version
    make browser                    workflows and help in ComfyUI's web page; with Chromium, a part of `make test`
    make lint                       lint and types alone
    make test ARGS="-- -k lora"     what follows -- goes to pytest

Host tests run in processes of their own, one for each host: they have the host in the process and load the pack as
the host does. As many processes run at a time as there are cores for their threads.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from ..host import fetch, page
from .common import CACHE, ROOT, Problem, Stopwatch, run_main, say

HOST = ("tests/host",)
NO_HOST = {  # by the name of the job that runs them: small jobs at the end keep both cores busy to the end
    "trainer": ("tests/trainer",),
    "tools": ("tests/tools",),
    "library": ("tests/unit", "tests/house"),
}
PACKAGE = "lcm_lookahead"
QUICK, CONTRACT, EVERYTHING = "not slow", "contract and not slow", ""  # expressions for pytest's -m
NEWEST, OLDEST = fetch.DEFAULT_VERSION, list(fetch.VERSIONS)[-1]
KINDS = ("failures", "errors", "skipped")
SLOWEST = 20  # tests shown with their durations
PROGRESS_SECONDS = 60.0  # between lines of progress

# Results must not hang on how a processor rounds: these take away its widest instructions, as an older one would.
# ATen's own kernels, oneDNN's convolutions and MKL's matrix products each have a switch of their own; under avx2
# MKL's is left as it is.
_OLDER = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
_OLDEST = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
_TWO_THREADS = {"OMP_NUM_THREADS": "2"}
PROCESSORS: dict[str, dict[str, str]] = {
    "own": {},
    "own, 2 threads": _TWO_THREADS,
    "avx2": _OLDER,
    "avx2, 2 threads": _OLDER | _TWO_THREADS,
    "default": _OLDEST,
    "default, 2 threads": _OLDEST | _TWO_THREADS,
}


@dataclass(frozen=True)
class Job:
    """One process, of pytest unless a subclass says otherwise.

    marks: expression for pytest's -m, "" for all tests; environment: variables on top of this process's own.
    """

    name: str
    paths: tuple[str, ...]
    marks: str = QUICK
    environment: dict[str, str] = field(default_factory=dict)

    def folder(self) -> Path:
        """Returns where it runs, which is made where it is not there."""
        return ROOT

    def command(self, extra: Sequence[str] = ()) -> list[str]:
        """Makes what is run. extra: arguments for pytest."""
        paths = [path for path in self.paths if (ROOT / path).exists()]
        # The program, not `python -m pytest`: that would put this folder, with its `nodes`, in front of the host's.
        command = [_program("pytest"), *paths, "-q", f"--junitxml={self.report}"]
        return [*command, *(["-m", self.marks] if self.marks else []), *extra]

    def result(self, status: int, seconds: float) -> JobResult:
        """Says how it ended, by its report."""
        return JobResult(self.name, status, **counts(self.report), seconds=seconds, slowest=slowest(self.report))

    @property
    def file_name(self) -> str:
        """The name with what file names can hold."""
        return re.sub(r"[^\w.-]+", "-", self.name)

    @property
    def report(self) -> Path:
        """Its JUnit report is written here."""
        return CACHE / f"report-{self.file_name}.xml"

    @property
    def output(self) -> Path:
        """All that it prints is written here when another job runs at the same time."""
        return CACHE / f"output-{self.file_name}.txt"

    @property
    def threads(self) -> int:
        """Its tests compute with so many threads."""
        return int(self.environment.get("OMP_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or 1)


@dataclass(frozen=True)
class JobResult:
    """It says how a job ended. status: the process's exit status; slowest: (seconds, test) of its slowest tests."""

    name: str
    status: int
    passed: int = 0
    failed: int = 0
    errors: int = 0
    skipped: int = 0
    seconds: float = 0.0
    slowest: tuple[tuple[float, str], ...] = ()

    @property
    def good(self) -> bool:
        """Says whether all went well; a process that ran no test at all did not."""
        return self.status == 0 and self.passed > 0 and self.failed == self.errors == 0


@dataclass(frozen=True)
class Check(Job):
    """A look at the code itself, which counts as no test: it is good or not as a whole.

    This one is the linter.
    """

    paths: tuple[str, ...] = ()

    def command(self, extra: Sequence[str] = ()) -> list[str]:
        return [_program("ruff"), "check", "-q", "."]

    def result(self, status: int, seconds: float) -> JobResult:
        return JobResult(self.name, status, passed=int(status == 0), failed=int(status != 0), seconds=seconds)


@dataclass(frozen=True)
class TypeCheck(Check):
    """mypy over the rooms, or modules, of `paths`.

    The package is the repository's own folder, whatever the clone is called, and its editable install is a hook of the
    import system, which mypy cannot follow. So it runs in a folder where the package lies under its name.
    """

    def command(self, extra: Sequence[str] = ()) -> list[str]:
        packages = [argument for room in self.paths for argument in ("-p", f"{PACKAGE}.{room}")]
        options = [f"--config-file={ROOT / 'pyproject.toml'}", f"--cache-dir={CACHE / 'mypy'}"]
        return [_program("mypy"), *options, *packages]

    def folder(self) -> Path:
        folder = CACHE / "types"
        folder.mkdir(parents=True, exist_ok=True)
        package = folder / PACKAGE
        if not package.is_symlink() or package.resolve() != ROOT:
            package.unlink(missing_ok=True)
            package.symlink_to(ROOT, target_is_directory=True)
        return folder


TYPED = (
    "lookahead",
    "sdxl",
    "trainer",
    "evaluation",
    "cli",
    "mini.report",
    "mini.studies",
    "mini.judges",
    "mini.drawn_people",
    "mini.generator",
)
LINT, TYPES = Check("ruff"), TypeCheck("types", TYPED)


def _program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def counts(report: Path) -> dict[str, int]:
    """Passed, failed, errors and skipped in a JUnit report; nothing when there is none."""
    if not report.is_file():
        return {}
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    failed, errors, skipped = (sum(int(suite.get(kind, 0)) for suite in suites) for kind in KINDS)
    total = sum(int(suite.get("tests", 0)) for suite in suites)
    return {"passed": total - failed - errors - skipped, "failed": failed, "errors": errors, "skipped": skipped}


def slowest(report: Path, number: int = SLOWEST) -> tuple[tuple[float, str], ...]:
    """The slowest tests of a JUnit report as (seconds, file::test), the slowest first; fixtures are in their first."""
    if not report.is_file():
        return ()
    cases = ElementTree.parse(report).getroot().iter("testcase")
    timed = [(float(case.get("time", 0)), f"{case.get('classname')}::{case.get('name')}") for case in cases]
    return tuple(sorted(timed, reverse=True)[:number])


def run(job: Job, extra: Sequence[str] = (), live: bool = True) -> JobResult:
    """Run a job. live: whether it prints here, or into the job's output file."""
    CACHE.mkdir(exist_ok=True)
    job.report.unlink(missing_ok=True)
    watch, command, folder = Stopwatch(), job.command(extra), job.folder()
    env = {"OMP_NUM_THREADS": "1", **os.environ, **job.environment}
    if live:
        say(f"\n== {job.name}")
        status = subprocess.run(command, cwd=folder, env=env).returncode
    else:
        with job.output.open("w") as output:
            status = subprocess.run(command, cwd=folder, env=env, stdout=output, stderr=output).returncode
    return job.result(status, watch.seconds)


def run_all(jobs: Sequence[Job], extra: Sequence[str] = ()) -> list[JobResult]:
    """Run jobs, in their order, as many at a time as the cores have room for; what each printed is shown at its end."""
    at_a_time = max(1, (os.cpu_count() or 1) // max(job.threads for job in jobs))
    if at_a_time == 1 or len(jobs) == 1:
        return [run(job, extra) for job in jobs]
    say(f"\n== {', '.join(job.name for job in jobs)}: {at_a_time} at a time, each is shown when it has ended")
    watch, printed = Stopwatch(), 0.0
    with ThreadPoolExecutor(at_a_time) as pool:
        running: dict[Future[JobResult], Job] = {pool.submit(run, job, extra, False): job for job in jobs}
        results = list(running)
        while running:
            for ended in wait(running, timeout=1.0, return_when="FIRST_COMPLETED").done:
                job = running.pop(ended)
                say(f"\n== {job.name}")
                print(job.output.read_text(errors="replace") if job.output.is_file() else "", flush=True)
                job.output.unlink(missing_ok=True)
            if watch.seconds - printed > PROGRESS_SECONDS:
                printed = watch.seconds
                say(f"   {printed:.0f} s: {', '.join(filter(None, map(progress, running.values())))}")
    return [future.result() for future in results]


def progress(job: Job) -> str:
    """Says in words how far a job is that prints into its file; nothing before its first line."""
    percent = re.findall(r"\[ *(\d+)%\]", job.output.read_text(errors="replace") if job.output.is_file() else "")
    return f"{job.name} {percent[-1]} %" if percent else ""


def on_host(version: str, marks: str = QUICK) -> Job:
    """The host tests on one version, or on the user's own checkout."""
    own = os.environ.get("COMFYUI_DIR")
    if own:
        fetch.own_checkout(own)
        return Job(f"host {own}", HOST, marks)
    fetch.fetch(version)  # before all tests: the trainer's read CLIP's vocabulary there
    return Job(f"host-{version}", HOST, marks, {"HOST_VERSION": version})


def in_the_page() -> Job:
    """The tests in ComfyUI's own web page, which is that of the default host."""
    page.front_end()
    return Job("browser", ("tests/browser",))


def ordinary_jobs(version: str | None) -> list[Job]:
    """Lists what `make test` runs, longest first. version: the only host to test on, not the newest and the oldest."""
    chosen = version or os.environ.get("COMFYUI_DIR")
    others = [Job(name, paths) for name, paths in NO_HOST.items()]
    if not chosen:
        others.insert(2, on_host(OLDEST, CONTRACT))
    if page.browser() is None:
        say("\n== browser: not run, there is no Chromium on the PATH")
    elif not chosen:
        others.insert(2, in_the_page())
    return [on_host(version or NEWEST), *others, TYPES]


def jobs_of_a_processor(name: str) -> list[Job]:
    """Lists what `make portable` runs on one of PROCESSORS: all, on the newest host; on "own" the slow tests too."""
    environment, of_host = PROCESSORS[name], on_host(os.environ.get("HOST_VERSION") or NEWEST)
    marks = QUICK if environment else EVERYTHING
    return [
        Job(f"{of_host.name} ({name})", HOST, marks, of_host.environment | environment),
        *(Job(f"{job} ({name})", paths, marks, environment) for job, paths in NO_HOST.items()),
    ]


def table(results: Sequence[JobResult]) -> str:
    """The results, one a line."""
    width = max(24, *(len(one.name) + 2 for one in results))
    lines = [f"{'':{width}}{'passed':>8}{'failed':>8}{'errors':>8}{'skipped':>8}{'seconds':>9}"]
    for one in results:
        figures = f"{one.passed:8}{one.failed:8}{one.errors:8}{one.skipped:8}{one.seconds:9.1f}"
        lines.append(f"{one.name:{width}}{figures}{'' if one.good else '   <- not good'}")
    return "\n".join(lines)


def table_of_slowest(results: Sequence[JobResult], number: int = SLOWEST) -> str:
    """The slowest tests of all jobs, one a line."""
    timed = sorted(((seconds, one.name, test) for one in results for seconds, test in one.slowest), reverse=True)
    return "\n".join(f"{seconds:8.1f} s  {name}: {test}" for seconds, name, test in timed[:number])


def closing_line(results: Sequence[JobResult], seconds: float) -> str:
    """One line in the manner of pytest's own that sums up all processes."""
    sums = {kind: sum(getattr(one, kind) for one in results) for kind in ("failed", "passed", "skipped", "errors")}
    parts = [f"{number} {kind}" for kind, number in sums.items() if number or kind in ("passed", "failed")]
    return f"{', '.join(parts)} in {seconds:.1f}s"


def main(arguments: list[str]) -> int:
    """Entry point of `make test`, `make portable`, `make matrix`, `make browser` and `make lint`."""
    parser = argparse.ArgumentParser(prog="make test", description="Runs the tests.")
    parser.add_argument("--matrix", action="store_true", help="host tests alone, on all supported versions")
    parser.add_argument("--portable", action="store_true", help="as on other processors, with one and two threads")
    parser.add_argument("--processor", choices=PROCESSORS, action="append", help="--portable with this one alone")
    parser.add_argument("--browser", action="store_true", help="the tests in the web page alone")
    parser.add_argument("--lint", action="store_true", help="lint and types alone")
    parser.add_argument("extra", nargs="*", help="arguments for pytest, after --")
    chosen = parser.parse_args(arguments)
    watch = Stopwatch()
    version = os.environ.get("HOST_VERSION")
    if version:
        fetch.check_version(version)
    results: list[JobResult] = []
    if chosen.lint:
        results += [run(LINT), run(TYPES)]
    elif chosen.browser:
        page.check_browser()
        results += run_all([in_the_page()], chosen.extra)
    elif chosen.matrix:
        own = os.environ.get("COMFYUI_DIR")
        results += run_all([on_host(v, EVERYTHING) for v in ([own] if own else fetch.VERSIONS)], chosen.extra)
    elif chosen.portable:
        for name in chosen.processor or PROCESSORS:
            results += run_all(jobs_of_a_processor(name), chosen.extra)
    else:
        results += [run(LINT), *run_all(ordinary_jobs(version), chosen.extra)]
    print(f"\n{table(results)}\n")
    tests = [one for one in results if one.name not in (LINT.name, TYPES.name)]
    if not chosen.lint and not any(one.passed + one.failed + one.errors for one in tests):
        raise Problem("no test ran: is tests/ there, and does a pattern after -- match any test?")
    if tests:
        print(f"The slowest:\n{table_of_slowest(tests)}\n")
        print(closing_line(tests, watch.seconds), flush=True)
    return 0 if all(one.good for one in results) else 1


if __name__ == "__main__":
    run_main(main)

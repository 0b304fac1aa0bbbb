"""`make test` is green only when every process ran tests and all of them passed."""

import re
from pathlib import Path

import pytest
from lcm_lookahead.host import fetch, page
from lcm_lookahead.tools import testing
from lcm_lookahead.tools.common import Problem
from lcm_lookahead.tools.testing import CONTRACT, EVERYTHING, QUICK, Job, JobResult

TESTS = Path(__file__).resolve().parents[1]
CHECKS = (testing.LINT, testing.TYPES)
EVERY_FOLDER = {f"tests/{path.name}" for path in TESTS.iterdir() if list(path.glob("test_*.py"))} - {"tests/browser"}


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Jobs that are only written down; `runs.results` says how each ends, `runs.fetched` which hosts are there."""

    class Runs(list):
        results, fetched = {}, []

        def __call__(self, job, extra=(), live=True):
            self.append(job)
            return self.results.get(job.name, JobResult(job.name, 0, passed=2, seconds=1.0))

        def of_hosts(self):
            """Host jobs in the order of their versions: jobs that run at the same time come as they like."""
            return sorted((job for job in self if job.name.startswith("host-")), key=lambda job: job.name, reverse=True)

    recorded = Runs()
    monkeypatch.setattr(testing, "run", recorded)
    monkeypatch.setattr(testing, "CACHE", tmp_path)  # jobs of these names may run beside this test
    monkeypatch.setattr(fetch, "fetch", lambda version=None: recorded.fetched.append(version))
    monkeypatch.setattr(page, "front_end", lambda: None)
    monkeypatch.setattr(page, "browser", lambda: None)
    recorded.fetched.clear()
    for name in ("COMFYUI_DIR", "HOST_VERSION"):
        monkeypatch.delenv(name, raising=False)
    return recorded


def test_it_runs_all_on_the_newest_host_and_the_contract_on_the_oldest(runs, capsys):
    assert testing.main([]) == 0
    newest, oldest = runs.of_hosts()
    assert (newest.environment, newest.marks) == ({"HOST_VERSION": "0.30.0"}, QUICK)
    assert (oldest.environment, oldest.marks) == ({"HOST_VERSION": "0.16.3"}, CONTRACT)
    assert newest.paths == oldest.paths == ("tests/host",)
    assert {path for job in runs if job not in CHECKS for path in job.paths} == EVERY_FOLDER
    assert re.fullmatch(r"0 failed, 10 passed in \d+\.\ds", capsys.readouterr().out.splitlines()[-1])


def test_the_matrix_is_every_test_on_all_supported_hosts(runs):
    assert testing.main(["--matrix"]) == 0
    assert runs.fetched == list(fetch.VERSIONS)
    assert [job.environment["HOST_VERSION"] for job in runs.of_hosts()] == list(fetch.VERSIONS)
    assert {job.marks for job in runs} == {EVERYTHING}


def test_portable_is_the_suite_under_every_processor_and_the_slow_tests_under_the_own(runs):
    assert testing.main(["--portable"]) == 0
    for name, environment in testing.PROCESSORS.items():
        jobs = [job for job in runs if job.name.endswith(f" ({name})")]
        assert {path for job in jobs for path in job.paths} == EVERY_FOLDER
        assert all(environment.items() <= job.environment.items() for job in jobs)
        assert {job.marks for job in jobs} == {EVERYTHING if name == "own" else QUICK}
    switches = {key for environment in testing.PROCESSORS.values() for key in environment}
    assert {"ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS"} <= switches
    runs.clear()
    assert testing.main(["--portable", "--processor", "avx2", "--processor", "default"]) == 0
    assert {re.sub(r".* \((.*)\)", r"\1", job.name) for job in runs} == {"avx2", "default"}


def test_as_many_jobs_run_at_a_time_as_the_cores_have_room_for(monkeypatch, capsys):
    lives = []
    monkeypatch.setattr(testing, "run", lambda job, extra, live=True: lives.append(live) or JobResult(job.name, 0, 1))
    monkeypatch.setattr(testing.os, "cpu_count", lambda: 2)
    one, two = ([Job(name, (), environment={"OMP_NUM_THREADS": n}) for name in "ab"] for n in "12")
    assert [result.name for result in testing.run_all(one)] == ["a", "b"] and lives == [False, False]
    testing.run_all(two)
    assert lives[2:] == [True, True]


def test_a_chosen_version_is_the_only_one(runs, monkeypatch):
    monkeypatch.setenv("HOST_VERSION", "0.20.1")
    testing.main([])
    assert [(job.name, job.marks) for job in runs.of_hosts()] == [("host-0.20.1", QUICK)]


def test_the_page_is_tested_where_there_is_a_chromium_and_no_other_host_is_chosen(runs, monkeypatch):
    def browser_runs():
        runs.clear()
        testing.main([])
        return [job.paths for job in runs if job.name == "browser"]

    assert browser_runs() == []
    monkeypatch.setattr(page, "browser", lambda: "/usr/bin/chromium")
    assert browser_runs() == [("tests/browser",)]
    monkeypatch.setenv("HOST_VERSION", "0.20.1")
    assert browser_runs() == []


def test_the_page_s_version_can_be_chosen(monkeypatch):
    monkeypatch.delenv(page.CHOICE, raising=False)
    assert page.front_end_version() == page.FRONT_END[0]
    monkeypatch.setenv(page.CHOICE, "1.58.1")
    assert page.front_end_version() == "1.58.1"
    monkeypatch.setenv(page.CHOICE, "../newest")
    with pytest.raises(Problem, match=r"FRONT_END_VERSION=\.\./newest is not a version: give one like \d"):
        page.front_end_version()


def test_the_page_alone_needs_a_chromium(runs, monkeypatch):
    with pytest.raises(Problem, match="no Chromium"):
        testing.main(["--browser"])
    monkeypatch.setattr(page, "browser", lambda: "/usr/bin/chromium")
    assert testing.main(["--browser"]) == 0
    assert [job.name for job in runs] == ["browser"]


@pytest.mark.parametrize(
    ("name", "ended"),
    [
        ("host-0.16.3", {"status": 1, "passed": 5, "failed": 1}),
        ("trainer", {"status": 2, "passed": 5, "errors": 1}),
        ("host-0.30.0", {"status": 5}),
        ("host-0.30.0", {"status": -11}),
        ("host-0.30.0", {"status": 0, "skipped": 9}),
    ],
    ids=["a failure", "an error", "no test", "a crash", "all skipped"],
)
def test_one_process_that_is_not_good_makes_all_red(runs, capsys, name, ended):
    runs.results = {name: JobResult(name, **ended)}
    assert testing.main([]) == 1
    assert f"{name}" in [line.split()[0] for line in capsys.readouterr().out.splitlines() if "not good" in line]


def test_no_test_at_all_is_a_problem(runs):
    runs.results = {name: JobResult(name, 5) for name in (*testing.NO_HOST, "host-0.30.0", "host-0.16.3")}
    with pytest.raises(Problem, match="no test ran"):
        testing.main([])


def test_the_slowest_tests_of_all_jobs_are_shown(runs, capsys):
    slow = JobResult("tools", 0, passed=2, slowest=((9.0, "a::x"), (1.0, "a::y")))
    runs.results = {"tools": slow, "host-0.30.0": JobResult("host-0.30.0", 0, passed=1, slowest=((4.0, "b::z"),))}
    testing.main([])
    lines = capsys.readouterr().out.splitlines()
    first = lines.index("The slowest:") + 1
    assert [line.split() for line in lines[first : first + 3]] == [
        ["9.0", "s", "tools:", "a::x"],
        ["4.0", "s", "host-0.30.0:", "b::z"],
        ["1.0", "s", "tools:", "a::y"],
    ]


def test_durations_come_from_pytest_s_own_report(tmp_path):
    cases = "".join(f'<testcase classname="tests.a" name="n{n}" time="{n}.5"/>' for n in range(3))
    (tmp_path / "r.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert testing.slowest(tmp_path / "r.xml", 2) == ((2.5, "tests.a::n2"), (1.5, "tests.a::n1"))
    assert testing.slowest(tmp_path / "none.xml") == ()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_lint_and_types_are_no_tests_but_make_all_red(runs, capsys, check):
    assert testing.main([]) == 0 and check in runs
    runs.results = {check.name: JobResult(check.name, 1, failed=1)}
    assert testing.main([]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 failed, 10 passed")
    runs.clear()
    assert testing.main(["--lint"]) == 1
    assert tuple(runs) == CHECKS


def test_the_type_check_reads_this_folder_as_the_package_that_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(testing, "ROOT", tmp_path)
    monkeypatch.setattr(testing, "CACHE", tmp_path / ".cache")
    (tmp_path / "pyproject.toml").write_text("[tool.mypy]\nstrict = true\n")
    for room in ("", "cli", "lookahead", "mini"):
        (tmp_path / room).mkdir(exist_ok=True)
        (tmp_path / room / "__init__.py").touch()
    (tmp_path / "lookahead/width.py").write_text("WIDTH: int = 3\n")
    (tmp_path / "cli/main.py").write_text("from ..lookahead.width import WIDTH\n\nname: int = WIDTH\n")
    (tmp_path / "mini/main.py").write_text("def unchecked(): return 1\n")
    check = testing.TypeCheck("types", ("lookahead", "cli"))
    result = testing.run(check, live=False)
    assert result.good and "no issues found in 4 source files" in check.output.read_text()
    # Of another length: mypy knows a file again by its length and the second in which it was written.
    (tmp_path / "cli/main.py").write_text("from ..lookahead.width import WIDTH\n\nwrong: str = WIDTH\n")
    result = testing.run(check, live=False)
    assert not result.good and result.failed == 1
    assert "cli/main.py:3: error: Incompatible types" in check.output.read_text()


def test_a_job_runs_its_tests_in_a_pytest_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "test_it.py").write_text(
        "import os, pytest\n"
        "@pytest.mark.slow\ndef test_slow(): assert False\n"
        "def test_quick(): assert os.environ['COLOUR'] == 'red'\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    monkeypatch.setattr(testing, "ROOT", tmp_path)
    monkeypatch.setattr(testing, "CACHE", tmp_path / "cache")
    result = testing.run(Job("one (of two)", ("test_it.py", "gone"), environment={"COLOUR": "red"}), live=False)
    assert (result.status, result.passed, result.failed, result.good) == (0, 1, 0, True)
    assert [test for _, test in result.slowest] == ["test_it::test_quick"]
    assert (tmp_path / "cache/report-one-of-two-.xml").is_file()


def test_counts_come_from_pytest_s_own_report(tmp_path):
    (tmp_path / "r.xml").write_text(
        '<testsuites><testsuite errors="1" failures="2" skipped="3" tests="10"></testsuite></testsuites>'
    )
    assert testing.counts(tmp_path / "r.xml") == {"passed": 4, "failed": 2, "errors": 1, "skipped": 3}
    assert testing.counts(tmp_path / "none.xml") == {}

"""`make test` is green only when every process ran tests and all of them passed."""

import re

import pytest
from lcm_lookahead.host import fetch, page
from lcm_lookahead.tools import testing
from lcm_lookahead.tools.common import Problem
from lcm_lookahead.tools.testing import Outcome


@pytest.fixture
def runs(monkeypatch):
    """Processes that are only written down; `runs.outcomes` says how each ends."""

    class Runs(list):
        outcomes = {}

        def __call__(self, name, paths, extra=(), output=None, **environment):
            self.append((name, tuple(paths), environment))
            return self.outcomes.get(name, Outcome(name, 0, passed=2, seconds=1.0))

    recorded = Runs()
    monkeypatch.setattr(testing, "pytest", recorded)
    monkeypatch.setattr(testing, "ruff", lambda: Outcome("ruff", 0, passed=1))
    monkeypatch.setattr(fetch, "fetch", lambda version=None: recorded.append(("fetch", version)))
    monkeypatch.setattr(page, "front_end", lambda: None)
    monkeypatch.setattr(page, "browser", lambda: None)
    for name in ("COMFYUI_DIR", "HOST_VERSION"):
        monkeypatch.delenv(name, raising=False)
    return recorded


def test_it_runs_the_newest_and_the_oldest_host_in_processes_of_their_own(runs, capsys):
    assert testing.main([]) == 0
    hosts = [run for run in runs if run[0].startswith("host-")]
    assert [run[2] for run in hosts] == [{"HOST_VERSION": "0.30.0"}, {"HOST_VERSION": "0.16.3"}]
    assert all(run[1] == ("tests/host",) for run in hosts)
    assert re.fullmatch(r"0 failed, 6 passed in \d+\.\ds", capsys.readouterr().out.splitlines()[-1])


def test_the_matrix_is_all_supported_hosts(runs):
    assert testing.main(["--matrix"]) == 0
    assert [run[1] for run in runs if run[0] == "fetch"] == list(fetch.VERSIONS)


def test_a_chosen_version_is_the_only_one(runs, monkeypatch):
    monkeypatch.setenv("HOST_VERSION", "0.20.1")
    testing.main([])
    assert [run[0] for run in runs if run[0].startswith("host-")] == ["host-0.20.1"]


def test_the_page_is_tested_where_there_is_a_chromium_and_no_other_host_is_chosen(runs, monkeypatch):
    def browser_runs():
        runs.clear()
        testing.main([])
        return [run[1] for run in runs if run[0] == "browser"]

    assert browser_runs() == []
    monkeypatch.setattr(page, "browser", lambda: "/usr/bin/chromium")
    assert browser_runs() == [("tests/browser",)]
    monkeypatch.setenv("HOST_VERSION", "0.20.1")
    assert browser_runs() == []


def test_the_page_alone_needs_a_chromium(runs, monkeypatch):
    with pytest.raises(Problem, match="no Chromium"):
        testing.main(["--browser"])
    monkeypatch.setattr(page, "browser", lambda: "/usr/bin/chromium")
    assert testing.main(["--browser"]) == 0
    assert [run[0] for run in runs] == ["browser"]


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("host-0.16.3", {"status": 1, "passed": 5, "failed": 1}),
        ("no-host", {"status": 2, "passed": 5, "errors": 1}),
        ("host-0.30.0", {"status": 5}),
        ("host-0.30.0", {"status": -11}),
        ("host-0.30.0", {"status": 0, "skipped": 9}),
    ],
    ids=["a failure", "an error", "no test", "a crash", "all skipped"],
)
def test_one_process_that_is_not_good_makes_all_red(runs, capsys, name, outcome):
    runs.outcomes = {name: Outcome(name, **outcome)}
    assert testing.main([]) == 1
    assert f"{name}" in [line.split()[0] for line in capsys.readouterr().out.splitlines() if "not good" in line]


def test_no_test_at_all_is_a_problem(runs):
    runs.outcomes = {name: Outcome(name, 5) for name in ("no-host", "host-0.30.0", "host-0.16.3")}
    with pytest.raises(Problem, match="no test ran"):
        testing.main([])


def test_counts_come_from_pytest_s_own_report(tmp_path):
    (tmp_path / "r.xml").write_text(
        '<testsuites><testsuite errors="1" failures="2" skipped="3" tests="10"></testsuite></testsuites>'
    )
    assert testing.counts(tmp_path / "r.xml") == {"passed": 4, "failed": 2, "errors": 1, "skipped": 3}
    assert testing.counts(tmp_path / "none.xml") == {}

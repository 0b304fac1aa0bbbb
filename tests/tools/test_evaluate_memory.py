"""The memory that `lookahead evaluate` tells of a picture: the peak of a process from a moment on."""

import os
import subprocess
import sys

import pytest
from lcm_lookahead.evaluation.harness.memory import PeakMemory

SIZE = 200_000_000
HOLD_AND_LET_GO = f"""
import sys
print("ready", flush=True), sys.stdin.readline()
data = bytearray(b"x") * {SIZE}
del data
print("let go", flush=True), sys.stdin.readline()
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak is counted by Linux")


def test_the_peak_is_of_what_was_taken_since_it_began_also_where_that_was_let_go():
    before = PeakMemory(os.getpid())
    plain = before.bytes
    data = bytearray(b"x") * SIZE
    del data
    assert before.bytes - plain > 0.9 * SIZE
    assert PeakMemory(os.getpid()).bytes - plain < 0.5 * SIZE  # the last one's peak is forgotten


def test_the_peak_of_another_process_is_known_while_it_runs():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD_AND_LET_GO], **pipes) as other:
        assert other.stdout.readline() == b"ready\n"
        peak = PeakMemory(other.pid)
        plain = peak.bytes
        other.stdin.write(b"\n")
        other.stdin.flush()
        assert other.stdout.readline() == b"let go\n"
        assert peak.bytes - plain > 0.9 * SIZE
        other.stdin.close()
    assert other.returncode == 0


@pytest.mark.parametrize("pid", [None, 2**22 + 1])
def test_of_a_process_that_is_not_known_nothing_is_told(pid):
    assert PeakMemory(pid).bytes is None

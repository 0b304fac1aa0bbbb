import re
import time

from lcm_lookahead.trainer.progress import progress


def test_elsewhere_than_in_a_terminal_progress_is_plain_lines(capfd):
    for _ in progress(range(3), "Pictures read", delay=0, mininterval=0):
        time.sleep(0.01)
    lines = capfd.readouterr().err.splitlines()
    assert lines and all(line.startswith("Pictures read: ") for line in lines)
    assert "\r" not in "".join(lines) and re.search(r"3/3", lines[-1])


def test_lines_are_seldom_and_of_short_work_nothing_is_said(capfd):
    for _ in progress(range(1000), "Pictures read"):
        pass
    assert capfd.readouterr().err == ""
    for _ in progress(range(1000), "Pictures read", delay=0):
        time.sleep(0.001)  # for ten states and more of a bar in a terminal
    assert len(capfd.readouterr().err.splitlines()) <= 2

"""Without insightface and onnxruntime all is there but the faces: what a plain ComfyUI has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.contract
def test_the_pack_loads_and_draws_and_names_what_face_nodes_need():
    """In a process of its own: this one may have imported them already."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no_face_packages", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("without_face_packages.py"))],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests/helpers")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr

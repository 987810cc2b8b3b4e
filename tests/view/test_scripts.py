"""The scripts of the report and the graph, tested by node's own runner."""

import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1] / "js"


def test_the_scripts_pass_their_own_tests():
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node: the unit tests of the report's scripts need node 20 or later")
    run = subprocess.run([node, "--test"], cwd=TESTS, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "# pass 0" not in run.stdout

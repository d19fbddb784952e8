"""``make serve-demo``, as a user types it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.engine import OFFLINE
from tests.support.server import FORK


def test_two_users_of_one_server():
    """Its exit status says whether every answer shows all that its user wants."""
    command = [Path(sys.executable).with_name("pad-vllm"), "demo", "--serve"]
    run = subprocess.run(command, env=os.environ | OFFLINE | FORK, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Both got what they wanted." in run.stdout
    assert "$ vllm serve" in run.stdout

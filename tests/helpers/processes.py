"""Programs in processes of their own."""

import os
import subprocess
import sys

from helpers.models import ROOT


def run_python(code: str, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds this package and no default model."""
    env = {key: value for key, value in os.environ.items() if key != "LLAVA_LITE_MODEL"}
    env |= {"PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=True, timeout=120)

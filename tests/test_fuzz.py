"""Random calls of the operators in a sanitized build; fuzz_ops.py says how."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parent / "fuzz_ops.py"


def campaign(*options):
    command = [sys.executable, str(CAMPAIGN), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])["cases"]


def test_a_short_campaign_of_random_calls():
    cases = campaign("--cases", 120)
    assert sum(cases.values()) == 120


@pytest.mark.slow
def test_a_long_campaign_of_random_calls():
    cases = campaign("--minutes", 15, "--seed", 1)
    assert len(cases) == 9 and min(cases.values()) > 50

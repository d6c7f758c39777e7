"""A slice of `benchmarks/fuzz_media.py`: files that were changed by chance end in an array or in
one error of mmllm's, and cost little."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "fuzz_media.py"


def test_changed_files_are_read_or_refused():
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--seed", "0", "--count", "150"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"150 files in .*: (\d+) read, (\d+) named errors, 0 failed", done.stdout)
    assert found, done.stdout
    assert min(int(found[1]), int(found[2])) > 30

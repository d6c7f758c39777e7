"""`python -m mmllm` is the command `mmllm`.

Python puts the working folder first on its import path for `-m`, where a file of a checkpoint could
stand in for a library. It is taken away, unless mmllm itself lies there.
"""

import sys
from pathlib import Path

_HOME = Path(__file__).resolve().parents[1]
if sys.path and not sys.flags.safe_path and Path(sys.path[0]).resolve() == Path.cwd() != _HOME:
    del sys.path[0]

from mmllm.cli import run  # noqa: E402 - by the path above

if __name__ == "__main__":
    run()

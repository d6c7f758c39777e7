"""`python -m mmllm` is the command `mmllm`.

Python puts the working folder first on its import path for `-m`, where a file of a checkpoint could
stand in for a library. It is taken away, unless mmllm itself lies there.
"""

import os
import sys
from contextlib import suppress

_HOME = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
with suppress(OSError):  # the working folder is gone
    if not sys.flags.safe_path and os.path.realpath(sys.path[0]) == os.getcwd() != _HOME:
        del sys.path[0]

from mmllm.cli import run  # noqa: E402 - by the path above

if __name__ == "__main__":
    run()

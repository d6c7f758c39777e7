"""What other libraries print while a model is loaded."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

_LOGGERS = ("transformers", "diffusers", "bitsandbytes")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside it, transformers and diffusers draw no progress bars, they and bitsandbytes tell of
    errors only, and nobody is warned of what a later version of a library will change."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    bars = [
        lib for lib in (diffusers_logging, transformers_logging) if lib.is_progress_bar_enabled()
    ]
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for library in bars:
        library.disable_progress_bar()
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for library in bars:
            library.enable_progress_bar()

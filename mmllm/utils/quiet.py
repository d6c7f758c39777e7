"""Suppression of messages and progress bars of other libraries while a model is loaded."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

_LOADERS = ("diffusers.pipelines.pipeline_utils", "diffusers.guiders.guider_utils")


@contextlib.contextmanager
def quiet_libraries(
    *libraries: str,
    errors_only: bool = True,
    drop: Callable[[str], bool] | None = None,
) -> Iterator[None]:
    """Disable progress bars, and optionally warnings, of transformers and diffusers in the block.

    Args:
        libraries: "transformers", "diffusers"; both if none is given.
        errors_only: whether to hide messages below level ERROR of these libraries and of
            bitsandbytes, and Python's FutureWarning and DeprecationWarning.
        drop: returns True for a message of diffusers' pipeline loader that is to be hidden.
    """
    names = libraries or ("transformers", "diffusers")
    modules = [importlib.import_module(f"{name}.utils.logging") for name in names]
    for module in modules:
        module.get_verbosity()  # configures the library's logger, which would reset its level later
    with contextlib.ExitStack() as stack:
        for module in modules:
            if module.is_progress_bar_enabled():
                stack.callback(module.enable_progress_bar)
                module.disable_progress_bar()
        if errors_only:
            for name in (*names, "bitsandbytes"):
                logger = logging.getLogger(name)
                stack.callback(logger.setLevel, logger.level)
                logger.setLevel(logging.ERROR)
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
        if drop is not None:
            for logger in map(logging.getLogger, _LOADERS):
                keep = _Keep(drop)
                stack.callback(logger.removeFilter, keep)
                logger.addFilter(keep)
        yield


@contextlib.contextmanager
def without_bars(module: str) -> Iterator[None]:
    """Hide the progress bars in the block of a module that uses `tqdm` by itself."""
    imported: Any = importlib.import_module(module)
    shown = imported.tqdm
    imported.tqdm = functools.partial(shown, disable=True)
    try:
        yield
    finally:
        imported.tqdm = shown


class _Keep(logging.Filter):
    """A filter that removes the records for whose message `drop` returns True."""

    def __init__(self, drop: Callable[[str], bool]) -> None:
        super().__init__()
        self._drop = drop

    def filter(self, record: logging.LogRecord) -> bool:
        return not self._drop(record.getMessage())

"""Imports of optional dependencies, with an error that names the extra to install."""

from __future__ import annotations

import importlib
from types import ModuleType

from mmllm.errors import ConfigError


def import_extra(module: str, *, extra: str, needed_by: str) -> ModuleType:
    """Import a module of a package that an extra of mmllm installs.

    Args:
        module: the dotted name of the module.
        extra: the extra in mmllm's pyproject.toml.
        needed_by: the feature that needs the module, for the message.

    Returns:
        The module.

    Raises:
        ConfigError: the package is not installed; the message names the command that installs it.

    Example:
        ```python
        open_clip = import_extra("open_clip", extra="encoders", needed_by="encoders.image")
        ```
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name != module.partition(".")[0]:
            raise
        raise ConfigError(
            f"{needed_by}: {error.name} is not installed; pip install 'mmllm[{extra}]'"
        ) from error

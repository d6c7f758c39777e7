"""Which code and files a config may name: the user's own configs any, a checkpoint's only trusted.

A config of the user's own may name their own component types ("module:Config"). The config of a
checkpoint may come from others: it imports nothing and names no file outside its folder, unless the
user allows that by name (`trust`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmllm.errors import ConfigError, quoted
from mmllm.weights import resolve_inside


@dataclass
class TrustedNames:
    """What this process has allowed.

    Attributes:
        components: "module:Config" of components outside the registry that the user's own configs
            have named.
        names: modules and files that the user lets checkpoints name.
    """

    components: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)

    def clear(self) -> None:
        """Forget everything."""
        self.components.clear()
        self.names.clear()

    def allows(self, component: str) -> bool:
        """Whether a checkpoint may name the component "module:Config"."""
        module = component.partition(":")[0]
        packages = [module, *(module[:at] for at, letter in enumerate(module) if letter == ".")]
        return component in self.components or not self.names.isdisjoint([component, *packages])


TRUSTED = TrustedNames()


def trust(names: Collection[str]) -> None:
    """Let the checkpoints that this process opens name code and files of the user's own.

    Args:
        names: modules ("my_encoder", with everything below it) whose classes may be component
            types, and files that may be chat templates.

    Raises:
        ConfigError: `names` is a single string.
    """
    if isinstance(names, str):
        raise ConfigError(f"trust: expected a list of names, got {quoted(names)}")
    TRUSTED.names.update(names)


def check_foreign(tree: Any, folder: Path, where: str) -> None:
    """Check the config of a checkpoint, and make the paths of its chat templates absolute.

    Args:
        tree: the config as plain data, changed in place.
        folder: the checkpoint's folder.
        where: the place of `tree` in the config, for messages.

    Raises:
        ConfigError: it names code that is not mmllm's or a file outside `folder`, and the user does
            not trust it.
    """
    if isinstance(tree, dict):
        kind = tree.get("type")
        if isinstance(kind, str) and ":" in kind and not TRUSTED.allows(kind):
            module = quoted(kind.partition(":")[0])
            raise ConfigError(
                f"{where}: type {quoted(kind)} is code that does not belong to mmllm; a checkpoint "
                f"runs it only if you allow it by name: --trust {module.strip(chr(39))}, or "
                f"mmllm.load(…, trust=[{module}])"
            )
        template = tree.get("chat_template")
        if (
            isinstance(template, str)
            and template.endswith(".jinja")
            and template not in TRUSTED.names
        ):
            tree["chat_template"] = str(resolve_inside(folder, template, f"{where}: chat_template"))
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            check_foreign(value, folder, f"{where}: {quoted(key).strip(chr(39))}")


def enclosing_checkpoint(path: Path) -> Path | None:
    """The checkpoint folder that holds a file; None for a file of the user's own."""
    parents = dict.fromkeys([*path.absolute().parents, *path.resolve().parents])
    for folder in parents:
        if (folder / "manifest.json").is_file() and (folder / "config.yaml").is_file():
            return folder
    return None

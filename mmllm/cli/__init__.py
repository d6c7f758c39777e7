"""The command line. `entry` has the app; every other module has the commands of one subject."""

from mmllm.cli.entry import FAILED, INTERRUPTED, app, main, run

__all__ = ["FAILED", "INTERRUPTED", "app", "main", "run"]

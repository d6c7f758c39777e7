"""A tree of summaries over a long text, clip or sound (MemWalker, Chen et al. 2023,
arXiv:2310.05029).

It is cut into segments, each is summarised, and the summaries of neighbouring nodes are summarised
again, up to a root. A tree does not depend on any question; it is a file, named by the hashes of
what it is of, its model and its options.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mmllm.conversation import Message, user
from mmllm.errors import ConfigError, brief_reason
from mmllm.reasoning.models import ChatModel
from mmllm.reasoning.sources import LongText, Readable, Source, as_source
from mmllm.utils.files import atomic_write, write_errors
from mmllm.utils.hashing import fingerprint

_FORMAT = 1
SUMMARY_PROMPT = "Compress each summary into a much shorter summary, and join them into a passage."


@dataclass(frozen=True)
class TreeNode:
    """A part of what the tree is of.

    Attributes:
        start: index of its first character, frame or sample.
        end: index behind its last one.
        summary: what the model wrote of it.
        children: indices of the nodes below, in order; none for a segment.
    """

    start: int
    end: int
    summary: str
    children: tuple[int, ...] = ()


@dataclass(frozen=True)
class TreeOptions:
    """How a tree is built.

    Attributes:
        segment_tokens: tokens of a segment of a text, at most.
        num_children: summaries that are summarised together, at most.
        summary_tokens: tokens of a summary, at most.
    """

    segment_tokens: int = 500
    num_children: int = 8
    summary_tokens: int = 100

    def __post_init__(self) -> None:
        for name, least in (("segment_tokens", 16), ("num_children", 2), ("summary_tokens", 8)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class SummaryTree:
    """A long text, clip or sound, and its tree.

    Attributes:
        source: what the tree is of.
        nodes: all nodes; the segments come first, in order, and the root is the last one.
        model: fingerprint of the model that wrote the summaries.
        options: how it was built.
    """

    source: Source
    nodes: tuple[TreeNode, ...]
    model: str
    options: TreeOptions

    @property
    def root(self) -> int:
        """Index of the root."""
        return len(self.nodes) - 1

    @property
    def segments(self) -> list[int]:
        """Indices of the segments, in order."""
        return [index for index, node in enumerate(self.nodes) if not node.children]

    def text_of(self, index: int) -> str:
        """The part of a text that a node stands for; of a clip or a sound, its summary."""
        node = self.nodes[index]
        if isinstance(self.source, LongText):
            return self.source.text[node.start : node.end].strip()
        return node.summary

    def message(self, index: int, before: str = "", after: str = "") -> Message:
        """A user message that shows what a node stands for.

        Args:
            index: of the node.
            before: the words before it.
            after: the words behind it.
        """
        return self.source.message(
            self.nodes[index].start, self.nodes[index].end, before=before, after=after
        )

    def place_of(self, index: int) -> str:
        """Where a node lies, in words: "8.0 s to 10.0 s"."""
        return self.source.place(self.nodes[index].start, self.nodes[index].end)

    def save(self, path: Path) -> None:
        """Write the tree, without what it is of. Raises ConfigError."""
        tree = {
            "format": _FORMAT,
            self.source.kind: self.source.digest,
            "model": self.model,
            "options": asdict(self.options),
            "nodes": [asdict(node) for node in self.nodes],
        }
        with write_errors(path, ConfigError, "free space, or give another folder"):
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")


def build_tree(
    model: ChatModel,
    source: Readable,
    options: TreeOptions | None = None,
    *,
    folder: Path | None = None,
    on_progress: Callable[[int], object] = lambda _: None,
) -> SummaryTree:
    """Build the tree of a text, a clip or a sound, or read it from a folder.

    Args:
        model: writes the summaries, greedily; of a segment of a clip or a sound it says what it
            sees or hears.
        source: a text, a Video or an Audio; `LongMedium` with segments of another length.
        options: sizes of segments, groups and summaries.
        folder: where trees are kept; a tree of the same source, model and options is not built
            again.
        on_progress: called with the number of summaries after each one.

    Raises:
        ConfigError: the text is empty, or a file cannot be read or written.
        MediaError: a medium cannot be read.
        CallError, BudgetError: as the model raises them; with a Recorder the next try goes on.
    """
    options = options or TreeOptions()
    source = as_source(source)
    path = folder and folder / f"{_tree_name(model, source, options)}.json"
    if path and path.exists():
        return load_tree(path, model, source, options)
    nodes: list[TreeNode] = []
    for start, end in source.segments(model, options.segment_tokens):
        message = source.message(start, end, after=f"\n\n{source.prompt}")
        nodes.append(TreeNode(start, end, _summary(model, message, options)))
        on_progress(1)
    level = list(range(len(nodes)))
    while len(level) > 1:
        above = []
        for group in _groups(level, options.num_children):
            summaries = [nodes[index].summary for index in group]
            summary = _joined(model, source, summaries, options)
            first, last = nodes[group[0]], nodes[group[-1]]
            nodes.append(TreeNode(first.start, last.end, summary, tuple(group)))
            above.append(len(nodes) - 1)
            on_progress(1)
        level = above
    tree = SummaryTree(source, tuple(nodes), model.fingerprint, options)
    if path:
        tree.save(path)
    return tree


def _tree_name(model: ChatModel, source: Source, options: TreeOptions) -> str:
    """The name of a tree's file: a hash of all that it depends on."""
    return fingerprint([_FORMAT, source.digest, model.fingerprint, asdict(options)])


def load_tree(
    path: Path, model: ChatModel, source: Readable, options: TreeOptions | None = None
) -> SummaryTree:
    """Read a tree, for the source and the model that it was built of.

    Args:
        path: the file.
        model: the model that will read the source.
        source: the text, clip or sound.
        options: those that the tree must have been built with; None for any.

    Raises:
        ConfigError: the file is no tree, or that of another source, model or options.
    """
    source = as_source(source)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        expected = {"format": _FORMAT, source.kind: source.digest, "model": model.fingerprint}
        for name, value in expected.items():
            if tree[name] != value:
                raise ConfigError(
                    f"{path}: the tree is that of another {name} ({tree[name]!s:.16}, not "
                    f"{value!s:.16}); build a new one"
                )
        found = TreeOptions(**tree["options"])
        nodes = tuple(_node(entry) for entry in tree["nodes"])
        _check(nodes, len(source))
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: no tree can be read from it: {brief_reason(error)}") from error
    if options is not None and found != options:
        raise ConfigError(f"{path}: the tree has other options: {found}; build a new one")
    return SummaryTree(source, nodes, tree["model"], found)


def _groups(level: list[int], size: int) -> list[list[int]]:
    """Neighbours in groups of about the same size, at most `size`; none has a single member unless
    there is only one."""
    num = -(-len(level) // size)
    bounds = [round(number * len(level) / num) for number in range(num + 1)]
    return [level[start:end] for start, end in pairwise(bounds)]


def _joined(model: ChatModel, source: Source, summaries: list[str], options: TreeOptions) -> str:
    """One summary of several; of a clip or a sound a list of them, while it is short."""
    if not isinstance(source, LongText):
        listed = " ".join(summaries)
        num_tokens = model.count_tokens([user(listed)]) - model.count_tokens([user("")])
        if num_tokens <= options.summary_tokens:
            return listed
    joined = "\n\n".join(summaries)
    return _summary(model, user(f"{joined.strip()}\n\n{SUMMARY_PROMPT}"), options)


def _summary(model: ChatModel, message: Message, options: TreeOptions) -> str:
    (completion,) = model.complete(
        [message], temperature=0.0, max_new_tokens=options.summary_tokens
    )
    return completion.text.strip()


def _node(entry: dict[str, Any]) -> TreeNode:
    return TreeNode(
        int(entry["start"]), int(entry["end"]), str(entry["summary"]), tuple(entry["children"])
    )


def _check(nodes: tuple[TreeNode, ...], length: int) -> None:
    """Raises ValueError unless nodes are in bounds and every node has its children before it."""
    if not nodes:
        raise ValueError("there are no nodes")
    for index, node in enumerate(nodes):
        if not 0 <= node.start <= node.end <= length:
            raise ValueError(f"node {index} lies outside")
        if not all(isinstance(child, int) and 0 <= child < index for child in node.children):
            raise ValueError(f"node {index} has children that do not come before it")

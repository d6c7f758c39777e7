"""A tree of summaries over a long text (MemWalker, Chen et al. 2023, arXiv:2310.05029).

The text is cut into segments, each is summarised, and the summaries of neighbouring nodes are
summarised again, up to a root. A tree does not depend on any question; it is a file, named by the
hashes of its text, its model and its options.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mmllm.conversation import user
from mmllm.errors import ConfigError, brief_reason
from mmllm.reasoning.models import ChatModel
from mmllm.utils.files import atomic_write, write_errors
from mmllm.utils.hashing import fingerprint, sha256

_FORMAT = 1
SEGMENT_PROMPT = "Summarize the above text comprehensively into a fluent passage."
SUMMARY_PROMPT = "Compress each summary into a much shorter summary, and join them into a passage."


@dataclass(frozen=True)
class TreeNode:
    """A part of the text.

    Attributes:
        start: index of its first character.
        end: index behind its last character.
        summary: what the model wrote of it.
        children: indices of the nodes below, in the order of the text; none for a segment.
    """

    start: int
    end: int
    summary: str
    children: tuple[int, ...] = ()


@dataclass(frozen=True)
class TreeOptions:
    """How a tree is built.

    Attributes:
        segment_tokens: tokens of a segment, at most.
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
    """A text and its tree.

    Attributes:
        text: the text.
        nodes: all nodes; the segments come first, in order, and the root is the last one.
        model: fingerprint of the model that wrote the summaries.
        options: how it was built.
    """

    text: str
    nodes: tuple[TreeNode, ...]
    model: str
    options: TreeOptions

    @property
    def root(self) -> int:
        """Index of the root."""
        return len(self.nodes) - 1

    @property
    def segments(self) -> list[int]:
        """Indices of the segments, in the order of the text."""
        return [index for index, node in enumerate(self.nodes) if not node.children]

    def text_of(self, index: int) -> str:
        """The part of the text that a node stands for."""
        return self.text[self.nodes[index].start : self.nodes[index].end].strip()

    def save(self, path: Path) -> None:
        """Write the tree, without the text. Raises ConfigError."""
        tree = {
            "format": _FORMAT,
            "text": sha256(self.text),
            "model": self.model,
            "options": asdict(self.options),
            "nodes": [asdict(node) for node in self.nodes],
        }
        with write_errors(path, ConfigError, "free space, or give another folder"):
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")


def build_tree(
    model: ChatModel,
    text: str,
    options: TreeOptions | None = None,
    *,
    folder: Path | None = None,
    on_progress: Callable[[int], object] = lambda _: None,
) -> SummaryTree:
    """Build the tree of a text, or read it from a folder.

    Args:
        model: writes the summaries, greedily.
        text: the text.
        options: sizes of segments, groups and summaries.
        folder: where trees are kept; a tree of the same text, model and options is not built again.
        on_progress: called with the number of summaries after each one.

    Raises:
        ConfigError: the text is empty, or a file cannot be read or written.
        CallError, BudgetError: as the model raises them; with a Recorder the next try goes on.
    """
    options = options or TreeOptions()
    if not text.strip():
        raise ConfigError("the text is empty: there is nothing to read")
    path = folder and folder / f"{_tree_name(model, text, options)}.json"
    if path and path.exists():
        return load_tree(path, model, text, options)
    nodes: list[TreeNode] = []
    for start, end in split_text(model, text, options.segment_tokens):
        summary = _summary(model, text[start:end], SEGMENT_PROMPT, options)
        nodes.append(TreeNode(start, end, summary))
        on_progress(1)
    level = list(range(len(nodes)))
    while len(level) > 1:
        above = []
        for group in _groups(level, options.num_children):
            joined = "\n\n".join(nodes[index].summary for index in group)
            summary = _summary(model, joined, SUMMARY_PROMPT, options)
            first, last = nodes[group[0]], nodes[group[-1]]
            nodes.append(TreeNode(first.start, last.end, summary, tuple(group)))
            above.append(len(nodes) - 1)
            on_progress(1)
        level = above
    tree = SummaryTree(text, tuple(nodes), model.fingerprint, options)
    if path:
        tree.save(path)
    return tree


def _tree_name(model: ChatModel, text: str, options: TreeOptions) -> str:
    """The name of a tree's file: a hash of all that it depends on."""
    return fingerprint([_FORMAT, sha256(text), model.fingerprint, asdict(options)])


def load_tree(
    path: Path, model: ChatModel, text: str, options: TreeOptions | None = None
) -> SummaryTree:
    """Read a tree, for the text and the model that it was built of.

    Args:
        path: the file.
        model: the model that will read the text.
        text: the text.
        options: those that the tree must have been built with; None for any.

    Raises:
        ConfigError: the file is no tree, or that of another text, model or options.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        expected = {"format": _FORMAT, "text": sha256(text), "model": model.fingerprint}
        for name, value in expected.items():
            if tree[name] != value:
                raise ConfigError(
                    f"{path}: the tree is that of another {name} ({tree[name]!s:.16}, not "
                    f"{value!s:.16}); build a new one"
                )
        found = TreeOptions(**tree["options"])
        nodes = tuple(_node(entry) for entry in tree["nodes"])
        _check(nodes, len(text))
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: no tree can be read from it: {brief_reason(error)}") from error
    if options is not None and found != options:
        raise ConfigError(f"{path}: the tree has other options: {found}; build a new one")
    return SummaryTree(text, nodes, tree["model"], found)


def split_text(model: ChatModel, text: str, num_tokens: int) -> Iterator[tuple[int, int]]:
    """Cut a text into segments, at paragraphs where possible, else at sentences, else at words.

    Args:
        model: counts tokens.
        text: the text.
        num_tokens: tokens of a segment, at most.

    Yields:
        Start and end of each segment, in characters.
    """
    overhead = model.count_tokens([user("")])
    start = end = count = 0
    for piece_end, piece_count in _pieces(model, text, num_tokens, overhead):
        if count and count + piece_count > num_tokens:
            yield start, end
            start, count = end, 0
        end, count = piece_end, count + piece_count
    if text[start:end].strip():
        yield start, end


_CUTS = (re.compile(r"\n\s*\n+"), re.compile(r"(?<=[.!?])\s+"), re.compile(r"\s+"))


def _pieces(
    model: ChatModel, text: str, num_tokens: int, overhead: int, start: int = 0, depth: int = 0
) -> Iterator[tuple[int, int]]:
    """(end in characters, tokens) of the pieces of a text that begins at `start`, in order."""
    place = 0
    ends = [match.end() for match in _CUTS[depth].finditer(text)] if depth < len(_CUTS) else []
    for end in [*ends, len(text)]:
        piece = text[place:end]
        count = max(model.count_tokens([user(piece)]) - overhead, 1) if piece else 0
        if count > num_tokens and depth + 1 < len(_CUTS):
            yield from _pieces(model, piece, num_tokens, overhead, start + place, depth + 1)
        elif piece:
            yield start + end, count
        place = end


def _groups(level: list[int], size: int) -> list[list[int]]:
    """Neighbours in groups of about the same size, at most `size`; none has a single member unless
    there is only one."""
    num = -(-len(level) // size)
    bounds = [round(number * len(level) / num) for number in range(num + 1)]
    return [level[start:end] for start, end in pairwise(bounds)]


def _summary(model: ChatModel, text: str, prompt: str, options: TreeOptions) -> str:
    (completion,) = model.complete(
        [user(f"{text.strip()}\n\n{prompt}")],
        temperature=0.0,
        max_new_tokens=options.summary_tokens,
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
            raise ValueError(f"node {index} lies outside the text")
        if not all(isinstance(child, int) and 0 <= child < index for child in node.children):
            raise ValueError(f"node {index} has children that do not come before it")

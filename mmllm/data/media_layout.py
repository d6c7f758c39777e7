"""How the media of a language model's own towers stand in a prompt, as its own processor writes
them: the text around their placeholders, how many placeholders a medium has, and their positions.

Legend: B rows, T positions, N placeholders of a medium; t x h x w a grid of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from mmllm.conversation import Medium, Text
from mmllm.errors import ContextError

if TYPE_CHECKING:
    from mmllm.data.rendering import MediaSpan, Renderer

Grid = tuple[int, int, int]
"""t, h, w: frames, rows and columns of a medium's placeholders."""


@dataclass(frozen=True)
class MediaLayout:
    """How the media of one encoder stand in a prompt.

    Attributes:
        before: text of the chat template in front of the placeholders; special tokens count.
        after: text behind them.
        measure: a medium -> N, and its grid where positions are three-dimensional (M-RoPE).
        attends_to_itself: whether all positions of a medium attend to one another.
    """

    before: str
    after: str
    measure: Callable[[Medium], tuple[int, Grid | None]]
    attends_to_itself: bool


def layouts_of(
    input_keys: Mapping[str, tuple[str, int]], encoders: Mapping[str, Any]
) -> dict[str, MediaLayout]:
    """The layouts of those encoders that have one, by modality.

    Args:
        input_keys: modality -> (encoder key, N at most).
        encoders: by key. One whose projection does not keep its tokens one by one stands in a
            prompt as others do.
    """
    return {
        modality: MediaLayout(*encoders[key].layout)
        for modality, (key, num_tokens) in input_keys.items()
        if encoders[key].layout and encoders[key].feature_shape[0] == num_tokens
    }


def whole_media(renderer: Renderer, keys: Sequence[str]) -> list[int]:
    """The ids in `Sources` of media that attend to themselves.

    Args:
        renderer: the model's, with its layouts.
        keys: of all encoders, in order.
    """
    return [
        renderer.tokens.placeholder_id + keys.index(renderer.input_keys[modality][0])
        for modality, layout in renderer.layouts.items()
        if layout.attends_to_itself
    ]


Piece = Text | Medium | str
"""A part of a message, or text of the template between parts."""


def frame_media(
    parts: Sequence[Text | Medium], role: str, layouts: Mapping[str, MediaLayout]
) -> tuple[str, list[Piece], str]:
    """Put the template's text around input media.

    Args:
        parts: the parts of a message.
        role: its role; the media of an assistant are outputs.
        layouts: by modality.

    Returns:
        The text in front of a first medium, the parts with the template's text between them, and
        the text behind a last medium. Texts of the template that meet are one: a tokenizer may join
        their line breaks.
    """
    pieces: list[Piece] = [""]
    for part in parts:
        layout = layouts.get(part.modality) if isinstance(part, Medium) else None
        if layout is None or role == "assistant":
            pieces += [part, ""]
            continue
        assert isinstance(pieces[-1], str)
        pieces[-1] += layout.before
        pieces += [part, layout.after]
    first, last = pieces[0], pieces[-1] if len(pieces) > 1 else ""
    assert isinstance(first, str)
    assert isinstance(last, str)
    return first, [piece for piece in pieces[1:-1] if piece != ""], last


def measure(medium: Medium, layout: MediaLayout | None, num_tokens: int) -> tuple[int, Grid | None]:
    """Return N of an input medium, and its grid.

    Args:
        medium: the medium.
        layout: that of its modality, if there is one.
        num_tokens: N of a modality without.

    Raises:
        ContextError: it takes more than its `max_tokens`.
    """
    num, grid = layout.measure(medium) if layout else (num_tokens, None)
    if num > medium.tokens_within(num):
        raise ContextError(
            f"{medium!r} takes {num} tokens, but its max_tokens is {medium.max_tokens}: raise it, "
            "or read the medium with an encoder that keeps to a budget (tiles, windows, backbone)"
        )
    return num, grid


def position_ids(spans: Iterable[MediaSpan], length: int) -> Tensor:
    """The positions of a conversation of T tokens.

    Args:
        spans: its input media, in order.
        length: T.

    Returns:
        int[T]: 0, 1, …; or int[T, 3] where a medium has a grid, as Qwen2-VL (Wang et al. 2024)
        counts them: frame, row and column of a placeholder behind the position before the medium,
        and the text behind it goes on from the largest.
    """
    gridded = [span for span in spans if span.grid]
    positions = torch.arange(length)
    if not gridded:
        return positions
    positions = positions[:, None].repeat(1, 3)
    shift = 0
    for span in gridded:
        assert span.grid is not None
        end = span.start + span.length
        axes = torch.meshgrid(*map(torch.arange, span.grid), indexing="ij")
        positions[span.start : end] = torch.stack(axes, dim=-1).view(-1, 3) + span.start - shift
        shift += position_shift([span])
        positions[end:] = torch.arange(end, length)[:, None] - shift
    return positions


def position_shift(spans: Iterable[MediaSpan]) -> int:
    """How far the positions behind media lag behind the number of tokens."""
    return sum(span.length - max(span.grid) for span in spans if span.grid)


def same_width(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Fill the narrower of two tensors up with zeros.

    Args:
        first: float[A, D].
        second: float[B, E].

    Returns:
        Both, of width max(D, E).
    """
    more = second.shape[1] - first.shape[1]
    if more == 0:
        return first, second
    return functional.pad(first, (0, max(more, 0))), functional.pad(second, (0, max(-more, 0)))

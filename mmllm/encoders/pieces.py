"""Media of any size and length, cut into pieces that another encoder reads one by one, within a
budget of tokens: tiles of images, windows of audio and video.

A medium takes as many tokens as its pieces have, and L at most.
Legend: M media, P pieces at most, S numbers of a piece, l tokens and c channels of a piece, L = P *
l tokens, C channels, N tokens of a medium.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmllm.conversation import Medium
from mmllm.encoders.base import Features, ModalityEncoder
from mmllm.errors import ConfigError, MediaError
from mmllm.utils.hashing import fingerprint

TIME_CHANNELS = 16
_LONGEST = 3 * 3600.0
"""Seconds of the slowest wave of a time's channels; the fastest takes one second."""


class PiecesEncoder(ModalityEncoder):
    """float[M, P, 2 + S] -> float[M, L, C] and the mask of each medium's N, piece after piece.

    The first two numbers of a piece say whether it is there, and at which second it begins. A
    subclass writes `cut`.

    Args:
        name: the encoder's `type`.
        inner: the encoder of pieces, of the same modality.
        max_tokens: the budget of a medium.
        facts: what else decides the features, for the fingerprint.
        has_time: whether channels that tell the second of a piece are put behind the encoder's.
    """

    def __init__(
        self,
        name: str,
        inner: ModalityEncoder,
        max_tokens: int,
        *,
        facts: Sequence[Any] = (),
        has_time: bool = False,
    ):
        super().__init__()
        length, channels = inner.feature_shape
        self.num_pieces = max_tokens // length
        if self.num_pieces < 1:
            raise ConfigError(
                f"{name}.max_tokens: a piece takes {length} tokens, got {max_tokens}; raise it, or "
                "have its encoder give fewer (tokens, grid)"
            )
        self.inner = inner
        self.has_time = has_time
        self.needs_whole_video = inner.modality == "video"
        self.sample_shape = (self.num_pieces, 2 + math.prod(inner.sample_shape))
        more = TIME_CHANNELS if has_time else 0
        self.feature_shape = (self.num_pieces * length, channels + more)
        self.layout = ("", "", self.measure, False)
        self._facts = [name, self.num_pieces, *facts]
        self.freeze()

    def cut(self, medium: Any, most: int) -> list[tuple[Medium, float]]:
        """The pieces of a medium, and the second at which each begins; a subclass writes this.

        Args:
            medium: the medium.
            most: how many pieces there may be.
        """
        raise NotImplementedError

    def measure(self, medium: Medium) -> tuple[int, None]:
        """N, and no grid."""
        pieces = self.cut(medium, self._most(medium))
        return sum(tokens_of(self.inner, piece) for piece, _ in pieces), None

    def to_tensor(self, medium: Any) -> Tensor:
        """A medium -> float[P, 2 + S], zeros behind its last piece."""
        sample = torch.zeros(self.sample_shape)
        for row, (piece, second) in enumerate(self.cut(medium, self._most(medium))):
            sample[row, 0], sample[row, 1] = 1, second
            sample[row, 2:] = self.inner.preprocess(piece).flatten()
        return sample

    def forward(self, samples: Tensor) -> Features:
        """float[M, P, 2 + S] -> float[M, L, C] and bool[M, L]."""
        is_piece = samples[..., 0] > 0.5
        pieces = samples[is_piece]
        found = self.inner(pieces[:, 2:].unflatten(1, self.inner.sample_shape))
        tokens = found.tokens
        if self.has_time:
            times = time_channels(pieces[:, 1])[:, None].expand(-1, tokens.shape[1], -1)
            tokens = torch.cat([tokens, times.to(tokens)], dim=-1)
        counts = is_piece.sum(dim=1).tolist()
        return join_pieces(self.inner, Features(tokens, found.mask), counts, self.feature_shape[0])

    def _most(self, medium: Medium) -> int:
        """The pieces within a medium's budget. Raises MediaError for less than one."""
        length = self.inner.feature_shape[0]
        most = medium.tokens_within(self.num_pieces * length) // length
        if most < 1:
            raise MediaError(
                f"{self._facts[0]}: {medium!r}: a piece takes {length} tokens, but its max_tokens "
                f"is {medium.max_tokens}"
            )
        return most

    def load(self) -> None:
        self.inner.load()

    @property
    def fingerprint(self) -> str:
        return fingerprint([*self._facts, self.inner.fingerprint])


def build_inner(tree: Mapping[str, Any], where: str, modality: str) -> ModalityEncoder:
    """The encoder of pieces that a config describes.

    Args:
        tree: its `type` and its keys.
        where: its place in the config, for messages.
        modality: what it must encode.

    Raises:
        ConfigError: it encodes something else, or a key is wrong.
        AssetError: its weights cannot be opened.
    """
    from mmllm.config import build, parse_component

    inner = build(parse_component("encoders", tree, where))
    if inner.modality != modality:
        raise ConfigError(
            f"{where}: expected an encoder of {modality}, got one of {inner.modality}"
        )
    if type(inner).attach is not ModalityEncoder.attach:
        raise ConfigError(
            f"{where}: the language model's own tower reads media of any size itself: name it "
            "alone, with its max_tokens"
        )
    return inner


def tokens_of(encoder: ModalityEncoder, medium: Medium) -> int:
    """The tokens that a medium takes: as many as it needs, or those that all of them take.

    Args:
        encoder: the encoder.
        medium: a medium of its modality.
    """
    return encoder.layout[2](medium)[0] if encoder.layout else encoder.feature_shape[0]


def join_pieces(
    encoder: ModalityEncoder, found: Features, counts: Sequence[int], length: int
) -> Features:
    """Put the tokens of the pieces of each medium one behind the other.

    Args:
        encoder: the encoder of the pieces.
        found: its features, float[P, l, c], of the pieces of all media.
        counts: pieces of each medium.
        length: L.

    Returns:
        Features with tokens float[M, L, c], zeros behind each, and their mask.
    """
    masks = torch.ones_like(found.tokens[..., 0], dtype=torch.bool)
    if found.mask is not None:
        masks = found.mask
    places = masks if encoder.layout else torch.ones_like(masks)
    by_medium = [
        (tokens[place], mask[place])
        for tokens, mask, place in zip(
            found.tokens.split(list(counts)),
            masks.split(list(counts)),
            places.split(list(counts)),
            strict=True,
        )
    ]
    tokens = pad_sequence([tokens.float() for tokens, _ in by_medium], batch_first=True)
    mask = pad_sequence([mask for _, mask in by_medium], batch_first=True)
    more = length - tokens.shape[1]
    return Features(
        torch.nn.functional.pad(tokens, (0, 0, 0, more)), torch.nn.functional.pad(mask, (0, more))
    )


def time_channels(seconds: Tensor) -> Tensor:
    """Sines and cosines of times, with periods from one second to three hours.

    Args:
        seconds: float[P].

    Returns:
        float[P, 16].
    """
    steps = torch.arange(TIME_CHANNELS // 2, device=seconds.device) / (TIME_CHANNELS // 2 - 1)
    angles = 2 * math.pi * seconds[:, None] / _LONGEST**steps
    return torch.cat([angles.sin(), angles.cos()], dim=-1)

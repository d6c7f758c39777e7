"""The conditions of media that were made: an edit can keep a share of the former one.

Legend: M media.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mmllm.conversation import Medium
from mmllm.decoders.contract import Condition


class ConditionMemory:
    """The conditions of the media that a process has made, each as long as its medium is in memory.

    The oldest ones are forgotten once all take more than `max_bytes`; one of more than an eighth of
    that is not kept.
    """

    def __init__(self, max_bytes: int = 2**29) -> None:
        self.max_bytes = max_bytes
        self._conditions: WeakKeyDictionary[Medium, tuple[str, Condition]] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._conditions)

    def keep(self, medium: Medium, key: str, condition: Condition) -> None:
        """Remember under which condition a medium was made.

        Args:
            medium: the medium, this very object.
            key: of its decoder.
            condition: its condition, without an axis of media.
        """
        if _num_bytes(condition) > self.max_bytes // 8:
            return
        own = {name: value.detach().cpu().clone() for name, value in condition.items()}
        with self._lock:
            self._conditions[medium] = key, own
            kept = list(self._conditions.items())
            total = sum(_num_bytes(each) for _, (_, each) in kept)
            for former, (_, each) in kept:
                if total <= self.max_bytes:
                    break
                total -= _num_bytes(each)
                del self._conditions[former]

    def newest(self, media: Sequence[Medium], key: str) -> Condition | None:
        """Return the condition of the newest medium of a decoder; None if none is known.

        Args:
            media: in order.
            key: of the decoder.
        """
        with self._lock:
            for medium in reversed(media):
                found = self._conditions.get(medium)
                if found is not None and found[0] == key:
                    return found[1]
        return None


def blend(condition: Condition, former: Sequence[tuple[Condition | None, float]]) -> Condition:
    """Interpolate conditions linearly towards former ones (as Imagic does, Kawar et al. 2023).

    Args:
        condition: M conditions.
        former: of each the former one, if any, and its share from 0 to 1. Of two masks all
            positions of either count, unless a share is 0 or 1.

    Returns:
        M conditions; `condition` itself where no share is above 0.
    """
    if not any(share > 0 and each is not None for each, share in former):
        return condition
    blended = {name: value.clone() for name, value in condition.items()}
    for row, (each, share) in enumerate(former):
        for name, value in (each or {}).items():
            own = blended[name]
            own[row] = _mixed(own[row], value.to(own), share, is_mask=name.endswith("mask"))
    return blended


def _mixed(new: Tensor, old: Tensor, share: float, *, is_mask: bool) -> Tensor:
    return torch.maximum(new, old) if is_mask and 0 < share < 1 else torch.lerp(new, old, share)


def _num_bytes(condition: Condition) -> int:
    return sum(value.nbytes for value in condition.values())

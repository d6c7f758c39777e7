"""The conditions of media that were made: an edit can keep a share of the former one.

Legend: M media.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from mmllm.conversation import Medium
from mmllm.decoders.contract import Condition

MARK = "condition"
"""The key of a medium's provenance that names its condition."""


class ConditionMemory:
    """The conditions of the media that a process has made, by a name in their provenance, so that
    a medium which comes back as a file finds its own.

    The oldest ones are forgotten once all take more than `max_bytes`; one of more than an eighth of
    that is not kept.
    """

    def __init__(self, max_bytes: int = 2**29) -> None:
        self.max_bytes = max_bytes
        self._conditions: OrderedDict[str, Condition] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._conditions)

    def keep(self, key: str, condition: Condition) -> str | None:
        """Remember a condition.

        Args:
            key: of its decoder.
            condition: the condition of one medium, without an axis of media.

        Returns:
            Its name, the same for equal ones; None if it is too large to be kept.
        """
        size = _num_bytes(condition)
        if size > self.max_bytes // 8:
            return None
        own = {name: value.detach().cpu().clone() for name, value in condition.items()}
        mark = _digest(key, own)
        with self._lock:
            if mark not in self._conditions:
                self._num_bytes += size
            self._conditions[mark] = own
            self._conditions.move_to_end(mark)
            while self._num_bytes > self.max_bytes:
                _, oldest = self._conditions.popitem(last=False)
                self._num_bytes -= _num_bytes(oldest)
        return mark

    def newest(self, media: Sequence[Medium], key: str) -> Condition | None:
        """Return the condition of the newest medium of a decoder; None if none is known.

        Args:
            media: in order.
            key: of the decoder.
        """
        for medium in reversed(media):
            provenance = medium.decoded().provenance or {}
            mark = provenance.get(MARK)
            if isinstance(mark, str) and provenance.get("decoder") == key:
                with self._lock:
                    found = self._conditions.get(mark)
                if found is not None:
                    return found
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


def _digest(key: str, condition: Condition) -> str:
    digest = hashlib.sha256(key.encode())
    for name, value in sorted(condition.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]

"""Rows of `mmllm evaluate MODEL --tasks reasoning`: what a model does inside mmllm.reasoning.

They are measured only where they are asked for: some take many minutes on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mmllm.evaluation.metrics import Metric
from mmllm.evaluation.reasoning.focusing import NUM_CONVERSATIONS, measure_focus
from mmllm.evaluation.reasoning.long_media import (
    NUM_SEGMENTS,
    measure_long_clip,
    measure_long_sound,
)
from mmllm.evaluation.reasoning.reading import NUM_QUESTIONS, measure_memwalker
from mmllm.evaluation.reasoning.searching import (
    NUM_BLOCKSWORLDS,
    NUM_CIPHERS,
    NUM_OPTIMIZATIONS,
    measure_blocksworld,
    measure_cipher,
    measure_optimizer,
)
from mmllm.evaluation.reasoning.verifying import NUM_SOUNDS, measure_verify
from mmllm.evaluation.reasoning.wordings import NUM_EVALUATIONS, measure_wording

ROWS: dict[str, tuple[Callable[..., Iterator[Metric]], int]] = {
    "reasoning/cipher": (measure_cipher, NUM_CIPHERS),
    "reasoning/blocksworld": (measure_blocksworld, NUM_BLOCKSWORLDS),
    "reasoning/optimizer": (measure_optimizer, NUM_OPTIMIZATIONS),
    "reasoning/memwalker": (measure_memwalker, NUM_QUESTIONS),
    "reasoning/memwalker/clips": (measure_long_clip, NUM_SEGMENTS),
    "reasoning/memwalker/sounds": (measure_long_sound, NUM_SEGMENTS),
    "reasoning/verify": (measure_verify, NUM_SOUNDS),
    "reasoning/focus": (measure_focus, NUM_CONVERSATIONS),
    "reasoning/wording": (measure_wording, NUM_EVALUATIONS),
}
"""Name of a task -> what measures it, called with (model, folder of mini's data, number of items,
function that takes the number of items done), and the number of items."""

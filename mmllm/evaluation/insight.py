"""Rows of `mmllm evaluate MODEL --tasks insight`: what goes on inside a model.

They are measured only where they are asked for: some take many minutes on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mmllm.evaluation.anomalies import measure_anomalies
from mmllm.evaluation.dictionaries import measure_concepts, measure_dictionary
from mmllm.evaluation.heads import measure_copying, measure_heads, measure_text_learning
from mmllm.evaluation.memory import measure_memory
from mmllm.evaluation.metrics import Metric
from mmllm.evaluation.steering import measure_feature_steering, measure_steering

ROWS: dict[str, tuple[Callable[..., Iterator[Metric]], int]] = {
    "insight/heads": (measure_heads, 100),
    "insight/heads/text": (measure_text_learning, 100),
    "insight/copying": (measure_copying, 200),
    "insight/steering": (measure_steering, 40),
    "insight/steering/features": (measure_feature_steering, 40),
    "insight/sae": (measure_dictionary, 100),
    "insight/concepts": (measure_concepts, 50),
    "insight/anomaly": (measure_anomalies, 24),
    "insight/memory": (measure_memory, 100),
}
"""Name of a task -> what measures it, and the number of items; as mmllm.evaluation.reasoning.ROWS,
but called with the chat."""

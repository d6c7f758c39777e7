"""Floating-point operations of a training step.

Legend: B rows, T tokens, D LLM width, Q and KV widths of all query and key heads, F width of the
feed-forward layer, I inputs of LoRA, N layers, V vocabulary; one process, one micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmllm.config import StageConfig
from mmllm.llm.language_model import LanguageModel
from mmllm.planning.parts import count_parameters, llm_shape, trains_through_llm
from mmllm.training.trainable import ParameterGroup


def operations(
    llm: LanguageModel,
    stage: StageConfig,
    groups: Sequence[ParameterGroup],
    rows: int,
    processes: int = 1,
) -> float:
    """Return the floating-point operations of the LLM in one micro-batch of full rows.

        forward   2 B T P + 4 B T T Q N + 2 B T V D    P: weights of the layers, LoRA's included;
        backward  as much again, attention and LoRA twice, where a gradient goes through the LLM;
        once more forward with gradient checkpointing.

    Every position is counted as real and supervised, so this is an upper bound. `kl` adds its
    windows: forward and backward, and forward again without the adapters. The frozen parts, which
    run once an item, and pre-alignment are not included.

    Args:
        llm: the language model, which may be on the meta device.
        stage: the stage, of which `max_length`, the losses and `gradient_checkpointing` matter.
        groups: the parameters that it trains.
        rows: B, rows of a micro-batch on one process.
        processes: how many processes share the batch of the `kl` loss.
    """
    shape = llm_shape(llm)

    def passes(rows: int, length: int) -> tuple[float, float, float]:
        positions = rows * length
        layers = 2 * positions * shape.weights
        attention = 4 * positions * length * shape.queries * shape.layers
        adapters = 2 * positions * count_parameters(p for _, p in llm.lora_parameters())
        head = 2 * positions * shape.vocabulary * shape.width
        forward = layers + attention + adapters
        backward = layers + 2 * attention + 2 * adapters if trains_through_llm(groups) else 0
        if trains_through_llm(groups) and stage.gradient_checkpointing:
            backward += forward
        return forward, backward, head

    forward, backward, head = passes(rows, stage.max_length)
    total = forward + backward + head * (1 + trains_through_llm(groups))
    if stage.kl:
        share = stage.kl.batch_size / (stage.gradient_accumulation_steps * processes)
        forward, backward, head = passes(1, stage.kl.length)
        total += share * (2 * forward + backward + 3 * head)
    return total

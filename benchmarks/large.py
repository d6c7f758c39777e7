"""How fast does a language model of 8 billion parameters train? Steps of modern-8b's stages, with
random weights and features that lie ready, compared with the same language model run bare.

    python benchmarks/large.py --json benchmarks/results/large.json   # on a GPU of 80 GB
    python benchmarks/large.py --seconds 0.1 --pairs 1                # without one: does it run?

A pack holds 4,096 positions. Operations are 4 a parameter and token: frozen weights have no
gradient. Without a GPU the language model has two narrow layers, and the bars are printed, not
measured: a step takes at most 1.05 of the bare language model's, and trains more than 15,400 tokens
a second.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pairs
import torch
from accelerate import Accelerator
from pairs import Options, Row, timed
from stages import Bare, Stage
from torch import nn

from mmllm import config as configs
from mmllm import model as models
from mmllm.config import SystemConfig
from mmllm.data.batch import Batch, InputMedia, OutputMedia
from mmllm.kernels import allocator
from mmllm.llm.language_model import LanguageModel
from mmllm.losses import build_losses
from mmllm.model import AnyToAny
from mmllm.training import optimizer, processes
from mmllm.training.feed import StepData
from mmllm.training.trainable import choose_trainable
from mmllm.weights import skip_weights

RECIPE = Path(__file__).parents[1] / "configs" / "modern-8b"
POSITIONS, CONVERSATIONS = 4096, 8
FLOOR = 1.05
"""What a step may take of the same language model's, run bare."""
LEAST = 15_400
"""Tokens a second on one H100 or H200. LoRA on an 8 B model with packs of 4,096 is published at
12,473 for another framework: 402 TFLOP/s, 41 % of what an H100 can do."""
NARROW = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}


class Large(Stage):
    """A stage of modern-8b, ready to take steps on synthetic packs."""

    def __init__(self, number: int) -> None:
        allocator.keep_freed_memory()
        (path,) = RECIPE.glob(f"{number}_*.yaml")
        run = configs.load_run(path)
        losses = {"text": 1.0} if number == 1 else {"text": 1.0, "align": 1.0}
        self.stage = replace(
            run.stage,
            losses=losses,
            kl=None,
            gradient_accumulation_steps=1,
            gradient_checkpointing=False,
        )
        self.precision = "bf16"
        self.accelerator = Accelerator(mixed_precision=self.precision)
        self.model, self.features = _with_random_weights(run.system, self.accelerator.device)
        groups = choose_trainable(self.model, self.stage.learning_rates)
        self.model.to(self.accelerator.device)  # adapters, too
        self.liger_loss = processes.uses_liger(self.stage.liger_loss, self.accelerator.device)
        self.losses = build_losses(self.model, self.stage.losses, align_loss=self.stage.align_loss)
        self.wrapped, self.optimizer = self.accelerator.prepare(
            self.model, optimizer.make_optimizer(self.stage, groups)
        )
        self.model.train()


def _with_random_weights(
    system: SystemConfig, device: torch.device
) -> tuple[AnyToAny, dict[str, tuple[int, int]]]:
    """The system without encoders, and the shapes of their features; its decoders are shapes
    alone."""
    from transformers import AutoModelForCausalLM

    with skip_weights():
        meta = models.build(system, dtype=torch.bfloat16, device="meta")
    of = meta.llm.model.config
    if device.type != "cuda":
        of.update({**NARROW, "layer_types": of.layer_types[: NARROW["num_hidden_layers"]]})
    with device:
        real = AutoModelForCausalLM.from_config(
            of, dtype=torch.bfloat16, attn_implementation=system.llm.attention
        )
    llm = LanguageModel(system.llm, real, meta.llm.tokenizer)
    encoders: Any = dict(meta.encoders.items())
    model = AnyToAny(system, llm, encoders, meta.decoders)
    model.encoders = nn.ModuleDict()
    return model.to(device), {key: encoder.feature_shape for key, encoder in encoders.items()}


def _batch(model: AnyToAny, features: dict[str, tuple[int, int]], *, speaks: bool) -> Batch:
    """Conversations of equal length, each with a picture to look at; if it `speaks`, every other
    one with a picture that is made. The second half of each is supervised."""
    torch.manual_seed(0)
    length = POSITIONS // CONVERSATIONS
    starts = torch.arange(0, POSITIONS, length)
    tokens = model.llm.tokens
    ids = torch.randint(tokens.vocab_size, (POSITIONS,))
    inputs = {key: InputMedia(torch.zeros(0, dtype=torch.long)) for key in model.num_input_tokens}
    outputs = {
        key: OutputMedia(torch.zeros(0, width, dtype=torch.long))
        for key, width in model.num_signal_tokens.items()
    }
    seen = (starts[:, None] + 8 + torch.arange(model.num_input_tokens["image"])).flatten()
    ids[seen] = tokens.placeholder_id
    inputs["image"] = InputMedia(seen, features=torch.randn(CONVERSATIONS, *features["image"]))
    if speaks:
        run = torch.tensor(tokens.signal_ids("image"))
        made = starts[::2, None] + length - len(run) + torch.arange(len(run))
        ids[made] = run
        masks = model.decoders["image"].masks.values()
        projection: Any = model.output_projections["image"]
        targets = {
            name: torch.ones(len(made), *shape) if name in masks else torch.randn(len(made), *shape)
            for name, shape in projection.condition_shapes.items()
        }
        outputs["image"] = OutputMedia(made, targets=targets)
    supervised = (starts[:, None] + length // 2 + torch.arange(length // 2 - 40)).flatten()
    return Batch(
        ids=ids[None],
        mask=None,
        positions=torch.arange(length).repeat(CONVERSATIONS)[None],
        target_indices=supervised,
        labels=ids[supervised + 1],
        first_tokens=torch.arange(0, len(supervised), length // 2 - 40),
        inputs=inputs,
        outputs=outputs,
        seq_lens=(length,) * CONVERSATIONS,
    )


def stage_1(options: Options) -> Iterator[Row]:
    yield from _rows("stage 1", 1, options)


def stage_3(options: Options) -> Iterator[Row]:
    yield from _rows("stage 3", 3, options)


def _rows(name: str, number: int, options: Options) -> Iterator[Row]:
    stage = Large(number)
    device = stage.accelerator.device
    measured = device.type == "cuda"
    batch = _batch(stage.model, stage.features, speaks=number == 3).to(device)
    bare = Bare(stage, [batch])
    timing = timed(lambda: stage.step(StepData([batch])), bare.steps, options)
    floor, least = (FLOOR, LEAST) if measured else (None, None)
    unmeasured = "" if measured else f"; on a GPU at most {FLOOR}"
    yield Row(f"{name}: step / bare", timing.ratio, floor, detail=f"{timing}{unmeasured}")
    rate = POSITIONS / statistics.median(timing.ours)
    unmeasured = "" if measured else f"on a GPU at least {LEAST:,}"
    yield Row(f"{name}: tokens a second", rate, least, "at least", "tokens/s", unmeasured)
    adapters = {id(weight) for _, weight in stage.model.llm.lora_parameters()}
    weights = stage.model.llm.model.parameters()
    size = sum(weight.numel() for weight in weights if id(weight) not in adapters)
    yield Row(f"{name}: arithmetic", 4 * size * rate / 1e12, unit="TFLOP/s", detail=f"{size:,}")
    if measured:
        most = torch.cuda.max_memory_allocated() / 1e9
        yield Row(f"{name}: memory", most, unit="GB", detail=torch.cuda.get_device_name())


if __name__ == "__main__":
    sys.exit(pairs.main(__doc__, {"stage-1": stage_1, "stage-3": stage_3}))

"""A shipped stage of mini, set up as `mmllm train` does and ready to take single steps."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from mmllm import config as configs
from mmllm import losses
from mmllm import model as models
from mmllm.config import StageConfig
from mmllm.data.batch import Batch
from mmllm.data.mixture import Mixture
from mmllm.kernels import allocator
from mmllm.projections.input import LinearConfig
from mmllm.training import optimizer, precompute, processes, trainer
from mmllm.training.feed import StepData, TrainingStepDataset, open_sources
from mmllm.training.trainable import choose_trainable

MINI = {
    1: "configs/mini/1_encoder_alignment.yaml",
    2: "configs/mini/2_decoder_alignment.yaml",
    3: "configs/mini/3_instruction_tuning.yaml",
}


class Stage:
    """Stage `number` of mini from untrained projections; `changes` to its keys. Features and
    captions are kept in a folder of its own and computed when a batch first asks. `encoders`
    replace mini's, each with a linear projection."""

    def __init__(
        self, number: int, *, encoders: Mapping[str, Any] | None = None, **changes: Any
    ) -> None:
        allocator.keep_freed_memory()
        run = configs.load_run(Path(__file__).parents[1] / MINI[number])
        if encoders is not None:
            linear = dict.fromkeys(encoders, LinearConfig())
            system = replace(run.system, encoders=encoders, input_projections=linear)
            run = replace(run, system=system)
        self.folder = tempfile.TemporaryDirectory()
        changes = {"cache": self.folder.name, "prealign": None, "realign": None, **changes}
        self.stage: StageConfig = replace(run.stage, **changes)
        self.precision = processes.choose_precision(self.stage.precision)
        self.accelerator = Accelerator(
            mixed_precision=self.precision, kwargs_handlers=[processes.REPLICAS]
        )
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        self.model = models.build(run.system, dtype=dtype, device=str(self.accelerator.device))
        self.optimizer: Any = optimizer.make_optimizer(
            self.stage, choose_trainable(self.model, self.stage.learning_rates)
        )
        self.liger_loss = processes.uses_liger(self.stage.liger_loss, self.accelerator.device)
        self.losses = losses.build_losses(
            self.model, self.stage.losses, align_loss=self.stage.align_loss
        )
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.model.train()
        self.feed = self.feed_of()

    def feed_of(self, **changes: Any) -> TrainingStepDataset:
        """Another feed for the same model; `changes` to keys of the stage."""
        stage = replace(self.stage, **changes)
        return TrainingStepDataset(
            self.model.renderer,
            self.model.batch_layout,
            Mixture(open_sources(stage.data, "stage.data"), stage.seed),
            precompute.build_feature_cache(self.model, stage),
            stage,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            pin_memory=self.model.device.type == "cuda",
        )

    def step(self, data: StepData) -> None:
        """One step of training, its losses read."""
        found = trainer.training_step(
            self.accelerator,
            self.wrapped,
            self.optimizer,
            data,
            self.losses,
            self.stage.max_grad_norm,
            liger_loss=self.liger_loss,
        )
        found()

    def steps(self, feed: TrainingStepDataset, numbers: Iterable[int]) -> None:
        """What the loop does for these steps, from reading on."""
        for number in numbers:
            self.step(feed[number])

    def ready(self, feed: TrainingStepDataset, numbers: Iterable[int]) -> list[Batch]:
        """The batches of these steps; what they ask of frozen parts lies on disk from now on."""
        found = [micro for number in numbers for micro in feed[number].microbatches]
        if feed.cache.store:
            feed.cache.store.flush()
        return found


class Bare:
    """The arithmetic of the same steps and nothing around it: the frozen LLM forward and backward
    on embeddings that require a gradient, the words' head at supervised positions; then the
    trained modules alone, on tensors that lie ready."""

    def __init__(self, stage: Stage, batches: list[Batch]):
        self.stage, self.model = stage, stage.model
        self.batches = batches
        with torch.no_grad():
            self.embeds = [self.model.embed(batch).to(self._dtype) for batch in batches]
            self.signals = [self.model.signals(batch) for batch in batches]

    @property
    def _dtype(self) -> torch.dtype:
        return self.model.llm.embedding.weight.dtype

    def steps(self) -> None:
        for batch, embeds, signals in zip(self.batches, self.embeds, self.signals, strict=True):
            with self.stage.accelerator.autocast():
                loss = self._language(batch, embeds.requires_grad_())
            loss.backward()
            embeds.grad = None
            with self.stage.accelerator.autocast():
                losses_of_modules = list(self._modules(batch, signals))
            for loss in losses_of_modules:
                loss.backward()
        self.model.zero_grad()

    def _language(self, batch: Batch, embeds: Tensor) -> Tensor:
        llm = self.model.llm
        hidden = llm(
            embeds,
            mask=batch.mask,
            positions=batch.positions,
            prefix_len=batch.prefix_len,
            seq_lens=batch.seq_lens,
        )
        head = llm.model.get_output_embeddings()
        logits = head(hidden.flatten(0, 1)[batch.target_indices]).float()
        return F.cross_entropy(logits, batch.labels.clamp_max(logits.shape[1] - 1))

    def _modules(self, batch: Batch, signals: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """A scalar for each trained module that the batch uses."""
        model = self.model
        for key, media in batch.inputs.items():
            if len(media.token_indices) and _trains(model.input_projections[key]):
                yield model.project(key, media).float().sum()
        if not self.stage.stage.losses.get("align"):
            return
        if model.llm.signal_embeddings.requires_grad:
            yield model.llm.embed(batch.ids).float().sum()
        for key, media in batch.outputs.items():
            if len(media.token_indices):
                condition = model.output_projections[key](signals[key])
                masks = model.decoders[key].masks
                yield losses.alignment_distance(
                    condition, media.targets, masks, self.stage.stage.align_loss
                )


def _trains(module: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())

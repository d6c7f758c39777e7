"""Is training as fast as its arithmetic? Steps of mini's stages against the same work, bare.

    python benchmarks/training.py                      # all bars
    python benchmarks/training.py stage-1 --pairs 3    # one of them, quickly

Needs `mmllm assets fetch`. The language model is the real SmolLM2-135M, features and captions come
from mini's real encoders and decoders.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import pairs
import torch
from pairs import Options, Row, timed
from stages import Bare, Stage

from mmllm.data.batch import Batch
from mmllm.data.mixture import LengthGroups
from mmllm.kernels.backend import Backend, use_kernels
from mmllm.training.feed import TrainingStepDataset


def stage_1(options: Options) -> Iterator[Row]:
    yield from _against_the_floor("stage 1: step / floor", 1, options)


def stage_2(options: Options) -> Iterator[Row]:
    yield from _against_the_floor("stage 2: step / floor", 2, options)


def _against_the_floor(name: str, number: int, options: Options) -> Iterator[Row]:
    """The whole step from the cache: reading, rendering, packing, forward, backward, optimiser."""
    steps = range(2)
    stage = Stage(number, pack=True)
    floor = Bare(stage, stage.ready(stage.feed, steps))
    timing = timed(lambda: stage.steps(stage.feed, steps), floor.steps, options)
    yield Row(name, timing.ratio, 1.10, detail=str(timing))


def denoising(options: Options) -> Iterator[Row]:
    """Stage 2 with its decoders' own loss; its parts: the floor above, and the decoders forward and
    backward on conditions that lie ready."""
    steps = range(1)
    losses = {"text": 1.0, "align": 1.0, "denoise": 0.1}
    stage = Stage(2, pack=True, losses=losses)
    batches = stage.ready(stage.feed, steps)
    floor = Bare(stage, batches)
    decoders = [part for batch in batches for part in _decoder_parts(stage, batch)]

    def bare() -> None:
        floor.steps()
        for decoder, arguments, condition in decoders:
            with stage.accelerator.autocast():
                loss = decoder.denoising_loss(condition, **arguments).mean()
            loss.backward()

    timing = timed(lambda: stage.steps(stage.feed, steps), bare, options)
    yield Row("stage 2 with denoising: step / parts", timing.ratio, 1.10, detail=str(timing))


def _decoder_parts(stage: Stage, batch: Batch) -> Iterator[tuple[Any, dict, dict]]:
    for key, media in batch.outputs.items():
        if media.latents is None:
            continue
        condition = {
            name: value.clone().requires_grad_(not name.endswith("mask"))
            for name, value in media.targets.items()
        }
        noise, times = torch.randn_like(media.latents), torch.rand(len(media.latents))
        arguments = {"latents": media.latents, "noise": noise, "times": times}
        yield stage.model.decoders[key], arguments, condition


def epochs(options: Options) -> Iterator[Row]:
    """A cached epoch of stage 1 against the same without a cache, less the time that is measured
    in its encoders and their preprocessing (decoding included)."""
    for key in ("pictures", "sounds", "clips"):
        stage = Stage(1, pack=True, batch_size=16)
        only = {key: stage.stage.data[key]}
        steps = range(3)
        cached, fresh = stage.feed_of(data=only), stage.feed_of(data=only, cache="none")
        stage.ready(cached, steps)
        clock = _Clock()
        for encoder in stage.model.encoders.values():
            encoder.forward = clock.around(encoder.forward)
            encoder.preprocess = clock.around(encoder.preprocess)

        def uncached(
            stage: Stage = stage, feed: TrainingStepDataset = fresh, clock: _Clock = clock
        ) -> float:
            before = clock.seconds
            stage.steps(feed, range(3))
            return clock.seconds - before

        timing = timed(lambda s=stage, f=cached: s.steps(f, range(3)), uncached, options)
        yield Row(f"epoch of {key}: cached / uncached less", timing.ratio, 1.05, detail=str(timing))
        whole = [net + aside for net, aside in zip(timing.other, timing.aside, strict=True)]
        faster = statistics.median(whole) / statistics.median(timing.ours)
        yield Row(f"epoch of {key}: faster by the cache", faster)


class _Clock:
    """Seconds spent in some functions."""

    seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed_function(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.seconds += time.perf_counter() - began

        return timed_function


def packing(options: Options) -> Iterator[Row]:
    """Real tokens a second on the mixture of stage 3, without its KL loss."""
    window = 50
    losses = {"text": 1.0, "align": 1.0}
    plain = {"pack": False, "length_window": 0, "gradient_accumulation_steps": 1}
    stage = Stage(3, losses=losses, kl=None, **plain)
    padded = stage.feed_of()
    grouped = stage.feed_of(length_window=window)
    assert isinstance(grouped.order, LengthGroups)
    # Of the window's steps, each of its own length, four that stand for all.
    size = stage.stage.batch_size
    by_length = sorted(
        range(window),
        key=lambda step: sum(len(grouped.render(d)) for d in grouped.order.batch(step, size)),
    )
    chosen = [by_length[window * eighth // 8] for eighth in (1, 3, 5, 7)]
    packs = stage.feed_of(pack=True)
    packed = _Steps(stage, packs, range(4))
    for name, bar, other in (
        ("length-grouped padding", 1.3, _Steps(stage, grouped, chosen, share=False)),
        ("ours, which shares prefixes", None, _Steps(stage, grouped, chosen)),
        ("random-order padding", None, _Steps(stage, padded, range(4), share=False)),
        ("the reference", None, _Steps(stage, packs, range(4), kernels="reference")),
    ):
        few = options if bar else replace(options, pairs=-(-options.pairs // 3))
        timing = timed(packed.take, other.take, few)
        ratio = packed.tokens / other.tokens / timing.ratio
        rates = [
            reader.tokens / statistics.median(times)
            for reader, times in ((packed, timing.ours), (other, timing.other))
        ]
        detail = f"{rates[0]:.0f} against {rates[1]:.0f} tokens/s, {few.pairs} pairs"
        yield Row(f"packed / {name}", ratio, bar, "at least", detail=detail)


class _Steps:
    """Some steps of one feed. Without `share`, a prefix is not computed once for all rows: how
    padded batches are usually run. `kernels`: those that the model uses."""

    def __init__(
        self,
        stage: Stage,
        feed: TrainingStepDataset,
        steps: Sequence[int],
        *,
        share: bool = True,
        kernels: Backend = "auto",
    ):
        self.stage, self.feed, self.numbers = stage, feed, steps
        self.share, self.kernels = share, kernels
        self.tokens = sum(map(_real_tokens, stage.ready(feed, steps)))

    def take(self) -> None:
        use_kernels(self.stage.model, self.kernels)
        for number in self.numbers:
            data = self.feed[number]
            if not self.share:
                data.microbatches = [replace(batch, prefix_len=0) for batch in data.microbatches]
            self.stage.step(data)


def _real_tokens(batch: Batch) -> int:
    """Positions of conversations, padding left out and shared prefixes counted for each."""
    if batch.seq_lens:
        conversations = len(batch.seq_lens) - (batch.padding > 0)
        return sum(batch.seq_lens) - batch.padding + conversations * batch.prefix_len
    assert batch.mask is not None
    return int(batch.mask.sum())


def processes(options: Options) -> Iterator[Row]:
    """Real tokens a second of two processes that train one model (gloo) against two that train one
    each, all with one thread, on as many conversations a process."""
    together, alone = _Pair(world=2), _Pair(world=1)
    with together, alone:
        timing = timed(together.steps, alone.steps, options)
    ratio = together.tokens / alone.tokens / timing.ratio
    yield Row("two processes together / alone", ratio, 0.95, "at least", detail=str(timing))


class _Pair:
    """Two processes that wait for a word and then take the same number of steps at once, on so
    many real `tokens` between them."""

    def __init__(self, *, world: int):
        context = multiprocessing.get_context("spawn")
        self.pipes, self.members = [], []
        port = _free_port()
        for rank in range(2):
            mine, its = context.Pipe()
            self.pipes.append(mine)
            arguments = (rank if world > 1 else 0, world, port, its)
            self.members.append(context.Process(target=_member, args=arguments, daemon=True))

    def __enter__(self) -> _Pair:
        for member in self.members:
            member.start()
        self.tokens = sum(self._wait())
        return self

    def __exit__(self, *_: object) -> None:
        for pipe, member in zip(self.pipes, self.members, strict=True):
            pipe.send(False)
            member.join()

    def steps(self) -> None:
        for pipe in self.pipes:
            pipe.send(True)
        self._wait()

    def _wait(self) -> list[Any]:
        return [pipe.recv() for pipe in self.pipes]


def _member(rank: int, world: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    if world > 1:
        os.environ |= {
            "ACCELERATE_USE_CPU": "true",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    stage = Stage(2, pack=True, batch_size=16 * world)
    assert stage.accelerator.num_processes == world
    steps = range(4)
    pipe.send(sum(map(_real_tokens, stage.ready(stage.feed, steps))))
    while pipe.recv():
        stage.steps(stage.feed, steps)
        pipe.send(True)
    stage.accelerator.end_training()


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


BARS = {
    "stage-1": stage_1,
    "stage-2": stage_2,
    "denoising": denoising,
    "epochs": epochs,
    "packing": packing,
    "processes": processes,
}

if __name__ == "__main__":
    sys.exit(pairs.main(__doc__, BARS))

"""Is the feature cache fast enough, and does memory stay flat as it grows?

    python benchmarks/cache.py                  # all bars
    python benchmarks/cache.py reading          # one of them

Needs `mmllm assets fetch`. `memory` writes 1.3 GB to the folder for temporary files.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import random
import sqlite3
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pairs
import torch
from pairs import Options, Row, timed
from torch import Tensor, nn

from mmllm.conversation import Medium
from mmllm.encoders.base import Features, ModalityEncoder
from mmllm.features import index as indices
from mmllm.features.index import Index
from mmllm.features.store import FeatureStore

ITEMS = (10_000, 1_000_000)
TOKENS, CHANNELS = 4, 64
"""Features of 1 KB in float32."""


def reading(options: Options) -> Iterator[Row]:
    """Items of stage 1 looked up from its cache, one process, against the items that its training
    step takes in the same time."""
    from stages import Stage

    stage = Stage(1, pack=True)
    steps = range(2)
    stage.ready(stage.feed, steps)
    # A feed that has written nothing itself finds everything through the index on disk.
    feed = stage.feed_of(cache_complete=True)
    draws = [draw for step in steps for draw in feed.order.batch(step, stage.stage.batch_size)]
    items = [feed.render(draw) for draw in draws]
    repeats = 50

    def look_up() -> None:
        for _ in range(repeats):
            for item in items:
                feed.cache.check(item)

    timing = timed(look_up, lambda: stage.steps(feed, steps), options)
    read, needed = (
        count * len(items) / statistics.median(times)
        for count, times in ((repeats, timing.ours), (1, timing.other))
    )
    detail = f"{read:,.0f} items/s against {needed:.0f} items/s"
    yield Row("cache read / step's need", repeats / timing.ratio, 10, "at least", detail=detail)


def index(options: Options) -> Iterator[Row]:
    """Look-ups of a million records in the index of the cache, against the same in SQLite."""
    names = [hashlib.sha256(number.to_bytes(8, "little")).hexdigest() for number in range(ITEMS[1])]
    asked = random.Random(0).choices(names, k=20_000)
    numbers = np.arange(len(names))
    with tempfile.TemporaryDirectory() as folder:
        fields = {"file": ("<u4", numbers * 0), "offset": ("<u8", numbers * 1024)}
        indices.write(Path(folder, "ours.index"), [indices.records(names, fields)], {})
        own = Index(Path(folder, "ours.index"))
        other = sqlite3.connect(Path(folder, "other.sqlite"))
        other.execute("create table records(name blob primary key, file, place) without rowid")
        rows = sorted((bytes.fromhex(name)[:16], 0, i * 1024) for i, name in enumerate(names))
        other.executemany("insert into records values (?, ?, ?)", rows)
        other.commit()

        def look_up() -> None:
            for name in asked:
                (record,) = own[name]
                assert record["offset"] % 1024 == 0

        def select() -> None:
            query = "select file, place from records where name = ?"
            for name in asked:
                ((_, place),) = other.execute(query, (bytes.fromhex(name)[:16],)).fetchall()
                assert place % 1024 == 0

        timing = timed(look_up, select, options)
        yield Row("index / SQLite", timing.ratio, 3)
        per_look_up = statistics.median(timing.ours) / len(asked) * 1e6
        yield Row("one look-up", per_look_up, unit="us", detail=str(timing))
        other.close()


def memory(options: Options) -> Iterator[Row]:
    """Private memory (USS) of a process that has trained for some steps, by the data's size."""
    found = {}
    for items in ITEMS:
        with tempfile.TemporaryDirectory() as folder:
            _in_a_process(_write, Path(folder), items)
            found[items] = _in_a_process(_train, Path(folder), 16)
    small, large = (found[items] for items in ITEMS)
    detail = f"{small / 2**20:.0f} MiB and {large / 2**20:.0f} MiB"
    yield Row("memory, 1 million items / 10 thousand", large / small, 1.05, detail=detail)


def _in_a_process(work, folder: Path, number: int) -> float:
    """The number that `work` sends from a new process."""
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    process = context.Process(target=work, args=(folder, number, its))
    process.start()
    its.close()
    found = mine.recv()
    process.join()
    return found


def _write(folder: Path, items: int, pipe: Connection) -> None:
    """A Parquet file of so many media, each of eight bytes that nobody decodes, and their
    features."""
    import pyarrow as pa
    from pyarrow import parquet

    media = [number.to_bytes(8, "little") for number in range(items)]
    captions = [f"thing number {number}" for number in range(items)]
    table = pa.table({"picture": pa.array(media, pa.binary()), "caption": captions})
    parquet.write_table(table, folder / "pairs.parquet", row_group_size=1000)
    namespace = _namespace(FeatureStore(folder / "cache"))
    rng = np.random.default_rng(0)
    for medium in media:
        values = rng.standard_normal((TOKENS, CHANNELS), dtype=np.float32)
        namespace[hashlib.sha256(medium).hexdigest()] = {"tokens": torch.from_numpy(values)}
    namespace.flush()
    _namespace(FeatureStore(folder / "cache"))  # the first to open it builds its index
    pipe.send(0.0)


def _namespace(store: FeatureStore):
    encoder = build(SyntheticConfig())
    return store.namespace("features", "encoders.image", encoder.fingerprint)


def _train(folder: Path, steps: int, pipe: Connection) -> None:
    import psutil
    from stages import Stage

    from mmllm import config as configs

    torch.set_num_threads(1)
    tree = {
        "type": "table",
        "file": str(folder / "pairs.parquet"),
        "embedded": "picture",
        "modality": "image",
        "direction": "understand",
        "prompts": ["What is this?"],
        "replies": ["{caption}"],
    }
    data = {"things": configs.parse_component("data", tree, "data.things")}
    stage = Stage(
        1,
        encoders={"image": SyntheticConfig()},
        learning_rates={"input_projections.*": 1e-3},
        data=data,
        pack=True,
        batch_size=4,
        cache=str(folder / "cache"),
        cache_complete=True,
        precision="bf16",  # not what each process measures to be faster
    )
    stage.steps(stage.feed, range(steps))
    pipe.send(psutil.Process().memory_full_info().uss)


@dataclass(frozen=True)
class SyntheticConfig:
    """An encoder whose features lie in the cache already."""


class SyntheticEncoder(ModalityEncoder):
    modality = "image"
    sample_shape = (TOKENS, CHANNELS)
    feature_shape = (TOKENS, CHANNELS)
    fingerprint = "synthetic"

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))

    def preprocess(self, medium: Medium) -> Tensor:
        raise AssertionError(f"{medium!r} is not in the cache")

    def forward(self, samples: Tensor) -> Features:
        raise AssertionError("everything is in the cache")


def build(config: SyntheticConfig) -> SyntheticEncoder:
    return SyntheticEncoder()


if __name__ == "__main__":
    sys.exit(pairs.main(__doc__, {"reading": reading, "index": index, "memory": memory}))

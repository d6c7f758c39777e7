"""`mmllm cache CONFIG --ray ADDRESS`: precompute frozen features on a cluster by Ray Data.

The driver lists what is missing, each thing once, by the item that names it first. Workers, each of
which builds the frozen parts once, run them over the items they are given and write shards of their
own into the folder, which all machines must see under the same path.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mmllm import config as configs
from mmllm import licences
from mmllm import model as models
from mmllm.config import RunConfig
from mmllm.data.protocol import DataSource
from mmllm.errors import ConfigError, MediaError
from mmllm.features.cache import FeatureCache
from mmllm.features.store import FeatureStore
from mmllm.training.feed import open_sources, render_item
from mmllm.training.precompute import build_feature_cache, with_writable_cache

logger = logging.getLogger(__name__)

BATCH = 512
"""Items that a worker processes before it writes a shard."""


def fill_cache_by_ray(run: RunConfig, address: str) -> FeatureStore:
    """Fill the feature cache of a stage on a Ray cluster, as `fill_cache`
    (mmllm.training.precompute).

    Args:
        run: the stage and its system.
        address: `local` starts Ray on this machine, `auto` joins the cluster that this machine
            belongs to; else the cluster's `host:port`.

    Raises:
        ConfigError: Ray is not installed, there is no cluster, or a licence is not accepted.
    """
    licences.check(run.system)
    try:
        import ray  # pyright: ignore[reportMissingImports] - an extra
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"--ray needs Ray Data, which cannot be imported ({error}); pip install 'mmllm[ray]'"
        ) from error
    tree = configs.dump(with_writable_cache(run))
    part = FrozenParts(tree, device="cpu")  # lists missing features; the GPUs are for the workers
    rows = list(part.missing())
    if not rows:
        return part.store
    try:
        ray.init(address, logging_level=logging.WARNING, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"--ray {address}: no cluster there: {error}") from error
    try:
        found = ray.cluster_resources()
        gpus = int(found.get("GPU", 0))
        batches = -(-len(rows) // BATCH)
        workers = max(min(gpus or int(found["CPU"]), batches), 1)
        logger.info("%d items for %d workers of %s", len(rows), workers, address)
        dataset = ray.data.from_items(rows, override_num_blocks=batches).map_batches(
            FrozenParts,
            fn_constructor_args=(tree,),
            batch_size=BATCH,
            concurrency=workers,
            num_cpus=1,
            num_gpus=1 if gpus else 0,
        )
        for row in dataset.iter_rows():
            logger.warning("cannot be read: %s: %s", row["medium"], row["error"])
    finally:
        ray.shutdown()
    part.store.refresh()
    part.store.index()
    return part.store


class FrozenParts:
    """The frozen parts of a run in one process. Called by Ray Data with a batch of rows."""

    def __init__(self, tree: dict[str, Any], device: str | None = None):
        run = configs.parse_run(tree)
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = models.build(run.system, dtype=torch.bfloat16, device=chosen)
        self.cache: FeatureCache = build_feature_cache(self.model, run.stage)
        assert self.cache.store is not None
        self.store = self.cache.store
        sets = {"": run.stage.data}
        if run.stage.validation:
            sets["validation."] = run.stage.validation.data
        self.sources: dict[str, DataSource] = {
            f"{where}{name}": source
            for where, data in sets.items()
            for name, source in open_sources(data, f"stage.{where}data").items()
        }

    def missing(self) -> Iterator[dict[str, Any]]:
        """Yield rows {source, index, things}: features that the cache lacks, at their first use."""
        seen: set[str] = set()
        for name, source in self.sources.items():
            for index in range(len(source)):
                try:
                    things = self.cache.missing(render_item(self.model.renderer, source, index))
                except MediaError as error:
                    logger.warning("cannot be used: %s/%s: %s", name, source.name(index), error)
                    continue
                new = sorted(set(things) - seen)
                if new:
                    yield {"source": name, "index": index, "things": new}
                    seen.update(new)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """Compute the features of some rows; return {medium, error} of unreadable media."""
        named = zip(batch["source"], batch["index"], strict=True)
        items = (
            render_item(self.model.renderer, self.sources[name], int(index))
            for name, index in named
        )
        only = {thing for things in batch["things"] for thing in things}
        bad = self.cache.precompute(items, progress=False, only=only)
        return {"medium": [name for name, _ in bad], "error": [error for _, error in bad]}

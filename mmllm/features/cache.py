"""A cache of the outputs of frozen encoders and decoders: features, caption embeddings, latents.

They are the same in every epoch. `precompute` computes them in batches before training; a batch
then only looks them up, in memory or in a folder that outlives the run and that many processes
share (mmllm.features.store).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Container, Iterable, Iterator, MutableMapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from tqdm import tqdm

from mmllm.conversation import Medium
from mmllm.data.rendering import Rendered
from mmllm.errors import MediaError
from mmllm.features.store import DamagedShardError, FeatureStore, FeatureTensors, Namespace
from mmllm.kernels.devices import to_device
from mmllm.media import Embedded
from mmllm.model import AnyToAny

logger = logging.getLogger(__name__)

_BATCH = 32
FEATURES, CONDITIONS, LATENTS = "features", "conditions", "latents"


class DeviceRequired(Exception):
    """Raised in a data worker, a forked process that cannot use an accelerator, for what has to be
    computed by a frozen part."""


class FeatureCache:
    """A FeatureProvider for `collate` (mmllm.data.batch) over a model's encoders and decoders.

    `store`: a folder on disk; None keeps all in memory. With `enabled` False nothing is kept:
    samples go through the encoders in every step. `denoise`: whether latents are wanted.
    """

    def __init__(
        self,
        model: AnyToAny,
        *,
        enabled: bool = True,
        denoise: bool = False,
        store: FeatureStore | None = None,
    ):
        self.model = model
        self.enabled = enabled
        self.denoise = denoise
        self.store = store
        self._rooms: dict[tuple[str, str], MutableMapping[str, FeatureTensors] | Namespace] = {}
        self._samples: dict[tuple[str, str], Tensor] = {}

    def input_media(self, key: str, media: Sequence[Medium]) -> dict[str, Tensor | None]:
        """See FeatureProvider."""
        if not self.enabled:
            names = [(key, self._name(medium)) for medium in media]
            samples = [self._take_sample(n, m) for n, m in zip(names, media, strict=True)]
            return {"samples": torch.stack(samples)}
        names = [self._name(medium) for medium in media]
        found = self._entries(FEATURES, key, names, lambda: self._encode(key, media))
        masks = [entry["mask"] for entry in found if "mask" in entry]
        return {
            "features": torch.stack([entry["tokens"] for entry in found]),
            "feature_mask": torch.stack(masks) if masks else None,
        }

    def targets(self, key: str, media: Sequence[Medium]) -> dict[str, Tensor]:
        """See FeatureProvider. Raises MediaError for a medium without a caption."""
        captions = [_caption(medium) for medium in media]
        names = [_hash(caption) for caption in captions]
        found = self._entries(CONDITIONS, key, names, lambda: self._embed(key, captions))
        return {name: torch.stack([entry[name] for entry in found]) for name in found[0]}

    def latents(self, key: str, media: Sequence[Medium]) -> Tensor | None:
        """See FeatureProvider. A batch in which a medium has no data has no denoising loss."""
        if not self.denoise or not all(medium.has_data for medium in media):
            return None
        decoder, room = self.model.decoders[key], self._room(LATENTS, key)
        names = [self._name(medium) for medium in media]

        def compute() -> None:
            for name, medium in zip(names, media, strict=True):
                if name not in room:
                    self._may_compute(LATENTS, key, repr(medium))
                    latents = decoder.encode_media(decoder.preprocess(medium)[None])[0]
                    room[name] = {"latents": latents.cpu().clone()}

        found = self._entries(LATENTS, key, names, compute)
        return torch.stack([entry["latents"] for entry in found])

    def check(self, item: Rendered) -> None:
        """Look up everything that a batch with this item will ask; raises MediaError."""
        for place in item.inputs:
            if self.enabled:
                self.input_media(place.key, [place.medium])
            else:  # read once: the batch takes what was read here
                name = (place.key, self._name(place.medium))
                self._samples[name] = self._take_sample(name, place.medium)
        for place in item.outputs:
            self.targets(place.key, [place.medium])
            self.latents(place.key, [place.medium])

    def precompute(
        self,
        items: Iterable[Rendered],
        *,
        progress: bool = True,
        part: tuple[int, int] = (0, 1),
        only: Container[str] | None = None,
    ) -> list[tuple[str, str]]:
        """Run the frozen parts once over every distinct medium and caption of `items`.

        `part` (i, n): only every n-th of what is missing, beginning with the i-th, so that n
        processes share the work. `only`: nothing but these things, by their names in `missing`.
        Returns (name, error) of the media that cannot be read.
        """
        bad: list[tuple[str, str]] = []
        if not self.enabled:
            return bad
        media: dict[str, tuple[str, Medium]] = {}
        shown: dict[str, tuple[str, Medium]] = {}
        captions: dict[str, tuple[str, str]] = {}
        for item in items:
            for kind, key, medium in self._asked(item):
                try:
                    thing = self._missing(kind, key, medium)
                except MediaError as error:
                    bad.append((repr(medium), str(error)))
                    continue
                if thing is None or (only is not None and thing not in only):
                    continue
                if kind == CONDITIONS:
                    captions.setdefault(thing, (key, _caption(medium)))
                else:
                    wanted = media if kind == FEATURES else shown
                    wanted.setdefault(thing, (key, medium))
        first, step = part
        encoded, drawn = list(media.values())[first::step], list(shown.values())[first::step]
        said = list(captions.values())[first::step]
        with tqdm(
            total=len(encoded) + len(drawn) + len(said),
            desc="frozen parts",
            unit="item",
            disable=not progress,
            leave=False,
        ) as bar:
            for key, group in _grouped(encoded):
                bad += self._encode(key, group, skip_bad=True, tick=bar.update)
            for key, group in _grouped(said):
                self._embed(key, group, tick=bar.update)
                if not self.denoise:  # so that one pipeline at a time is in memory
                    self.model.decoders[key].release()
            for key, medium in drawn:
                try:
                    self.latents(key, [medium])
                except MediaError as error:
                    bad.append((repr(medium), str(error)))
                bar.update()
        if self.store:
            self.store.flush()
        return bad

    def missing(self, item: Rendered) -> list[str]:
        """Names of what an item asks of the frozen parts and the rooms lack; media that cannot be
        read are named by their kind alone."""
        found = []
        for kind, key, medium in self._asked(item):
            try:
                thing = self._missing(kind, key, medium)
            except MediaError:
                thing = f"{kind}/{key}/{medium!r}"
            if thing is not None:
                found.append(thing)
        return found

    def _asked(self, item: Rendered) -> Iterator[tuple[str, str, Medium]]:
        """(kind, key, medium) for each answer that a batch with this item takes."""
        for place in item.inputs:
            yield FEATURES, place.key, place.medium
        for place in item.outputs:
            yield CONDITIONS, place.key, place.medium
            if self.denoise and place.medium.has_data:
                yield LATENTS, place.key, place.medium

    def _missing(self, kind: str, key: str, medium: Medium) -> str | None:
        """The name of one such answer, or None if it is there. Raises MediaError."""
        name = _hash(_caption(medium)) if kind == CONDITIONS else self._name(medium)
        return None if name in self._room(kind, key) else f"{kind}/{key}/{name}"

    @torch.no_grad()
    def _encode(
        self,
        key: str,
        media: Sequence[Medium],
        *,
        skip_bad: bool = False,
        tick: Callable[[int], object] = lambda _: None,
    ) -> list[tuple[str, str]]:
        """Fill in features that are missing; with `skip_bad`, unreadable media are returned."""
        room = self._room(FEATURES, key)
        missing = {name: m for m in media if (name := self._name(m)) not in room}
        bad: list[tuple[str, str]] = []
        encoder = self.model.encoders[key]
        names = list(missing)
        for start in range(0, len(names), _BATCH):
            samples, kept = [], []
            for name in names[start : start + _BATCH]:
                self._may_compute(FEATURES, key, repr(missing[name]))
                try:
                    samples.append(encoder.preprocess(missing[name]))  # pyright: ignore
                    kept.append(name)
                except MediaError as error:
                    if not skip_bad:
                        raise
                    bad.append((repr(missing[name]), str(error)))
            if samples:
                features = encoder(to_device(torch.stack(samples), self.model.device))
                found = {"tokens": features.tokens.float().cpu()}
                if features.mask is not None:
                    found["mask"] = features.mask.cpu()
                for row, name in enumerate(kept):
                    room[name] = {entry: value[row].clone() for entry, value in found.items()}
            tick(len(names[start : start + _BATCH]))
        return bad

    @torch.no_grad()
    def _embed(
        self, key: str, captions: Sequence[str], *, tick: Callable[[int], object] = lambda _: None
    ) -> None:
        room = self._room(CONDITIONS, key)
        missing = [c for c in dict.fromkeys(captions) if _hash(c) not in room]
        for start in range(0, len(missing), _BATCH):
            group = missing[start : start + _BATCH]
            self._may_compute(CONDITIONS, key, repr(group[0]))
            condition = self.model.decoders[key].encode_captions(group)
            found = {name: value.float().cpu() for name, value in condition.items()}
            for row, caption in enumerate(group):
                room[_hash(caption)] = {name: value[row].clone() for name, value in found.items()}
            tick(len(group))

    def _entries(
        self, kind: str, key: str, names: Sequence[str], compute: Callable[[], object]
    ) -> list[FeatureTensors]:
        """Look up what `compute` fills in where it is missing. What the disk has damaged counts as
        missing; in a complete cache, where nothing may be computed, it raises CacheError."""
        room = self._room(kind, key)
        while True:
            compute()
            try:
                return [room[name] for name in names]
            except DamagedShardError:  # its shard is not read again, so this ends
                if self.store is None or self.store.complete:
                    raise

    def _room(self, kind: str, key: str) -> MutableMapping[str, FeatureTensors] | Namespace:
        if (kind, key) not in self._rooms:
            self._rooms[kind, key] = (
                self.store.namespace(kind, *self._part(kind, key)) if self.store else {}
            )
        return self._rooms[kind, key]

    def _part(self, kind: str, key: str) -> tuple[str, str]:
        """What a frozen part is called, and its fingerprint."""
        part = (self.model.encoders if kind == FEATURES else self.model.decoders)[key]
        room = "encoders" if kind == FEATURES else "decoders"
        return f"{room}.{key}", str(part.fingerprint)

    def _may_compute(self, kind: str, key: str, what: str) -> None:
        if get_worker_info() is not None and self.model.device.type != "cpu":
            raise DeviceRequired
        if self.store and self.store.complete:
            raise self.store.missing(kind, *self._part(kind, key), what)

    def _name(self, medium: Medium) -> str:
        return self.store.key(medium) if self.store else medium_identity(medium)

    def _take_sample(self, name: tuple[str, str], medium: Medium) -> Tensor:
        """What `check` has read already, or the medium read now."""
        ready = self._samples.pop(name, None)
        encoder = self.model.encoders[name[0]]
        return encoder.preprocess(medium) if ready is None else ready  # pyright: ignore


def medium_identity(medium: Medium) -> str:
    """A name for what a medium holds: its path or place, or the hash of its data."""
    if isinstance(medium.source, str | Path | Embedded):
        return str(medium.source)
    data = medium.source if medium.source is not None else medium.to_numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def _hash(caption: str) -> str:
    return hashlib.sha256(caption.encode()).hexdigest()


def _caption(medium: Medium) -> str:
    if not medium.caption:
        raise MediaError(f"{medium!r}: an output medium needs a caption to be aligned with")
    return medium.caption


def _grouped(pairs: Iterable[tuple[str, object]]) -> list[tuple[str, list]]:
    groups: dict[str, list] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return list(groups.items())

"""A cache of the outputs of frozen encoders and decoders: features, caption embeddings, latents.

These outputs are the same in every epoch. `precompute` computes them in batches before training;
batches then look them up, in memory or in a folder that outlives the run and that many processes
can share (mmllm.features.store).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Iterator, MutableMapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from mmllm.conversation import Medium, Video
from mmllm.data.rendering import Rendered
from mmllm.errors import MediaError
from mmllm.features.namespace import DamagedShardError, FeatureTensors, Namespace
from mmllm.features.store import FeatureStore
from mmllm.kernels.devices import to_device
from mmllm.media import Embedded
from mmllm.model import AnyToAny
from mmllm.utils.hashing import sha256
from mmllm.utils.progress import progress_bar

logger = logging.getLogger(__name__)

_BATCH = 32
FEATURES, CONDITIONS, LATENTS = "features", "conditions", "latents"


class DeviceRequired(Exception):
    """A frozen component would have to run in a data worker: a forked process, in which an
    accelerator cannot be used."""


class FeatureCache:
    """A FeatureProvider (mmllm.data.protocol) that runs a model's frozen encoders and decoders and
    keeps their outputs.

    Args:
        model: the model whose frozen encoders and decoders are run.
        enabled: whether outputs are kept; if not, samples go through the encoders in every step.
        denoise: whether latents are needed, for the denoising loss.
        captions: whether embeddings of captions are needed; without them there are no targets.
        store: the cache on disk; None keeps all outputs in memory.
        dtype: of features and conditions as they are kept; what is returned is float32.
    """

    def __init__(
        self,
        model: AnyToAny,
        *,
        enabled: bool = True,
        denoise: bool = False,
        captions: bool = True,
        store: FeatureStore | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.model = model
        self.enabled = enabled
        self.denoise = denoise
        self.captions = captions
        self.store = store
        self.dtype = dtype
        self._namespaces: dict[
            tuple[str, str], MutableMapping[str, FeatureTensors] | Namespace
        ] = {}
        self._samples: dict[tuple[str, str], Tensor] = {}

    def input_media(self, key: str, media: Sequence[Medium]) -> dict[str, Tensor | None]:
        """See FeatureProvider."""
        if not self.enabled:
            names = [(key, self._name(medium)) for medium in media]
            samples = [self._take_sample(n, m) for n, m in zip(names, media, strict=True)]
            return {"samples": torch.stack(samples)}
        names = [self._name(medium) for medium in media]
        entries = self._entries(FEATURES, key, names, lambda: self._encode(key, media))
        masks = [entry["mask"] for entry in entries if "mask" in entry]
        return {
            "features": torch.stack([entry["tokens"] for entry in entries]).float(),
            "feature_mask": torch.stack(masks) if masks else None,
        }

    def targets(self, key: str, media: Sequence[Medium]) -> dict[str, Tensor]:
        """See FeatureProvider. Raises MediaError for a medium without a caption."""
        if not self.captions:
            return {}
        captions = [_caption(medium) for medium in media]
        names = [_hash(caption) for caption in captions]
        entries = self._entries(CONDITIONS, key, names, lambda: self._embed(key, captions))
        return {
            name: torch.stack([entry[name] for entry in entries]).float() for name in entries[0]
        }

    def latents(self, key: str, media: Sequence[Medium]) -> Tensor | None:
        """See FeatureProvider. A batch in which a medium has no data has no denoising loss."""
        if not self.denoise or not all(medium.has_data for medium in media):
            return None
        decoder, namespace = self.model.decoders[key], self._namespace(LATENTS, key)
        names = [self._name(medium) for medium in media]

        def compute() -> None:
            for name, medium in zip(names, media, strict=True):
                if name not in namespace:
                    self._may_compute(LATENTS, key, repr(medium))
                    latents = decoder.encode_media(decoder.preprocess(medium)[None])[0]
                    namespace[name] = {"latents": latents.cpu().clone()}

        entries = self._entries(LATENTS, key, names, compute)
        return torch.stack([entry["latents"] for entry in entries])

    def check(self, item: Rendered) -> None:
        """Compute or look up everything that a batch with this item needs.

        Raises:
            MediaError: one of its media cannot be read.
            DeviceRequired: in a data worker, where something is missing.
        """
        for span in item.inputs:
            if self.enabled:
                self.input_media(span.key, [span.medium])
            else:  # the batch takes the samples that were read here: media are read once
                name = (span.key, self._name(span.medium))
                self._samples[name] = self._take_sample(name, span.medium)
        for span in item.outputs:
            self.targets(span.key, [span.medium])
            self.latents(span.key, [span.medium])
            for medium in span.references:
                self.latents(span.key, [medium])

    def precompute(
        self,
        items: Iterable[Rendered],
        *,
        progress: bool = True,
        part: tuple[int, int] = (0, 1),
        only: Container[str] | None = None,
    ) -> list[tuple[str, str]]:
        """Run the frozen components in batches over every distinct medium and caption of `items`.

        Args:
            items: rendered conversations.
            progress: whether to show a progress bar.
            part: (i, n): compute every n-th missing entry, beginning with the i-th, to share the
                work among n processes.
            only: compute these entries only, named as by `missing`; None computes all.

        Returns:
            (name, error) of each medium that cannot be read.
        """
        bad: list[tuple[str, str]] = []
        if not self.enabled:
            return bad
        media: dict[str, tuple[str, Medium]] = {}
        latent_media: dict[str, tuple[str, Medium]] = {}
        captions: dict[str, tuple[str, str]] = {}
        for item in items:
            for kind, key, medium in self._requests(item):
                try:
                    entry_name = self._missing(kind, key, medium)
                except MediaError as error:
                    bad.append((repr(medium), str(error)))
                    continue
                if entry_name is None or (only is not None and entry_name not in only):
                    continue
                if kind == CONDITIONS:
                    captions.setdefault(entry_name, (key, _caption(medium)))
                else:
                    pending = media if kind == FEATURES else latent_media
                    pending.setdefault(entry_name, (key, medium))
        first, step = part
        to_encode = list(media.values())[first::step]
        to_latents = list(latent_media.values())[first::step]
        to_embed = list(captions.values())[first::step]
        total = len(to_encode) + len(to_latents) + len(to_embed)
        with progress_bar("frozen parts", total=total, unit="item", show=progress) as bar:
            for key, group in _grouped(to_encode):
                bad += self._encode(key, group, skip_bad=True, tick=bar.update)
            for key, group in _grouped(to_embed):
                self._embed(key, group, tick=bar.update)
                if not self.denoise:  # keep one pipeline in memory at a time
                    self.model.decoders[key].release()
            for key, medium in to_latents:
                try:
                    self.latents(key, [medium])
                except MediaError as error:
                    bad.append((repr(medium), str(error)))
                bar.update()
        if self.store:
            self.store.flush()
        return bad

    def missing(self, item: Rendered) -> list[str]:
        """Return the names of the entries that an item needs and that are not cached. A medium that
        cannot be read counts as missing."""
        names = []
        for kind, key, medium in self._requests(item):
            try:
                entry_name = self._missing(kind, key, medium)
            except MediaError:
                entry_name = f"{kind}/{key}/{medium!r}"
            if entry_name is not None:
                names.append(entry_name)
        return names

    def _requests(self, item: Rendered) -> Iterator[tuple[str, str, Medium]]:
        """Yield (kind, key, medium) of each entry that a batch with this item needs."""
        for span in item.inputs:
            yield FEATURES, span.key, span.medium
        for span in item.outputs:
            if self.captions:
                yield CONDITIONS, span.key, span.medium
            if self.denoise and span.medium.has_data:
                yield LATENTS, span.key, span.medium
            for medium in span.references if self.denoise else ():
                yield LATENTS, span.key, medium

    def _missing(self, kind: str, key: str, medium: Medium) -> str | None:
        """Return the name of an entry, or None if it is cached. Raises MediaError."""
        name = _hash(_caption(medium)) if kind == CONDITIONS else self._name(medium)
        return None if name in self._namespace(kind, key) else f"{kind}/{key}/{name}"

    @torch.no_grad()
    def _encode(
        self,
        key: str,
        media: Sequence[Medium],
        *,
        skip_bad: bool = False,
        tick: Callable[[int], object] = lambda _: None,
    ) -> list[tuple[str, str]]:
        """Compute the missing features of some media.

        Returns:
            (name, error) of each medium that cannot be read; without `skip_bad` the first one
            raises MediaError.
        """
        namespace = self._namespace(FEATURES, key)
        missing = {name: m for m in media if (name := self._name(m)) not in namespace}
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
                tensors = {"tokens": features.tokens.to(self.dtype).cpu()}
                if features.mask is not None:
                    tensors["mask"] = features.mask.cpu()
                for row, name in enumerate(kept):
                    namespace[name] = {
                        entry: value[row].clone() for entry, value in tensors.items()
                    }
            tick(len(names[start : start + _BATCH]))
        return bad

    @torch.no_grad()
    def _embed(
        self, key: str, captions: Sequence[str], *, tick: Callable[[int], object] = lambda _: None
    ) -> None:
        """Compute the missing caption embeddings of some captions."""
        namespace = self._namespace(CONDITIONS, key)
        missing = [c for c in dict.fromkeys(captions) if _hash(c) not in namespace]
        for start in range(0, len(missing), _BATCH):
            group = missing[start : start + _BATCH]
            self._may_compute(CONDITIONS, key, repr(group[0]))
            condition = self.model.decoders[key].encode_captions(group)
            tensors = {name: value.to(self.dtype).cpu() for name, value in condition.items()}
            for row, caption in enumerate(group):
                namespace[_hash(caption)] = {
                    name: value[row].clone() for name, value in tensors.items()
                }
            tick(len(group))

    def _entries(
        self, kind: str, key: str, names: Sequence[str], compute: Callable[[], object]
    ) -> list[FeatureTensors]:
        """Look up entries after `compute` has added the missing ones. Entries in a damaged shard
        count as missing; in a complete cache, where nothing may be computed, they raise CacheError.
        """
        namespace = self._namespace(kind, key)
        while True:
            compute()
            try:
                return [namespace[name] for name in names]
            except DamagedShardError:  # that shard is not read again, so the loop ends
                if self.store is None or self.store.complete:
                    raise

    def _namespace(self, kind: str, key: str) -> MutableMapping[str, FeatureTensors] | Namespace:
        if (kind, key) not in self._namespaces:
            self._namespaces[kind, key] = (
                self.store.namespace(kind, *self._part(kind, key)) if self.store else {}
            )
        return self._namespaces[kind, key]

    def _part(self, kind: str, key: str) -> tuple[str, str]:
        """Return the path of a frozen component in the system config, and its fingerprint, with the
        type of what is kept if it is not float32."""
        part = (self.model.encoders if kind == FEATURES else self.model.decoders)[key]
        group = "encoders" if kind == FEATURES else "decoders"
        rounded = self.dtype != torch.float32 and kind != LATENTS
        suffix = f"-{str(self.dtype).removeprefix('torch.')}" if rounded else ""
        fingerprint = part.caption_fingerprint if kind == CONDITIONS else part.fingerprint
        return f"{group}.{key}", f"{fingerprint}{suffix}"

    def _may_compute(self, kind: str, key: str, what: str) -> None:
        if get_worker_info() is not None and self.model.device.type != "cpu":
            raise DeviceRequired
        if self.store and self.store.complete:
            raise self.store.missing(kind, *self._part(kind, key), what)

    def _name(self, medium: Medium) -> str:
        return entry_name(medium, self.store)

    def _take_sample(self, name: tuple[str, str], medium: Medium) -> Tensor:
        """Return the samples that `check` has read already, or read the medium now."""
        ready = self._samples.pop(name, None)
        encoder = self.model.encoders[name[0]]
        return encoder.preprocess(medium) if ready is None else ready  # pyright: ignore


def entry_name(medium: Medium, store: FeatureStore | None) -> str:
    """Return the name of what is kept of a medium: of its content, its track and its budget.

    Args:
        medium: the medium.
        store: the cache on disk, which knows the contents of files; None: by path.

    Raises:
        MediaError: a file cannot be read.
    """
    name = store.key(medium) if store else _content_name(medium)
    track = medium.audio if isinstance(medium, Video) and medium.source is None else None
    if track is not None:
        name = sha256(f"{name}+{_content_name(track)}@{track.sample_rate}")
    return name if medium.max_tokens is None else f"{name}-{medium.max_tokens}"


def medium_identity(medium: Medium) -> str:
    """Return a name for the content of a medium, its path or the hash of its data, and for its
    budget of tokens."""
    return entry_name(medium, None)


def _content_name(medium: Medium) -> str:
    if isinstance(medium.source, str | Path | Embedded):
        return str(medium.source)
    data = medium.source if medium.source is not None else medium.to_numpy().tobytes()
    return sha256(data)


def _hash(caption: str) -> str:
    return sha256(caption)


def _caption(medium: Medium) -> str:
    if not medium.caption:
        raise MediaError(f"{medium!r}: an output medium needs a caption to be aligned with")
    return medium.caption


def _grouped(pairs: Iterable[tuple[str, object]]) -> list[tuple[str, list]]:
    groups: dict[str, list] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return list(groups.items())

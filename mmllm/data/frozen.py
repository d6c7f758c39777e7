"""What the frozen parts say of media and captions, computed once per item and remembered.

Encoder features, caption embeddings and latents give the same answer in every epoch; `warm` runs
them in batches before training, and a batch then only looks them up.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mmllm.conversation import Medium
from mmllm.data.rendering import Rendered
from mmllm.errors import MediaError
from mmllm.model import AnyToAny

logger = logging.getLogger(__name__)

_BATCH = 32


class FrozenWork:
    """A Lookup for `collate` (mmllm.data.batch) over a model's encoders and decoders.

    With `remember` False nothing is kept: samples go through the encoders in every step.
    `denoise`: whether latents are wanted.
    """

    def __init__(self, model: AnyToAny, *, remember: bool = True, denoise: bool = False):
        self.model = model
        self.remember = remember
        self.denoise = denoise
        self._features: dict[tuple[str, str], tuple[Tensor, Tensor | None]] = {}
        self._targets: dict[tuple[str, str], dict[str, Tensor]] = {}
        self._latents: dict[tuple[str, str], Tensor] = {}

    def input_media(self, key: str, media: Sequence[Medium]) -> dict[str, Tensor | None]:
        """See Lookup."""
        encoder = self.model.encoders[key]
        if not self.remember:
            return {"samples": torch.stack([encoder.preprocess(medium) for medium in media])}  # pyright: ignore
        self._encode(key, media)
        found = [self._features[key, identity(medium)] for medium in media]
        masks = [mask for _, mask in found if mask is not None]
        return {
            "features": torch.stack([tokens for tokens, _ in found]),
            "feature_mask": torch.stack(masks) if masks else None,
        }

    def targets(self, key: str, media: Sequence[Medium]) -> dict[str, Tensor]:
        """See Lookup. Raises MediaError for a medium without a caption."""
        captions = [_caption(medium) for medium in media]
        self._embed(key, captions)
        found = [self._targets[key, caption] for caption in captions]
        return {name: torch.stack([entry[name] for entry in found]) for name in found[0]}

    def latents(self, key: str, media: Sequence[Medium]) -> Tensor | None:
        """See Lookup. A batch in which a medium has no data has no denoising loss."""
        if not self.denoise or not all(medium.has_data for medium in media):
            return None
        decoder = self.model.decoders[key]
        for medium in media:
            if (key, identity(medium)) not in self._latents:
                samples = decoder.preprocess(medium)[None]
                self._latents[key, identity(medium)] = decoder.encode_media(samples)[0].clone()
        return torch.stack([self._latents[key, identity(medium)] for medium in media])

    def check(self, item: Rendered) -> None:
        """Look up everything that a batch with this item will ask; raises MediaError."""
        for place in item.inputs:
            self.input_media(place.key, [place.medium])
        for place in item.outputs:
            self.targets(place.key, [place.medium])
            self.latents(place.key, [place.medium])

    def warm(self, items: Iterable[Rendered], *, progress: bool = True) -> list[tuple[str, str]]:
        """Run the frozen parts once over every distinct medium and caption of `items`.

        Returns (name, error) of the media that cannot be read.
        """
        media: dict[tuple[str, str], tuple[str, Medium]] = {}
        captions: dict[tuple[str, str], None] = {}
        for item in items:
            for place in item.inputs:
                media.setdefault((place.key, identity(place.medium)), (place.key, place.medium))
            for place in item.outputs:
                captions.setdefault((place.key, _caption(place.medium)))
        bad: list[tuple[str, str]] = []
        if not self.remember:
            return bad
        with tqdm(
            total=len(media) + len(captions),
            desc="frozen parts",
            unit="item",
            disable=not progress,
            leave=False,
        ) as bar:
            for key, group in _grouped(media.values()):
                bad += self._encode(key, group, skip_bad=True, tick=bar.update)
            for key, group in _grouped(captions):
                self._embed(key, group, tick=bar.update)
        return bad

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
        missing = {identity(m): m for m in media if (key, identity(m)) not in self._features}
        bad: list[tuple[str, str]] = []
        encoder = self.model.encoders[key]
        names = list(missing)
        for start in range(0, len(names), _BATCH):
            samples, kept = [], []
            for name in names[start : start + _BATCH]:
                try:
                    samples.append(encoder.preprocess(missing[name]))  # pyright: ignore
                    kept.append(name)
                except MediaError as error:
                    if not skip_bad:
                        raise
                    bad.append((repr(missing[name]), str(error)))
            if samples:
                features = encoder(torch.stack(samples).to(self.model.device))
                for row, name in enumerate(kept):
                    mask = None if features.mask is None else features.mask[row].cpu().clone()
                    self._features[key, name] = (features.tokens[row].float().cpu().clone(), mask)
            tick(len(names[start : start + _BATCH]))
        return bad

    @torch.no_grad()
    def _embed(
        self, key: str, captions: Sequence[str], *, tick: Callable[[int], object] = lambda _: None
    ) -> None:
        missing = [c for c in dict.fromkeys(captions) if (key, c) not in self._targets]
        for start in range(0, len(missing), _BATCH):
            group = missing[start : start + _BATCH]
            condition = self.model.decoders[key].encode_captions(group)
            for row, caption in enumerate(group):
                self._targets[key, caption] = {
                    name: value[row].float().cpu().clone() for name, value in condition.items()
                }
            tick(len(group))


def identity(medium: Medium) -> str:
    """A name for what a medium holds: its path, or the hash of its data."""
    if isinstance(medium.source, str | Path):
        return str(medium.source)
    data = medium.source if medium.source is not None else medium.to_numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def _caption(medium: Medium) -> str:
    if not medium.caption:
        raise MediaError(f"{medium!r}: an output medium needs a caption to be aligned with")
    return medium.caption


def _grouped(pairs: Iterable[tuple[str, object]]) -> list[tuple[str, list]]:
    groups: dict[str, list] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return list(groups.items())

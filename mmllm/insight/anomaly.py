"""Anomalies of pictures, sounds and clips: how far a medium is from normal ones, and where.

Three views (Cao et al. 2023, arXiv:2311.02782, ask for the third):

- distance: the features of an encoder's middle stages, cell by cell, against those of normal media
  (a memory bank as in PatchCore, Roth et al. 2022);
- surprisal: -log p of a description of what is normal, given the medium (`Chat.score`);
- asking: the odds of yes to a question with the class, the normal standard or a normal reference.

Legend: M media, N normal ones, G groups of cells that are compared with one another only (the
frames of a clip, the bands of a sound), P cells of a group, C channels of all stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.conversation import Medium, Message, message
from mmllm.errors import ConfigError
from mmllm.insight.hooks import look
from mmllm.insight.sites import model_of

MAX_BANK = 4_096
"""Cells of a group that the bank holds at most; of more, evenly spaced ones."""
TOP_SHARE = 0.02
"""Share of the oddest cells whose mean distance is the score."""
_BATCH = 16


@dataclass(frozen=True)
class Anomaly:
    """How odd a medium is.

    Attributes:
        score: the mean distance of its oddest cells from the nearest normal ones.
        p_value: the share of normal media that are as odd (conformal): 0.01 means that one normal
            medium in a hundred is. At least 1 / (N + 1).
        map: distances where they are: float[h, w] of a picture, [time, frequency] of a sound,
            [frames, h, w] of a clip.
        surprisal: -log p of the description, if there is one.
    """

    score: float
    p_value: float
    map: Tensor
    surprisal: float | None = None


class AnomalyDetector:
    """Normal media of one kind, and what is compared with them.

    Args:
        chat: what `mmllm.load` gives.
        normal: N >= 2 normal media, all pictures, all sounds or all clips.
        stages: modules of the encoder whose outputs are compared, by their names in it; unless
            given, the middle ones of its longest chain of layers.
        describe: what all of them show; then the surprisal of it is measured, too.
        prompt: the question that `describe` answers.

    Raises:
        ConfigError: there are too few media, they have several modalities, the model cannot read
            them, or a stage does not exist.
    """

    def __init__(
        self,
        chat: Any,
        normal: Sequence[Medium],
        *,
        stages: Sequence[str] = (),
        describe: str | None = None,
        prompt: str = "What is this?",
    ):
        modalities = sorted({medium.modality for medium in normal})
        if len(normal) < 2 or len(modalities) != 1:
            raise ConfigError(
                "anomalies: expected two or more normal media of one modality, got "
                f"{len(normal)} of {', '.join(modalities) or 'none'}"
            )
        self._chat, self.modality = chat, modalities[0]
        self.describe, self.prompt = describe, prompt
        model = model_of(chat)
        if self.modality not in model.renderer.input_keys:
            raise ConfigError(f"anomalies: this model has no encoder of kind {self.modality}")
        self._key, _ = model.renderer.input_keys[self.modality]
        self._encoder: Any = model.encoders[self._key]
        self._encoder.load()
        self.stages = tuple(stages) or middle_stages(self._encoder)
        raw = self._stage_maps(normal)
        self._scales = [states.norm(dim=-3).mean() + 1e-6 for states in raw]
        cells, self._shape = self._cells(raw)
        self._bank = cells  # [N, G, P, C]
        own = [
            self._score(self._distances(cells[i : i + 1], torch.arange(len(cells)) != i))
            for i in range(len(cells))
        ]
        self._normal_scores = torch.cat(own)

    def score(self, media: Sequence[Medium]) -> list[Anomaly]:
        """Compare media with the normal ones.

        Args:
            media: of the same modality.

        Raises:
            ConfigError: one has another modality.
            MediaError: one cannot be read.
        """
        others = sorted({medium.modality for medium in media} - {self.modality})
        if others:
            raise ConfigError(f"anomalies: expected {self.modality}, got {', '.join(others)}")
        if not media:
            return []
        cells, _ = self._cells(self._stage_maps(media))
        distances = self._distances(cells, torch.ones(len(self._bank), dtype=torch.bool))
        scores = self._score(distances)
        found = []
        for medium, score, cell in zip(media, scores, distances, strict=True):
            as_odd = int((self._normal_scores >= score).sum())
            p_value = (1 + as_odd) / (1 + len(self._normal_scores))
            place = cell.view(self._shape)
            if self.modality == "audio":
                place = place.T  # [time, frequency]
            surprisal = None
            if self.describe is not None:
                surprisal = surprisal_of(self._chat, medium, self.describe, self.prompt)
            found.append(Anomaly(score.item(), p_value, place.squeeze(0), surprisal))
        return found

    def _stage_maps(self, media: Sequence[Medium]) -> list[Tensor]:
        """The outputs of the stages, float[M * frames, C, h, w] each."""
        names = [f"encoders.{self._key}.{stage}" for stage in self.stages]
        parts: list[list[Tensor]] = [[] for _ in names]
        for start in range(0, len(media), _BATCH):
            with look(self._chat, *names) as seen:
                self._encoder.encode(list(media[start : start + _BATCH]))
            for part, name in zip(parts, names, strict=True):
                part.append(_as_map(seen[name].float(), name))
        return [torch.cat(part) for part in parts]

    def _cells(self, maps: Sequence[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
        """Maps of all stages at one resolution -> float[M, G, P, C], and the shape of G * P."""
        height, width = (max(states.shape[axis] for states in maps) for axis in (2, 3))
        joined = torch.cat(
            [
                F.interpolate(
                    F.avg_pool2d(states, 3, 1, 1) / scale, (height, width), mode="bilinear"
                )
                for states, scale in zip(maps, self._scales, strict=True)
            ],
            dim=1,
        )  # [M * frames, C, h, w]
        if self.modality == "audio":  # [M, C, time, frequency]: a band is compared with itself
            return joined.permute(0, 3, 2, 1), (width, height)
        frames = self._encoder.num_frames or 1
        cells = joined.flatten(2).transpose(1, 2).unflatten(0, (-1, frames))
        return cells, (frames, height, width)

    def _distances(self, cells: Tensor, use: Tensor) -> Tensor:
        """float[M, G, P, C] -> the distance of each cell from the nearest in the bank, float[M, G,
        P]; `use` bool[N]: the normal media that are compared with."""
        bank = self._bank[use].transpose(0, 1).flatten(1, 2)  # [G, N * P, C]
        bank = bank[:, :: -(-bank.shape[1] // MAX_BANK)]
        by_group = cells.transpose(0, 1).flatten(1, 2)  # [G, M * P, C]
        nearest = torch.stack(
            [torch.cdist(x, y).amin(1) for x, y in zip(by_group, bank, strict=True)]
        )
        return nearest.unflatten(1, cells.shape[:1] + cells.shape[2:3]).transpose(0, 1)

    @staticmethod
    def _score(distances: Tensor) -> Tensor:
        """float[M, G, P] -> float[M]: the mean of the largest."""
        flat = distances.flatten(1)
        return flat.topk(max(1, round(TOP_SHARE * flat.shape[1])), dim=1).values.mean(1)


def middle_stages(encoder: Any) -> tuple[str, ...]:
    """Names of the modules at a third and at two thirds of the first chain of three layers or more.

    Args:
        encoder: the encoder, loaded.

    Raises:
        ConfigError: it has no such chain; its stages have to be named.
    """
    for name, module in encoder.named_modules():
        children = [child for child, _ in module.named_children()]
        if len(children) >= 3 and name.rpartition(".")[2] in ("blocks", "layers", "layer", "h"):
            middle = sorted({(len(children) - 1) // 3, 2 * (len(children) - 1) // 3})
            return tuple(f"{name}.{children[index]}" for index in middle)
    raise ConfigError(
        f"anomalies: {type(encoder).__name__} has no chain of layers; name its stages "
        "(`mmllm.insight.sites(chat)` lists them)"
    )


def surprisal_of(chat: Any, medium: Medium, text: str, prompt: str = "What is this?") -> float:
    """-log p of a text as the reply to a medium and a question.

    Args:
        chat: what `mmllm.load` gives, or any ChatModel with `score`.
        medium: the medium.
        text: the reply, such as "It is a dog."
        prompt: the question.
    """
    return -chat.score([message("user", medium, prompt)], [text])[0]


def question(
    medium: Medium,
    *,
    name: str | None = None,
    standard: str | None = None,
    reference: Medium | None = None,
) -> Message:
    """Ask whether a medium is abnormal as the paper does: the task alone, with the class, the
    normal standard, and a normal reference before it.

    Args:
        medium: what is asked about.
        name: the class, such as "a cable".
        standard: what a normal one is like.
        reference: a normal one.
    """
    parts: list[Any] = []
    if reference is not None:
        parts += ["This one is normal: ", reference]
    asked = f"Is this {name}" if name else "Is this normal"
    if standard is not None:
        parts.append(f"What is normal: {standard} ")
    return message("user", *parts, medium, f"{asked}? Answer yes or no.")


def odds_of_no(chat: Any, asked: Message) -> float:
    """log p(no) - log p(yes) of the reply to a `question`: larger is odder.

    Args:
        chat: what `mmllm.load` gives, or any ChatModel with `score`.
        asked: the question.
    """
    yes, no = chat.score([asked], ["Yes.", "No."])
    return no - yes


def _as_map(states: Tensor, name: str) -> Tensor:
    """float[M, C, h, w], or tokens float[M, L, C] of a square grid and others before it."""
    if states.ndim == 4:
        return states
    if states.ndim != 3:
        raise ConfigError(
            f"{name}: expected maps [M, C, h, w] or tokens [M, L, C], got {list(states.shape)}"
        )
    side = int(states.shape[1] ** 0.5)
    return states[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))

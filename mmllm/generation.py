"""Generation: ids and hidden states from the LLM, signal runs always complete, any batch at once.

A run that has begun is fed whole, in one forward pass: its K tokens and nothing else. In a batch,
rows take steps of different widths (one token, or a run); a step is as wide as its widest row and
the others are padded on the left with positions that nobody attends to. Every row draws from its
own generator, so a batch gives what single calls give.

A conversation that goes on is prefilled from where the engine left it: see Prefixes.

Legend: B rows, T positions, D width, K signal tokens, V text vocabulary, O outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmllm.conversation import Medium
from mmllm.data.batch import Batch, Lookup, collate
from mmllm.data.frozen import identity
from mmllm.data.rendering import Rendered
from mmllm.errors import ConfigError
from mmllm.model import AnyToAny

Choice = Literal["auto", "force", "forbid"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy. `max_media` bounds a reply's media. Text
    ends before the first of the `stop` strings (then `ids` hold the beginning of it, or all).
    Forced media come in the order in which `modalities` names them, at the latest at the end."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_media: int = 4
    stop: Sequence[str] = ()
    modalities: Mapping[str, Choice] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.max_media < 0:
            raise ConfigError("max_new_tokens must be at least 1 and max_media at least 0")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ConfigError(
                "temperature and top_k must not be negative, and top_p must lie in (0, 1]; got "
                f"{self.temperature}, {self.top_k}, {self.top_p}"
            )
        if self.repetition_penalty <= 0:
            raise ConfigError(f"repetition_penalty must be positive, got {self.repetition_penalty}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ConfigError(f"stop: expected a list of strings that are not empty: {self.stop!r}")
        for modality, choice in self.modalities.items():
            if choice not in ("auto", "force", "forbid"):
                raise ConfigError(
                    f"modalities[{modality!r}]: expected auto, force or forbid, got {choice!r}"
                )


@dataclass
class Run:
    """One complete signal run: its output key and its hidden states float[K, D]."""

    key: str
    states: Tensor


@dataclass
class Generated:
    """One row's answer. `pieces` holds token ids and runs in order; `finish` says why it ended;
    `cached`: positions of the prompt that an earlier turn had computed."""

    pieces: list[int | Run] = field(default_factory=list)
    finish: Literal["end", "length", "stop", ""] = ""
    cached: int = 0

    @property
    def ids(self) -> list[int]:
        """Text token ids, runs left out."""
        return [piece for piece in self.pieces if isinstance(piece, int)]

    @property
    def runs(self) -> list[Run]:
        return [piece for piece in self.pieces if isinstance(piece, Run)]


OnPiece = Callable[[int, "int | Run"], None]
"""Called with (row, piece) as soon as a token or a run is there; may raise to cancel."""


class _Row:
    """The constraints and the choices of one row."""

    def __init__(self, model: AnyToAny, sampling: Sampling, generator: torch.Generator):
        self.tokens = model.llm.tokens
        self.tokenizer = model.llm.tokenizer
        self.end_ids = sorted(model.llm.end_ids)
        self.sampling = sampling
        self.generator = generator
        self.answer = Generated()
        self.done = False
        self._seen: set[int] = set()
        self._stopped = False
        keys = model.renderer.output_keys
        for modality, choice in sampling.modalities.items():
            if modality not in keys and choice == "force":
                raise ConfigError(
                    f"modalities: cannot force {modality!r}; this model makes "
                    f"{', '.join(sorted(keys)) or 'text only'}"
                )
        choices = {key: sampling.modalities.get(modality, "auto") for modality, key in keys.items()}
        self.forbidden = {
            key for key in self.tokens.outputs if choices.get(key, "forbid") == "forbid"
        }
        self.owed = [keys[name] for name, wish in sampling.modalities.items() if wish == "force"]

    def choose(self, logits: Tensor) -> list[int]:
        """float[V + O] -> the ids to feed next: one token, a whole run, or nothing at the end."""
        row = self._pick(self._constrained(logits.float()))
        length = len(self.answer.ids) + 1
        ended = row in self.end_ids
        if self._stopped or ended or length > self.sampling.max_new_tokens:
            if self.owed:  # what was asked for comes before the end
                return self.tokens.run(self.owed[0])
            self.done = True
            self.answer.finish = "stop" if self._stopped else "end" if ended else "length"
            return []
        key = self.tokens.output_of_row(row)
        if key is not None:
            return self.tokens.run(key)
        self._seen.add(row)
        self.answer.pieces.append(row)
        self._stopped = self._stopped or self._spells_stop()
        return [row]

    def finish_run(self, key: str, states: Tensor) -> Run:
        """Note a run whose states have been computed."""
        run = Run(key, states)
        self.answer.pieces.append(run)
        if key in self.owed:
            self.owed.remove(key)
        return run

    def _spells_stop(self) -> bool:
        """Whether the text since the last run ends in tokens that spell a stop string."""
        if not self.sampling.stop:
            return False
        tail: list[int] = []
        most = max(len(stop.encode()) for stop in self.sampling.stop)  # a token is a byte or more
        for piece in reversed(self.answer.pieces):
            if isinstance(piece, Run) or len(tail) > most:
                break
            tail.insert(0, piece)
        text = spell(self.tokenizer, tail)
        return any(stop in text for stop in self.sampling.stop)

    def _constrained(self, logits: Tensor) -> Tensor:
        logits = logits.clone()
        full = len(self.answer.runs) >= self.sampling.max_media
        for key in self.tokens.outputs:
            if key in self.forbidden or full:
                logits[self.tokens.head_row(key)] = -torch.inf
        if self.sampling.repetition_penalty != 1 and self._seen:
            seen = torch.tensor(sorted(self._seen), device=logits.device)
            value = logits[seen]
            penalty = self.sampling.repetition_penalty
            logits[seen] = torch.where(value > 0, value / penalty, value * penalty)
        return logits

    def _pick(self, logits: Tensor) -> int:
        sampling = self.sampling
        if sampling.temperature == 0:
            return int(logits.argmax())
        logits = logits / sampling.temperature
        if sampling.top_k:
            least = logits.topk(min(sampling.top_k, len(logits))).values[-1]
            logits = logits.masked_fill(logits < least, -torch.inf)
        values, order = logits.softmax(-1).sort(descending=True)
        if sampling.top_p < 1:
            values = values.masked_fill(values.cumsum(-1) - values >= sampling.top_p, 0)
        drawn = torch.multinomial(values.cpu(), 1, generator=self.generator)
        return int(order[drawn.to(order.device)])


class Prefixes:
    """Key-value caches of the last conversations, so that a later turn, another try or an edited
    one computes only what is new, media included.

    `keep`: how many. A cache takes as much memory as its conversation's positions; one that goes
    on in another is dropped. Caches of models that forget (sliding windows, recurrent states)
    cannot be shortened and are not kept.
    """

    def __init__(self, keep: int = 4):
        self.num_kept = keep
        self._kept: list[tuple[list[Hashable], Any]] = []  # what was fed, its cache; newest last

    def longest(self, symbols: Sequence[Hashable]) -> tuple[int, Any]:
        """How many first positions a kept conversation shares, and a cache of just these (None: no
        position). One position at least is left to be computed."""
        best, found = 0, None
        for fed, cache in self._kept:
            shared = _shared(fed, symbols)
            if shared > best:
                best, found = shared, cache
        return best, None if found is None else _shortened(found, best)

    def keep(self, symbols: list[Hashable], cache: Any) -> None:
        """Remember what was fed (`symbols`) and its cache, which nobody may extend from now on."""
        if not cache.is_croppable or any(cache.is_sliding):
            return
        kept = [entry for entry in self._kept if entry[0] != symbols[: len(entry[0])]]
        self._kept = [*kept, (symbols, cache)][-self.num_kept :] if self.num_kept else []

    def clear(self) -> None:
        """Forget all, as is needed when weights change."""
        self._kept = []


def spell(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of token ids, exactly as they spell it."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@torch.inference_mode()
def generate(
    model: AnyToAny,
    prompts: Sequence[Rendered],
    lookup: Lookup,
    *,
    sampling: Sampling | Sequence[Sampling] = Sampling(),
    generators: Sequence[torch.Generator] | None = None,
    on_piece: OnPiece | None = None,
    prefixes: Prefixes | None = None,
) -> list[Generated]:
    """Answer B prompts, each rendered `for_reply`. One sampling and one generator per row.
    `prefixes` are used, and added to, where B is 1."""
    settings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    if generators is None:
        generators = [torch.Generator().manual_seed(0) for _ in prompts]
    rows = [
        _Row(model, setting, generator)
        for setting, generator in zip(settings, generators, strict=True)
    ]
    fed = _symbols(prompts[0]) if prefixes and len(prompts) == 1 else []
    known, cache = prefixes.longest(fed) if prefixes and fed else (0, None)
    if cache is None:
        hidden, mask, cache, next_position = _prefill(model, prompts, lookup)
    else:
        hidden, mask, next_position = _prefill_rest(model, prompts[0], lookup, known, cache)
        rows[0].answer.cached = known
    last = hidden[:, -1]  # [B, D]
    while True:
        logits = model.llm.head(last)
        steps = [[] if row.done else row.choose(logits[index]) for index, row in enumerate(rows)]
        if on_piece:
            for index, step in enumerate(steps):
                if len(step) == 1 and model.llm.tokens.output_of_id(step[0]) is None:
                    on_piece(index, step[0])
        if all(row.done for row in rows):
            if prefixes and fed:
                prefixes.keep(fed, cache)
            return [row.answer for row in rows]
        hidden, mask = _advance(model, steps, mask, cache, next_position)
        if fed:
            fed += steps[0]
        for index, step in enumerate(steps):
            next_position[index] += len(step)
            key = model.llm.tokens.output_of_id(step[0]) if step else None
            if key is not None:
                run = rows[index].finish_run(key, hidden[index, -len(step) :].clone())
                if on_piece:
                    on_piece(index, run)
        last = hidden[:, -1]


def _batch(model: AnyToAny, prompts: Sequence[Rendered], lookup: Lookup) -> Batch:
    """Prompts as the model embeds them, padded on the right; nothing is supervised."""
    return collate(
        prompts,
        lookup,
        input_widths=model.input_widths,
        output_widths=model.output_widths,
        pad_id=0,
        targets=False,
    ).to(model.device)


def _prefill(
    model: AnyToAny, prompts: Sequence[Rendered], lookup: Lookup
) -> tuple[Tensor, Tensor, Any, list[int]]:
    """Embed all prompts, padded on the left, and fill the cache."""
    batch = _batch(model, prompts, lookup)
    embeds = model.embed(batch)  # padded on the right: [B, T, D]
    assert batch.mask is not None
    lengths = [len(prompt) for prompt in prompts]
    width = max(lengths)
    for index, length in enumerate(lengths):  # decoding needs the last position on the right
        embeds[index] = embeds[index].roll(width - length, dims=0)
        batch.mask[index] = batch.mask[index].roll(width - length)
        batch.positions[index] = batch.positions[index].roll(width - length)
    cache = model.llm.new_cache()
    hidden = model.llm(embeds, mask=batch.mask, positions=batch.positions, cache=cache)
    return hidden, batch.mask, cache, lengths


def _prefill_rest(
    model: AnyToAny, prompt: Rendered, lookup: Lookup, known: int, cache: Any
) -> tuple[Tensor, Tensor, list[int]]:
    """Embed what comes after the first `known` positions, which `cache` holds, and extend it."""
    rest = Rendered(
        ids=prompt.ids[known:],
        labels=prompt.labels[known:],
        inputs=[
            replace(place, start=place.start - known)
            for place in prompt.inputs
            if place.start >= known
        ],
    )
    batch = _batch(model, [rest], lookup)
    mask = torch.ones(1, len(prompt), dtype=torch.bool, device=model.device)
    positions = batch.positions + known
    hidden = model.llm(model.embed(batch), mask=mask, positions=positions, cache=cache)
    return hidden, mask, [len(prompt)]


def _symbols(prompt: Rendered) -> list[Hashable]:
    """What stands at each position: a token id, or which medium's which placeholder."""
    symbols: list[Hashable] = list(prompt.ids)
    for place in prompt.inputs:
        name = (place.key, _content(place.medium))
        for offset in range(place.length):
            symbols[place.start + offset] = (name, offset)
    return symbols


def _content(medium: Medium) -> Hashable:
    """A name for what a medium holds; a file counts as another one once it has been written to."""
    if medium.array is not None:
        rates = getattr(medium, "sample_rate", None), getattr(medium, "fps", None)
        sound = getattr(medium, "sound", None)
        data = identity(replace(medium, source=None))
        return data, medium.array.shape, rates, sound and _content(sound)
    if not isinstance(medium.source, str | Path):
        return identity(medium)
    try:
        facts = Path(medium.source).expanduser().stat()
    except OSError:
        return object()  # like no other: reading it will say what is wrong
    return str(medium.source), facts.st_mtime_ns, facts.st_size


def _shared(fed: Sequence[Hashable], symbols: Sequence[Hashable]) -> int:
    """Length of the common beginning: no medium in part, and not the last position."""
    limit = min(len(fed), len(symbols) - 1)
    shared = next((place for place in range(limit) if fed[place] != symbols[place]), limit)
    while isinstance(symbols[shared], tuple) and symbols[shared][1] > 0:  # pyright: ignore
        shared -= 1
    return shared


def _shortened(cache: Any, length: int) -> Any:
    """A cache of the first `length` positions; the given one stays as it is."""
    short = copy.copy(cache)
    short.layers = [copy.copy(layer) for layer in cache.layers]
    short.crop(length - cache.get_seq_length())
    return short


def _advance(
    model: AnyToAny, steps: list[list[int]], mask: Tensor, cache: Any, next_position: list[int]
) -> tuple[Tensor, Tensor]:
    """Feed every row its next ids in one forward pass: hidden float[B, W, D], the longer mask."""
    width = max(len(step) for step in steps)
    ids = torch.zeros(len(steps), width, dtype=torch.long)
    real = torch.zeros(len(steps), width, dtype=torch.bool)
    positions = torch.zeros(len(steps), width, dtype=torch.long)
    for index, step in enumerate(steps):
        if step:
            ids[index, -len(step) :] = torch.tensor(step)
            real[index, -len(step) :] = True
            start = next_position[index]
            positions[index, -len(step) :] = torch.arange(start, start + len(step))
    mask = torch.cat([mask, real.to(mask.device)], dim=1)
    embeds = model.llm.embed(ids.to(mask.device))
    hidden = model.llm(embeds, mask=mask, positions=positions.to(mask.device), cache=cache)
    return hidden, mask

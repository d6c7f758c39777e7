"""Generation: ids and hidden states from the LLM, signal runs always complete, any batch at once.

A run that has begun is fed whole, in one forward pass: its K tokens and nothing else. In a batch,
rows take steps of different widths (one token, or a run); a step is as wide as its widest row and
the others are padded on the left with positions that nobody attends to. Every row draws from its
own generator, so a batch gives what single calls give. Rows join a batch that is running, and
leave it as soon as they are done: see ContinuousBatcher. A row that is alone is fed draft tokens
besides, as far as the conversation has said them before (mmllm.prompt_lookup), or the run that it
owes next: what it chooses is the same, in fewer passes.

A conversation that goes on is prefilled from where the engine left it, and what all begin with is
read once: see PrefixCache. A short prompt is read in the same pass as the steps of the others.

Legend: B rows, T positions, D width, K signal tokens, V text vocabulary, O outputs, G guesses.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, chain, takewhile
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.conversation import Medium
from mmllm.data.batch import Batch, collate
from mmllm.data.protocol import FeatureProvider
from mmllm.data.rendering import Rendered, common_prefix_length
from mmllm.errors import ConfigError, quoted
from mmllm.features.cache import medium_identity
from mmllm.kernels.cached_attention import ForwardRequest
from mmllm.kernels.devices import to_device
from mmllm.model import AnyToAny
from mmllm.prompt_lookup import PromptLookupDraft

Choice = Literal["auto", "force", "forbid"]

_MAX_MIXED_PREFILL = 64
"""Positions up to which prompts are read along with a step of others: what is wider gains nothing
by it, and what goes wrong with it is not theirs."""
_GREEDY_TEMPERATURE = 1e-5
"""Temperatures below it are greedy: quotients of the largest logits would not be finite."""
_MAX_TEMPERATURE = 1000.0
"""All tokens are as good as equally likely."""
_MAX_PENALTY = 100.0
"""`repetition_penalty`, and the inverse of the least: logits stay finite, whatever they are."""
_MIN_PREFIX_SHARE = 8
"""An opening is read apart where it is this share of a prompt or more: kernels for what has nothing
before it are the faster ones."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. A `temperature` below 1e-5 is greedy. `max_media` bounds a reply's
    media. Text ends before the first of the `stop` strings (then `ids` hold the beginning of it, or
    all).
    `num_draft_tokens`: how many tokens may be drafted at once (mmllm.prompt_lookup); 0 is one token
    a pass, always.
    Forced media come in the order in which `modalities` names them, at the latest at the end."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_media: int = 4
    stop: Sequence[str] = ()
    num_draft_tokens: int = 15
    modalities: Mapping[str, Choice] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (
            ("max_new_tokens", 1),
            ("max_media", 0),
            ("top_k", 0),
            ("num_draft_tokens", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < least:
                raise ConfigError(
                    f"{name}: expected a whole number of at least {least}, got {quoted(value)}"
                )
        penalties = 1 / _MAX_PENALTY, _MAX_PENALTY
        for name, least, most in (
            ("temperature", 0, _MAX_TEMPERATURE),
            ("top_p", 0, 1),
            ("repetition_penalty", *penalties),
        ):
            value: Any = getattr(self, name)
            # Every comparison with NaN is false.
            if not isinstance(value, Real) or not least <= value <= most:  # pyright: ignore
                raise ConfigError(
                    f"{name}: expected a number from {least:g} to {most:g}, got {quoted(value)}"
                )
        if self.top_p == 0:
            raise ConfigError("top_p: expected more than 0, got 0; greedy is a temperature of 0")
        strings = isinstance(self.stop, Sequence) and not isinstance(self.stop, str)
        if not strings or not all(isinstance(one, str) and one for one in self.stop):
            raise ConfigError(
                f"stop: expected a list of strings that are not empty, got {quoted(self.stop)}"
            )
        for modality, choice in self.modalities.items():
            if choice not in ("auto", "force", "forbid"):
                raise ConfigError(
                    f"modalities[{quoted(modality)}]: expected auto, force or forbid, got "
                    f"{quoted(choice)}"
                )

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn: equal prompts get equal words."""
        return self.temperature < _GREEDY_TEMPERATURE


@dataclass
class SignalSpan:
    """One complete signal run: its output key and its hidden states float[K, D]."""

    key: str
    states: Tensor


@dataclass
class GenerationOutput:
    """One row's answer. `pieces` holds token ids and runs in order; `finish` says why it ended;
    `num_cached`: positions of the prompt that were read before, as an earlier turn's or as the
    shared prefix."""

    pieces: list[int | SignalSpan] = field(default_factory=list)
    finish: Literal["end", "length", "stop", ""] = ""
    num_cached: int = 0

    @property
    def ids(self) -> list[int]:
        """Text token ids, runs left out."""
        return [piece for piece in self.pieces if isinstance(piece, int)]

    @property
    def spans(self) -> list[SignalSpan]:
        return [piece for piece in self.pieces if isinstance(piece, SignalSpan)]


OnPiece = Callable[[int, "int | SignalSpan"], None]
"""Called with (row, piece) as soon as a token or a run is there; may raise to cancel."""


class SequenceState:
    """The constraints and the choices of one row, and its answer as it grows.

    `on_piece` is called with a token or a run as soon as it is there. `done`: nothing more comes;
    set by others, it takes the row out of its batch.
    """

    def __init__(
        self,
        model: AnyToAny,
        sampling: Sampling,
        generator: torch.Generator,
        on_piece: Callable[[int | SignalSpan], None] | None = None,
    ):
        self.tokens = model.llm.tokens
        self.tokenizer = model.llm.tokenizer
        self.end_ids = sorted(model.llm.end_ids)
        self.sampling = sampling
        self.generator = generator
        self.on_piece = on_piece or (lambda piece: None)
        self.answer = GenerationOutput()
        self.done = False
        self.error: BaseException | None = None
        """Why it was given up."""
        self.position = 0
        """Where its next token stands."""
        self.next: list[int] = []
        """What it is fed next: one token or a whole run; nothing where it has still to choose, or
        is done."""
        self.symbols: list[Hashable] = []
        """What it was fed, by position; empty where its cache is not to be kept."""
        self.draft = PromptLookupDraft()
        """The ids of the conversation, `next` among them."""
        self._seen: set[int] = set()
        self._stopped = False
        self._over = False  # whether the text would have ended with the last choice
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
        self.pending_forced = [
            keys[name] for name, wish in sampling.modalities.items() if wish == "force"
        ]

    def draw(self, logits: Tensor) -> Tensor:
        """float[V + O] -> the number of one of them, int[1], where the logits are: nobody waits
        for it. -1 where they are no numbers."""
        return self._pick(self._constrained(logits.float()))

    def choose(self, drawn: int) -> None:
        """What `draw` gave -> `next`."""
        if drawn < 0 and not self.done:
            raise ConfigError(
                "the LLM's logits are not numbers: something overflows in its dtype, or its "
                "weights hold NaN; load the model with dtype bfloat16 or float32"
            )
        self.next = [] if self.done else self._chosen(drawn)
        self.draft.add(self.next)

    def _chosen(self, row: int) -> list[int]:
        length = len(self.answer.ids) + 1
        ended = row in self.end_ids
        self._over = self._stopped or ended or length > self.sampling.max_new_tokens
        if self._over:
            if self.pending_forced:  # what was asked for comes before the end
                return self.tokens.signal_ids(self.pending_forced[0])
            self.done = True
            self.answer.finish = "stop" if self._stopped else "end" if ended else "length"
            return []
        key = self.tokens.output_of_logit(row)
        if key is not None:
            return self.tokens.signal_ids(key)
        self._seen.add(row)
        self.answer.pieces.append(row)
        self._stopped = self._stopped or self._spells_stop()
        self.on_piece(row)
        return [row]

    def propose(self) -> list[list[int]]:
        """What may be chosen behind `next`: words, or the run of another medium that is owed."""
        if not self.next or not self.sampling.num_draft_tokens:
            return []
        if self._over:
            return [self.tokens.signal_ids(key) for key in self.pending_forced[1:2]]
        left = self.sampling.max_new_tokens - len(self.answer.ids)
        guessed = self.draft.propose(min(self.sampling.num_draft_tokens, left))
        return [[word] for word in takewhile(self._is_word, guessed)]

    def accept(self, states: Tensor) -> None:
        """Note that `next` was fed; its states, float[len(next), D], are kept if it is a run. What
        comes behind it is still to be chosen."""
        fed, self.next = self.next, []
        self.position += len(fed)
        if self.symbols:
            self.symbols += fed
        key = self.tokens.output_of_first_id(fed[0])
        if key is not None:
            run = SignalSpan(key, states.clone())
            self.answer.pieces.append(run)
            if key in self.pending_forced:
                self.pending_forced.remove(key)
            self.on_piece(run)

    def _is_word(self, id_: int) -> bool:
        return id_ < self.tokens.vocab_size and id_ not in self.end_ids

    def _spells_stop(self) -> bool:
        """Whether the text since the last run ends in tokens that spell a stop string."""
        if not self.sampling.stop:
            return False
        tail: list[int] = []
        most = max(len(stop.encode()) for stop in self.sampling.stop)  # a token is a byte or more
        for piece in reversed(self.answer.pieces):
            if isinstance(piece, SignalSpan) or len(tail) > most:
                break
            tail.insert(0, piece)
        text = decode_text(self.tokenizer, tail)
        return any(stop in text for stop in self.sampling.stop)

    def _constrained(self, logits: Tensor) -> Tensor:
        logits = logits.clone()
        full = len(self.answer.spans) >= self.sampling.max_media
        for key in self.tokens.outputs:
            if key in self.forbidden or full:
                logits[self.tokens.logit_index(key)] = -torch.inf
        if self.sampling.repetition_penalty != 1 and self._seen:
            seen = to_device(torch.tensor(sorted(self._seen)), logits.device)
            value = logits[seen]
            penalty = self.sampling.repetition_penalty
            logits[seen] = torch.where(value > 0, value / penalty, value * penalty)
        return logits

    def _pick(self, logits: Tensor) -> Tensor:
        sampling = self.sampling
        if sampling.is_greedy:
            return _largest(logits)
        logits = (logits - logits.max()) / sampling.temperature
        if sampling.top_k:
            least = logits.topk(min(sampling.top_k, len(logits))).values[-1]
            logits = logits.masked_fill(logits < least, -torch.inf)
        values, order = logits.softmax(-1).sort(descending=True, stable=True)
        if sampling.top_p < 1:
            values = values.masked_fill(values.cumsum(-1) - values >= sampling.top_p, 0)
        # As torch.multinomial draws on a CPU, where the generator lives whatever the device.
        noise = torch.empty(len(values), pin_memory=values.device.type == "cuda")
        noise.exponential_(1, generator=self.generator)
        drawn = _largest(values / to_device(noise, values.device))
        return torch.where(drawn < 0, drawn, order.gather(0, drawn.clamp_min(0)))


def _largest(values: Tensor) -> Tensor:
    """Where the largest of float[N] is, int[1]; -1 if some are no numbers."""
    place = values.argmax(keepdim=True)
    return torch.where(values.gather(0, place).isnan(), -1, place)


class PrefixCache:
    """Key-value caches of the last conversations, so that a later turn, another try or an edited
    one computes only what is new, media included, and of the opening that all conversations share
    (the template's beginning and the system prompt). Threads may share them.

    They serve the model in the state that read them (LanguageModel.version). Under a hook nothing
    is kept, and nothing that was kept is used: it is called for every position.

    `keep`: how many conversations. A cache takes as much memory as its conversation's positions;
    one that goes on in another is dropped. Caches of models that forget (sliding windows, recurrent
    states) cannot be shortened and are not kept.
    """

    def __init__(self, keep: int = 4):
        self.num_kept = keep
        # What was fed, its cache, the state of what read it; newest last.
        self._kept: list[tuple[list[Hashable], Any, Hashable]] = []
        self._lock = threading.Lock()
        self._opening: tuple[Hashable, Any] | None = None  # the state of what read it, its cache

    @torch.inference_mode()
    def shared_prefix(self, model: AnyToAny, length: int) -> Any:
        """A cache of the first positions of `model.renderer.prefix_ids`. It is read by itself,
        once, and again when weights have changed: the same bytes whoever asks. One thread at a
        time."""
        state = model.llm.version
        if self._opening is None or self._opening[0] != state:
            ids = to_device(torch.tensor([model.renderer.prefix_ids]), model.device)
            positions = torch.arange(ids.shape[1], device=model.device)[None]
            cache = model.llm.new_cache()
            model.llm(model.llm.embed(ids), positions=positions, cache=cache)
            self._opening = state, cache
        return self._opening[1].prefix(length)

    def longest_match(self, model: AnyToAny, symbols: Sequence[Hashable]) -> tuple[int, Any]:
        """How many first positions a kept conversation shares, and a cache of just these (None: no
        position). One position at least is left to be computed."""
        with self._lock:
            kept = self._kept
        state = model.llm.version if kept else None
        best, found = 0, None
        for fed, cache, read_by in kept:
            shared = _shared(fed, symbols)
            if shared > best and read_by == state:
                best, found = shared, cache
        return best, None if found is None else found.prefix(best)

    def insert(self, model: AnyToAny, symbols: list[Hashable], cache: Any) -> None:
        """Remember what was fed (`symbols`) and its cache, which nobody may extend from now on."""
        if cache.was_hooked or not self.num_kept:
            return
        with self._lock:
            kept = [entry for entry in self._kept if entry[0] != symbols[: len(entry[0])]]
            self._kept = [*kept, (symbols, cache, model.llm.version)][-self.num_kept :]

    def clear(self) -> None:
        """Forget all conversations."""
        with self._lock:
            self._kept = []


def decode_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of token ids, exactly as they spell it."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@dataclass
class Prefill:
    """Prompts that are ready to be read, each with its row. Media are decoded by now; no network
    has run. `known`: how many first positions `cache` holds, or, where that is None, the cache of
    the opening that they share."""

    rows: list[SequenceState]
    lengths: list[int]
    batch: Batch
    known: int = 0
    cache: Any = None


def prepare(
    model: AnyToAny,
    prompts: Sequence[Rendered],
    lookup: FeatureProvider,
    rows: Sequence[SequenceState],
    prefixes: PrefixCache | None = None,
) -> Prefill:
    """Decode the media of B prompts, rendered with a generation prompt, and look up what is known
    of them by `prefixes`: the opening, or, where B is 1, of a conversation, which is then added to
    them. Any thread may do this at any time. Raises MediaError."""
    known, cache = 0, None
    if prefixes and not model.llm.is_hooked:
        known = _shared_prefix_length(model, prompts)
        if prefixes.num_kept and len(prompts) == 1:
            rows[0].symbols = cache_keys(prompts[0])
            longest, found = prefixes.longest_match(model, rows[0].symbols)
            if longest > known:
                known, cache = longest, found
    for row, prompt in zip(rows, prompts, strict=True):
        row.draft.add(prompt.ids)
        row.answer.num_cached = known
    lengths = [len(prompt) for prompt in prompts]
    batch = _batch(model, [_rest(prompt, known) for prompt in prompts], lookup)
    return Prefill(list(rows), lengths, batch, known, cache)


@dataclass
class CacheGroup:
    """Rows in one cache. `mask` bool[B, T], on the CPU: real positions; `last` float[B, D]: the
    states by which those choose that have not chosen yet; `prompts`: what is still to be read,
    without `last`."""

    rows: list[SequenceState]
    mask: Tensor
    cache: Any
    prompts: ForwardRequest | None
    last: Tensor | None = None

    def join(self, other: CacheGroup) -> None:
        """Take the rows of another one in."""
        assert self.last is not None
        assert other.last is not None
        self.cache.concat(other.cache)
        width = max(self.mask.shape[1], other.mask.shape[1])
        masks = [F.pad(mask, (width - mask.shape[1], 0)) for mask in (self.mask, other.mask)]
        self.mask = torch.cat(masks)
        self.last = torch.cat([self.last, other.last])
        self.rows = [*self.rows, *other.rows]

    def cut(self, num: int) -> None:
        """Drop the last positions."""
        if num:
            self.mask = self.mask[:, :-num]
            self.cache.crop(-num)


@dataclass
class _Step:
    """What a group is fed at once: by row, its `next` and what is guessed behind that."""

    new: ForwardRequest
    ids: list[list[int]]
    guesses: list[list[int]]


class ContinuousBatcher:
    """Rows that are answered together; `step` by step each is fed a token or a run. Rows join
    between steps, and leave when they are done. One thread at a time.

    Rows of models that forget (sliding windows, recurrent states) cannot move to another cache:
    those that join later take steps of their own, and all leave together.
    """

    def __init__(self, model: AnyToAny, prefixes: PrefixCache | None = None):
        self.model = model
        self.prefixes = prefixes
        self._groups: list[CacheGroup] = []

    @property
    def rows(self) -> list[SequenceState]:
        """Those that are not done."""
        return [row for group in self._groups for row in group.rows if not row.done]

    @torch.inference_mode()
    def join(self, entry: Prefill) -> None:
        """Take rows in: their media are encoded now, and their prompts read by the next step, along
        with what it feeds the others, or, where they are long, now."""
        group = _entering(self.model, entry, self._cache(entry))
        if entry.batch.ids.numel() > _MAX_MIXED_PREFILL:
            self._read([group])
        self._groups.append(group)

    @torch.inference_mode()
    def step(self) -> None:
        """Choose for every row, and feed what was chosen in one forward pass."""
        self.tidy()
        for group in self._groups:
            if group.last is not None:
                self._choose(group, group.last)
        self._groups = [group for group in self._groups if group.rows]
        if self._groups:
            self._read(self._groups)
        self.tidy()
        if self._groups and self._groups[0].cache.croppable:
            first, *others = self._groups
            for group in others:
                first.join(group)
            self._groups = [first]

    def _cache(self, entry: Prefill) -> Any:
        """A cache of what is known of these prompts."""
        if entry.cache is not None:
            return entry.cache
        if entry.known and self.prefixes:
            return self.prefixes.shared_prefix(self.model, entry.known)
        return self.model.llm.new_cache()

    def _choose(self, group: CacheGroup, last: Tensor) -> None:
        """Let those rows choose that have not; who has come to an end leaves."""
        choosing = [index for index, row in enumerate(group.rows) if not (row.next or row.done)]
        if choosing:
            logits = self.model.llm.head(last)  # [B, V + O]
            drawn = torch.cat([group.rows[index].draw(logits[index]) for index in choosing])
            for index, number in zip(choosing, drawn.tolist(), strict=True):  # the host waits once
                group.rows[index].choose(number)
            self._keep(group)
        _leave(group, [index for index, row in enumerate(group.rows) if row.next])

    def _read(self, groups: Sequence[CacheGroup]) -> None:
        """Feed every row what comes next, in one forward pass."""
        steps = [_next(self.model, group) for group in groups]
        states = self.model.llm.forward_with_cache([step.new for step in steps])
        for group, step, hidden in zip(groups, steps, states, strict=True):
            _take(self.model, group, step, hidden)
            self._keep(group)

    def _keep(self, group: CacheGroup) -> None:
        """Remember the caches of rows that have come to their end."""
        for index, row in enumerate(group.rows):
            if row.done and row.symbols and self.prefixes and group.cache.croppable:
                cache = group.cache.select_row(index, group.mask[index])
                self.prefixes.insert(self.model, row.symbols, cache)

    def tidy(self) -> None:
        """Let go of rows that are done."""
        for group in self._groups:
            _leave(group, [index for index, row in enumerate(group.rows) if not row.done])
        self._groups = [group for group in self._groups if group.rows]

    def clear(self) -> None:
        """Let go of all rows."""
        self._groups = []


def generate(
    model: AnyToAny,
    prompts: Sequence[Rendered],
    lookup: FeatureProvider,
    *,
    sampling: Sampling | Sequence[Sampling] = Sampling(),
    generators: Sequence[torch.Generator] | None = None,
    on_piece: OnPiece | None = None,
    prefixes: PrefixCache | None = None,
) -> list[GenerationOutput]:
    """Answer B prompts, rendered with a generation prompt: one sampling and one generator per row.
    `prefixes` are used, and added to, where B is 1."""
    settings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    if generators is None:
        generators = [torch.Generator().manual_seed(0) for _ in prompts]
    rows = [
        SequenceState(model, setting, generator, on_piece and partial(on_piece, index))
        for index, (setting, generator) in enumerate(zip(settings, generators, strict=True))
    ]
    decoding = ContinuousBatcher(model, prefixes)
    decoding.join(prepare(model, prompts, lookup, rows, prefixes))
    while decoding.rows:
        decoding.step()
    return [row.answer for row in rows]


def _batch(model: AnyToAny, prompts: Sequence[Rendered], lookup: FeatureProvider) -> Batch:
    """Prompts as the model embeds them, padded on the right; nothing is supervised."""
    return collate(
        prompts,
        lookup,
        num_input_tokens=model.num_input_tokens,
        num_signal_tokens=model.num_signal_tokens,
        pad_id=0,
        targets=False,
    )


def _shared_prefix_length(model: AnyToAny, prompts: Sequence[Rendered]) -> int:
    """How many first positions all of them share with the opening: none where they are too few to
    gain by, or caches cannot be shortened."""
    shared = min(_shared(model.renderer.prefix_ids, prompt.ids) for prompt in prompts)
    few = shared < max(map(len, prompts)) / _MIN_PREFIX_SHARE
    return 0 if few or not model.llm.supports_cache_crop else shared


def _rest(prompt: Rendered, known: int) -> Rendered:
    """What comes after the first `known` positions."""
    return Rendered(
        ids=prompt.ids[known:],
        labels=prompt.labels[known:],
        inputs=[
            replace(place, start=place.start - known)
            for place in prompt.inputs
            if place.start >= known
        ],
    )


def _entering(model: AnyToAny, entry: Prefill, cache: Any) -> CacheGroup:
    """Embed prompts, padded on the left, behind what the cache holds."""
    batch = entry.batch.to(model.device)
    embeds, mask, positions = model.embed(batch), entry.batch.mask, batch.positions
    assert mask is not None  # all are padded on the right
    mask = mask.clone()
    width = embeds.shape[1]
    for index, (row, length) in enumerate(zip(entry.rows, entry.lengths, strict=True)):
        row.position = length
        shift = width - (length - entry.known)  # decoding needs the last position on the right
        for padded in (embeds, mask, positions):
            padded[index] = padded[index].roll(shift, dims=0)
    mask = F.pad(mask, (entry.known, 0), value=True)
    return CacheGroup(
        entry.rows, mask, cache, ForwardRequest(embeds, positions + entry.known, mask, cache)
    )


def _leave(group: CacheGroup, left: list[int]) -> None:
    """Go on with the rows `left` only, in a cache without the positions that none of them has.
    Where rows cannot be taken out of a cache, or are not in it yet, it goes on with all until none
    is left."""
    if len(left) == len(group.rows):
        return
    if not left:
        group.rows = []
        return
    if group.last is None or not group.cache.croppable:
        return
    mask = group.mask[left]
    start = int(mask.any(0).int().argmax())
    group.cache.select_rows(left, start)
    group.mask = mask[:, start:]
    group.last = torch.stack([group.last[index] for index in left])
    group.rows = [group.rows[index] for index in left]


def cache_keys(prompt: Rendered) -> list[Hashable]:
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
        data = medium_identity(replace(medium, source=None))
        return data, medium.array.shape, rates, sound and _content(sound)
    if not isinstance(medium.source, str | Path):
        return medium_identity(medium)
    try:
        facts = Path(medium.source).expanduser().stat()
    except OSError:
        return object()  # like no other: reading it will say what is wrong
    return str(medium.source), facts.st_mtime_ns, facts.st_size


def _shared(fed: Sequence[Hashable], symbols: Sequence[Hashable]) -> int:
    """Length of the common beginning: no medium in part, and not the last position."""
    shared = common_prefix_length(fed, symbols[:-1])
    while isinstance(symbols[shared], tuple) and symbols[shared][1] > 0:  # pyright: ignore
        shared -= 1
    return shared


def _next(model: AnyToAny, group: CacheGroup) -> _Step:
    """The prompts, or every row's next ids, as wide as the widest step. A row that is alone is fed
    its guesses behind them."""
    if group.prompts:
        return _Step(group.prompts, [[] for _ in group.rows], [])
    alone = len(group.rows) == 1 and group.cache.croppable
    guesses = group.rows[0].propose() if alone else []
    steps = [[*row.next, *chain(*guesses)] for row in group.rows]
    width = max(map(len, steps))
    new = torch.zeros(2, len(group.rows), width, dtype=torch.long)  # ids and positions
    real = torch.zeros(len(group.rows), width, dtype=torch.bool)
    for index, (row, step) in enumerate(zip(group.rows, steps, strict=True)):
        if num := len(step):
            new[0, index, -num:] = torch.tensor(step)
            new[1, index, -num:] = torch.arange(row.position, row.position + num)
            real[index, -num:] = True
    group.mask = torch.cat([group.mask, real], dim=1)
    ids, positions = to_device(new, model.device)
    return _Step(
        ForwardRequest(model.llm.embed(ids), positions, group.mask, group.cache), steps, guesses
    )


def _take(model: AnyToAny, group: CacheGroup, step: _Step, hidden: Tensor) -> None:
    """Give rows the states float[B, W, D] of what they were fed. A row with guesses chooses at
    once, as far as they were right."""
    group.prompts, group.last = None, hidden[:, -1]
    for index, (row, ids) in enumerate(zip(group.rows, step.ids, strict=True)):
        if row.next:
            start = hidden.shape[1] - len(ids)
            row.accept(hidden[index, start : start + len(row.next)])
    if step.guesses:
        group.cut(verify_draft(model, group.rows[0], step.guesses, hidden[0]))


def verify_draft(
    model: AnyToAny, row: SequenceState, guesses: list[list[int]], states: Tensor
) -> int:
    """Let a row choose by the states float[W, D] before its guesses and behind each, up to the
    first that was wrong; how many positions were fed in vain."""
    num = sum(map(len, guesses))
    ends = list(accumulate(map(len, guesses), initial=len(states) - num))
    logits = model.llm.head(torch.stack([states[end - 1] for end in ends]))  # [1 + G, V + O]
    row.choose(int(row.draw(logits[0])))
    for right, guess in enumerate(guesses):
        if row.next != guess:
            return ends[-1] - ends[right]
        row.accept(states[ends[right] : ends[right + 1]])
        row.choose(int(row.draw(logits[right + 1])))
    return 0

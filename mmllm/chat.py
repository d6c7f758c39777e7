"""Talking to a model from Python: a conversation in, a reply with text and media in order out.

chat = mmllm.load("mini")
reply = chat.reply([user("Draw a red apple.")], seed=0)
reply.media[0].save("apple.png")
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mmllm import checkpoints
from mmllm import config as configs
from mmllm import model as models
from mmllm.conversation import Conversation, Medium, Message, Part, Text
from mmllm.data.frozen import FrozenWork
from mmllm.errors import ConfigError
from mmllm.generation import Choice, Generated, Run, Sampling, generate
from mmllm.model import AnyToAny
from mmllm.precision import best_device, fast_dtype, named_dtype

OnStep = Callable[[str, int, int], None]
"""Called with (output key, step, steps) while media are made."""

_REPLY_ROOM = 64
"""Tokens that are always kept for a reply."""


@dataclass(frozen=True)
class Reply:
    """What the model said. `seed` repeats it; `notes` tells what the caller should know."""

    message: Message
    seed: int
    ids: list[int] = field(repr=False)
    finish: str = "end"
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return self.message.text

    @property
    def media(self) -> list[Medium]:
        return self.message.media


class Chat:
    """A model and the way to ask it. Not thread-safe: one request at a time."""

    def __init__(self, model: AnyToAny):
        self.model = model.eval()
        self._work = FrozenWork(model, remember=False)

    def reply(
        self,
        conversation: Conversation,
        *,
        modalities: Mapping[str, Choice] | None = None,
        seed: int | None = None,
        decoders: Mapping[str, Mapping[str, Any]] | None = None,
        on_step: OnStep | None = None,
        **sampling: Any,
    ) -> Reply:
        """Answer one conversation; see `reply_many`."""
        return self.reply_many(
            [conversation],
            modalities=modalities,
            seeds=None if seed is None else [seed],
            decoders=decoders,
            on_step=on_step,
            **sampling,
        )[0]

    @torch.inference_mode()
    def reply_many(
        self,
        conversations: Sequence[Conversation],
        *,
        modalities: Mapping[str, Choice] | None = None,
        seeds: Sequence[int] | None = None,
        decoders: Mapping[str, Mapping[str, Any]] | None = None,
        on_step: OnStep | None = None,
        **sampling: Any,
    ) -> list[Reply]:
        """Answer several conversations in one LLM batch and one batch per decoder.

        `modalities`: auto (default), force or forbid per modality. `seeds`: one per conversation;
        the same seed gives the same reply. `decoders`: options of `sample` (steps, guidance, …)
        by modality. Other keywords are those of `mmllm.generation.Sampling`.
        Raises MediaError, ContextError and ConfigError.
        """
        for modality in {**(modalities or {}), **(decoders or {})}:
            if modality not in self.model.renderer.output_keys:
                raise ConfigError(
                    f"unknown modality {modality!r}; this model makes "
                    f"{', '.join(sorted(self.model.renderer.output_keys)) or 'text only'}"
                )
        settings = _sampling(modalities, sampling)
        if seeds is None:
            seeds = [random.randrange(2**31) for _ in conversations]
        if len(seeds) != len(conversations):
            raise ConfigError(f"{len(conversations)} conversations but {len(seeds)} seeds")
        prompts, notes = [], []
        limit = self.model.llm.max_length
        for conversation in conversations:
            prompt, dropped = self.model.renderer.fit(
                _messages(conversation), limit, room=min(_REPLY_ROOM, limit // 2)
            )
            prompts.append(prompt)
            notes.append(
                (f"the context is full: the oldest {dropped} message(s) were left out",)
                if dropped
                else ()
            )
        longest = max(len(prompt) for prompt in prompts)
        settings = replace(
            settings, max_new_tokens=min(settings.max_new_tokens, max(limit - longest, 1))
        )
        answers = generate(
            self.model,
            prompts,
            self._work,
            sampling=settings,
            generators=[torch.Generator().manual_seed(seed) for seed in seeds],
        )
        made = self._make(answers, seeds, decoders or {}, on_step)
        return [
            Reply(
                message=self._message(answer, made[index]),
                seed=seeds[index],
                ids=answer.ids,
                finish=answer.finish,
                notes=notes[index],
            )
            for index, answer in enumerate(answers)
        ]

    def _make(
        self,
        answers: Sequence[Generated],
        seeds: Sequence[int],
        options: Mapping[str, Mapping[str, Any]],
        on_step: OnStep | None,
    ) -> list[dict[int, Medium]]:
        """Media of all signal runs, one batch per decoder: row -> place in the answer -> medium."""
        made: list[dict[int, Medium]] = [{} for _ in answers]
        by_key: dict[str, list[tuple[int, int, Run]]] = {}
        for row, answer in enumerate(answers):
            for place, piece in enumerate(answer.pieces):
                if isinstance(piece, Run):
                    by_key.setdefault(piece.key, []).append((row, place, piece))
        for key, runs in by_key.items():
            decoder = self.model.decoders[key]
            condition = self.model.condition({key: torch.stack([run.states for *_, run in runs])})
            media = decoder.sample(
                condition[key],
                generators=[_noise(seeds[row], place) for row, place, _ in runs],
                on_step=None if on_step is None else _named(on_step, key),
                **dict(options.get(decoder.modality, {})),
            )
            for (row, place, _), medium in zip(runs, media, strict=True):
                made[row][place] = replace(medium, provenance=self._provenance(key, seeds[row]))
        return made

    def _message(self, answer: Generated, made: Mapping[int, Medium]) -> Message:
        """Text and media in the order in which the model gave them."""
        parts: list[Part] = []
        ids: list[int] = []
        for place, piece in enumerate([*answer.pieces, None]):
            if isinstance(piece, int):
                ids.append(piece)
                continue
            if ids:
                decoded = self.model.llm.tokenizer.decode(ids, skip_special_tokens=True)
                parts.append(Text(str(decoded)))
                ids = []
            if place in made:
                parts.append(made[place])
        return Message("assistant", tuple(parts))

    def _provenance(self, key: str, seed: int) -> dict[str, Any]:
        from mmllm import __version__

        return {
            "ai_generated": True,
            "software": f"mmllm {__version__}",
            "model": self.model.config.name,
            "decoder": key,
            "seed": seed,
        }


def load(source: str | Path, *, device: str | None = None, dtype: str | None = None) -> Chat:
    """See mmllm.load. A YAML gives an untrained model, to try a configuration."""
    device = device or best_device()
    precision = fast_dtype() if dtype is None else named_dtype(dtype)
    if str(source).endswith((".yaml", ".yml")):
        tree = configs.read_yaml(source)
        system = configs.parse_system(tree.get("system", tree))
        return Chat(models.build(system, dtype=precision, device=device))
    return Chat(checkpoints.load_model(_open(str(source)), dtype=precision, device=device))


def _open(source: str) -> checkpoints.Checkpoint:
    """A shipped model by name, or a folder."""
    if not Path(source).exists() and source == "mini":
        from mmllm.mini import locate

        return checkpoints.open_checkpoint(locate("checkpoint"))
    return checkpoints.open_checkpoint(source)


def _messages(conversation: Conversation) -> list[Message]:
    messages = list(conversation)
    for message in messages:
        if not isinstance(message, Message):
            raise ConfigError(
                f"a conversation is a list of messages such as user('…'), got "
                f"{type(message).__name__} in it"
            )
    return messages


def _sampling(modalities: Mapping[str, Choice] | None, options: Mapping[str, Any]) -> Sampling:
    try:
        return Sampling(modalities=dict(modalities or {}), **options)
    except TypeError as error:
        raise ConfigError(f"unknown sampling option: {error}") from error


def _noise(seed: int, place: int) -> torch.Generator:
    """The generator of one medium: a function of the reply's seed and the medium's place in it."""
    return torch.Generator().manual_seed((seed * 65_537 + place) % 2**63)


def _named(on_step: OnStep, key: str) -> Callable[[int, int], None]:
    return lambda step, steps: on_step(key, step, steps)

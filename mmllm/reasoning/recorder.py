"""A record of every call of a run: what was asked and what came back, one line of JSON each.

A run that was stopped, at whatever call, is started again with the same file: the calls that are
in it are answered from it, and the run goes on behind them. The finished file has the same bytes as
that of a run that never stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmllm.conversation import ContentPart, Message, Text
from mmllm.errors import ConfigError, quoted
from mmllm.reasoning.models import CallError, ChatModel, Completion
from mmllm.utils.files import atomic_write, write_errors
from mmllm.utils.hashing import sha256

_REMEDY = "free space, or give another file"


class Recorder:
    """A ChatModel that appends each call of another one, and its result, to a file.

    Failed calls are recorded, too, so that a resumed run takes the same turns.

    Args:
        model: the model that answers what is not recorded yet.
        path: the file; it is created if it does not exist. A line that was not written completely
            is dropped.

    Raises:
        ConfigError: the file is not a record, or cannot be read or written.

    Attributes:
        num_replayed: calls that were answered from the file.
        fingerprint: that of the model inside.
    """

    def __init__(self, model: ChatModel, path: str | Path):
        self.model = model
        self.path = Path(path)
        self.num_replayed = 0
        self.fingerprint = model.fingerprint
        self._entries = self._load()

    def count_tokens(self, conversation: Sequence[Message]) -> int:
        """See ChatModel; it is not recorded."""
        return self.model.count_tokens(conversation)

    def complete(
        self,
        conversation: Sequence[Message],
        *,
        n: int = 1,
        temperature: float = 1.0,
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[Completion]:
        """See ChatModel. Raises ConfigError, too: the recorded call at this place is another."""
        options = {
            "n": n,
            "temperature": temperature,
            "max_new_tokens": max_new_tokens,
            "stop": list(stop),
            "seed": seed,
        }
        asked = {"complete": [_message_dict(m) for m in conversation], **options}
        found = self._call(
            asked,
            lambda: [asdict(e) for e in self.model.complete(conversation, **options)],
        )
        return [Completion(**entry) for entry in found]

    def score(self, conversation: Sequence[Message], replies: Sequence[str]) -> list[float]:
        """See ChatModel. Raises ConfigError, too: the recorded call at this place is another."""
        asked = {"score": [_message_dict(m) for m in conversation], "replies": list(replies)}
        return self._call(asked, lambda: self.model.score(conversation, replies))

    def _call(self, asked: Mapping[str, Any], answer: Callable[[], Any]) -> Any:
        """The recorded result of a call, or a new one, which is recorded."""
        asked = {"model": self.fingerprint, **asked}
        if self.num_replayed < len(self._entries):
            entry = self._entries[self.num_replayed]
            if entry["asked"] != asked:
                raise ConfigError(
                    f"{self.path}: call {self.num_replayed + 1} of the record is another than that "
                    f"of this run ({_difference(entry['asked'], asked)}): it was made with another "
                    "model, other options or another version; give another file, or delete it"
                )
            self.num_replayed += 1
        else:
            try:
                entry = {"asked": asked, "result": answer()}
            except CallError as error:
                entry = {"asked": asked, "error": str(error)}
            entry = json.loads(self._append(entry))  # as it will be read again
            self._entries.append(entry)
            self.num_replayed += 1
        if "error" in entry:
            raise CallError(entry["error"])
        return entry["result"]

    def _append(self, entry: Mapping[str, Any]) -> str:
        line = json.dumps(entry, ensure_ascii=False)
        with (
            write_errors(self.path, ConfigError, _REMEDY),
            self.path.open("a", encoding="utf-8") as stream,
        ):
            stream.write(f"{line}\n")
        return line

    def _load(self) -> list[dict[str, Any]]:
        """The recorded calls; a partial last line is removed from the file."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            data = self.path.read_bytes() if self.path.exists() else b""
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read: {error.strerror}") from error
        complete = data[: data.rfind(b"\n") + 1]
        entries = [
            self._entry(line, number) for number, line in enumerate(complete.splitlines(), start=1)
        ]
        if len(complete) < len(data):
            with write_errors(self.path, ConfigError, _REMEDY):
                atomic_write(self.path, complete)
        return entries

    def _entry(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or "asked" not in entry or len(entry) != 2:
            raise ConfigError(
                f"{self.path}, line {number}: expected a recorded call as JSON, got "
                f"{quoted(line[:200].decode(errors='replace'))}; is it the record of a run?"
            )
        return entry


def _message_dict(message: Message) -> dict[str, Any]:
    return {"role": message.role, "parts": [_part(part) for part in message.parts]}


def _part(part: ContentPart) -> Any:
    """A text as it is; a medium as its modality and the hash of its content."""
    if isinstance(part, Text):
        return part.text
    values = part.to_numpy()
    return {part.modality: sha256(repr(values.shape).encode() + values.tobytes())}


def _difference(recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """The first field that differs, with both values."""
    for name in {**recorded, **asked}:
        if recorded.get(name) != asked.get(name):
            one, other = quoted(recorded.get(name)), quoted(asked.get(name))
            return f"{name}: recorded {one}, asked {other}"
    return "the order of fields"

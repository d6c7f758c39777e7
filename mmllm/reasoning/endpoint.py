"""A model behind OpenAI's chat API: `mmllm serve`, vLLM, llama.cpp, a paid service.

The standard library's HTTP client is enough here: one POST per request, with a deadline and a limit
of bytes, which also hold for servers that send slowly or without end.
"""

from __future__ import annotations

import base64
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

from mmllm.conversation import ContentPart, Message, Text
from mmllm.errors import ConfigError, brief_reason, quoted
from mmllm.reasoning.models import CallError, Completion
from mmllm.utils.hashing import fingerprint

_RETRIED = {429, 502, 503, 504}
"""HTTP statuses of a server that is busy or starting."""
_FIRST_PAUSE, _MAX_PAUSE = 0.5, 30.0
"""Seconds before the first retry, doubled for each further one, and the longest pause."""
_MAX_BYTES = 2**24
_CHUNK = 2**16
_TOKENS_PER_MESSAGE = 16
"""Tokens that a chat template adds to a message, at most."""
_TOKENS_PER_MEDIUM = 2048
"""Tokens that stand for one image, audio or video; an estimate."""


class OpenAIModel:
    """A ChatModel (mmllm.reasoning.models) behind an OpenAI-compatible endpoint.

    Args:
        url: the base of the API, `http://127.0.0.1:8000/v1`.
        model: the name of the model there.
        api_key: sent as a bearer token.
        timeout: seconds of one request, its answer included.
        retries: further tries where the server cannot be reached or is busy (429, 502, 503, 504).
            A request that timed out is not sent again: it may have been computed, and paid.
        concurrency: requests at the same time.
        samples_per_request: the largest `n` of one request; more samples are several requests.
        extra: more fields of the request: `{"modalities": ["text"]}` for a model that draws.

    Raises:
        ConfigError: the URL is not http or https.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout: float = 120.0,
        retries: int = 3,
        concurrency: int = 4,
        samples_per_request: int = 8,
        extra: Mapping[str, Any] | None = None,
    ):
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"endpoint: expected http://… or https://…, got {quoted(url)}")
        self.url = url.rstrip("/")
        self.model = model
        self.timeout = timeout
        self.retries = retries
        self.concurrency = concurrency
        self.samples_per_request = samples_per_request
        self.extra = dict(extra or {})
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    @property
    def fingerprint(self) -> str:
        """A hash of the URL and the model's name: the weights behind them are not known."""
        return fingerprint([self.url, self.model])

    def count_tokens(self, conversation: Sequence[Message]) -> int:
        """An upper bound for text: one token per byte of UTF-8. Media are estimated."""
        return sum(
            _TOKENS_PER_MESSAGE
            + len(message.text.encode())
            + _TOKENS_PER_MEDIUM * len(message.media)
            for message in conversation
        )

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
        """See ChatModel. If some of several requests fail, the replies of the others are returned.

        Raises:
            CallError: no request gave a reply; the message is that of the first one.
        """
        body = {
            "model": self.model,
            "messages": [message_dict(message) for message in conversation],
            "temperature": temperature,
            "max_tokens": max_new_tokens,
            **({"stop": list(stop)} if stop else {}),
            **self.extra,
        }
        bodies = [
            {**body, "n": min(self.samples_per_request, n - start), "seed": seed + start}
            for start in range(0, n, self.samples_per_request)
        ]
        num_prompt = self.count_tokens(conversation)
        completions: list[Completion] = []
        errors: list[CallError] = []
        with ThreadPoolExecutor(max_workers=self.concurrency) as pool:
            for future in [pool.submit(self._request, entry, num_prompt) for entry in bodies]:
                try:
                    completions += future.result()
                except CallError as error:
                    errors.append(error)
        if not completions:
            raise errors[0]
        return completions

    def score(self, conversation: Sequence[Message], replies: Sequence[str]) -> list[float]:
        """Raise ConfigError: OpenAI's chat API gives no likelihoods of given replies."""
        raise ConfigError(
            f"{self.url}: OpenAI's chat API gives no likelihoods of given replies; choose by what "
            'the model writes (choose="written"), or load the model with mmllm.load'
        )

    def _request(self, body: Mapping[str, Any], num_prompt: int) -> list[Completion]:
        """One request, with its retries."""
        url = f"{self.url}/chat/completions"
        data = json.dumps(body).encode()
        for attempt in range(self.retries + 1):
            request = urllib.request.Request(url, data, self._headers, method="POST")
            try:
                return _completions(_read(request, self.timeout), num_prompt, url)
            except urllib.error.HTTPError as error:
                if error.code not in _RETRIED or attempt == self.retries:
                    reason = _first_bytes(error)
                    raise CallError(f"{url}: HTTP status {error.code}: {quoted(reason)}") from error
                pause = _retry_after(error)
            except TimeoutError as error:
                raise CallError(f"{url}: no answer within {self.timeout:g} s") from error
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                if isinstance(reason, TimeoutError):
                    raise CallError(f"{url}: no answer within {self.timeout:g} s") from error
                if attempt == self.retries:
                    why = brief_reason(reason if isinstance(reason, Exception) else error)
                    raise CallError(f"{url}: cannot be reached: {why}") from error
                pause = None
            time.sleep(min(pause or _FIRST_PAUSE * 2**attempt, _MAX_PAUSE))
        raise AssertionError("the last attempt returns or raises")


def message_dict(message: Message) -> dict[str, Any]:
    """A message as OpenAI's API takes it; media are data URIs. Raises MediaError."""
    if not message.media:
        return {"role": message.role, "content": message.text}
    return {"role": message.role, "content": [_part_dict(part) for part in message.parts]}


def _part_dict(part: ContentPart) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    kind = {"image": "png", "audio": "wav", "video": "mp4"}[part.modality]
    data = base64.b64encode(part.to_bytes(kind)).decode()
    if part.modality == "audio":
        return {"type": "input_audio", "input_audio": {"data": data, "format": kind}}
    name = f"{part.modality}_url"
    return {"type": name, name: {"url": f"data:{part.modality}/{kind};base64,{data}"}}


def _read(request: urllib.request.Request, timeout: float) -> bytes:
    """The body of the answer. Raises TimeoutError after `timeout` seconds in all, CallError for
    more than 16 MiB."""
    deadline = time.monotonic() + timeout
    found = bytearray()
    with urllib.request.urlopen(request, timeout=timeout) as response:
        while chunk := response.read1(_CHUNK):
            found += chunk
            if time.monotonic() > deadline:
                raise TimeoutError
            if len(found) > _MAX_BYTES:
                raise CallError(f"{request.full_url}: the answer exceeds {_MAX_BYTES} bytes")
    return bytes(found)


def _completions(data: bytes, num_prompt: int, url: str) -> list[Completion]:
    """The replies in a response. Tokens that it does not count are bounded by bytes."""
    try:
        tree = json.loads(data)
        texts = [choice["message"]["content"] or "" for choice in tree["choices"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        _refuse(data, url)
    if not texts or not all(isinstance(text, str) for text in texts):
        _refuse(data, url)
    usage = tree.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    prompt, total = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not isinstance(total, int):
        total = sum(len(text.encode()) for text in texts)
    share, rest = divmod(total, len(texts))
    return [
        Completion(
            text,
            prompt_tokens=0 if index else (prompt if isinstance(prompt, int) else num_prompt),
            completion_tokens=share + (rest if index == 0 else 0),
        )
        for index, text in enumerate(texts)
    ]


def _refuse(data: bytes, url: str) -> NoReturn:
    text = quoted(data[:400].decode(errors="replace"))
    raise CallError(f"{url}: expected a chat completion as JSON, got {text}")


def _first_bytes(error: urllib.error.HTTPError) -> str:
    """The beginning of the body of an HTTP error."""
    try:
        return error.read(400).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    """Seconds after which the server asks to try again."""
    try:
        return max(float(error.headers.get("Retry-After", "")), 0.0)
    except ValueError:
        return None

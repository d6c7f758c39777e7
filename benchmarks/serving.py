"""What a conversation costs with mini on a CPU, against what it must.

    python benchmarks/serving.py                       # all, in a quarter of an hour
    python benchmarks/serving.py text tenth-turn       # some
    python benchmarks/serving.py --json figures.json

text         tokens a second of one reply at a time, to four questions, against
             transformers.generate; the adapters are merged there in float32, and as they are in
             bfloat16, where merging makes other numbers
together     replies of unequal length that arrive over two seconds, against one batch of all
tenth-turn   time to the first token of a tenth turn, against a prefill of the whole conversation
media        a picture and a sound in one reply, against the two pipelines alone
memory       what the server holds after 250 requests, against what it held after 50
malformed    2,000 invalid requests
"""

from __future__ import annotations

import base64
import copy
import functools
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pairs
import torch
from pairs import Options, Row, timed

import mmllm
from mmllm import Audio, Image, Medium, Message, Video, user
from mmllm.features.cache import FeatureCache
from mmllm.inference.batching import generate
from mmllm.inference.chat import Chat
from mmllm.inference.events import MediumReady, MediumStarted, TextDelta
from mmllm.inference.sampling import Sampling

TEXT = {"image": "forbid", "audio": "forbid", "video": "forbid"}
BOTH = {"image": "force", "audio": "force", "video": "forbid"}
QUESTIONS = ["Write a poem.", "What is rain?", "Tell me about cats.", "Why is the sky blue?"]
LENGTHS = (16, 128, 32, 96, 24, 64, 48, 112, 20, 80, 40, 56)
"""Tokens of the replies that are answered together."""
ARRIVING = 2.0
"""Seconds over which they come."""


@functools.cache
def mini(dtype: str = "float32") -> Chat:
    return mmllm.load("mini", device="cpu", dtype=dtype)


# --- text ---------------------------------------------------------------------------------------


def text(options: Options) -> list[Row]:
    return [row for dtype in ("float32", "bfloat16") for row in text_in(dtype, options)]


def text_in(dtype: str, options: Options) -> list[Row]:
    """Drafts (mmllm.inference.speculative) gain what a reply repeats: the detail of the row with
    the bar names the questions that gain least and most, and another row has none."""
    chat, num = mini(dtype), 96
    llm = chat.model.llm
    model = copy.deepcopy(llm.model).merge_and_unload() if dtype == "float32" else llm.model

    def ours(question: str, guesses: int = Sampling().num_draft_tokens) -> list[int]:
        wishes = {"modalities": TEXT, "max_new_tokens": num, "num_draft_tokens": guesses}
        with endless(chat):
            return chat.reply([user(question)], seed=0, **wishes).ids

    @torch.inference_mode()
    def bare(question: str) -> list[int]:
        rendered = chat.model.renderer.render([user(question)], add_generation_prompt=True)
        prompt = torch.tensor([rendered.ids])
        whole = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=num,
            max_new_tokens=num,
            eos_token_id=sorted(llm.end_ids),
            pad_token_id=llm.pad_id,
        )
        return whole[0, prompt.shape[1] :].tolist()

    same = [
        one == other
        for question in QUESTIONS
        for one, other in zip(ours(question), bare(question), strict=True)
    ]
    few = replace(options, pairs=-(-options.pairs // 3))
    timings = {
        question: timed(
            silent(functools.partial(ours, question)),
            silent(functools.partial(bare, question)),
            few,
        )
        for question in QUESTIONS
    }
    gains = {question: 1 / timing.ratio for question, timing in timings.items()}
    least, most = (choose(gains, key=lambda question: gains[question]) for choose in (min, max))
    seconds = [
        sum(statistics.median(getattr(timing, side)) for timing in timings.values())
        for side in ("ours", "other")
    ]
    plain = timed(
        silent(lambda: ours(QUESTIONS[0], guesses=0)), silent(lambda: bare(QUESTIONS[0])), few
    )
    weights = sum(weight.nbytes for weight in model.parameters())
    speed, limit = num / statistics.median(plain.ours), bandwidth() / weights
    return [
        Row(
            f"text: ids that are the same in {dtype}",
            sum(same) / len(same),
            1 if dtype == "float32" else None,  # elsewhere rounding chooses other words
            "at least",
        ),
        Row(
            f"text: tokens a second in {dtype}",
            seconds[1] / seconds[0],
            1.2,
            "at least",
            detail=f"{gains[least]:.2f} for {least!r} to {gains[most]:.2f} for {most!r}",
        ),
        Row(f"text: the same without guesses in {dtype}", 1 / plain.ratio, detail=str(plain)),
        Row(
            f"text: share of what memory allows in {dtype}",
            speed / limit,
            detail=f"{speed:.1f} of {limit:.1f} tokens a second: {weights / 1e6:.0f} MB each",
        ),
    ]


def bandwidth() -> float:
    """Bytes that can be read from memory in a second: the best of ten sums over 512 MiB."""
    block = torch.ones(2**27)
    times = []
    for _ in range(10):
        began = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - began)
    return block.nbytes / min(times)


def silent(work: Callable[[], Any]) -> Callable[[], None]:
    """Run work without its output."""

    def run() -> None:
        work()

    return run


# --- together -----------------------------------------------------------------------------------


@contextmanager
def endless(chat: Chat) -> Iterator[None]:
    """Within it no text ends before its last token, so that all ways make the same ones."""
    llm = chat.model.llm
    head, ends = llm.head, sorted(llm.end_ids)

    def without_end(hidden: torch.Tensor) -> torch.Tensor:
        return head(hidden).index_fill(-1, torch.tensor(ends), -torch.inf)

    llm.head = without_end
    try:
        yield
    finally:
        del llm.head


def together(options: Options) -> list[Row]:
    chat = mini()
    talks = [[user(QUESTIONS[number % len(QUESTIONS)])] for number in range(len(LENGTHS))]
    lasted = [0.0] * len(LENGTHS)

    def ask(number: int, modalities: dict[str, str]) -> None:
        time.sleep(ARRIVING * number / (len(LENGTHS) - 1))
        began = time.perf_counter()
        for _ in chat.stream(
            talks[number], seed=0, modalities=modalities, max_new_tokens=LENGTHS[number]
        ):
            pass
        lasted[number] = time.perf_counter() - began

    def arriving() -> None:
        with ThreadPoolExecutor(len(LENGTHS)) as pool:
            list(pool.map(lambda number: ask(number, TEXT), range(len(LENGTHS))))

    def mixed() -> None:
        """Every third reply makes a picture."""
        with ThreadPoolExecutor(len(LENGTHS)) as pool:
            wishes = [TEXT if number % 3 else {**TEXT, "image": "force"} for number in range(12)]
            list(pool.map(ask, range(len(LENGTHS)), wishes))

    def ideal() -> None:
        prompts = [chat.model.renderer.render(talk, add_generation_prompt=True) for talk in talks]
        sampling = [Sampling(max_new_tokens=length, modalities=TEXT) for length in LENGTHS]
        answers = generate(
            chat.model, prompts, FeatureCache(chat.model, enabled=False), sampling=sampling
        )
        assert [len(answer.ids) for answer in answers] == list(LENGTHS)

    few = replace(options, pairs=min(options.pairs, 5), seconds=0.0)
    with endless(chat):
        timing = timed(arriving, ideal, few)
        waits = list(lasted)
        also = timed(mixed, ideal, replace(few, pairs=1))
    shortest, longest = waits[LENGTHS.index(min(LENGTHS))], waits[LENGTHS.index(max(LENGTHS))]
    return [
        Row("together: throughput", 1 / timing.ratio, 0.9, "at least", detail=str(timing)),
        Row(
            "together: the shortest's wait in the longest's",
            shortest / longest,
            0.5,
            detail=f"{shortest:.2f} s for {min(LENGTHS)}, {longest:.2f} s for {max(LENGTHS)}",
        ),
        Row("together: throughput with four pictures", 1 / also.ratio, detail=str(also)),
    ]


# --- later turns --------------------------------------------------------------------------------


def tenth_turn(options: Options) -> list[Row]:
    plain, cached = mini(), Chat(mini().model, prefixes=2)
    talk: list[Message] = []
    rest = "Say it in your own words, in one or two sentences, as you would to a friend of yours."
    for number in range(9):
        talk.append(user(f"{QUESTIONS[number % len(QUESTIONS)]} {rest}"))
        talk.append(cached.reply(talk, seed=0, modalities=TEXT, max_new_tokens=32).message)
    talk.append(user(f"And what else is there to say? {rest}"))
    size = len(plain.model.renderer.render(talk, add_generation_prompt=True))

    def first_token(chat: Chat) -> Callable[[], float]:
        def ask() -> float:
            """A reply that is closed early is not kept in the prefix cache, so each try is new."""
            events = chat.stream(talk, seed=0, modalities=TEXT)
            next(event for event in events if isinstance(event, TextDelta))
            there = time.perf_counter()
            events.close()  # pyright: ignore[reportAttributeAccessIssue]
            return time.perf_counter() - there

        return ask

    timing = timed(first_token(cached), first_token(plain), options)
    about = f"{timing}; {size} tokens"
    return [Row("tenth turn: time to the first token", timing.ratio, 0.3, detail=about)]


# --- media --------------------------------------------------------------------------------------


def media(options: Options) -> list[Row]:
    """Against its bar: media that follow one another. The text between them, which the language
    model needs its time for, is in the second row."""
    chat = mini()
    talk = [user("Draw a dog and play its bark.")]

    def ours(most: int) -> float:
        """All before the first signal token does not count."""
        began, started, ready = time.perf_counter(), 0.0, 0.0
        for event in chat.stream(talk, seed=0, modalities=BOTH, max_new_tokens=most):
            if isinstance(event, MediumStarted):
                started = started or time.perf_counter()
            elif isinstance(event, MediumReady):
                ready = time.perf_counter()
        return time.perf_counter() - began - (ready - started)

    with torch.inference_mode():
        calls = [_pipeline_call(chat, key) for key in ("image", "audio")]

    @torch.inference_mode()
    def bare() -> None:
        for call in calls:
            call()

    timing = timed(lambda: ours(1), bare, options)
    name = "picture and sound: until both are ready"
    spoken = timed(lambda: ours(64), bare, replace(options, pairs=-(-options.pairs // 3)))
    return [
        Row(name, timing.ratio, 1.05, detail=str(timing)),
        Row(f"{name}, words between", spoken.ratio, detail=str(spoken)),
    ]


def _pipeline_call(chat: Chat, key: str) -> Callable[[], Any]:
    """diffusers' pipeline of a decoder, called as the decoder calls it, everything ready."""
    decoder = chat.model.decoders[key]
    condition = decoder.encode_captions(["a dog"])
    arguments = {
        **decoder.condition_kwargs(condition),
        **decoder.guidance_kwargs(decoder.config.guidance, lambda: decoder.unconditional(1)),
        **decoder.pipeline_kwargs(),
        "num_inference_steps": decoder.config.steps,
        "output_type": "np",
    }
    return lambda: decoder.pipeline(**arguments, generator=[torch.Generator().manual_seed(0)])


# --- the server ---------------------------------------------------------------------------------


class Server:
    """`mmllm serve mini` in a process of its own, until the end of the block."""

    def __enter__(self) -> Server:
        threads = str(torch.get_num_threads())
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mmllm", "serve", "mini", "--port", "0", "--device", "cpu"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads},
        )
        assert self.process.stdout
        self.address = self.process.stdout.readline().strip().split("/")[2]
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)

    def post(self, path: str, body: bytes, *, hang_up: bool = False) -> tuple[int, bytes]:
        """Status and body; `hang_up`: go away as soon as something of a stream has come."""
        connection = http.client.HTTPConnection(self.address, timeout=300)
        try:
            connection.request("POST", path, body, {"content-type": "application/json"})
            response = connection.getresponse()
            if hang_up:
                for _ in range(6):
                    response.readline()
                return response.status, b""
            return response.status, response.read()
        finally:
            connection.close()

    def chat(self, body: dict[str, Any], *, hang_up: bool = False) -> tuple[int, bytes]:
        return self.post("/v1/chat/completions", json.dumps(body).encode(), hang_up=hang_up)

    def rest(self) -> None:
        """Wait until nothing is answered any more."""
        while True:
            connection = http.client.HTTPConnection(self.address, timeout=60)
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
            connection.close()
            if "mmllm_running 0.0" in text and "mmllm_waiting 0.0" in text:
                return
            time.sleep(0.05)

    def private_bytes(self) -> int:
        """Memory that the process shares with none (USS)."""
        text = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text(encoding="utf-8")
        found = [line.split() for line in text.splitlines() if line.startswith("Private_")]
        return sum(int(size) * 1024 for _, size, *_ in found)


def memory(options: Options) -> list[Row]:
    draw = random.Random(0)
    shown = parts()
    wishes = [TEXT, *({**TEXT, name: "force"} for name in TEXT)]

    def ask(number: int) -> None:
        gone = number % 4 == 3
        seen = shown[number % len(shown)] if number % 3 == 0 else []
        body = {
            "messages": [
                {"role": "user", "content": [*seen, {"type": "text", "text": "What is it?"}]}
            ],
            "modalities": wishes[number % 5 % 4],
            "decoders": {name: {"steps": 40 if gone else 4} for name in TEXT},
            "max_tokens": 16,
            "temperature": 1.0,
            "seed": number,
            "stream": gone or number % 2 == 0,
        }
        status, _ = server.chat(body, hang_up=gone)
        if status != 200:
            raise SystemExit(f"memory: request {number} was answered by {status}")

    with Server() as server, ThreadPoolExecutor(4) as pool:
        held = []
        for numbers in (range(50), range(50, 250)):
            list(pool.map(ask, draw.sample(numbers, len(numbers))))
            server.rest()
            held.append(server.private_bytes())
    about = " and ".join(f"{value / 2**20:.0f} MiB" for value in held)
    return [Row("memory: after request 250 and after 50", held[1] / held[0], 1.03, detail=about)]


def malformed(options: Options) -> list[Row]:
    draw, good = random.Random(0), valid()
    with Server() as server:
        before = server.chat(good)[1]
        asked = [wrong(draw, good) for _ in range(2000)]
        with ThreadPoolExecutor(4) as pool:
            statuses = list(pool.map(lambda one: server.post(*one)[0], asked))
        after = server.chat(good)[1]
    replies = [json.loads(body)["choices"][0]["message"]["content"] for body in (before, after)]
    odd = [
        (status, body[:200])
        for status, (_, body) in zip(statuses, asked, strict=True)
        if not 400 <= status < 500
    ]
    return [
        Row("malformed: not answered by 4xx", len(odd), 0, unit="of 2000", detail=str(odd[:1])),
        Row(
            "malformed: answers well afterwards",
            float(replies[0] == replies[1]),
            1,
            "at least",
            unit="",
        ),
    ]


def parts() -> list[list[dict[str, Any]]]:
    """A picture, a sound and a clip, as parts of a message."""
    noise = np.random.default_rng(0)
    picture = Image.from_numpy(noise.integers(0, 256, (96, 96, 3), np.uint8))
    sound = Audio.from_numpy(noise.normal(0, 0.1, (1, 16000)).astype(np.float32), 16000)
    clip = Video.from_numpy(noise.integers(0, 256, (8, 64, 64, 3), np.uint8), 8.0)
    return [[part(picture)], [part(sound)], [part(clip)]]


def part(medium: Medium) -> dict[str, Any]:
    suffix = {"image": "png", "audio": "wav", "video": "mp4"}[medium.modality]
    with tempfile.TemporaryDirectory() as folder:
        data = medium.save(Path(folder) / f"medium.{suffix}").read_bytes()
    return part_of(medium.modality, data)


def part_of(modality: str, data: bytes) -> dict[str, Any]:
    text = base64.b64encode(data).decode()
    if modality == "audio":
        return {"type": "input_audio", "input_audio": {"data": text, "format": "wav"}}
    return {
        f"{modality}_url": {"url": f"data:{modality}/any;base64,{text}"},
        "type": f"{modality}_url",
    }


def valid() -> dict[str, Any]:
    content = [entry for shown in parts() for entry in shown]
    return {
        "model": "mini",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [*content, {"type": "text", "text": "What is it?"}]},
        ],
        "modalities": TEXT,
        "max_tokens": 4,
        "temperature": 0.0,
        "seed": 1,
    }


WRONG: dict[str, Sequence[Any]] = {
    "model": ("gpt-4", 7, ["mini"]),
    "messages": (None, "x", 7, [], {}, ["x"], [7], [{}], [{"role": "user"}], [[]]),
    "modalities": (7, "text", ["smell"], {"image": "always"}, {"smell": "auto"}, {"image": 1}),
    "max_tokens": (0, -1, 10**9, "x", 0.5, [], {}),
    "temperature": (-1, 9, "hot", [], {}),
    "top_p": (0, 1.5, "x", []),
    "top_k": (-1, 0.5, "x"),
    "stop": (7, [7], "", [""], {}, ["x"] * 99),
    "seed": (0.5, "x", [], {}, 2**70),
    "stream": (7, "x", [], {}),
    "decoders": (7, [], {"smell": {}}, {"image": {"steps": 0}}, {"image": {"wings": 2}}),
    "n": (0, 2, "x"),
    "tools": ([{"type": "function"}], "x", 7),
    "response_format": ({"type": "json_object"}, "x"),
    "wings": (None, 2, "x"),
}
"""Field of a request -> what it cannot be."""
ELSEWHERE: Sequence[tuple[str, dict[str, Any]]] = (
    ("/v1/images/generations", {"prompt": ""}),
    ("/v1/images/generations", {"prompt": "x", "size": "0x0"}),
    ("/v1/images/generations", {"prompt": "x", "n": 99}),
    ("/v1/audio/speech", {"input": 7}),
    ("/v1/audio/speech", {"input": "x", "response_format": "mp9"}),
    ("/v1/videos", {"prompt": []}),
    ("/v1/videos", {"prompt": "x", "seconds": -1}),
    ("/v1/nothing", {}),
)


def wrong(draw: random.Random, good: dict[str, Any]) -> tuple[str, bytes]:
    """Path and body of an invalid request: cut or spoilt JSON, a wrong type or value,
    a medium that is none."""
    path = "/v1/chat/completions"
    kind = draw.choice(["cut", "bytes", "field", "field", "medium", "elsewhere"])
    body = copy.deepcopy(good)
    whole = json.dumps(body).encode()
    if kind == "cut":
        return path, whole[: draw.randrange(len(whole))]
    if kind == "bytes":
        place = draw.randrange(len(whole))
        return path, whole[:place] + bytes([draw.randrange(128, 192)]) + whole[place:]
    if kind == "field":
        name = draw.choice(list(WRONG))
        body[name] = draw.choice(WRONG[name])
    elif kind == "medium":
        data = draw.randbytes(draw.randrange(1, 2000))
        one = part_of(draw.choice(["image", "audio", "video"]), data)
        if draw.random() < 0.3:
            inside = one[one["type"]]
            name = draw.choice(list(inside))
            inside[name] = draw.choice([None, 7, "", "http://127.0.0.1/x.png", "data:,x", "%%%"])
        body["messages"][1]["content"] = [one]
    else:
        path, body = draw.choice(ELSEWHERE)
    return path, json.dumps(body).encode()


BARS = {
    "text": text,
    "together": together,
    "tenth-turn": tenth_turn,
    "media": media,
    "memory": memory,
    "malformed": malformed,
}

if __name__ == "__main__":
    sys.exit(pairs.main(__doc__ or "", BARS))

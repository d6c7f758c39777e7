"""Is there a request that the server answers with a fault of its own, or that makes others wait?

    python benchmarks/fuzz_server.py                             # 10,000 requests to mini
    python benchmarks/fuzz_server.py --model tiny --seed 1 --count 1000 --keep broken

Requests to all routes are made, changed (JSON and its types, numbers at their edges, characters,
base64 and data: URIs, files, headers, chunks, bodies that end too early) and sent to a server on
this machine, some at a time, while /health is asked meanwhile. Exits with 1 where one is answered
by 5xx, takes over 5 s, or is not answered though it was whole, where /health takes over 2 s, or
where the server and its processes grow by more than 512 MiB after a warm-up of 1,000 requests.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import copy
import io
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image as PILImage

from mmllm import console
from mmllm.conversation import Audio, Video

SECONDS = 5.0
HEALTH_SECONDS = 2.0
MEMORY = 2**29
"""Bytes that the server and its processes may grow by after the warm-up."""
WARM_UP = 1000
"""Requests after which all is there that is made at first use: weights laid out for the products,
processes that decode, buffers of threads."""
PATIENCE = 60.0
"""Seconds after which an answer is not waited for any more."""
CHAT, IMAGES, SPEECH, VIDEOS = (
    "/v1/chat/completions",
    "/v1/images/generations",
    "/v1/audio/speech",
    "/v1/videos",
)
PATHS = (CHAT, IMAGES, SPEECH, VIDEOS, "/v1/models", "/health", "/metrics", "/openapi.json")
NUMBERS: list[Any] = [
    *(0, -1, 1, 2, 3, 7, 8, 16, 64, 255, 2**15, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**70),
    *(10**400, 0.0, -0.0, 1e-45, 1e-38, 1e-9, 1e-5, 0.5, 1.0, 1.5, 2.0, 1e9, 1e38, 1e300, -1e300),
]
TEXTS = [
    *(
        "",
        " ",
        "\0",
        "\n\n",
        "x" * 300,
        "💥" * 40,
        "\u202e\u2028\u2029\u0085",
        "\ufeff",
        "e\u0301" * 30,
    ),
    *("<|im_end|>", "<image>", "</s>", "{{ 1 + 1 }}", "{%", "../../etc/passwd", "%00%ff", "auto"),
    *("64x64", "0x0", "1x1", "99999x1", "1e3", "nan", "Infinity", "true", "\ud800", "a" * 20_000),
    *("http://127.0.0.1/x.png", "file:///etc/passwd", "data:", "data:,x", "data:image/png;base64,"),
    *("data:" + "a" * 20_000, "data:" + ";a=b" * 5000, "DATA:IMAGE/PNG;BASE64,iVBORw0KGgo="),
]
ODD: list[Any] = [None, True, False, [], [[]], {}, {"a": {"b": []}}, [None] * 50, [1, "x", None]]
USUAL: dict[str, list[Any]] = {
    "steps": [1, 2, 3],
    "guidance": [0, 0.5, 1.0, 1.001, 7.5, 100.0],
    "seconds": [1e-5, 0.001, 0.02, 0.1, 0.25, 1.0],
    "frames": [1, 5, 9],
    "fps": [0.1, 1.0, 23.976, 240.0],
    "height": [8, 16, 32, 48, 64, 128],
    "width": [8, 16, 32, 48, 64, 128],
    "strength": [0.01, 0.5, 1.0],
}
"""Values that some decoder takes."""
SCHEDULERS = ["dpm++", "euler", "lcm", "ddim", "unipc", "heun", "", "nothing"]


@dataclass
class Asked:
    """One request. `data`: what is sent, in pieces; `whole`: a server can answer it."""

    kind: str
    data: list[bytes]
    whole: bool = True


@dataclass
class Answer:
    """`status` 0: none came."""

    asked: Asked
    status: int
    seconds: float
    body: bytes


# --- what is sent -------------------------------------------------------------------------------


def requests(seed: int, count: int) -> Iterator[Asked]:
    """The same requests for the same seed."""
    for number in range(count):
        draw = random.Random(f"{seed}:{number}")
        kind = draw.choices(list(KINDS), [weight for _, weight in KINDS.values()])[0]
        yield KINDS[kind][0](draw)


def post(kind: str, path: str, body: Any, **headers: str) -> Asked:
    """A whole request in one piece."""
    data = body if isinstance(body, bytes) else as_json(body)
    return Asked(kind, [head("POST", path, {"content-length": str(len(data)), **headers}) + data])


def as_json(tree: Any) -> bytes:
    """JSON with lone surrogates escaped, infinities and all."""
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def head(method: str, path: str, headers: dict[str, str]) -> bytes:
    fields = {
        "host": "localhost",
        "content-type": "application/json",
        "connection": "close",
        **headers,
    }
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")


@cache
def files() -> dict[str, list[bytes]]:
    """Small whole files of each part's kind."""
    noise = np.random.default_rng(0)
    pixels = noise.integers(0, 256, (24, 32, 3), np.uint8)
    pictures = []
    for form, mode in [
        *[("PNG", mode) for mode in ("RGB", "RGBA", "L", "P", "1", "I;16")],
        *[("JPEG", "RGB"), ("JPEG", "CMYK"), ("WEBP", "RGB"), ("BMP", "RGB"), ("GIF", "P")],
        *[("TIFF", "RGB"), ("TIFF", "F")],
    ]:
        file = io.BytesIO()
        PILImage.fromarray(pixels).convert("L" if mode == "I;16" else "RGB").convert(mode).save(
            file, form
        )
        pictures.append(file.getvalue())
    wave = (noise.random(1600) - 0.5).astype(np.float32)
    sounds = []
    for form, subtype in [
        *[("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "GSM610"), ("WAV", "ULAW")],
        *[("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("AIFF", "PCM_24"), ("MP3", "MPEG_LAYER_III")],
    ]:
        file = io.BytesIO()
        soundfile.write(file, wave, 8000, format=form, subtype=subtype)
        sounds.append(file.getvalue())
    clip = Video.from_numpy(noise.integers(0, 256, (6, 32, 32, 3), np.uint8), 4.0)
    audible = Video(array=clip.array, fps=4.0, audio=Audio.from_numpy(wave, 8000))
    with tempfile.TemporaryDirectory() as folder:
        clips = [
            medium.save(Path(folder) / name).read_bytes()
            for medium, name in (
                (clip, "a.mp4"),
                (audible, "b.mp4"),
                (clip, "c.gif"),
                (clip, "d.webp"),
            )
        ]
    return {"image_url": pictures, "input_audio": sounds, "video_url": clips}


def changed(data: bytes, draw: random.Random) -> bytes:
    """A file with bytes turned, numbers at their edges, pieces cut, doubled or moved."""
    found = bytearray(data)
    for _ in range(draw.choice([0, 1, 1, 2, 4, 16])):
        if not found:
            break
        place = draw.randrange(min(len(found), draw.choice([64, 256, len(found)])))
        deed = draw.choice(["byte", "number", "cut", "drop", "double", "zero"])
        if deed == "byte":
            found[place] = draw.randrange(256)
        elif deed == "number":
            value = draw.choice([0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF])
            order = draw.choice(["little", "big"])
            found[place : place + 4] = value.to_bytes(4, order)  # pyright: ignore
        elif deed == "cut":
            del found[max(place, 4) :]
        elif deed == "drop":
            del found[place : place + draw.randrange(1, 64)]
        elif deed == "double":
            found[place:place] = found[place : place + draw.randrange(1, 256)]
        else:
            found[place : place + draw.randrange(1, 64)] = bytes(draw.randrange(1, 64))
    return bytes(found)


def part(draw: random.Random) -> dict[str, Any]:
    """A part of a message with a small file, of its own kind most of the time."""
    kind = draw.choice(["text", "image_url", "input_audio", "video_url"])
    if kind == "text":
        return {"type": "text", "text": draw.choice(["what is this?", *TEXTS])}
    held = kind if draw.random() < 0.9 else draw.choice(list(files()))
    data = base64.b64encode(draw.choice(files()[held])).decode()
    if kind == "input_audio":
        return {"type": kind, kind: {"data": data, "format": "wav"}}
    return {"type": kind, kind: {"url": f"data:any/thing;base64,{data}"}}


def body(draw: random.Random, path: str) -> dict[str, Any]:
    """A valid request that takes little work."""
    seed = {"seed": draw.randrange(2**31)}
    decoder = {"decoder": {"steps": 2}}
    if path == IMAGES:
        return {"prompt": "a red apple", "n": 1, "size": "auto", **seed, **decoder}
    if path == SPEECH:
        return {"input": "rain", "response_format": "wav", **seed, **decoder}
    if path == VIDEOS:
        return {"prompt": "a rocket", **seed, **decoder}
    roles = draw.choice([["user"], ["system", "user"], ["user", "assistant", "user"]])
    messages: list[dict[str, Any]] = [
        {"role": role, "content": draw.choice(["hello", [{"type": "text", "text": "hello"}]])}
        for role in roles
    ]
    messages[-1]["content"] = [part(draw) for _ in range(draw.choice([1, 1, 2, 4]))]
    return {
        "model": None,
        "messages": messages,
        "modalities": draw.choice([["text"], {"image": "forbid", "audio": "forbid"}, ["text"]]),
        "decoders": {"image": {"steps": 2}},
        "temperature": draw.choice([0, 1.0]),
        "top_p": 0.9,
        "top_k": 5,
        "repetition_penalty": 1.1,
        "max_tokens": draw.choice([1, 2, 4]),
        "max_media": 1,
        "stop": ["x"],
        "stream": draw.choice([True, False, None]),
        **seed,
    }


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside a JSON tree."""
    if path:
        yield path
    if isinstance(tree, dict | list):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield from places(tree[key], (*path, key))


def mutated(tree: Any, draw: random.Random) -> Any:
    """A copy in which some values are missing, repeated, of another type or name, or extreme."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.choice([1, 1, 2, 3])):
        found = list(places(tree))
        if not found:
            break
        *above, last = draw.choice(found)
        inside = tree
        for key in above:
            inside = inside[key]
        value, deed = (
            inside[last],
            draw.choice(["drop", "odd", "edge", "edge", "name", "text", "many"]),
        )
        if deed == "drop":
            del inside[last]
        elif deed == "name" and isinstance(inside, dict):
            names = ["x", "type", "url", "content", "seconds", "height", "scheduler", "init_media"]
            inside[draw.choice(names)] = inside.pop(last)
        elif deed == "many":
            inside[last] = [copy.deepcopy(value) for _ in range(draw.choice([2, 20, 2000]))]
            if len(json.dumps(inside[last])) > 4_000_000:
                inside[last] = inside[last][:2]
        elif deed == "odd":
            inside[last] = copy.deepcopy(draw.choice(ODD))
        elif deed == "text" or isinstance(value, str):
            inside[last] = draw.choice([*TEXTS, *SCHEDULERS])
        else:
            inside[last] = draw.choice(NUMBERS)
    return tree


def _structure(draw: random.Random) -> Asked:
    path = draw.choice([CHAT, CHAT, CHAT, IMAGES, SPEECH, VIDEOS])
    return post("structure", path, mutated(body(draw, path), draw))


def _options(draw: random.Random) -> Asked:
    """Options of decoders and of sampling, one or two at their edges."""
    path = draw.choice([CHAT, IMAGES, SPEECH, VIDEOS])
    tree = body(draw, path)
    values = [value for value in NUMBERS if not isinstance(value, int) or abs(value) < 2**64]
    decoder: dict[str, Any] = {"steps": draw.choice([1, 2, 3])}
    names = ["steps", "guidance", "seconds", "frames", "fps", "height", "width", "strength"]
    for name in draw.sample(names, draw.choice([1, 1, 2])):
        decoder[name] = draw.choice(USUAL.get(name, values) if draw.random() < 0.6 else values)
    for name, texts in (
        ("scheduler", SCHEDULERS),
        ("init_media", ["last", "none"]),
        ("negative_prompt", TEXTS),
    ):
        if draw.random() < 0.2:
            decoder[name] = draw.choice(texts)
    if path == CHAT:
        modality = draw.choice(["image", "audio", "video"])
        tree["decoders"] = {modality: decoder}
        tree["modalities"] = {modality: draw.choice(["auto", "force"])}
        for name in draw.sample(["temperature", "top_p", "top_k", "repetition_penalty", "seed"], 1):
            tree[name] = draw.choice(values)
    else:
        tree["decoder"] = decoder
        if draw.random() < 0.5:
            tree["size"] = draw.choice(["64x64", "16x16", "32x16", "1x1", "8192x8", "99999x99999"])
        if draw.random() < 0.3:
            tree["seconds"] = draw.choice(["1", "4", "0", "0.001", 1e-9, 2.0, "9999"])
    return post("options", path, tree)


def _media(draw: random.Random) -> Asked:
    kind = draw.choice(list(files()))
    data = changed(draw.choice(files()[kind]), draw)
    text = base64.b64encode(data).decode()
    name = draw.choice(["image/png", "video/mp4", "any/thing", ""])
    inside = {"data": text} if kind == "input_audio" else {"url": f"data:{name};base64,{text}"}
    tree = body(draw, CHAT)
    tree["messages"] = [{"role": "user", "content": [{"type": kind, kind: inside}]}]
    return post("media", CHAT, tree)


def _base64(draw: random.Random) -> Asked:
    """Forms and faults of base64 and of data: URIs."""
    kind = draw.choice(["image_url", "input_audio"])
    raw = draw.choice(files()[kind])
    text = draw.choice([base64.b64encode, base64.encodebytes, base64.urlsafe_b64encode])(
        raw
    ).decode()
    place = draw.randrange(len(text))
    text = draw.choice(
        [text, text.rstrip("="), text[:place], text[:place] + draw.choice(TEXTS) + text[place:]]
    )
    scheme = draw.choice(["data:", "DATA:", " data:", "data :", "dat:", ""])
    middle = draw.choice(
        ["image/png", "image/png;a=b", "", ";" * 2000, "a" * 5000, "image/svg+xml"]
    )
    end = draw.choice([";base64,", ";BASE64,", ";base64, ", ",", ";base64", ";base64,,"])
    inside = {"url": scheme + middle + end + text}
    if kind == "input_audio":
        inside = {"data": draw.choice([text, scheme + middle + end + text])}
    tree = body(draw, CHAT)
    tree["messages"] = [{"role": "user", "content": [{"type": kind, kind: inside}]}]
    return post("base64", CHAT, tree)


def _bytes(draw: random.Random) -> Asked:
    """JSON whose bytes were changed."""
    path = draw.choice([CHAT, IMAGES, SPEECH, VIDEOS])
    data = changed(as_json(body(draw, path)), draw)
    wrapped = draw.choice([data, data, data, b"\xef\xbb\xbf" + data, b"[" * 5000 + data])
    return post("bytes", path, wrapped)


def _headers(draw: random.Random) -> Asked:
    path = draw.choice([*PATHS, "/v1/videos/x", "/v1/videos/%00", "/v1/models/" + "x" * 2000, "/"])
    path += draw.choice(
        ["", "", "/", "?a=b", "?" + "a&" * 500, "#x", "//", "/../..", "%2e%2e", "é"]
    )
    name, value = draw.choice(
        [
            ("content-type", draw.choice(["text/plain", "", "application/json; charset=utf-16"])),
            ("content-type", "multipart/form-data; boundary=" + "x" * 5000),
            ("content-type", "application/" + "a." * 4000 + "+json"),
            ("host", draw.choice(["evil.example", "", "localhost:99999", "[::1]", "LOCALHOST"])),
            ("authorization", draw.choice(["Bearer x", "x" * 5000, "", "Basic é"])),
            ("content-encoding", "gzip"),
            ("expect", "100-continue"),
            ("upgrade", "websocket"),
            ("transfer-encoding", draw.choice(["gzip", "identity", "chunked, chunked"])),
            ("x" * draw.choice([1, 3000]), "y" * draw.choice([1, 60_000])),
            ("range", "bytes=0-0,1-1," * 500),
            ("cookie", "a=b; " * 1000),
        ]
    )
    method = draw.choice(
        ["GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH", "TRACE", "FOO"]
    )
    data = as_json(body(draw, CHAT)) if draw.random() < 0.5 else b""
    fields = {"content-length": str(len(data)), name: value}
    return Asked("headers", [head(method, path, fields) + data])


def _wire(draw: random.Random) -> Asked:
    """Chunks, lengths that are wrong, requests behind one another, bodies that end too early."""
    data = as_json(body(draw, draw.choice([CHAT, IMAGES])))
    start = head("POST", CHAT, {"transfer-encoding": "chunked"})
    deed = draw.choice(
        ["chunks", "bad chunk", "cut chunks", "short", "long", "twice", "none", "noise"]
    )
    size = draw.choice([1, 7, 100, len(data)]) if len(data) < 5000 else 1000
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    chunks = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces]
    if deed == "chunks":
        return Asked(deed, [start, *chunks, b"0\r\n\r\n"])
    if deed == "bad chunk":
        bad = draw.choice(
            [b"zz\r\n", b"-1\r\n", b"f" * 40 + b"\r\n", b"5;" + b"a" * 9000 + b"\r\n"]
        )
        return Asked(deed, [start, chunks[0], bad], whole=False)
    if deed == "cut chunks":
        return Asked(deed, [start, *chunks[: len(chunks) // 2]], whole=False)
    if deed == "noise":
        return Asked(deed, [draw.randbytes(draw.choice([1, 100, 9000])) + b"\r\n\r\n"], whole=False)
    stated = {"short": len(data) // 2, "long": len(data) * 2, "none": -1}.get(deed, len(data))
    fields = {} if stated < 0 else {"content-length": str(stated)}
    whole = head("POST", CHAT, fields) + data
    if deed == "twice":
        whole = head("POST", CHAT, {**fields, "connection": "keep-alive"}) + data
        return Asked(deed, [whole, head("GET", "/health", {})])
    return Asked(deed, [whole], whole=deed != "long")


KINDS: dict[str, tuple[Callable[[random.Random], Asked], float]] = {
    "structure": (_structure, 4),
    "options": (_options, 2),
    "media": (_media, 4),
    "base64": (_base64, 2),
    "bytes": (_bytes, 2),
    "headers": (_headers, 2),
    "wire": (_wire, 1),
}
"""Kind -> its maker, and how often it is drawn."""


# --- sending ------------------------------------------------------------------------------------


async def send(host: str, port: int, asked: Asked) -> Answer:
    """The answer, read to the connection's end. What is not whole is cut off by the client."""
    began = time.monotonic()
    found = b""
    try:
        async with asyncio.timeout(PATIENCE):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                for piece in asked.data:
                    writer.write(piece)
                    await writer.drain()
                if not asked.whole:
                    await asyncio.sleep(0.01)
                    writer.write_eof()
                found = await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        pass
    words = found[:64].split(b" ", 2)
    status = int(words[1]) if found.startswith(b"HTTP/1.1 ") and words[1].isdigit() else 0
    return Answer(asked, status, time.monotonic() - began, found)


def faults(answer: Answer) -> list[str]:
    """What is wrong with a response: a server error, or a late one."""
    found = []
    if answer.status >= 500:
        found.append(f"status {answer.status}")
    if answer.seconds > SECONDS:
        found.append(f"{answer.seconds:.1f} s")
    if answer.status == 0 and answer.asked.whole:
        found.append("no answer")
    if b'"code": "internal_error"' in answer.body:  # in the middle of a stream
        found.append("an error of the server in a stream")
    if 400 <= answer.status < 500 and b"Traceback" in answer.body:
        found.append("a traceback")
    return found


async def sent(
    host: str, port: int, asked: Iterator[Asked], at_once: int, seen: Callable[[Answer], None]
) -> None:
    """Send all, `at_once` at a time, and delete the clips that were begun."""

    async def work() -> None:
        for one in asked:
            answer = await send(host, port, one)
            if answer.status == 200 and b'"object":"video"' in answer.body.replace(b" ", b""):
                key = json.loads(answer.body.partition(b"\r\n\r\n")[2])["id"]
                await send(host, port, Asked("", [head("DELETE", f"{VIDEOS}/{key}", {})]))
            seen(answer)

    await asyncio.gather(*(work() for _ in range(at_once)))


async def watch(host: str, port: int, process: int, taken: list[float], memory: list[int]) -> None:
    """Ask /health, and measure what the server and its processes take, until cancelled."""
    while True:
        answer = await send(host, port, Asked("", [head("GET", "/health", {})]))
        taken.append(answer.seconds if answer.status == 200 else PATIENCE)
        memory.append(resident(process))
        await asyncio.sleep(0.05)


def resident(process: int) -> int:
    """Bytes of a process and of those that it started."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except (OSError, ValueError):
            continue  # it has just ended
        if process in (int(fields["Pid"]), int(fields["PPid"])) and "VmRSS" in fields:
            total += 1024 * int(fields["VmRSS"].split()[0])
    return total


# --- the server ---------------------------------------------------------------------------------


def serve(name: str) -> None:
    """A server that does little for each request; says where it is."""
    from mmllm import config, model
    from mmllm.inference.chat import Chat
    from mmllm.kernels.allocator import limit_malloc_arenas
    from mmllm.server import listener
    from mmllm.server.app import build_app
    from mmllm.server.settings import ServerSettings

    limit_malloc_arenas()  # as `mmllm serve` does
    small = ServerSettings(
        max_tokens=8,
        max_steps=3,
        max_output_media=1,
        max_output_pixels=2**16,
        max_output_frames=9,
        max_output_seconds=1.0,
    )
    if name == "tiny":
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from tests import parts

        folder = Path(tempfile.mkdtemp())
        chat = Chat(model.build(config.parse_system(parts.system_tree(folder)), seed=0).eval())
    else:
        import mmllm

        chat = mmllm.load(name)
    listening = listener.listen("127.0.0.1", 0)
    sys.stdout.write(f"{listener.address(listening)}\n")
    sys.stdout.flush()
    listener.uvicorn_server(build_app(chat, small)).run(sockets=[listening])


@contextmanager
def served(name: str) -> Iterator[tuple[int, int]]:
    """(port, process) of a server that runs meanwhile."""
    command = [sys.executable, __file__, "--serve", name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=None, text=True) as process:
        assert process.stdout is not None
        try:
            line = next((line for line in process.stdout if "http://" in line), "")
            if not line:
                raise SystemExit("the server did not start")
            yield int(line.strip().rpartition(":")[2]), process.pid
        finally:
            process.terminate()


async def run(args: argparse.Namespace, port: int, process: int) -> bool:
    host, taken, memory = "127.0.0.1", [], []
    answers: list[Answer] = []
    bad: list[tuple[Answer, list[str]]] = []
    numbers = itertools.count(1)

    def see(answer: Answer) -> None:
        found = faults(answer)
        if found:
            bad.append((answer, found))
        if args.keep and found:
            args.keep.mkdir(parents=True, exist_ok=True)
            (args.keep / f"{next(numbers):04d}.http").write_bytes(b"".join(answer.asked.data))
        answer.body = answer.body[:600]
        answer.asked.data = answer.asked.data if found else []
        answers.append(answer)

    loaded = resident(process)
    await sent(host, port, requests(args.seed + 1, args.warm_up), args.at_once, lambda _: None)
    before = resident(process)
    watching = asyncio.create_task(watch(host, port, process, taken, memory))
    began = time.monotonic()
    await sent(host, port, requests(args.seed, args.count), args.at_once, see)
    watching.cancel()
    statuses = Counter((answer.asked.kind, answer.status) for answer in answers)
    for kind in sorted({kind for kind, _ in statuses}):
        counts = ", ".join(
            f"{status or 'none'}: {num}"
            for (of, status), num in sorted(statuses.items())
            if of == kind
        )
        console.note(f"{kind:12} {counts}")
    times = sorted(answer.seconds for answer in answers)
    console.note(
        f"{len(answers)} requests in {time.monotonic() - began:.0f} s; "
        f"median {times[len(times) // 2]:.3f} s, 99 % {times[int(len(times) * 0.99)]:.2f} s, "
        f"longest {times[-1]:.2f} s"
    )
    grown = max(memory, default=before) - before
    console.note(
        f"/health: {len(taken)} times, longest {max(taken):.2f} s; "
        f"memory {loaded / 2**20:.0f} MiB loaded, {before / 2**20:.0f} MiB after {args.warm_up} "
        f"requests, then at most {grown / 2**20:.0f} MiB more"
    )
    for answer, found in bad[:20]:
        words = b"".join(answer.asked.data)[:300]
        console.note(f"BAD {answer.asked.kind}: {', '.join(found)}: {words!r} -> {answer.body!r}")
    return not bad and max(taken) <= HEALTH_SECONDS and grown <= MEMORY


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--warm-up", type=int, default=WARM_UP)
    parser.add_argument("--model", default="mini", help="a model, or tiny: that of the tests")
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--keep", type=Path, help="a folder for requests that were answered badly")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return 0
    with served(args.model) as (port, process):
        return 0 if asyncio.run(run(args, port, process)) else 1


if __name__ == "__main__":
    sys.exit(main())

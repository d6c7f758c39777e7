"""The page: a chat, its settings, and what is to be known about the model. By Gradio.

The server keeps the conversation (mmllm.demo.sessions). The browser stores the session's secret
token, so that a reloaded page shows the same conversation.
"""

from __future__ import annotations

import errno
import functools
import html
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from mmllm.conversation import ContentPart, Medium, Message, Text
from mmllm.demo.archive import pack, unpack
from mmllm.demo.replying import follow_reply, stream_reply
from mmllm.demo.sessions import BrowserSession, Piece, SessionStore, Turn, check_text
from mmllm.errors import ConfigError, MmllmError, quoted
from mmllm.inference.chat import Chat
from mmllm.inference.sampling import Sampling
from mmllm.mini import locate
from mmllm.server.settings import ServerSettings as Limits

log = logging.getLogger(__name__)

CALLED = {"image": "picture", "audio": "sound", "video": "clip"}
WISHES = (("when it fits", "auto"), ("always", "force"), ("never", "forbid"))
EXAMPLES: tuple[tuple[str, str | None, str | None], ...] = (
    ("Draw a red apple.", "image", None),
    ("Play the sound of a bell.", "audio", None),
    ("Animate a rocket.", "video", None),
    ("What is this?", None, "pictures/fluent-3d/guitar.webp"),
)
"""(text, modality that the model must make, picture in mini's data)."""
MAX_STOPS = 16
"""Texts that an answer stops at."""
TOGETHER = 4
"""Sessions that are answered at the same time; they share the chat's engine."""

CSS = """
.gradio-container { max-width: 60rem !important; width: 100%; margin: auto; }
.gradio-container main, .gradio-container .tabs { width: 100%; }
#conversation .example { border: 1px solid var(--border-color-primary); border-radius: 0.5rem; }
#conversation .image-frame img { width: 16rem; object-fit: contain !important; }
#conversation .minimal-audio-player { height: 3rem !important; min-width: 14rem; }
#conversation video { width: 16rem; max-width: 100%; height: auto; }
#conversation [aria-label="Share"] { display: none; } /* it would upload to another host */
#conversation .placeholder { padding: 0 1rem; }
footer { display: none !important; }
@media (max-width: 40rem) { .gradio-container { padding: 0.25rem !important; } }
"""

_WIDGETS: dict[str, Callable[..., Any]] = {
    "steps": lambda low, value: gr.Slider(low, 100, value, step=1, label="Denoising steps"),
    "guidance": lambda _, value: gr.Slider(
        0, 15, value, step=0.5, label="Guidance", info="How closely it follows; 1 or less is off"
    ),
    "negative_prompt": lambda _, value: gr.Textbox(
        value, label="Leave out", placeholder="blurry, text"
    ),
    "init_media": lambda _, value: gr.Radio(
        [("Nothing", "none"), ("The newest one", "last")], value=value, label="Start from"
    ),
    "strength": lambda _, value: gr.Slider(
        0.05, 1, value, step=0.05, label="Strength", info="How far it goes from where it starts"
    ),
    "seconds": lambda _, value: gr.Number(
        value or 0, label="Seconds", info="0: as many as it can", step=0.5
    ),
    "frames": lambda _, value: gr.Number(value, label="Frames", precision=0),
    "fps": lambda _, value: gr.Number(value, label="Frames per second"),
    "height": lambda _, value: gr.Number(value, label="Height in pixels", precision=0),
    "width": lambda _, value: gr.Number(value, label="Width in pixels", precision=0),
}
"""An option of a decoder -> its widget, given the least and the usual value. The options
that are not here are for programs."""
_READ: dict[str, Callable[[Any], Any]] = {
    "seed": int,
    "negative_prompt": check_text,
    "stop": lambda text: _stops(text),
    **dict.fromkeys(("steps", "max_new_tokens", "max_media"), int),
}
"""A widget's value -> what the engine takes, where they differ."""


_REMEDY_IN_PYTHON = re.compile(r",? or use `with mmllm\.[^`]*`")


def theme() -> gr.themes.Base:
    """Gradio's soft theme with fonts that every system has: the default ones come from a host."""
    return gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


@dataclass
class SettingsPanel:
    """The widgets of the settings panel, and the place of each one's value in a request."""

    widgets: list[Any]
    places: list[tuple[str, ...]]
    reuse: Any
    """The button that takes the last answer's seed."""

    def read(self, values: Sequence[Any]) -> dict[str, Any]:
        """Keyword arguments of `Chat.stream`; what was left empty is left out."""
        request: dict[str, Any] = {"modalities": {}, "decoders": {}}
        for place, value in zip(self.places, values, strict=True):
            if value in (None, "") or (place[-1] == "seconds" and not value):
                continue
            if place == ("seed",) and not re.fullmatch(r"[0-9]{1,18}", str(value).strip()):
                raise ConfigError(f"the seed is a number such as 7, not {quoted(value)}")
            tree = request
            for name in place[:-1]:
                tree = tree.setdefault(name, {})
            tree[place[-1]] = _READ.get(place[-1], lambda value: value)(value)
        for options in request["decoders"].values():
            _check_cost(options)
        return request


def _check_cost(options: Mapping[str, Any]) -> None:
    """Raises ConfigError for a medium that costs more than the server lets one cost. What a decoder
    can make at all, it says itself."""
    pixels = abs(options.get("width", 1) * options.get("height", 1))
    frames = options.get("frames", 1)
    for what, value, most in (
        ("seconds", options.get("seconds", 0), Limits.max_output_seconds),
        ("frames", frames, Limits.max_output_frames),
        ("width x height", pixels, Limits.max_output_pixels),
        ("width x height x frames", pixels * frames, Limits.max_output_volume),
    ):
        if value > most:
            raise ConfigError(f"{what}: expected at most {most:g}, got {value:g}")


def _stops(text: str) -> list[str]:
    stops = [line for line in check_text(text).splitlines() if line]
    if len(stops) > MAX_STOPS:
        raise ConfigError(f"{len(stops)} texts to stop at, more than {MAX_STOPS}")
    return stops


def build(chat: Chat, sessions: SessionStore, *, card: str) -> gr.Blocks:
    """The page, not yet served."""
    name = chat.model.config.name
    inputs = chat.model.renderer.input_keys
    examples = _examples(chat)
    shown = [
        {"text": text, "display_text": text + (" (a picture)" if file else "")}
        for text, _, file in examples
    ]
    with gr.Blocks(title=f"{name}: chat", analytics_enabled=False, fill_height=True) as page:
        # The name of the session; its secret is not a password, only the storage's encoding.
        token = gr.BrowserState(None, storage_key="mmllm-demo", secret="mmllm-demo-state")
        with gr.Tab("Chat"):
            conversation = gr.Chatbot(
                elem_id="conversation",
                label=name,
                show_label=False,
                height="min(68dvh, 60rem)",
                editable="user",
                render_markdown=False,
                sanitize_html=True,
                latex_delimiters=[],
                allow_tags=False,
                buttons=["copy"],
                feedback_options=None,
                examples=shown,  # pyright: ignore[reportArgumentType]
                placeholder=f"Say something to {name}, show it something, or ask for something.",
            )
            box = gr.MultimodalTextbox(
                elem_id="message",
                show_label=False,
                placeholder="Type, paste, drop or record",
                sources=["upload", "microphone"] if "audio" in inputs else ["upload"],
                file_count="multiple",
                interactive=False,  # until the session is known
            )
            if "image" in inputs:
                with gr.Accordion("Camera", open=False, elem_id="camera"):
                    camera = gr.Image(
                        sources=["webcam"],
                        type="filepath",
                        show_label=False,
                        buttons=[],
                        webcam_options=gr.WebcamOptions(mirror=False),
                    )
            with gr.Row(elem_id="keep"):
                save = gr.Button("Save conversation", size="sm")
                load = gr.UploadButton("Load conversation", size="sm", file_types=[".zip"])
                zipped = gr.DownloadButton(visible="hidden", elem_id="zipped")
        with gr.Tab("Settings"):
            settings = _settings(chat)
        with gr.Tab("About"):
            gr.Markdown(_about(chat, card), elem_id="about")

        def enter(token: str | None) -> tuple[Any, ...]:
            session = sessions.open(token)
            return session.token, _shown(session.turns), {"__type__": "update", "interactive": True}

        def follow(token: str | None) -> Iterator[list[Any]]:
            session = sessions.open(token)
            for pieces in follow_reply(session):
                yield [*_shown(session.turns), _growing(pieces)]
            yield _shown(session.turns)

        def take(token: str | None, value: dict[str, Any]) -> tuple[Any, ...]:
            session = sessions.open(token)
            text = value.get("text") or ""
            media, errors = session.take(value.get("files") or ())
            try:
                text = check_text(text)
            except MmllmError as error:
                errors.append(error)
            if errors:  # what was good stays in the box
                warn(errors)
                return session.token, _shown(session.turns), _written(text, media)
            parts: list[ContentPart] = [*media, *([Text(text)] if text.strip() else [])]
            if parts:
                with session.change():
                    session.turns.append(Turn(Message("user", tuple(parts))))
            return session.token, _shown(session.turns), None

        def photograph(path: str | None, value: dict[str, Any]) -> tuple[Any, ...]:
            files = [*value.get("files", ()), *([path] if path else ())]
            return None, {"text": value.get("text", ""), "files": files}

        def example(token: str | None, chosen: gr.SelectData) -> tuple[Any, ...]:
            text, _, file = examples[chosen.index]
            session = sessions.open(token)
            files = []
            if file:
                files = [session.new_file(Path(file).suffix)]
                shutil.copyfile(locate("data") / file, files[0])
            return take(session.token, {"text": text, "files": files})

        def again(token: str | None) -> tuple[Any, ...]:
            session = sessions.open(token)
            with session.change():
                _drop_answers(session)
            return session.token, _shown(session.turns)

        def undo(token: str | None) -> tuple[Any, ...]:
            session = sessions.open(token)
            with session.change():
                _drop_answers(session)
                value = _unsaid(session)
            return _shown(session.turns), value

        def edit(token: str | None, change: gr.EditData) -> tuple[Any, ...]:
            session = sessions.open(token)
            index = change.index if isinstance(change.index, int) else change.index[0]
            text = check_text(str(change.value))
            with session.change():
                there = 0 <= index < len(session.turns)
                if not there or session.turns[index].message.role != "user":
                    warn([ConfigError("this message is not there any more")])
                    return session.token, _shown(session.turns)
                media = session.turns[index].message.media
                if not text.strip() and not media:
                    warn([ConfigError("an empty message says nothing: the old one stays")])
                    return session.token, _shown(session.turns)
                words = [Text(text)] if text.strip() else []
                session.turns[index:] = [Turn(Message("user", (*media, *words)))]
            return session.token, _shown(session.turns)

        def clear(token: str | None) -> None:
            session = sessions.open(token)
            with session.change():
                session.clear()

        def stop(token: str | None) -> None:
            sessions.open(token).cancel.set()

        def reply(token: str | None, *values: Any) -> Iterator[tuple[Any, ...]]:
            session = sessions.open(token)
            for pieces in follow_reply(session):  # another page of this session asked before
                yield [*_shown(session.turns), _growing(pieces)], BUSY
            if session.turns and session.turns[-1].message.role == "user":
                try:
                    with closing(stream_reply(chat, session, settings.read(values))) as looks:  # pyright: ignore
                        for pieces in looks:
                            yield [*_shown(session.turns), _growing(pieces)], BUSY
                except Exception as error:
                    warn([error])
                    with session.change():
                        value = _unsaid(session)
                    yield _shown(session.turns), {**READY, "value": value}
                    return
            yield _shown(session.turns), READY

        def recall(token: str | None) -> str:
            seeds = [turn.seed for turn in sessions.open(token).turns if turn.seed is not None]
            return str(seeds[-1]) if seeds else ""

        def save_zip(token: str | None) -> str:
            return str(pack(sessions.open(token), name))

        def load_zip(token: str | None, path: str) -> list[dict[str, Any]]:
            session = sessions.open(token)
            try:
                unpack(session, path)
            except Exception as error:
                warn([error])
            Path(path).unlink(missing_ok=True)
            return _shown(session.turns)

        def warn(errors: Sequence[Exception]) -> None:
            for error in errors:
                gr.Warning(html.escape(sentence(error, sessions.root)))

        def told(handler: Callable[..., Any]) -> Callable[..., Any]:
            """The handler, whose errors the page shows; what was there stays."""

            @functools.wraps(handler)
            def wrapped(*args: Any) -> Any:
                try:
                    return handler(*args)
                except Exception as error:
                    message = html.escape(sentence(error, sessions.root))
                    raise gr.Error(message, print_exception=False) from error

            return wrapped

        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
        private: dict[str, Any] = {"api_visibility": "private"}
        # Warnings reach the page by way of the queue only; nobody waits in it for these.
        warned: dict[str, Any] = {**quick, **private, "queue": True, "concurrency_limit": None}
        replying: dict[str, Any] = {
            "fn": reply,
            "inputs": [token, *settings.widgets],
            "outputs": [conversation, box],
            "concurrency_limit": TOGETHER,  # the others wait, and are told their place
            "concurrency_id": "engine",
            "show_progress": "minimal",
            "show_progress_on": [conversation],
            **private,
        }
        following: dict[str, Any] = {**replying, "fn": follow, "inputs": token}
        following |= {"outputs": conversation, "concurrency_id": "follow"}
        said = [token, conversation, box]
        entered = page.load(told(enter), token, [token, conversation, box], **quick, **private)
        entered.then(**following)
        if "image" in inputs:
            camera.input(told(photograph), [camera, box], [camera, box], **quick, **private)
        box.submit(told(take), [token, box], said, **warned).success(**replying)
        chosen = conversation.example_select(told(example), token, said, **warned)
        chosen.success(**replying)
        for event, change in ((conversation.retry, again), (conversation.edit, edit)):
            changed = event(told(change), token, [token, conversation], **warned)
            changed.success(**replying)
        conversation.undo(told(undo), token, [conversation, box], **quick, **private)
        conversation.clear(told(clear), token, None, **quick, **private)
        box.stop(told(stop), token, None, **quick, **private)
        save.click(told(save_zip), token, zipped, **quick, **private).success(
            None, js="() => document.querySelector('#zipped')?.click()", **private
        )
        load.upload(told(load_zip), [token, load], conversation, **warned)
        seed = settings.widgets[settings.places.index(("seed",))]
        settings.reuse.click(told(recall), token, seed, **quick, **private)
    return page


def _settings(chat: Chat) -> SettingsPanel:
    """Widgets for all that a request can say, by modality."""
    usual = Sampling()
    widgets: list[Any] = []
    places: list[tuple[str, ...]] = []

    def add(widget: Any, *place: str) -> None:
        widgets.append(widget)
        places.append(place)

    seed = gr.Textbox(
        label="Seed", info="Empty: another one for each answer", max_lines=1, elem_id="seed"
    )
    add(seed, "seed")
    reuse = gr.Button("Use the last answer's seed", size="sm")
    outputs = chat.model.renderer.output_keys
    for modality in outputs:
        wish = gr.Radio(
            WISHES,
            value="auto",
            label=f"Answers hold a {CALLED[modality]}",
            elem_id=f"wish-{modality}",
        )
        add(wish, "modalities", modality)
    for modality, key in outputs.items():
        decoder = chat.model.decoders[key]
        with gr.Accordion(f"{CALLED[modality].capitalize()}s", open=False):
            for option in filter(_WIDGETS.__contains__, decoder.request_options):
                widget = _WIDGETS[option](decoder.min_steps, getattr(decoder.config, option))
                add(widget, "decoders", modality, option)
    with gr.Accordion("Words", open=False):
        add(
            gr.Slider(
                0, 2, usual.temperature, step=0.05, label="Temperature", info="0: the likeliest"
            ),
            "temperature",
        )
        add(gr.Slider(0.05, 1, usual.top_p, step=0.05, label="Top p"), "top_p")
        add(gr.Number(usual.top_k, label="Top k", info="0: all", precision=0, minimum=0), "top_k")
        add(
            gr.Slider(1, 2, usual.repetition_penalty, step=0.05, label="Repetition penalty"),
            "repetition_penalty",
        )
        longest = chat.model.llm.max_length
        add(
            gr.Slider(1, longest, usual.max_new_tokens, step=1, label="Most tokens"),
            "max_new_tokens",
        )
        add(gr.Slider(0, 8, usual.max_media, step=1, label="Most media"), "max_media")
        add(gr.Textbox(label="Stop at", info="One text a line", lines=2), "stop")
    return SettingsPanel(widgets, places, reuse)


def _examples(chat: Chat) -> list[tuple[str, str | None, str | None]]:
    """Those of EXAMPLES that this model can do."""
    renderer = chat.model.renderer
    return [
        (text, makes, file)
        for text, makes, file in EXAMPLES
        if (makes is None or makes in renderer.output_keys)
        and (file is None or "image" in renderer.input_keys)
    ]


def _about(chat: Chat, card: str) -> str:
    """What the model is made of, and its card."""
    from mmllm.mini.assets import ASSETS

    config = chat.model.config
    rows = [("Language model", "llm", config.llm.weights)]
    for kind, parts in (("Encoder", config.encoders), ("Decoder", config.decoders)):
        rows += [(kind, key, getattr(part, "weights", "")) for key, part in parts.items()]
    lines = [
        f"# {config.name}",
        "What it makes is made by a machine: it may be wrong, and every file says inside that a "
        "model made it. Conversations stay on this computer and are deleted when they have not "
        "been used for a while.",
    ]
    for kind, key, weights in rows:
        asset = ASSETS.get(str(weights).removeprefix("mini:"))
        if Path(str(weights)).is_absolute():  # where it lies concerns nobody
            weights = Path(str(weights)).name
        licence = f" ({asset.licence}; {asset.credit})" if asset else ""
        lines.append(f"- **{kind}** {key}: {weights}{licence}")
    return "\n\n".join([*lines, card])


BUSY = {"__type__": "update", "submit_btn": False, "stop_btn": True}
READY = {"__type__": "update", "submit_btn": True, "stop_btn": False}


def _shown(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The conversation as Gradio's chatbot takes it, one message a turn."""
    messages = []
    for turn in turns:
        pieces: list[Piece] = [
            part.text if isinstance(part, Text) else part for part in turn.message.parts
        ]
        content = _pieces(pieces)
        if turn.message.role == "assistant":
            seed = [] if turn.seed is None else [f"seed {turn.seed}"]
            content.append(" · ".join([*seed, turn.note]))
        messages.append({"role": turn.message.role, "content": content})
    return messages


def _growing(pieces: Sequence[Piece]) -> dict[str, Any]:
    """An answer in the making, as the chatbot takes it."""
    return {"role": "assistant", "content": _pieces(pieces)}


def sentence(error: Exception, root: Path) -> str:
    """An error as the page tells it: without what helps in Python only, and without the folders
    below `root`, whose names are secret. What nobody expected is logged."""
    if isinstance(error, MmllmError):
        message = _REMEDY_IN_PYTHON.sub("", str(error))
        return re.sub(re.escape(str(root)) + r"/(?:[^/\s]+/)*", "", message)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk of the computer that runs this demo is full"
    log.error("the demo failed", exc_info=error)
    return "something went wrong here; the log of the demo says what"


def _pieces(pieces: Sequence[Piece]) -> list[Any]:
    """Words and files, empty words left out."""
    shown: list[Any] = []
    for piece in pieces:
        if isinstance(piece, Medium):
            shown.append({"path": str(piece.source), "alt_text": f"a {CALLED[piece.modality]}"})
        elif piece.strip():
            shown.append(piece.strip())
    return shown or ["…"]


def _drop_answers(session: BrowserSession) -> None:
    """Take the answers after the last message of the user away."""
    while session.turns and session.turns[-1].message.role == "assistant":
        session.turns.pop()


def _unsaid(session: BrowserSession) -> dict[str, Any]:
    """Take the user's message away if it is the last one; it as the message box takes it."""
    if not session.turns or session.turns[-1].message.role != "user":
        return _written("", ())
    message = session.turns.pop().message
    return _written(message.text, message.media)


def _written(text: str, media: Sequence[ContentPart]) -> dict[str, Any]:
    """What stands in the message box."""
    return {"text": text, "files": [str(m.source) for m in media if isinstance(m, Medium)]}

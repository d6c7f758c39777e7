"""The Gradio page: a chat, its settings, and a description of the model.

The server keeps the conversation (mmllm.demo.sessions). The browser stores the session's secret
token, so that a reloaded page shows the same conversation.
"""

from __future__ import annotations

import functools
import html
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr

from mmllm.conversation import ContentPart, Message, Text
from mmllm.demo.about import about, welcome
from mmllm.demo.archive import pack, unpack
from mmllm.demo.messages import (
    box_value,
    drop_answers,
    partial_answer,
    sentence,
    shown_turns,
    take_back,
)
from mmllm.demo.replying import follow_reply, stream_reply
from mmllm.demo.sessions import SessionStore, Turn, check_text
from mmllm.demo.settings_panel import build_settings
from mmllm.errors import ConfigError, MmllmError
from mmllm.inference.chat import Chat
from mmllm.mini import locate

log = logging.getLogger(__name__)

PICTURES = "pictures/fluent-3d"
"""Below mini's data."""
EXAMPLES: tuple[tuple[str, str | None, str, bool], ...] = (
    ("Draw a red apple.", "image", "red-apple.webp", False),
    ("Play the sound of a bell.", "audio", "bell.webp", False),
    ("Animate a rocket.", "video", "rocket.webp", False),
    ("What is this?", None, "guitar.webp", True),
)
"""(text, modality that the model must generate, thumbnail, whether it is sent too)."""
RETRY_TEMPERATURE = 0.7
"""Temperature of another reply to the same message where the settings are greedy."""
TOGETHER = 4
"""Sessions that are served concurrently; they share the chat's engine."""

CSS, _ON_LOAD = (
    Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
)


_ASK_TO_CLEAR = "token => confirm('Delete this conversation and its files?') ? token : null"


def theme() -> gr.themes.Base:
    """Gradio's soft theme with fonts that every system has: the default ones come from a host."""
    soft = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return soft.set(input_border_width="1px", input_border_color="*border_color_primary")


def build(chat: Chat, sessions: SessionStore, *, card: str) -> gr.Blocks:
    """The page, not yet served."""
    name = chat.model.config.name
    inputs = chat.model.renderer.input_keys
    examples = _examples(chat)
    shown = [
        {"text": text, "display_text": text, "icon": str(thumbnail)}
        for text, thumbnail, _ in examples
    ]
    with gr.Blocks(title=f"{name}: chat", analytics_enabled=False, fill_height=True) as page:
        # The name of the session; its secret is not a password, only the storage's encoding.
        token = gr.BrowserState(None, storage_key="mmllm-demo", secret="mmllm-demo-state")
        gr.HTML(f"<h1>{html.escape(name)}</h1>", elem_id="title")
        with gr.Tab("Chat"):
            conversation = gr.Chatbot(
                elem_id="conversation",
                label=name,
                show_label=False,
                height="calc(100dvh - 10.5rem)",
                min_height="20rem",
                editable="user",
                render_markdown=False,
                sanitize_html=True,
                latex_delimiters=[],
                allow_tags=False,
                buttons=["copy"],
                feedback_options=None,
                examples=shown,  # pyright: ignore[reportArgumentType]
                placeholder=welcome(chat),
            )
            with gr.Row(elem_id="write"):
                if inputs:
                    gr.Button("Attach", elem_id="attach")
                box = gr.MultimodalTextbox(
                    elem_id="message",
                    show_label=False,
                    placeholder="Type a message",
                    sources=["upload", "microphone"] if "audio" in inputs else ["upload"],
                    file_count="multiple",
                    interactive=False,  # until the session is known
                )
                gr.Button("More", elem_id="more")
            # page.js makes these columns popovers, and opens what their buttons name.
            with gr.Column(elem_id="attach-menu", elem_classes="menu", min_width=0):
                gr.Button("File", size="sm", elem_id="file")
                if "image" in inputs:
                    gr.Button("Camera", size="sm", elem_id="take-picture")
                if "audio" in inputs:
                    gr.Button("Microphone", size="sm", elem_id="microphone")
            with gr.Column(elem_id="more-menu", elem_classes="menu", min_width=0):
                chips = [
                    gr.Button(text, size="sm", icon=str(thumbnail), elem_classes="example-chip")
                    for text, thumbnail, _ in examples
                ]
                save = gr.Button("Save conversation", size="sm")
                load = gr.UploadButton(
                    "Load conversation", size="sm", file_types=[".zip"], elem_id="load"
                )
                clear = gr.Button("Clear conversation", size="sm")
                zipped = gr.DownloadButton(visible="hidden", elem_id="zipped")
            if "image" in inputs:
                with gr.Column(elem_id="camera-panel", elem_classes="menu", min_width=0):
                    camera = gr.Image(
                        elem_id="camera",
                        sources=["webcam"],
                        type="filepath",
                        label="Camera",
                        buttons=[],
                        webcam_options=gr.WebcamOptions(mirror=False),
                    )
        with gr.Tab("Settings"):
            settings = build_settings(chat)
        with gr.Tab("About"):
            gr.Markdown(about(chat, card), elem_id="about")

        def enter(token: str | None) -> tuple[Any, ...]:
            session = sessions.open(token)
            return (
                session.token,
                shown_turns(session.turns),
                {"__type__": "update", "interactive": True},
            )

        def follow(token: str | None) -> Iterator[list[Any]]:
            session = sessions.open(token)
            for pieces in follow_reply(session):
                yield [*shown_turns(session.turns), partial_answer(pieces)]
            yield shown_turns(session.turns)

        def take(token: str | None, value: dict[str, Any]) -> tuple[Any, ...]:
            session = sessions.open(token)
            text = value.get("text") or ""
            media, errors = session.take(value.get("files") or ())
            try:
                text = check_text(text)
            except MmllmError as error:
                errors.append(error)
            if errors:  # the valid part stays in the box
                warn(errors)
                return session.token, shown_turns(session.turns), box_value(text, media)
            parts: list[ContentPart] = [*media, *([Text(text)] if text.strip() else [])]
            if parts:
                with session.change():
                    session.turns.append(Turn(Message("user", tuple(parts))))
                    session.retries = 0
            return session.token, shown_turns(session.turns), None

        def photograph(path: str | None, value: dict[str, Any]) -> tuple[Any, ...]:
            files = [*value.get("files", ()), *([path] if path else ())]
            return None, {"text": value.get("text", ""), "files": files}

        def example(token: str | None, index: int) -> tuple[Any, ...]:
            text, thumbnail, is_sent = examples[index]
            session = sessions.open(token)
            files = []
            if is_sent:
                files = [session.new_file(thumbnail.suffix)]
                shutil.copyfile(thumbnail, files[0])
            return take(session.token, {"text": text, "files": files})

        def selected(token: str | None, chosen: gr.SelectData) -> tuple[Any, ...]:
            return example(token, chosen.index)

        def again(token: str | None) -> tuple[Any, ...]:
            session = sessions.open(token)
            with session.change():
                drop_answers(session)
                session.retries += 1
            return session.token, shown_turns(session.turns)

        def undo(token: str | None) -> tuple[Any, ...]:
            session = sessions.open(token)
            with session.change():
                drop_answers(session)
                value = take_back(session)
            return shown_turns(session.turns), value

        def edit(token: str | None, change: gr.EditData) -> tuple[Any, ...]:
            session = sessions.open(token)
            index = change.index if isinstance(change.index, int) else change.index[0]
            text = check_text(str(change.value))
            with session.change():
                there = 0 <= index < len(session.turns)
                if not there or session.turns[index].message.role != "user":
                    warn([ConfigError("this message is not there any more")])
                    return session.token, shown_turns(session.turns)
                media = session.turns[index].message.media
                if not text.strip() and not media:
                    warn([ConfigError("an empty message says nothing: the old one stays")])
                    return session.token, shown_turns(session.turns)
                words = [Text(text)] if text.strip() else []
                session.turns[index:] = [Turn(Message("user", (*media, *words)))]
                session.retries = 0
            return session.token, shown_turns(session.turns)

        def wipe(token: str | None) -> tuple[Any, ...]:
            if token is None:  # the person thought better of it
                return gr.skip(), gr.skip()
            session = sessions.open(token)
            with session.change():
                session.clear()
            return session.token, []

        def stop(token: str | None) -> None:
            sessions.open(token).cancel.set()

        def reply(token: str | None, *values: Any) -> Iterator[tuple[Any, ...]]:
            session = sessions.open(token)
            for pieces in follow_reply(session):  # another page of this session sent the request
                yield [*shown_turns(session.turns), partial_answer(pieces)], BUSY
            if session.turns and session.turns[-1].message.role == "user":
                try:
                    request = settings.read(values)
                    if session.retries:
                        request = _varied(request, session.retries)
                    with closing(stream_reply(chat, session, request)) as looks:  # pyright: ignore
                        for pieces in looks:
                            yield [*shown_turns(session.turns), partial_answer(pieces)], BUSY
                except Exception as error:
                    warn([error])
                    with session.change():
                        value = take_back(session)
                    yield shown_turns(session.turns), {**READY, "value": value}
                    return
            yield shown_turns(session.turns), READY

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
            return shown_turns(session.turns)

        def warn(errors: Sequence[Exception]) -> None:
            for error in errors:
                gr.Warning(html.escape(sentence(error, sessions.root)))

        def guarded(handler: Callable[..., Any]) -> Callable[..., Any]:
            """Show the errors of a handler on the page, whose contents stay as they were."""

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
            "concurrency_limit": TOGETHER,  # the others wait and see their place in the queue
            "concurrency_id": "engine",
            "show_progress": "minimal",
            "show_progress_on": [conversation],
            **private,
        }
        following: dict[str, Any] = {**replying, "fn": follow, "inputs": token}
        following |= {"outputs": conversation, "concurrency_id": "follow"}
        sent = [token, conversation, box]
        entered = page.load(guarded(enter), token, [token, conversation, box], **quick, **private)
        entered.then(**following)
        page.load(None, js=_ON_LOAD, **private)
        if "image" in inputs:
            camera.input(guarded(photograph), [camera, box], [camera, box], **quick, **private)
        box.submit(guarded(take), [token, box], sent, **warned).success(**replying)
        conversation.example_select(guarded(selected), token, sent, **warned).success(**replying)
        for index, chip in enumerate(chips):
            clicked = chip.click(
                guarded(functools.partial(example, index=index)), token, sent, **warned
            )
            clicked.success(**replying)
        for event, change in ((conversation.retry, again), (conversation.edit, edit)):
            changed = event(guarded(change), token, [token, conversation], **warned)
            changed.success(**replying)
        conversation.undo(guarded(undo), token, [conversation, box], **quick, **private)
        clear.click(guarded(wipe), token, [token, conversation], js=_ASK_TO_CLEAR, **warned)
        box.stop(guarded(stop), token, None, **quick, **private)
        save.click(guarded(save_zip), token, zipped, **quick, **private).success(
            None, js="() => document.querySelector('#zipped')?.click()", **private
        )
        load.upload(guarded(load_zip), [token, load], conversation, **warned)
        seed = settings.widgets[settings.places.index(("seed",))]
        settings.reuse.click(guarded(recall), token, seed, **quick, **private)
    return page


def _examples(chat: Chat) -> list[tuple[str, Path, bool]]:
    """Those of EXAMPLES that this model can do: (text, thumbnail, whether it is sent too)."""
    renderer = chat.model.renderer
    folder = locate("data") / PICTURES
    return [
        (text, folder / file, is_sent)
        for text, makes, file, is_sent in EXAMPLES
        if (makes is None or makes in renderer.output_keys)
        and (not is_sent or "image" in renderer.input_keys)
    ]


def _varied(request: dict[str, Any], retries: int) -> dict[str, Any]:
    """Return the options of another reply to the same message: another seed, and sampling, because
    greedy decoding would repeat the reply."""
    varied = dict(request)
    if "seed" in varied:
        varied["seed"] = (varied["seed"] + retries) % 2**63
    if not varied.get("temperature"):
        varied["temperature"] = RETRY_TEMPERATURE
    return varied


BUSY = {"__type__": "update", "submit_btn": False, "stop_btn": True}
READY = {"__type__": "update", "submit_btn": True, "stop_btn": False}

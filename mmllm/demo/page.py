"""The page: a chat, its settings, and what is to be known about the model. By Gradio.

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
from mmllm.demo.about import about
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

EXAMPLES: tuple[tuple[str, str | None, str | None], ...] = (
    ("Draw a red apple.", "image", None),
    ("Play the sound of a bell.", "audio", None),
    ("Animate a rocket.", "video", None),
    ("What is this?", None, "pictures/fluent-3d/guitar.webp"),
)
"""(text, modality that the model must make, picture in mini's data)."""
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


def theme() -> gr.themes.Base:
    """Gradio's soft theme with fonts that every system has: the default ones come from a host."""
    return gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


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
            if errors:  # what was good stays in the box
                warn(errors)
                return session.token, shown_turns(session.turns), box_value(text, media)
            parts: list[ContentPart] = [*media, *([Text(text)] if text.strip() else [])]
            if parts:
                with session.change():
                    session.turns.append(Turn(Message("user", tuple(parts))))
            return session.token, shown_turns(session.turns), None

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
                drop_answers(session)
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
            return session.token, shown_turns(session.turns)

        def clear(token: str | None) -> None:
            session = sessions.open(token)
            with session.change():
                session.clear()

        def stop(token: str | None) -> None:
            sessions.open(token).cancel.set()

        def reply(token: str | None, *values: Any) -> Iterator[tuple[Any, ...]]:
            session = sessions.open(token)
            for pieces in follow_reply(session):  # another page of this session asked before
                yield [*shown_turns(session.turns), partial_answer(pieces)], BUSY
            if session.turns and session.turns[-1].message.role == "user":
                try:
                    with closing(stream_reply(chat, session, settings.read(values))) as looks:  # pyright: ignore
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


def _examples(chat: Chat) -> list[tuple[str, str | None, str | None]]:
    """Those of EXAMPLES that this model can do."""
    renderer = chat.model.renderer
    return [
        (text, makes, file)
        for text, makes, file in EXAMPLES
        if (makes is None or makes in renderer.output_keys)
        and (file is None or "image" in renderer.input_keys)
    ]


BUSY = {"__type__": "update", "submit_btn": False, "stop_btn": True}
READY = {"__type__": "update", "submit_btn": True, "stop_btn": False}

"""A chat in the browser, by Gradio: `mmllm demo`, demos/chat.py.

It listens on this machine only, calls no other host, sends no statistics, and serves only what was
sent to it or made by it. Needs the extra `demo`: pip install "mmllm[demo]".
"""

from __future__ import annotations

import atexit
import os
import re
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from mmllm.demo.archive import MAX_ZIPPED
from mmllm.demo.sessions import SessionStore
from mmllm.demo.temporary_folder import TemporaryFolder
from mmllm.errors import ConfigError
from mmllm.mini import locate

if TYPE_CHECKING:
    from mmllm.inference.chat import Chat

QUEUE = 16
"""Requests that may wait for the engine; further ones are refused."""


def card_of(source: str) -> str:
    """Return the card (README.md) of a model, with a smaller heading and without links, which are
    relative and lead nowhere in a browser."""
    folder = locate("checkpoint") if source == "mini" else Path(source).expanduser()
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    return re.sub(r"^# ", "## ", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text))


class Demo:
    """A chat that is served at `url` until `close`; one per process.

    `card`: Markdown about the model. `port`: None takes a free one from 7860 on. `share`: ask
    Gradio for a public address. `expires`: seconds after which an unused session is deleted.
    Sessions end with the process, also by SIGTERM and SIGHUP, which then exit as Ctrl-C does, if
    nobody else handles them. Raises ConfigError if Gradio is not installed or the port is taken.
    """

    def __init__(
        self,
        chat: Chat,
        *,
        card: str = "",
        host: str = "127.0.0.1",
        port: int | None = None,
        share: bool = False,
        expires: float = 3600.0,
    ):
        self._signals = _exit_on_signals()
        self._folder = TemporaryFolder()
        atexit.register(self._folder.delete)
        root = self._folder.path
        os.environ |= {  # Gradio reads these when it is imported, and when a page is made
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_TEMP_DIR": str(root),
            "GRADIO_EXAMPLES_CACHE": str(root / "examples"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        try:
            from starlette.middleware import Middleware

            from mmllm.demo.middleware import OriginMiddleware
            from mmllm.demo.page import CSS, build, theme
            from mmllm.server.listener import allowed_hosts
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"the demo needs {error.name}; install it with: pip install 'mmllm[demo]'"
            ) from error
        self.sessions = SessionStore(root, expires=expires)
        hosts = None if share else allowed_hosts(host)
        self.page = build(chat, self.sessions, card=card)
        self.sessions.keep_present()
        self.page.queue(max_size=QUEUE)
        try:
            _, self.url, self.shared_url = self.page.launch(
                server_name=host,
                server_port=port,
                share=share,
                max_file_size=MAX_ZIPPED,
                app_kwargs={
                    "middleware": [
                        Middleware(OriginMiddleware, hosts=hosts, sessions=self.sessions)
                    ]
                },
                prevent_thread_lock=True,
                quiet=True,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                theme=theme(),
                css=CSS,
            )
        except OSError as error:
            self.close()
            raise ConfigError(f"the demo cannot listen on {host}:{port}: {error}") from error

    def wait(self) -> None:
        """Serve until Ctrl-C."""
        try:
            while self.page.is_running:
                time.sleep(0.2)
        except KeyboardInterrupt:
            pass

    def close(self) -> None:
        """Stop serving and delete all sessions."""
        self.page.close(verbose=False)
        self._folder.delete()
        atexit.unregister(self._folder.delete)
        for number in self._signals:
            signal.signal(number, signal.SIG_DFL)

    def __enter__(self) -> Demo:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _exit_on_signals() -> list[signal.Signals]:
    """Let signals that would end the process at once end it by SystemExit, so that it cleans up;
    those that are ignored or handled stay so. Returns which."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        return []  # Python handles signals in the main thread only
    names = ("SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    ours = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, leave)
    return ours

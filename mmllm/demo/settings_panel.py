"""The settings of the page: widgets, and their values as options of a reply."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from mmllm.demo.about import is_mini
from mmllm.demo.messages import MODALITY_NAMES
from mmllm.demo.sessions import check_text
from mmllm.errors import ConfigError, quoted
from mmllm.inference.chat import Chat
from mmllm.inference.sampling import Sampling
from mmllm.server.settings import ServerSettings as Limits

WISHES = (("when it fits", "auto"), ("always", "force"), ("never", "forbid"))
MAX_STOPS = 16
"""Most stop texts of a reply."""

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
_WITHOUT_EFFECT_ON_MINI = {"init_media", "strength", "seconds", "frames", "fps", "height", "width"}
"""Options that mini's decoders take and that do not help: they were trained at one size, and follow
the caption wherever they start from."""
_READ: dict[str, Callable[[Any], Any]] = {
    "seed": int,
    "negative_prompt": check_text,
    "stop": lambda text: _stops(text),
    **dict.fromkeys(("steps", "max_new_tokens", "max_media"), int),
}
"""A widget's value -> what the engine takes, where they differ."""


@dataclass
class SettingsPanel:
    """The widgets of the settings panel, and the place of each one's value in a request."""

    widgets: list[Any]
    places: list[tuple[str, ...]]
    reuse: Any
    """The button that takes the last answer's seed."""

    def read(self, values: Sequence[Any]) -> dict[str, Any]:
        """Return keyword arguments of `Chat.stream`, without those of empty widgets."""
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
    """Raise ConfigError for a medium that exceeds the server's limits. A decoder checks its own
    limits itself."""
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


def _show_while(choice: Any, value: str, widget: Any) -> None:
    """Show a widget only while a radio button stands at `value`."""
    widget.visible = choice.value == value
    choice.change(
        lambda chosen: gr.update(visible=chosen == value),
        choice,
        widget,
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )


def _stops(text: str) -> list[str]:
    stops = [line for line in check_text(text).splitlines() if line]
    if len(stops) > MAX_STOPS:
        raise ConfigError(f"{len(stops)} texts to stop at, more than {MAX_STOPS}")
    return stops


def build_settings(chat: Chat) -> SettingsPanel:
    """Create widgets for all options of a request, by modality."""
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
            label=f"Answers hold a {MODALITY_NAMES[modality]}",
            elem_id=f"wish-{modality}",
        )
        add(wish, "modalities", modality)
    with gr.Accordion("Advanced", open=False, elem_id="advanced"):
        for modality, key in outputs.items():
            decoder = chat.model.decoders[key]
            with gr.Accordion(f"{MODALITY_NAMES[modality].capitalize()}s", open=False):
                options = [name for name in decoder.request_options if name in _WIDGETS]
                made = {
                    name: _WIDGETS[name](decoder.min_steps, getattr(decoder.config, name))
                    for name in options
                    if not (is_mini(chat) and name in _WITHOUT_EFFECT_ON_MINI)
                }
                for name, widget in made.items():
                    add(widget, "decoders", modality, name)
                if {"init_media", "strength"} <= made.keys():
                    _show_while(made["init_media"], "last", made["strength"])
        with gr.Accordion("Words", open=False):
            add(
                gr.Slider(
                    0, 2, usual.temperature, step=0.05, label="Temperature", info="0: the likeliest"
                ),
                "temperature",
            )
            add(gr.Slider(0.05, 1, usual.top_p, step=0.05, label="Top p"), "top_p")
            add(
                gr.Number(usual.top_k, label="Top k", info="0: all", precision=0, minimum=0),
                "top_k",
            )
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

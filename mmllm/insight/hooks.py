"""Looking at states, and editing them, while the model replies, scores, or trains.

    with look(chat, "layers.18", "layers.18.heads") as seen:
        chat.reply("Draw a dog.")
    seen["layers.18"][seen.positions.select("signal")]      # float[4, D]

    with edit(chat, "layers.18", lambda states, positions: states * 0.5):
        chat.reply("Draw a dog.")

Both are forward hooks on the model's modules. While there are any, the LLM is computed by the
modules of transformers, every position of every prompt is computed, and no draft tokens are.
Nothing that was computed under a hook is kept. Calls of other threads are seen and edited, too.

Legend: P positions (mmllm.insight.positions), D width, M media.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmllm.errors import ConfigError
from mmllm.insight.positions import (
    PassReader,
    Positions,
    backbone_index,
    is_first,
    rows_of,
)
from mmllm.insight.sites import Site, find_site, model_of
from mmllm.model import AnyToAny

Edit = Callable[[Tensor, Any], Tensor]
"""(states float[P, …], Positions) -> states of the same shape, at a site of the LLM;
(states float[M, …], None) -> states at a site of an encoder or projection."""


@dataclass
class Recording:
    """What `look` has seen.

    `recording[name]` are the states of a site, float[P, …] on the CPU, one row per position in the
    order of computation; or float[M, …], one per medium, at sites of encoders and projections.
    """

    _states: dict[str, list[Tensor]]
    _positions: list[Positions] = field(default_factory=list)

    @property
    def positions(self) -> Positions:
        """What stands at each of the P rows. Raises ConfigError if the LLM has computed nothing."""
        if not self._positions:
            raise ConfigError("look: no site of the LLM was computed, so there are no positions")
        return Positions.concat(self._positions)

    def __getitem__(self, name: str) -> Tensor:
        """The states of a site.

        Args:
            name: one of the names that `look` was called with.

        Raises:
            ConfigError: it was not looked at, or not computed.
        """
        if name not in self._states:
            raise ConfigError(f"{name!r} was not looked at, only {', '.join(self._states)}")
        if not self._states[name]:
            raise ConfigError(
                f"{name}: was not computed. Features that a feature cache holds are not computed "
                "again, and encoders run for media only."
            )
        return torch.cat(self._states[name])


@contextmanager
def look(chat: Any, *names: str) -> Iterator[Recording]:
    """Keep the states of sites, of everything that is computed inside the context.

    To see states as an `edit` leaves them, enter the edit first.

    Args:
        chat: what `mmllm.load` gives, or a model that trains.
        names: of the sites (mmllm.insight.sites).

    Yields:
        What is seen, which grows.

    Raises:
        ConfigError: a site does not exist; the near one is named.
    """
    model = model_of(chat)
    found = [find_site(model, name) for name in names]
    recording = Recording({name: [] for name in names})
    with ExitStack() as stack:
        watch = _Watch(model, stack, recording) if any(s.has_positions for s in found) else None
        for site in found:
            stack.enter_context(_hook(site, _recorder(site, recording, watch)))
        yield recording


@contextmanager
def edit(chat: Any, name: str, function: Edit) -> Iterator[None]:
    """Replace the states of a site by a function of them, inside the context. Gradients go through.

    Args:
        chat: what `mmllm.load` gives, or a model that trains.
        name: of the site (mmllm.insight.sites).
        function: takes states float[P, …] and the Positions where they stand, and returns states of
            the same shape; float[M, …] and None at sites of encoders and projections. It must not
            change what it is given. It is called for the positions of every forward pass.

    Raises:
        ConfigError: the site does not exist, or the function returns something else.
    """
    model = model_of(chat)
    site = find_site(model, name)
    with ExitStack() as stack:
        watch = _Watch(model, stack) if site.has_positions else None
        stack.enter_context(_hook(site, _editor(site, function, watch)))
        yield


class _Watch:
    """Follows the forward passes of the LLM: which position each row of the states stands for.

    Attributes:
        index: int[N], the position of each of the N rows that the backbone computes now; None
            outside of a pass.
        at: the positions of the pass.
    """

    def __init__(self, model: AnyToAny, stack: ExitStack, recording: Recording | None = None):
        self._reader = PassReader(model)
        self._recording = recording
        self._whole, self._prefix_len, self._seq_lens = (0, 0), 0, ()
        self._start = 0
        self._seen: list[Positions] = []
        self.pending: list[tuple[str, Tensor]] = []
        """States of this pass, kept only once it is complete: it may be cancelled."""
        self.index: np.ndarray | None = None
        self.at: Any = None
        for handle in (
            model.llm.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.llm.register_forward_hook(self._end, always_call=True),
            model.llm.backbone.register_forward_pre_hook(self._enter, with_kwargs=True),
        ):
            stack.callback(handle.remove)

    def _begin(self, _module: Any, args: tuple, kwargs: dict) -> None:
        rows, width = (args[0] if args else kwargs["embeds"]).shape[:2]
        self._whole = rows, width
        self._prefix_len = kwargs.get("prefix_len", 0)
        self._seq_lens = tuple(kwargs.get("seq_lens", ()))
        self._start, self._seen, self.pending = 0, [], []
        self.at, self._is_real = self._reader.read(
            self._whole,
            kwargs.get("sources"),
            kwargs.get("mask"),
            kwargs.get("positions"),
            self._prefix_len,
            self._seq_lens,
        )

    def _enter(self, _module: Any, args: tuple, kwargs: dict) -> None:
        if self.at is None:
            return
        embeds = kwargs["inputs_embeds"]
        shape = embeds.shape[0], embeds.shape[1]
        width = self._whole[1]
        index = backbone_index(shape, width, self._start, self._prefix_len, self._seq_lens)
        self._start += shape[1]
        self.index = np.where((index >= 0) & self._is_real[index], index, -1)
        self._seen.append(self.at[self.index[is_first(self.index)]])

    def _end(self, _module: Any, _args: tuple, output: Any) -> None:
        """After an error the output is None."""
        if self._recording is not None and output is not None:
            self._recording._positions += self._seen
            for name, states in self.pending:
                self._recording._states[name].append(states)
        self.index = self.at = None
        self.pending, self._seen = [], []


@contextmanager
def _hook(site: Site, function: Callable[[Any], Any]) -> Iterator[None]:
    """Call `function` with the input or output of a site's module; what it returns replaces it,
    unless it is None."""
    if site.is_input:
        handle = site.module.register_forward_pre_hook(
            lambda _module, args, kwargs: function((args, kwargs)), with_kwargs=True
        )
    else:
        handle = site.module.register_forward_hook(lambda _module, _args, output: function(output))
    try:
        yield
    finally:
        handle.remove()


def _recorder(site: Site, recording: Recording, watch: _Watch | None) -> Callable[[Any], None]:
    """What keeps the states of a site."""

    def keep(value: Any) -> None:
        states = site.read(value).detach()
        if not site.has_positions:
            recording._states[site.name].append(_copy(states))
        elif watch is not None and watch.index is not None:
            # Outside of a pass, layers run again for their gradient: they were seen before.
            rows = np.flatnonzero(is_first(watch.index))
            watch.pending.append((site.name, _copy(rows_of(states.flatten(0, 1), rows))))

    return keep


def _editor(site: Site, function: Edit, watch: _Watch | None) -> Callable[[Any], Any]:
    """What edits the states of a site."""

    def change(value: Any) -> Any:
        states = site.read(value)
        if not site.has_positions:
            return site.write(value, _checked(site, function(states, None), states))
        assert watch is not None
        if watch.index is None:
            raise ConfigError(
                f"{site.name}: a layer runs again for its gradient, where its positions are not "
                "known; set gradient_checkpointing: false to edit a model that trains"
            )
        flat = states.flatten(0, 1)
        rows = np.flatnonzero(watch.index >= 0)
        given = rows_of(flat, rows)
        edited = _checked(site, function(given, watch.at[watch.index[rows]]), given)
        if len(rows) < len(flat):
            where = torch.from_numpy(rows).to(flat.device)
            edited = flat.index_copy(0, where, edited)
        return site.write(value, edited.view_as(states))

    return change


def _checked(site: Site, edited: Any, states: Tensor) -> Tensor:
    """What an edit returned, in the states' dtype. Raises ConfigError unless it is alike."""
    if not isinstance(edited, Tensor) or edited.shape != states.shape:
        got = list(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
        raise ConfigError(
            f"edit {site.name}: the function was given states {list(states.shape)} and has to "
            f"return as many, got {got}"
        )
    return edited.to(states)


@torch.inference_mode(False)
def _copy(states: Tensor) -> Tensor:
    """A copy on the CPU that may be used with gradients, wherever the states were computed."""
    return states.to("cpu", copy=True)

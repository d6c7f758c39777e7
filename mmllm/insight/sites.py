"""Sites: names of the points of a model where states can be looked at and edited.

| name | states |
|---|---|
| embeddings | float[P, D], what enters the first layer |
| layers.N | float[P, D], the residual stream after layer N |
| layers.N.attention, layers.N.mlp | float[P, D], the output of that part of the layer |
| layers.N.heads | float[P, H, C], the heads' outputs, before the projection that mixes them |
| layers.N.heads.H | float[P, C], one of them |
| hidden | float[P, D], the last hidden states, after the final norm |
| encoders.KEY, encoders.KEY.MODULE | float[M, …], the output of an encoder or of a module in it |
| input_projections.KEY…, output_projections.KEY… | float[M, …], likewise |

Legend: P positions of text, media and signal tokens, D width, H heads of C, M media.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mmllm.encoders.base import Features
from mmllm.errors import ConfigError
from mmllm.model import AnyToAny
from mmllm.utils.hints import did_you_mean

MEDIA_GROUPS = ("encoders", "input_projections", "output_projections")

_ATTENTION = ("self_attn", "attention", "attn", "self_attention")
_MLP = ("mlp", "feed_forward", "feedforward", "ffn", "block_sparse_moe")
_MIXING = ("o_proj", "out_proj", "dense", "c_proj", "wo")
"""The names that families of transformers give to these parts of a layer."""
_HEAD = re.compile(r"(layers\.\d+\.heads)\.(\d+)")


@dataclass(frozen=True)
class Site:
    """One point of a model.

    Attributes:
        name: as in the table above.
        module: whose input or output it is.
        is_input: whether it is the input.
        has_positions: whether it has one state per position of the LLM.
        head_width: C, if the states are those of heads.
        head: which head alone; None for all.
    """

    name: str
    module: Any
    is_input: bool = False
    has_positions: bool = True
    head_width: int | None = None
    head: int | None = None

    def read(self, value: Any) -> Tensor:
        """Take the states out of what the module was called with, or gives.

        Raises ConfigError if there is no tensor in it.

        Args:
            value: the positional and keyword arguments of a call, or an output.
        """
        states = _first_tensor(value)
        if states is None:
            kind = type(value).__name__
            raise ConfigError(f"{self.name}: its module gives no tensor but a {kind}")
        if self.head_width is not None:
            states = states.unflatten(-1, (-1, self.head_width))
            states = states if self.head is None else states[..., self.head, :]
        return states

    def write(self, value: Any, states: Tensor) -> Any:
        """Put states in the place of those that `read` takes.

        Args:
            value: as for `read`; it is not changed.
            states: of the same shape.

        Returns:
            A value like the one given.
        """
        if self.head_width is not None:
            if self.head is not None:
                whole = _first_tensor(value)
                assert whole is not None
                heads = whole.unflatten(-1, (-1, self.head_width)).clone()
                heads[..., self.head, :] = states
                states = heads
            states = states.flatten(-2)
        return _with_first_tensor(value, states)


def sites(chat: Any) -> list[str]:
    """List the names of a model's sites; `.0`, `.1`, … after `heads` names one head.

    Args:
        chat: what `mmllm.load` gives, or an `AnyToAny`.
    """
    model = model_of(chat)
    model.load_encoders()
    return [name for name, _ in (*_llm_sites(model), *_media_sites(model))]


def find_site(model: AnyToAny, name: str) -> Site:
    """Find a site by its name.

    Args:
        model: the model.
        name: the name.

    Raises:
        ConfigError: there is none of this name; the near one is named.
    """
    known: Mapping[str, Site] = dict(_llm_sites(model))
    if name in known:
        return known[name]
    if match := _HEAD.fullmatch(name):
        heads = known.get(match[1])
        if heads is not None and heads.head_width is not None:
            number, num_heads = int(match[2]), num_heads_of(heads)
            if number < num_heads:
                return Site(name, heads.module, True, True, heads.head_width, number)
            raise ConfigError(f"{name}: layers here have {num_heads} heads, 0 to {num_heads - 1}")
    if name.startswith("encoders."):
        model.load_encoders()  # those that read their weights on first use have no modules before
    media = dict(_media_sites(model))
    if name in media:
        return Site(name, media[name], has_positions=False)
    names = [*known, *media]
    hint = did_you_mean(name, names) or "; `mmllm.insight.sites(chat)` lists them all"
    last = len(model.llm.backbone.layers) - 1
    raise ConfigError(
        f"{name!r} is no site of this model, which has layers.0 to layers.{last}{hint}"
    )


def model_of(chat: Any) -> AnyToAny:
    """The model of a chat, or the model itself. Raises ConfigError for anything else."""
    model = getattr(chat, "model", chat)
    if not isinstance(model, AnyToAny):
        raise ConfigError(
            f"expected what mmllm.load gives, or a model (AnyToAny), got {type(chat).__name__}"
        )
    return model


def num_heads_of(site: Site) -> int:
    """The number of heads H at a site `layers.N.heads`."""
    assert site.head_width is not None
    return site.module.in_features // site.head_width


def _llm_sites(model: AnyToAny) -> Iterator[tuple[str, Site]]:
    """Name and site of each point of the LLM, but single heads."""
    backbone = model.llm.backbone
    yield "embeddings", Site("embeddings", backbone.layers[0], is_input=True)
    for number, layer in enumerate(backbone.layers):
        name = f"layers.{number}"
        yield name, Site(name, layer)
        attention, mlp = _part(layer, _ATTENTION), _part(layer, _MLP)
        if attention is not None:
            yield f"{name}.attention", Site(f"{name}.attention", attention)
            mixing = _part(attention, _MIXING)
            width = getattr(attention, "head_dim", None)
            if mixing is not None and width:
                heads = f"{name}.heads"
                yield heads, Site(heads, mixing, is_input=True, head_width=width)
        if mlp is not None:
            yield f"{name}.mlp", Site(f"{name}.mlp", mlp)
    yield "hidden", Site("hidden", backbone)


def _media_sites(model: AnyToAny) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each point of the encoders and projections."""
    for group in MEDIA_GROUPS:
        for key, part in getattr(model, group).items():
            for name, module in part.named_modules():
                yield f"{group}.{key}" + (f".{name}" if name else ""), module


def _part(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The first submodule that there is of these names."""
    found = [getattr(module, name) for name in names if hasattr(module, name)]
    return found[0] if found and isinstance(found[0], nn.Module) else None


def _first_tensor(value: Any) -> Tensor | None:
    """The first tensor in a tensor, tuple, dict, Features or an output of transformers."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Features):
        return value.tokens
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return next((found for part in value if (found := _first_tensor(part)) is not None), None)
    return None


def _with_first_tensor(value: Any, states: Tensor) -> Any:
    """The value with `states` in place of its first tensor."""
    if isinstance(value, Tensor):
        return states
    if isinstance(value, Features):
        return Features(states, value.mask)
    if isinstance(value, dict):
        changed = _with_first_tensor(tuple(value.values()), states)
        pairs = dict(zip(value, changed, strict=True))
        return pairs if type(value) is dict else type(value)(**pairs)
    parts = list(value)
    at = next(at for at, part in enumerate(parts) if _first_tensor(part) is not None)
    parts[at] = _with_first_tensor(parts[at], states)
    return type(value)(parts)

"""What the media of a reply are made from besides their condition: by the request, or by the rules
of the decoder's config over the media of the conversation."""

# Values of users are checked at run time, whatever the annotation.
# pyright: reportUnnecessaryIsInstance=false
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmllm.conversation import Image, Medium, Message
from mmllm.data.references import find_references
from mmllm.decoders.config import InitMediaConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.decoder import ModalityDecoder
from mmllm.decoders.editing import EditMedia, check_takes_mask, named
from mmllm.errors import ConfigError, quoted
from mmllm.inference.conditions import ConditionMemory

_MEDIA_OPTIONS = ("init_media", "mask", "references")
"""Options of a request that may hold media."""


@dataclass(frozen=True)
class EditSources:
    """What the media of one reply and decoder are made from.

    Attributes:
        init: the medium that they start from.
        mask: of what may change in it.
        references: the pictures that they are conditioned on.
        noise_seed: of the noise that they begin with; None: their own.
        condition: that of the newest medium that the decoder made, without an axis of media; None
            unless a share of it is kept.
        keep: that share.
        num_dropped: how many references were left out.
        lacks_references: whether nothing can be made, because the decoder needs a reference.
    """

    init: Medium | None = None
    mask: Image | None = None
    references: tuple[Medium, ...] = ()
    noise_seed: int | None = None
    condition: Condition | None = None
    keep: float = 0.0
    num_dropped: int = 0
    lacks_references: bool = False

    @property
    def kind(self) -> tuple[bool, bool, bool]:
        """What there is; media of one kind can be rendered in one batch."""
        return self.init is not None, self.mask is not None, bool(self.references)

    def decoded(self) -> EditSources:
        """Return the same sources with their pictures decoded: once, and with the provenance that
        their files have. Raises MediaError."""
        return replace(
            self,
            init=self.init.decoded() if isinstance(self.init, Image) else self.init,
            mask=self.mask and self.mask.decoded(),
            references=tuple(medium.decoded() for medium in self.references),
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What the caller should know."""
        if self.lacks_references:
            return ("the decoder needs a picture, and there is none: it could make nothing",)
        if not self.num_dropped:
            return ()
        return (f"the decoder takes {len(self.references)} references: the oldest "
                f"{self.num_dropped} picture(s) were left out",)  # fmt: skip

    @property
    def provenance(self) -> dict[str, Any]:
        """What is written into the files of the media: where the pictures come from that they were
        made of."""
        made_from: dict[str, Any] = {}
        if self.init is not None:
            made_from["init_media"] = _origin(self.init)
        if self.mask is not None:
            made_from["masked"] = True
        if self.references:
            made_from["references"] = [_origin(medium) for medium in self.references]
        if self.condition is not None:
            made_from["kept_condition"] = self.keep
        return {"made_from": made_from} if made_from else {}


def together(sources: Sequence[EditSources]) -> EditMedia:
    """Return what the media of one batch are made from.

    Args:
        sources: of each, all of one kind.
    """
    has_init, has_mask, has_references = sources[0].kind
    return EditMedia(
        [each.init for each in sources if each.init is not None] if has_init else None,
        [each.mask for each in sources if each.mask is not None] if has_mask else None,
        [each.references for each in sources] if has_references else None,
    )


def split_options(
    modality: str, options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split the options of a decoder into values and media.

    Args:
        modality: of the decoder, for errors.
        options: as a caller gave them.

    Returns:
        Options of `decoder.with_overrides`, and what holds media, by name.

    Raises:
        ConfigError: they are no mapping, a mask is no image, or a reference no medium.
    """
    if not isinstance(options, Mapping):
        raise ConfigError(f"{modality}: expected options by name, got {quoted(options)}")
    values, media = dict(options), dict[str, Any]()
    for name in _MEDIA_OPTIONS:
        given = values.get(name)
        if given is None or isinstance(given, str):
            continue
        several = name == "references" and isinstance(given, Iterable)
        each = [given] if isinstance(given, Medium) or not several else list(given)
        if wrong := [one for one in each if not (isinstance(one, Medium) and one.has_data)]:
            raise ConfigError(
                f"{modality}: {name}: expected media such as Image(...), got {quoted(wrong[0])}"
            )
        media[name] = each if name == "references" else each[0]
        del values[name]
    mask = media.get("mask", values.pop("mask", None))
    if mask is not None and not isinstance(mask, Image):
        raise ConfigError(f"{modality}: mask: expected Image(...), got {quoted(mask)}")
    return values, media


def resolve_sources(
    decoder: ModalityDecoder,
    key: str,
    model: str,
    messages: Sequence[Message],
    media: Mapping[str, Any],
    *,
    conditions: ConditionMemory | None = None,
    names_references: bool = False,
    is_forced: bool = False,
) -> EditSources:
    """Find what the media of one reply are made from, and check that the decoder can take it.

    Args:
        decoder: the decoder, with the options of the call.
        key: of the decoder.
        model: the name of the model, which its media bear.
        messages: the conversation in front of the reply.
        media: media among the options, as from `split_options`.
        conditions: those of media that were made; None: none are known.
        names_references: whether the call has the option `references`. Otherwise a mask or an
            initial medium goes without those of the config, where the decoder cannot take both.
        is_forced: whether media must be made: a decoder that edits only needs a picture then.

    Raises:
        ConfigError: the decoder takes no such media, or there is no picture for a mask.
        MediaError: a mask has not the size of its picture, or cannot be read.
    """
    found = [medium for message in messages for medium in message.media if medium.has_data]
    mask, init = media.get("mask"), media.get("init_media")
    config: Any = decoder.config
    starts = isinstance(decoder.config, InitMediaConfig) and decoder.config.init_media == "last"
    if mask is not None:
        check_takes_mask(decoder)
    if init is None and (starts or mask is not None) and decoder.init_modality:
        fitting = [medium for medium in found if medium.modality == decoder.init_modality]
        init = fitting[-1] if fitting else None
    if mask is not None and init is None:
        raise ConfigError(
            f"{decoder.modality}: mask: there is no {named(decoder.init_modality)} in the "
            "conversation that it could be of"
        )
    references, num_dropped = media.get("references"), 0
    most = decoder.max_references
    both = decoder.starts_with_references if mask is None else decoder.masks_references
    is_free = init is None or both or names_references
    if references is None and most and is_free:
        references, num_dropped = find_references(messages, config.references, most)
    if decoder.needs_references and not references and not is_forced:
        return EditSources(lacks_references=True)
    own = [medium for medium in found if medium.modality == decoder.modality]
    sources = EditSources(
        init,
        mask,
        tuple(references or ()),
        _noise_seed(own, key, model) if config.noise == "last" else None,
        conditions.newest(own, key) if conditions and config.keep else None,
        config.keep,
        num_dropped,
    )
    together([sources]).check(decoder, 1)
    return sources.decoded()


def _noise_seed(media: Sequence[Medium], key: str, model: str) -> int | None:
    """The seed of the noise of the newest medium that this decoder of this model made."""
    for medium in reversed(media):
        mark = medium.decoded().provenance or {}
        seed = mark.get("noise_seed")
        is_own = mark.get("decoder") == key and mark.get("model") == model
        if is_own and type(seed) is int and 0 <= seed < 2**63:
            return seed
    return None


def _origin(medium: Medium) -> dict[str, Any]:
    """What identifies a medium that a model made; of others that they were given. Files of others
    say what they like: only short values of the right types are passed on."""
    mark = medium.provenance or {}
    texts = {name: mark.get(name) for name in ("model", "decoder")}
    seeds = {name: mark.get(name) for name in ("seed", "noise_seed")}
    found: dict[str, Any] = {
        name: value for name, value in texts.items() if isinstance(value, str) and len(value) < 100
    }
    found |= {
        name: value for name, value in seeds.items() if type(value) is int and 0 <= value < 2**63
    }
    return found or {"given": True}

"""The options of a request -> keyword arguments of `Chat.reply`, within the server's limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmllm.conversation import Medium
from mmllm.errors import ConfigError, quoted
from mmllm.inference.chat import Chat
from mmllm.inference.options import ModalityChoice
from mmllm.inference.sampling import Sampling
from mmllm.server import schemas as api
from mmllm.server.dispatcher import ReplyOptions
from mmllm.server.errors import bad_request
from mmllm.server.settings import ServerSettings


class OptionsParser:
    """Checks the options of requests to one server, for the model of `chat`."""

    def __init__(self, settings: ServerSettings, chat: Chat):
        self.settings = settings
        renderer = chat.model.renderer
        self.input_modalities = frozenset(renderer.input_keys)
        self.decoders = {
            modality: chat.model.decoders[key] for modality, key in renderer.output_keys.items()
        }
        """Modality that the model can generate -> its decoder."""
        self._max_tokens = min(Sampling.max_new_tokens, settings.max_tokens)

    def check_text(self, text: str, param: str) -> None:
        """Raise ApiError (400) for a text that is too long."""
        if len(text) > self.settings.max_characters:
            raise bad_request(
                f"{param}: {len(text)} characters of text, more than "
                f"{self.settings.max_characters}",
                param,
                "context_length_exceeded",
            )

    def chat(self, body: api.ChatRequest) -> ReplyOptions:
        """Options of a chat completion."""
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise bad_request(
                "max_tokens and max_completion_tokens mean the same: give one", "max_tokens"
            )
        tokens = body.max_completion_tokens or body.max_tokens
        self._check_max("max_tokens", tokens, self.settings.max_tokens)
        self._check_max("max_media", body.max_media, self.settings.max_output_media)
        sampling = {
            "max_new_tokens": tokens or self._max_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "repetition_penalty": body.repetition_penalty,
            "max_media": body.max_media,
            "stop": [body.stop] if isinstance(body.stop, str) else body.stop,
        }
        named = body.decoders or {}
        for param, names in (("decoders", named), ("modalities", body.modalities or ())):
            for name in names:
                if name not in self.decoders and (name, param) != ("text", "modalities"):
                    raise bad_request(
                        f"{param}: unknown {quoted(name)}; this model makes {self._outputs}", param
                    )
        decoders = {
            modality: self.decoder(modality, given, f"decoders.{modality}")
            for modality, given in named.items()
        }
        return ReplyOptions(
            modalities=self._choices(body.modalities),
            decoders=decoders,
            sampling={name: value for name, value in sampling.items() if value is not None},
            media_tokens=body.media_tokens,
        )

    def transcription(self, body: api.TranscriptionRequest) -> ReplyOptions:
        """Options of a transcription: words alone.

        Raises:
            ApiError: 400, the model has no audio encoder.
        """
        if "audio" not in self.input_modalities:
            read = ", ".join(["text", *sorted(self.input_modalities)])
            raise bad_request(
                f"this model cannot hear: it reads {read} (see /v1/models)", "file", "not_supported"
            )
        self.check_text(body.prompt or "", "prompt")
        sampling: dict[str, Any] = {"max_new_tokens": self._max_tokens}
        if body.temperature is not None:
            sampling["temperature"] = body.temperature
        return ReplyOptions(modalities=dict.fromkeys(self.decoders, "forbid"), sampling=sampling)

    def edit(
        self, body: api.EditRequest, num_images: int = 1, *, has_mask: bool = False
    ) -> ReplyOptions:
        """Options of images that are made from those in the conversation.

        Args:
            body: The request.
            num_images: How many it brings.
            has_mask: Whether it brings a mask of the first one.

        Raises:
            ApiError: 400, the model cannot make images from them.
        """
        decoder = self.decoders.get("image")
        most = 0 if decoder is None else decoder.max_references
        starts = decoder is not None and decoder.init_modality == "image"
        if decoder is None or not (starts or most):
            raise bad_request(
                "this model cannot start from a picture: its image decoder has no `init_media` and "
                "no `references` (see /v1/models)",
                "image",
                "not_supported",
            )
        if has_mask and not decoder.takes_mask:
            raise bad_request("this model's image decoder takes no mask", "mask", "not_supported")
        if has_mask:
            most = 1 + (most if decoder.masks_references else 0)
        if num_images > (most or 1):
            raise bad_request(
                f"image: {num_images} files, more than the {most or 1} that this model's image "
                f"decoder takes{' with a mask' if has_mask else ''}",
                "image",
            )
        if body.strength is not None and "strength" not in decoder.request_options:
            raise bad_request("strength: this model's image decoder does not take it", "strength")
        wanted: dict[str, Any] = {"strength": body.strength}
        if not has_mask and decoder.max_references:
            wanted |= {"references": "auto", **({"init_media": "none"} if starts else {})}
        elif not has_mask:
            wanted["init_media"] = "last"
        given = api.DecoderOptions(**wanted)
        return self.single_medium("image", given, size=body.size, ignored=body.ignored)

    def with_mask(
        self, options: ReplyOptions, images: Sequence[Medium], mask: Medium
    ) -> ReplyOptions:
        """Options of an edit with its mask, which is of the first image; the others are references.

        Raises:
            ApiError: 400, the mask has another size.
        """
        sizes = [image.to_numpy().shape[1::-1] for image in (images[0], mask)]
        if sizes[0] != sizes[1]:
            raise bad_request(
                "mask: expected the size of the picture, {}x{}, got {}x{}".format(
                    *sizes[0], *sizes[1]
                ),
                "mask",
            )
        media: dict[str, Any] = {"init_media": images[0], "mask": mask}
        if len(images) > 1:
            media["references"] = list(images[1:])
        elif self.decoders["image"].max_references:
            media["references"] = "none"
        own = {**options.decoders.get("image", {}), **media}
        return replace(options, decoders={**options.decoders, "image": own})

    def single_medium(
        self,
        modality: str,
        given: api.DecoderOptions | None,
        *,
        size: str | None = None,
        seconds: str | float | None = None,
        ignored: list[str] | None = None,
    ) -> ReplyOptions:
        """Options of a reply that holds one medium of one modality; arguments as of `decoder`."""
        if modality not in self.decoders:
            raise bad_request(
                f"this model makes no {modality}; it makes {self._outputs}", code="not_supported"
            )
        options = self.decoder(
            modality, given, "decoder", size=size, seconds=seconds, ignored=ignored
        )
        choices: dict[str, ModalityChoice] = dict.fromkeys(self.decoders, "forbid")
        return ReplyOptions(
            modalities={**choices, modality: "force"},
            decoders={modality: options} if options else {},
            sampling={"max_media": 1, "max_new_tokens": self._max_tokens},
        )

    def decoder(
        self,
        modality: str,
        given: api.DecoderOptions | None,
        param: str,
        *,
        size: str | None = None,
        seconds: str | float | None = None,
        ignored: list[str] | None = None,
    ) -> dict[str, Any]:
        """Options of one decoder.

        Args:
            modality: That the decoder generates.
            given: Its options in the request.
            param: Their path in the request, for errors.
            size: WIDTHxHEIGHT, or "auto".
            seconds: Length of a video.
            ignored: Where a lenient server notes a size or length that the decoder cannot make.

        Returns:
            Option -> value; a size or length that the decoder makes anyway is left out.

        Raises:
            ApiError: 400, an option is not known, beyond a limit, or cannot be made.
        """
        dropped = ignored if self.settings.lenient else None
        decoder = self.decoders[modality]
        options = given.model_dump(exclude_none=True) if given else {}
        wished: dict[str, dict[str, float]] = {}
        if size is not None and size != "auto":
            width, height = size.split("x")
            wished["size"] = {"width": int(width), "height": int(height)}
        if seconds is not None:
            wished["seconds"] = {"seconds": float(seconds)}
        for field_name, values in wished.items():
            if twice := sorted(values.keys() & options.keys()):
                raise bad_request(f"{param}.{twice[0]}: given twice, by {field_name} too", param)
            self._check_limits(values, param, field_name)
        self._check_limits(options, param)
        try:
            measures = decoder.with_overrides(**options).output_spec()
        except ConfigError as error:
            raise bad_request(f"{param}: {error}", param) from error
        for field_name, values in wished.items():
            if values.keys() <= set(decoder.request_options):
                self._check_limits(options | values, param, field_name)
                try:
                    decoder.with_overrides(**options | values)
                except ConfigError as error:
                    if dropped is None:
                        raise bad_request(f"{field_name}: {error}", field_name) from error
                    dropped.append(field_name)
                else:
                    options |= values
                continue
            usual = {name: measures.get(name) for name in values}
            if any(_differs(usual[name], value) for name, value in values.items()):
                if dropped is not None:
                    dropped.append(field_name)
                    continue
                known = ", ".join(decoder.request_options)
                made = "x".join(f"{value:.4g}" for value in usual.values() if value is not None)
                raise bad_request(
                    f"{field_name}: this model's {modality} decoder takes {known}; without "
                    f"{field_name} it makes {made or 'what it makes'}",
                    field_name,
                )
        if {"width", "height", "frames"} & options.keys():
            made = decoder.with_overrides(**options).output_spec()
            frames = getattr(decoder.with_overrides(**options).config, "frames", 1)
            volume = made["width"] * made["height"] * frames
            self._check_max(
                f"{param}: width x height x frames", volume, self.settings.max_output_volume
            )
        return options

    @property
    def _outputs(self) -> str:
        """What the model generates, for messages: "text, image, audio"."""
        return ", ".join(["text", *self.decoders])

    def _check_limits(self, options: Mapping[str, Any], param: str, field_name: str = "") -> None:
        """Check options of a decoder; `field_name`: the field that the client gave instead."""
        limits = self.settings
        for name, most in (
            ("steps", limits.max_steps),
            ("seconds", limits.max_output_seconds),
            ("frames", limits.max_output_frames),
        ):
            self._check_max(field_name or f"{param}.{name}", options.get(name), most)
        pixels = options.get("width", 1) * options.get("height", 1)
        self._check_max(field_name or f"{param}: width x height", pixels, limits.max_output_pixels)
        self.check_text(options.get("negative_prompt", ""), f"{param}.negative_prompt")

    def _choices(
        self, given: list[str] | Mapping[str, ModalityChoice] | None
    ) -> dict[str, ModalityChoice]:
        """`modalities` of a request, in OpenAI's form or ours -> modality -> choice."""
        if not isinstance(given, list):
            if "text" in (given or {}):
                raise bad_request(
                    "modalities: text is in every reply; name media only", "modalities"
                )
            return dict(given or {})
        if "text" not in given:
            raise bad_request('modalities: a reply always may hold text; add "text"', "modalities")
        return {name: "auto" if name in given else "forbid" for name in self.decoders}

    def _check_max(self, param: str, value: float | None, most: float) -> None:
        if value is not None and value > most:
            raise bad_request(f"{param}: expected at most {most:g}, got {quoted(value)}", param)


def _differs(usual: float | None, wished: float) -> bool:
    """Whether what a decoder makes anyway differs from a wish by more than rounding."""
    return usual is None or abs(usual - wished) > 0.01 * wished

"""The model: encoders -> input projections -> LLM -> output projections (-> decoders).

Legend: B rows, T positions, D LLM width, M media of one key, N placeholders, K signal tokens,
P supervised positions, V text vocabulary, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm import config as configs
from mmllm import weights
from mmllm.config import SystemConfig
from mmllm.data.batch import Batch, BatchLayout, InputMedia
from mmllm.data.media_layout import layouts_of, same_width, whole_media
from mmllm.data.references import ReferenceRules
from mmllm.data.rendering import Renderer, first_of_each_modality
from mmllm.decoders.adapters import decoder_lora
from mmllm.decoders.decoder import ModalityDecoder
from mmllm.encoders.base import Features, ModalityEncoder, UnloadedEncoder
from mmllm.errors import AssetError, ConfigError, wrap_errors
from mmllm.kernels.backend import use_kernels
from mmllm.kernels.forward_hooks import has_forward_hooks
from mmllm.llm.language_model import LanguageModel
from mmllm.projections.base import OutputProjection, check_sizes, saved_tensors, zero_rows

PROJECTIONS = ("input_projections", "output_projections")
"""The groups of modules that train around the LLM."""


@dataclass
class Output:
    """What one forward pass computes.

    Attributes:
        hidden: float[B, T, D], last hidden states, and those of tapped layers.
        token_nll: float32[P], -log p of the supervised tokens.
        conditions: float[M, ...] by output key and tensor name.
        kl_to_base: float32[W * S] for a batch with text windows (`AnyToAny.kl_to_base`), else None.
    """

    hidden: Tensor
    token_nll: Tensor
    conditions: dict[str, dict[str, Tensor]]
    kl_to_base: Tensor | None = None


class AnyToAny(nn.Module):
    """The joined model. Decoders are plain attributes: frozen, lazy, outside the state dict."""

    def __init__(
        self,
        config: SystemConfig,
        llm: LanguageModel,
        encoders: Mapping[str, ModalityEncoder],
        decoders: Mapping[str, ModalityDecoder],
        *,
        seed: int = 0,
        sizes: Mapping[str, int] | None = None,
    ):
        """
        Args:
            config: the system.
            llm: the frozen language model; the system's signal tokens are added to it.
            encoders: by key.
            decoders: by key.
            seed: of the projections and of the signal tokens' embeddings.
            sizes: how many numbers a checkpoint holds of each group of projections, and `rows`.

        Raises:
            ConfigError: the config describes more numbers than `sizes`.
        """
        super().__init__()
        self.config = config
        self.llm = llm
        for encoder in encoders.values():
            encoder.attach(llm)
        self.encoders = nn.ModuleDict({key: encoder.freeze() for key, encoder in encoders.items()})
        self.decoders, self.decoder_loras = dict(decoders), nn.ModuleDict()
        projections = config.output_projections
        signal_tokens = {key: entry.signal_tokens for key, entry in projections.items()}
        if sizes is not None:
            with torch.device("meta"):
                projections = _projections(config, llm, encoders, decoders)
            needed = {
                name: sum(tensor.numel() for tensor in saved_tensors(group).values())
                for name, group in zip(PROJECTIONS, projections, strict=True)
            }
            check_sizes({**needed, "rows": sum(signal_tokens.values()) * llm.width}, sizes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.input_projections, self.output_projections = _projections(
                config, llm, encoders, decoders
            )
        llm.add_signal_tokens(signal_tokens, torch.Generator().manual_seed(seed))
        llm.tap_layers(
            layer for key in decoders for layer in self.output_projection(key).llm_layers
        )
        for key, decoder in self.decoders.items():
            decoder.share_text_encoder(llm, f"decoders.{key}")
        self.requires_grad_(False)
        self.renderer = Renderer(
            llm.tokenizer,
            llm.tokens,
            end_ids=llm.end_ids,
            input_keys=first_of_each_modality(
                {
                    key: (encoder.modality, (key, self.input_projections[key].num_tokens))
                    for key, encoder in encoders.items()
                }
            ),
            output_keys=first_of_each_modality(
                {key: (decoder.modality, key) for key, decoder in decoders.items()}
            ),
            template=llm.chat_template,
            template_options=llm.config.template_options,
            system_prompt=llm.config.system_prompt,
            rereads_media=config.rereads_media,
        )
        self.renderer.layouts = layouts_of(self.renderer.input_keys, encoders)
        self.renderer.references = ReferenceRules.of(decoders)
        llm.decoder_forward.whole_media = whole_media(self.renderer, list(encoders))

    @property
    def device(self) -> torch.device:
        """The device of the trained parameters."""
        return self.llm.signal_embeddings.device

    @property
    def num_input_tokens(self) -> dict[str, int]:
        """N per input key."""
        return {key: module.num_tokens for key, module in self.input_projections.items()}  # pyright: ignore

    @property
    def num_signal_tokens(self) -> dict[str, int]:
        """K per output key."""
        return dict(self.llm.tokens.signal_tokens)

    @property
    def batch_layout(self) -> BatchLayout:
        """What `collate` needs to know of the model."""
        words = {key: self.output_projection(key).num_words for key in self.output_projections}
        return BatchLayout(
            self.num_input_tokens,
            self.num_signal_tokens,
            pad_id=self.llm.pad_id,
            supports_prefix_packing=self.llm.supports_prefix_packing,
            num_words={key: num for key, num in words.items() if num},
        )

    def output_projection(self, key: str) -> OutputProjection:
        """The projection in front of a decoder."""
        return self.output_projections[key]  # pyright: ignore[reportReturnType]

    def trainable_candidates(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter that may train, by the names of `StageConfig.learning_rates`: projections
        by key, llm.signal_embeddings, llm.signal_head, llm.lora.…, decoders.KEY.lora.…"""
        for group in PROJECTIONS:
            yield from getattr(self, group).named_parameters(prefix=group)
        yield from self.decoder_loras.named_parameters(prefix="decoders")
        yield "llm.signal_embeddings", self.llm.signal_embeddings
        yield "llm.signal_head", self.llm.signal_head
        for name, parameter in self.llm.lora_parameters():
            yield f"llm.lora.{name.removeprefix('base_model.model.')}", parameter

    def attach_decoder_lora(self, key: str) -> None:
        """Give a decoder a LoRA that can train, unless it has one. Raises ConfigError."""
        self.decoder_loras[key] = decoder_lora(self.decoders[key], f"decoders.{key}", self.device)

    def prepare_for_training(self, *, gradient_checkpointing: bool, compile_layers: bool) -> None:
        """Set how the LLM computes while it trains, once it is known what trains.

        Args:
            gradient_checkpointing: keep only the inputs of its layers, and recompute the rest.
            compile_layers: compile its layers by torch.compile.
        """
        if gradient_checkpointing:
            self.llm.gradient_checkpointing_enable()
        if compile_layers:
            self.llm.compile_layers()

    def load_encoders(self) -> None:
        """Read the weights of encoders that would read them on first use. Raises AssetError."""
        for encoder in self.encoders.values():
            encoder.load()  # pyright: ignore[reportCallIssue]

    def unload_encoders(self) -> None:
        """Free the encoders' weights; only features that were computed before can be used then."""
        parts = self.encoders.to("meta").items()  # what measures media is kept, without weights
        self.encoders.update({key: UnloadedEncoder(encoder) for key, encoder in parts})  # pyright: ignore

    def forward(self, batch: Batch, *, liger_loss: bool = False, conditions: bool = True) -> Output:
        """Compute what the losses of every stage read, for any mix of modalities or none.

        Args:
            batch: the conversations.
            liger_loss: compute `token_nll` by Liger's kernel, which needs CUDA.
            conditions: compute the decoders' conditions, which not every loss reads.
        """
        hidden = self.hidden(batch)
        flat = hidden.flatten(0, 1)  # [B * T, D]
        supervised = flat[batch.target_indices]
        made = batch.outputs.items() if conditions else ()
        return Output(
            hidden=hidden,
            token_nll=self.llm.token_nll(supervised, batch.labels, liger=liger_loss),
            conditions=self.condition(
                {key: media.select_states(flat) for key, media in made},
                {key: media.targets for key, media in made},
            ),
            kl_to_base=None if batch.text_windows is None else self.kl_to_base(batch.text_windows),
        )

    def kl_to_base(self, ids: Tensor) -> Tensor:
        """KL(base LLM || adapted LLM) of text windows: int[W, S] -> float32[W * S]."""
        embeds = self.llm.embed(ids)
        with torch.no_grad(), self.llm.adapters_disabled():
            base = self.llm.forward_windows(embeds)
        return self.llm.kl_divergence(self.llm.forward_windows(embeds), base)

    def hidden(self, batch: Batch) -> Tensor:
        """The LLM's last hidden states, and those of tapped layers: float[B, T, D * (1 + n)]."""
        needs_sources = self.llm.decoder_forward.whole_media or has_forward_hooks(self.llm)
        return self.llm(
            self.embed(batch),
            mask=batch.mask,
            positions=batch.positions,
            prefix_len=batch.prefix_len,
            seq_lens=batch.seq_lens,
            sources=batch.sources if needs_sources else None,
        )

    def signals(self, batch: Batch) -> dict[str, Tensor]:
        """The input of the output projections for a batch: float32[M, W + K, D * n] by key."""
        flat = self.hidden(batch).flatten(0, 1)
        return {
            key: self.add_signal_embeddings(key, media.select_states(flat))
            for key, media in batch.outputs.items()
        }

    def embed(self, batch: Batch) -> Tensor:
        """Token embeddings with every input medium in its place: float[B, T, D or wider]."""
        embeds = self.llm.embed(batch.ids)
        flat = embeds.flatten(0, 1)
        for key, media in batch.inputs.items():
            placed = media.select_tokens(self.project(key, media), key)  # [M * N, D]
            flat, placed = same_width(flat, placed)
            flat = flat.index_copy(0, media.token_indices, placed.to(flat))
        return flat.view(*embeds.shape[:2], -1)

    def project(self, key: str, media: InputMedia) -> Tensor:
        """Compute the embeddings of media, from samples or from cached features.

        Args:
            key: the modality of the encoder and projection.
            media: M media, which may be 0.

        Returns:
            float[M, N, D].

        Raises:
            ValueError: the batch holds neither samples nor features.
        """
        projection = self.input_projections[key]
        if len(media.token_indices) == 0:  # frozen encoders and attention kernels refuse zero rows
            return zero_rows(projection, (self.num_input_tokens[key], self.llm.width))
        if media.features is not None:
            features = Features(media.features, media.feature_mask)
        elif media.samples is not None:
            with torch.no_grad():
                features = self.encoders[key](media.samples)
        else:
            raise ValueError(f"{key}: the batch holds neither samples nor features")
        return projection(features.tokens, features.mask)

    def add_signal_embeddings(self, key: str, states: Tensor) -> Tensor:
        """Add the signal tokens' embeddings to their last hidden states, which gives them a short
        path to the loss (NExT-GPT's code does so), and select the layers that the output
        projection reads.

        Args:
            key: the modality of the decoder.
            states: float[M, W + K, D * (1 + tapped layers)] of words and signal spans.

        Returns:
            float32[M, W + K, D * n], the input of the output projection.
        """
        embeddings = self.llm.signal_embeddings[self.llm.tokens.signal_rows(key)]
        words, more = states.shape[1] - len(embeddings), states.shape[2] - self.llm.width
        if words or more:
            embeddings = F.pad(embeddings, (0, more, words, 0))
        layers = self.output_projection(key).llm_layers
        return self.llm.select_layers(states + embeddings, layers).float()

    def condition(
        self,
        signals: Mapping[str, Tensor],
        captions: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> dict[str, dict[str, Tensor]]:
        """Compute the decoders' conditions, by key and by name.

        Args:
            signals: hidden states of words and signal spans by key, float[M, W + K, …].
            captions: the captions' own conditions, for output projections that read them.
        """
        conditions = {}
        for key, states in signals.items():
            projection, own = self.output_projection(key), (captions or {}).get(key, {})
            conditions[key] = (
                projection.conditions(self.add_signal_embeddings(key, states), own)
                if len(states)
                else projection.no_conditions()
            )
        return conditions


def build(
    config: SystemConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    meta: bool = False,
) -> AnyToAny:
    """Build a system: its frozen parts, joined by freshly initialised trainable ones. Whether their
    licences are accepted is checked where a model is loaded for use or training (mmllm.licences).

    Args:
        config: the system.
        dtype: of the frozen LLM.
        device: where the model is put.
        seed: of the trainable parts.
        sizes: see AnyToAny.
        meta: build shapes without weights, for plans; nothing is fetched.

    Raises:
        ConfigError: parts do not fit each other.
        AssetError: the files of a part cannot be opened.
    """
    if meta:
        with weights.skip_weights():
            encoders = _parts("encoders", config.encoders)
            decoders = _parts("decoders", config.decoders)
            llm = configs.build(config.llm, dtype=dtype)
            with torch.device("meta"):
                return AnyToAny(config, llm, encoders, decoders)
    encoders = _parts("encoders", config.encoders)
    decoders = _parts("decoders", config.decoders)
    llm = configs.build(config.llm, dtype=dtype, device=device)
    with wrap_errors(ConfigError, "the parts cannot be joined"):
        model = AnyToAny(config, llm, encoders, decoders, seed=seed, sizes=sizes)
        model = model.to(device)
    if config.kernels:
        use_kernels(model, config.kernels)
    for decoder in model.decoders.values():
        decoder.to(device)
    return model


def _projections(
    config: SystemConfig,
    llm: LanguageModel,
    encoders: Mapping[str, ModalityEncoder],
    decoders: Mapping[str, ModalityDecoder],
) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """The input projections and the output projections, by key."""
    inputs = {
        key: configs.build(
            config.input_projections[key],
            feature_shape=encoder.feature_shape,
            width=llm.width,
            scale=llm.embedding_scale,
        )
        for key, encoder in encoders.items()
    }
    outputs = {
        key: configs.build(
            config.output_projections[key],
            condition_shapes=decoder.condition_shapes,
            width=llm.width,
        )
        for key, decoder in decoders.items()
    }
    return nn.ModuleDict(inputs), nn.ModuleDict(outputs)


def _parts(group: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Build every part of a group of the config; errors in its files name the part."""
    parts = {}
    for key, entry in entries.items():
        with wrap_errors(AssetError, f"{group}.{key} cannot be opened"):
            parts[key] = configs.build(entry)
    return parts

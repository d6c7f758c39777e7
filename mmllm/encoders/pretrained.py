"""Bases of encoders with pretrained weights: what is the same for all of them is written here.

    PretrainedEncoder       a network, and the fingerprint of what decides its features
    TransformersEncoder     its network and its processor come from a folder of transformers
    AssetEncoder            its network is built here, its weights are one safetensors file

Legend: M media, L tokens, C channels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mmllm.conversation import Audio, Medium
from mmllm.encoders.base import ModalityEncoder
from mmllm.encoders.loading import ModelFolder, ModelPart, first_line
from mmllm.encoders.pooling import block_number
from mmllm.errors import AssetError, MediaError
from mmllm.utils.hashing import fingerprint, sha256_file
from mmllm.weights import LOADING, are_weights_deferred


@dataclass(frozen=True)
class PretrainedConfig:
    """Fields of every encoder whose weights are a public model."""

    weights: str
    """A folder or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights; tokens are float32."""


class PretrainedEncoder(ModalityEncoder):
    """A frozen network whose fingerprint is computed once, by the constructor."""

    component: ClassVar[str]
    """The encoder's `type`: its name in error messages and in fingerprints."""
    fingerprint_fields: ClassVar[tuple[str, ...]] = ()
    """Fields of the config, besides `dtype`, that change the features."""

    config: Any
    network: Any

    def __init__(self) -> None:
        super().__init__()
        self._fingerprint = ""

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def finish(self, *, weights: str, preprocessing: Any, layer: Any) -> None:
        """Compute the fingerprint and freeze the network; the last step of a constructor.

        Args:
            weights: the hash of the weights and of the model's config.
            preprocessing: plain data that identifies it.
            layer: the block whose output is taken.
        """
        self._fingerprint = fingerprint(
            {
                "component": self.component,
                "weights": weights,
                "preprocessing": preprocessing,
                "layer": layer,
                "dtype": self.config.dtype,
                **{name: getattr(self.config, name) for name in self.fingerprint_fields},
            }
        )
        self.freeze()

    def on_network(self, samples: Tensor) -> Tensor:
        """Samples in the dtype and on the device of the network's weights."""
        like = next(self.network.parameters())
        return samples.to(like.device, like.dtype)


class TransformersEncoder(PretrainedEncoder):
    """An encoder by a model of transformers.

    A family declares `model_classes` and `processor_class`, and writes `configure`, `to_tensor` and
    `forward`; `select_network` where only a part of the model is used.
    """

    model_classes: ClassVar[Mapping[str, str]]
    """`model_type` of a folder -> the class of transformers that reads it; `module:class` of one
    that transformers does not export."""
    processor_class: ClassVar[str]
    """The class of transformers that preprocesses."""
    parts: ClassVar[Mapping[str, ModelPart]] = {}
    """`model_type` of a folder -> the part of its model that is read, where that is not all."""

    layer: Any = "last"
    """The block whose output is taken, as the fingerprint has it."""

    def __init__(self, config: PretrainedConfig) -> None:
        """Open and load the weights. Raises AssetError and ConfigError."""
        super().__init__()
        import transformers

        self.config = config
        source = ModelFolder(config.weights, config.revision, where=self.component)
        model_type = source.model_type(list(self.model_classes))
        self.processor: Any = source.processor(getattr(transformers, self.processor_class))
        module, _, name = self.model_classes[model_type].rpartition(":")
        model_class = getattr(import_module(module) if module else transformers, name)
        model = source.load(model_class, config.dtype, self.parts.get(model_type))
        self.network = self.select_network(model)
        self._hidden_state: int | None = None
        self.configure(source, model_type, self.network.config)
        self.finish(weights=source.hash, preprocessing=self.preprocessing(), layer=self.layer)

    def select_network(self, model: Any) -> Any:
        """The part of the loaded model that encodes."""
        return model

    def configure(self, source: ModelFolder, model_type: str, model: Any) -> None:
        """Set `sample_shape`, `feature_shape` and the layer, and check the config against the
        model's.

        Args:
            source: the model's folder.
            model_type: transformers' name of the architecture, for example "clip_vision_model".
            model: the model's transformers config.

        Raises:
            AssetError: the folder does not hold a model of this kind.
            ConfigError: the encoder's config asks for what the model does not have.
        """
        raise NotImplementedError

    def preprocessing(self) -> Any:
        """Plain data that identifies the preprocessing."""
        return self.processor.to_dict()

    def choose_layer(self, num_blocks: int) -> None:
        """Take the output of the config's `layer`; that of the last is the model's final output."""
        self.layer = block_number(self.config.layer, num_blocks, where=self.component)
        self._hidden_state = None if self.layer == num_blocks else self.layer

    def hidden_states(self, **inputs: Any) -> Tensor:
        """Run the network: the output of the chosen layer."""
        if self._hidden_state is None:
            return self.network(**inputs).last_hidden_state
        return self.network(**inputs, output_hidden_states=True).hidden_states[self._hidden_state]

    def extract(self, audio: Audio, **options: Any) -> Any:
        """Run the feature extractor on audio, resampled to its own rate, channels averaged.

        Args:
            audio: the audio, at any rate.
            **options: further arguments of the feature extractor.

        Returns:
            What the extractor returns, with PyTorch tensors of one row.

        Raises:
            MediaError: the extractor refuses the audio, for example since it is too short.
        """

        rate = self.processor.sampling_rate
        wave = np.array(audio.resample(rate).to_numpy()[0])
        try:
            return self.processor(wave, sampling_rate=rate, return_tensors="pt", **options)
        except (ValueError, RuntimeError, AssertionError, IndexError) as error:
            raise MediaError(
                f"{self.component}: {audio!r} cannot be prepared ({len(wave)} samples at {rate} "
                f"Hz): {first_line(error)}"
            ) from error

    def probe_sample_shape(self, wide: Medium, high: Medium) -> tuple[int, ...]:
        """Return the shape that `preprocess` gives to every medium, by trying a wide and a high
        one.

        Args:
            wide: a medium that is wider than high.
            high: a medium that is higher than wide.

        Raises:
            AssetError: the shapes differ, so that no batch could hold both.
        """
        first, second = self.preprocess(wide), self.preprocess(high)
        if first.shape != second.shape:
            raise AssetError(
                f"{self.component}.weights: the preprocessor makes samples of different shapes "
                f"({list(first.shape)} and {list(second.shape)}), which no batch can hold; set "
                "do_center_crop or a fixed size in its preprocessor_config.json"
            )
        return tuple(first.shape)


class AssetEncoder(ModalityEncoder):
    """An encoder whose network is built here, and whose weights are `model.safetensors` of an asset
    of `mini` or of a folder.

    A family writes `build_network`, `load_tensors`, `to_tensor` and `forward`.
    """

    component: ClassVar[str]
    layer: ClassVar[str]
    """The layer whose output is taken, as the fingerprint has it."""
    preprocessing: ClassVar[str]
    """Identifies the preprocessing in the fingerprint."""

    def __init__(self, config: Any, folder: Path | None) -> None:
        """Read `model.safetensors` of the folder, now or on first use (`load_on_first_use`);
        without a folder the network is on the meta device. Raises AssetError for a file that
        cannot be read or does not fit."""
        super().__init__()
        self.config = config
        self._weights = "left out"
        self._unread: Path | None = None
        self._moves: list[Callable[[Tensor], Tensor]] = []
        if folder is None:
            with torch.device("meta"):
                self.build_network()
            self.freeze()
            return
        file = folder / "model.safetensors"
        if are_weights_deferred():
            with self._wrap_errors(file), safe_open(file, framework="pt"):
                self._unread = file
        else:
            self._read(file)
        self._weights = sha256_file(file)

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self._unread is not None:  # not by a hook: hooks keep a prompt out of the prefix cache
            self.load()
        return super().__call__(*args, **options)

    def load(self) -> None:
        with LOADING:
            if self._unread is None:
                return
            # Weights created in inference mode could never take part in a training step.
            with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
                self._read(self._unread)
                self._unread = None
                while self._moves:
                    self._apply(self._moves.pop(0))

    def _read(self, file: Path) -> None:
        self.build_network()
        self.freeze()
        with self._wrap_errors(file):
            self.load_tensors(load_file(file))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the weights, those that are not read yet when they are."""
        if self._unread is not None:
            self._moves.append(fn)
        return super()._apply(fn, recurse)

    @contextmanager
    def _wrap_errors(self, file: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            if file.exists() and not os.access(file, os.R_OK):  # safetensors: "No such file"
                raise AssetError(f"{file}: this user may not read it") from error
            raise AssetError(f"{file}: not the weights of {self.architecture}: {error}") from error

    @property
    def architecture(self) -> str:
        """The network's name in error messages."""
        return self.component

    def build_network(self) -> None:
        """Create the modules, untrained."""
        raise NotImplementedError

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copy the tensors of the file into the modules."""
        self.load_state_dict(tensors)

    @property
    def fingerprint(self) -> str:
        settings = asdict(self.config).items()
        facts = {key: value for key, value in settings if key != "weights" and value != ()}
        facts |= {"component": self.component, "weights": self._weights, "layer": self.layer}
        return fingerprint(facts | {"preprocessing": self.preprocessing})


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a module's weights."""
    return next(module.parameters()).dtype

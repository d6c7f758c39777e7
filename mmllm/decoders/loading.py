"""Pipelines on disk: resolving, checking and loading their folders; one pipeline in memory.

Only safetensors are read, and no code from a folder is run.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmllm.decoders.options import enable_offload
from mmllm.decoders.schedules import with_solver
from mmllm.decoders.shared_text_encoder import COMPONENT, check_first_layers, share_text_encoder
from mmllm.errors import AssetError, ConfigError, quoted, wrap_errors
from mmllm.utils.quiet import quiet_libraries
from mmllm.weights import (
    LOADING,
    PICKLE_SUFFIXES,
    are_weights_skipped,
    check_attention,
    locate,
    remote_code_disabled,
)

_CONVERT = (
    "from diffusers import DiffusionPipeline as Pipeline; "
    "Pipeline.from_pretrained({folder!r}, use_safetensors=False).save_pretrained({folder!r})"
)

OWN_MODULES = ("mmllm.mini.codecs", "mmllm.mini.caption_encoder", "mmllm.mini.clip_transformer")
"""Modules with components that diffusers and transformers do not have."""


class PipelineRuntime:
    """A pipeline that is loaded on first use, with its device, dtype and scheduler. A decoder and
    its copies with other options share one."""

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        dtype: torch.dtype,
        offload: str,
        solver: tuple[str, dict[str, Any]] | None,
        load: Callable[[torch.dtype, Any], Any],
        on_loaded: Callable[[Any], None],
        needs_llm: bool = False,
    ):
        """Load nothing yet.

        Args:
            folder: of the pipeline.
            name: of the decoder, for error messages.
            dtype: of the weights.
            offload: see DecoderConfig.
            solver: class and settings of the scheduler that replaces the pipeline's own, if any.
            load: called with the dtype and the text encoder that replaces the folder's, if any.
            on_loaded: called with the pipeline once it is loaded.
            needs_llm: whether `text_encoder` has to be set before the pipeline is loaded.
        """
        self._text_encoder: Any = None
        self._make_text_encoder: Callable[[], Any] | None = None
        self.folder = folder
        self.name = name
        self.dtype = dtype
        self.offload = offload
        self.device = torch.device("cpu")
        self._solver = solver
        self._on_loaded = on_loaded
        self._needs_llm = needs_llm
        self._load_with = load
        self._pipeline: Any = None
        self._siblings: dict[str, Any] = {}
        self._own_scheduler: Any = None

    @property
    def is_loaded(self) -> bool:
        """Whether the pipeline is in memory."""
        return self._pipeline is not None

    @property
    def pipeline(self) -> Any:
        """The diffusers pipeline, loaded once."""
        if self._pipeline is None:
            with LOADING:
                if self._pipeline is None:  # else another thread was first
                    self._load()
        return self._pipeline

    @property
    def text_encoder(self) -> Any:
        """What the language model reads captions with, made once; None: the folder's own does."""
        if self._text_encoder is None and self._make_text_encoder is not None:
            self._text_encoder = self._make_text_encoder()
        return self._text_encoder

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the pipeline if it is loaded.

        For another dtype it is loaded again: components of some transformers must stay float32,
        which only loading respects.

        Args:
            device: the device that samples.
            dtype: the dtype of the weights.

        Raises:
            ConfigError: the device does not support the config's `offload`.
        """
        if dtype != self.dtype or self.offload != "none":
            self.release()
        self.device, self.dtype = device, dtype
        self._check_offload()
        if self._pipeline is not None:
            self._pipeline.to(device)

    def share_text_encoder(self, llm: Any, where: str) -> None:
        """Let a language model be the text encoder of the pipeline, which is then not loaded.

        Args:
            llm: the `LanguageModel`.
            where: the decoder's key in the config, for errors.

        Raises:
            ConfigError: it is another model.
        """
        components = pipeline_components(read_model_index(self.folder), self.folder)
        component = components[COMPONENT]
        self._make_text_encoder = partial(share_text_encoder, self.folder, component, llm, where)
        if component[0] == "transformers":
            self._text_encoder = self._make_text_encoder()
        else:  # a class that imports diffusers, which replies of text do not need
            check_first_layers(self.folder / COMPONENT, llm, where)
            self._text_encoder = None

    def release(self) -> None:
        """Drop the loaded pipeline; the next use loads it again."""
        self._pipeline = None
        self._siblings.clear()

    def sibling(self, class_name: str) -> Any:
        """The pipeline of another diffusers class, made of the same components, without copies of
        their weights. (diffusers' `from_pipe` would cast them.)"""
        if class_name not in self._siblings:
            import diffusers

            own = self.pipeline
            cls = getattr(diffusers, class_name)
            parts, options = cls._get_signature_keys(cls)
            components = {name: own.components[name] for name in parts if name in own.components}
            settings = {name: own.config[name] for name in options if name in own.config}
            with LOADING, quiet_loading():
                sibling = cls(**components, **settings)
            sibling.set_progress_bar_config(disable=True)
            self._siblings[class_name] = sibling
        return self._siblings[class_name]

    @contextlib.contextmanager
    def scheduler_scope(self, solver: tuple[str, dict[str, Any]] | None) -> Iterator[None]:
        """Within it the pipeline samples with this solver in place of its usual one."""
        if solver == self._solver:
            yield
            return
        _ = self.pipeline  # whose scheduler is the source of the solver's settings
        try:
            self._set_scheduler(solver)
            yield
        finally:
            self._set_scheduler(self._solver)

    @contextlib.contextmanager
    def offload_scope(self) -> Iterator[None]:
        """On exit every component of an offloaded pipeline is back on the CPU. (With `sequential`
        they never stay on the accelerator.)"""
        try:
            yield
        finally:
            if self._pipeline is not None and self.offload == "model":
                self._pipeline.maybe_free_model_hooks()

    def _load(self) -> None:
        self._check_offload()
        if self._needs_llm and self.text_encoder is None:
            raise ConfigError(
                f"{self.name}: text_encoder llm: this decoder is in no system whose LLM it could "
                "use; build it in one, or set text_encoder to own"
            )
        # Weights created in inference mode could never take part in a training step.
        with torch.inference_mode(False):
            pipeline = self._load_with(self.dtype, self.text_encoder)
            if self.offload == "none":
                pipeline.to(self.device)
            else:
                enable_offload(pipeline, self.offload, self.device)
            self._on_loaded(pipeline)
        self._own_scheduler = pipeline.scheduler
        self._pipeline = pipeline
        self._set_scheduler(self._solver)

    def _set_scheduler(self, solver: tuple[str, dict[str, Any]] | None) -> None:
        own = self._own_scheduler
        scheduler = own if solver is None else with_solver(own, *solver)
        for pipeline in filter(None, (self._pipeline, *self._siblings.values())):
            pipeline.scheduler = scheduler

    def _check_offload(self) -> None:
        if self.offload != "none" and self.device.type == "cpu" and not are_weights_skipped():
            raise ConfigError(
                f"{self.name}: offload {self.offload!r} keeps weights off an accelerator, but this "
                "decoder is to run on the CPU; choose a device such as cuda, or offload none"
            )


def resolve_folder(weights: str) -> Path:
    """The pipeline's folder; a hub id is downloaded (configs and safetensors) or found cached.
    Raises AssetError."""
    folder = Path(locate(weights, "decoders weights"))
    if folder.is_dir():
        return folder
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    try:
        with quiet_libraries("diffusers"):
            return Path(DiffusionPipeline.download(weights, use_safetensors=True))
    except (OSError, ValueError) as error:
        raise AssetError(
            f"decoders weights: {weights!r} is no folder here and cannot be fetched from the hub: "
            f"{str(error).splitlines()[0]}; give a folder, correct the id, or log in with `hf auth "
            "login` if it is gated"
        ) from error


def check_pipeline_folder(folder: Path, pipelines: Sequence[str]) -> str:
    """Check a folder in diffusers' layout, without reading weights.

    Args:
        folder: the folder, with model_index.json.
        pipelines: names of the pipeline classes that the decoder takes.

    Returns:
        The name of the folder's pipeline class.

    Raises:
        AssetError: the folder holds another pipeline, is incomplete, names code that is not run, or
            has pickles only; then the message has the command that converts them.
    """
    index = read_model_index(folder)
    class_name = str(index.get("_class_name"))
    if class_name not in pipelines:
        raise AssetError(
            f"{folder}: holds a {class_name}, but this type of decoder takes "
            f"{' or '.join(pipelines)}"
        )
    check_components(folder, pipeline_components(index, folder))
    return class_name


def check_components(folder: Path, components: dict[str, tuple[str, str]]) -> None:
    """Check that a pipeline's components are there, without pickles or settings that run code.

    Args:
        folder: of the pipeline.
        components: as `pipeline_components` returns them.

    Raises:
        AssetError: one is missing, or has pickles only.
    """
    for name, (_, component_class) in components.items():
        part = folder / name
        if not part.is_dir():
            raise AssetError(
                f"{folder}: {name} ({component_class}) is missing; is the copy complete?"
            )
        suffixes = {file.suffix for file in part.iterdir()}
        if (part / "config.json").is_file():
            with wrap_errors(AssetError, part / "config.json"):
                settings = json.loads((part / "config.json").read_text(encoding="utf-8"))
            check_attention(settings, part / "config.json")
        if ".safetensors" not in suffixes and suffixes & set(PICKLE_SUFFIXES):
            raise AssetError(
                f"{part}: holds pickled weights only, which could run code and are not read here; "
                "if you trust them, convert the pipeline once:\n  python -c "
                + shlex.quote(_CONVERT.format(folder=str(folder.resolve())))
            )


def read_model_index(folder: Path, name: str = "model_index.json") -> dict[str, Any]:
    """Read the index of a pipeline's folder. Raises AssetError.

    Args:
        folder: the folder.
        name: of the file.
    """
    file = folder / name
    if not file.is_file():
        raise AssetError(f"{folder}: no {name}; expected the folder of a pipeline")
    with wrap_errors(AssetError, file):
        index = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(index, dict):
            raise AssetError(f"{file}: expected an object, got {quoted(index)}")
        return index


def pipeline_components(index: dict[str, Any], folder: Path) -> dict[str, tuple[str, str]]:
    """Return the components of a pipeline: name -> (library, class).

    Args:
        index: the contents of model_index.json.
        folder: the pipeline's folder.

    Raises:
        AssetError: a library is none of diffusers, transformers and mmllm's own: code that comes
            with a pipeline is not run.
    """
    components: dict[str, tuple[str, str]] = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[:1] in ([], [None]):
            continue
        # A third entry is a modular pipeline's, where a component came from.
        if len(entry) not in (2, 3) or not all(isinstance(word, str) for word in entry[:2]):
            continue
        library, class_name = entry[:2]
        is_known = library in OWN_MODULES or library.isidentifier()
        if not (is_known and name.isidentifier() and class_name.isidentifier()):
            raise AssetError(
                f"{folder}: {quoted(name)} is {quoted(class_name)} of {quoted(library)}, which is "
                "not of diffusers or transformers; code that comes with a pipeline is not run"
            )
        if (folder / name / f"{library}.py").exists():
            raise AssetError(
                f"{folder / name}: brings {library}.py; code that comes with a pipeline is not run"
            )
        components[name] = library, class_name
    return components


def load_pipeline(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    text_encoder: torch.nn.Module | None = None,
) -> Any:
    """Load a pipeline of diffusers from safetensors, every component frozen, in evaluation mode.

    mmllm's own components are registered first, since a folder may name them.

    Args:
        folder: the folder in diffusers' layout.
        dtype: the dtype of the weights, but for components that must stay float32.
        text_encoder: takes the place of the folder's own, which is not read.

    Raises:
        AssetError: the folder is incomplete, or names code that is not run.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    components = pipeline_components(read_model_index(folder), folder)
    for library in {library for library, _ in components.values()} & set(OWN_MODULES):
        importlib.import_module(library)
    message = f"{folder}: the pipeline cannot be loaded"
    with wrap_errors(AssetError, message), quiet_loading(), remote_code_disabled():
        pipeline = DiffusionPipeline.from_pretrained(
            str(folder),
            use_safetensors=True,
            dtype=dtype,
            trust_remote_code=False,
            **({} if text_encoder is None else {COMPONENT: None}),
        )
        if text_encoder is not None:
            setattr(pipeline, COMPONENT, text_encoder)
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    return pipeline


def quiet_loading() -> contextlib.AbstractContextManager[None]:
    """Suppress progress bars, and the warnings that a codec is mmllm's own or that diffusers stops
    developing a pipeline. Other warnings, such as of weights that do not fit, stay. These switches
    are the whole process's: within the package one thread at a time uses them (LOADING)."""
    return quiet_libraries(errors_only=False, drop=_is_expected)


def _is_expected(message: str) -> bool:
    is_own_codec = "Expected types for" in message and "mmllm." in message
    is_own_codec |= message.startswith("Guiders are currently an experimental feature")
    return is_own_codec or "has been deprecated and will not receive" in message

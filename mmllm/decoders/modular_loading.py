"""Modular pipelines of diffusers (text block, denoising blocks, codec block): loaded from a folder,
and called like a classic pipeline, but without the text block.

Only blocks that diffusers itself ships are run; only components that lie in the folder are read.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.decoders.loading import (
    check_components,
    pipeline_components,
    quiet_loading,
    read_model_index,
)
from mmllm.errors import AssetError, ConfigError, wrap_errors
from mmllm.weights import remote_code_disabled

CONDITION = "denoiser_input_fields"
"""What diffusers calls the tensors that the text block hands to the denoising blocks."""
_WORKFLOWS = ("text2image", "text2video")


class TextlessPipeline:
    """A modular pipeline whose denoising blocks are called with the outputs of its text block.

    It has the attributes of a classic pipeline that decoders use; all others are the modular
    pipeline's.
    """

    def __init__(self, pipeline: Any):
        """Split a pipeline into its text block and the blocks after it.

        Args:
            pipeline: of diffusers, with the blocks of one workflow.

        Raises:
            ConfigError: it has no text block.
        """
        from diffusers.modular_pipelines import SequentialPipelineBlocks

        self.modular = pipeline
        steps = dict(pipeline.blocks.sub_blocks)
        name = _text_block(steps)
        if name is None:
            raise ConfigError(
                f"{type(pipeline).__name__}: no block turns a prompt into the inputs of the "
                "denoiser, so none can be replaced by a condition"
            )
        names = list(steps)
        after = {each: steps[each] for each in names[names.index(name) + 1 :]}
        self.text_block: Any = steps[name]
        self.blocks: Any = SequentialPipelineBlocks.from_blocks_dict(after)

    def __getattr__(self, name: str) -> Any:
        if name == "modular":  # not made yet
            raise AttributeError(name)
        return getattr(self.modular, name)

    @property
    def scheduler(self) -> Any:
        """The scheduler, which may be replaced."""
        return self.modular.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        """Replace the scheduler."""
        self.modular.update_components(scheduler=scheduler)

    @property
    def components(self) -> dict[str, Any]:
        """Every component by name."""
        return self.modular.components

    @property
    def guider(self) -> Any:
        """The component that guides; None where the scale is an input, or there is none."""
        return self.components.get("guider")

    @property
    def neutral_guidance(self) -> float:
        """The scale up to which the guider uses the condition alone."""
        return 0.0 if getattr(self.guider, "use_original_formulation", False) else 1.0

    @property
    def needs_negative(self) -> bool:
        """Whether the blocks take no condition without a negative one."""
        return any(name.startswith("negative_") for name in self.blocks.required_inputs)

    def encode(self, prompt: str, **options: Any) -> dict[str, Any]:
        """Run the text block on one prompt, without guidance.

        Args:
            prompt: the prompt.
            **options: further inputs of the block; those that it does not have are left out.

        Returns:
            What it hands to the denoiser: tensors, or lists of them, by name.
        """
        if self.guider is not None:
            self.guider.guidance_scale = self.neutral_guidance
        state = self._run(self.text_block, {"prompt": prompt, **options})
        return {
            output.name: value
            for output in self.text_block.intermediate_outputs
            if output.kwargs_type == CONDITION and not output.name.startswith("negative_")
            if (value := state.get(output.name)) is not None
        }

    def __call__(self, **inputs: Any) -> Any:
        """Run the blocks after the text block.

        Args:
            **inputs: those of the blocks; others are left out.

        Returns:
            An object with `images` or `frames`, as a classic pipeline returns it.
        """
        state = self._run(self.blocks, inputs)
        return SimpleNamespace(images=state.get("images"), frames=state.get("videos"))

    def _run(self, blocks: Any, given: dict[str, Any]) -> Any:
        from diffusers.modular_pipelines.modular_pipeline import PipelineState

        state = PipelineState()
        for parameter in blocks.inputs:
            if parameter.name is not None:
                value = given.get(parameter.name, parameter.default)
                state.set(parameter.name, value, parameter.kwargs_type)
        with torch.no_grad():
            return blocks(self.modular, state)[1]


def check_modular_folder(folder: Path) -> str:
    """Check the folder of a modular pipeline, without reading weights.

    Args:
        folder: with `modular_model_index.json`, as `save_pretrained` writes it.

    Returns:
        The name of its class.

    Raises:
        AssetError: it is none of diffusers' own, is incomplete, or names code that is not run.
    """
    import diffusers
    from diffusers.modular_pipelines import ModularPipeline

    index = read_model_index(folder, "modular_model_index.json")
    class_name = str(index.get("_class_name"))
    cls = getattr(diffusers, class_name, None) if class_name.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, ModularPipeline)) or cls is ModularPipeline:
        raise AssetError(
            f"{folder}: holds a {class_name}, but this type of decoder takes modular pipelines "
            "that diffusers ships; code that comes with a pipeline is not run"
        )
    if any(folder.glob("*.py")):
        raise AssetError(f"{folder}: brings code, and code that comes with a pipeline is not run")
    check_components(folder, pipeline_components(index, folder))
    return class_name


def load_modular(folder: Path, dtype: torch.dtype = torch.float32) -> TextlessPipeline:
    """Load a modular pipeline from safetensors, every component frozen, in evaluation mode.

    Args:
        folder: as `check_modular_folder` takes it.
        dtype: the dtype of the weights.

    Raises:
        AssetError: a component cannot be loaded.
    """
    pipeline = _unloaded(folder)
    components = _local_components(pipeline, folder)
    with wrap_errors(AssetError, f"{folder}: the pipeline cannot be loaded"), quiet_loading():
        with remote_code_disabled():
            loaded = {
                name: spec.load(
                    dtype=dtype,
                    **({"use_safetensors": True} if _is_network(spec) else {}),
                )
                for name, spec in components.items()
            }
        pipeline.update_components(**loaded)
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    return TextlessPipeline(pipeline)


def pipeline_of_shapes(folder: Path) -> TextlessPipeline:
    """A pipeline whose text block gives zeros in the shapes of its outputs: tokenizers are read,
    weights are not.

    Args:
        folder: as `check_modular_folder` takes it.

    Raises:
        AssetError: a component cannot be read.
    """
    pipeline = TextlessPipeline(_unloaded(folder))
    wanted = {spec.name for spec in pipeline.text_block.expected_components}
    with wrap_errors(AssetError, f"{folder}: the text block cannot be read"), quiet_loading():
        for name, spec in _local_components(pipeline.modular, folder).items():
            if name in wanted:
                component = (
                    _EncoderOfShapes(folder / name, spec) if _is_network(spec) else spec.load()
                )
                setattr(pipeline.modular, name, component)
    return pipeline


class _EncoderOfShapes(nn.Module):
    """Stands in for a text encoder: zeros in the shapes that its config tells."""

    def __init__(self, folder: Path, spec: Any):
        super().__init__()
        self.config = spec.type_hint.config_class.from_pretrained(str(folder))
        self.norm = nn.Identity()
        self.register_buffer("place", torch.zeros(()))

    @property
    def model(self) -> nn.Module:
        """Itself: some blocks reach for what is inside a language model."""
        return self

    @property
    def dtype(self) -> torch.dtype:
        """float32."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def forward(self, input_ids: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        text = self.config.get_text_config()
        states = torch.zeros(()).expand(*input_ids.shape, text.hidden_size)
        layers: Any = (states,) * (text.num_hidden_layers + 1)
        return BaseModelOutput(last_hidden_state=states, hidden_states=layers)


def _unloaded(folder: Path) -> Any:
    """The pipeline with the blocks that make media of text, and with no weights."""
    import diffusers

    index = read_model_index(folder, "modular_model_index.json")
    cls: Any = getattr(diffusers, str(index["_class_name"]))
    with wrap_errors(AssetError, folder), quiet_loading():
        whole = cls(pretrained_model_name_or_path=str(folder))
        known = whole.blocks._workflow_map or {}
        workflow = next((name for name in _WORKFLOWS if name in known), None)
        if workflow is None:
            return whole
        return cls(pretrained_model_name_or_path=str(folder), workflow=workflow)


def _local_components(pipeline: Any, folder: Path) -> dict[str, Any]:
    """Name -> specification of every component that is loaded, all of them from the folder."""
    specs = {
        name: spec
        for name, spec in pipeline._component_specs.items()
        if spec.default_creation_method == "from_pretrained" and (folder / name).is_dir()
    }
    for name, spec in specs.items():
        spec.pretrained_model_name_or_path, spec.subfolder = str(folder), name
        spec.revision = None
    return specs


def _is_network(spec: Any) -> bool:
    return isinstance(spec.type_hint, type) and issubclass(spec.type_hint, nn.Module)


def _text_block(steps: dict[str, Any]) -> str | None:
    """The name of the first block that makes inputs of the denoiser of a prompt."""
    for name, block in steps.items():
        takes_prompt = any(parameter.name == "prompt" for parameter in block.inputs)
        if takes_prompt and any(out.kwargs_type == CONDITION for out in block.intermediate_outputs):
            return name
    return None

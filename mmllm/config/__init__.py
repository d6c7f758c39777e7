"""Strict configuration: YAML -> frozen dataclasses.

    parse      plain data -> any dataclass, every key and every type checked
    registry   component type ("clap", "your.module:YourConfig") -> its Config class; building it
    trusted    which code and files the config of a checkpoint may name
    renamed    former names of YAML keys
    system     SystemConfig: the parts of a model and their keys
    stage      StageConfig: what one stage trains, on which data, by which losses
    run        a stage's YAML file with overrides -> RunConfig

Every key is known or an error that suggests the closest one. Every value is checked against the
type of its field, which also decides what `no`, `1e-4` or `null` mean.
"""

from mmllm.config.parse import parse
from mmllm.config.registry import COMPONENTS, build, component_class, dump, parse_component
from mmllm.config.renamed import RENAMED, RENAMED_OPTIONS, RENAMED_PARAMETERS
from mmllm.config.run import RunConfig, load_run, override, parse_run, read_yaml
from mmllm.config.stage import (
    DenoiseConfig,
    EMAConfig,
    KLConfig,
    PrealignConfig,
    SamplesConfig,
    StageConfig,
    ValidationConfig,
    parse_stage,
)
from mmllm.config.system import SystemConfig, parse_system
from mmllm.config.trusted import trust
from mmllm.errors import ConfigError

__all__ = [
    "COMPONENTS",
    "RENAMED",
    "RENAMED_OPTIONS",
    "RENAMED_PARAMETERS",
    "ConfigError",
    "DenoiseConfig",
    "EMAConfig",
    "KLConfig",
    "PrealignConfig",
    "RunConfig",
    "SamplesConfig",
    "StageConfig",
    "SystemConfig",
    "ValidationConfig",
    "build",
    "component_class",
    "dump",
    "load_run",
    "override",
    "parse",
    "parse_component",
    "parse_run",
    "parse_stage",
    "parse_system",
    "read_yaml",
    "trust",
]

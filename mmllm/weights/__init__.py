"""Weights as files: where a part's are (`locating`), checks of those that somebody else wrote
(`foreign`), and reading and writing safetensors (`tensors`)."""

from mmllm.utils.locks import LOADING
from mmllm.weights.foreign import (
    PICKLE_SUFFIXES,
    check_attention,
    check_links,
    check_parameter_count,
    remote_code_disabled,
    resolve_inside,
)
from mmllm.weights.locating import (
    are_weights_deferred,
    are_weights_skipped,
    load_on_first_use,
    locate,
    skip_weights,
)
from mmllm.weights.tensors import copy_tensors, save_tensors, tensor_shapes

__all__ = [
    "LOADING",
    "PICKLE_SUFFIXES",
    "are_weights_deferred",
    "are_weights_skipped",
    "check_attention",
    "check_links",
    "check_parameter_count",
    "copy_tensors",
    "load_on_first_use",
    "locate",
    "remote_code_disabled",
    "resolve_inside",
    "save_tensors",
    "skip_weights",
    "tensor_shapes",
]

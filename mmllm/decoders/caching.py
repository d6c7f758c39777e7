"""Step caching: a denoising step reuses activations of the previous step that hardly change, or, as
the keys and values of a caption to which a transformer only attends, not at all.

The techniques are diffusers'. They are enabled for one call of a pipeline: nothing cached reaches
the next call or the denoising loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from mmllm.errors import ConfigError


def _first_block(_pipeline: Any, threshold: float) -> Any:
    from diffusers import FirstBlockCacheConfig

    return FirstBlockCacheConfig(threshold=threshold)


def _pyramid_attention(pipeline: Any, _threshold: float) -> Any:
    from diffusers import PyramidAttentionBroadcastConfig

    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        current_timestep_callback=lambda: pipeline.current_timestep,
    )


def _taylorseer(_pipeline: Any, _threshold: float) -> Any:
    from diffusers import TaylorSeerCacheConfig

    return TaylorSeerCacheConfig()


def _text_kv(_pipeline: Any, _threshold: float) -> Any:
    from diffusers import TextKVCacheConfig

    return TextKVCacheConfig()


CACHES: dict[str, Callable[[Any, float], Any]] = {
    "first_block": _first_block,
    "pyramid_attention": _pyramid_attention,
    "taylorseer": _taylorseer,
    "text_kv": _text_kv,
}
"""Name in a config -> diffusers' config, from the pipeline and the threshold."""

_GUIDED_TOGETHER = {
    "CogVideoXPipeline",
    "CogVideoXVideoToVideoPipeline",
    "LTXImageToVideoPipeline",
    "LTXPipeline",
}
_JOINT = {"FluxPipeline", "QwenImageImg2ImgPipeline", "QwenImagePipeline"}
PIPELINES = {
    # Pipelines that mark the conditional and the unconditional call, with blocks that it supports.
    # (In diffusers 0.42 it fails on the last block of FLUX.2.)
    "first_block": _GUIDED_TOGETHER | _JOINT | {"WanImageToVideoPipeline", "WanPipeline"},
    # It counts calls, so a step must be one call.
    "pyramid_attention": _GUIDED_TOGETHER | {"FluxPipeline"},
    # It finds attention layers by name, and does nothing where there are none.
    "taylorseer": _JOINT | {"Flux2KleinPipeline"},
    # Exact. diffusers 0.42 knows the blocks of this transformer only, and hooks no others.
    "text_kv": {"NucleusMoEImagePipeline"},
}
"""Name in a config -> the diffusers pipelines in which it works as intended."""


def usable_caches(pipeline: str) -> list[str]:
    """The names of the caches that a pipeline class supports."""
    return [name for name in CACHES if pipeline in PIPELINES[name]]


def check_cache(name: str | None, pipeline: str) -> None:
    """Raise ConfigError for a step cache that a pipeline class does not support.

    Args:
        name: the cache, a key of `CACHES`; None: no cache, which every pipeline supports.
        pipeline: the name of the pipeline's class.
    """
    usable = usable_caches(pipeline)
    if name is not None and name not in usable:
        raise ConfigError(
            f"cache: {name!r} does not work in a {pipeline}; expected "
            f"{' or '.join([*usable, 'null'])}"
        )


@contextlib.contextmanager
def step_cache(pipeline: Any, name: str | None, threshold: float) -> Iterator[None]:
    """Enable a step cache on the denoisers of a pipeline inside the block.

    Args:
        pipeline: the loaded pipeline.
        name: the cache, a key of `CACHES`; None: no cache.
        threshold: of first_block: the relative change of the first block up to which the others'
            results are reused; higher is faster and less faithful. Other caches ignore it.

    Raises:
        ConfigError: the pipeline does not support this cache.
    """
    if name is None:
        yield
        return
    check_cache(name, type(pipeline).__name__)
    denoisers = [pipeline.transformer, pipeline.components.get("transformer_2")]
    with contextlib.ExitStack() as stack:
        for denoiser in filter(None, denoisers):
            denoiser.enable_cache(CACHES[name](pipeline, threshold))
            stack.callback(denoiser.disable_cache)
        yield

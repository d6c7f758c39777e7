"""Step caching: a denoising step takes over from the last one what has hardly changed.

diffusers has the techniques; here they get names, and are on while one call of a pipeline lasts:
nothing that they keep reaches the next call, nor the denoising loss.
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


CACHES: dict[str, Callable[[Any, float], Any]] = {
    "first_block": _first_block,
    "pyramid_attention": _pyramid_attention,
    "taylorseer": _taylorseer,
}
"""Name in a config -> diffusers' settings, made of the pipeline and the config's threshold."""

_GUIDED_TOGETHER = {
    "CogVideoXPipeline",
    "CogVideoXVideoToVideoPipeline",
    "LTXImageToVideoPipeline",
    "LTXPipeline",
}
_JOINT = {"FluxPipeline", "QwenImageImg2ImgPipeline", "QwenImagePipeline"}
PIPELINES = {
    # Those that tell their denoiser the guided call from the other, and whose blocks it knows.
    # (In diffusers 0.42 it fails on the last block of FLUX.2.)
    "first_block": _GUIDED_TOGETHER | _JOINT | {"WanImageToVideoPipeline", "WanPipeline"},
    # It takes two calls in a step for two steps.
    "pyramid_attention": _GUIDED_TOGETHER | {"FluxPipeline"},
    # It finds no attention by its name in others, and then does nothing.
    "taylorseer": _JOINT | {"Flux2KleinPipeline"},
}
"""Name in a config -> the pipelines of diffusers in which it does what it is for."""


def usable_caches(pipeline: str) -> list[str]:
    """The caches that this class of pipelines can use."""
    return [name for name in CACHES if pipeline in PIPELINES[name]]


def check_cache(name: str | None, pipeline: str) -> None:
    """ConfigError for a cache that this class of pipelines cannot use."""
    usable = usable_caches(pipeline)
    if name is not None and name not in usable:
        raise ConfigError(
            f"cache: {name!r} does not work in a {pipeline}; expected "
            f"{' or '.join([*usable, 'null'])}"
        )


@contextlib.contextmanager
def step_cache(pipeline: Any, name: str | None, threshold: float) -> Iterator[None]:
    """Within it the denoisers of the pipeline have this cache."""
    if name is None:
        yield
        return
    check_cache(name, type(pipeline).__name__)
    denoisers = [pipeline.transformer, pipeline.components.get("transformer_2")]
    with contextlib.ExitStack() as behind:
        for denoiser in filter(None, denoisers):
            denoiser.enable_cache(CACHES[name](pipeline, threshold))
            behind.callback(denoiser.disable_cache)
        yield

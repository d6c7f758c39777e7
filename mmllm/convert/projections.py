"""Projections of a NExT-GPT checkpoint -> configs and parameters of mmllm's.

Legend: K signal tokens, D LLM width, d inner width, P x E the condition.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmllm.convert.reading import NextGPTCheckpoint
from mmllm.errors import CheckpointError

OUTPUTS = {
    "image": ("gen_text_hidden_fcs.0.", "mm_output_img_projector."),
    "video": ("gen_text_hidden_fcs_video.0.", "mm_output_vid_projector."),
    "audio": ("gen_text_hidden_fcs_audio.0.", "mm_output_aud_projector."),
}
"""Modality -> prefix of its output projection in either layout; also the order of the tokens."""

INPUTS = ("llama_proj.", "mm_input_projector.")
"""Prefixes of the one input projection in either layout."""

HEADS = 4
"""Attention heads of the output projections, in NExT-GPT's code; the weights do not show it."""

Renamed = dict[str, tuple[str, Tensor]]
"""A name -> the tensor's whole name in NExT-GPT's checkpoint, and the tensor."""


def find_output(source: NextGPTCheckpoint, key: str) -> Renamed:
    """Return the tensors of one modality's output projection, by their names in its module.

    Args:
        source: the checkpoint of NExT-GPT.
        key: image, audio or video.
    """
    return _under(source, OUTPUTS[key])


def convert_output(
    key: str, tensors: Renamed, num_signal_tokens: int
) -> tuple[dict[str, Any], Renamed]:
    """Convert one output projection.

    Args:
        key: The modality.
        tensors: Of `find_output`.
        num_signal_tokens: K.

    Returns:
        Its config in `output_projections`, and its tensors by mmllm's names.

    Raises:
        CheckpointError: It is no transformer, or incomplete, or has no signal tokens.
    """
    if "query_embs" not in tensors:
        raise CheckpointError(
            f"the output projection of {key} is no transformer (it has no query_embs); NExT-GPT's "
            "linear and Q-Former projections cannot be represented here"
        )
    if not num_signal_tokens:
        raise CheckpointError(f"the tokenizer's files name no signal tokens of {key}")
    condition = f"{key}.%s.prompt_embeds"
    names = {
        "query_embs": condition % "queries",
        **{f"{name}.weight": f"{key}.inward.weight" for name in ("fc", "in_fc")},
        **{f"{name}.bias": f"{key}.inward.bias" for name in ("fc", "in_fc")},
        **{f"{name}.weight": (condition % "outward") + ".weight" for name in ("model", "out_fc")},
        **{f"{name}.bias": (condition % "outward") + ".bias" for name in ("model", "out_fc")},
    }
    converted: Renamed = {}
    for name, (whole_name, value) in tensors.items():
        if name.startswith(("tfm.encoder.", "tfm.decoder.")):
            new_name = f"{key}.{name.removeprefix('tfm.')}"
        elif name in names:
            new_name = names[name]
        else:
            continue  # stays among those that are left
        converted[new_name] = (whole_name, value[0] if name == "query_embs" else value)
    try:
        inward = converted[f"{key}.inward.weight"][1]
        feed_forward = converted[f"{key}.encoder.layers.0.linear1.weight"][1]
    except KeyError as error:
        raise CheckpointError(f"the output projection of {key} has no {error}") from error
    entry = {
        "type": "transformer",
        "signal_tokens": num_signal_tokens,
        "width": inward.shape[0],
        "encoder_layers": _num_layers(converted, "encoder"),
        "decoder_layers": _num_layers(converted, "decoder"),
        "heads": HEADS,
        "feed_forward": feed_forward.shape[0],
        "bare": True,
    }
    return entry, converted


def find_input(source: NextGPTCheckpoint) -> Renamed:
    """The tensors of the one input projection, by their names in its module."""
    return _under(source, INPUTS)


def convert_input(tensors: Renamed) -> tuple[dict[str, Any], dict[str, str]] | None:
    """The config of the input projection in `input_projections`, and its tensors' names -> mmllm's.
    None for a kind of projection that mmllm does not have."""
    if tensors.keys() == {"weight", "bias"}:
        names = {"weight": "linear.weight", "bias": "linear.bias"}
        return {"type": "linear", "bare": True}, names
    if tensors.keys() == {f"layer.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")}:
        hidden = tensors["layer.0.weight"][1].shape[0]
        names = {
            f"layer.{number}.{kind}": f"layers.{new_number}.{kind}"
            for number, new_number in ((0, 0), (2, 3))
            for kind in ("weight", "bias")
        }
        return {"type": "mlp", "hidden": hidden, "bare": True}, names
    return None


def _under(source: NextGPTCheckpoint, prefixes: tuple[str, ...]) -> Renamed:
    return {
        name.removeprefix(prefix): (name, value)
        for prefix in prefixes
        for name, value in source.tensors.items()
        if name.startswith(prefix)
    }


def _num_layers(tensors: Mapping[str, Any], side: str) -> int:
    """How many layers the encoder or the decoder of a transformer has."""
    numbers = (int(name.split(".")[3]) for name in tensors if f".{side}.layers." in name)
    return 1 + max(numbers, default=-1)

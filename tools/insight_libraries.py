"""Checks that captum, nnsight and SAELens work with mmllm, in an environment of its own that has
them; mmllm needs none of them.

    python tools/insight_libraries.py mini captum nnsight saelens
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mmllm
from mmllm import console, insight
from mmllm.insight.dictionary.autoencoder import Origin, SparseAutoencoder
from mmllm.insight.dictionary.storage import save_dictionary

_TEXT = "The cat sat on the mat, and the dog sat on the"


def check_captum(chat: Any) -> dict[str, float]:
    """Attributions of a logit to the embeddings, and the states of a layer."""
    from captum.attr import InputXGradient, LayerActivation  # pyright: ignore[reportMissingImports]

    llm = chat.model.llm
    embeds, layer = _embedded(chat), len(llm.backbone.layers) // 2
    target = llm.head(llm(embeds)[:, -1])[0].argmax().item()

    def logit(embeds: Tensor) -> Tensor:
        return llm.head(llm(embeds)[:, -1]).float()[:, target]

    embeds.requires_grad_()
    found = InputXGradient(logit).attribute(embeds)
    (gradient,) = torch.autograd.grad(logit(embeds).sum(), embeds)
    states = LayerActivation(logit, llm.backbone.layers[layer]).attribute(embeds)
    with insight.look(chat, f"layers.{layer}") as seen:
        llm(embeds)
    return {
        "input times gradient": _difference(found, embeds * gradient),
        "states of a layer": _difference(states[0], seen[f"layers.{layer}"]),
    }


def check_nnsight(chat: Any) -> dict[str, float]:
    """The states of a layer, and a reply's hidden states under an intervention."""
    from nnsight import NNsight  # pyright: ignore[reportMissingImports]

    llm = chat.model.llm
    embeds, layer = _embedded(chat), len(llm.backbone.layers) // 2
    module = llm.backbone.layers[layer]
    path = next(name for name, part in llm.named_modules() if part is module)
    wrapped = NNsight(llm)
    find = attrgetter(path)
    with insight.look(chat, f"layers.{layer}") as seen:
        llm(embeds)
    with torch.no_grad(), wrapped.trace(embeds):
        states = find(wrapped).output.save()
    with insight.edit(chat, f"layers.{layer}", lambda states, _: states * 0.5):
        expected = llm(embeds)
    with torch.no_grad(), wrapped.trace(embeds):
        find(wrapped).output = find(wrapped).output * 0.5
        edited = wrapped.output.save()
    return {
        "states of a layer": _difference(states[0], seen[f"layers.{layer}"]),
        "hidden states under an intervention": _difference(edited, expected),
    }


def check_saelens(_chat: Any) -> dict[str, float]:
    """Dictionaries that mmllm saved, as SAELens encodes and decodes with them."""
    from sae_lens import SAE, Transcoder  # pyright: ignore[reportMissingImports]

    found = {}
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(200, 24, generator=generator) * 3
    for name, k, output_site in (
        ("jumprelu", None, "layers.3"),
        ("topk", 5, "layers.3"),
        ("jumprelu_transcoder", None, "layers.4"),
    ):
        origin = Origin("0123abcd", "layers.3", output_site, "mini")
        made = SparseAutoencoder(24, 60, origin, k=k)
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        made.threshold.abs_()
        with tempfile.TemporaryDirectory() as folder:
            save_dictionary(made, Path(folder) / name)
            kind = Transcoder if origin.is_transcoder else SAE
            other = kind.load_from_disk(Path(folder) / name)
        with torch.no_grad():
            features = other.encode(states)
            found[f"{name}, encode"] = _difference(features, made.encode(states))
            found[f"{name}, decode"] = _difference(other.decode(features), made(states))
    return found


CHECKS: dict[str, Callable[[Any], dict[str, float]]] = {
    "captum": check_captum,
    "nnsight": check_nnsight,
    "saelens": check_saelens,
}
_MAX_DIFFERENCE = 1e-3
"""Relative; SAELens' formulas are the same to 1e-5."""
_MAX_OF = {"saelens": 1e-5}


def main(arguments: list[str]) -> int:
    """Run the checks that are named, print what they found, and return how many differ.

    Args:
        arguments: a model, and names of CHECKS; none: all.
    """
    source, *names = arguments or ["mini"]
    chat, num_wrong = mmllm.load(source, dtype="float32"), 0
    for name in names or CHECKS:
        for what, difference in CHECKS[name](chat).items():
            is_right = difference <= _MAX_OF.get(name, _MAX_DIFFERENCE)
            num_wrong += not is_right
            console.echo(f"{name}: {what}: {difference:.1e}{'' if is_right else '  DIFFERS'}")
    return num_wrong


@torch.no_grad()
def _embedded(chat: Any) -> Tensor:
    llm = chat.model.llm
    ids = torch.tensor(llm.tokenizer(_TEXT)["input_ids"])[None]
    return llm.embed(ids)


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    one, other = one.detach().float(), other.detach().float().view(one.shape)
    return ((one - other).abs().max() / other.abs().max().clamp(min=1e-9)).item()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What a model makes when a feature is added to the states of its signal tokens.

The request and the reply are given, and only the states of the signal span are changed: nothing but
the feature can make a difference.

Legend: B additions, K signal tokens of a medium, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmllm.conversation import MEDIA, Medium, assistant, user
from mmllm.data.batch import collate
from mmllm.insight.hooks import edit
from mmllm.insight.positions import Positions
from mmllm.model import AnyToAny

REQUESTS = {
    "image": ("Draw something.", "Here is a picture."),
    "audio": ("Play something.", "Here is a sound."),
    "video": ("Animate something.", "Here is an animation."),
}
"""Modality -> what is asked for and the words before the medium. They name nothing."""


@torch.inference_mode()
def made_under(
    model: AnyToAny, site: str, additions: Tensor, modality: str, *, seed: int = 0
) -> list[Medium]:
    """Make one medium for each vector that is added to the states of the signal span.

    Args:
        model: the model.
        site: name of the site whose states are changed.
        additions: float[B, D]; a row of zeros changes nothing.
        modality: of the media.
        seed: of the decoder's noise, the same for all.
    """
    key = model.renderer.output_keys[modality]
    request, words = REQUESTS[modality]
    conversation = [user(request), assistant(words, MEDIA[modality](caption="something"))]
    items = [model.renderer.render(conversation)] * len(additions)
    batch = collate(items, None, model.batch_layout, share=False, targets=False)
    batch = batch.to(model.device)
    where = batch.outputs[key].token_indices  # [B, K]

    def add(states: Tensor, positions: Positions) -> Tensor:
        signals = positions.select("signal")
        changed = states.clone()
        changed[signals] += additions[positions.conversation[signals]].to(states)
        return changed

    with edit(model, site, add):
        signals = model.hidden(batch).flatten(0, 1)[where]
    condition = model.condition({key: signals})[key]
    generators = [torch.Generator().manual_seed(seed) for _ in range(len(additions))]
    return list(model.decoders[key].sample(condition, generators=generators))


def modalities_made(model: AnyToAny) -> Sequence[str]:
    """The modalities that can be asked for by REQUESTS."""
    return [modality for modality in REQUESTS if modality in model.renderer.output_keys]

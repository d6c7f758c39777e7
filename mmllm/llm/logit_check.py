"""A check, at load, that mmllm computes a family's logits as the family itself does.

Losses are computed from hidden states and the head's weight without running the model's own forward
(mmllm.kernels.linear_cross_entropy), so what a family does to its logits has to be known: a factor,
a soft cap. A family that does something else is refused here, and not trained wrongly.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.errors import ConfigError
from mmllm.kernels.linear_cross_entropy import LogitTransform

_MORE_OUTPUTS = ("router_logits", "shared_kv_states")
"""What decoders of some families return besides, for the model around them to pass on."""
_NUM_CHECKED = 64
"""Text tokens whose logits are compared. A family transforms all logits alike, and the rest of the
head need not be read from the disk."""


class _FixedStates(nn.Module):
    """Takes the place of a decoder: its last hidden states are always `states` float[B, T, D]. It
    has its embedding, for which some families ask it."""

    def __init__(self, states: Tensor, embedding: nn.Module):
        super().__init__()
        self.states = states
        self._embedding = (embedding,)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of the decoder."""
        return self._embedding[0]

    def forward(self, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        output = BaseModelOutputWithPast(last_hidden_state=self.states)  # pyright: ignore
        for name in _MORE_OUTPUTS:
            setattr(output, name, None)
        return output


@torch.no_grad()
def check_logit_transform(model: Any, transform: LogitTransform) -> None:
    """Compare a transformers model's logits of one hidden state with `transform` of its head's.

    Args:
        model: A causal LM of transformers, without adapters. It is not changed.
        transform: What mmllm computes of the head's output.

    Raises:
        ConfigError: The logits differ.
    """
    head = model.get_output_embeddings()
    if head.weight.is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 1, head.weight.shape[1], generator=generator)
    hidden = hidden.to(head.weight.device, model.get_input_embeddings().weight.dtype)
    small = _first_rows(head)
    fixed = _FixedStates(hidden, model.get_input_embeddings())
    probe = _with_submodule(model, model.get_decoder(), fixed)
    probe = _with_submodule(probe, head, small)
    expected = probe(inputs_embeds=hidden, use_cache=False).logits
    computed = transform(small(hidden))
    if not torch.allclose(computed.float(), expected.float(), rtol=0.05, atol=0.05):
        raise ConfigError(
            f"llm.weights: the family {model.config.model_type!r} treats its logits in a way that "
            "mmllm does not know (LogitTransform): it cannot be used yet"
        )


def _first_rows(head: nn.Module) -> nn.Module:
    """A plain linear head of the first tokens alone; any other head as it is."""
    if type(head) is not nn.Linear or head.bias is not None or hasattr(head, "_hf_hook"):
        return head
    small = nn.Linear(head.in_features, _NUM_CHECKED, bias=False, device="meta")
    small.weight = nn.Parameter(head.weight.data[:_NUM_CHECKED], requires_grad=False)
    return small


def _with_submodule(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """A shallow copy of `root` in which `new` takes the place of its part `old`. Weights are
    shared, and `root` stays as it is."""
    path = next(name for name, part in root.named_modules() if part is old)
    return _replaced(root, path.split("."), new)


def _replaced(module: nn.Module, path: list[str], new: nn.Module) -> nn.Module:
    if not path:
        return new
    name, *rest = path
    twin = copy.copy(module)
    twin.__dict__.pop("forward", None)  # accelerate's, which would run the original
    twin._modules = dict(module._modules)
    part = module._modules[name]
    assert part is not None
    twin._modules[name] = _replaced(part, rest, new)
    return twin

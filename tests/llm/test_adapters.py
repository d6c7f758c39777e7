"""Options of LoRA, and its adapters on disk."""

from __future__ import annotations

import pytest
import torch

from mmllm.errors import ConfigError
from tests.llm.helpers import adapted, ids_of, logits_of, with_outputs


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}])
def test_options_reach_peft_and_its_adapters_are_saved_whole(options, folders, tmp_path):
    lora = {"rank": 2, "targets": ["q_proj", "v_proj"], "options": options}
    first, second = (with_outputs(folders("qwen3"), lora=lora) for _ in range(2))
    adapted(first)
    (option,) = options
    assert getattr(first.model.peft_config["default"], option) is True
    first.save_lora(tmp_path)
    second.load_lora(tmp_path)
    ids = ids_of(folders("qwen3"))
    assert torch.equal(logits_of(first, ids), logits_of(second, ids))
    assert not torch.allclose(logits_of(first, ids), logits_of(with_outputs(folders("qwen3")), ids))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"options": {"use_rslra": True}}, "no 'use_rslra'; did you mean 'use_rslora'"),
        ({"options": {"r": 4}}, "'r' has a key of its own"),
        ({"options": {"modules_to_save": ["lm_head"]}}, "would train what no checkpoint"),
        ({"targets": ["q_prj"]}, "peft refuses it: .*q_prj"),
    ],
)
def test_options_that_peft_does_not_have_or_mmllm_keeps_are_refused(lora, message, folders):
    with pytest.raises(ConfigError, match=message):
        with_outputs(folders("qwen3"), lora=lora).attach_lora()


def test_experts_stay_frozen_and_a_target_that_is_one_is_refused(folders):
    """Of a mixture of experts "all-linear" is attention and dense layers: its second layer here."""
    llm = with_outputs(folders("qwen3_moe"))
    llm.attach_lora()
    found = [name.partition(".lora_")[0] for name, _ in llm.lora_parameters()]
    attention = [f"self_attn.{part}_proj" for part in "qkvo"]
    dense = [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    wanted = {f"0.{name}" for name in attention} | {f"1.{name}" for name in attention + dense}
    assert {name.rpartition("layers.")[2] for name in found} == wanted
    for targets in (["q_proj", "experts"], ["q_proj", "gate_up_proj"]):
        with pytest.raises(ConfigError, match=r"'\w+' is no linear layer of this mixture"):
            with_outputs(folders("qwen3_moe"), lora={"rank": 2, "targets": targets}).attach_lora()

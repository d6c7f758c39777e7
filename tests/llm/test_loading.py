"""Language models that are quantised, spread over devices, from GGUF, or incomplete."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmllm import checkpoints, config
from mmllm import model as models
from mmllm.errors import CheckpointError, ConfigError
from mmllm.llm import loading
from mmllm.llm.export import merge_lora, save_transformers
from mmllm.llm.loading import CausalLMConfig
from tests import parts
from tests.llm.families import write
from tests.llm.helpers import adapted, ids_of, logits_of, plain, with_outputs


@pytest.mark.parametrize(("bits", "near"), [("4bit", 0.25), ("8bit", 0.05)])
def test_quantised_weights_stay_near_and_lora_learns_on_them(bits, near, tmp_path):
    wide = {"hidden_size": 128, "intermediate_size": 128}  # CPU kernels want blocks of 64
    folder = write("llama3", tmp_path / "llm", tied=False, **wide, initializer_range=0.05)
    whole, small = with_outputs(folder), with_outputs(folder, quantization=bits)
    kinds = {type(m).__name__ for m in small.model.modules()}
    assert ("Linear4bit" if bits == "4bit" else "Linear8bitLt") in kinds
    assert type(small.model.get_output_embeddings()) is torch.nn.Linear
    ids = ids_of(folder)
    wanted, found = logits_of(whole, ids), logits_of(small, ids)
    assert 0 < (found - wanted).norm() / wanted.norm() < near

    small.attach_lora()
    trained = [parameter.requires_grad_(True) for _, parameter in small.lora_parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        embeds = small.embed(ids)
        token_nll = small.token_nll(small(embeds)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        losses.append(token_nll.mean().item())
        optimizer.zero_grad()
        token_nll.mean().backward()
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]
    with pytest.raises(ConfigError, match=r"load with llm\.quantization null"):
        merge_lora(small)


def test_what_was_trained_on_four_bits_is_merged_into_whole_weights(system_tree, tmp_path):
    tree = {**system_tree, "llm": {**system_tree["llm"], "quantization": "4bit"}}
    model = models.build(config.parse_system(tree))
    adapted(model.llm)
    checkpoints.save(tmp_path / "trained", model, step=1)
    source = checkpoints.open_checkpoint(tmp_path / "trained")
    checkpoints.merge(source, tmp_path / "merged", dtype=torch.float32)
    merged = checkpoints.open_checkpoint(tmp_path / "merged")
    assert merged.system().llm.quantization == "4bit"  # loaded as it was trained
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "llm").state_dict()
    whole = AutoModelForCausalLM.from_pretrained(system_tree["llm"]["weights"]).state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    update = model.llm.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    torch.testing.assert_close(saved[name], whole[name] + update.get_delta_weight("default"))


def test_quantisation_without_bitsandbytes_says_what_to_install(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"pip install 'mmllm\[quantization\]'"):
        with_outputs(folders("llama3"), quantization="4bit")


def test_dtype_and_device_map_are_those_of_the_config(folders, tmp_path):
    llm = with_outputs(folders("llama3"), dtype="bfloat16", device_map={"": "cpu"})
    assert llm.embedding.weight.dtype is torch.bfloat16
    assert llm.signal_embeddings.dtype is torch.float32
    with pytest.raises(ConfigError, match=r"llm\.dtype"):
        with_outputs(folders("llama3"), dtype="int8")


def test_a_model_with_a_device_map_is_not_moved(folders, tmp_path, monkeypatch):
    """Its last layer on disk, which accelerate's hooks fetch when it is needed."""
    monkeypatch.chdir(tmp_path)
    place = {"model.layers.1": "disk", "model.layers.0": "cpu", "model.norm": "cpu"}
    place |= {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    folder = folders("llama3", False)
    spread, whole = with_outputs(folder, device_map=place), with_outputs(folder)
    ids = ids_of(folder)
    torch.testing.assert_close(logits_of(spread, ids), logits_of(whole, ids))
    spread.to("meta")  # stands for another device: only what is ours moves
    assert spread.signal_embeddings.is_meta
    assert not spread.embedding.weight.is_meta


# --- GGUF ----------------------------------------------------------------------------------------


def write_gguf(folder: Path, source: Path) -> Path:
    """A tiny Llama with its tokenizer in one .gguf file, as llama.cpp writes it: projections of
    queries and keys with the two halves of each head interleaved."""
    import gguf

    model, tokenizer = plain(source), AutoTokenizer.from_pretrained(source)
    c = model.config
    folder.mkdir()
    out = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    out.add_context_length(c.max_position_embeddings)
    out.add_embedding_length(c.hidden_size)
    out.add_block_count(c.num_hidden_layers)
    out.add_feed_forward_length(c.intermediate_size)
    out.add_head_count(c.num_attention_heads)
    out.add_head_count_kv(c.num_key_value_heads)
    out.add_layer_norm_rms_eps(c.rms_norm_eps)
    out.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(c.vocab_size)
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_tokens)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("default")
    out.add_token_list(names)
    out.add_token_types([3 if name in special else 1 for name in names])
    out.add_token_merges([" ".join(pair) for pair in raw["model"]["merges"]])
    out.add_bos_token_id(tokenizer.bos_token_id)
    out.add_eos_token_id(tokenizer.eos_token_id)
    out.add_pad_token_id(tokenizer.pad_token_id)
    out.add_chat_template(tokenizer.chat_template)
    places = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    heads = {"q": c.num_attention_heads, "k": c.num_key_value_heads}
    for name, value in model.state_dict().items():
        name = name.removesuffix(".weight").removeprefix("model.")
        outer = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}.get(name)
        if outer is None:
            _, layer, place = name.split(".", 2)
            outer = f"blk.{layer}.{places[place]}"
            if place in ("self_attn.q_proj", "self_attn.k_proj"):
                count = heads[place.split(".")[1][0]]
                value = value.view(count, 2, -1, c.hidden_size).transpose(1, 2).flatten(0, 2)
        out.add_tensor(f"{outer}.weight", value.contiguous().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return folder / "tiny.gguf"


def test_a_gguf_file_is_the_model_that_was_written(tmp_path: Path) -> None:
    source = parts.write_llm(tmp_path / "llm", tied=False)
    file = write_gguf(tmp_path / "gguf", source)
    packed, whole = with_outputs(file), with_outputs(source)
    ids = torch.tensor([[5, 60, 70, 8, 300, 11]])
    torch.testing.assert_close(logits_of(packed, ids), logits_of(whole, ids), atol=1e-4, rtol=1e-4)
    assert packed.tokenizer.chat_template == parts.TEMPLATE
    text = "What is a red apple?"
    assert packed.tokenizer(text)["input_ids"] == whole.tokenizer(text)["input_ids"]
    adapted(packed)
    merge_lora(packed)
    save_transformers(packed, tmp_path / "plain")
    torch.testing.assert_close(
        plain(tmp_path / "plain")(ids).logits, logits_of(packed, ids)[..., :-2]
    )
    with pytest.raises(ConfigError, match="whose weights are quantised already"):
        with_outputs(file, quantization="4bit")
    (tmp_path / "gguf" / "broken.gguf").write_bytes(b"GGUF\x03")
    with pytest.raises(CheckpointError, match=r"broken\.gguf' cannot be loaded"):
        with_outputs(tmp_path / "gguf" / "broken.gguf")


def test_a_folder_without_safetensors_is_refused_with_a_remedy(tmp_path):
    whole = parts.write_llm(tmp_path / "whole")
    pickled = Path(shutil.copytree(whole, tmp_path / "pickled"))
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin, a pickle") as caught:
        loading.build(CausalLMConfig(weights=str(pickled)))
    python, option, program = shlex.split(str(caught.value).splitlines()[1])
    assert (python, option) == ("python", "-c")
    exec(program, {})
    converted, own = (loading.build(CausalLMConfig(weights=str(each))) for each in (pickled, whole))
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(converted.forward(converted.embed(ids)), own.forward(own.embed(ids)))

    (whole / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no \*\.safetensors; is the copy whole"):
        loading.build(CausalLMConfig(weights=str(whole)))
    with pytest.raises(CheckpointError, match=r"expected a folder or a \.gguf file"):
        loading.build(CausalLMConfig(weights=str(whole / "config.json")))
    (whole / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json \(.*tokenizer.*\); is it the"):
        loading.build(CausalLMConfig(weights=str(whole)))

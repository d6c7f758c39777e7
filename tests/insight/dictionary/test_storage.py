"""The files of dictionaries: SAELens' names and formulas, whole or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmllm.errors import CheckpointError, ConfigError
from mmllm.insight.dictionary.autoencoder import Origin, SparseAutoencoder
from mmllm.insight.dictionary.storage import load_dictionary, save_dictionary

ORIGIN = Origin("0123abcd", "layers.3", "layers.3", "mini")
STATES = torch.randn(20, 6, generator=torch.Generator().manual_seed(2)) * 3


def dictionary(origin: Origin = ORIGIN, k: int | None = None, d_out: int = 6) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(0)
    made = SparseAutoencoder(6, 15, origin, d_out=d_out, k=k)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    made.threshold.abs_()
    return made


def by_saelens(folder: Path, states: torch.Tensor) -> torch.Tensor:
    """The formulas of SAELens 6 (topk_sae.py, jumprelu_sae.py, transcoder.py)."""
    config = json.loads((folder / "cfg.json").read_text())
    w = load_file(folder / "sae_weights.safetensors")
    inputs = (
        states - w["b_dec"] * config["apply_b_dec_to_input"] if "d_out" not in config else states
    )
    pre = inputs @ w["W_enc"] + w["b_enc"]
    if config["architecture"] == "topk":
        kept = pre >= pre.sort(dim=-1, descending=True).values[:, config["k"] - 1 : config["k"]]
    else:
        kept = pre > w["threshold"]
    return (pre.relu() * kept) @ w["W_dec"] + w["b_dec"]


@pytest.mark.parametrize(
    "made",
    [dictionary(), dictionary(k=3), dictionary(Origin("m", "layers.3.mlp", "layers.4"), d_out=4)],
    ids=["jumprelu", "topk", "transcoder"],
)
def test_what_is_written_is_read_and_means_the_same_to_saelens(made, tmp_path: Path) -> None:
    folder = save_dictionary(made, tmp_path / "dictionary", {"steps": 3})
    read = load_dictionary(folder)
    assert (read.origin, read.k) == (made.origin, made.k)
    assert torch.equal(read(STATES), made(STATES))
    assert torch.allclose(by_saelens(folder, STATES), made(STATES), atol=1e-5)
    config = json.loads((folder / "cfg.json").read_text())
    assert config["metadata"]["mmllm"] == {"steps": 3}
    assert (config["d_in"], config["d_sae"]) == (6, 15)


def test_a_relu_dictionary_of_saelens_is_read(tmp_path: Path) -> None:
    made = dictionary()
    made.threshold.zero_()
    folder = save_dictionary(made, tmp_path / "x")
    config = json.loads((folder / "cfg.json").read_text()) | {"architecture": "standard"}
    (folder / "cfg.json").write_text(json.dumps(config))
    weights = load_file(folder / "sae_weights.safetensors")
    del weights["threshold"]
    save_file(weights, folder / "sae_weights.safetensors")
    assert torch.equal(load_dictionary(folder)(STATES), made(STATES))


def test_another_model_or_site_is_refused_with_both() -> None:
    made = dictionary()
    made.check_origin("0123abcd", "layers.3")
    with pytest.raises(
        CheckpointError, match=r"the model 0123abcd \(mini\), but this model is ffff"
    ):
        made.check_origin("ffff", "layers.3")
    with pytest.raises(
        CheckpointError, match=r"trained on layers\.3, but these states are of layers\.4"
    ):
        made.check_origin("0123abcd", "layers.4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "gated"}, "expected one of topk, jumprelu.*got 'gated'"),
        ({"normalize_activations": "layer_norm"}, "expected 'none', got 'layer_norm'; fold"),
    ],
)
def test_a_format_that_is_not_read_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    folder = save_dictionary(dictionary(), tmp_path / "x")
    config = json.loads((folder / "cfg.json").read_text()) | change
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_dictionary(folder)


def test_damaged_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no dictionary there.*mmllm insight features"):
        load_dictionary(tmp_path)
    folder = save_dictionary(dictionary(), tmp_path / "x")
    weights = load_file(folder / "sae_weights.safetensors")
    save_file(weights | {"b_enc": torch.zeros(3)}, folder / "sae_weights.safetensors")
    with pytest.raises(CheckpointError, match=r"'b_enc': expected \[15\], got \[3\]"):
        load_dictionary(folder)
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is the copy of the dictionary whole"):
        load_dictionary(folder)


def test_a_feature_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="feature 15: this dictionary has the features 0 to 14"):
        dictionary().direction(15)

"""`mmllm swap`: a new decoder behind a trained system, fitted to states that were kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmllm import checkpoints
from mmllm.cli import FAILED, main
from mmllm.conversation import user
from mmllm.decoders.detection import decoder_config
from mmllm.errors import AssetError, ConfigError
from mmllm.inference.chat import Chat
from mmllm.training.swapping import SwapOptions, swap_decoders
from mmllm.training.trainer import train
from tests.decoders import tiny
from tests.training.runs import weights


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of another class, with conditions of other shapes."""
    folder = tmp_path_factory.mktemp("other") / "sd"
    return tiny.save("stable_diffusion", folder)


def test_a_decoder_of_another_class_is_fitted_and_the_rest_stays(
    make_run, tmp_path: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(make_run(steps=2), progress=False)
    run, out = tmp_path / "run", tmp_path / "swapped"
    assert main(["swap", str(run), f"image={other}", "--out", str(out), "--steps", "60"]) == 0
    printed = capsys.readouterr().out
    assert "decoders.image: pixart" in printed
    assert "-> stable_diffusion" in printed
    assert "of what a caption takes off" in printed
    before, after = weights(run), weights(out)
    for name, value in after.items():
        if not name.startswith("output_projections/image"):
            assert value.equal(before[name]), name
    model = checkpoints.load_model(checkpoints.open_checkpoint(out))
    assert type(model.decoders["image"]).__name__ == "StableDiffusionDecoder"
    reply = Chat(model).reply([user("draw")], seed=0, modalities={"image": "force"})
    assert reply.image.to_numpy().std() > 0


def test_the_report_is_measured_on_captions_that_were_not_fitted(
    make_run, tmp_path: Path, other: Path
) -> None:
    train(make_run(steps=2), progress=False)
    source = checkpoints.open_checkpoint(tmp_path / "run")
    config = decoder_config(str(other), "image")
    options = SwapOptions(steps=150, denoise_steps=5, learning_rate=3e-3)
    (swap,) = swap_decoders(
        source, {"image": config}, tmp_path / "swapped", options=options, progress=False
    )
    assert swap.num_held_out == 1
    assert swap.num_media == 6  # three captions in two phrasings
    assert swap.fitted.explained > swap.unfitted.explained
    assert swap.fitted.own == swap.unfitted.own
    assert swap.fitted.projected != swap.unfitted.projected
    share = swap.fitted.share
    assert share is not None
    assert share == pytest.approx(
        (swap.fitted.empty - swap.fitted.projected) / (swap.fitted.empty - swap.fitted.own),
        rel=1e-3,
    )


def test_the_same_decoder_begins_as_it_was(make_run, tmp_path: Path) -> None:
    """Tensors whose shapes fit are kept, so that a decoder's fine-tuned twin needs few steps."""
    train(make_run(steps=2), progress=False)
    source = checkpoints.open_checkpoint(tmp_path / "run")
    config = source.system().decoders["image"]
    (swap,) = swap_decoders(
        source, {"image": config}, tmp_path / "same", options=SwapOptions(steps=1), progress=False
    )
    assert swap.unfitted.explained == pytest.approx(swap.former.explained, abs=1e-6)
    options = SwapOptions(steps=1, keep=False)
    (swap,) = swap_decoders(
        source, {"image": config}, tmp_path / "fresh", options=options, progress=False
    )
    assert abs(swap.unfitted.explained - swap.former.explained) > 1e-3


def test_what_cannot_be_swapped_is_refused(
    make_run, tmp_path: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(make_run(steps=1), progress=False)
    run = str(tmp_path / "run")

    def message(*arguments: str) -> str:
        assert main(["swap", run, *arguments, "--out", str(tmp_path / "out")]) == FAILED
        return " ".join(capsys.readouterr().err.split())

    assert "no decoder 'picture' to swap; it has audio, image, video" in message(f"picture={other}")
    assert "audio, the new one image" in message(f"audio={other}").replace("makes ", "")
    assert "expected KEY=DECODER" in message("image")
    assert "unknown type 'sanna'" in message("image={type: sanna, weights: x/y}")
    with pytest.raises(AssetError, match=r"no folder with a model_index\.json"):
        decoder_config(str(tmp_path), "image")
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoPipeline"}')
    with pytest.raises(ConfigError, match="is a NoPipeline, which no decoder type supports"):
        decoder_config(str(tmp_path), "image")


def test_every_supported_pipeline_is_found_by_its_class(tmp_path: Path) -> None:
    for name in ("SanaPipeline", "Flux2KleinPipeline", "WanPipeline", "StableAudioPipeline"):
        (tmp_path / "model_index.json").write_text(f'{{"_class_name": "{name}"}}')
        config = decoder_config(str(tmp_path), "x")
        assert type(config).__name__.lower().removesuffix("config") in name.lower()


def test_replacing_needs_no_random_state(make_model, other: Path) -> None:
    from mmllm.training.swapping import replace_decoder

    state = torch.get_rng_state()
    model = make_model()
    replace_decoder(model, "image", decoder_config(str(other), "image"))
    assert torch.get_rng_state().equal(state)

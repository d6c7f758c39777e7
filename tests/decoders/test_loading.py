"""Loading pipelines: offload, pickled weights."""

from __future__ import annotations

import shlex
import shutil

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmllm.decoders.contract import Cancelled
from mmllm.errors import AssetError, ConfigError
from tests.decoders import tiny
from tests.decoders.comparing import arrays, seeded, training_inputs


@pytest.mark.parametrize("how", ["model", "sequential"])
def test_offload_is_diffusers_own(make, monkeypatch, how):
    asked = []

    def enable(_pipeline, *, device: torch.device) -> None:
        asked.append(str(device))

    kind = diffusers.StableDiffusionPipeline
    monkeypatch.setattr(kind, f"enable_{how}_cpu_offload", enable)
    monkeypatch.setattr(kind, "maybe_free_model_hooks", lambda _pipeline: asked.append("freed"))
    decoder = make("stable_diffusion", offload=how).to("cuda:0")
    assert decoder.pipeline.device.type == "cpu"  # where offloaded weights wait
    assert asked == ["cuda:0"]
    decoder.runtime.device = torch.device("cpu")  # to compute here
    condition = decoder.encode_captions(["a dog"])
    assert asked[1:] == ["freed"] * (how == "model")
    decoder.encode_media(decoder.preprocess(tiny.medium("image"))[None])
    assert asked[1:] == ["freed", "freed"] * (how == "model")

    def stop(step: int, steps: int) -> None:
        raise Cancelled

    del asked[:]
    with pytest.raises(Cancelled):
        decoder.sample(condition, generators=seeded(0), on_step=stop, options={"guidance": 1.0})
    assert asked == ["freed"] * (how == "model")
    latents, noising = training_inputs(make("stable_diffusion"), 1)
    with pytest.raises(ConfigError, match="takes weights away that the gradient needs"):
        decoder.denoising_loss(condition, latents, **noising)


def test_offload_needs_an_accelerator(make):
    with pytest.raises(ConfigError, match="offload 'model' keeps weights off an accelerator"):
        _ = make("sdxl", offload="model").pipeline
    with pytest.raises(ConfigError, match="this decoder is to run on the CPU"):
        make("sdxl", offload="sequential").to("cpu")


def test_the_command_converts_a_pickled_pipeline(make, folders, tmp_path):
    folder = shutil.copytree(folders["stable_diffusion"], tmp_path / "pickled")
    for file in list(folder.rglob("*.safetensors")):
        name = "pytorch_model" if file.stem == "model" else "diffusion_pytorch_model"
        torch.save(load_file(file), file.with_name(f"{name}.bin"))
        file.unlink()
    with pytest.raises(AssetError, match="holds pickled weights only") as caught:
        make("stable_diffusion", weights=str(folder))
    python, option, program = shlex.split(str(caught.value).splitlines()[1])
    assert (python, option) == ("python", "-c")
    exec(program, {})
    converted, original = make("stable_diffusion", weights=str(folder)), make("stable_diffusion")
    condition = original.encode_captions(["a dog"])
    assert torch.equal(
        converted.encode_captions(["a dog"])["prompt_embeds"], condition["prompt_embeds"]
    )
    media = [each.sample(condition, generators=seeded(0)) for each in (converted, original)]
    assert np.array_equal(arrays(media[0]), arrays(media[1]))

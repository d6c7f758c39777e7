"""A system whose language model is its decoder's text encoder: it draws before any training what
the pipeline draws, and training only adds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from mmllm import checkpoints, config, losses, model, planning
from mmllm.config import RunConfig
from mmllm.conversation import assistant, user
from mmllm.errors import ConfigError
from mmllm.inference.chat import Chat
from mmllm.model import AnyToAny
from mmllm.projections.residual import ResidualConfig, build
from mmllm.training import connectors, journal, report, trainer
from mmllm.training.swapping import SwapOptions, swap_decoders
from mmllm.training.trainable import choose_trainable
from mmllm.utils import files
from tests import parts
from tests.batches import batch_of
from tests.decoders import tiny
from tests.decoders.comparing import close, seeded
from tests.samples import picture
from tests.training.runs import weights

TOKENS = 64
RESIDUAL = {
    **{"type": "residual", "signal_tokens": 4, "width": 16, "heads": 2, "layers": 1},
    **{"feed_forward": 32, "words": 3},
}
TALKS = [
    [user("draw"), assistant("here is a red apple", picture(90, caption="a red apple"))],
    [user("draw two"), assistant("a dog", picture(80, caption="a blue dog that runs"))],
    [user("hello"), assistant("one two three")],
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A system of a tiny Qwen3 and of a Z-Image pipeline that reads the states of the same one."""
    folder = tmp_path_factory.mktemp("backbone")
    llm, pipeline = folder / "llm", folder / "pipeline"
    parts.write_llm(llm)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llm)
    qwen = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=tiny.WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    language_model = transformers.Qwen3ForCausalLM(qwen)
    language_model.save_pretrained(llm)
    whole = tiny.z_image_pipeline()
    whole.text_encoder, whole.tokenizer = language_model.model, tokenizer
    whole.save_pretrained(pipeline)
    decoder = {"type": "z_image", "weights": str(pipeline), "steps": 2, **tiny.SQUARE}
    return {
        "name": "backbone",
        "llm": {
            "weights": str(llm),
            "lora": {"rank": 2, "alpha": 4, "targets": "all-linear"},
            "max_length": 256,
        },
        "decoders": {
            "image": {**decoder, "text_encoder": "llm", "max_caption_tokens": TOKENS},
        },
        "output_projections": {"image": RESIDUAL},
    }


@pytest.fixture
def make(tree: dict) -> Callable[..., AnyToAny]:
    """`make(caption="request")`: the system, with options of its output projection; its adapters
    say something already."""

    def make(**options: Any) -> AnyToAny:
        system = {**tree, "output_projections": {"image": {**RESIDUAL, **options}}}
        built = model.build(config.parse_system(system)).eval()
        built.llm.attach_lora()
        with torch.no_grad():
            for _, matrix in built.llm.lora_parameters():
                matrix.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        return built

    return make


@pytest.fixture
def make_run(
    tree: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., RunConfig]:
    """A stage that trains everything by the denoising loss, on four pictures. Curves are not drawn,
    which would take longer than all else."""
    monkeypatch.setattr(report, "panels", lambda _: {})
    monkeypatch.setattr(journal, "plot_curves", lambda file, _: files.atomic_write(file, b""))
    rows = []
    for number in range(4):
        picture(40 * number).save(tmp_path / f"{number}.png")
        caption = f"a red apple {number}"
        rows.append({"file": f"{number}.png", "modality": "image", "caption": caption})
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    data = {
        "type": "pairs",
        "file": str(tmp_path / "pairs.json"),
        "modality": "image",
        "direction": "generate",
        "prompts": ["draw"],
    }

    def make(output: str = "run", **changes: Any) -> RunConfig:
        stage = {
            "name": "test",
            "output": str(tmp_path / output),
            "learning_rates": {"output_projections.*": 1e-2, "llm.*": 1e-2},
            "losses": {"text": 1.0, "denoise": 1.0},
            "data": {"pictures": data},
            "steps": 4,
            "batch_size": 2,
            "precision": "no",
            "save_steps": 2,
            **changes,
        }
        return config.parse_run({"system": tree, "stage": stage})

    return make


def drawn_by_diffusers(system: AnyToAny, prompt: str, seed: int) -> np.ndarray:
    """What the pipeline itself draws, whole, in a process of its own as it were."""
    decoder = system.decoders["image"]
    return tiny.load(decoder.folder)(
        prompt=prompt,
        max_sequence_length=TOKENS,
        num_inference_steps=decoder.config.steps,
        guidance_scale=decoder.config.guidance,
        generator=seeded(seed),
        output_type="np",
        **tiny.SQUARE,
    ).images


@torch.no_grad()
def embedded_by_diffusers(system: AnyToAny, caption: str) -> torch.Tensor:
    """The pipeline's own prompt embeddings: float[tokens, width]."""
    pipeline = tiny.load(system.decoders["image"].folder)
    return pipeline.encode_prompt(caption, None, False, max_sequence_length=TOKENS)[0][0]


@pytest.mark.parametrize("caption", ["request", "reply"])
def test_an_untrained_system_draws_what_the_pipeline_draws(make, caption: str) -> None:
    system = make(caption=caption)
    reply = Chat(system).reply(
        [user("a red apple")], seed=3, modalities={"image": "force"}, max_new_tokens=6
    )
    prompt = "a red apple" if caption == "request" else reply.text.strip()
    assert prompt
    seed = 3 * 65_537 + len(reply.ids)  # of a medium at this place of a reply with this seed
    close(reply.images, drawn_by_diffusers(system, prompt, seed))
    assert np.ptp(reply.image.to_numpy()) > 5


@pytest.mark.parametrize("pack", [False, True])
@torch.no_grad()
def test_conditions_begin_as_the_pipelines_prompt_embeddings(make, pack: bool) -> None:
    """In a training batch too, with adapters that are active and signal tokens in the sequence."""
    system = make()
    batch = batch_of(system, TALKS, pack=pack)
    conditions = system(batch).conditions["image"]
    for row, caption in enumerate(("a red apple", "a blue dog that runs")):
        expected = embedded_by_diffusers(system, caption)
        length = len(expected)
        mask = conditions["prompt_mask"][row]
        assert mask.tolist() == [1.0] * length + [0.0] * (TOKENS - length)
        embeds = conditions["prompt_embeds"][row, :length]
        torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-4)
    assert (
        len(system(batch_of(system, TALKS[2:], pack=pack)).conditions["image"]["prompt_mask"]) == 0
    )


def test_what_is_read_is_standardised_and_the_beginning_stays_exact(make) -> None:
    system = make()
    choose_trainable(system, {"output_projections.*": 1e-3})
    batch = batch_of(system, TALKS)
    before = system(batch).conditions["image"]["prompt_embeds"]
    connectors.prepare_connectors(system, [batch] * 2, torch.no_grad)
    projection: Any = system.output_projection("image")
    assert not projection.is_new
    assert projection.spread["prompt_embeds"].std() > 0
    assert torch.equal(system(batch).conditions["image"]["prompt_embeds"], before)


def test_it_learns_from_the_first_step_and_only_adds(make) -> None:
    system = make()
    choose_trainable(system, {"output_projections.*": 1e-2, "llm.signal_embeddings": 1e-2})
    batch, weighted = batch_of(system, TALKS), losses.build_losses(system, {"denoise": 1.0})
    captions = batch.outputs["image"].targets["prompt_embeds"]
    names = [name for name, p in system.named_parameters() if p.requires_grad]
    values = [p for p in system.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(values, lr=1e-2)
    found = []
    for _ in range(12):
        output = system(batch)
        (term,) = losses.compute(weighted, output, batch).values()
        optimizer.zero_grad()
        term.total.backward()
        moved = {name for name, p in zip(names, values, strict=True) if p.grad.any()}
        found.append((term.total.item(), moved))
        optimizer.step()
    assert found[0][1] == {
        "output_projections.image.heads.prompt_embeds.weight",
        "output_projections.image.heads.prompt_embeds.bias",
    }  # all that comes before is multiplied by zero
    assert "llm.signal_embeddings" in found[1][1]
    assert found[-1][0] < found[0][0]
    added = system(batch).conditions["image"]["prompt_embeds"] - captions
    assert added.abs().max() > 1e-3


def test_training_changes_no_caption_and_resumes_exactly(
    make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer.train(make_run("whole"), progress=False)
    step, taken = trainer.training_step, []

    def killed(*arguments: Any, **options: Any) -> Any:
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(1)
        return step(*arguments, **options)

    monkeypatch.setattr(trainer, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(make_run("parts"), progress=False)
    monkeypatch.setattr(trainer, "training_step", step)
    trainer.train(make_run("parts"), resume=True, progress=False)
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == resumed.keys()
    assert all(value.equal(resumed[name]) for name, value in whole.items())

    source = checkpoints.open_checkpoint(tmp_path / "whole")
    loaded = checkpoints.load_model(source)
    assert any(matrix.any() for name, matrix in loaded.llm.lora_parameters() if "lora_B" in name)
    caption = loaded.decoders["image"].encode_captions(["a red apple 2"])
    expected = embedded_by_diffusers(loaded, "a red apple 2")
    embeds = caption["prompt_embeds"][0, : len(expected)]
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-4)
    batch = batch_of(loaded, TALKS)
    added = loaded(batch).conditions["image"]["prompt_embeds"]
    assert (added - batch.outputs["image"].targets["prompt_embeds"]).abs().max() > 1e-3

    exported = checkpoints.export(source, tmp_path / "exported")
    again = checkpoints.load_model(checkpoints.open_checkpoint(exported))
    assert again.decoders["image"].config.text_encoder == "llm"
    assert torch.equal(again(batch).conditions["image"]["prompt_embeds"], added)
    merged = checkpoints.merge(source, tmp_path / "merged", dtype=torch.float32)
    again = checkpoints.load_model(checkpoints.open_checkpoint(merged))
    assert again.decoders["image"].config.text_encoder == "own"
    captions = again.decoders["image"].encode_captions(["a red apple 2"])
    torch.testing.assert_close(captions, caption, rtol=0, atol=1e-4)


def test_a_decoder_that_is_swapped_in_is_served_too(make_run, tmp_path: Path) -> None:
    trainer.train(make_run(steps=1), progress=False)
    source = checkpoints.open_checkpoint(tmp_path / "run")
    decoder = source.system().decoders["image"]
    options = SwapOptions(steps=1, keep=False)
    (swap,) = swap_decoders(
        source, {"image": decoder}, tmp_path / "swapped", options=options, progress=False
    )
    assert swap.unfitted.explained == 1.0  # a fresh projection is the caption's own condition
    assert swap.unfitted.projected == pytest.approx(swap.unfitted.own)


def test_another_language_model_is_refused_when_the_system_is_built(
    tree: dict, tmp_path: Path
) -> None:
    other = {**tree["llm"], "weights": str(parts.write_llm(tmp_path))}
    with pytest.raises(ConfigError, match=r"model_type is 'qwen3' there and 'llama' here"):
        model.build(config.parse_system({**tree, "llm": other}))
    with pytest.raises(ConfigError, match=r"decoders\.image\.text_encoder: llm, but llm\.weights"):
        model.build(config.parse_system({**tree, "llm": other}), meta=True)


def test_the_plan_says_what_is_not_loaded_and_counts_it_nowhere(tree: dict) -> None:
    own = {**tree["decoders"]["image"], "text_encoder": "own"}
    found = {}
    for name, decoder in (("llm", tree["decoders"]["image"]), ("own", own)):
        system = config.parse_system({**tree, "decoders": {"image": decoder}})
        described = planning.parts_of(model.build(system, meta=True))
        found[name] = next(part for part in described if part.name == "decoders.image")
    loaded = tiny.load(Path(own["weights"])).text_encoder
    size = sum(4 * parameter.numel() for parameter in loaded.parameters())
    assert found["own"].bytes - found["llm"].bytes == found["llm"].bytes_saved == size
    assert found["own"].bytes_saved == 0
    assert "text_encoder" not in found["llm"].networks


def test_invalid_settings_are_refused() -> None:
    for changes, message in (
        ({"condition_dropout": 0.1}, "condition_dropout: expected 0, because guidance is over"),
        ({"signal_tokens": 0}, "signal_tokens: expected at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(ResidualConfig(**changes), condition_shapes={"embeds": (4, 8)}, width=8)


def test_states_without_captions_are_refused(make) -> None:
    with pytest.raises(ValueError, match="prompt_embeds, prompt_mask is needed"):
        make().condition({"image": torch.zeros(1, 7, tiny.WIDTH)})

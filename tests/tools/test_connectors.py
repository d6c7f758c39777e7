"""The comparison of output projections: a few steps of two candidates, on tiny parts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from mmllm.evaluation.scene_judge import SceneJudge
from tests.training.runs import metrics
from tools.mini.world import connectors
from tools.mini.world.connectors import ALIGN, DENOISE, WEIGHTED, Budget, Candidate
from tools.mini.world.judge import Detector

TINY = {
    "regression": Candidate(
        {
            **{"type": "transformer", "signal_tokens": 2, "width": 16, "encoder_layers": 1},
            **{"decoder_layers": 1, "heads": 2, "feed_forward": 32},
        },
        [ALIGN],
        {},
    ),
    "words, aligned first": Candidate(
        {
            **{"type": "connector", "signal_tokens": 2, "width": 16, "heads": 2, "layers": 1},
            **{"feed_forward": 32, "words": 6, "llm_layers": [1, 2]},
        },
        [ALIGN, DENOISE],
        WEIGHTED,
    ),
}


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    """Other trainings of this process may have chosen another precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_candidates_are_trained_judged_and_not_trained_again(
    system_tree: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connectors, "CANDIDATES", TINY)
    torch.manual_seed(0)
    judge = SceneJudge(Detector(width=16, blocks=1))
    budget = Budget(steps=2, batch_size=2, scenes=4)
    arguments = (system_tree, judge, tmp_path, list(TINY), budget, 1)
    rows = connectors.compare(*arguments)
    assert [row["name"] for row in rows] == [*TINY, "the decoder's own captions"]
    assert [row.get("steps") for row in rows] == [2, 2, None]
    assert all(list(row["right"]) == list(connectors.KINDS) for row in rows)
    table = (tmp_path / "table.md").read_text("utf-8")
    assert table.count("\n") == 5
    assert "0.00 (0.00 to 0.43)" in table  # none of five
    second = tmp_path / "words-aligned-first" / "stage-2"
    assert "denoise/image" in metrics(second)[0]

    def trained_again(*arguments, **options):
        raise AssertionError

    monkeypatch.setattr(connectors, "train", trained_again)
    assert connectors.compare(*arguments) == rows


def test_a_budget_of_seconds_is_as_many_steps_as_take_so_long(
    system_tree: dict, tmp_path: Path
) -> None:
    runs = connectors.stages(
        system_tree, TINY["words, aligned first"], tmp_path, tmp_path / "cache", Budget(steps=8)
    )
    assert [run.stage.steps for run in runs] == [4, 4]
    assert [run.stage.denoise is None for run in runs] == [True, False]
    assert runs[1].stage.init_from == runs[0].stage.output
    for number, seconds in ((1, 0.5), (2, 2.0)):
        folder = tmp_path / f"trial-{number}"
        folder.mkdir()
        lines = [{"step": step, "seconds": 9.0 if step < 5 else seconds} for step in range(10)]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    timed = connectors.with_seconds(runs, tmp_path, 40.0)
    assert [run.stage.steps for run in timed] == [40, 10]


def test_candidates_are_of_the_registry(system_tree: dict, tmp_path: Path) -> None:
    for candidate in connectors.CANDIDATES.values():
        for run in connectors.stages(system_tree, candidate, tmp_path, tmp_path, Budget()):
            assert run.system.output_projections["image"].signal_tokens >= 8


def test_the_reply_of_every_held_out_scene_holds_its_caption() -> None:
    scenes = connectors.heldout(2)
    assert len(scenes) == 2 * len(connectors.KINDS)
    for _, _, (request, reply) in scenes:
        text, image = reply.parts
        assert image.caption in text.text
        assert request.role == "user"
    assert [s[1] for s in scenes] == [s[1] for s in connectors.heldout(2)]

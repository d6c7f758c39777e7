"""Tasks with chats that are always correct or always wrong, and the table."""

from pathlib import Path

import numpy as np
import pytest

import mmllm
from mmllm.conversation import Message, assistant, user
from mmllm.evaluation import tasks
from mmllm.evaluation.prompts import EvalItem, evenly_spaced, generate_responses, read_test_items
from tests.evaluation.scripted import CONCEPTS, JUDGES, LABELS, ScriptedChat, items_from, medium


def _media_items(tmp_path: Path) -> list[EvalItem]:
    entries = [
        {
            "id": f"text->image+audio/{i}",
            "row": "text->image+audio",
            "messages": [{"role": "user", "content": concept}],
            "expect": {
                "concept": concept,
                "concepts": [concept, concept],
                "modalities": ["image", "audio"],
            },
        }
        for i, concept in enumerate(CONCEPTS)
    ]
    return items_from(tmp_path, entries)["text->image+audio"]


def _both(concept: str) -> Message:
    return assistant("Here.", medium("image", concept), medium("audio", concept))


@pytest.mark.parametrize(
    ("script", "top1", "top5"),
    [
        (lambda turns: _both(turns[-1].text), 1.0, 1.0),
        (
            lambda turns: _both("dog" if turns[-1].text == "cat" else turns[-1].text),
            6 / 7,
            1.0,
        ),
        (
            lambda turns: Message("assistant", _both(turns[-1].text).parts[::-1]),
            0.0,
            0.0,
        ),  # order
        (lambda turns: assistant("no"), 0.0, 0.0),
        (lambda turns: assistant(medium("image", turns[-1].text)), 0.0, 0.0),
        (
            lambda turns: _both({"dog": "cow", "cow": "dog"}.get(turns[-1].text, "bat")),
            1 / 7,
            5 / 7,
        ),
    ],
)
def test_generated_media(tmp_path: Path, script, top1: float, top5: float) -> None:
    """The last script draws a bat for all between: far from dog and cow, near to the others."""
    scored = tasks.score_media(
        generate_responses(ScriptedChat(script), _media_items(tmp_path), batch_size=3), JUDGES
    )
    assert [entry.id for entry in scored] == [f"text->image+audio/{i}" for i in range(7)]
    assert np.mean([entry.correct for entry in scored]) == pytest.approx(top5)
    assert np.mean([bool(entry.top1) for entry in scored]) == pytest.approx(top1)


def test_generated_media_are_named_by_the_nearest_concept(tmp_path: Path) -> None:
    (entry, *_) = tasks.score_media(
        generate_responses(ScriptedChat(lambda turns: _both("cow")), _media_items(tmp_path)), JUDGES
    )
    assert entry.prediction["modalities"] == ["image", "audio"]
    assert [row[0] for row in entry.prediction["nearest"]] == ["cow", "cow"]
    assert entry.prediction["text"] == "Here."


@pytest.mark.parametrize(("reply", "correct"), [("It's a {}.", True), ("a {} or a bee", False)])
def test_names(tmp_path: Path, reply: str, correct: bool) -> None:
    entries = [
        {
            "id": f"image->text/{concept}",
            "row": "image->text",
            "messages": [{"role": "user", "content": [{"type": "text", "text": concept}]}],
            "expect": {"concept": concept, "text_concept": concept, "modalities": []},
        }
        for concept in CONCEPTS
        if concept != "bee"
    ]
    items = items_from(tmp_path, entries)["image->text"]
    chat = ScriptedChat(lambda turns: assistant(reply.format(turns[-1].text)))
    scored = [tasks.score_name(response, LABELS) for response in generate_responses(chat, items)]
    assert [entry.correct for entry in scored] == [correct] * 6


@pytest.mark.parametrize(
    ("wanted", "made", "correct"),
    [
        ([], [], True),
        ([], ["image"], False),
        (["image"], ["image"], True),
        (["image"], [], False),
        (["image"], ["image", "image"], False),
        (["image", "audio"], ["audio", "image"], True),  # order is another task's business
        (["image", "audio"], ["image"], False),
        (["audio"], ["video"], False),
    ],
)
def test_routing(wanted: list[str], made: list[str], correct: bool) -> None:
    item = EvalItem("r/0", "routing/x", ((user("go"),),), expect={"modalities": wanted})
    chat = ScriptedChat(lambda turns: assistant("Here.", *(medium(m, "dog") for m in made)))
    assert tasks.score_route(generate_responses(chat, [item])[0]).correct is correct


def test_thresholds_relative_to_a_metric_name_one_that_exists() -> None:
    measured = {task.name for task in tasks.TASKS}
    measured |= {"probe/image", "probe/audio", "what-did-you-draw/as input"}
    assert all(task.relative_to is None or task.relative_to in measured for task in tasks.TASKS)


def test_every_task_of_the_shipped_tests_is_in_the_table() -> None:
    shipped = read_test_items(Path(mmllm.__file__).parent / "mini" / "data" / "tests.jsonl.gz")
    assert shipped.keys() == {task.name for task in tasks.TASKS}
    for task in tasks.TASKS:
        least = 50 if task.kind == "route" else 80
        assert len(evenly_spaced(shipped[task.name], task.max_items)) >= least


def test_a_short_run_has_two_thirds_of_the_thresholds():
    short = {task.name: tasks.for_short_run(task).threshold for task in tasks.TASKS}
    assert short["image->text"] == short["text->audio"] == short["text->image+audio"] == 0.6
    assert short["decoder/image"] == 0.6
    assert short["decoder/audio"] == 0.5
    assert short["image->audio"] is short["routing/text"] is short["video->text"] is None

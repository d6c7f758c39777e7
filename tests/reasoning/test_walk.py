"""MemWalker with scripted models: trees, paths, ways back, working memory, and baselines."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from mmllm.errors import ConfigError, ContextError
from mmllm.reasoning import Budget, BudgetError, Recorder, ScriptedModel
from mmllm.reasoning.reading import answer_by_baselines
from mmllm.reasoning.tree import SummaryTree, TreeOptions, build_tree, load_tree
from mmllm.reasoning.walk import Walk, walk
from tests.reasoning.readers import NAMES, TEXT, THINGS, likelihood, scripted, write

OPTIONS = TreeOptions(segment_tokens=40, num_children=3, summary_tokens=60)


@pytest.fixture
def tree() -> SummaryTree:
    return build_tree(scripted(), TEXT, OPTIONS)


# --- trees --------------------------------------------------------------------------------------


def test_segments_are_the_text_cut_at_paragraphs(tree: SummaryTree) -> None:
    assert [tree.text_of(index) for index in tree.segments] == [
        part.strip() for part in TEXT.split("\n\n")
    ]
    assert [len(node.children) for node in tree.nodes] == [0] * 9 + [3] * 4
    assert tree.nodes[tree.root].summary.count("keeps") == 9
    assert (tree.nodes[tree.root].start, tree.nodes[tree.root].end) == (0, len(TEXT))


@pytest.mark.parametrize("num", [1, 2, 8, 9, 17, 65])
def test_every_inner_node_has_at_least_two_and_at_most_so_many_children(num: int) -> None:
    text = "\n\n".join(f"Paragraph {number} of some words." for number in range(num))
    options = TreeOptions(segment_tokens=16, num_children=8)
    built = build_tree(ScriptedModel(lambda *_: "a b"), text, options)
    inner = [node for node in built.nodes if node.children]
    assert all(2 <= len(node.children) <= 8 for node in inner)
    children = [child for node in inner for child in node.children]
    assert sorted(children) == list(range(built.root))


def test_a_tree_is_kept_by_text_model_and_options(tmp_path: Path) -> None:
    model = scripted()
    built = build_tree(model, TEXT, OPTIONS, folder=tmp_path)
    num_calls = len(model.conversations)
    assert build_tree(model, TEXT, OPTIONS, folder=tmp_path) == built
    assert len(model.conversations) == num_calls
    build_tree(model, TEXT + "!", OPTIONS, folder=tmp_path)
    build_tree(model, TEXT, TreeOptions(segment_tokens=50, num_children=3), folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_tree_of_another_text_or_model_is_refused(tmp_path: Path, tree: SummaryTree) -> None:
    path = tmp_path / "tree.json"
    tree.save(path)
    assert load_tree(path, scripted(), TEXT) == tree
    with pytest.raises(ConfigError, match="another text"):
        load_tree(path, scripted(), TEXT + " ")
    other = ScriptedModel(lambda *_: "x", likelihood)
    with pytest.raises(ConfigError, match="another model"):
        load_tree(path, other, TEXT)
    with pytest.raises(ConfigError, match="other options"):
        load_tree(path, scripted(), TEXT, TreeOptions())
    with pytest.raises(ConfigError, match="built by another model"):
        walk(other, tree, "Who keeps bees?")


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.pop("nodes"),
        lambda tree: tree.update(nodes=[]),
        lambda tree: tree["nodes"][0].update(end=10**9),
        lambda tree: tree["nodes"][-1].update(children=[99]),
        lambda tree: tree["nodes"][-1].update(children=["a"]),
        lambda tree: tree.update(options={"x": 1}),
    ],
)
def test_a_damaged_tree_is_refused(tmp_path: Path, tree: SummaryTree, change) -> None:
    path = tmp_path / "tree.json"
    tree.save(path)
    damaged = json.loads(path.read_text())
    change(damaged)
    path.write_text(json.dumps(damaged))
    with pytest.raises(ConfigError, match="no tree can be read from it"):
        load_tree(path, scripted(), TEXT)


def test_building_goes_on_from_a_record(tmp_path: Path, tree: SummaryTree) -> None:
    record = tmp_path / "record.jsonl"
    with pytest.raises(BudgetError):
        build_tree(Budget(Recorder(scripted(), record), max_calls=7), TEXT, OPTIONS)
    model = scripted()
    assert build_tree(Recorder(model, record), TEXT, OPTIONS) == tree
    assert len(model.conversations) == 13 - 7


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ConfigError, match="the text is empty"):
        build_tree(scripted(), " \n")
    with pytest.raises(ConfigError, match="num_children: expected at least 2, got 1"):
        TreeOptions(num_children=1)


# --- walks by likelihood ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "thing"), list(zip(NAMES, THINGS, strict=True)))
def test_a_walk_by_likelihood_reads_the_segment_with_the_answer(
    tree: SummaryTree, name: str, thing: str
) -> None:
    found = walk(scripted(), tree, f"Who keeps {thing}?")
    index = NAMES.index(name)
    assert found.answer == name
    assert found.path == [tree.root, 9 + index // 3, index]
    assert found.segments == [index]
    assert found.read_fraction < 0.13
    chosen = walk(scripted(), tree, f"Who keeps {thing}?", options=NAMES)
    assert chosen.answer == name


def test_where_a_summary_lost_the_fact_the_walk_goes_back(tree: SummaryTree) -> None:
    """All questions are equally likely under the summaries, so children are tried in order."""

    def by_text(text: str, reply: str) -> float:
        if "quiet town" in text or text.startswith("Write"):
            return likelihood(text, reply)
        return 0.0

    model = ScriptedModel(write, by_text)
    found = walk(model, tree, "Who keeps clocks?")
    assert found.answer == "Eli"
    assert found.segments == [0, 1, 2, 3, 4]
    assert found.num_returns == 5  # four segments, and the first group
    assert found.path == [12, 9, 0, 9, 1, 9, 2, 9, 12, 10, 3, 10, 4]


def test_a_question_about_nothing_in_the_text_has_no_answer(tree: SummaryTree) -> None:
    found = walk(scripted(), tree, "Who keeps wolves?")
    assert (found.answer, found.stopped) == (None, "exhausted")
    assert sorted(found.segments) == tree.segments
    assert found.note == "no segment was accepted"


# --- walks by written choices -------------------------------------------------------------------


class Writer:
    """Writes these actions one after another, and keeps the prompts."""

    def __init__(self, *actions: str):
        self.actions = list(actions)
        self.prompts: list[str] = []

    def __call__(self, text: str, rng: random.Random) -> str:
        self.prompts.append(text)
        return self.actions.pop(0)

    def walk(self, tree: SummaryTree, **options) -> Walk:
        model = ScriptedModel(self, likelihood)
        own = SummaryTree(tree.source, tree.nodes, model.fingerprint, tree.options)
        return walk(model, own, "Who keeps bees?", choose="written", **options)


def test_a_written_walk_goes_as_the_paper_does(tree: SummaryTree) -> None:
    writer = Writer(
        "Reasoning: hm.\nAction: 1",
        "Action: 2",
        "Reasoning: no bees here.\nAction: -1",
        "Action: -1",
        "Action: 0",
        "Action: 0",
        "Reasoning: it says so.\nAction: -2\nAnswer: Ada",
    )
    found = writer.walk(tree)
    assert (found.answer, found.stopped) == ("Ada", "answered")
    assert found.path == [12, 10, 5, 10, 12, 9, 0]
    assert found.num_returns == 2
    triage, inner, segment, again, *_ = writer.prompts
    assert triage.count("Summary ") == 3
    assert "First provide reasoning" in triage
    assert inner.count("Summary ") == 3
    assert "Main text:\n'''Fay keeps kites." in segment
    assert "Background information:\n" in segment
    assert f"{tree.nodes[12].summary}\n\n{tree.nodes[10].summary}\n\nMain" in segment
    assert "Fay keeps kites" not in again  # the child that was left is not offered again
    assert again.count("Summary ") == 2


def test_three_invalid_outputs_end_the_walk_with_the_output(tree: SummaryTree) -> None:
    writer = Writer("Action: 0", "no idea", "Action: 7", "the first, surely")
    found = writer.walk(tree)
    assert (found.answer, found.stopped) == (None, "invalid")
    assert found.invalid == ["no idea", "Action: 7", "the first, surely"]
    assert found.note == "3 outputs in a row were no action; the last one: 'the first, surely'"
    fine = Writer("no idea", "what?", "Action: 0", "hm", "Action: 0", "Action: -2 Answer: Ada")
    assert fine.walk(tree).answer == "Ada"


def test_without_reasoning_none_is_asked_for(tree: SummaryTree) -> None:
    writer = Writer("0", "0", "-2\nAnswer: Ada")
    assert writer.walk(tree, reason=False).answer == "Ada"
    assert not any("easoning" in prompt for prompt in writer.prompts)


def test_working_memory_keeps_the_newest_summaries(tree: SummaryTree) -> None:
    num_words = len(tree.nodes[9].summary.split())
    writer = Writer("0", "0", "-2\nAnswer: Ada")
    writer.walk(tree, memory_tokens=num_words)
    assert tree.nodes[9].summary in writer.prompts[-1]
    assert tree.nodes[12].summary not in writer.prompts[-1]
    writer = Writer("0", "0", "-2\nAnswer: Ada")
    writer.walk(tree, memory_tokens=1)
    assert "Background" not in writer.prompts[-1]


def test_an_unknown_choice_is_refused(tree: SummaryTree) -> None:
    with pytest.raises(ConfigError, match="expected likelihood or written, got 'guess'"):
        walk(scripted(), tree, "Who?", choose="guess")  # pyright: ignore


# --- baselines ----------------------------------------------------------------------------------


def test_baselines_answer_from_what_they_read(tree: SummaryTree) -> None:
    num_words = len(TEXT.split())
    found = answer_by_baselines(scripted(), tree, "Who keeps snails?", context=num_words // 2)
    assert found == {
        "whole": None,
        "truncated": "nobody",
        "flat": "Ida",
        "lexical": "Ida",
        "likelihood": "Ida",
    }
    found = answer_by_baselines(
        scripted(), tree, "Who keeps bees?", context=10, names=["truncated", "flat"], options=NAMES
    )
    assert found == {"truncated": "Ada", "flat": "Ada"}
    whole = answer_by_baselines(
        scripted(), tree, "Who keeps snails?", context=num_words, names=["whole"]
    )
    assert whole == {"whole": "Ida"}


def test_a_prompt_that_exceeds_the_context_has_no_answer(tree: SummaryTree) -> None:
    class Short(ScriptedModel):
        def score(self, conversation, replies):
            raise ContextError("too long")

    model = Short(write)
    found = answer_by_baselines(
        model, tree, "Who keeps bees?", names=["truncated"], options=NAMES, context=50
    )
    assert found == {"truncated": None}

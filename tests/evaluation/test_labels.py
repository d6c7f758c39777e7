"""Which replies name a concept."""

import pytest

from mmllm.evaluation.labels import LabelMatcher

CONCEPTS = [
    {"id": "bell", "label": "bell", "synonyms": [], "heldout_synonyms": ["chime"]},
    {"id": "bell-pepper", "label": "bell pepper", "synonyms": ["capsicum"]},
    {"id": "red-apple", "label": "red apple", "synonyms": []},
    {"id": "green-apple", "label": "green apple", "synonyms": []},
    {"id": "t-rex", "label": "T-Rex", "synonyms": ["dino"]},
    {"id": "dinosaur", "label": "long-necked dinosaur", "synonyms": ["dino"]},
]
MATCHER = LabelMatcher(CONCEPTS)


@pytest.mark.parametrize(
    ("reply", "named"),
    [
        ("This is a bell.", {"bell"}),
        ("A BELL!", {"bell"}),
        ("a chime", {"bell"}),
        ("That is a bell\n pepper.", {"bell-pepper"}),  # the longest name wins
        ("a capsicum", {"bell-pepper"}),
        ("a bell and a bell pepper", {"bell", "bell-pepper"}),
        ("Isabella rings doorbells", set()),  # whole words only
        ("an apple", set()),  # a part of two names is neither
        ("Is it a red apple, or a green apple?", {"red-apple", "green-apple"}),
        ("a t-rex.", {"t-rex"}),
        ("a dino", {"t-rex", "dinosaur"}),  # shared: names both
        ("", set()),
    ],
)
def test_named(reply: str, named: set[str]) -> None:
    assert MATCHER.match(reply) == named


def test_a_reply_must_name_the_concept_and_no_other() -> None:
    assert MATCHER.matches_only("It is a bell.", "bell")
    assert not MATCHER.matches_only("It is a bell, or a capsicum.", "bell")
    assert not MATCHER.matches_only("a dino", "t-rex")
    assert not MATCHER.matches_only("nothing", "bell")


def test_without_concepts_nothing_is_named() -> None:
    assert LabelMatcher([]).match("a bell") == set()

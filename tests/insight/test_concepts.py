"""Names of things in texts and media."""

from __future__ import annotations

from pathlib import Path

from mmllm.conversation import Audio, Image
from mmllm.insight.concepts import ConceptVocabulary, mini_vocabulary
from mmllm.mini import locate

WORDS = ConceptVocabulary(
    {"cat": ["cat", "kitty"], "cat-sound": ["cat sound"]}, {str(Path("x.png").resolve()): "cat"}
)


def test_whole_words_are_found_the_longest_first() -> None:
    text = "A Kitty, a catalogue and a cat sound."
    found = WORDS.in_text(text)
    assert [(text[start:end], concept) for start, end, concept in found] == [
        ("Kitty", "cat"),
        ("cat sound", "cat-sound"),
    ]


def test_a_medium_is_known_by_its_file_or_its_caption() -> None:
    assert WORDS.of_medium(Image("x.png", caption="cat sound")) == "cat"
    assert WORDS.of_medium(Image("y.png", caption="a cat")) == "cat"
    assert WORDS.of_medium(Image("y.png", caption="a cat and a cat sound")) is None
    assert WORDS.of_medium(Image("y.png")) is None


def test_what_is_seen_and_what_is_audible_are_one_concept() -> None:
    vocabulary = mini_vocabulary()
    data = locate("data")
    assert vocabulary.of_medium(Image(data / "pictures/twemoji/bell.webp")) == "bell"
    assert vocabulary.of_medium(Audio(data / "sounds/church-bell/7.ogg")) == "bell"
    assert "church bell" in vocabulary.names["bell"]

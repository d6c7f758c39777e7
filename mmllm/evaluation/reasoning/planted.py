"""Facts about people, each as a sentence and as a question that shares none of its words.

A search for words cannot find the sentence by the question; a model that knows what beekeepers do
can. A long text is a part of a book with some of these sentences planted in it.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

NAMES = (
    *("Clara", "Boris", "Nadia", "Oscar", "Priya"),
    *("Hugo", "Ingrid", "Tomas", "Leila", "Victor"),
)
"""The people of a text, who are the possible answers."""

FACTS: tuple[tuple[str, str], ...] = (
    (
        "{} tends forty hives behind the barn and sells what the insects make in jars.",
        "Who is a beekeeper?",
    ),
    (
        "{} spent the winter carving oars and planking hulls down at the harbour.",
        "Who builds boats?",
    ),
    (
        "Every night {} climbs to the roof, aims the telescope and notes where the planets stand.",
        "Who is an astronomer?",
    ),
    (
        "{} mends broken watches under a strong lamp, one tiny spring at a time.",
        "Who repairs clocks?",
    ),
    (
        "{} pulls aching teeth and fits crowns in a white office on the corner.",
        "Who is a dentist?",
    ),
    (
        "{} shapes two hundred loaves before sunrise and dusts everything with flour.",
        "Who bakes bread?",
    ),
    (
        "{} owns eleven goats and turns their milk into soft white wheels.",
        "Who makes cheese?",
    ),
    (
        "At the fair {} swallowed swords and juggled burning torches.",
        "Who performs in a circus?",
    ),
    (
        "{} grew up by the Seine, within sight of the Eiffel Tower.",
        "Who comes from Paris?",
    ),
    (
        "{} sat down at the keyboard and gave them a sonata by Beethoven.",
        "Who plays the piano?",
    ),
    (
        "{} carries letters and parcels from door to door, whatever the weather.",
        "Who delivers mail?",
    ),
    (
        "{} measures sleeves and sews suits for the whole street.",
        "Who is a tailor?",
    ),
    (
        "{} scored twice on Sunday and lifted the cup with the whole team.",
        "Who plays football?",
    ),
    (
        "{} keeps a python and two iguanas under warm lamps.",
        "Who has reptiles?",
    ),
    (
        "{} once touched a cashew, and within minutes the throat swelled up.",
        "Who is allergic to nuts?",
    ),
    (
        "{} lost everything at roulette and still goes back to the tables.",
        "Who is a gambler?",
    ),
    (
        "{} walked on the lunar dust and planted a flag there.",
        "Who went to the moon?",
    ),
    (
        "{} took the necklace while its owner slept and hid it under the floorboards.",
        "Who is a thief?",
    ),
    (
        "{} blows molten sand into glowing shapes at the end of a long pipe.",
        "Who makes glass?",
    ),
    (
        "{} hears both sides, wears a black robe and passes sentence.",
        "Who is a judge?",
    ),
    (
        "{} drives cattle over the prairie with a lasso and a wide hat.",
        "Who is a cowboy?",
    ),
    (
        "{} crossed the Channel from Dover to Calais with nothing but arms and legs.",
        "Who is a swimmer?",
    ),
    (
        "{} shoes horses, and the anvil rings all morning.",
        "Who is a blacksmith?",
    ),
    (
        "{} dug up the thigh bone of a creature that died out millions of years ago.",
        "Who discovered a dinosaur?",
    ),
    (
        "{} gave away a kidney so that a stranger could live.",
        "Who donated an organ?",
    ),
    (
        "{} explains fractions and equations to the third form.",
        "Who teaches mathematics?",
    ),
    (
        "{} rides the waves on a board from dawn to dusk.",
        "Who goes surfing?",
    ),
    (
        "{} has not touched meat for a dozen years.",
        "Who is a vegetarian?",
    ),
    (
        "{} talks to guests in Japanese, Hindi, Polish and Arabic without an accent.",
        "Who speaks many languages?",
    ),
    (
        "{} aimed the hose at the blaze and brought two children down the ladder.",
        "Who is a firefighter?",
    ),
    (
        "{} stood in the river with a rod and pulled out nine trout.",
        "Who caught some fish?",
    ),
    (
        "{} set the broken wing of a sparrow and bandaged the paw of a dog.",
        "Who heals animals?",
    ),
    (
        "{} wrote four novels in a cabin by the lake.",
        "Who is an author?",
    ),
    (
        "{} landed the jet on the short runway with one engine on fire.",
        "Who is a pilot?",
    ),
    (
        "{} polishes lenses and finds frames for the short-sighted.",
        "Who sells eyeglasses?",
    ),
    (
        "{} turns wet clay on a spinning wheel and fires it in a kiln.",
        "Who makes pottery?",
    ),
    (
        "{} snores, and the whole household lies awake because of it.",
        "Who is noisy during sleep?",
    ),
    (
        "{} cuts curls and trims beards in a shop with three mirrors.",
        "Who is a barber?",
    ),
    (
        "{} rolled the dough, spread tomato and mozzarella on it, and slid it into the oven.",
        "Who cooked a pizza?",
    ),
    (
        "{} defended the accused in court and won.",
        "Who is a lawyer?",
    ),
    (
        "{} fell asleep at the wheel and hit a lamp post.",
        "Who had a car accident?",
    ),
    (
        "{} inherited an oil field and has more money than anyone could count.",
        "Who is very rich?",
    ),
    (
        "{} sank to the coral reef with two tanks of air.",
        "Who went diving?",
    ),
    (
        "{} pressed the shutter when the eagle opened its wings.",
        "Who took a photograph?",
    ),
    (
        "{} grows tulips and roses in long glass houses.",
        "Who raises flowers?",
    ),
    (
        "{} moved the bishop, took the rook and called checkmate.",
        "Who is good at chess?",
    ),
    (
        "{} saws planks and joins them into wardrobes.",
        "Who builds furniture?",
    ),
    (
        "{} mixed the oils, held the brush up and finished the portrait of a duke.",
        "Who is a painter?",
    ),
    (
        "{} broke an ankle on the snowy slope, between two flags.",
        "Who was injured while skiing?",
    ),
    (
        "{} swears that a pale figure walked through the wall of the old castle.",
        "Who saw a ghost?",
    ),
    (
        "{} makes mittens and scarves out of grey wool, with two long needles.",
        "Who likes knitting?",
    ),
    (
        "{} shivers in bed with thirty-nine degrees and a sore throat.",
        "Who has a fever?",
    ),
    (
        "{} raised the baton, and eighty violins and horns began together.",
        "Who conducts an orchestra?",
    ),
    (
        "{} keeps the great lamp above the cliffs burning, so that ships stay off the rocks.",
        "Who lives in a lighthouse?",
    ),
    (
        "{} digs for coal, a mile under the hills.",
        "Who is a miner?",
    ),
    (
        "{} made coins vanish and pulled a dove out of an empty sleeve.",
        "Who is a magician?",
    ),
    (
        "{} crushed the grapes and filled the barrels in the cellar.",
        "Who makes wine?",
    ),
    (
        "{} hunts for burglars and has a badge, a whistle and a pair of handcuffs.",
        "Who is a police officer?",
    ),
    (
        "{} goes to Greenland each June to find out how fast the glaciers melt.",
        "Who studies the climate?",
    ),
    (
        "{} turned one hundred and two in spring.",
        "Who is very old?",
    ),
)
"""A sentence with a gap for a name, and the question that the name answers."""


@dataclass(frozen=True)
class PlantedText:
    """A text with planted facts.

    Attributes:
        text: the text.
        questions: (question, name) of each planted fact.
        planted: the planted sentences, in the order of the questions.
    """

    text: str
    questions: tuple[tuple[str, str], ...]
    planted: tuple[str, ...]


def long_texts(book: str, num: int, *, length: int = 16_500, seed: int = 0) -> list[PlantedText]:
    """Parts of a book, one after another, each with one fact about each of `NAMES`.

    Args:
        book: a book with paragraphs between blank lines.
        num: number of texts, up to `len(FACTS) // len(NAMES)`.
        length: characters of each part, the planted sentences not counted; about 4,300 tokens.
        seed: of the order of facts, of who is who, and of the places.
    """
    rng = random.Random(seed)
    facts = rng.sample(FACTS, len(FACTS))
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", book) if len(part.strip()) > 40]
    texts = []
    for number in range(num):
        part: list[str] = []
        while sum(map(len, part)) < length:
            part.append(paragraphs.pop(0))
        chosen = facts[number * len(NAMES) :][: len(NAMES)]
        names = rng.sample(NAMES, len(NAMES))
        sentences = [
            sentence.format(name) for (sentence, _), name in zip(chosen, names, strict=True)
        ]
        places = sorted(rng.sample(range(1, len(part)), len(sentences)), reverse=True)
        for place, sentence in zip(places, sentences, strict=True):
            part.insert(place, sentence)
        questions = tuple(
            (question, name) for (_, question), name in zip(chosen, names, strict=True)
        )
        texts.append(PlantedText("\n\n".join(part), questions, tuple(sentences)))
    return texts

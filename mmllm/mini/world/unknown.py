"""What lies outside the world of mini, and the nearest thing inside it.

mini is trained to say so: to most of each list in training, a quarter is held out.
"""

from __future__ import annotations

import functools

import yaml

from mmllm.mini.world.things import DATA

SOUNDS: dict[str, str] = {
    # sound that is not in the world -> the nearest that is
    "a dog": "wolf", "a horse": "cow", "a pig": "sheep", "a lion": "cat", "a tiger": "cat",
    "a goat": "sheep", "a donkey": "cow", "an elephant": "trumpet", "a monkey": "bird",
    "a rooster": "chick", "a hen": "chick", "a goose": "duck", "a parrot": "bird",
    "a crow": "bird", "a seagull": "bird", "a snake": "rattlesnake", "a mosquito": "bee",
    "a fly": "bee", "a dolphin": "whale", "a seal": "whale", "a bear": "wolf",
    "a car": "car-horn", "a truck": "motorcycle", "a bus": "car-horn", "a tractor": "motorcycle",
    "an airplane": "helicopter", "a jet": "rocket", "a submarine": "ship-horn",
    "a train": "steam-train", "a vacuum cleaner": "wind", "a washing machine": "motorcycle",
    "a toaster": "alarm-clock", "a printer": "camera", "a keyboard": "ticking-clock",
    "a doorbell": "bicycle-bell", "a gong": "cymbal", "a double bass": "cello",
    "an oboe": "clarinet",
    "a trombone": "tuba", "a French horn": "trumpet", "a ukulele": "guitar", "a mandolin": "banjo",
    "a lute": "guitar", "a synthesizer": "electric-guitar", "a didgeridoo": "bagpipes",
    "a kazoo": "harmonica", "castanets": "maracas", "a cough": "knock-on-a-door",
    "a sneeze": "gunshot", "laughter": "applause", "a crying baby": "cat", "footsteps": "hammer",
    "a kiss": "water-drop", "snoring": "hand-saw", "a scream": "siren", "a whisper": "wind",
    "an earthquake": "thunder", "a volcano": "thunder", "a waterfall": "rain", "a river": "rain",
    "glass breaking": "cymbal", "a zipper": "hand-saw", "a balloon": "gunshot",
}  # fmt: skip
COLOURS = (
    *("turquoise", "cyan", "magenta", "beige", "violet", "gold", "silver", "navy", "teal"),
    *("maroon", "lilac", "crimson", "khaki", "indigo", "striped", "rainbow-coloured"),
)
NUMBERS = {
    # number that is asked for -> as the answer says it
    **{word: word for word in ("five", "six", "seven", "eight", "nine", "ten", "twelve", "twenty")},
    **{word: word for word in ("a dozen", "fifteen", "fifty", "a hundred", "a thousand")},
    "5": "five", "6": "six", "7": "seven", "8": "eight", "9": "nine", "10": "ten", "11": "eleven",
    "12": "twelve", "15": "fifteen", "20": "twenty", "50": "fifty", "100": "a hundred",
}  # fmt: skip
LANGUAGES = (
    *("Dessine-moi un chat.", "Dessine un chien rouge", "Peux-tu dessiner une maison ?"),
    *("Zeichne eine Katze.", "Bitte male mir einen Hund", "Kannst du ein Auto zeichnen?"),
    *("Dibuja un gato", "Dibújame una casa, por favor", "¿Puedes dibujar un perro?"),
    *("Disegna un gatto", "Disegnami una macchina rossa", "Desenha um gato", "Teken een kat"),
    *("Narysuj kota", "Nakresli kočku", "Rita en katt", "Piirrä kissa", "Kedi çiz"),
    *("нарисуй кошку", "намалюй собаку", "猫を描いて", "画一只猫", "고양이를 그려줘"),
    *("ارسم قطة", "צייר חתול", "बिल्ली बनाओ", "Ζωγράφισε μια γάτα", "Rajzolj egy macskát"),
)


@functools.cache
def things() -> dict[str, str]:
    """Thing that is not in the world -> the id of the nearest that is."""
    table = yaml.safe_load((DATA / "unknown.yaml").read_text(encoding="utf-8"))
    return {name: near for near, names in table.items() for name in names.split(", ")}


def is_heldout(word: str) -> bool:
    """Whether training never sees a word of these lists: a quarter, by its letters."""
    return sum(map(ord, word)) % 4 == 1

"""What lies outside the world of mini, and the nearest thing inside it.

mini is trained to say so: to one half of each list in training, the other half is held out.
"""

from __future__ import annotations

THINGS: dict[str, str] = {
    # thing that is not in the world -> the nearest that is
    "capybara": "hamster", "jaguar": "leopard", "cheetah": "leopard", "puma": "leopard",
    "llama": "camel", "alpaca": "sheep", "gorilla": "monkey", "chimpanzee": "monkey",
    "squirrel": "hamster", "rat": "mouse", "beaver": "otter", "badger": "hedgehog",
    "porcupine": "hedgehog", "bison": "cow", "ox": "cow", "buffalo": "cow", "moose": "deer",
    "reindeer": "deer", "antelope": "deer", "gazelle": "deer", "walrus": "seal",
    "jellyfish": "octopus", "squid": "octopus", "starfish": "star", "seahorse": "horse",
    "parrot": "bird", "pigeon": "dove", "crow": "bird", "raven": "bird", "seagull": "bird",
    "ostrich": "flamingo", "stork": "flamingo", "pelican": "duck", "vulture": "eagle",
    "hawk": "eagle", "falcon": "eagle", "lizard": "crocodile", "chameleon": "crocodile",
    "worm": "snake", "eel": "snake", "caterpillar": "snail", "mosquito": "fly",
    "grasshopper": "ant", "beetle": "ladybug", "scorpion": "spider", "moth": "butterfly",
    "oak": "tree", "willow": "tree", "birch": "tree", "bamboo": "tree", "lily": "tulip",
    "orchid": "flower", "daisy": "flower", "lavender": "flower", "grass": "four-leaf-clover",
    "mango": "peach", "papaya": "melon", "plum": "peach", "apricot": "peach", "fig": "pear",
    "lime": "lemon", "orange juice": "milk", "raspberry": "strawberry", "pumpkin pie": "pie",
    "cabbage": "broccoli", "lettuce": "salad", "cucumber": "kiwi", "zucchini": "eggplant",
    "radish": "tomato", "beetroot": "onion", "garlic": "onion", "sandwich": "burger",
    "hot dog": "burger", "taco": "pizza", "sushi": "rice", "lasagna": "spaghetti",
    "sausage": "bacon", "steak": "bacon", "butter": "cheese", "yoghurt": "milk",
    "chocolate bar": "cookie", "waffle": "cookie", "pancake": "cookie", "muffin": "cake",
    "beer": "wine", "cocktail": "wine", "juice": "milk", "lemonade": "milk",
    "comet": "star", "galaxy": "planet", "satellite": "ufo", "meteor": "fire",
    "waterfall": "fountain", "river": "bridge", "lake": "island", "ocean": "beach",
    "forest": "tree", "cave": "mountain", "canyon": "desert", "pyramid": "triangle",
    "lighthouse": "tower", "skyscraper": "tower", "windmill": "house", "barn": "house",
    "igloo": "tent", "museum": "temple", "library": "school", "airport": "airplane",
    "supermarket": "shopping-cart", "stadium": "school", "Big Ben": "tower",
    "Statue of Liberty": "tower", "Taj Mahal": "temple", "Great Wall": "brick",
    "submarine": "ship", "canoe": "boat", "raft": "boat", "tank": "tractor",
    "scooter": "bicycle", "tricycle": "bicycle", "van": "bus", "tram": "train",
    "spaceship engine": "rocket", "hot air balloon": "parachute", "drone": "helicopter",
    "harp": "guitar", "cello": "violin", "clarinet": "flute", "tuba": "trumpet",
    "harmonica": "flute", "accordion": "piano", "printer": "computer",
    "tablet": "phone", "calculator": "phone", "radio": "television", "fridge": "door",
    "oven": "fire", "toaster": "bread", "washing machine": "bucket", "vacuum cleaner": "bucket",
    "table": "chair", "desk": "chair", "bookshelf": "book", "carpet": "square",
    "curtain": "window", "pillow": "bed", "blanket": "bed", "towel": "soap", "broom": "pencil",
    "shovel": "axe", "drill": "hammer", "saw": "axe", "screwdriver": "hammer", "nail": "hammer",
    "rope": "snake", "chain": "lock", "wheel": "circle", "compass": "watch",
    "microscope": "telescope", "thermometer": "pen", "syringe": "pen", "scale": "watch",
    "belt": "scarf", "gloves": "hand", "skirt": "dress", "sweater": "shirt", "vest": "shirt",
    "slippers": "shoe", "sandals": "shoe", "helmet": "baseball-cap", "bracelet": "ring",
    "necklace": "ring", "earring": "ring", "volleyball": "ball", "tennis racket": "ball",
    "golf club": "ball", "skis": "skateboard", "surfboard": "skateboard", "chess piece": "king",
    "puzzle": "gift", "doll": "teddy-bear", "pirate": "cowboy", "knight": "sword",
    "clown fish": "fish", "goldfish": "fish", "werewolf": "wolf", "giant": "man",
    "dwarf": "santa-claus", "elf": "fairy", "witch": "wizard", "mummy": "zombie",
    "president": "king", "nurse": "doctor", "teacher": "woman", "pilot": "astronaut",
    "soldier": "police-officer", "dancer": "fairy", "logo": "star", "flag": "kite",
    "map": "globe", "poster": "square", "sign": "stop-sign", "heartbeat": "heart",
}  # fmt: skip
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
    "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "twelve": 12,
    "a dozen": 12, "fifteen": 15, "twenty": 20, "fifty": 50, "a hundred": 100, "a thousand": 1000,
    "5": 5, "7": 7, "10": 10, "100": 100,
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


def is_heldout(word: str) -> bool:
    """Whether training never sees a word of these lists: every second, by its letters."""
    return sum(map(ord, word)) % 2 == 1

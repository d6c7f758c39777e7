"""The table of concepts: what each sounds like, and what it is called."""

from __future__ import annotations

import re

from tools.mini.data.sounds.sources import Concept, Recorded, Rendered, Synthesised
from tools.mini.data.sounds.synthesised import SYNTHESISED

CAPTIONS = {
    "train": [
        "{caption}",
        "{label}",
        "a recording of {thing}",
        "an audio clip of {thing}",
        "what {thing} sounds like",
        "the noise of {thing}",
        "audio of {thing}",
        "listen to {thing}",
        "a short sound: {label}",
        "the typical sound of {thing}",
    ],
    "heldout": [
        "a sound clip of {thing}",
        "how {thing} sounds",
        "sound effect: {label}",
        "hear {thing}",
        "a sample of {caption}",
    ],
}
HELD = ("0*6", "0*3 2*3", "0*2 4*2 7*3")
CHORD = ("0+4+7+12*7", "0+4+7*3 0+5+9*4", "0+3+7+12*7")
STRUM = (
    "0+7+12+16+19*3 0+7+12+16+19 0+7+12+16+19*3",
    "0+7+12+15+19*2 0+7+12+15+19 0+7+12+15+19*4",
)


def gm(program: int, low: int, high: int, phrases: tuple[str, ...], **more) -> Rendered:
    return Rendered(program, low, high, phrases, **more)


def kit(*phrases: str, **more) -> Rendered:
    return Rendered(0, 0, 0, phrases, kit=True, **more)


def rolls(steps: str, times: int) -> str:
    """Every step repeated: rolls("0 7", 2) is "0 0 7 7"."""
    return " ".join(step for step in steps.split() for _ in range(times))


HITS = (
    ("ghe1", "na", "te1", "na"),
    ("ghe2", "tas1", "ke3", "tas1"),
    ("ghe3", "te2", "na", "te2"),
    ("tun1", "ghe4", "te1", "tun1"),
    ("ghe5", "re", "na_s", "dhec"),
    ("ghe6", "tas2", "ghe1", "tas2"),
    ("ghe7", "na_o", "te_m", "na_o"),
    ("ghe8", "tun3", "te_ne", "tas3"),
)
RENDERED: dict[str, Rendered] = {
    # keyboards and mallets
    "piano": gm(0, 48, 68, CHORD),
    "music box": gm(10, 72, 87, ("12 7 9 4 7 0 4*2", "0 4 7 12 7 4 12*2"), ring=True),
    "marimba": gm(12, 48, 63, (rolls("0 7 4 0", 4), rolls("0+7 4+9 0+7 4+9", 4)), beat=0.12),
    "xylophone": gm(
        13, 72, 87, ("0 2 4 5 7 9 11 12", "12 11 9 7 5 4 2 0", "0 4 2 5 4 7 5 12"), beat=0.2
    ),
    "church bell": gm(14, 50, 65, ("0*8", "0*4 0*4", "5*4 0*4"), ring=True),
    "church organ": gm(19, 43, 58, CHORD, beat=0.28),
    "accordion": gm(21, 55, 70, ("0 4+7 4+7 0 4+7 4+7 0 4+7", "-5 4+7 4+7 0 4+7 4+7 -5 4+7")),
    "harmonica": gm(22, 62, 77, ("0+4*3 2+5 4+7*4", "4+7 2+5 0+4*5")),
    # strings
    "guitar": gm(25, 40, 52, STRUM, ring=True, strum=0.018),
    "electric guitar": gm(
        30, 40, 50, ("0+7+12*3 0+7+12 3+10+15*4", "0+7+12 0+7+12 5+12+17*2 3+10+15*4")
    ),
    "banjo": gm(105, 55, 67, ("0 12 7 4 12 0 7 12 " * 2, "12 7 4 12 0 4 12 7 " * 2), beat=0.125),
    "violin": gm(40, 64, 82, HELD, beat=0.3),
    "cello": gm(42, 38, 53, HELD, beat=0.3),
    "harp": gm(
        46,
        48,
        62,
        ("0 4 7 12 16 19 24 28 31 28 24 19 16 12", "31 28 24 19 16 12 7 4 0 4 7 12 16 19"),
        beat=0.1,
        ring=True,
    ),
    "sitar": gm(104, 48, 60, ("0*2 1 4*2 5 7*3", "7*2 5 4 1 0*4"), ring=True),
    "choir": gm(52, 50, 64, ("0+4+7+12*8", "0+4+7*4 0+5+9*4"), beat=0.28, skip=0.15),
    # brass and woodwind
    "trumpet": gm(56, 60, 74, ("0 0 0 4*2 7*6", "7 4 0 4 7*6", "0 4 7 12*7"), beat=0.18),
    "tuba": gm(58, 28, 40, ("0*2 7*2 0*2 7*2", "0*2 5*2 7*2 0*2")),
    "saxophone": gm(65, 55, 69, ("0 3 5 6 7 10*3", "10 7 6 5 3 0*3", "0*2 3 5*4")),
    "clarinet": gm(71, 50, 66, ("0 4 7 12 7 4 0*2", "12 7 4 0 4 7 12*2"), beat=0.22),
    "flute": gm(73, 72, 88, ("0 2 4 5 7*3", "7 5 4 2 0*3", "0*2 4 2 0*3"), beat=0.26),
    "bagpipes": gm(109, 60, 67, ("0*8", "0*2 2*2 4*4", "4*2 2*2 0*4")),
    # percussion
    "steel drum": gm(114, 60, 74, ("0 4 7 4 9 7 4*2", "7 9 7 4 0 4 7*2"), beat=0.22),
    "timpani": gm(47, 40, 52, (rolls("0", 15) + " 0*8", "0*6 7*2 7*2 0*8"), beat=0.09),
    "snare drum": kit(
        rolls("38", 15) + " 38*4 38*4",
        "38*4 38*2 38*2 38*4 38 38 38 38 38*4",
        rolls("40", 10) + " 40*4 40*4",
        beat=0.085,
    ),
    "bass drum": kit("36*2 36*2 36*2 36*2", "36*2 36 36 36*2 36*2", "35*4 35*4"),
    "cymbal": kit("49*8", "57*8", "49*4 49*4", ring=True),
    "tambourine": kit(rolls("54", 8), "54*2 54 54 54*2 54 54"),
    "cowbell": kit("56*2 56 56 56*2 56*2", "56 56 56*2 56 56 56*2"),
    "bongos": kit("60 60 61 60 60 61 60 " * 2, "60 61 61 60 61 61 60 " * 2, beat=0.14),
    "maracas": kit(rolls("70", 16), "70*2 70 70 " * 4, beat=0.125),
    "triangle": kit("81*8", "81*4 81*4", "80 80 81*6", ring=True),
    "drum kit": kit(
        "36+42 42 38+42 42 36+42 36+42 38+42 42", "36+42 42 38+42 36+42 42 36+42 38+42 46"
    ),
    "referee whistle": kit("72*3 72*3", "71 71 72*5", "72*7", beat=0.26),
    # General MIDI effects
    "bird": gm(123, 60, 80, ("0*2 . 2*2 . 0*2", "0*2 .*2 3*2 0*2", "2*2 0*2 . 2*2")),
    "telephone": gm(124, 55, 70, ("0*5 . 0*2", "0*4 .*2 0*2"), beat=0.26),
    "helicopter": gm(125, 55, 70, ("0*20",), skip=0.5),
    "applause": gm(126, 52, 68, ("0*20",), skip=0.6),
    "gunshot": gm(127, 50, 66, ("0*8", "0*4 0*4"), ring=True),
    "ocean wave": gm(122, 52, 68, ("0*24",), skip=1.2, swell=True),
}
RECORDED = {"tabla": Recorded(HITS, beat=0.45)}
# label | id of the picture of the same thing | synonyms | synonyms kept for tests
# Labels take "a" or "an" but for those in NO_ARTICLE.
NAMES = """
piano           | piano           | grand piano                    | pianoforte
music box       |                 |                                |
marimba         |                 |                                |
xylophone       |                 |                                |
church bell     | bell            | bell, tubular bells            |
church organ    |                 | pipe organ, organ              |
accordion       | accordion       | squeezebox                     | concertina
harmonica       |                 | mouth organ                    | blues harp
guitar          | guitar          | acoustic guitar                | six-string
electric guitar |                 | distorted guitar               |
banjo           | banjo           |                                |
violin          | violin          | fiddle                         |
cello           |                 | violoncello                    |
harp            |                 |                                |
sitar           |                 |                                |
choir           |                 | chorus                         |
trumpet         | trumpet         |                                |
tuba            |                 |                                |
saxophone       | saxophone       | sax                            |
clarinet        |                 |                                |
flute           | flute           |                                |
bagpipes        |                 | bagpipe                        |
steel drum      |                 | steelpan                       |
timpani         |                 | kettledrum                     |
snare drum      | drum            | drum, snare                    | side drum
bass drum       |                 | kick drum                      |
cymbal          |                 | crash cymbal                   |
tambourine      |                 |                                |
cowbell         |                 |                                |
bongos          |                 | bongo drums, bongo             |
maracas         | maracas         | maraca                         | rumba shakers
triangle        |                 |                                |
drum kit        |                 | drum set                       | rock drums
referee whistle |                 | whistle                        | pea whistle
bird            | bird            | songbird                       | birdsong
telephone       | telephone       | phone                          | landline
helicopter      | helicopter      | chopper                        | rotorcraft
applause        | clapping-hands  | clapping                       | ovation
gunshot         |                 | gun                            |
ocean wave      | wave            | wave, surf                     | breakers
tabla           |                 |                                |
siren           | siren           | police siren                   |
ambulance       | ambulance       |                                |
heartbeat       |                 | beating heart                  | pulse
alarm clock     | alarm-clock     | alarm                          |
ticking clock   |                 | tick-tock                      |
rain            | rain-cloud      | rainfall                       | rain shower
thunder         | thundercloud    | thunderclap                    | thunderstorm
wind            |                 | howling wind                   | gale
fire            | fire            | campfire                       | crackling flames
car horn        | car             | car                            | honking
ship horn       | ship            | ship, foghorn                  |
steam train     | steam-locomotive | steam locomotive, locomotive  | steam engine
water drop      | water-drop      | droplet                        | dripping water
owl             | owl             |                                | hooting
cricket         |                 |                                |
frog            | frog            |                                | croaking
bee             | bee             | honeybee                       | bumblebee
wolf            | wolf            |                                |
rattlesnake     | snake           | snake                          |
camera          | camera          | camera shutter                 |
knock on a door | door            | knocking, door                 |
ping pong ball  |                 | table tennis ball, ping pong   |
basketball      | basketball      |                                | bouncing ball
hammer          | hammer          | hammering                      |
hand saw        | saw             | saw, handsaw                   | sawing
rocket          | rocket          | rocket launch                  |
fireworks       | fireworks       | firework                       |
flying saucer   | flying-saucer   | ufo                            |
motorcycle      | motorcycle      | motorbike                      |
radio static    | radio           | radio                          |
video game      | game-controller | game controller, chiptune      |
cow             | cow             |                                | mooing
cat             | cat             |                                | meow
sheep           | sheep           |                                | bleating
duck            | duck            |                                | quacking
whale           | whale           |                                | whale song
chick           | chick           | baby chick                     |
bicycle bell    | bicycle         | bicycle, bike bell             |
robot           | robot           |                                | android
"""


def concepts() -> list[Concept]:
    """The rows of NAMES, each with the source of its sound."""
    sources = RENDERED | RECORDED | {k: Synthesised(make) for k, make in SYNTHESISED.items()}
    rows = [[cell.strip() for cell in row.split("|")] for row in NAMES.strip().splitlines()]
    if {row[0] for row in rows} != sources.keys():
        raise ValueError(f"names without sound or reverse: {sources.keys() ^ {r[0] for r in rows}}")
    return [
        Concept(label, sources[label], picture or None, names(synonyms), names(heldout))
        for label, picture, synonyms, heldout in rows
    ]


def names(cell: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in cell.split(",") if name.strip())


def check_names(found: list[Concept]) -> None:
    """Every label or synonym names one concept: the longest whole-word match decides."""
    owner: dict[str, str] = {}
    for concept in found:
        for name in (concept.label, *concept.synonyms, *concept.heldout_synonyms):
            if owner.setdefault(name.lower(), concept.id) != concept.id:
                raise ValueError(f"'{name}' names both {owner[name.lower()]} and {concept.id}")
    for name, concept_id in owner.items():
        if named_concept(name, owner) != {concept_id}:
            raise ValueError(f"'{name}' is read as {named_concept(name, owner)}, not {concept_id}")


def named_concept(text: str, owner: dict[str, str]) -> set[str]:
    """Ids named in `text`, longest names first; a name inside a longer one does not count."""
    text, found = text.lower(), set()
    for name in sorted(owner, key=len, reverse=True):
        pattern = rf"(?<![\w-]){re.escape(name)}(?![\w-])"
        if re.search(pattern, text):
            found.add(owner[name])
            text = re.sub(pattern, "|", text)
    return found

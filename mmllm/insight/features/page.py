"""The page of features: what makes each of them active in every modality, side by side, what it
raises, and what the model makes under it. One HTML file, which asks no other host."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mmllm.gallery import page_html
from mmllm.insight.features.changes import FeatureChange

NAMES = {
    "image": "Pictures",
    "audio": "Sounds",
    "video": "Clips",
    "signal": "Made media",
    "text": "Words",
}
"""Kind of position -> heading of its column."""
_HUES = {"image": 217, "audio": 28, "video": 158, "signal": 338, "text": 265}

STYLE = """
body{max-width:1240px}
.lead{max-width:46rem}.lead p{margin:.5rem 0}
.tools{position:sticky;top:0;z-index:5;background:var(--page);padding:.6rem 0;display:flex;
gap:.5rem;flex-wrap:wrap;align-items:center}
.tools input{font:inherit;flex:1 1 14rem;min-width:0;max-width:24rem;padding:.45rem .8rem;
border:1px solid var(--line);border-radius:999px;background:var(--card);color:inherit}
.key{display:inline-flex;align-items:center;gap:.35rem;font-size:13px;color:var(--quiet)}
.dot{width:.6rem;height:.6rem;border-radius:50%;background:hsl(var(--h) 70% 55%)}
.feature{padding:1rem 1.1rem 1.1rem;scroll-margin-top:4rem}
.feature header{display:flex;flex-wrap:wrap;align-items:baseline;gap:.2rem .8rem}
.feature h2{margin:0;font-size:1.3rem;letter-spacing:-.01em}
.number{font-size:13px;color:var(--quiet);font-variant-numeric:tabular-nums}
.spread{display:flex;gap:2px;margin-left:auto;align-items:flex-end;height:1.7rem}
.spread i{width:.55rem;border-radius:2px 2px 0 0;background:hsl(var(--h) 70% 55%);min-height:2px}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(14rem,1fr));gap:1.1rem 1.4rem;
margin-top:.9rem}
.columns section{border-top:3px solid hsl(var(--h) 70% 55%);padding-top:.5rem;min-width:0}
.columns section.wide{grid-column:1/-1;columns:24rem;column-gap:1.4rem}
.wide h3{column-span:all}
.columns h3,.effects h3{margin:0 0 .5rem;font-size:12px;font-weight:600;letter-spacing:.06em;
text-transform:uppercase;color:var(--quiet);display:flex;justify-content:space-between}
.columns h3 small{font-weight:400;letter-spacing:0;text-transform:none}
.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:.4rem}
.tile{position:relative;border-radius:8px;overflow:hidden;background:#8882;aspect-ratio:1;margin:0}
.tile .zoom{width:100%;height:100%}
.tile img{width:100%;height:100%;object-fit:cover;display:block;border-radius:0}
.meter{position:absolute;left:0;bottom:0;height:3px;background:hsl(var(--h) 75% 55%)}
.sound{all:unset;cursor:pointer;display:block;width:100%;position:relative;
border-radius:8px;overflow:hidden;
margin-bottom:.4rem;height:2.9rem;background:#8882}
.sound img{width:100%;height:100%;object-fit:fill;display:block;opacity:.9}
.sound b{position:absolute;left:.5rem;top:50%;translate:0 -50%;width:1.5rem;height:1.5rem;
border-radius:50%;background:#fffd;color:#222;display:grid;place-items:center;font-size:10px}
.sound span{position:absolute;right:.5rem;bottom:.25rem;color:#fff;font-size:12px;
text-shadow:0 0 4px #000,0 0 2px #000}
.sound em{position:absolute;top:0;bottom:0;left:0;width:2px;background:#fff;opacity:0}
.sound.on em{opacity:1}.sound:focus-visible{outline:2px solid #4a6cf7}
.sentence{margin:0 0 .45rem;break-inside:avoid;padding:.3rem .5rem;border-radius:8px;
background:#8881;font-size:14px;
line-height:1.55;overflow-wrap:anywhere}
.sentence mark{color:inherit;border-radius:4px;padding:.08em 0;
background:hsl(var(--h) 80% 60%/var(--a))}
.effects{display:flex;flex-wrap:wrap;gap:.9rem 2rem;margin-top:1rem;padding-top:.8rem;
border-top:1px solid var(--line)}
.effects>div{min-width:0}
.chips{display:flex;flex-wrap:wrap;gap:.3rem;max-width:34rem}
.chip{font-size:13px;padding:.12rem .55rem;border-radius:999px;background:#8882;white-space:pre}
a.chip{text-decoration:none;color:inherit}a.chip:hover{background:#8884}
.pairs{display:flex;gap:.7rem;flex-wrap:wrap}.pairs figure{margin:0;width:5.2rem}
.pairs img{width:5.2rem;height:5.2rem;object-fit:cover;border-radius:8px}
.pairs figcaption{font-size:12px;line-height:1.3;margin-top:.2rem}
.scores{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}
.scores th,.scores td{text-align:left;padding:.3rem .9rem .3rem 0;font-weight:400;
border-bottom:1px solid var(--line);font-size:14px}
.scores thead th{color:var(--quiet);font-size:12px}
.scores b{display:block;height:4px;border-radius:2px;margin-top:3px;width:calc(var(--v)*5.5rem);
background:hsl(var(--h) 70% 55%)}
.scores tr:not(:first-child) b{opacity:.45}.scores tr:first-child{font-weight:600}
.scores.changes td{white-space:nowrap;font-weight:400}.scores.changes tr b{opacity:1;min-width:1px}
.scores.changes tr b:first-of-type{opacity:.35}
@media (max-width:40rem){.columns{grid-template-columns:1fr}.columns section.wide{columns:auto}
.spread{display:none}.feature{padding:.8rem}.tools .key{display:none}}
"""

_SCRIPT = """
let now=null;
function stop(){if(!now)return;now.a.pause();now.b.classList.remove('on');now=null}
addEventListener('click',e=>{const b=e.target.closest('.sound');if(!b)return;
const same=now&&now.b===b;stop();if(same)return;
const a=new Audio(b.dataset.audio),line=b.querySelector('em');now={a,b};b.classList.add('on');
a.onended=stop;a.play();
(function move(){if(!now||now.a!==a)return;
line.style.left=100*a.currentTime/(a.duration||1)+'%';requestAnimationFrame(move)})()});
const find=document.getElementById('find');
find?.addEventListener('input',()=>{const words=find.value.toLowerCase().split(/\\s+/);
document.querySelectorAll('.feature').forEach(f=>{
f.hidden=!words.every(w=>f.dataset.words.includes(w))})});
"""


@dataclass(frozen=True)
class ShownMedium:
    """A medium that makes a feature active, or is made under it.

    Attributes:
        modality: of the medium.
        uri: data: URI of its file.
        caption: what it shows.
        strength: activation, relative to the feature's largest one.
        spectrogram: data: URI of an image of a sound.
    """

    modality: str
    uri: str
    caption: str = ""
    strength: float = 1.0
    spectrogram: str = ""


@dataclass(frozen=True)
class FeatureCard:
    """One feature of the page.

    Attributes:
        feature: its number.
        title: a word for it: the concept or token of most of its strongest positions.
        density: share of positions at which it is active.
        by_kind: the same for each kind of position.
        media: kind -> the media at which it is most active, from the strongest.
        sentences: texts at which it is most active: (piece, activation relative to the largest).
        raises: tokens that it makes more probable.
        lowers: tokens that it makes less probable.
        made: what the model makes with and without it.
        neighbours: other features and their cosines.
        note: a line below the title.
    """

    feature: int
    title: str
    density: float
    by_kind: Mapping[str, float]
    media: Mapping[str, Sequence[ShownMedium]] = field(default_factory=dict)
    sentences: Sequence[Sequence[tuple[str, float]]] = ()
    raises: Sequence[str] = ()
    lowers: Sequence[str] = ()
    made: Sequence[ShownMedium] = ()
    neighbours: Sequence[tuple[int, float]] = ()
    note: str = ""


def features_html(
    title: str,
    cards: Sequence[FeatureCard],
    *,
    intro: str = "",
    scores: Mapping[str, Mapping[str, float]] | None = None,
    changes: Sequence[FeatureChange] = (),
) -> str:
    """Return the page of some features.

    Args:
        title: of the page.
        cards: the features, in order.
        intro: a paragraph below the title.
        scores: method -> kind of position -> variance explained; the dictionary's own first.
        changes: what the adapters changed of some features.
    """
    shown = {card.feature for card in cards}
    keys = "".join(
        f'<span class="key" style="--h:{hue}"><i class="dot"></i>{NAMES[kind]}</span>'
        for kind, hue in _HUES.items()
    )
    tools = (
        '<div class="tools"><input id="find" type="search" placeholder="Find a feature" '
        f'aria-label="Find a feature">{keys}</div>'
    )
    body = f"<style>{STYLE}</style>{_scores(scores or {})}{_changes(changes, cards)}{tools}"
    body += "".join(_card(card, shown) for card in cards)
    return page_html(title, f"{body}<script>{_SCRIPT}</script>", intro)


def _scores(scores: Mapping[str, Mapping[str, float]]) -> str:
    """The table of variance explained, with bars."""
    if not scores:
        return ""
    kinds = [kind for kind in _HUES if any(kind in row for row in scores.values())]
    head = "".join(f"<th>{NAMES[kind]}</th>" for kind in kinds)
    rows = ""
    for name, row in scores.items():
        cells = "".join(
            f'<td style="--h:{_HUES[kind]};--v:{max(row[kind], 0):.3f}">{row[kind]:.2f}<b></b></td>'
            if kind in row
            else "<td></td>"
            for kind in kinds
        )
        rows += f"<tr><td>{html.escape(name)}</td>{cells}</tr>"
    return (
        '<div class="scroll" tabindex="0"><table class="scores"><thead><tr>'
        f"<th>Variance explained</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _changes(changes: Sequence[FeatureChange], cards: Sequence[FeatureCard]) -> str:
    """The table of features with and without the adapters, with bars: how often they are active."""
    if not changes:
        return ""
    titles = {card.feature: card.title for card in cards}
    kinds = [kind for kind in _HUES if kind in changes[0].density]
    head = "".join(f"<th>{NAMES[kind]}</th>" for kind in kinds)
    rows = ""
    for change in changes:
        title = html.escape(titles.get(change.feature, "feature"))
        cells = "".join(_change(kind, *change.density[kind]) for kind in kinds)
        link = f'<a href="#f{change.feature}">{title}</a>'
        rows += f'<tr><td>{link} <span class="number">{change.feature}</span></td>{cells}</tr>'
    return (
        "<h2>What the adapters changed</h2>"
        '<p class="quiet">The features whose mean activation differs most between the model with '
        "its adapters and without them: at how many positions each is active, without (pale) and "
        "with.</p>"
        '<div class="scroll" tabindex="0"><table class="scores changes"><thead><tr>'
        f"<th>Feature</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _change(kind: str, before: float, after: float) -> str:
    bars = "".join(f'<b style="--v:{min(share, 1):.3f}"></b>' for share in (before, after))
    text = f"{_percent(before)} → {_percent(after)}"
    return f'<td style="--h:{_HUES[kind]}">{text}{bars}</td>'


def _card(card: FeatureCard, shown: set[int]) -> str:
    columns = "".join(_column(card, kind) for kind in _HUES)
    words = html.escape(" ".join([card.title, str(card.feature), *card.raises]).lower())
    note = f'<span class="number">{html.escape(card.note)}</span>' if card.note else ""
    return (
        f'<article class="feature" id="f{card.feature}" data-words="{words}"><header>'
        f"<h2>{html.escape(card.title)}</h2>"
        f'<span class="number">feature {card.feature} · active at {_percent(card.density)} of all '
        f"positions</span>{note}{_spread(card.by_kind)}</header>"
        f'<div class="columns">{columns}</div>{_effects(card, shown)}</article>'
    )


def _spread(by_kind: Mapping[str, float]) -> str:
    """How often the feature is active at each kind of position, as bars."""
    top = max(by_kind.values(), default=0) or 1
    bars = "".join(
        f'<i style="--h:{_HUES[kind]};height:{100 * by_kind[kind] / top:.0f}%" '
        f'title="{NAMES[kind]}: {_percent(by_kind[kind])}"></i>'
        for kind in _HUES
        if kind in by_kind
    )
    return f'<div class="spread" role="img" aria-label="how often by kind">{bars}</div>'


def _column(card: FeatureCard, kind: str) -> str:
    media = card.media.get(kind, ())
    if kind == "text":
        content = "".join(map(_sentence, card.sentences))
    elif kind == "audio":
        content = "".join(map(_sound, media))
    else:
        sounds = "".join(_sound(medium) for medium in media if medium.modality == "audio")
        tiles = "".join(_tile(medium) for medium in media if medium.modality != "audio")
        content = (f'<div class="tiles">{tiles}</div>' if tiles else "") + sounds
    if not content:
        return ""
    share = f"<small>{_percent(card.by_kind.get(kind, 0))}</small>"
    return (
        f'<section style="--h:{_HUES[kind]}"{" class=wide" if kind == "text" else ""}>'
        f"<h3>{NAMES[kind]}{share}</h3>{content}</section>"
    )


def _tile(medium: ShownMedium) -> str:
    caption = html.escape(medium.caption, quote=True)
    return (
        f'<figure class="tile" title="{caption}"><button type="button" class="zoom" '
        f'aria-label="Enlarge"><img src="{medium.uri}" alt="{caption}" loading="lazy"></button>'
        f'<span class="meter" style="width:{100 * medium.strength:.0f}%"></span></figure>'
    )


def _sound(medium: ShownMedium) -> str:
    caption = html.escape(medium.caption, quote=True)
    return (
        f'<button type="button" class="sound" data-audio="{medium.uri}" '
        f'aria-label="Play: {caption}"><img src="{medium.spectrogram}" alt="spectrogram">'
        f"<em></em><b>▶</b><span>{caption}</span>"
        f'<i class="meter" style="width:{100 * medium.strength:.0f}%"></i></button>'
    )


def _sentence(pieces: Sequence[tuple[str, float]]) -> str:
    text = "".join(
        f'<mark style="--a:{min(strength, 1):.2f}">{html.escape(piece)}</mark>'
        if strength > 0.01
        else html.escape(piece)
        for piece, strength in pieces
    )
    return f'<p class="sentence">{text}</p>'


def _effects(card: FeatureCard, shown: set[int]) -> str:
    """What the feature does: tokens, media, and which features point the same way."""
    parts = []
    if card.made:
        figures = "".join(map(_made, card.made))
        parts.append(
            f'<div><h3>Under it the model makes</h3><div class="pairs">{figures}</div></div>'
        )
    for name, tokens in (("Makes more probable", card.raises), ("Less probable", card.lowers)):
        if tokens:
            chips = "".join(
                f'<span class="chip">{html.escape(token.strip() or repr(token))}</span>'
                for token in tokens
            )
            parts.append(f'<div><h3>{name}</h3><div class="chips">{chips}</div></div>')
    near = [
        f'<a class="chip" href="#f{other}">{other} · {cosine:.2f}</a>'
        if other in shown
        else f'<span class="chip">{other} · {cosine:.2f}</span>'
        for other, cosine in card.neighbours
    ]
    if near:
        parts.append(f'<div><h3>Near it</h3><div class="chips">{"".join(near)}</div></div>')
    return f'<div class="effects">{"".join(parts)}</div>' if parts else ""


def _made(medium: ShownMedium) -> str:
    caption = html.escape(medium.caption)
    if medium.modality == "audio":
        return f"<figure style='width:10rem'>{_sound(medium)}</figure>"
    return (
        f'<figure><img src="{medium.uri}" alt="{caption}" loading="lazy">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share else "none"

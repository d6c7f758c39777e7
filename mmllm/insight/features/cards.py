"""Gathers what the page shows of a feature: the media and words at which it is most active, the
tokens that it makes more probable, and the features that point the same way.

Legend: N positions, D width, F features, V text vocabulary, O outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from PIL import Image as PILImage

from mmllm.conversation import Audio, Image, Medium, Video
from mmllm.data.protocol import FeatureProvider
from mmllm.gallery import spectrogram
from mmllm.insight.collecting import piece_of, states_of
from mmllm.insight.data_uris import data_uri, webp_uri
from mmllm.insight.dictionary.autoencoder import SparseAutoencoder
from mmllm.insight.features.activity import FeatureActivity, shared_concepts
from mmllm.insight.features.page import FeatureCard, ShownMedium
from mmllm.model import AnyToAny

_MEDIA = {"image": 8, "audio": 3, "video": 4, "signal": 4}
"""Kind of position -> media shown at most."""
_SENTENCES = 4
_TOKENS = 8
"""Tokens shown that a feature makes more probable."""
_AROUND = 14
"""Tokens shown to either side of the strongest one."""
_SIDE = 112
"""Pixels of pictures and frames on the page."""
_FRAMES = 12
_MIN_SHARE = 0.5
"""Share of the strongest positions that have to be of one concept."""


def choose_features(activity: FeatureActivity, num: int) -> list[int]:
    """Features worth looking at: first those that stand for the same concept at most kinds of
    positions, one for each concept; then those that are most often active.

    Args:
        activity: of the dictionary.
        num: how many.
    """
    scored = []
    for feature, by_kind in enumerate(shared_concepts(activity)):
        votes: dict[str, float] = {}
        for concept, share in by_kind.values():
            votes[concept] = votes.get(concept, 0.0) + (share if share >= _MIN_SHARE else 0.0)
        if votes:
            concept = max(votes, key=lambda name: votes[name])
            scored.append((votes[concept], feature, concept))
    chosen, seen = [], set()
    for score, feature, concept in sorted(scored, key=lambda entry: (-entry[0], entry[1])):
        if concept not in seen and score > 0 and len(chosen) < num:
            seen.add(concept)
            chosen.append(feature)
    often = sorted(range(activity.width), key=activity.density, reverse=True)
    rest = [feature for feature in often if feature not in set(chosen)]
    return chosen + rest[: num - len(chosen)]


class CardMaker:
    """Makes the cards of a dictionary's features.

    Args:
        model: the model that the dictionary is of.
        dictionary: the dictionary.
        activity: where its features are active.
        provider: gives the encoders' outputs.
    """

    def __init__(
        self,
        model: AnyToAny,
        dictionary: SparseAutoencoder,
        activity: FeatureActivity,
        provider: FeatureProvider,
    ):
        self.model, self.dictionary = model, dictionary
        self.activity, self.provider = activity, provider

    def card(self, feature: int, made: Sequence[ShownMedium] = ()) -> FeatureCard:
        """What the page shows of a feature.

        Args:
            feature: its number.
            made: what the model makes with and without it.
        """
        activity = self.activity
        top = max(float(activity.of(feature)[1][:1].sum()), 1e-9)
        media = {
            kind: shown
            for kind, num in _MEDIA.items()
            if (shown := self._media(feature, kind, num, top))
        }
        raises, lowers = self.logits(feature)
        return FeatureCard(
            feature=feature,
            title=self.title(feature),
            density=activity.density(feature),
            by_kind=activity.density_by_kind(feature),
            media=media,
            sentences=self._sentences(feature, top),
            raises=raises,
            lowers=lowers,
            made=made,
            neighbours=self.neighbours(feature),
        )

    def title(self, feature: int) -> str:
        """The concept of most of its strongest positions, or the token."""
        acts = self.activity.acts
        rows = self.activity.of(feature)[0][:24]
        concepts = [int(acts.concepts[row]) for row in rows]
        named = Counter(acts.concept_names[number] for number in concepts if number >= 0)
        if named and named.most_common(1)[0][1] >= _MIN_SHARE * len(rows):
            return named.most_common(1)[0][0].replace("-", " ")
        pieces = Counter(piece_of(self.model, int(acts.tokens[row])).strip() for row in rows)
        words = [piece for piece, _ in pieces.most_common(3) if piece]
        return " / ".join(words) or "unnamed"

    @torch.inference_mode()
    def logits(self, feature: int) -> tuple[list[str], list[str]]:
        """Tokens whose logits the feature's direction raises and lowers most, read through the last
        norm's weight and the head (logit lens, nostalgebraist 2020)."""
        llm = self.model.llm
        direction = self.dictionary.direction(feature)
        weight = getattr(getattr(llm.backbone, "norm", None), "weight", None)
        if weight is None or len(weight) != len(direction):
            return [], []
        state = (direction.to(weight) * weight)[None]
        values = llm.head(state)[0].float()
        order = values.argsort(descending=True).tolist()
        return self._tokens(order[:_TOKENS]), self._tokens(order[-_TOKENS // 2 :][::-1])

    def neighbours(self, feature: int, num: int = 4) -> list[tuple[int, float]]:
        """The features whose directions are nearest, and their cosines.

        Args:
            feature: its number.
            num: how many.
        """
        cosines = self.dictionary.W_dec @ self.dictionary.direction(feature)
        cosines[feature] = -1
        values, numbers = cosines.topk(min(num, len(cosines) - 1))
        return list(zip(numbers.tolist(), values.tolist(), strict=True))

    def _tokens(self, indices: Sequence[int]) -> list[str]:
        """Names of logits: text tokens, or the modality whose signal span one begins."""
        tokens = self.model.llm.tokens
        return [
            piece_of(self.model, index)
            if (output := tokens.output_of_logit(index)) is None
            else f"[make {output}]"
            for index in indices
        ]

    def _media(self, feature: int, kind: str, num: int, top: float) -> list[ShownMedium]:
        shown = []
        for row, value in self.activity.strongest(feature, kind, num):
            medium = self.activity.acts.medium(row)
            if medium is not None and medium.has_data:
                concept = int(self.activity.acts.concepts[row])
                name = self.activity.acts.concept_names[concept] if concept >= 0 else ""
                caption = medium.caption or name.replace("-", " ")
                shown.append(shown_medium(medium, caption, value / top))
        return shown

    def _sentences(self, feature: int, top: float) -> list[list[tuple[str, float]]]:
        """The texts at which the feature is most active, with its activation at every token."""
        acts = self.activity.acts
        sentences = []
        for row, _ in self.activity.strongest(feature, "text", _SENTENCES):
            conversation = acts.conversations[int(acts.items[row])]
            states = states_of(self.model, [conversation], self.provider, [acts.site])
            states = states[acts.site][0]
            values = self.dictionary.encode(states)[:, feature]
            values[states.float().norm(dim=-1) > acts.max_norm] = 0
            at = int(acts.positions[row])
            first, last = max(0, at - _AROUND), min(len(conversation), at + _AROUND)
            sentences.append(
                [
                    (self._piece(conversation.ids[index]), float(values[index]) / top)
                    for index in range(first, last)
                ]
            )
        return sentences

    def _piece(self, token: int) -> str:
        tokens = self.model.llm.tokens
        if token >= tokens.vocab_size:
            return "▣" if tokens.output_of_first_id(token) or token >= tokens.placeholder_id else ""
        piece = piece_of(self.model, token)
        special = self.model.llm.tokenizer.all_special_tokens
        return " · " if piece in special else piece.replace("\n", " ")


def shown_medium(medium: Medium, caption: str, strength: float = 1.0) -> ShownMedium:
    """A medium as the page holds it: small, in data: URIs.

    Args:
        medium: with data.
        caption: what it shows.
        strength: activation, relative to the feature's largest one.

    Raises:
        MediaError: it cannot be read.
    """
    if isinstance(medium, Audio):
        audio = medium.resample(16_000)
        picture = webp_uri([spectrogram(audio).to_pil().resize((320, 64))])
        uri = data_uri("audio/ogg", audio.to_bytes("ogg"))
        return ShownMedium("audio", uri, caption, strength, picture)
    if isinstance(medium, Video):
        frames = medium.to_pil()
        frames = frames[:: max(1, -(-len(frames) // _FRAMES))]
    else:
        assert isinstance(medium, Image)
        frames = [medium.to_pil()]
    small = [_thumbnail(frame) for frame in frames]
    return ShownMedium(medium.modality, webp_uri(small), caption, strength)


def _thumbnail(picture: PILImage.Image) -> PILImage.Image:
    picture = picture.convert("RGB")
    picture.thumbnail((_SIDE, _SIDE), PILImage.Resampling.LANCZOS)
    return picture

"""Prompts that ask for text in an image, such as `a shop sign that says "OPEN DAILY"`: the prompt source `ocr`.

A text has one to four words, the four lengths are equally likely. Of each length a sixth of the texts, at most 512, is
kept for development and as many for evaluation: no text is in two splits, whatever its case. Single words are in texts
of several splits: what is held out is the text, not its words. Sentences are drawn anew for every prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from runners.prompts import Prompt, halves

FAMILIES = ("one_word", "two_words", "three_words", "four_words")
HELD_OUT = 512  # texts of a family in each held-out split, at most

_ADJECTIVES = (
    "amber ancient bright broken copper crimson distant early electric emerald endless frozen gentle golden grand "
    "happy hidden honest humble iron ivory jolly little lucky marble mighty modern mystic noble northern paper "
    "perfect purple quiet rapid royal rustic sacred scarlet secret silent silver simple southern stormy sunny sweet "
    "velvet vintage violet wandering warm western whispering wild wooden"
)
_NOUNS = (
    "anchor apple arrow bakery bridge candle canyon castle circus clock coffee comet compass cottage dragon eagle "
    "engine feather forest fountain galaxy garden ginger guitar hammer harbor honey island journey kettle kitchen "
    "ladder lantern lemon library lion market meadow mirror mountain ocean orchard palace parade pepper piano "
    "pirate planet pumpkin rabbit river rocket saddle shadow station sunset temple thunder tiger tower tunnel "
    "turtle valley village volcano walnut whistle window winter wizard"
)
_ENDINGS = (
    "club festival museum sale tour society records workshop theatre hotel express academy 7 12 24 66 101 360 500 "
    "1984 1999 2024 2049"
)
_OPENINGS = ("welcome to", "beware of", "home of", "return to", "the last", "made with", "mind the", "enjoy our")
_CASES = (str.upper, str.title, str.lower)

_CARRIERS = (
    'a shop sign that says "{}"',
    'a neon sign above a door that reads "{}"',
    'a street poster with the headline "{}"',
    'a book cover with the title "{}"',
    'a coffee mug printed with the words "{}"',
    'a chalkboard on which somebody wrote "{}"',
    'a wooden board with "{}" carved into it',
    'a birthday cake with "{}" written in icing',
    'a road sign that reads "{}"',
    'a T-shirt with the slogan "{}"',
    'a movie poster titled "{}"',
    'a brick wall with the graffiti "{}"',
    'a newspaper with the headline "{}"',
    'a smartphone screen showing the message "{}"',
    'a museum plaque engraved with "{}"',
    'a cereal box labelled "{}"',
    'a banner across a street that says "{}"',
    'an old map with the inscription "{}"',
    'a train station display that shows "{}"',
    'a postage stamp with the words "{}"',
    'a wine bottle whose label says "{}"',
    'a robot holding a card with "{}" on it',
    'a hot air balloon with "{}" painted on its side',
    'a letter sealed with wax that begins with "{}"',
)
_SETTINGS = (
    "",
    ", close up",
    ", at dusk",
    ", in heavy rain",
    ", in soft morning light",
    ", photographed from the side",
    ", as a watercolor painting",
    ", in a cartoon style",
    ", against a blurred background",
    ", on a snowy day",
)


class OCRPrompts:
    """The prompt source `ocr`: see the module's first lines for the three splits."""

    identity: ClassVar[str] = "ocr-1"  # to be counted up with every change of what is drawn

    def __init__(self) -> None:
        order = np.random.default_rng(0)
        self._splits: dict[str, dict[str, list[str]]] = {"train": {}, "development": {}, "evaluation": {}}
        for tag, texts in all_texts().items():
            shuffled = [texts[i] for i in order.permutation(len(texts))]
            held_out = min(len(texts) // 6, HELD_OUT)
            self._splits["development"][tag] = shuffled[:held_out]
            self._splits["evaluation"][tag] = shuffled[held_out : 2 * held_out]
            self._splits["train"][tag] = shuffled[2 * held_out :]

    def texts(self, split: str) -> Mapping[str, list[str]]:
        """The texts of a split by family, in lower case."""
        return self._splits[split]

    def train(self, num_prompts: int, generator: np.random.Generator) -> list[Prompt]:
        """`num_prompts` prompts: every length as often as the others (to within one), then uniform inside it."""
        offset = generator.integers(len(FAMILIES))  # a remainder does not always favour the same lengths
        chosen = generator.permuted((np.arange(num_prompts) + offset) % len(FAMILIES))
        families = self._splits["train"]
        texts = [(tag, families[tag][generator.integers(len(families[tag]))]) for tag in (FAMILIES[i] for i in chosen)]
        return [_sentence(tag, text, generator) for tag, text in texts]

    def fixed(self, split: str, num_prompts: int) -> list[Prompt]:
        """The lengths in turn; where a length has no more texts, they come again in other sentences."""
        generator = np.random.default_rng({"development": 1, "evaluation": 2, "all": 3}[split])
        families = [(tag, self._splits[half][tag]) for half in halves(split) for tag in FAMILIES]
        turns = [divmod(i, len(families)) for i in range(num_prompts)]
        chosen = [(*families[family], turn) for turn, family in turns]
        return [_sentence(tag, texts[turn % len(texts)], generator) for tag, texts, turn in chosen]


def all_texts() -> dict[str, list[str]]:
    """Every text by the number of its words, in lower case, in a fixed order."""
    pairs = [f"{adjective} {noun}" for adjective, noun in itertools.product(_ADJECTIVES.split(), _NOUNS.split())]
    return {
        "one_word": f"{_ADJECTIVES} {_NOUNS}".split(),
        "two_words": pairs,
        "three_words": [f"{pair} {ending}" for pair, ending in itertools.product(pairs, _ENDINGS.split())],
        "four_words": [f"{opening} {pair}" for opening, pair in itertools.product(_OPENINGS, pairs)],
    }


def _sentence(tag: str, text: str, generator: np.random.Generator) -> Prompt:
    carrier, setting = (options[generator.integers(len(options))] for options in (_CARRIERS, _SETTINGS))
    written = _CASES[generator.integers(len(_CASES))](text)
    return Prompt(text=carrier.format(written) + setting, tag=tag)

"""How well text that was read in an image fits the text that its prompt asks for; the OCR reward's rule."""

from __future__ import annotations

from rapidfuzz.distance import Levenshtein


def quoted(prompt: str) -> str:
    """The text between the first pair of double quotes of a prompt; empty where there is none."""
    return prompt.split('"')[1] if prompt.count('"') >= 2 else ""


def text_score(target: str, read: str) -> float:
    """1 - min(d, n) / n, d the Levenshtein distance to a target of n characters, without spaces and case.

    A target that is part of what was read scores 1. Raises ValueError for a target without characters, which asks for
    nothing; the released rule divides by 0 there. Source: Flow-GRPO's ocr.py.
    """
    wanted, found = ("".join(text.split()).lower() for text in (target, read))
    if not wanted:
        raise ValueError(f"got {target!r} as a target, expected at least one character")
    distance = 0 if wanted in found else Levenshtein.distance(found, wanted)
    return 1 - min(distance, len(wanted)) / len(wanted)

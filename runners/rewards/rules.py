"""GenEval's rules over a list of detections, whichever detector found them.

Source: Ghosh et al. 2023 (arXiv 2310.11513), `evaluate_images.py`; partial credit as in the training reward of
Flow-GRPO and DiffusionNFT, with two repairs: every term is at least 0, and a violated position does not also earn
the satisfied term. `released` takes both back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runners.prompts import Prompt, Requirement

POSITION_DEAD_BAND = 0.1  # of the two boxes' summed size


@dataclass(frozen=True, kw_only=True)
class Detection:
    """One object found in an image: `box` is (left, top, right, bottom) in pixels, y downwards."""

    cls: str
    color: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`accurate`: every requirement met exactly. `score`: mean partial credit in [0, 1]. `reasons`: what is wrong."""

    accurate: bool
    score: float
    reasons: tuple[str, ...] = ()


def relations(a: Detection, b: Detection) -> set[str]:
    """Where `a` stands relative to `b`: centre offset beyond a dead band, direction cosine above one half.

    Two relations can hold at once (a diagonal offset), as in GenEval.
    """
    offset, shrunk = [], []
    for low, high in ((0, 2), (1, 3)):
        d = (a.box[low] + a.box[high] - b.box[low] - b.box[high]) / 2
        band = POSITION_DEAD_BAND * (a.box[high] - a.box[low] + b.box[high] - b.box[low])
        offset.append(d)
        shrunk.append(max(abs(d) - band, 0.0) * (1 if d > 0 else -1))
    norm = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    if norm == 0:
        return set()
    dx, dy = shrunk[0] / norm, shrunk[1] / norm
    held = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, holds in held.items() if holds}


def verdict(detections: Sequence[Detection], prompt: Prompt, *, released: bool = False) -> Verdict:
    """Whether the detections fulfil the prompt. Objects that no requirement names are ignored, as in GenEval.

    A violated `exclude` makes an image inaccurate and leaves its score alone, as in GenEval and its training reward.
    Only its class and its count are looked at, as in GenEval's released code.
    With `released`, the score is that of the released training reward: the term of a count can be negative, a violated
    position also earns the satisfied term, a wrong count costs one further term and not two where colour and position
    are asked for, and what has a wrong colour or place has no place and is none for others.
    """
    terms: list[float] = []
    reasons: list[str] = []
    matched: list[list[Detection] | None] = []
    for requirement in prompt.include:
        wanted, count = requirement.cls, requirement.count
        found = [d for d in detections if d.cls == wanted]
        term = 1 - abs(count - len(found)) / count
        terms.append(term if released else max(0.0, term))
        if len(found) != count:
            reasons.append(f"expected {wanted}={count}, found {len(found)}")
            missed = (requirement.color is not None) + (requirement.position is not None)
            terms += [0.0] * (min(missed, 1) if released else missed)
            matched.append(None)
            continue
        right = True
        if requirement.color is not None:
            num_right = sum(d.color == requirement.color for d in found)
            terms.append(1 - (count - num_right) / count)
            if num_right != count:
                right = False
                colors = ", ".join(d.color for d in found)
                reasons.append(f"expected {requirement.color} {wanted}={count}, found {colors}")
        if requirement.position is not None and (right or not released):
            relation, target = requirement.position
            others = matched[target]
            right = others is not None and _placed(found, others, relation)
            if right:
                terms.append(1.0)
            elif others is None:
                reasons.append(f"no {prompt.include[target].cls} to be {relation}")
                terms.append(0.0)
            else:
                reasons.append(f"expected {wanted} {relation} {prompt.include[target].cls}")
                terms += [0.0, 1.0] if released else [0.0]
        matched.append(found if right or not released else None)
    reasons += [f"expected {r.cls}<{r.count}, found {found}" for r, found in _too_many(detections, prompt)]
    score = sum(terms) / len(terms) if terms else 0.0
    return Verdict(accurate=bool(terms) and not reasons, score=score, reasons=tuple(reasons))


def correct(detections: Sequence[Detection], prompt: Prompt) -> bool:
    """GenEval's own measure, the released `evaluate`: more objects than asked for are no error, unless excluded.

    Of each class the first `count` detections are looked at, so they must be in order of confidence.
    """
    matched: list[list[Detection] | None] = []
    for requirement in prompt.include:
        found = [d for d in detections if d.cls == requirement.cls][: requirement.count]
        holds = len(found) == requirement.count
        if holds and requirement.color is not None:
            holds = all(d.color == requirement.color for d in found)
        if holds and requirement.position is not None:
            relation, target = requirement.position
            others = matched[target]
            holds = others is not None and _placed(found, others, relation)
        matched.append(found if holds else None)
    return None not in matched and not _too_many(detections, prompt)


def _too_many(detections: Sequence[Detection], prompt: Prompt) -> list[tuple[Requirement, int]]:
    """What a prompt excludes and the image shows, and how many of it; of whatever colour and place."""
    counted = [(unwanted, sum(d.cls == unwanted.cls for d in detections)) for unwanted in prompt.exclude]
    return [(unwanted, found) for unwanted, found in counted if found >= unwanted.count]


def _placed(found: Sequence[Detection], others: Sequence[Detection], relation: str) -> bool:
    return all(relation in relations(a, b) for a in found for b in others)

"""Reward `geneval-hf`: GenEval's rules over what Mask2Former finds and which colours CLIP sees, without mmdet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ablate.source import nearest
from runners.geneval_prompts import CLASSES
from runners.prompts import Prompt, Requirement
from runners.rewards.clip_files import MODEL, clip_weights
from runners.rewards.protocol import About, Images, Reward, RewardOutput, RewardUnavailable, fixed_inputs
from runners.rewards.rules import Detection, correct, verdict
from runners.rewards.weights import Weights, built, find_all

if TYPE_CHECKING:
    from runners.rewards.colors import ColorClassifier
    from runners.rewards.mask2former import Instance, InstanceDetector

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
MAX_OBJECTS = 16  # of a class
DETECTOR = Weights(repository="facebook/mask2former-swin-small-coco-instance", files=MODEL)
CLASSIFIER = clip_weights()
COCO_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
LABELS = {name: i for i, name in enumerate(CLASSES)} | {coco: CLASSES.index(own) for coco, own in COCO_NAMES.items()}


@dataclass
class GenEvalReward(Reward):
    """Partial credit for counts, colours and positions is trained on; `accuracy` is GenEval's measure, `strict` its
    form that takes no more objects than asked for.

    `released` scores as the released training reward does; see `verdict`. `folder` holds local weights, in `detector`
    and `classifier`. An image of a prompt that asks for no object, or for one that COCO does not have, has no score.
    """

    about: ClassVar[About] = About(
        units="share",
        source="Ghosh et al. 2023 (arXiv 2310.11513); training reward of Flow-GRPO (arXiv 2505.05470)",
        weights=f"{DETECTOR.repository}, {CLASSIFIER.repository}",
        licence="Mask2Former: other, see its card; CLIP: MIT",
        gibibytes=1.9,
    )
    released: bool = False
    folder: str | None = None
    detector_revision: str | None = None
    classifier_revision: str | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        self._detector: InstanceDetector | None = None
        self._classifier: ColorClassifier | None = None
        self._fingerprint = ""

    @cached_property
    def identity(self) -> str:
        detector, classifier = (weights.identity for weights in self._weights())
        return f"{'released-' if self.released else ''}geneval-hf-1 {detector} {classifier}"

    def load(self, device: str) -> None:
        if self._detector is None or self._classifier is None:
            # these import transformers, which a plan does without
            from runners.rewards.colors import ColorClassifier  # noqa: PLC0415
            from runners.rewards.mask2former import InstanceDetector  # noqa: PLC0415

            weights = self._weights()
            try:
                detector, classifier = folders = find_all(weights)
            except RewardUnavailable as error:
                where = "geneval-hf wants Mask2Former in FOLDER/detector and CLIP in FOLDER/classifier"
                raise RewardUnavailable(f"{error}; {where}") from None
            self._detector = built("geneval-hf", InstanceDetector, detector)
            self._classifier = built("geneval-hf", ColorClassifier, classifier)
            self._fingerprint = " ".join(w.fingerprint(folder) for w, folder in zip(weights, folders, strict=True))
        self._detector.to(device)
        self._classifier.to(device)

    def fingerprint(self) -> str:
        return self._fingerprint

    def check_inputs(self) -> tuple[Images, list[Prompt]]:
        images, prompts = fixed_inputs()
        sign = Requirement(cls="stop sign", count=1, color="red")
        return images, [replace(prompt, include=(sign,)) for prompt in prompts]

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        problems = [problem(prompt) for prompt in prompts]
        judged = [i for i, why in enumerate(problems) if not why]
        values = np.full((3, len(images)), np.nan)
        reasons = list(problems)
        for start in range(0, len(judged), self.batch_size):
            rows = judged[start : start + self.batch_size]
            asked = [prompts[i] for i in rows]
            for i, prompt, found in zip(rows, asked, self._detect(images[rows], asked), strict=True):
                found_as = verdict(found, prompt, released=self.released)
                values[:, i] = found_as.score, correct(found, prompt), found_as.accurate
                reasons[i] = "; ".join(found_as.reasons)
        return RewardOutput(score=values[0], parts={"accuracy": values[1], "strict": values[2]}, reasons=tuple(reasons))

    def _detect(self, images: Images, prompts: Sequence[Prompt]) -> list[list[Detection]]:
        """Per image the objects of the classes that its prompt names, most confident first.

        Colours are those of classes whose colour is asked for; the others' are empty.
        """
        if self._detector is None or self._classifier is None:
            raise RewardUnavailable("geneval-hf: its weights were not loaded")
        counting = np.array([prompt.tag == "counting" for prompt in prompts])
        instances = self._detector(images, np.where(counting, COUNTING_THRESHOLD, THRESHOLD))
        seen = [(i, *named) for i, prompt in enumerate(prompts) for named in objects(instances[i], prompt)]
        colored = {(i, r.cls) for i, prompt in enumerate(prompts) for r in prompt.include if r.color}
        colors = iter(self._classifier([(images[i], found, cls) for i, cls, found in seen if (i, cls) in colored]))
        detections: list[list[Detection]] = [[] for _ in prompts]
        for i, cls, found in seen:
            color = next(colors) if (i, cls) in colored else ""
            detections[i].append(Detection(cls=cls, color=color, box=found.box))
        return detections

    def _weights(self) -> tuple[Weights, Weights]:
        within = self.folder is not None
        return (
            replace(DETECTOR, revision=self.detector_revision, folder=f"{self.folder}/detector" if within else None),
            replace(
                CLASSIFIER, revision=self.classifier_revision, folder=f"{self.folder}/classifier" if within else None
            ),
        )


def problem(prompt: Prompt) -> str:
    """Why the detector cannot judge this prompt; empty where it can."""
    if not prompt.include:
        return "the prompt asks for no object: geneval-hf needs prompts with GenEval's metadata"
    unknown = next((r.cls for r in _requirements(prompt) if r.cls not in LABELS), None)
    if unknown is None:
        return ""
    match = nearest(unknown, LABELS)
    return f"{unknown!r} is no class of COCO" + (f", did you mean {match!r}?" if match else "")


def objects(found: Sequence[Instance], prompt: Prompt) -> list[tuple[str, Instance]]:
    """The instances of classes that a prompt names, at most MAX_OBJECTS of a class, with each of its names for them."""
    names: dict[int, list[str]] = {}
    for cls in dict.fromkeys(r.cls for r in _requirements(prompt)):
        names.setdefault(LABELS[cls], []).append(cls)
    kept: list[tuple[str, Instance]] = []
    taken = Counter[int]()
    for instance in found:
        if instance.label in names and taken[instance.label] < MAX_OBJECTS:
            taken[instance.label] += 1
            kept += [(name, instance) for name in names[instance.label]]
    return kept


def _requirements(prompt: Prompt) -> tuple[Requirement, ...]:
    return (*prompt.include, *prompt.exclude)

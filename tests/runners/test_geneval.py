"""The reward geneval-hf on tiny random weights, against mmdet's and GenEval's steps one by one."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cells import folder_of
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)

from ablate.grid import load_grid
from ablate.plan import make_plan
from ablate.recipe import PromptsRecipe, RewardTerm
from ablate.record import Status, read_metrics
from runners import train
from runners.doctor import examine
from runners.evaluation import means
from runners.geneval_prompts import CLASSES, COLORS
from runners.prompts import Prompt, Requirement
from runners.rewards import RewardOutput, RewardUnavailable, mask2former
from runners.rewards.colors import ColorClassifier, crop
from runners.rewards.geneval import GenEvalReward, objects
from runners.rewards.mask2former import Instance, InstanceDetector, bounds, instances
from runners.rewards.rules import Detection, correct, verdict

GRIDS = Path(__file__).parents[2] / "grids"
COCO = [{"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}.get(c, c) for c in CLASSES]


def write_detector(folder: Path, labels: list[str] = COCO, seed: int = 0) -> None:
    """A Mask2Former of 118 thousand random parameters, whose classes are as sure as those of a trained one."""
    torch.manual_seed(seed)
    backbone = SwinConfig(
        image_size=32,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=40,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    network = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        network.class_predictor.weight *= 60
        network.class_predictor.bias[-1] = 3.0  # nothing
    network.save_pretrained(folder)


def write_classifier(folder: Path) -> None:
    """A CLIP of 30 thousand random parameters with a tokenizer of single characters."""
    torch.manual_seed(1)
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(words), "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    config = CLIPConfig(text_config=text, vision_config={**size, "image_size": 32, "patch_size": 8}, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    side = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights")
    write_detector(path / "detector")
    write_classifier(path / "classifier")
    return path


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """The detector's input to a tenth of its size."""
    monkeypatch.setattr(mask2former, "SHORT_SIDE", 80)
    monkeypatch.setattr(mask2former, "LONG_SIDE", 133)


@pytest.fixture
def reward(folder: Path, monkeypatch: pytest.MonkeyPatch) -> GenEvalReward:
    shrink(monkeypatch)
    made = GenEvalReward(folder=str(folder))
    made.load("cpu")
    return made


def pictures(number: int = 6, height: int = 48, width: int = 64) -> np.ndarray:
    """Coloured blocks under noise, each image another."""
    generator = np.random.default_rng(3)
    blocks = generator.integers(0, 256, (number, height // 16, width // 16, 3)).repeat(16, 1).repeat(16, 2)
    return (0.8 * blocks + generator.integers(0, 51, blocks.shape)).astype(np.uint8)


# by the letter


@cache
def loaded(kind: Any, folder: Path) -> Any:
    return kind.from_pretrained(folder).eval()


def bilinear(image: np.ndarray, size: int) -> np.ndarray:
    """The first axis resized linearly between the centres of pixels."""
    places = ((np.arange(size) + 0.5) * len(image) / size - 0.5).clip(0, len(image) - 1)
    low = places.astype(int)
    share = (places - low)[:, None, None]
    return image[low] * (1 - share) + image[(low + 1).clip(max=len(image) - 1)] * share


def mmdet(
    folder: Path, image: np.ndarray, short: int, long: int
) -> list[tuple[int, float, tuple[int, ...], np.ndarray]]:
    """(label, score, box, mask) of all hundred candidates, in mmdet's order of steps; torch's own normalisation."""
    height, width = image.shape[:2]
    scale = min(short / min(height, width), long / max(height, width))
    new_height, new_width = int(height * scale + 0.5), int(width * scale + 0.5)
    resized = bilinear(bilinear(image.astype(float), new_height).swapaxes(0, 1), new_width).swapaxes(0, 1).round()
    normal = (resized - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    padded = np.zeros((math.ceil(new_height / 32) * 32, math.ceil(new_width / 32) * 32, 3), np.float32)
    padded[:new_height, :new_width] = normal
    network = loaded(Mask2FormerForUniversalSegmentation, folder / "detector")
    with torch.no_grad():
        found = network(torch.from_numpy(padded).permute(2, 0, 1)[None])
    scores = F.softmax(found.class_queries_logits[0], dim=-1)[:, :-1]
    labels = torch.arange(80).unsqueeze(0).repeat(len(scores), 1).flatten(0, 1)
    highest, index = scores.flatten(0, 1).topk(100, sorted=False)
    masks = F.interpolate(found.masks_queries_logits, padded.shape[:2], mode="bilinear", align_corners=False)[0]
    masks = masks[:, :new_height, :new_width]
    masks = F.interpolate(masks[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0][index // 80]
    binary = (masks > 0).float()
    final = highest * (masks.sigmoid() * binary).flatten(1).sum(1) / (binary.flatten(1).sum(1) + 1e-6)
    answers = []
    for label, score, mask in zip(labels[index].tolist(), final.tolist(), binary.bool().numpy(), strict=True):
        rows, columns = np.where(mask)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else (0, 0, 0, 0)
        answers.append((label, score, tuple(map(int, box)), mask))
    return answers


@cache
def color_embeddings(folder: Path, cls: str) -> torch.Tensor:
    """The zero-shot classifier of a class, one text at a time."""
    network, tokenizer = loaded(CLIPModel, folder / "classifier"), CLIPTokenizer.from_pretrained(folder / "classifier")
    means_of_colors = []
    with torch.no_grad():
        for name in COLORS:
            texts = [f"a photo of a {name} {cls}", f"a photo of a {name}-colored {cls}", f"a photo of a {name} object"]
            features = [
                network.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output[0] for text in texts
            ]
            mean = torch.stack([F.normalize(feature, dim=0) for feature in features]).mean(0)
            means_of_colors.append(mean / mean.norm())
    return torch.stack(means_of_colors)


def color_of(folder: Path, image: np.ndarray, cls: str, box: tuple[int, ...], mask: np.ndarray) -> str:
    blank = Image.new("RGB", image.shape[1::-1], color="#999")
    part = Image.composite(Image.fromarray(image), blank, Image.fromarray(mask)).crop(box)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = processor([part], input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        feature = loaded(CLIPModel, folder / "classifier").get_image_features(pixels).pooler_output[0]
    return COLORS[int((100 * color_embeddings(folder, cls) @ F.normalize(feature, dim=0)).argmax())]


def by_the_letter(folder: Path, image: np.ndarray, prompt: Prompt) -> tuple[float, float, float]:
    """Score, accuracy and strict accuracy of an image as GenEval's script goes about it, with the shrunk input."""
    threshold = 0.9 if prompt.tag == "counting" else 0.3
    candidates = [c for c in mmdet(folder, image, 80, 133) if c[1] > threshold]
    found = []
    for requirement in prompt.include:
        cls = requirement.cls
        own = sorted((c for c in candidates if CLASSES[c[0]] == cls), key=lambda c: -c[1])[:16]
        found += [
            Detection(cls=cls, color=color_of(folder, image, cls, box, mask) if requirement.color else "", box=box)
            for _, _, box, mask in own
        ]
    judged = verdict(found, prompt)
    return judged.score, float(correct(found, prompt)), float(judged.accurate)


def asks(tag: str, *include: Requirement, exclude: tuple[Requirement, ...] = ()) -> Prompt:
    return Prompt(text=tag, tag=tag, include=include, exclude=exclude)


def prompts_about(folder: Path, images: np.ndarray) -> Iterator[tuple[int, Prompt]]:
    """Prompts of all families on what the images show: true ones, and ones that are not."""
    detector = InstanceDetector(folder / "detector")
    for i, found in enumerate(detector(images, np.full(len(images), 0.3))):
        classes = list(dict.fromkeys(CLASSES[instance.label] for instance in found))[:2] or ["person"]
        first, last = classes[0], classes[-1] if len(classes) > 1 else "toothbrush"
        number = sum(CLASSES[instance.label] == first for instance in found)
        yield i, asks("single_object", Requirement(cls=first, count=1))
        yield i, asks("two_object", Requirement(cls=first, count=max(number, 1)), Requirement(cls=last, count=1))
        for count in (2, 3):
            more = (Requirement(cls=first, count=count + 1),)
            yield i, asks("counting", Requirement(cls=first, count=count), exclude=more)
        for color in COLORS[::3]:
            yield i, asks("colors", Requirement(cls=first, count=max(number, 1), color=color))
        placed = Requirement(cls=last, count=1, position=("right of", 0))
        yield i, asks("position", Requirement(cls=first, count=max(number, 1)), placed)
        white = Requirement(cls=last, count=1, color="white")
        yield i, asks("color_attr", Requirement(cls=first, count=max(number, 1), color="black"), white)


# the detector


def test_instances_are_those_of_mmdet_at_its_own_input_size(folder: Path) -> None:
    """A picture whose width, 1067 pixels, is padded to 1088."""
    (image,) = pictures(1)
    expected = sorted((c for c in mmdet(folder, image, 800, 1333) if c[1] > 0.22), key=lambda c: (c[0], -c[1]))
    (found,) = InstanceDetector(folder / "detector")(image[None], np.array([0.22]))
    assert [f.score for f in found] == sorted((f.score for f in found), reverse=True)
    found.sort(key=lambda f: (f.label, -f.score))
    assert len(found) > 30
    assert [(f.label, f.box) for f in found] == [(c[0], c[2]) for c in expected]
    # a pixel halfway between two values may be rounded either way; one pixel less of width changes scores by 0.01
    np.testing.assert_allclose([f.score for f in found], [c[1] for c in expected], atol=5e-4)
    assert all(np.mean(f.mask != c[3]) < 2e-3 for f, c in zip(found, expected, strict=True))


def certain(probability: float, label: int) -> torch.Tensor:
    """Class logits [81] that give one class this probability, and nothing the rest."""
    logits = torch.full((81,), -60.0)
    logits[label], logits[-1] = math.log(probability), math.log(1 - probability)
    return logits


SIZES = ((64, 96), (60, 90), (30, 45))


def test_a_score_is_the_class_s_probability_times_the_mean_probability_inside_the_mask() -> None:
    classes = torch.stack([certain(0.8, 3), certain(0.9, 7)])
    masks = torch.stack([torch.full((16, 24), 2.0), torch.full((16, 24), 0.5)])
    first, second = instances(classes, masks, SIZES, 0.3)
    assert (first.label, first.box, second.label) == (3, (0, 0, 45, 30), 7)
    assert first.score == pytest.approx(0.8 / (1 + math.exp(-2)))
    assert second.score == pytest.approx(0.9 / (1 + math.exp(-0.5)))
    assert first.mask.shape == (30, 45)
    assert [found.label for found in instances(classes, masks, SIZES, 0.6)] == [3]  # the class alone would pass
    assert instances(classes, masks, SIZES, 0.95) == []


def test_what_is_in_the_padding_is_not_found() -> None:
    masks = torch.full((1, 64, 96), -5.0)
    masks[:, 61:, :] = 5.0
    assert instances(certain(0.9, 0)[None], masks, SIZES, 0.0001) == []
    masks[:, :10, 20:50] = 5.0
    (found,) = instances(certain(0.9, 0)[None], masks, SIZES, 0.0001)
    assert found.box == (10, 0, 25, 5)


def test_bounds_end_past_the_last_pixel() -> None:
    mask = np.zeros((6, 9), bool)
    mask[2, 3] = mask[4, 7] = True
    assert bounds(mask) == (3, 2, 8, 5)


@pytest.mark.parametrize(
    ("labels", "message"),
    [(COCO[1:] + COCO[:1], "80 classes, the first 'bicycle'"), (COCO[:79], "79 classes, the first 'person'")],
)
def test_a_detector_of_other_classes_is_refused(labels: list[str], message: str, tmp_path: Path) -> None:
    write_detector(tmp_path / "detector", labels)
    with pytest.raises(RewardUnavailable, match=rf"expected the 80 classes of COCO, .* got {message}"):
        InstanceDetector(tmp_path / "detector")


# the colour of an object


def test_an_object_is_cut_out_on_grey() -> None:
    (image,) = pictures(1)
    mask = np.zeros((48, 64), bool)
    mask[10:30, 5:40] = np.random.default_rng(0).random((20, 35)) > 0.5
    mask[10, 5] = mask[29, 39] = True
    found = Instance(label=0, score=1, box=bounds(mask), mask=mask)
    whole = Image.composite(Image.fromarray(image), Image.new("RGB", (64, 48), "#999"), Image.fromarray(mask))
    np.testing.assert_array_equal(np.asarray(crop(image, found)), np.asarray(whole.crop((5, 10, 40, 30))))


def test_an_object_three_pixels_high_is_no_image_of_three_channels(folder: Path) -> None:
    (image,) = pictures(1)
    mask = np.zeros((48, 64), bool)
    mask[4:7, 8:30] = True
    flat = Instance(label=0, score=1, box=bounds(mask), mask=mask)
    assert ColorClassifier(folder / "classifier")([(image, flat, "car")])[0] in COLORS


def test_colors_do_not_depend_on_what_is_asked_beside_them(folder: Path) -> None:
    classifier = ColorClassifier(folder / "classifier")
    whole = Instance(label=0, score=1, box=(0, 0, 64, 48), mask=np.ones((48, 64), bool))
    asked = [(image, whole, cls) for image in pictures(40) for cls in ("car", "dog")]  # more than one batch
    together = classifier(asked)
    assert together[::7] == [classifier([one])[0] for one in asked[::7]]
    assert len(set(together)) > 1


# the reward


def test_scores_are_those_of_the_script_by_the_letter(folder: Path, reward: GenEvalReward) -> None:
    images = pictures(3)
    asked = list(prompts_about(folder, images))
    output = reward(images[[i for i, _ in asked]], [prompt for _, prompt in asked])
    expected = np.array([by_the_letter(folder, images[i], prompt) for i, prompt in asked])
    np.testing.assert_allclose(output.score, expected[:, 0], atol=1e-12)
    np.testing.assert_array_equal(output.parts["accuracy"], expected[:, 1])
    np.testing.assert_array_equal(output.parts["strict"], expected[:, 2])
    assert len(set(output.score)) > 3
    assert 0 < output.parts["strict"].mean() < output.parts["accuracy"].mean() < 1
    assert all(bool(why) == (strict == 0) for why, strict in zip(output.reasons, expected[:, 2], strict=True))


def test_scores_do_not_depend_on_the_batch_and_are_the_same_twice(folder: Path, reward: GenEvalReward) -> None:
    images = pictures(3)
    asked = list(prompts_about(folder, images))
    shown, prompts = images[[i for i, _ in asked]], [prompt for _, prompt in asked]
    first, again = reward(shown, prompts), reward(shown, prompts)
    single = GenEvalReward(folder=str(folder), batch_size=1)
    single.load("cpu")
    backwards = single(shown[::-1], prompts[::-1])
    for output in (again.score, backwards.score[::-1]):
        np.testing.assert_array_equal(output, first.score)
    assert backwards.reasons[::-1] == first.reasons


def test_more_sureness_is_wanted_where_objects_are_counted(folder: Path, reward: GenEvalReward) -> None:
    images = pictures(4)
    detector = InstanceDetector(folder / "detector")
    i, cls = next(
        (i, CLASSES[found.label])
        for i, of_image in enumerate(detector(images, np.full(4, 0.3)))
        for found in of_image
        if found.score < 0.9 and all(other.score < 0.9 for other in of_image if other.label == found.label)
    )
    one = Requirement(cls=cls, count=1)
    loose, counting = reward(images[[i, i]], [asks("single_object", one), asks("counting", one)]).parts["accuracy"]
    assert (loose, counting) == (1, 0)


def test_the_released_form_pays_less_than_nothing_for_too_many(folder: Path, reward: GenEvalReward) -> None:
    released = GenEvalReward(folder=str(folder), released=True)
    released.load("cpu")
    images = pictures(4)
    found = InstanceDetector(folder / "detector")(images, np.full(4, 0.3))
    i, label = next((i, found[i][0].label) for i in range(4) if sum(f.label == found[i][0].label for f in found[i]) > 2)
    prompt = asks("single_object", Requirement(cls=CLASSES[label], count=1))
    assert released(images[[i]], [prompt]).score[0] < 0 == reward(images[[i]], [prompt]).score[0]
    assert released.identity == f"released-{reward.identity}"


def instance(label: int, score: float = 0.5) -> Instance:
    return Instance(label=label, score=score, box=(0, 0, 1, 1), mask=np.ones((1, 1), bool))


def test_at_most_sixteen_objects_of_a_class_count_and_only_those_that_a_prompt_names() -> None:
    prompt = asks("two_object", Requirement(cls="person", count=1), Requirement(cls="car", count=1))
    found = [instance(label) for _ in range(20) for label in (0, 1, 2)]
    named = [cls for cls, _ in objects(found, prompt)]
    assert (named.count("person"), named.count("car"), len(named)) == (16, 16, 32)
    assert [kept for _, kept in objects(found, prompt)][:2] == [found[0], found[2]]


def test_classes_go_by_geneval_s_and_by_coco_s_name() -> None:
    found = [instance(i) for i in range(80)]
    for called, index in [*zip(CLASSES, range(80), strict=True), *zip(COCO, range(80), strict=True)]:
        ((cls, kept),) = objects(found, asks("single_object", Requirement(cls=called, count=1)))
        assert (cls, kept.label) == (called, index)


def test_a_prompt_that_cannot_be_judged_leaves_its_image_without_a_score(reward: GenEvalReward) -> None:
    prompts = [
        Prompt(text="a painting"),
        asks("single_object", Requirement(cls="person", count=1)),
        asks("single_object", Requirement(cls="buss", count=1)),
    ]
    output = reward(pictures(3), prompts)
    assert output.missing.tolist() == [True, False, True]
    assert (
        np.isnan(output.parts["accuracy"]).tolist() == np.isnan(output.parts["strict"]).tolist() == [True, False, True]
    )
    assert "asks for no object" in output.reasons[0]
    assert output.reasons[2] == "'buss' is no class of COCO, did you mean 'bus'?"


# weights


def test_the_self_check_passes_and_weights_are_loaded_once(reward: GenEvalReward) -> None:
    reward.self_check()
    before = reward._detector
    reward.load("cpu")
    assert reward._detector is before


def test_other_weights_are_another_identity(folder: Path, tmp_path: Path) -> None:
    write_detector(tmp_path / "detector", seed=1)
    write_classifier(tmp_path / "classifier")
    here, there = GenEvalReward(folder=str(folder)), GenEvalReward(folder=str(tmp_path))
    detector, classifier = here.identity.split()[1:]
    assert here.identity.startswith("geneval-hf-1 ")
    here.load("cpu")
    assert here.fingerprint() == f"{detector} {classifier}"
    assert there.identity.split()[2] == classifier
    assert there.identity.split()[1] != detector


def test_without_weights_it_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RewardUnavailable, match=r"detector: no config.json of facebook/mask2former-swin-small-coco"):
        GenEvalReward(folder=str(tmp_path)).load("cpu")

    def offline(*_: object, **__: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr("runners.rewards.weights.snapshot_download", offline)
    with pytest.raises(
        RewardUnavailable, match=r"hf download facebook/.* FOLDER/detector and CLIP in FOLDER/classifier"
    ):
        GenEvalReward().load("cpu")
    with pytest.raises(RewardUnavailable, match="not loaded"):
        GenEvalReward()(pictures(1), [asks("single_object", Requirement(cls="person", count=1))])


def test_a_plan_names_the_hub_and_loads_nothing() -> None:
    code = (
        "import sys; from runners.rewards import load_reward; print(load_reward('geneval-hf').identity);"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    hubs = "facebook/mask2former-swin-small-coco-instance@main openai/clip-vit-large-patch14@main"
    assert ended.stdout == f"geneval-hf-1 {hubs}\n[]\n"


# in a cell


def test_the_overall_score_is_the_mean_over_families() -> None:
    prompts = [Prompt(text="", tag=tag) for tag in ("counting", "counting", "counting", "colors")]
    accuracy = np.array([1.0, 0.0, np.nan, 1.0])
    found = means("eval", RewardOutput(score=np.ones(4), parts={"accuracy": accuracy}), prompts)
    assert found["eval/accuracy"] == pytest.approx(2 / 3)  # by image
    assert (found["eval/accuracy/counting"], found["eval/accuracy/colors"]) == (0.5, 1)
    assert found["eval/by_family/accuracy"] == 0.75
    assert "eval/by_family/accuracy" not in means("eval", RewardOutput(score=np.ones(4), parts={"accuracy": accuracy}))


def test_a_cell_trains_on_generated_prompts_and_records_accuracy_by_family(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    settings = {"rollout.num_groups": 3, "rollout.group_size": 2, "rollout.num_steps": 3, "budget.epochs": 1}
    settings |= {"evaluation.num_prompts": 12, "evaluation.num_steps": 2, "evaluation.panel": []}
    cell = make_plan(load_grid(GRIDS / "quickstart.yaml", settings)).cells[0]
    term = RewardTerm.model_validate({"name": "geneval-hf", "folder": str(folder)})
    target = folder_of(cell, tmp_path / "cell", reward=(term,), prompts=PromptsRecipe(train="geneval"))
    record = train.train_cell(target)
    assert (record.status, record.message) == (Status.DONE, "")
    line = read_metrics(target)[-1]
    families = [key.split("/")[2] for key in line if key.startswith("eval/accuracy/")]
    assert sorted(families) == ["color_attr", "colors", "counting", "position", "single_object", "two_object"]
    of_family = [line[f"eval/accuracy/{family}"] for family in families]
    assert line["eval/by_family/accuracy"] == pytest.approx(np.mean(of_family))
    assert {"eval/accuracy", "eval/strict", "rollout/accuracy", "rollout/strict"} <= line.keys()
    shown = [json.loads(text) for text in (target / "samples" / "after.jsonl").read_text().splitlines()]
    assert shown[0]["prompt"].startswith("a photo of ")


def test_the_doctor_warns_of_neither_reward_nor_prompts_of_the_full_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("runners.hub.HfApi.model_info", offline)
    cells = make_plan(load_grid(GRIDS / "full.yaml")).cells
    found = list(examine(cells, tmp_path, dry_run=False))
    without = "reward geneval-hf: weights of facebook/mask2former-swin-small-coco-instance are neither in the cache"
    (of_reward,) = (f for f in found if f.what.startswith("reward"))
    assert (of_reward.level, of_reward.what.startswith(without)) == ("problem", True)  # no network in the tests
    assert not [f for f in found if f.level != "ok" and "prompts" in f.what]

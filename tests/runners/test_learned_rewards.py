"""Learned rewards at tiny random weights, against the same computation done otherwise."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from tiny_rewards import WRITERS, original_hps, original_imagereward, write_aesthetic, write_clip

from ablate.recipe import RewardTerm
from ablate.source import FieldError
from runners import digest
from runners.prompts import Prompt
from runners.rewards import RewardUnavailable, load_term, reward_class
from runners.rewards import clip as clip_module
from runners.rewards.hps import letterboxed

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NAMES = list(WRITERS)
TEXTS = ["a red square", "two dogs", 'a sign that says "OK"', "a red square", "x " * 90]
PROMPTS = [Prompt(text=text) for text in TEXTS]
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 48, 64, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in WRITERS.items()}


def loaded(name: str, folder: Path, **parameters: Any) -> Any:
    """A reward of its own, with the weights of a folder."""
    reward = reward_class(name)(folder=str(folder), **parameters)
    reward.load("cpu")
    return reward


def pixels(images: np.ndarray, side: int) -> torch.Tensor:
    """What CLIP sees: the middle of each image, its shorter side resized to `side`."""
    prepared = []
    for image in map(Image.fromarray, images):
        scale = side / min(image.size)
        width, height = (int(length * scale) for length in image.size)
        left, top = (width - side) // 2, (height - side) // 2
        prepared.append(image.resize((width, height), Image.BICUBIC).crop((left, top, left + side, top + side)))
    return normalised(prepared)


def normalised(images: list[Image.Image]) -> torch.Tensor:
    mean, std = (np.array(values, np.float32) for values in (CLIP_MEAN, CLIP_STD))
    shares = np.stack([np.asarray(image) for image in images]) * np.float64(1 / 255)
    return torch.from_numpy((shares.astype(np.float32) - mean) / std).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", NAMES)
def test_scores_do_not_depend_on_the_batch(name: str, folders: dict[str, Path]) -> None:
    at_once = loaded(name, folders[name])(IMAGES, PROMPTS).score
    assert np.ptp(at_once) > 1e-3  # else the comparison says nothing
    np.testing.assert_allclose(loaded(name, folders[name], batch_size=2)(IMAGES, PROMPTS).score, at_once, atol=2e-5)
    reverse = loaded(name, folders[name])(IMAGES[::-1], PROMPTS[::-1]).score[::-1]
    np.testing.assert_allclose(reverse, at_once, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_the_same_again_and_from_a_copy_of_the_weights(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    reward = loaded(name, folders[name])
    first = reward(IMAGES, PROMPTS).score
    np.testing.assert_array_equal(reward(IMAGES, PROMPTS).score, first)
    copy = loaded(name, shutil.copytree(folders[name], tmp_path / "copy"))
    np.testing.assert_array_equal(copy(IMAGES, PROMPTS).score, first)
    assert (copy.identity, copy.fingerprint()) == (reward.identity, reward.fingerprint())


@pytest.mark.parametrize("name", NAMES)
def test_other_weights_are_another_reward(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    reward, other = loaded(name, folders[name]), loaded(name, WRITERS[name](tmp_path, seed=5))
    assert reward.identity != other.identity
    assert reward.fingerprint() != other.fingerprint()
    assert abs(reward(IMAGES, PROMPTS).score - other(IMAGES, PROMPTS).score).min() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_the_self_check_passes_and_finds_scores_that_are_no_numbers(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = loaded(name, folders[name])
    reward.self_check()
    monkeypatch.setattr(reward, "raw", lambda *_: torch.full((3,), float("nan")))
    with pytest.raises(RewardUnavailable, match="finite"):
        reward.self_check()


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_divided_by_the_scale_of_training(name: str, folders: dict[str, Path]) -> None:
    reward, scaled = loaded(name, folders[name]), loaded(name, folders[name], scale=26.0)
    np.testing.assert_array_equal(scaled(IMAGES, PROMPTS).score, reward(IMAGES, PROMPTS).score / 26)
    assert scaled.identity == f"{reward.identity} scale=26"


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_are_not_to_be_had_are_all_named_with_what_to_do(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("runners.rewards.weights.snapshot_download", no_network)
    reward = reward_class(name)(revision="abc")
    with pytest.raises(RewardUnavailable) as caught:
        reward.load("cpu")
    for weights in reward.weights:
        assert f"hf download {weights.repository} --include '{weights.files[0]}'" in str(caught.value)
    assert str(caught.value).count("--revision abc") == 1  # of the first repository
    assert weights.repository in reward.identity  # a plan needs no weights


def test_each_repository_has_a_revision_of_its_own() -> None:
    own, base = (weights.repository for weights in reward_class("pickscore")().weights)
    assert reward_class("pickscore")(revision={base: "abc"}).identity == f"pickscore-1 {own}@main {base}@abc"
    with pytest.raises(FieldError, match=f"got 'laion/CLIP', no repository of it.*{own}"):
        reward_class("pickscore")(revision={"laion/CLIP": "abc"})


def test_the_weights_of_a_folder_are_read_once_for_all_plans(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, read, real = shutil.copytree(folders["clipscore"], tmp_path / "copy"), [], digest._sha256
    monkeypatch.setattr(digest, "_sha256", lambda path: read.append(path.name) or real(path))
    first = reward_class("clipscore")(folder=str(folder)).identity
    assert reward_class("clipscore")(folder=str(folder), scale=2.0).identity == f"{first} scale=2"
    assert read.count("model.safetensors") == 1
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert reward_class("clipscore")(folder=str(folder)).identity != first


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_without_a_file_is_named(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders[name], tmp_path / "copy")
    gone = loaded(name, folder).weights[0].files[0]
    (folder / gone).unlink()
    with pytest.raises(RewardUnavailable, match=f"copy: no {gone}"):
        loaded(name, folder)


@pytest.mark.parametrize("name", NAMES)
def test_files_with_a_weight_missing_are_refused(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders[name], tmp_path / "copy")
    if name in {"clipscore", "pickscore"}:
        model = transformers.CLIPModel.from_pretrained(folder)
        state = {key: tensor for key, tensor in model.state_dict().items() if key != "visual_projection.weight"}
        model.save_pretrained(folder, state_dict=state)
    else:
        file = next(folder / f for f in reward_class(name)().weights[0].files if f.endswith((".pt", ".pth")))
        state = torch.load(file, weights_only=True)
        names = state.get("state_dict", state)
        names.pop([key for key in names if "proj" not in key][-1])
        torch.save(state, file)
    with pytest.raises(RewardUnavailable, match=r"not the weights it needs.*(m|M)issing"):
        loaded(name, folder)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    write_aesthetic(tmp_path)
    torch.save({"layers.0.weight": Path}, tmp_path / "aesthetic-model.pth")
    with pytest.raises(RewardUnavailable, match="UnpicklingError"):
        loaded("aesthetic", tmp_path)


def test_a_reward_without_weights_loaded_says_so() -> None:
    with pytest.raises(RewardUnavailable, match="load"):
        reward_class("pickscore")()(IMAGES, PROMPTS)


@pytest.mark.parametrize("field", ["scale", "batch_size"])
def test_impossible_parameters_are_named(field: str) -> None:
    with pytest.raises(FieldError, match="more than 0"):
        reward_class("hpsv2.1")(**{field: 0})


def embeddings(folder: Path, *, text: str, image: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit vectors of one image and one text, and the logits of the whole model, by transformers' parts."""
    model = transformers.CLIPModel.from_pretrained(folder)
    tokens = transformers.CLIPTokenizer.from_pretrained(folder)(
        [text], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    seen = {"pixel_values": pixels(image[None], 28)}
    with torch.inference_mode():
        of_image = model.visual_projection(model.vision_model(**seen).pooler_output)
        of_text = model.text_projection(model.text_model(**tokens).pooler_output)
        logits = model(**seen, **tokens).logits_per_image
    return of_image / of_image.norm(dim=-1, keepdim=True), of_text / of_text.norm(dim=-1, keepdim=True), logits[0, 0]


@pytest.mark.parametrize(("name", "units"), [("clipscore", 100), ("pickscore", 1)])
def test_clip_rewards_are_the_logits_of_image_and_prompt(name: str, units: float, folders: dict[str, Path]) -> None:
    scores = loaded(name, folders[name], batch_size=1)(IMAGES, PROMPTS).score
    scale = transformers.CLIPModel.from_pretrained(folders[name]).logit_scale.detach().exp()
    for score, text, image in zip(scores, TEXTS, IMAGES, strict=True):
        of_image, of_text, logits = embeddings(folders[name], text=text, image=image)
        assert score == float((of_image * of_text).sum() * scale / units)
        assert score == pytest.approx(float(logits) / units, rel=1e-5)


def test_the_aesthetic_score_is_the_head_of_the_unit_vector(folders: dict[str, Path]) -> None:
    scores = loaded("aesthetic", folders["aesthetic"], batch_size=1)(IMAGES, PROMPTS).score
    layers = torch.load(folders["aesthetic"] / "aesthetic-model.pth", weights_only=True)
    for score, image in zip(scores, IMAGES, strict=True):
        x, _, _ = embeddings(folders["aesthetic"], text="a", image=image)
        for i in (0, 2, 4, 6, 7):
            x = torch.nn.functional.linear(x, layers[f"layers.{i}.weight"], layers[f"layers.{i}.bias"])
        assert score == float(x)


def test_hps_is_the_score_of_its_original_layout(folders: dict[str, Path]) -> None:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folders["hpsv2.1"])
    tokens = torch.zeros(len(TEXTS), 77, dtype=torch.long)  # open_clip pads with 0
    for row, text in zip(tokens, TEXTS, strict=True):
        ids = tokenizer(text, truncation=True, max_length=77)["input_ids"]
        row[: len(ids)] = torch.tensor(ids)
    boxed = []
    for image in map(Image.fromarray, IMAGES):  # 64 x 48 -> 28 x 21 in a black square, as open_clip's ResizeMaxSize
        square = np.zeros((28, 28, 3), np.uint8)
        square[3:24] = np.asarray(image.resize((28, 21), Image.BICUBIC))
        boxed.append(Image.fromarray(square))
    expected = original_hps()(normalised(boxed), tokens).diagonal()
    found = loaded("hpsv2.1", folders["hpsv2.1"])(IMAGES, PROMPTS).score
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_letterboxing_leaves_square_images_to_the_resize() -> None:
    square = Image.fromarray(IMAGES[0][:, :48])
    assert letterboxed(square, 28).tobytes() == square.resize((28, 28), Image.BICUBIC).tobytes()


def test_imagereward_is_the_score_of_its_original_layout(folders: dict[str, Path]) -> None:
    tokens = transformers.BertTokenizer.from_pretrained(folders["imagereward"])(
        TEXTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    assert set(tokens.attention_mask.sum(1).tolist()) > {35}  # one prompt is cut, others are padded
    expected = original_imagereward()(pixels(IMAGES, 32), tokens.input_ids, tokens.attention_mask)
    found = loaded("imagereward", folders["imagereward"])(IMAGES, PROMPTS).score
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_rewards_on_the_same_clip_share_its_weights(folders: dict[str, Path]) -> None:
    folder = folders["aesthetic"]
    clipscore, scaled = loaded("clipscore", folder), loaded("clipscore", folder, scale=2.0)
    assert loaded("aesthetic", folder)._network.clip is clipscore._network is scaled._network


def test_a_prompt_is_embedded_once_and_only_the_latest_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip_module, "KEPT_TEXTS", 2)
    clip = clip_module.load_clip(write_clip(tmp_path))
    asked, tokenizer = [], clip.tokenizer
    clip.tokenizer = lambda texts, **options: asked.extend(texts) or tokenizer(texts, **options)
    together = clip.embed_texts(["a", "b", "a", "b"])
    assert asked == ["a", "b"]
    clip.embed_texts(["c"])
    assert torch.equal(clip.embed_texts(["a"]), together[:1])  # the same bits whatever was embedded beside it
    assert asked == ["a", "b", "c", "a"]


def test_a_learned_reward_is_a_term_of_a_yaml_file(folders: dict[str, Path]) -> None:
    term = {"name": "hpsv2.1", "folder": str(folders["hpsv2.1"]), "scale": 0.3}
    reward = load_term(RewardTerm.model_validate(term))
    reward.load("cpu")
    direct = loaded("hpsv2.1", folders["hpsv2.1"])(IMAGES, PROMPTS).score
    np.testing.assert_array_equal(reward(IMAGES, PROMPTS).score, direct / 0.3)

"""A pipeline with SD 3.5 Medium's structure goes through the runner, and its options do what they say."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from sd35 import ODE, SDE, SENTENCES, cell, recipe, write_pipeline
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ablate.plan import Cell
from ablate.recipe import ModelRecipe
from ablate.record import Status, read_metrics
from ablate.source import InputError
from runners import export as export_module
from runners import policy as policy_module
from runners import train
from runners.attention import KERNELS, use_kernel
from runners.export import LORA, load
from runners.policy import SD3Policy
from runners.run import set_up

GRIDS = Path(__file__).parents[2] / "grids"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("sd35"))


@pytest.mark.parametrize("what", [ODE, SDE])
@pytest.mark.parametrize(
    "fields", [{}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "lora_rank": None}, {"dtype": "float16"}], ids=str
)
def test_the_structure_of_sd35_goes_through_rollout_and_update(
    folder: Path, tmp_path: Path, what: str, fields: dict[str, Any]
) -> None:
    (tmp_path / "cell.json").write_text(cell(folder, what, tmp_path, **fields).model_dump_json())
    record = train.train_cell(tmp_path)
    assert (record.status, record.message) == (Status.DONE, "")
    lines = read_metrics(tmp_path)
    assert all(line["train/grad_norm"] > 0 for line in lines[1:])
    assert lines[1]["train/log_ratio_abs"] < (1e-3 if fields else 1e-6)  # on-policy


def test_the_lora_is_on_the_projections_of_the_recipe(folder: Path) -> None:
    def adapted(**fields: Any) -> set[str]:
        policy = SD3Policy(recipe(folder, **fields), CPU)
        return {name.split(".lora_A")[0] for name, p in policy.network.named_parameters() if ".lora_A." in name}

    plain, both = adapted(), adapted(lora_second_attention=True)
    assert len(plain) == 15  # eight in each block, but the last has no output of its text stream
    assert both - plain == {f"transformer_blocks.0.attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")}


def velocity_and_gradient(folder: Path, **fields: Any) -> tuple[tuple[torch.Tensor, torch.Tensor], int]:
    """Of one policy of fixed weights at two fixed points; and how often that took the flash kernel."""
    policy = SD3Policy(recipe(folder, **fields), CPU)
    for p in policy.trainable:
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    conditioning = policy.encode(SENTENCES[:2])
    with Operations() as done:
        velocity = policy.velocity(x, torch.tensor([0.3, 0.8]), conditioning)
        velocity.square().mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.trainable])
    return (velocity.detach(), gradient), done.count[FLASH]


class Operations(TorchDispatchMode):
    """Counts the operations of a block of code by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.name()] += 1
        return func(*args, **(kwargs or {}))


FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kernel", ["auto", "flash", "math"])
def test_kernels_and_checkpointing_give_the_same_velocity_and_gradient(
    folder: Path, kernel: str, checkpointing: bool
) -> None:
    expected, _ = velocity_and_gradient(folder)
    found, times = velocity_and_gradient(folder, attention=kernel, gradient_checkpointing=checkpointing)
    assert expected[1].abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert times == (0 if kernel == "math" else 3 * (1 + checkpointing))  # two blocks, one of them dual


def test_a_kernel_is_the_networks_own_and_no_other_threads(folder: Path) -> None:
    """A reward on another thread may need what the policy was told not to take."""
    policy, seen = SD3Policy(recipe(folder, attention="math"), CPU), []

    def score() -> None:
        x = torch.randn(1, 1, 4, 8)
        with Operations() as done:
            torch.nn.functional.scaled_dot_product_attention(x, x, x)
        seen.append((done.count[FLASH], torch.backends.cuda.flash_sdp_enabled()))

    def meanwhile(*_: object) -> None:
        thread = threading.Thread(target=score)
        thread.start()
        thread.join()

    policy.network.transformer_blocks[0].attn.to_q.register_forward_hook(meanwhile)
    policy.velocity(torch.randn(1, *policy.latent_shape), torch.tensor([0.5]), policy.encode(SENTENCES[:1]))
    assert seen == [(1, True)]


@pytest.mark.parametrize("kernel", ["efficient", "cudnn"])
def test_a_kernel_that_the_device_does_not_have_is_refused(folder: Path, kernel: str) -> None:
    with pytest.raises(InputError, match=f"got '{kernel}', which no CPU has.*Allowed: auto, flash, math"):
        SD3Policy(recipe(folder, attention=kernel), CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_takes_the_dtype_of_autocast(kernel: str, dtype: torch.dtype) -> None:
    """Every kernel, those of a GPU on tensors without content; forward and backward."""
    network = SD3Transformer2DModel(
        sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip
    use_kernel(network, kernel)
    with FakeTensorMode(allow_non_fake_inputs=True), Operations() as done, torch.autocast("cpu", dtype):
        output = network(torch.empty(1, 16, 8, 8), torch.empty(1, 5, 16), torch.empty(1, 8), torch.empty(1))[0]
        output.float().sum().backward()
    assert output.shape == (1, 16, 8, 8)
    if kernel != "math":
        named = {name for name in done.count if kernel in name and "backward" not in name}
        assert len(named) == 1
        assert any(kernel in name and "backward" in name for name in done.count)


def test_encoders_leave_the_device_where_encoding_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, moved = SD3Policy(recipe(folder, offload_encoders=True), CPU), []
    for encoder in policy._encoders:
        monkeypatch.setattr(encoder, "to", moved.append)
    monkeypatch.setattr(policy.pipe, "encode_prompt", Mock(side_effect=torch.OutOfMemoryError("too long")))
    with pytest.raises(torch.OutOfMemoryError):
        policy.encode(SENTENCES[:1])
    assert moved == [CPU] * 3 + ["cpu"] * 3 + [CPU] * 3 + ["cpu"] * 3  # once more with more room


def test_the_cache_of_a_branch_is_that_of_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABLATE_CACHE", str(tmp_path))
    folders = []
    for commit in ("a" * 40, "b" * 40):
        found = lambda path, *_, commit=commit, **__: f"{tmp_path}/{path}/snapshots/{commit}/model_index.json"  # noqa: E731
        monkeypatch.setattr("runners.hub.try_to_load_from_cache", found)
        folders.append(policy_module._cache(ModelRecipe(path="owner/model")))
    assert folders[0] != folders[1]
    pinned = policy_module._cache(ModelRecipe(path="owner/model", revision="main"))
    assert pinned == folders[1]


def test_embeddings_do_not_depend_on_how_they_come(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Alone or with others, from disk, or by encoders that visit the device."""
    monkeypatch.setenv("ABLATE_CACHE", str(tmp_path))
    plain = SD3Policy(recipe(folder), CPU).encode(SENTENCES)
    assert plain.tokens.shape == (3, 9 + 16, 32)
    one_by_one = SD3Policy(recipe(folder), CPU)
    alone = torch.cat([one_by_one.encode([text]).tokens for text in SENTENCES])
    torch.testing.assert_close(alone, plain.tokens)
    for fields in ({"cache_embeddings": True}, {"cache_embeddings": True, "offload_encoders": True}):
        found = SD3Policy(recipe(folder, **fields), CPU).encode(SENTENCES)
        torch.testing.assert_close(found.tokens, plain.tokens)
        torch.testing.assert_close(found.pooled, plain.pooled)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3


def test_a_cached_prompt_is_not_encoded_again_and_another_model_has_its_own(
    folder: Path, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("ABLATE_CACHE", str(tmp_path))
    first = SD3Policy(recipe(folder, cache_embeddings=True), CPU)
    first.encode(SENTENCES)
    again = SD3Policy(recipe(folder, cache_embeddings=True), CPU)
    asked: list[str] = []
    monkeypatch.setattr(again.encode, "_encode", lambda texts: asked.extend(texts) or first.encode(texts))
    again.encode([*SENTENCES, "a circle"])
    assert asked == ["a circle"]
    SD3Policy(recipe(folder, cache_embeddings=True, max_sequence_length=8), CPU).encode(SENTENCES[:1])
    assert len({path.parent for path in tmp_path.rglob("*.safetensors")}) == 2


def test_decoding_in_tiles_gives_an_image_of_the_same_size(folder: Path) -> None:
    images = []
    for tiling in (False, True):
        policy = SD3Policy(recipe(folder, resolution=128, vae_tiling=tiling), CPU)
        latents = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
        images.append(policy.decode(latents))
    assert images[0].shape == images[1].shape == (1, 128, 128, 3)
    assert np.abs(images[0].astype(float) - images[1]).mean() < 60


def test_rollout_guidance_asks_twice(folder: Path, tmp_path: Path) -> None:
    run = set_up(tmp_path, cell(folder, ODE, tmp_path))
    x, sigma = torch.randn(2, *run.policy.latent_shape), torch.tensor([0.4, 0.9])
    conditioning, empty = run.policy.encode(SENTENCES[:2]), run.policy.encode(["", ""])
    with torch.no_grad():
        given, without = (run.policy.velocity(x, sigma, c, 1.0) for c in (conditioning, empty))
        guided = run.policy.velocity(x, sigma, conditioning, 4.5)
    torch.testing.assert_close(guided, without + 4.5 * (given - without), atol=1e-4, rtol=1e-3)


# what a finished cell leaves


def trained(folder: Path, tmp_path: Path, **fields: Any) -> tuple[Cell, Path]:
    chosen = cell(folder, ODE, tmp_path, **fields)
    home = tmp_path / "results" / chosen.id
    home.mkdir(parents=True)
    (home / "cell.json").write_text(chosen.model_dump_json())
    assert train.train_cell(home).status is Status.DONE
    return chosen, home


def image(pipe: StableDiffusion3Pipeline) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipe(
        SENTENCES[0], num_inference_steps=2, guidance_scale=1.0, max_sequence_length=16, height=64, width=64,
        generator=generator, output_type="np",
    ).images[0]  # fmt: skip


def test_an_exported_lora_is_loaded_by_diffusers_and_gives_the_same_image(folder: Path, tmp_path: Path) -> None:
    _, home = trained(folder, tmp_path, lora_alpha=16)
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    before = image(pipe)
    pipe.load_lora_weights(home / "weights")
    loaded = image(pipe)
    own = SD3Policy(recipe(folder, lora_alpha=16), CPU)
    load(home, own)
    assert np.abs(loaded - before).max() > 1e-6
    np.testing.assert_allclose(image(own.pipe), loaded, atol=1e-5)
    card = (home / "weights" / "README.md").read_text()
    assert "A LoRA of rank 4" in card
    assert 'pipe.load_lora_weights(".")' in card


def test_all_weights_are_exported_where_all_are_trained(folder: Path, tmp_path: Path) -> None:
    _, home = trained(folder, tmp_path, lora_rank=None)
    whole = SD3Transformer2DModel.from_pretrained(home / "weights" / "transformer")
    own = SD3Policy(recipe(folder, lora_rank=None), CPU)
    load(home, own)
    for a, b in zip(whole.parameters(), own.network.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("stage", ["_save", "_card", "_sync"])
def test_an_export_that_is_killed_leaves_no_half_of_it(
    stage: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, whole = SD3Policy(recipe(folder), CPU), cell(folder, ODE, tmp_path)
    real = getattr(export_module, stage)

    def killed(*given: Any) -> None:
        real(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(export_module, stage, killed)
        with pytest.raises(KeyboardInterrupt):
            export_module.export(tmp_path, whole, policy)
    assert not (tmp_path / "weights").exists()
    (tmp_path / "weights.partial" / "left.bin").write_text("of the attempt before")
    export_module.export(tmp_path, whole, policy)
    assert {path.name for path in (tmp_path / "weights").iterdir()} == {"README.md", LORA}
    assert not (tmp_path / "weights.partial").exists()
    load(tmp_path, policy)
    export_module.export(tmp_path, whole, policy)  # in the place of one that is there
    load(tmp_path, policy)


def test_weights_that_do_not_fit_are_named(folder: Path, tmp_path: Path) -> None:
    _, home = trained(folder, tmp_path)
    with pytest.raises(InputError, match="has no weights/"):
        load(tmp_path, SD3Policy(recipe(folder), CPU))
    with pytest.raises(InputError, match="was it written for another recipe"):
        load(home, SD3Policy(recipe(folder, lora_second_attention=True), CPU))

"""Embeddings on disk survive what other hosts, full memories and damaged files do to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from runners import embeddings
from runners.embeddings import Conditioning, Embeddings

CPU = torch.device("cpu")


class Encoder:
    """Embeds a text as its length, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, texts: list[str]) -> Conditioning:
        self.asked.append(texts)
        values = torch.tensor([float(len(text)) for text in texts])
        return Conditioning(values[:, None, None].expand(-1, 2, 3), values[:, None].expand(-1, 4))


@pytest.mark.parametrize("damage", [lambda content: content[:20], lambda _: b"", lambda content: b"x" * len(content)])
def test_a_damaged_file_is_named_and_its_prompt_encoded_again(
    damage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = Embeddings(Encoder(), CPU, tmp_path)(["abc"])
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    encoder = Encoder()
    found = Embeddings(encoder, CPU, tmp_path)(["abc"])
    assert encoder.asked == [["abc"]]
    assert torch.equal(found.tokens, expected.tokens)
    assert f"{file} is damaged" in capsys.readouterr().err
    Embeddings(encoder, CPU, tmp_path)(["abc"])
    assert encoder.asked == [["abc"]]  # the file is whole again


def test_two_hosts_with_one_process_id_write_the_same_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second starts and ends while the first writes."""
    real, names = embeddings.save_file, []

    def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        names.append(path)
        if len(names) == 1:
            Embeddings(Encoder(), CPU, tmp_path)(["abc"])
        real(tensors, path)

    monkeypatch.setattr(embeddings, "save_file", save)
    Embeddings(Encoder(), CPU, tmp_path)(["abc"])
    assert names[0] != names[1]
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_what_is_kept_makes_room_for_encoding() -> None:
    encoder = Encoder()

    def encode(texts: list[str]) -> Conditioning:
        if texts == ["long"] and known._known:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encoder(texts)

    known = Embeddings(encode, CPU, None)
    known(["a", "bb"])
    assert known(["long"]).pooled[0, 0] == 4
    assert encoder.asked == [["a", "bb"], ["long"]]

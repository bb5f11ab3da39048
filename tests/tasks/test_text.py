"""Prompts of any kind become features of their own length, computed once and kept on disk."""

import logging
from pathlib import Path

import pytest
import torch

from nextscale.tasks.generation.text import TextEncoder, TextEncoderConfig, TextFeatures, quantization
from nextscale.tasks.generation.text_small import make_encoder

CAPTIONS = ["a photo of a red fox", "a blue boat, at night"]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("t5"), CAPTIONS, width=16)


def encoder(folder: Path, cache: Path | None = None, max_length: int = 12, padded: bool = False) -> TextEncoder:
    return TextEncoder(TextEncoderConfig(str(folder), None, max_length, padded), device="cpu", cache=cache)


def same(a: TextFeatures, b: TextFeatures) -> bool:
    return a.states.lengths == b.states.lengths and torch.allclose(a.states.values, b.states.values, atol=1e-6)


def test_each_text_has_its_own_length_whatever_stands_beside_it(t5: Path) -> None:
    reader = encoder(t5)
    together = reader.encode([*CAPTIONS, "fox", CAPTIONS[0]])
    assert together.states.lengths == (7, 7, 2, 7)
    assert together.pooled is None
    assert reader.width == together.states.values.shape[1] == 16
    assert same(encoder(t5).encode(["fox"]), together.select([2]))
    assert same(together.select([0]), together.select([3]))
    assert not same(together.select([0]), together.select([1]))
    assert reader.encoded == 3  # the fourth text is the first again


def test_unusual_prompts(t5: Path, caplog: pytest.LogCaptureFixture) -> None:
    reader = encoder(t5)
    odd = ["", "   ", "🦊 red 🚢", "ثعلب أحمر", "half \ud83d", "a\x00b", "line\nbreak"]
    lengths = reader.encode(odd).states.lengths
    assert lengths[:2] == (1, 1)
    assert min(lengths) >= 1
    with caplog.at_level(logging.WARNING):
        long = reader.encode([" ".join(["fox"] * 2000)])
    assert long.states.lengths == (12,)
    assert "is cut to 12 tokens" in caplog.text
    with pytest.raises(ValueError, match="there is no text to encode"):
        reader.encode([])
    with pytest.raises(ValueError, match="a prompt is 3; expected text"):
        reader.encode([3])  # type: ignore[list-item]


def test_features_are_kept_by_text_and_encoder(t5: Path, tmp_path: Path) -> None:
    first = encoder(t5, tmp_path / "cache")
    features = first.encode(CAPTIONS)
    again = encoder(t5, tmp_path / "cache")
    assert same(again.encode(CAPTIONS), features)
    assert again.encoded == 0
    assert not again.loaded
    other = encoder(make_encoder(tmp_path / "other", CAPTIONS, width=16, seed=1), tmp_path / "cache")
    assert not same(other.encode(CAPTIONS), features)
    kept = next((tmp_path / "cache" / first.fingerprint()).rglob("*.safetensors"))
    kept.write_bytes(b"damaged")
    repaired = encoder(t5, tmp_path / "cache")
    assert same(repaired.encode(CAPTIONS), features)
    assert repaired.encoded == 1


def test_an_encoder_is_let_go_and_comes_back(t5: Path) -> None:
    reader = encoder(t5)
    assert not reader.loaded
    features = reader.encode(["fox"])
    reader.release()
    assert not reader.loaded
    assert same(reader.encode(["fox"]), features)


def test_clip_pools_and_padding_may_count(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path, CAPTIONS, kind="clip", width=16, max_length=12)
    features = encoder(folder).encode([*CAPTIONS, "fox"])
    assert features.pooled is not None
    assert features.pooled.shape == (3, 16)
    assert features.select([2]).pooled is not None
    padded = encoder(folder, padded=True).encode(["fox", "red fox"])
    assert padded.states.lengths == (12, 12)
    assert torch.allclose(padded.states.values[:2], features.states.split()[2], atol=1e-5)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the text encoder '.*nowhere' cannot be opened"):
        encoder(tmp_path / "nowhere").encode(["fox"])
    with pytest.raises(ValueError, match="8 bits needs the package bitsandbytes"):
        quantization(8, torch.device("cpu"))
    with pytest.raises(ValueError, match="bits is 3; expected 8, 4 or None"):
        TextEncoder(TextEncoderConfig("x"), bits=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hold no word"):
        make_encoder(tmp_path, ["  "])
    with pytest.raises(ValueError, match="max_length is 0"):
        TextEncoderConfig("x", max_length=0)

"""Tokens computed once: all views, resumable, of one tokenizer only."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nextscale.datasets.errors import TokenShardError
from nextscale.datasets.images import open_images
from nextscale.datasets.tokens import TokenWriter, open_tokens
from nextscale.tasks.tokenizers import tokenize
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ
from nextscale.tasks.tokenizers.tokenize import fingerprint, write_tokens


def test_every_view_of_every_image(tokenizer: ResidualVQ, tiny: SimpleNamespace, tmp_path: Path) -> None:
    images = open_images(tiny.images(tmp_path / "images", side=12), size=8, resize_ratio=1.5)
    seen: list[tuple[int, int]] = []
    folder = write_tokens(
        tokenizer, images, tmp_path / "tokens", views=2, batch_size=3, progress=lambda *p: seen.append(p)
    )
    assert seen == [(12, 32), (24, 32), (32, 32)]
    assert open_tokens(folder).metadata["classes"] == ["cat", "dog"]
    for view in range(4):
        tokens = open_tokens(folder, views=[view]).fetch(range(8))
        batch = images.fetch([(view // 2, i) for i in range(8)])
        pixels = batch["image"].flip(-1) if view % 2 else batch["image"]
        assert torch.equal(tokens["tokens"], tokenizer.encode(pixels))
        assert tokens["label"].tolist() == batch["label"].tolist()


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on(
    tokenizer: ResidualVQ, tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = open_images(tiny.images(tmp_path / "images", per_class=6), size=8, resize_ratio=1)
    whole = write_tokens(tokenizer, images, tmp_path / "whole")
    # Shards of five samples end between the views of an image and inside a batch.
    monkeypatch.setattr(
        tokenize, "TokenWriter", lambda folder, metadata: TokenWriter(folder, metadata=metadata, shard_size=5)
    )

    def stop(done: int, of: int) -> None:
        if done == 16:
            raise Killed

    for _ in range(2):  # the second attempt is killed as well
        with pytest.raises(Killed):
            write_tokens(tokenizer, images, tmp_path / "parts", batch_size=4, progress=stop)
    encoded: list[int] = []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda x, s: (encoded.append(len(x)), encode(x, s))[1])
    write_tokens(tokenizer, images, tmp_path / "parts", batch_size=4)
    assert sum(encoded) < 24
    for views in ([0], [1]):
        a, b = (open_tokens(f, views=views, verify=True).fetch(range(12)) for f in (whole, tmp_path / "parts"))
        assert all(torch.equal(a[k], b[k]) for k in a)
    encoded.clear()
    write_tokens(tokenizer, images, tmp_path / "parts")
    assert encoded == []


def test_other_tokens_are_not_mixed_in(tokenizer: ResidualVQ, tiny: SimpleNamespace, tmp_path: Path) -> None:
    images = open_images(tiny.images(tmp_path / "images"), size=8, resize_ratio=1)
    write_tokens(tokenizer, images, tmp_path / "tokens", mirrored=False)
    with pytest.raises(TokenShardError, match="made with another tokenizer"):
        write_tokens(tiny.tokenizer(seed=1), images, tmp_path / "tokens", mirrored=False)
    with pytest.raises(TokenShardError, match="made with another views"):
        write_tokens(tokenizer, images, tmp_path / "tokens")


def test_fingerprint_follows_what_decides_tokens(tiny: SimpleNamespace) -> None:
    marks = [fingerprint(tiny.tokenizer())]
    for part in ("decoder.conv_out.bias", "encoder.conv_in.bias", "quantizer.smoothers.0.conv.bias"):
        tokenizer = tiny.tokenizer()
        with torch.no_grad():
            dict(tokenizer.named_parameters())[part].add_(1)
        marks.append(fingerprint(tokenizer))
    assert marks[1] == marks[0]
    assert len({*marks}) == 3

"""``nextscale prepare index``, and a training that streams what it names."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nextscale.cli import main
from nextscale.tasks.data import stream_shards

TOKENIZER = """
data: {source: train.json, size: 16, resize_ratio: 1.0}
scales: 1 2 4
autoencoder: {channels: 8, multipliers: [1, 1, 1], blocks: 1, latent_channels: 8, attention: false, norm_groups: 8}
quantizer: {vocabulary: 16, channels: 8}
training: {output: runs/tokenizer, epochs: 1, batch_size: 4, sample_every: 1}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with two shards of four images."""
    monkeypatch.setenv("NEXTSCALE_CACHE", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            for i in range(4):
                buffer = io.BytesIO()
                Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)).save(buffer, "png")
                member = tarfile.TarInfo(f"{number}{i}.png")
                member.size = buffer.tell()
                archive.addfile(member, io.BytesIO(buffer.getvalue()))
    (tmp_path / "tokenizer.yaml").write_text(TOKENIZER)
    monkeypatch.chdir(tmp_path)
    stream_shards.cache_clear()
    return tmp_path


def test_from_an_index_to_a_model(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "index", "{0..1}.tar", "train.json"]) == 0
    assert capsys.readouterr().out == "8 samples in 2 shards: train.json\n"
    assert [entry["nsamples"] for entry in json.loads(Path("train.json").read_text())["shardlist"]] == [4, 4]
    Path("1.tar").write_bytes(Path("1.tar").read_bytes()[:1600])
    assert main(["train", "tokenizer", "--config", "tokenizer.yaml"]) == 0
    told = capsys.readouterr()
    assert "training 2 steps of 4" in told.out and "done: " in told.out
    assert (
        "note: 1 images or shards could not be read, or not whole: " in told.err and "1.tar (from sample " in told.err
    )
    assert len(list((project / "runs" / "tokenizer" / "samples").iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["{0..1}.tar", "train.txt"], "an index is a .json file"),
        (["pipe:cat 0.tar", "train.json"], "is a command, which an index must not hold"),
        (["pictures", "train.json"], "nothing is there under this name"),
        (["tokenizer.tar", "train.json"], "none of the 1 shards"),
    ],
)
def test_what_is_no_index(project: Path, capsys: pytest.CaptureFixture[str], words: list[str], error: str) -> None:
    (project / "tokenizer.tar").write_bytes(b"no archive" * 200)
    assert main(["prepare", "index", *words]) == 2
    assert error in capsys.readouterr().err
    assert not (project / "train.json").exists()

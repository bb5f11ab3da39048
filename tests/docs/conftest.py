"""The files that the documentation speaks of, small: photographs, shards, official checkpoints, golden cases.

A document runs in a folder of its own, in which every file of :data:`MAKERS` that its text names is there.
"""

import io
import json
import shutil
import tarfile
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import nextscale.hub
from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.checkpoint import save_folder
from nextscale.core.quantizer import QuantizerConfig
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.transformer import TransformerConfig
from nextscale.evaluation.lpips import CONVOLUTIONS, WIDTHS
from nextscale.systems import SYSTEMS
from nextscale.tasks.depth.dar import DAR, PRESETS
from nextscale.tasks.depth.depthart import DepthART, DepthARTConfig
from nextscale.tasks.generation.controls import Extraction
from nextscale.tasks.generation.controlvar_training import from_var
from nextscale.tasks.generation.var import VAR, VARConfig
from nextscale.tasks.generation.var_training import initialize
from nextscale.tasks.restoration.varformer import VarFormer, VarFormerConfig
from nextscale.tasks.shapes.g3pt import G3PT, G3PTConfig
from nextscale.tasks.shapes.g3pt_tokenizer import PointTokenizer, PointTokenizerConfig
from nextscale.tasks.shapes.g3pt_tokenizer_training import initialize as initialize_shapes
from nextscale.tasks.shapes.g3pt_training import initialize as initialize_g3pt
from nextscale.tasks.shapes.pictures import LearnedEncoderConfig
from nextscale.tasks.tokenizers.bitwise_quantizer import BitwiseQuantizerConfig
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ, ResidualVQConfig

ROOT = Path(__file__).resolve().parents[2]
TRANSFORMER, TOKENIZER = "var_d16.pth", "vae_ch160v4096z32.pth"


def picture(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """Smooth colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def photographs(folder: Path, each: int = 4) -> None:
    for number, name in enumerate(("daisy", "rose", "tulip")):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            picture(10 * number + i).save(folder / name / f"{i}.jpg")


def mask(path: Path) -> None:
    white = np.zeros((32, 32), np.uint8)
    white[8:20, 12:28] = 255
    Image.fromarray(white).save(path)


def webdataset(path: Path, seed: int, samples: int) -> None:
    """A shard of KEY.jpg and KEY.cls, the classes in turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for i in range(samples):
            buffer = io.BytesIO()
            picture(seed * 100 + i, 32, 32).save(buffer, "jpeg")
            for suffix, content in (("jpg", buffer.getvalue()), ("cls", str(i % 10).encode())):
                member = tarfile.TarInfo(f"{seed:04d}{i:04d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def cifar(folder: Path) -> None:
    for number in range(5):
        webdataset(folder / f"train-{number:04d}.tar.gz", number, 10)
    webdataset(folder / "test-0000.tar.gz", 9, 10)


def official_parts() -> tuple[dict, dict]:
    """Tokenizer and transformer in the official layout: released scales, codes and classes, few weights."""
    torch.manual_seed(0)
    shape = AutoencoderConfig(channels=32, multipliers=(1, 1, 1, 1, 1), blocks=1)
    tokenizer = ResidualVQ(ResidualVQConfig(shape))
    torch.nn.init.normal_(tokenizer.quantizer.codebook.weight)
    transformer = initialize(VAR(VARConfig(TransformerConfig(64, 16, 2)), tokenizer), gate=1, head=1)
    return tokenizer.to_official(), transformer.to_official()


def official(path: Path) -> None:
    """Either file of the official release; both are written."""
    tokenizer, transformer = official_parts()
    torch.save(tokenizer, path.parent / TOKENIZER)
    torch.save(transformer, path.parent / TRANSFORMER)


def training_checkpoint(path: Path) -> None:
    """As the official trainer leaves it: the weights deep inside, beside optimiser and arguments."""
    tokenizer, transformer = official_parts()
    inner = {"config": {}, "var_wo_ddp": transformer, "vae_local": tokenizer, "var_opt": {}}
    torch.save({"epoch": 3, "iter": 0, "trainer": inner, "args": Namespace(depth=16, bs=768)}, path)


def tokenizer_of_their_own(folder: Path) -> None:
    """A finished run: a tokenizer for 64 pixels, stride 4."""
    shape = AutoencoderConfig(channels=32, multipliers=(1, 1, 1), blocks=1)
    ResidualVQ(ResidualVQConfig(shape)).save(folder / "model")


def unsafe(path: Path) -> None:
    """A file that would print when it is unpickled."""

    class Evil:
        def __reduce__(self) -> tuple:
            return print, ("this file has run code",)

    torch.save({"weights": Evil()}, path)


def damaged(path: Path) -> None:
    save_folder(path.parent / "whole", {"weight": torch.zeros(100)}, {})
    path.write_bytes((path.parent / "whole" / "model.safetensors").read_bytes()[:-50])
    shutil.rmtree(path.parent / "whole")


def vgg16(path: Path) -> None:
    widths, state = [3, *WIDTHS], {}
    for stage, places in enumerate(CONVOLUTIONS):
        for i, place in enumerate(places):
            inputs = widths[stage + (i > 0)]
            state[f"features.{place}.weight"] = torch.randn(widths[stage + 1], inputs, 3, 3) / (3 * inputs**0.5)
            state[f"features.{place}.bias"] = torch.zeros(widths[stage + 1])
    torch.save(state, path)


def lpips(path: Path) -> None:
    torch.save({f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(WIDTHS)}, path)


class Classifier(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(12, 10)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
        return features, self.linear(features)


def classifier(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it is the form that evaluation networks come in
        torch.jit.save(torch.jit.script(Classifier()), str(path))


def goldens(folder: Path) -> None:
    folder.mkdir()
    for name in ("var_tables", "var_filter", "var_init"):
        shutil.copy(ROOT / "tests" / "parity" / "cases" / f"{name}.npz", folder)


def recipes(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.symlink_to(ROOT / "nextscale" / "recipes")


def pairs(folder: Path) -> None:
    """A finished run of controlvar-cifar10, at its beginning."""
    model = nextscale.load("var-cifar10")
    from_var(model, control_types=("canny",), extractions=(Extraction("canny", 200, 400),)).save(folder / "model")


def depth_model(folder: Path) -> None:
    """A finished run of a DepthART, at its beginning."""
    torch.manual_seed(0)
    shape = AutoencoderConfig(channels=32, multipliers=(1, 1, 1), blocks=1, latent_channels=4)
    schedule = ScaleSchedule.grids([(1, 1), (3, 4), (6, 8)])
    tokenizer = ResidualVQ(ResidualVQConfig(shape, QuantizerConfig(vocabulary=16, channels=4), schedule))
    sizes = TransformerConfig(64, 1, 1, attention="dot")
    model = DepthART(DepthARTConfig(sizes, vocabulary=16, code_channels=4, schedule=schedule), tokenizer)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save(folder / "model")


def dar_model(folder: Path) -> None:
    """A finished run of dar-small, at its beginning."""
    torch.manual_seed(0)
    DAR(PRESETS["dar-tiny"]).save(folder / "model")


def restorer(folder: Path) -> None:
    """A finished run of a VarFormer, at its beginning."""
    torch.manual_seed(0)
    config = VarFormerConfig(1, 4, 1, decoder_blocks=1, window_groups=1)
    VarFormer(config, nextscale.load("var-cifar10")).save(folder / "model")


def shape_drawer(folder: Path) -> None:
    """A finished run of g3pt-small, at its beginning; a tenth of what it draws in is inside."""
    torch.manual_seed(0)
    schedule = ScaleSchedule.counts(1, 4)
    config = PointTokenizerConfig(16, 2, 8, 256, 1, 1, 3, 1.0, BitwiseQuantizerConfig(4), schedule)
    tokenizer = initialize_shapes(PointTokenizer(config))
    with torch.no_grad():
        hidden = tokenizer.decode(torch.rand(1, schedule.length, 4) > 0.5)
        tokenizer.head.bias -= tokenizer.occupancy(hidden, torch.rand(1, 512, 3) * 2 - 1).quantile(0.9)
    sizes = TransformerConfig(16, 1, 2, conditioning="shared")
    seen = LearnedEncoderConfig(8, 8, 2)
    told = G3PTConfig(sizes, 16, 4, schedule, classes=2, class_names=("chair", "table"), learned=seen, picture_width=8)
    initialize_g3pt(G3PT(told, tokenizer)).save(folder / "model")


def meshes(folder: Path) -> None:
    """Four closed meshes of two classes."""
    import trimesh

    for number, made in enumerate((trimesh.creation.box((1, 1, 2)), trimesh.creation.icosphere(1))):
        for height in (1.0, 1.5):
            made.apply_scale((1, 1, height))
            path = folder / ("boxes", "balls")[number] / f"{height:g}.ply"
            path.parent.mkdir(parents=True, exist_ok=True)
            made.export(path)


def annotations(path: Path) -> None:
    runs = {"size": [64, 64], "counts": [1000, 2000, 1096]}
    path.write_text(json.dumps([{"segmentation": runs, "area": 2000}]))


MAKERS: dict[str, Callable[[Path], None]] = {
    "photos": photographs,
    "photos-test": lambda folder: photographs(folder, 1),
    "picture.jpg": lambda path: picture(1).save(path),
    "mask.png": mask,
    "shards": lambda folder: [webdataset(folder / f"train-{i:04d}.tar", i, 4) for i in range(4)] and None,
    "data/cifar10-jpeg": cifar,
    TRANSFORMER: official,
    "ar-ckpt-last.pth": training_checkpoint,
    "runs/other-tokenizer": tokenizer_of_their_own,
    "from-a-stranger.pth": unsafe,
    "cut-short.safetensors": damaged,
    "vgg16.pth": vgg16,
    "lpips.pth": lpips,
    "cifar10_classifier.pt": classifier,
    "goldens": goldens,
    "nextscale/recipes": recipes,
    "runs/controlvar-cifar10": pairs,
    "masks.json": annotations,
    "my-meshes": meshes,
    "runs/depthart-small": depth_model,
    "runs/dar-small": dar_model,
    "runs/varformer-small": restorer,
    "runs/g3pt-small": shape_drawer,
}
"""What a document may name, and what makes it."""


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Call it with a document's text: the working folder, with the files that the text names."""
    released = tmp_path / "hub"

    def prepare(text: str) -> Path:
        folder = tmp_path / "reader"
        folder.mkdir()
        for name, make in MAKERS.items():
            if name in text:
                make(folder / name)
        monkeypatch.chdir(folder)
        return folder

    def cached(repository: str, file: str) -> Path | None:
        """Released files are on this machine already, each small."""
        released.mkdir(exist_ok=True)
        if file in (TRANSFORMER, TOKENIZER) and not (released / file).exists():
            official(released / TRANSFORMER)
        return released / file if (released / file).exists() else None

    monkeypatch.setattr(nextscale.hub, "cached", cached)
    monkeypatch.setenv("NEXTSCALE_CACHE", str(tmp_path / "cache"))
    # A document may register a system.
    before = dict(SYSTEMS)
    yield prepare
    SYSTEMS.clear()
    SYSTEMS.update(before)

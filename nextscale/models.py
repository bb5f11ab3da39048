"""Models that have a name: those that ship with the library, and published ones on the hub."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

WEIGHTS = Path(__file__).parent / "weights"
"""Models that ship with the library, a folder each."""


@dataclass(frozen=True)
class NamedModel:
    """Attributes:

    system: as in :data:`nextscale.systems.SYSTEMS`.
    summary: what it is, in a few words.
    terms: licence of the weights.
    repository, file: place on the Hugging Face hub, ending in / if it is a folder, with * where its name is not known
        (:func:`nextscale.hub.matching`); None: ships with the library.
    needs: names of the models that the file builds on, by what they are to it.
    options: what else :func:`nextscale.load` is told where nothing else is asked for.
    """

    name: str
    system: str
    summary: str
    terms: str
    repository: str | None = None
    file: str | None = None
    needs: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where an embedded model lies."""
        return WEIGHTS / self.name


def _released(depth: int, pixels: int, parameters: str, fid: str) -> NamedModel:
    return NamedModel(
        name=f"var-d{depth}",
        system="var",
        summary=f"ImageNet classes, {pixels} px, {parameters} parameters, published FID {fid}",
        terms="MIT (FoundationVision/VAR)",
        repository="FoundationVision/var",
        file=f"var_d{depth}.pth",
        needs={"tokenizer": "var-tokenizer"},
    )


def _collaborating(drafted: int, fid: str) -> tuple[NamedModel, NamedModel]:
    """A drafter with its refiner, and the refiner alone."""
    terms, repository, tokenizer = "MIT (czg1225/CoDe)", "Zigeng/VAR_CoDe", {"tokenizer": "var-tokenizer"}
    refiner = NamedModel(
        name=f"code-{drafted}-refiner",
        system="var",
        summary=f"var-d16 for the last {10 - drafted} of 10 scales, after the drafter of code-{drafted}",
        terms=terms,
        repository=repository,
        file=f"refiner_{drafted}.pth",
        needs=tokenizer,
    )
    pair = NamedModel(
        name=f"code-{drafted}",
        system="code",
        summary=f"ImageNet classes, 256 px, d30 draws {drafted} scales and d16 the rest, published FID {fid}",
        terms=terms,
        repository=repository,
        file=f"drafter_{drafted}.pth",
        needs={"refiner": refiner.name, **tokenizer},
        options={"draft_scales": drafted},
    )
    return pair, refiner


def _controlled(control: str, shown: str) -> NamedModel:
    return NamedModel(
        name=f"car-{control}-d16",
        system="car",
        summary=f"adapter, 196 M parameters, that lets var-d16 follow {shown}",
        terms="MIT (MiracleDance/CAR)",
        repository="MiracleDance/CAR",
        file=f"car_{control}_d16.pth",
        needs={"base": "var-d16"},
        options={"control_type": control},
    )


def _joint(depth: int, parameters: str) -> NamedModel:
    return NamedModel(
        name=f"controlvar-d{depth}",
        system="controlvar",
        summary=f"ImageNet classes with mask, canny, depth or normal controls, 256 px, {parameters} parameters",
        terms="none stated by its authors (lxa9867/ControlVAR), so all rights are theirs",
        repository="qiuk6/ControlVAR",
        file=f"d{depth}.pth",
        needs={"tokenizer": "var-tokenizer"},
    )


def _flexvar(depth: int, epoch: int, parameters: str, fid: str) -> NamedModel:
    return NamedModel(
        name=f"flexvar-d{depth}",
        system="flexvar",
        summary=f"ImageNet classes, any size, {parameters} parameters, published FID {fid} at 256 px",
        terms="MIT (jiaosiyu1999/FlexVAR)",
        repository="jiaosiyu1999/FlexVAR",
        file=f"FlexVARd{depth}-epo{epoch}.pth",
        needs={"tokenizer": "flexvar-tokenizer"},
    )


def _infinity(size: str, file: str, tokenizer: str, summary: str) -> NamedModel:
    return NamedModel(
        name=f"infinity-{size}",
        system="infinity",
        summary=f"prompts, {summary}",
        terms="MIT (FoundationVision/Infinity)",
        repository="FoundationVision/infinity",
        file=file,
        needs={"tokenizer": f"infinity-tokenizer-{tokenizer}"},
    )


def _vargpt(version: str, repository: str, summary: str) -> NamedModel:
    return NamedModel(
        name=f"vargpt-{version}",
        system="vargpt",
        summary=summary,
        terms="Apache-2.0 (VARGPT-family); the language model's own terms beside it",
        repository=f"VARGPT-family/{repository}",
        file="/",
    )


def _star(name: str, file: str, scales: str, summary: str) -> NamedModel:
    return NamedModel(
        name=f"star-{name}",
        system="star",
        summary=f"prompts, {summary}",
        terms="MIT (Davinci-XLab/STAR-T2I)",
        repository="taocrayon/STAR",
        file=file,
        needs={"tokenizer": "var-tokenizer"},
        options={"schedule": scales},
    )


def _flowar(size: str, letter: str, parameters: str, fid: str) -> NamedModel:
    return NamedModel(
        name=f"flowar-{size}",
        system="flowar",
        summary=f"ImageNet classes, 256 px, {parameters} parameters{fid}",
        terms="Apache-2.0 (model card of OliverRen/FlowAR; the code OliverRensu/FlowAR states none)",
        repository="OliverRen/FlowAR",
        file=f"FlowAR-{letter}.pth",
        needs={"tokenizer": "kl16"},
    )


def _bits(name: str, file: str, bits: int, quality: str) -> NamedModel:
    return NamedModel(
        name=f"infinity-tokenizer-{name}",
        system="bitwise-vq",
        summary=f"images <-> up to 13 scales of {bits} bits a token, stride 16{quality}",
        terms="MIT (FoundationVision/Infinity)",
        repository="FoundationVision/infinity",
        file=file,
    )


def _sar3d(condition: str, file: str, summary: str) -> NamedModel:
    return NamedModel(
        name=f"sar3d-{condition}",
        system="sar3d",
        summary=f"3D shapes of {summary}",
        terms="S-Lab License 1.0, non-commercial (cyw-3d/SAR3D)",
        repository="cyw-3d/sar3d",
        file=file,
        needs={"tokenizer": "sar3d-vqvae"},
    )


def _triplanes(name: str, file: str, shown: str) -> NamedModel:
    return NamedModel(
        name=name,
        system="triplane-vq",
        summary=f"six views <-> 10 scales of 16,384 codes on three planes, {shown}, 176 M parameters",
        terms="S-Lab License 1.0, non-commercial (cyw-3d/SAR3D)",
        repository="cyw-3d/sar3d",
        file=file,
    )


_SCALES_1024 = "1 2 3 4 5 7 9 12 16 21 27 36 48 64"

_MODELS = (
    NamedModel("var-cifar10", "var", "CIFAR-10 classes, 32 px, with its tokenizer", "Apache-2.0 (this library)"),
    NamedModel(
        "flexvar-cifar10", "flexvar", "CIFAR-10 classes, 16 to 48 px and 32 x 64 px", "Apache-2.0 (this library)"
    ),
    NamedModel(
        "flowar-cifar10", "flowar", "CIFAR-10 classes, 32 px, over continuous latents", "Apache-2.0 (this library)"
    ),
    NamedModel("infinity-cifar10", "infinity", 'prompts such as "a white ship", 32 px', "Apache-2.0 (this library)"),
    NamedModel("car-canny-cifar10", "car", "follows canny edges, on top of var-cifar10", "Apache-2.0 (this library)"),
    NamedModel("varformer-small", "varformer", "clean photos of noise, JPEG, dark, haze", "Apache-2.0 (this library)"),
    NamedModel("dar-scenes", "dar", "depth of photos, learned from synthetic scenes", "Apache-2.0 (this library)"),
    NamedModel(
        "g3pt-objects", "g3pt", "furniture, vessels and tools of a class or a picture", "Apache-2.0 (this library)"
    ),
    _released(16, 256, "310 M", "3.55"),
    _released(20, 256, "601 M", "2.95"),
    _released(24, 256, "1.0 B", "2.33"),
    _released(30, 256, "2.0 B", "1.97"),
    _released(36, 512, "2.4 B", "2.63"),
    *_collaborating(6, "2.27"),
    *_collaborating(7, "2.11"),
    *_collaborating(8, "1.98"),
    *_collaborating(9, "1.94"),
    _controlled("canny", "canny edges"),
    _controlled("hed", "soft edges"),
    _controlled("depth", "depth maps"),
    _controlled("normal", "surface normals"),
    _controlled("sketch", "sketches"),
    _joint(12, "134 M"),
    _joint(16, "311 M"),
    _joint(20, "602 M"),
    _joint(24, "1.0 B"),
    _joint(30, "2.0 B"),
    NamedModel(
        name="varformer-d16",
        system="varformer",
        summary="restores photographs: rain, blur, noise, haze, low light; 908 M parameters",
        terms="none stated by its authors (siywang541/Varformer), so all rights are theirs",
        repository="wsy541/VarFormer",
        file="net_g_last.pth",
    ),
    NamedModel(
        name="var-tokenizer",
        system="residual-vq",
        summary="images <-> 10 scales of 4,096 codes, stride 16, 109 M parameters",
        terms="MIT (FoundationVision/VAR)",
        repository="FoundationVision/var",
        file="vae_ch160v4096z32.pth",
    ),
    _flexvar(16, 179, "316 M", "3.05"),
    _flexvar(20, 249, "608 M", "2.41"),
    _flexvar(24, 349, "1.0 B", "2.21"),
    NamedModel(
        name="flexvar-tokenizer",
        system="flex-vq",
        summary="images <-> maps of 8,912 codes of any size, stride 16, 72 M parameters",
        terms="MIT (jiaosiyu1999/FlexVAR)",
        repository="jiaosiyu1999/FlexVAR",
        file="FlexVAE.pth",
    ),
    _infinity("2b", "infinity_2b_reg.pth", "d32", "1024 px in 15 aspect ratios, 2.2 B parameters, GenEval 0.69"),
    _infinity("8b", "infinity_8b_weights/", "d56", "1024 px in 15 aspect ratios, 8.4 B parameters, DPG 86.6"),
    _infinity("8b-512", "infinity_8b_512x512_weights/", "d56", "512 px, 8.4 B parameters, halfway through training"),
    _vargpt("v1", "VARGPT_LLaVA-v1", "conversations with images of 256 px, 7 B language model and 2 B decoder"),
    _vargpt("v1.1", "VARGPT-v1.1", "conversations with images of 512 px, 7.6 B language model and 2.2 B decoder"),
    _vargpt("v1.1-edit", "VARGPT-v1.1-edit", "the same, taught to change images"),
    _star("d16-256", "*d16*", "1 2 3 4 5 6 8 10 13 16", "256 px, 275 M parameters"),
    _star("d30-256", "*d30*256*|*256*d30*", "1 2 3 4 5 6 8 10 13 16", "256 px, 1.7 B parameters"),
    _star("d30-512", "*512*", "1 2 3 4 6 9 13 18 24 32", "512 px, 1.7 B parameters"),
    _star("d30-1024", "*1024*!*sampler*", _SCALES_1024, "1024 px, 1.7 B parameters"),
    _star("d30-1024-sampler", "*1024*sampler*", _SCALES_1024, "1024 px, 1.8 B parameters, with the stable sampler"),
    _flowar("small", "S", "172 M", ""),
    _flowar("large", "L", "587 M", ", published FID 1.90"),
    _flowar("huge", "H", "1.9 B", ", published FID 1.65"),
    NamedModel(
        name="kl16",
        system="kl",
        summary="images <-> continuous latents of 16 channels, stride 16, 66 M parameters",
        terms="MIT (LTH14/mar)",
        repository="xwen99/mar-vae-kl16",
        file="kl16.ckpt",
    ),
    _bits("d16", "infinity_vae_d16.pth", 16, ", rFID 0.31 at 512 px"),
    _bits("d24", "infinity_vae_d24.pth", 24, ", rFID 0.30 at 512 px"),
    _bits("d32-plain", "infinity_vae_d32.pth", 32, ", rFID 0.23 at 512 px; of no released transformer"),
    _bits("d32", "infinity_vae_d32reg.pth", 32, ", rFID 0.32 at 512 px; infinity-2b's"),
    _bits("d64", "infinity_vae_d64.pth", 64, ", rFID 0.15 at 512 px"),
    _bits("d56", "infinity_vae_d56_f8_14_patchify.pth", 56, " of 2 x 2 cells; infinity-8b's"),
    _sar3d("image", "image-condition-ckpt.pth", "pictures, 1.2 B parameters, published FID 22.55"),
    _sar3d("text", "text-condition-ckpt.pth", "prompts, 383 M parameters"),
    _triplanes("sar3d-vqvae", "vqvae-ckpt.pt", "density fields"),
    _triplanes("sar3d-vqvae-mesh", "vqvae-flexicubes-ckpt.pt", "FlexiCubes meshes"),
)

MODELS: dict[str, NamedModel] = {model.name: model for model in _MODELS}
"""Every named model; a later system adds its lines above."""


def shipped(what: str, *systems: str) -> str:
    """The name of the first model of any of these systems that ships with the library.

    Args:
        what: such a model is, for the message.

    Raises:
        ValueError: none does.
    """
    for model in MODELS.values():
        if model.system in systems and model.repository is None:
            return model.name
    raise ValueError(f"no {what} ships with this library: name one by --model")


def list_models(pattern: str | None = None) -> list[str]:
    """Names that :func:`nextscale.load` takes.

    Args:
        pattern: with ``*`` and ``?``, such as ``"var-d*"``; a plain word finds the names that contain it.
    """
    if pattern is None:
        return list(MODELS)
    wanted = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    return [name for name in MODELS if fnmatch(name, wanted)]


def no_such_source(source: str) -> FileNotFoundError:
    """The error for what is neither a file, nor a folder, nor a name."""
    near = difflib.get_close_matches(source, MODELS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"names are {', '.join(MODELS)}"
    return FileNotFoundError(f"{source!r} is no file, no folder and no model's name; {hint}")


def locate(model: NamedModel) -> Path:
    """The file or folder of a named model, fetched from the hub where it is not here yet.

    Raises:
        FileNotFoundError: an embedded model's folder is missing, or a hub file cannot be fetched.
    """
    if model.repository is None or model.file is None:
        if not model.folder.is_dir():
            raise FileNotFoundError(
                f"{model.name} should be in {model.folder}, which is missing: install nextscale again"
            )
        return model.folder
    from nextscale.hub import fetch

    return fetch(model.repository, model.file)


def local_path(model: NamedModel) -> Path | None:
    """Where a named model lies on this machine; None where it would have to be fetched."""
    if model.repository is None or model.file is None:
        return model.folder if model.folder.is_dir() else None
    from nextscale.hub import cached

    return cached(model.repository, model.file)

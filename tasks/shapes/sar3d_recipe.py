"""The configurations of SAR3D's training runs: tokenizer, mesh head, transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.quantizer import QuantizerConfig
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import Hooks, Metrics, Trainer, TrainingConfig
from nextscale.datasets.gbuffers import GBuffers
from nextscale.tasks.data import Examples, Load, tokenizer_of, trainer
from nextscale.tasks.generation.text import TextEncoder, TextEncoderConfig
from nextscale.tasks.generation.text_small import make_encoder
from nextscale.tasks.generation.var_training import initialize
from nextscale.tasks.shapes.objects import Shape
from nextscale.tasks.shapes.pictures import ImageEncoderConfig, LearnedEncoderConfig
from nextscale.tasks.shapes.sar3d import CLIP_L, DINO_L, SAR3D, SAR3DConfig
from nextscale.tasks.shapes.sar3d_data import ConditionedObjects, ObjectData
from nextscale.tasks.shapes.sar3d_fields import FieldConfig, MeshField
from nextscale.tasks.shapes.sar3d_mesh_training import MeshLossConfig, MeshTraining
from nextscale.tasks.shapes.sar3d_planes import PLANES, PlanesConfig
from nextscale.tasks.shapes.sar3d_rendering import RenderConfig
from nextscale.tasks.shapes.sar3d_tokenizer import TriplaneVQ, TriplaneVQConfig
from nextscale.tasks.shapes.sar3d_tokenizer_training import TriplaneLossConfig, TriplaneTraining, views_of
from nextscale.tasks.shapes.sar3d_training import SAR3DTraining
from nextscale.tasks.shapes.sar3d_transformer import SAR3DBlocksConfig
from nextscale.tasks.shapes.sar3d_views import ViewsConfig
from nextscale.tasks.shapes.viewing import pictures

SHOWN = 6
"""Objects on a run's sample sheet, at most."""


def three_planes(scales: str) -> ScaleSchedule:
    """Scales given by their sides."""
    return ScaleSchedule.grids([scale.grid for scale in ScaleSchedule.parse(scales).scales], planes=PLANES)


@dataclass(frozen=True)
class TriplaneRecipe:
    """Train a tokenizer of three planes on views of objects.

    Attributes:
        scales: sides of the maps of one plane; the last times the encoder's stride is the views' size.
        encoder, views, quantizer, decoder, upsampler, head, render: see
            :class:`nextscale.tasks.shapes.sar3d_tokenizer.TriplaneVQConfig`.
        init: a tokenizer to start from, a folder or an official file; its sizes then replace those given.
    """

    data: ObjectData
    scales: str = "1 2 3 4 5 6 8 10 13 16"
    encoder: AutoencoderConfig = field(default_factory=lambda: TriplaneVQConfig().encoder)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    quantizer: QuantizerConfig = field(default_factory=lambda: TriplaneVQConfig().quantizer)
    decoder: PlanesConfig = field(default_factory=PlanesConfig)
    upsampler: AutoencoderConfig = field(default_factory=lambda: TriplaneVQConfig().upsampler)
    head: FieldConfig = field(default_factory=FieldConfig)
    render: RenderConfig = field(default_factory=RenderConfig)
    loss: TriplaneLossConfig = field(default_factory=TriplaneLossConfig)
    init: str | None = None
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            output="runs/sar3d-vqvae", epochs=100, batch_size=28, weight_decay=1e-3, average=0.9999, precision="bf16"
        )
    )

    def build(self, load: Load) -> TriplaneVQ:
        """The tokenizer to train: new, or from ``init``.

        Raises:
            ValueError: ``init`` is another model.
        """
        if self.init is not None:
            found = tokenizer_of(load(self.init))
            if not isinstance(found, TriplaneVQ):
                raise ValueError(f"{self.init} is a {type(found).__name__}; expected a tokenizer of three planes")
            return found
        config = TriplaneVQConfig(
            self.encoder,
            self.views,
            self.quantizer,
            three_planes(self.scales),
            self.decoder,
            self.upsampler,
            self.head,
            render=self.render,
        )
        return TriplaneVQ(config)

    def trainer(self, load: Load, hooks: Hooks | None = None) -> Trainer:
        """The run, ready to start; validation is added to ``hooks`` where there are held-out objects."""
        torch.manual_seed(self.training.seed)
        hooks, task = hooks or Hooks(), TriplaneTraining(self.build(load), self.loss)
        held_out = self.data.open_validation()
        if held_out is not None and hooks.validate is None:
            hooks.validate = lambda step: validate_views(task.tokenizer, held_out)
        return trainer(self.training, task, self.data.open_training(), hooks)

    def examples(self, run: Trainer) -> Examples:
        """Pictures over what the tokenizer makes of them."""
        assert isinstance(run.task, TriplaneTraining)
        shown, made = rendered(run.task.tokenizer, self.data.open_validation() or self.data.open_training(), SHOWN)
        return Examples([("seen", list(shown)), ("made", list(made))])

    def finish(self, run: Trainer) -> Path:
        """Write the trained (averaged) tokenizer; returns its folder."""
        assert isinstance(run.task, TriplaneTraining)
        with run.averaged():
            return run.task.tokenizer.save(Path(self.training.output) / "model")


@torch.no_grad()
def rendered(tokenizer: TriplaneVQ, dataset: GBuffers, count: int) -> tuple[Tensor, Tensor]:
    """The last picture of the first objects, and the same view of their reconstruction, in [0, 1]."""
    batch = dataset.fetch(range(min(count, len(dataset))))
    batch = {name: value.to(tokenizer.device) for name, value in batch.items() if isinstance(value, Tensor)}
    planes = tokenizer.decode(tokenizer.encode(views_of(batch, tokenizer).flatten(0, 1)))
    size = batch["colours"].shape[-1]
    rows = zip(planes, batch["cameras"], strict=True)
    made = [tokenizer.pictures(each[None], cameras[-1:], size)[0] for each, cameras in rows]
    return batch["colours"][:, -1].cpu(), torch.stack(made).cpu()


def validate_views(tokenizer: TriplaneVQ, dataset: GBuffers, count: int = 16) -> Metrics:
    """PSNR in dB of the last picture, which the encoder has not seen where there are enough, over held-out objects."""
    shown, made = rendered(tokenizer, dataset, count)
    squared = (shown - made).square().mean((1, 2, 3)).clamp_min(1e-10)
    return {"psnr": float((-10 * torch.log10(squared)).mean())}


@dataclass(frozen=True)
class MeshRecipe:
    """Train a FlexiCubes head for the planes of a trained tokenizer, which stay as they are.

    Attributes:
        tokenizer: a trained one, folder or official file.
        grid: cubes a side; None: the tokenizer's, or 128.
    """

    tokenizer: str
    data: ObjectData
    grid: int | None = None
    loss: MeshLossConfig = field(default_factory=MeshLossConfig)
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(output="runs/sar3d-mesh", epochs=10, batch_size=4, average=0.999)
    )

    def build(self, load: Load) -> TriplaneVQ:
        """The tokenizer with a mesh head: its own, or a new one."""
        found = tokenizer_of(load(self.tokenizer))
        if not isinstance(found, TriplaneVQ):
            raise ValueError(f"{self.tokenizer} is a {type(found).__name__}; expected a tokenizer of three planes")
        head = replace(found.config.head, kind="mesh", grid=self.grid or found.config.head.grid)
        trained = isinstance(found.field, MeshField)
        made = TriplaneVQ(replace(found.config, head=head))
        kept = {name: value for name, value in found.state_dict().items() if trained or not name.startswith("field.")}
        made.load_state_dict(kept, strict=trained)
        return made

    def trainer(self, load: Load, hooks: Hooks | None = None) -> Trainer:
        """The run, ready to start."""
        torch.manual_seed(self.training.seed)
        task = MeshTraining(self.build(load), self.loss)
        return trainer(self.training, task, replace(self.data, normals=True).open_training(), hooks)

    def examples(self, run: Trainer) -> Examples:
        """Meshes of the first objects."""
        assert isinstance(run.task, MeshTraining)
        tokenizer, dataset = run.task.tokenizer, self.data.open_validation() or self.data.open_training()
        batch = dataset.fetch(range(min(SHOWN, len(dataset))))
        batch = {name: value.to(tokenizer.device) for name, value in batch.items() if isinstance(value, Tensor)}
        with torch.no_grad():
            planes = tokenizer.decode(tokenizer.encode(views_of(batch, tokenizer).flatten(0, 1)))
        return Examples([("meshes", [picture_of(tokenizer.shape(each[None])) for each in planes])])

    def finish(self, run: Trainer) -> Path:
        """Write the tokenizer with its trained (averaged) head; returns its folder."""
        assert isinstance(run.task, MeshTraining)
        with run.averaged():
            return run.task.tokenizer.save(Path(self.training.output) / "model")


def picture_of(shape: Shape, size: int = 128) -> Tensor:
    """A picture (3, size, size) of a mesh; white where there is none."""
    if shape.empty:
        return torch.ones(3, size, size)
    return torch.from_numpy(pictures(shape, [30], size=size)[0].copy()).movedim(-1, 0) / 255


@dataclass(frozen=True)
class SAR3DRecipe:
    """Train a SAR3D on views of objects, conditioned on pictures or texts.

    Attributes:
        tokenizer: a trained one, folder or official file.
        condition: what shapes are drawn of.
        depth, width, heads: None: width 64 d, 16 heads, as the paper has them.
        encoder: of pictures: ``"learned"``, a small network trained along, or DINOv2 (folder or hub name).
        picture: sizes of the learned one.
        text_encoder: folder or hub name; None: one of a few thousand weights that knows the captions' words, made in
            the run's folder and saved with the model.
        text_width, text_length: channels of an encoder made here, and tokens a text is filled up to.
        prepared: read tokens and features from the objects' folders instead of making them of their pictures and texts.
        drop: probabilities of dropping the condition.
        gate, modulation: initial size of the gates of the blocks' branches, and of their scales and shifts.
        init: a SAR3D to start from, a folder or an official file.
    """

    tokenizer: str
    data: ObjectData
    condition: Literal["image", "text"] = "image"
    depth: int = 16
    width: int | None = None
    heads: int | None = None
    encoder: str = "learned"
    picture: LearnedEncoderConfig = field(default_factory=LearnedEncoderConfig)
    memory_width: int = 256
    text_encoder: str | None = None
    text_width: int = 64
    text_length: int = 77
    prepared: bool = False
    drop: float = 0.1
    guidance: float = 4.0
    gate: float = 1e-4
    modulation: float = 0.5
    init: str | None = None
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(output="runs/sar3d", epochs=150, batch_size=64, warmup_epochs=3)
    )

    def build(self, load: Load, captions: Sequence[str]) -> SAR3D:
        """The model to train: new, or from ``init``.

        Raises:
            ValueError: the tokenizer is another model.
        """
        tokenizer = tokenizer_of(load(self.tokenizer))
        if not isinstance(tokenizer, TriplaneVQ):
            raise ValueError(f"{self.tokenizer} is a {type(tokenizer).__name__}; expected a tokenizer of three planes")
        if self.init is not None:
            model: SAR3D = load(self.init, tokenizer)
            model.config = replace(model.config, condition_drop=self.drop, guidance=self.guidance)
            return model
        learned = self.condition == "image" and self.encoder == "learned"
        image = DINO_L if self.encoder == "learned" else ImageEncoderConfig(self.encoder)
        text = self._text(captions) if self.condition == "text" else CLIP_L
        width = self.width or 64 * self.depth
        blocks = SAR3DBlocksConfig(
            width,
            self.depth,
            self.heads or 16,
            drop_path=0.1 * self.depth / 24,
            memory_width=self._memory_width(text, image, learned),
            look="before" if self.condition == "image" else "after",
        )
        codes = tokenizer.config.quantizer
        config = SAR3DConfig(
            blocks,
            self.condition,
            codes.vocabulary,
            codes.channels,
            tokenizer.config.schedule,
            self.drop,
            self.guidance,
            image,
            text,
            self.picture if learned else None,
        )
        model = SAR3D(config, tokenizer)
        initialize(cast(Any, model), modulation=self.modulation, gate=self.gate)
        return model

    def _memory_width(self, text: TextEncoderConfig, image: ImageEncoderConfig, learned: bool) -> int:
        if self.condition == "text":
            return TextEncoder(text).width
        if learned:
            return self.memory_width
        from transformers import AutoConfig

        return int(AutoConfig.from_pretrained(image.name).hidden_size)

    def _text(self, captions: Sequence[str]) -> TextEncoderConfig:
        if self.text_encoder is not None:
            return replace(CLIP_L, name=self.text_encoder, max_length=self.text_length)
        place = Path(self.training.output) / "text-encoder"
        if not (place / "config.json").is_file():
            make_encoder(place, captions, kind="clip", width=self.text_width, max_length=self.text_length)
        return replace(CLIP_L, name=str(place), max_length=self.text_length)

    def _objects(self, dataset: GBuffers) -> GBuffers:
        """What is read of every object."""
        if self.prepared:
            return replace(dataset, pictures=False, tokens=True, features=self.condition)
        return replace(dataset, captions=self.condition == "text")

    def trainer(self, load: Load, hooks: Hooks | None = None) -> Trainer:
        """The run, ready to start; validation is added to ``hooks`` where there are held-out objects."""
        torch.manual_seed(self.training.seed)
        hooks, dataset = hooks or Hooks(), self._objects(self.data.open_training())
        captions = dataset.texts() if dataset.captions and self.text_encoder is None else []
        model = self.build(load, captions)
        task = SAR3DTraining(model)
        held_out = self.data.open_validation()
        if held_out is not None and hooks.validate is None:
            objects = ConditionedObjects(self._objects(held_out), model, self.training.seed)
            hooks.validate = lambda step: validate_tokens(task, objects)
        return trainer(self.training, task, ConditionedObjects(dataset, model, self.training.seed), hooks)

    def examples(self, run: Trainer) -> Examples:
        """Shapes of the conditions of the first objects."""
        assert isinstance(run.task, SAR3DTraining)
        model = run.task.model
        objects = ConditionedObjects(
            self._objects(self.data.open_validation() or self.data.open_training()), model, self.training.seed
        )
        batch = objects.fetch(range(min(SHOWN, len(objects))))
        features = batch.get("features")
        condition = batch["condition"] if features is None else features
        shapes = model.generate(condition, seed=[0] * len(batch["tokens"]), resolution=64)
        return Examples([("shapes", [picture_of(shape) for shape in shapes])])

    def finish(self, run: Trainer) -> Path:
        """Write the trained (averaged) model; returns its folder."""
        assert isinstance(run.task, SAR3DTraining)
        with run.averaged():
            return run.task.model.save(Path(self.training.output) / "model")


@torch.no_grad()
def validate_tokens(task: SAR3DTraining, objects: ConditionedObjects, batch_size: int = 16) -> Metrics:
    """Means of :meth:`SAR3DTraining.evaluate` over held-out objects."""
    totals: dict[str, float] = {}
    for start in range(0, len(objects), batch_size):
        batch = objects.fetch(range(start, min(start + batch_size, len(objects))))
        batch = {name: v.to(task.model.device) if isinstance(v, Tensor) else v for name, v in batch.items()}
        for name, value in task.evaluate(batch).items():
            totals[name] = totals.get(name, 0.0) + float(value) * len(batch["tokens"])
    return {name: total / len(objects) for name, total in totals.items()}

"""The systems this library knows, and how each is recognised. A later system adds one entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from nextscale.models import MODELS


@dataclass(frozen=True)
class Need:
    """Another model that a system's files build on.

    Attributes:
        model: name of the published one, which tells the kind and is taken where no other is found.
        entry: where the system's training files keep it.
        beside: pattern of file names under which it may lie beside a file, if it is the only one.
    """

    model: str
    entry: tuple[str, ...] = ()
    beside: str | None = None


@dataclass(frozen=True)
class System:
    """Attributes:

    module: has the class, and ``is_official(content)`` unless it ``combines``; imported when it is needed.
    class_name: of the class with ``from_official(content, **needs, **overrides)`` and ``from_saved(state, config,
        **needs)``.
    needs: what an official file builds on, by the name under which ``from_official`` takes it. A saved folder is
        complete, unless its configuration has an entry ``needs``: names, each with a model's name or a path.
    overrides: what else an official file cannot tell.
    stated_terms: of published weights that lie where nothing can be fetched by name.
    model_types: by which the ``config.json`` of a published folder in the layout of transformers names it. The class
        is then given ``{"model": state dict, "config": what that file says}``.
    combines: system whose models it puts together with what it needs. Its own official files are that system's; any
        model of it may be given, and the class has ``of(model, **needs, **overrides)`` in place of ``from_official``.
    """

    name: str
    module: str
    class_name: str
    needs: Mapping[str, Need] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    combines: str | None = None
    stated_terms: str | None = None
    model_types: tuple[str, ...] = ()

    def recognises(self, content: Mapping[str, Any]) -> bool:
        """Whether a file's content is of this system, in its official layout."""
        return self.combines is None and bool(import_module(self.module).is_official(content))

    @property
    def model_class(self) -> Any:
        return getattr(import_module(self.module), self.class_name)

    @property
    def terms(self) -> str:
        """Under which terms the published weights of this system are given."""
        named = (model.terms for model in MODELS.values() if model.system == self.name and model.repository)
        return self.stated_terms or next(named)


_SYSTEMS = (
    # Before VAR and its tokenizer, which a file of it holds whole.
    System(
        name="varformer",
        module="nextscale.tasks.restoration.varformer",
        class_name="VarFormer",
        overrides=("form", "guidance", "schedule", "heads"),
    ),
    # Before VAR: a snapshot of its training holds a VAR too.
    System(
        name="car",
        module="nextscale.tasks.generation.car",
        class_name="CAR",
        needs={"base": Need("var-d16", beside="var_d*.pth")},
        overrides=("control_type", "label_drop", "guidance"),
    ),
    # Before VAR, whose entries it has too.
    System(
        name="controlvar",
        module="nextscale.tasks.generation.controlvar",
        class_name="ControlVAR",
        needs={"tokenizer": Need("var-tokenizer", beside="vae_*.pth")},
        overrides=("schedule", "heads", "control_types", "either_order", "halves"),
    ),
    # Before VAR, whose entries it has too.
    System(
        name="depthart",
        module="nextscale.tasks.depth.depthart",
        class_name="DepthART",
        overrides=("tokenizer", "schedule", "heads", "training", "normalizer"),
        stated_terms="MIT (bulatko/DepthART)",
    ),
    System(
        name="dar",
        module="nextscale.tasks.depth.dar",
        class_name="DAR",
        overrides=("dataset", "min_depth", "max_depth", "schedule", "heads"),
        stated_terms="none stated by its authors (wjh892521292/DAR), who publish no weights",
    ),
    System(
        name="var",
        module="nextscale.tasks.generation.var",
        class_name="VAR",
        needs={"tokenizer": Need("var-tokenizer", ("trainer", "vae_local"), "vae_*.pth")},
        overrides=("schedule", "heads"),
    ),
    System(
        name="code",
        module="nextscale.tasks.generation.code",
        class_name="CoDe",
        needs={"refiner": Need("var-d16", beside="refiner_*.pth")},
        overrides=("draft_scales",),
        combines="var",
    ),
    System(
        name="residual-vq",
        module="nextscale.tasks.tokenizers.residual_vq",
        class_name="ResidualVQ",
        overrides=("schedule", "unit_norm", "smoothing", "beta", "norm_groups"),
    ),
    System(
        name="vargpt",
        module="nextscale.tasks.generation.vargpt",
        class_name="VARGPT",
        overrides=("schedule", "cross_attention", "labelled", "join_images", "guidance", "temperature", "norm_groups"),
        model_types=("vargpt_llava", "vargpt_qwen2_vl"),
    ),
    System(
        name="flexvar",
        module="nextscale.tasks.generation.flexvar",
        class_name="FlexVAR",
        needs={"tokenizer": Need("flexvar-tokenizer", ("trainer", "vae_local"), "FlexVAE*.pth")},
        overrides=("schedule", "heads"),
    ),
    System(
        name="flex-vq",
        module="nextscale.tasks.tokenizers.flex_vq",
        class_name="FlexVQ",
        overrides=("schedule", "unit_norm", "beta", "norm_groups"),
    ),
    System(
        name="infinity",
        module="nextscale.tasks.generation.infinity",
        class_name="Infinity",
        needs={"tokenizer": Need("infinity-tokenizer-d32", ("trainer", "vae_local"), "infinity_vae_*.pth")},
        overrides=(
            "schedule",
            "text_encoder",
            "text_precision",
            "positions",
            "restart_positions",
            "level_each_chunk",
            "guidance",
            "temperature",
        ),
    ),
    System(
        name="flowar",
        module="nextscale.tasks.generation.flowar",
        class_name="FlowAR",
        needs={"tokenizer": Need("kl16", beside="kl16*.ckpt")},
        overrides=("schedule", "heads", "guidance", "guidance_bound", "ode_steps"),
    ),
    System(
        name="kl",
        module="nextscale.tasks.tokenizers.kl_autoencoder",
        class_name="KLAutoencoder",
        overrides=("schedule", "latent_scale", "norm_groups"),
    ),
    System(
        name="star",
        module="nextscale.tasks.generation.star",
        class_name="STAR",
        needs={"tokenizer": Need("var-tokenizer", ("trainer", "vae_local"), "vae_*.pth")},
        overrides=(
            "schedule",
            "text_encoder",
            "cross_attention",
            "rotary_base",
            "rotary_span",
            "add_levels",
            "head_norm",
            "stable_from",
            "sample_version",
            "guidance",
            "heads",
            "norm_eps",
        ),
    ),
    System(
        name="bitwise-vq",
        module="nextscale.tasks.tokenizers.bitwise_vq",
        class_name="BitwiseVQ",
        overrides=("schedule", "patch", "halvings", "norm_groups"),
    ),
    System(
        name="sar3d",
        module="nextscale.tasks.shapes.sar3d",
        class_name="SAR3D",
        needs={"tokenizer": Need("sar3d-vqvae", ("trainer", "vae_local"), "vqvae-*.pt")},
        overrides=(
            "schedule",
            "heads",
            "condition",
            "text_encoder",
            "image_encoder",
            "condition_drop",
            "guidance",
        ),
    ),
    System(
        name="triplane-vq",
        module="nextscale.tasks.shapes.sar3d_tokenizer",
        class_name="TriplaneVQ",
        overrides=("schedule", "heads", "view_heads", "smoothing", "beta", "norm_groups", "grid", "published"),
    ),
    System(
        name="g3pt",
        module="nextscale.tasks.shapes.g3pt",
        class_name="G3PT",
        stated_terms="no weights were published",
    ),
    System(
        name="point-vq",
        module="nextscale.tasks.shapes.g3pt_tokenizer",
        class_name="PointTokenizer",
        stated_terms="no weights were published",
    ),
    System(
        name="describer",
        module="nextscale.tasks.shapes.describing",
        class_name="Describer",
        stated_terms="no weights were published",
    ),
    # No next-scale system: the baseline they are compared with.
    System(
        name="raster",
        module="nextscale.tasks.generation.raster",
        class_name="Raster",
        stated_terms="a baseline of this library",
    ),
)

SYSTEMS: dict[str, System] = {system.name: system for system in _SYSTEMS}
"""By the name that saved folders carry. Files are tried in this order."""


def find_system(name: str) -> System:
    """Raises:

    ValueError: no system is called so.
    """
    if name not in SYSTEMS:
        raise ValueError(f"unknown system {name!r}; known are {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


@dataclass(frozen=True)
class Recipe:
    """Something that can be trained.

    Attributes:
        place: ``module:class`` of the recipe, a dataclass of options with ``trainer``, ``examples`` and ``finish``.
    """

    place: str
    summary: str

    @property
    def recipe_class(self) -> Any:
        module, name = self.place.split(":")
        return getattr(import_module(module), name)


RECIPES: dict[str, Recipe] = {
    "tokenizer": Recipe(
        "nextscale.tasks.tokenizers.recipe:TokenizerRecipe", "images <-> residual token pyramids; first of the two"
    ),
    "flex-tokenizer": Recipe(
        "nextscale.tasks.tokenizers.flex_training:FlexTokenizerRecipe",
        "images <-> token maps of any size, for FlexVAR",
    ),
    "bitwise-tokenizer": Recipe(
        "nextscale.tasks.tokenizers.bitwise_training:BitwiseTokenizerRecipe",
        "images <-> pyramids of bits, for Infinity",
    ),
    "infinity": Recipe(
        "nextscale.tasks.generation.infinity_recipe:InfinityRecipe", "text to image, over pyramids of bits"
    ),
    "vargpt": Recipe(
        "nextscale.tasks.generation.vargpt_recipe:VARGPTRecipe",
        "conversations with images to read and to draw, around a language model; or by preferences",
    ),
    "star": Recipe(
        "nextscale.tasks.generation.star_recipe:STARRecipe",
        "text to image, over residual tokens; then its sampling head",
    ),
    "var": Recipe("nextscale.tasks.generation.var_recipe:VARRecipe", "class-conditional transformer over tokens"),
    "raster": Recipe(
        "nextscale.tasks.generation.raster_recipe:RasterRecipe",
        "baseline: class-conditional transformer that predicts one grid token by token",
    ),
    "flexvar": Recipe(
        "nextscale.tasks.generation.flexvar_recipe:FlexVARRecipe",
        "class-conditional transformer over maps of any sizes, its list drawn at every step",
    ),
    "kl-tokenizer": Recipe(
        "nextscale.tasks.tokenizers.kl_training:KLRecipe", "images <-> continuous latents, for FlowAR"
    ),
    "flowar": Recipe(
        "nextscale.tasks.generation.flowar_recipe:FlowARRecipe", "class-conditional, over continuous latents"
    ),
    "car": Recipe("nextscale.tasks.generation.car_recipe:CARRecipe", "adapter that controls a frozen VAR by pictures"),
    "code-drafter": Recipe(
        "nextscale.tasks.generation.code_recipe:DrafterRecipe", "VAR for the coarse scales, beside a smaller one"
    ),
    "code-refiner": Recipe(
        "nextscale.tasks.generation.code_recipe:RefinerRecipe", "VAR for the fine scales, taught by a larger one"
    ),
    "varformer": Recipe(
        "nextscale.tasks.restoration.varformer_recipe:VarFormerRecipe", "restoration of photographs on a VAR's prior"
    ),
    "dar": Recipe(
        "nextscale.tasks.depth.dar_recipe:DARRecipe", "metric depth of photos, by regression from coarse to fine"
    ),
    "depth-tokenizer": Recipe(
        "nextscale.tasks.depth.depthart_recipe:DepthTokenizerRecipe", "photos and depth maps <-> token pyramids"
    ),
    "depthart": Recipe(
        "nextscale.tasks.depth.depthart_recipe:DepthARTRecipe",
        "relative depth of photos, refined on its own predictions; or its baseline",
    ),
    "controlvar": Recipe(
        "nextscale.tasks.generation.controlvar_recipe:ControlVARRecipe", "control pictures and images together"
    ),
    "sar3d-vqvae": Recipe(
        "nextscale.tasks.shapes.sar3d_recipe:TriplaneRecipe", "views of objects <-> pyramids of three planes, for SAR3D"
    ),
    "sar3d-mesh": Recipe(
        "nextscale.tasks.shapes.sar3d_recipe:MeshRecipe", "head that makes meshes of a trained sar3d-vqvae's planes"
    ),
    "sar3d": Recipe("nextscale.tasks.shapes.sar3d_recipe:SAR3DRecipe", "3D shapes of pictures or texts, over planes"),
    "g3pt-tokenizer": Recipe(
        "nextscale.tasks.shapes.g3pt_recipe:PointTokenizerRecipe",
        "points of surfaces <-> sets of binary tokens, for G3PT",
    ),
    "describer": Recipe(
        "nextscale.tasks.shapes.describing_recipe:DescriberRecipe",
        "a language model that says what shapes are, of SAR3D's or G3PT's tokens",
    ),
    "g3pt": Recipe(
        "nextscale.tasks.shapes.g3pt_recipe:G3PTRecipe", "3D shapes of classes, pictures or texts, over sets of tokens"
    ),
}
"""What ``nextscale train`` trains, by name."""

"""LiteVAR: less attention, fewer bytes, for any trained next-scale model, without training.

Xie et al. 2024, "LiteVAR: Compressing Visual Autoregressive Modelling with Efficient Attention and Quantization" (arXiv
2411.17178). A plan says what a model is to save; :func:`compress` puts modules that do so in the place of its own. The
plan is found by :func:`nextscale.tasks.generation.litevar_calibration.calibrate`, once for a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from nextscale.core.attention import Visibility
from nextscale.core.cache import KeyValueCache
from nextscale.core.sampling import Session
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.transformer import Block, NextScaleTransformer, SelfAttention
from nextscale.tasks.generation.litevar_attention import AttentionPlan, Form, LiteAttention, Work
from nextscale.tasks.generation.litevar_cache import LiteCache
from nextscale.tasks.generation.litevar_packing import (
    PackedLinear,
    Packing,
    linears,
    pack_layers,
    restore_packed,
    unpacked_placeholders,
)
from nextscale.tasks.generation.litevar_packing import (
    replace as replace_module,
)
from nextscale.tasks.generation.litevar_plan import LiteConfig, LitePlan
from nextscale.tasks.generation.litevar_quantizers import SimulatedLinear, Simulation

FOLDER = "lite"
"""Where a saved compressed model keeps its plan."""

Model = TypeVar("Model", bound=nn.Module)


# --- compressing --------------------------------------------------------------------------------------


def compress(
    model: Model,
    plan: LitePlan,
    packing: Packing = PackedLinear.of,
    freed: Callable[[Tensor], None] | None = None,
) -> Model:
    """Make a trained model do as a plan says. The model itself is changed, and returned.

    Its linear layers are packed, its attention is computed within windows and once for all guidance branches, and its
    cache holds 8-bit numbers. Everything else, such as ``generate``, stays as it is. ``save`` writes packed weights.

    Args:
        model: anything with one :class:`nextscale.core.transformer.NextScaleTransformer`.
        packing: makes the layers of packed weights;
            :func:`nextscale.tasks.generation.litevar_torchao.torchao_linear` has torchao make them.
        freed: called with every weight that is no longer needed.

    Raises:
        ValueError: the plan belongs to another model, or the model attends in a way of its own.
    """
    check(model, plan)
    pack_layers(model, plan.config.precision, plan.config.activation_bits, packing, freed)
    return _planned(model, plan)


def weights_only(model: nn.Module, bits: int) -> LitePlan:
    """The plan that packs the linear layers of all blocks of any model, and leaves everything else as it is.

    A model whose ``packable`` names more by the beginnings of their names, such as a language model's, has those packed
    too.

    Raises:
        ValueError: the model has no next-scale transformer, or is compressed already.
    """
    _not_compressed(model)
    stacks = [name for name, module in model.named_modules() if isinstance(module, NextScaleTransformer)]
    inside = (*(f"{name}.blocks." for name in stacks), *getattr(model, "packable", ()))
    precision = {name: bits for name, _ in linears(model) if name.startswith(inside)}
    if not precision:
        raise ValueError(f"this {type(model).__name__} has no linear layers in blocks of a next-scale transformer")
    return LitePlan(LiteConfig(cast(Any, model).config.schedule, precision, attention=False))


def check(model: nn.Module, plan: LitePlan) -> None:
    """Raises:

    ValueError: the plan does not fit the model.
    """
    _not_compressed(model)
    config = plan.config
    if not config.attention:
        return
    transformer = find_transformer(model)
    for number, block in enumerate(transformer.blocks):
        if type(block.attention).forward is not SelfAttention.forward:
            raise ValueError(
                f"block {number} of this {type(model).__name__} has an attention of its own "
                f"({type(block.attention).__name__}), which cannot be compressed"
            )
    sizes = (transformer.config.depth, transformer.config.heads)
    if plan.sizes not in (None, sizes):
        raise ValueError(
            f"the plan has windows for {plan.sizes[0]} blocks of {plan.sizes[1]} heads, the model has {sizes[0]} of "
            f"{sizes[1]}: calibrate this model"
        )
    if config.fingerprint is not None and config.fingerprint != fingerprint(model):
        raise ValueError(
            "the plan was made for another model: windows and precision come from a model's own attention and "
            "weights. Run `nextscale calibrate` on this one"
        )


def _not_compressed(model: nn.Module) -> None:
    if isinstance(model, PackedModel):
        raise ValueError("this model is compressed already; load it anew to compress it otherwise")


def rebuild(
    model_class: Any, state: Mapping[str, Tensor], config: Mapping[str, Any], plan: LitePlan, **needs: Any
) -> Any:
    """A compressed model from the content of a folder that its ``save`` wrote; packed weights are never unpacked.

    Args:
        model_class: of the model that was compressed, with ``from_saved(state, config, **needs)``.

    Raises:
        ValueError: weights and plan do not belong together.
    """
    model = model_class.from_saved(unpacked_placeholders(state, plan.config.precision), config, **needs)
    restore_packed(model, state, plan.config.precision, plan.config.activation_bits)
    return _planned(model, plan)


def simulate(model: Model, settings: Simulation, plan: LitePlan | None = None) -> Model:
    """The published simulation of low precision, in the model itself; nothing becomes smaller or faster.

    Args:
        settings: one of :data:`nextscale.tasks.generation.litevar_quantizers.PUBLISHED`, or any other.
        plan: windows and sharing to simulate with it.
    """
    for name, layer in list(linears(model)):
        if not any(part in name for part in settings.keep):
            replace_module(model, name, SimulatedLinear(layer, settings.weight, settings.activation))
    if plan is None:
        plan = LitePlan(LiteConfig(ScaleSchedule.squares(1), share_from=None))
    form: Form = plan.config.form if settings.attention is None else "probabilities"
    plan = replace(plan, config=replace(plan.config, form=form, cache_bits=16, precision={}))
    return _with_attention(model, plan, settings.attention)


@contextmanager
def attention_compressed(model: nn.Module, plan: LitePlan) -> Iterator[list[AttentionPlan]]:
    """A model whose attention and cache do as a plan says, for as long as the context lasts; yields what each block
    follows."""
    transformer = find_transformer(model)
    modules = [model, transformer, *(block.attention for block in transformer.blocks)]
    before = [(module, module.__class__, set(vars(module))) for module in modules]
    _with_attention(model, plan)
    try:
        yield [cast(LiteAttention, block.attention).plan for block in transformer.blocks]
    finally:
        for module, kind, names in before:
            module.__class__ = kind
            for name in set(vars(module)) - names:
                delattr(module, name)


def find_transformer(model: nn.Module) -> NextScaleTransformer:
    """The one transformer of a model.

    Raises:
        ValueError: it has none, or several.
    """
    found = [module for module in model.modules() if isinstance(module, NextScaleTransformer)]
    if len(found) != 1:
        advice = "compress its parts one by one" if found else "there is nothing to compress"
        raise ValueError(f"this {type(model).__name__} has {len(found)} next-scale transformers: {advice}")
    return found[0]


def fingerprint(model: nn.Module) -> str:
    """A short digest of the network's weights, the same in float32 and bfloat16."""
    digest = hashlib.sha256()
    for name, value in sorted(find_transformer(model).state_dict().items()):
        flat = value.detach().flatten()
        some = flat[:: max(1, len(flat) // 4096)].cpu().float().bfloat16()
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(some.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


# --- modules that take others' places -----------------------------------------------------------------


class LiteTransformer(NextScaleTransformer):
    """A transformer whose attention follows a plan.

    Attributes:
        images: rows of a guidance branch in the step that is run; None: not known, so nothing is shared.
        last: positions of the last scale that is drawn, at which no later one looks back; 0: not known.
        work: what attention has done since it was last cleared.
    """

    plan: LitePlan
    images: int | None
    last: int
    work: Work

    def allocate_cache(self, batch: int, length: int, dtype: torch.dtype) -> KeyValueCache:
        sizes, config = self.config, self.plan.config
        return LiteCache(
            sizes.depth,
            batch,
            length,
            sizes.heads,
            sizes.head_size,
            dtype=dtype,
            device=next(self.parameters()).device,
            last=self.last,
            bits=config.cache_bits,
            share=config.share_from is not None,
        )

    def run_block(
        self,
        block: Block,
        x: Tensor,
        modulation: Tensor | None,
        segments: Visibility | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
        **given: Any,
    ) -> Tensor:
        if isinstance(cache, LiteCache):
            cache.images = self.images
        return super().run_block(block, x, modulation, segments, cache, layer, **given)


class LiteSession:
    """A session that tells its transformer how many rows a guidance branch has, and draws with a plan's temperatures.

    What enters at a scale has one row per image, what the network runs one per image and branch.
    """

    def __init__(self, session: Session, transformer: LiteTransformer) -> None:
        self._session, self._transformer = session, transformer
        self._index = 0

    def step(self, index: int, inputs: Tensor | None, first: int | None = None) -> Tensor:
        self._index = index
        share_from = self._transformer.plan.config.share_from
        if inputs is not None and share_from is not None and index >= share_from:
            self._transformer.images = len(inputs)
        try:
            return self._session.step(index, inputs, first)
        finally:
            self._transformer.images = None

    def logits(self, hidden: Tensor, rows: slice) -> Tensor:
        logits, temperatures = self._session.logits(hidden, rows), self._transformer.plan.config.temperatures
        return logits if temperatures is None else logits / temperatures[self._index]


class PackedModel(nn.Module):
    """What is different about the files of a compressed model."""

    plan: LitePlan

    def save(self, folder: str | Path) -> Path:
        """Write the model with its packed weights, and its plan in the folder ``lite`` beside them.

        Raises:
            ValueError: its weights are packed by another library, whose layout is not for files.
        """
        packed = [name for name, bits in self.plan.config.precision.items() if bits != 16]
        if any(not isinstance(self.get_submodule(name), PackedLinear) for name in packed):
            raise ValueError(
                "weights that torchao has packed are not written to files: save the plan, or compress without torchao"
            )
        self.plan.save(Path(folder) / FOLDER)
        return Path(super().save(folder))  # type: ignore[misc]

    def to_official(self) -> dict[str, Tensor]:
        if any(bits != 16 for bits in self.plan.config.precision.values()):
            raise ValueError(
                "a compressed model's packed weights have no place in the official layout; convert the model that it "
                "was made from"
            )
        return dict(super().to_official())  # type: ignore[misc]


class LiteModel(PackedModel):
    """What is different about a compressed model as a whole."""

    @property
    def attention_work(self) -> Work:
        """What attention has done since this was last cleared."""
        return cast(LiteTransformer, find_transformer(self)).work

    def start(self, *arguments: Any, **options: Any) -> LiteSession:
        transformer = cast(LiteTransformer, find_transformer(self))
        given = (each for each in (*arguments, *options.values()) if isinstance(each, ScaleSchedule))
        transformer.last = next((schedule.lengths[-1] for schedule in given), 0)
        session = super().start(*arguments, **options)  # type: ignore[misc]
        return LiteSession(session, transformer)


@cache
def _joined(kind: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    return type(f"{kind.__name__}{base.__name__}", (kind, base), {})


def _become(module: nn.Module, kind: type[nn.Module], **attributes: Any) -> None:
    """Let a module be of another kind as well, with its parameters where they are."""
    module.__class__ = _joined(kind, type(module))  # type: ignore[arg-type]
    for name, value in attributes.items():
        setattr(module, name, value)


def _planned(model: Model, plan: LitePlan) -> Model:
    if plan.config.attention:
        return _with_attention(model, plan)
    _become(model, PackedModel, plan=plan)
    return model


def _with_attention(model: Model, plan: LitePlan, bits: int | None = None) -> Model:
    transformer, config, work = find_transformer(model), plan.config, Work()
    for number, block in enumerate(transformer.blocks):
        attention = AttentionPlan(config.schedule, plan.windows(number), config.form, bits, work)
        _become(block.attention, LiteAttention, plan=attention)
    _become(transformer, LiteTransformer, plan=plan, images=None, last=0, work=work)
    _become(model, LiteModel, plan=plan)
    return model

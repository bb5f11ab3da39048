"""Low-rank adapters (LoRA: Hu et al. 2021, arXiv 2106.09685) on language models of transformers, by peft.

A model here has its language model under ``language.text``.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Layers of a language model that adapters are put on where none are named."""


def add_adapters(model: Model, rank: int = 16, alpha: int = 32, layers: tuple[str, ...] = ADAPTED) -> Model:
    """Put adapters on the language model; changes it. Of the language model, only they learn then.

    Raises:
        ValueError: rank is below 1, or no layer is called so.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if rank < 1:
        raise ValueError(f"the rank of adapters is {rank}; expected at least 1")
    text: Any = model.get_submodule("language.text")
    ends = {name.rsplit(".", 1)[-1] for name, each in text.named_modules() if isinstance(each, nn.Linear)}
    if missing := [name for name in layers if name not in ends]:
        raise ValueError(f"the language model has no layer {', '.join(missing)}; it has {', '.join(sorted(ends))}")
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(layers)), text)
    return model


def train_adapters_alone(model: nn.Module) -> None:
    """Of the language model, let only the adapters learn."""
    for name, parameter in model.get_submodule("language.text").named_parameters():
        parameter.requires_grad_(".lora_" in name or name.startswith("lora_"))


def adapters_of(model: nn.Module) -> list[Any]:
    """The layers with adapters."""
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


class adapters_off:
    """Within, the model computes as without adapters."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = adapters_of(model)

    def __enter__(self) -> None:
        for layer in self._layers:
            layer.enable_adapters(False)

    def __exit__(self, *error: object) -> None:
        for layer in self._layers:
            layer.enable_adapters(True)


def merge_adapters(model: Model) -> Model:
    """Add the adapters to the weights under them and take them off: the model saves and exports as any."""
    found = set(adapters_of(model))
    for name in [name for name, module in model.named_modules() if module in found]:
        parent, _, leaf = name.rpartition(".")
        layer: Any = model.get_submodule(name)
        layer.merge()
        setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    return model

"""Models of the VAR family from what a case says, and their tensors under official names.

A case's configuration holds the official constructors' arguments. They are turned into this library's
configuration, every one of them, and the weights are then loaded through the official layout, so arguments
that contradict the weights fail.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from nextscale.core import transformer
from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.quantizer import QuantizerConfig
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.transformer import TransformerConfig
from nextscale.parity.case import Case
from nextscale.parity.replay import ReplayError
from nextscale.tasks.generation.var import VAR, VARConfig
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ, ResidualVQConfig

KERNELS = ("flash_if_available", "fused_if_available")
"""Arguments that choose kernels, not what they compute."""

EVALUATION = ("drop_rate", "attn_drop_rate", "drop_path_rate")
"""Arguments without effect in evaluation form."""


def tokenizer_config(config: Mapping[str, Any]) -> ResidualVQConfig:
    """The official constructor's arguments in this library's terms."""
    shared, counts = config["share_quant_resi"], config["default_qresi_counts"]
    scales = config["v_patch_nums"]
    return ResidualVQConfig(
        AutoencoderConfig(channels=config["ch"], latent_channels=config["z_channels"]),
        QuantizerConfig(
            config["vocab_size"],
            config["z_channels"],
            beta=config["beta"],
            unit_norm=config["using_znorm"],
            smoothing=config["quant_resi"],
            smoothers=shared or counts or len(scales),
        ),
        ScaleSchedule.squares(*scales),
        config["quant_conv_ks"],
        separate_smoothers=shared == 0,
    )


def build_tokenizer(case: Case, training: bool = False, part: str = "vae") -> ResidualVQ:
    """The case's tokenizer, in evaluation form or ready to train.

    Args:
        part: its name in the case.
    """
    arguments = case.config[part]
    config = tokenizer_config(arguments)
    arguments.ignore("test_mode")  # freezes the parameters; the operation decides that
    if not training:
        arguments.ignore("dropout")
    elif arguments["dropout"]:
        raise ReplayError(
            f"dropout is {arguments['dropout']}: in train form its draws are random, so no case can be met"
        )
    loaded = ResidualVQ.from_official(
        case.state_dict(part),
        schedule=config.schedule,
        unit_norm=config.quantizer.unit_norm,
        smoothing=config.quantizer.smoothing,
        beta=config.quantizer.beta,
    )
    with torch.device("meta"):
        tokenizer = ResidualVQ(config)
    tokenizer.load_state_dict(loaded.state_dict(), assign=True)
    return tokenizer.train(training)


def model_config(config: Mapping[str, Any], tokenizer: ResidualVQ) -> VARConfig:
    """The official constructor's arguments in this library's terms."""
    transformer = TransformerConfig(
        width=config["embed_dim"],
        depth=config["depth"],
        heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        conditioning="shared" if config["shared_aln"] else "block",
        attention="cosine" if config["attn_l2_norm"] else "dot",
        norm_eps=config["norm_eps"],
    )
    quantizer = tokenizer.config.quantizer
    return VARConfig(
        transformer,
        config["num_classes"],
        quantizer.vocabulary,
        quantizer.channels,
        ScaleSchedule.squares(*config["patch_nums"]),
        config["cond_drop_rate"],
    )


def build_model(case: Case, part: str = "var", tokenizer: ResidualVQ | None = None) -> VAR:
    """A transformer of the case on its tokenizer, in evaluation form.

    Args:
        part: its name in the case.
        tokenizer: where it is built already.
    """
    arguments, tokenizer = case.config[part], tokenizer or build_tokenizer(case)
    config = model_config(arguments, tokenizer)
    if config.schedule != tokenizer.config.schedule:
        raise ReplayError(f"the transformer's scales '{config.schedule}' are not the tokenizer's")
    arguments.ignore(*KERNELS, *EVALUATION)
    loaded = VAR.from_official(
        case.state_dict(part), tokenizer, schedule=config.schedule, heads=config.transformer.heads
    )
    with torch.device("meta"):
        model = VAR(config, tokenizer)
    model.load_state_dict(loaded.state_dict(), assign=True)
    return model.eval()


def in_official_names(model: Any, values: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Values of the parameters (zeros where None) under their official names.

    The model's own export does it: a copy of the model that holds the values in its parameters' place.
    """
    holder = copy.deepcopy(model)
    for name, parameter in holder.named_parameters():
        value = values[name]
        parameter.data = torch.zeros_like(parameter) if value is None else value
    return holder.to_official()


def norms(tensors: Mapping[str, Tensor], names: list[str]) -> np.ndarray:
    """2-norms in the order of ``names``; in float64, since single precision loses digits over millions of numbers."""
    return np.array([float(tensors[name].double().norm()) for name in names])


def check_decay(model: Any, groups: Sequence[Mapping[str, Any]], names: Sequence[str], decayed: Sequence[str]) -> None:
    """The parameters with weight decay must be the ones the case names.

    Raises:
        ReplayError: they are not.
    """
    ours = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    marks = {name: torch.full_like(p, float(id(p) in ours)) for name, p in model.named_parameters()}
    exported = in_official_names(model, marks)
    if wrong := sorted({name for name in names if exported[name].any()} ^ set(decayed)):
        raise ReplayError(f"weight decay applies to other parameters than the case says: {', '.join(wrong)}")


@contextmanager
def given_drop_path(keep: Tensor) -> Iterator[None]:
    """Stochastic depth by rows of 0 and 1, (draws, batch), in the order in which branches ask for them.

    Raises:
        ReplayError: too many or too few rows.
    """
    rows = iter(keep)

    def drop(x: Tensor, probability: float, training: bool, uniform: Tensor | None = None) -> Tensor:
        if not training or probability == 0:
            return x
        row = next(rows, None)
        if row is None:
            raise ReplayError(f"the case has {len(keep)} draws of stochastic depth, more are asked for")
        return x * row.view(-1, *(1,) * (x.ndim - 1)) / (1 - probability)

    with patch.object(transformer, "drop_path", drop):
        yield
    if next(rows, None) is not None:
        raise ReplayError(f"not all of the {len(keep)} draws of stochastic depth were asked for")

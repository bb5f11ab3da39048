"""VARGPT from what a case says: all of the official constructors' arguments, checked against the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextscale.core.schedule import ScaleSchedule
from nextscale.parity.building import tokenizer_config as residual_config
from nextscale.parity.case import Case
from nextscale.parity.infinity_building import IDLE, TRANSFORMER_FORM, check_form, schedule_from
from nextscale.parity.infinity_building import tokenizer_config as bitwise_config
from nextscale.parity.replay import ReplayError
from nextscale.tasks.generation.infinity_config import hidden_width
from nextscale.tasks.generation.vargpt import VARGPT
from nextscale.tasks.tokenizers.bitwise_vq import BitwiseVQ
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ

TOKENIZER = "vae_local."


def plain(value: Any) -> Any:
    """A case's value with everything in it, as read."""
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value


def schedule_of(case: Case) -> ScaleSchedule:
    """The case's scales; all places where a case names them must agree."""
    options = case.options
    schedule = schedule_from(options["scales"])
    if options["variant"] == "v1":
        sides = [scale.height for scale in schedule.scales]
        lists = [case.config["tokenizer"]["v_patch_nums"], case.config["decoder"]["patch_nums"]]
        if options["rope_grid"] is not None or any(list(each) != sides for each in lists):
            raise ReplayError(f"the scales {sides} are not those of tokenizer and decoder: {lists}")
    return schedule


def build_tokenizer(case: Case, schedule: ScaleSchedule) -> ResidualVQ | BitwiseVQ:
    """The case's tokenizer, in evaluation form, of the weights of the whole model."""
    case.config.ignore("model", "decoder")
    state = {k.removeprefix(TOKENIZER): v for k, v in case.state_dict("model").items() if k.startswith(TOKENIZER)}
    arguments = case.config["tokenizer"]
    if case.options["variant"] == "v1":
        arguments.ignore("test_mode", "dropout")
        config = residual_config(arguments)
        given = config.quantizer
        loaded: Any = ResidualVQ.from_official(
            state, schedule=schedule, unit_norm=given.unit_norm, smoothing=given.smoothing, beta=given.beta
        )
        with torch.device("meta"):
            tokenizer: Any = ResidualVQ(config)
        tokenizer.load_state_dict(loaded.state_dict(), assign=True)
        return tokenizer.eval()
    wanted = bitwise_config(case, schedule)
    loaded = BitwiseVQ.from_official(state, schedule=schedule)
    if loaded.config != wanted:
        raise ReplayError(f"the weights are those of {loaded.config}, the arguments say {wanted}")
    return loaded


def build_model(case: Case) -> VARGPT:
    """The case's model, in evaluation form."""
    options, schedule = case.options, schedule_of(case)
    arguments = case.config["decoder"]
    model = plain(case.config["model"])
    first = options["variant"] == "v1"
    overrides: dict[str, Any] = {"schedule": schedule}
    if first:
        arguments.ignore(
            "drop_rate", "attn_drop_rate", "cond_drop_rate", "flash_if_available", "fused_if_available", "logit_dim"
        )
        if model["ignore_index"] != -100 or model["projector_hidden_act"] != "gelu":
            raise ReplayError("labels are ignored at -100 and the projector is a GELU's in every published model")
    else:
        arguments.ignore(
            *(name for name in IDLE if name not in ("pad_to_multiplier", "drop_path_rate")), "apply_spatial_patchify"
        )
        check_form(arguments, {**TRANSFORMER_FORM, "add_lvl_embeding_only_first_block": 1, "fused_norm": True,
                               "rope2d_normalized_by_hw": 2, "cross_attn_layer_scale": -1.0})  # fmt: skip
        overrides["grid"] = tuple(options["rope_grid"])
        overrides["multiple"] = arguments["pad_to_multiplier"]
        overrides["cross_attention"] = options.get("cross_attention", "float32")
    if first and options.get("cross_attention", "float32") != "float32":
        raise ReplayError("v1 has no cross-attention to round")
    built = VARGPT.from_official({"model": case.state_dict("model"), "config": model}, **overrides)
    if arguments["drop_path_rate"]:
        raise ReplayError(
            f"drop_path_rate is {arguments['drop_path_rate']}: its draws are random, so no case can be met"
        )
    for block in built.decoder.transformer.blocks:
        block.drop_probability = 0.0
    _check(built, arguments, first)
    tokenizer = build_tokenizer(case, schedule)
    if first:
        built.tokenizer.config = tokenizer.config
        built.tokenizer.quantizer.config = tokenizer.config.quantizer
        built.tokenizer.load_state_dict(tokenizer.state_dict())
    elif tokenizer.config != built.tokenizer.config:
        raise ReplayError(f"the tokenizer is {built.tokenizer.config}, the arguments say {tokenizer.config}")
    return built


def _check(model: VARGPT, arguments: Mapping[str, Any], first: bool) -> None:
    """Sizes read from the weights must be those of the arguments."""
    blocks = model.config.decoder.transformer
    width = arguments["embed_dim"]
    ratio = arguments["mlp_ratio"] if first else hidden_width(width, arguments["mlp_ratio"]) / width
    said = {
        "width": width, "depth": arguments["depth"], "heads": arguments["num_heads"], "mlp_ratio": ratio,
        "norm_eps": arguments["norm_eps"],
    }  # fmt: skip
    found: dict[str, Any] = {name: getattr(blocks, name) for name in said}
    marks = model.config.marks
    if first:
        said |= {"classes": arguments["num_classes"], "conditioning": "shared" if arguments["shared_aln"] else "block",
                 "attention": "cosine" if arguments["attn_l2_norm"] else "dot"}  # fmt: skip
        found |= {"classes": marks.start + 1, "conditioning": blocks.conditioning, "attention": blocks.attention}
    else:
        infinity = model.config.infinity
        assert infinity is not None
        said |= {"text": (arguments["text_channels"], arguments["text_maxlen"]), "chunks": arguments["block_chunks"]}
        found |= {"text": (infinity.text_width, infinity.text_length), "chunks": infinity.transformer.chunks}
    if said != found:
        raise ReplayError(f"the weights are those of {found}, the arguments say {said}")


def gradient_norms(model: VARGPT, names: Sequence[str]) -> np.ndarray:
    """2-norms of the parameters' gradients under official names, 0 where none arrives."""
    values = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    official = model.to_official()
    return np.array([float(official[name].double().norm()) for name in names])


def images_of(case: Case) -> tuple[Tensor | None, Tensor]:
    """Pixels (None: no image) and patch grids of the images in a prompt."""
    pixels, grids = case.tensor("pixel_values"), case.tensor("image_grid_thw")
    return (pixels if len(pixels) else None), grids

"""STAR and its tokenizer from what a case says.

A case's configuration holds the official constructors' arguments. They are turned into this library's configuration,
every one of them, and the weights are then loaded through the official layout, so arguments that contradict the weights
fail.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nextscale.core.schedule import ScaleSchedule
from nextscale.parity import building
from nextscale.parity.building import EVALUATION, KERNELS
from nextscale.parity.case import Case
from nextscale.parity.replay import ReplayError
from nextscale.tasks.generation.star import STAR
from nextscale.tasks.generation.star_config import STARConfig
from nextscale.tasks.generation.star_transformer import STARBlocksConfig
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ

UNUSED = ("num_classes", "cond_drop_rate")
"""Arguments that nothing but an embedding without use depends on."""


def build_tokenizer(case: Case) -> ResidualVQ:
    """The case's tokenizer, in evaluation form.

    Raises:
        ReplayError: it is of a form that no release has.
    """
    for name in ("enable_movq", "vae_ada"):
        if case.config["tokenizer"][name]:
            raise ReplayError(f"{name} is on, which no released tokenizer has")
    return building.build_tokenizer(case, part="tokenizer")


def model_config(config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> STARConfig:
    """The official constructors' arguments in this library's terms."""
    if config["noise_sampling"]:
        raise ReplayError("noise_sampling is on, which makes the start of every sequence random")
    if config["train_mode"] not in ("none", "all", "head_only"):
        raise ReplayError(f"train_mode is {config['train_mode']!r}, expected none, all or head_only")
    blocks = STARBlocksConfig(
        width=config["embed_dim"],
        depth=config["depth"],
        heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        conditioning="shared" if config["shared_aln"] else "none",
        attention="cosine" if config["attn_l2_norm"] else "dot",
        norm_eps=config["norm_eps"],
        text_width=config["in_dim_cross"],
        cross_attention="first" if config["enable_cross"] else "none",
    )
    span = config["rope_norm"]
    first = config["sample_from_idx"]
    return STARConfig(
        blocks,
        vocabulary=tokenizer["vocab_size"],
        code_channels=tokenizer["z_channels"],
        schedule=ScaleSchedule.squares(*config["patch_nums"]),
        rotary=config["rotary_pos_emb"],
        rotary_base=config["rope_theta"],
        rotary_span=None if span == -1 else float(span),
        add_levels=config["absolute_lvl_emb"],
        head_norm=config["enable_logit_norm"],
        stable_from=first if config["enable_adaptive_norm"] else None,
    )


def build_model(case: Case, tokenizer: ResidualVQ | None = None) -> STAR:
    """The case's transformer, in evaluation form.

    Args:
        tokenizer: None: one without weights.
    """
    arguments, codes = case.config["transformer"], case.config["tokenizer"]
    config = model_config(arguments, codes)
    arguments.ignore(*KERNELS, *EVALUATION, *UNUSED, "drop_scale_length")
    if tokenizer is None:
        with torch.device("meta"):
            tokenizer = ResidualVQ(building.tokenizer_config(codes))
        codes.ignore("*")
    if config.schedule != tokenizer.config.schedule:
        raise ReplayError(f"the transformer's scales '{config.schedule}' are not the tokenizer's")
    loaded = STAR.from_official(
        case.state_dict("transformer"),
        tokenizer,
        schedule=config.schedule,
        heads=config.transformer.heads,
        add_levels=config.add_levels,
        stable_from=config.stable_from,
    )
    with torch.device("meta"):
        model = STAR(config, tokenizer)
    model.load_state_dict(loaded.state_dict(), assign=True)
    return model.eval()

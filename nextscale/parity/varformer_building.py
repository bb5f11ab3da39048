"""VarFormer networks from what a case says.

A case's configuration holds the official constructors' arguments, and the weights are loaded through the official
layout, so arguments that contradict the weights fail.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nextscale.parity.building import EVALUATION, KERNELS, tokenizer_config
from nextscale.parity.case import Case
from nextscale.parity.replay import ReplayError
from nextscale.parity.tracking import Tracked
from nextscale.tasks.generation.var import VARConfig
from nextscale.tasks.restoration.varformer import VarFormer, VarFormerConfig
from nextscale.tasks.tokenizers.residual_vq import ResidualVQConfig

WITHOUT_EFFECT = (
    *KERNELS,
    *EVALUATION,
    "vqgan_path",
    "var_path",
    "model_path",
    "connect_list",
    "cond_drop_rate",
    "var_force_dpth",
    "dropout",
    "fix_modules",
)
"""Arguments of the networks that change nothing that a case computes; what is frozen, ``train_step`` reads."""

LEVEL_MULTIPLIERS = [1, 1, 2, 2, 4]


def configs(part: Tracked, tokenizer_part: Tracked) -> tuple[VarFormerConfig, VARConfig, ResidualVQConfig]:
    """The official constructors' arguments in this library's terms."""
    tokenizer = tokenizer_config(tokenizer_part)
    tokenizer_part.ignore("dropout", "test_mode", "model_path")
    part.ignore(*WITHOUT_EFFECT)
    prior = VARConfig.of_depth(
        part["depth"],
        classes=part["num_classes"],
        vocabulary=tokenizer.quantizer.vocabulary,
        code_channels=tokenizer.quantizer.channels,
        schedule=tokenizer.schedule,
    )
    if list(part["patch_nums"]) != [scale.height for scale in tokenizer.schedule.scales]:
        raise ReplayError(f"the network's scales {part['patch_nums']} are not the tokenizer's '{tokenizer.schedule}'")
    transformer = replace(
        prior.transformer,
        mlp_ratio=part["mlp_ratio"],
        norm_eps=part["norm_eps"],
        conditioning="shared" if part["shared_aln"] else "block",
        attention="cosine" if part["attn_l2_norm"] else "dot",
    )
    kind = part["type"]
    if kind not in ("VarFormer2", "VarFormer2_varRec"):
        raise ReplayError(f"unknown network {kind!r}")
    second: dict[str, Any] = {"restoration": False}
    if kind == "VarFormer2":
        if list(part["ch_mult"]) != LEVEL_MULTIPLIERS:
            raise ReplayError(f"the main decoder's widths {part['ch_mult']} do not fit the tokenizer's")
        second = {"adjust": part["dec_adjust"], "decoder_blocks": part["num_res_blocks"]}
    enhancement = part["n_layers"] if part["if_enhance"] else 0
    if not part["if_enhance"]:
        part.ignore("n_layers")
    steered = int(part["depth"] // part["div_part"])
    own = VarFormerConfig(steered, enhancement=enhancement, form="published", **second)
    return own, replace(prior, transformer=transformer), tokenizer


def build(case: Case) -> VarFormer:
    """The case's network, loaded through the official layout."""
    own, prior, tokenizer = configs(case.config["model"], case.config["tokenizer"])
    if "guidance" in case.options:
        own = replace(own, guidance=case.options["guidance"])
    quantizer = tokenizer.quantizer
    loaded = VarFormer.from_official(
        case.state_dict("model"),
        guidance=own.guidance,
        schedule=prior.schedule,
        heads=prior.transformer.heads,
        unit_norm=quantizer.unit_norm,
        smoothing=quantizer.smoothing,
        beta=quantizer.beta,
    )
    model = VarFormer.empty(own, prior, tokenizer)
    model.load_state_dict(loaded.state_dict(), assign=True)
    return model.eval()

"""Infinity's golden cases: every operation of the official code, on this library's functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.schedule import ScaleSchedule
from nextscale.parity.case import Case
from nextscale.parity.replay import Operations, ReplayError
from nextscale.tasks.tokenizers.bitwise_quantizer import BitwiseQuantizer, BitwiseQuantizerConfig
from nextscale.tasks.tokenizers.bitwise_schedules import for_features, nearest_ratio, schedule_of
from nextscale.tasks.tokenizers.bitwise_vq import TOKEN_STRIDE, BitwiseVQ, BitwiseVQConfig

operations = Operations()


@operations
def schedules(case: Case) -> Mapping[str, Any]:
    """The scale lists of all aspect ratios and sizes, and those a tokenizer picks by itself."""
    ratios, sizes = case.options["h_div_w"], case.options["sizes"]
    lists = [schedule_of(ratio, size) for ratio in ratios for size in sizes]
    shape = (len(ratios), len(sizes))
    picked = [for_features(*size) for size in case.options["feature_sizes"]]
    if None in picked:
        raise ReplayError(f"no list ends at the features' size {case.options['feature_sizes'][picked.index(None)]}")
    return {
        "ratio": np.array([nearest_ratio(ratio) for ratio in ratios]),
        "count": np.array([len(schedule) for schedule in lists]).reshape(shape),
        "scales": np.concatenate([_triples(schedule, VIDEO_TIMES) for schedule in lists]),
        "image_size": np.array([schedule.scaled(TOKEN_STRIDE) for schedule in lists]).reshape(*shape, 2),
        "tokenizer_count": np.array([len(schedule) for schedule in picked if schedule]),
        "tokenizer_scales": np.concatenate([_triples(schedule, STILL) for schedule in picked if schedule]),
    }


VIDEO_TIMES = (1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 15, 17, 21)
"""Frames that the official table carries beside each scale, for video; images have one."""
STILL = (1,) * len(VIDEO_TIMES)


def _triples(schedule: ScaleSchedule, times: Sequence[int]) -> np.ndarray:
    return np.array([(time, *scale.grid) for time, scale in zip(times, schedule.scales, strict=False)])


# --- the tokenizer ------------------------------------------------------------------------------------


def schedule_from(scales: Sequence[Sequence[int]]) -> ScaleSchedule:
    """A case's scales; they are all of one frame."""
    if wrong := [scale for scale in scales if scale[0] != 1]:
        raise ReplayError(f"scale {wrong[0]} has {wrong[0][0]} frames; images have one")
    return ScaleSchedule.grids((height, width) for _, height, width in scales)


LOSSES = (
    "gan_feat_weight", "video_perceptual_weight", "recon_loss_type", "l1_weight", "kl_weight", "lfq_weight",
    "image_gan_weight", "video_gan_weight", "perceptual_weight", "flux_weight", "cycle_weight", "cycle_feat_weight",
    "cycle_gan_weight", "entropy_loss_weight", "diversity_gamma", "commitment_loss_weight", "z_drop", "drop_rate",
    "use_stochastic_depth", "use_checkpoint", "temporal_patch_size", "flip_prob", "flip_mode", "max_flip_lvl",
    "flip_lvl_idx", "drop_lvl_idx", "drop_lvl_num", "random_flip", "random_flip_1lvl", "drop_when_test",
    "remove_residual_detach",
)  # fmt: skip
"""The official autoencoder's arguments for training it and for video."""

TOKENIZER_FORM = {
    "cnn_type": "2d", "conv_in_out_2d": "no", "res_conv_2d": "no", "cnn_attention": "no", "cnn_norm_axis": "spatial",
    "conv_inner_2d": "no", "use_vae": False, "use_freq_dec": False, "use_pxsf": False, "preserve_norm": False,
    "ln_before_quant": False, "ln_init_by_sqrt": False, "new_quant": True, "use_decay_factor": False,
    "mask_out": False, "schedule_mode": "dynamic", "keep_first_quant": False, "keep_last_quant": False,
    "use_out_phi": False, "use_out_phi_res": False, "encoder_dtype": "fp32", "quantizer_type": "MultiScaleBSQ",
}  # fmt: skip
"""Arguments that would make another tokenizer; every published one has these."""


def check_form(config: Mapping[str, Any], form: Mapping[str, Any]) -> None:
    """Whether arguments that the published files leave alone have their published values."""
    for name, value in form.items():
        if config[name] != value:
            raise ReplayError(f"{name} is {config[name]!r}, which no published model has; expected {value!r}")


def tokenizer_config(case: Case, schedule: ScaleSchedule, patch: int = 1) -> BitwiseVQConfig:
    """The official constructor's arguments in this library's terms."""
    config = case.config["tokenizer"]
    config.ignore(*LOSSES)
    check_form(config, TOKENIZER_FORM)
    bits, multipliers = config["codebook_dim"], tuple(config["encoder_ch_mult"])
    if tuple(config["decoder_ch_mult"]) != multipliers:
        raise ReplayError(f"the decoder's widths {config['decoder_ch_mult']} are not the encoder's {list(multipliers)}")
    if config["codebook_size"] != 2**bits:
        raise ReplayError(f"{config['codebook_size']} codes are not those of {bits} bits")
    halvings = int(config["patch_size"]).bit_length() - 1
    widths = [config["base_ch"] * multiplier for multiplier in multipliers]
    autoencoder = AutoencoderConfig(
        channels=config["base_ch"],
        multipliers=multipliers,
        blocks=config["num_res_blocks"],
        latent_channels=bits,
        attention=False,
        norm_groups=32 if all(width % 32 == 0 for width in widths) else 24,
    )
    return BitwiseVQConfig(
        autoencoder,
        BitwiseQuantizerConfig(bits, patch),
        schedule,
        None if halvings == len(multipliers) - 1 else halvings,
    )


def build_tokenizer(case: Case, schedule: ScaleSchedule, patch: int = 1) -> BitwiseVQ:
    """The case's tokenizer, in evaluation form."""
    config = tokenizer_config(case, schedule, patch)
    loaded = BitwiseVQ.from_official(case.state_dict("tokenizer"), schedule=schedule, patch=patch)
    if loaded.config != config:
        raise ReplayError(f"the weights are those of {loaded.config}, the arguments say {config}")
    return loaded


@operations
def quantize(case: Case) -> Mapping[str, Any]:
    """The quantiser alone."""
    schedule = schedule_from(case.options["scales"])
    quantizer = BitwiseQuantizer(tokenizer_config(case, schedule).quantizer)
    return _quantized(quantizer, case.tensor("features"), schedule)


@operations
def tokenize(case: Case) -> Mapping[str, Any]:
    """Image -> bits -> image."""
    schedule = schedule_from(case.options["scales"])
    tokenizer = build_tokenizer(case, schedule)
    with torch.inference_mode():
        features = tokenizer.features(case.tensor("image"))
        quantized = _quantized(tokenizer.quantizer, features, schedule)
        return {
            "features": features,
            **quantized,
            "reconstruction_raw": tokenizer.decoder(quantized["latent"]),
            "reconstruction": tokenizer.decode_features(quantized["latent"]),
        }


def _quantized(quantizer: BitwiseQuantizer, features: Tensor, schedule: ScaleSchedule) -> dict[str, Tensor]:
    tokens, totals = quantizer.encode(features, schedule)
    area = [quantizer.to_tokens(quantizer.shrink(t, schedule, index + 1)) for index, t in enumerate(totals[:-1])]
    return {
        "tokens": torch.cat(tokens, dim=1),
        "latent": totals[-1],
        "area_input": torch.cat(area, dim=1),
        "teacher_input": quantizer.inputs(totals, schedule),
    }


@operations
def self_correct(case: Case) -> Mapping[str, Any]:
    """Labels and inputs of training under bit flips."""
    schedule = schedule_from(case.options["scales"])
    patch = 2 if case.options["apply_spatial_patchify"] else 1
    quantizer = BitwiseQuantizer(tokenizer_config(case, schedule, patch).quantizer)
    flips = quantizer.split_flips(case.tensor("flips"), schedule)
    tokens, totals = quantizer.encode(case.tensor("features"), schedule, flips=flips)
    return {"tokens": torch.cat(tokens, dim=1), "teacher_input": quantizer.inputs(totals, schedule)}

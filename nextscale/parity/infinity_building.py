"""Infinity and its tokenizer from what a case says.

A case's configuration holds the official constructors' arguments. They are turned into this library's configuration,
every one of them, and the weights are then loaded through the official layout, so arguments that contradict the weights
fail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.cross_attention import Packed
from nextscale.core.schedule import ScaleSchedule
from nextscale.parity.case import Case
from nextscale.parity.replay import ReplayError
from nextscale.tasks.generation.infinity import Infinity
from nextscale.tasks.generation.infinity_config import InfinityConfig, hidden_width
from nextscale.tasks.generation.infinity_layout import to_layout
from nextscale.tasks.generation.infinity_transformer import InfinityBlocksConfig, Positions
from nextscale.tasks.tokenizers.bitwise_quantizer import BitwiseQuantizerConfig
from nextscale.tasks.tokenizers.bitwise_vq import BitwiseVQ, BitwiseVQConfig


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


IDLE = (
    "drop_rate", "drop_path_rate", "cond_drop_rate", "rand_uncond", "tau", "raw_scale_schedule", "top_p", "top_k",
    "customized_flash_attn", "fused_mlp", "checkpointing", "pad_to_multiplier", "use_flex_attn", "batch_size", "pn",
    "train_h_div_w_list", "always_training_scales", "inference_mode", "selecting_idx",
)  # fmt: skip
"""The official transformer's arguments that choose kernels, training, or nothing at all."""

TRANSFORMER_FORM = {
    "rms_norm": False, "shared_aln": True, "head_aln": True, "nm0": False, "cos_attn": True, "swiglu": False,
    "head_depth": 1, "use_bit_label": 1, "rope2d_each_sa_layer": 1, "video_frames": 1,
}  # fmt: skip
"""Arguments that would make another transformer; every published one has these."""

POSITIONS: dict[int, Positions] = {0: "plain", 1: "shrunk", 2: "spread"}
"""The official rope modes."""


def model_config(case: Case, schedule: ScaleSchedule, text_precision: Any = "model") -> InfinityConfig:
    """The official constructor's arguments in this library's terms."""
    config = case.config["transformer"]
    config.ignore(*IDLE)
    check_form(config, TRANSFORMER_FORM)
    width, channels = config["embed_dim"], config["text_channels"]
    gate = config["cross_attn_layer_scale"]
    blocks = InfinityBlocksConfig(
        width=width,
        depth=config["depth"],
        heads=config["num_heads"],
        mlp_ratio=hidden_width(width, config["mlp_ratio"]) / width,
        norm_eps=config["norm_eps"],
        chunks=config["block_chunks"],
        level_each_chunk=not config["add_lvl_embeding_only_first_block"],
        cross_gate=gate if gate >= 0 else None,
        text_precision=text_precision,
    )
    return InfinityConfig(
        blocks,
        text_width=channels,
        text_length=config["text_maxlen"],
        pool_heads=channels // (64 if width > 4096 else 128),
        token_bits=case.config["tokenizer"]["codebook_dim"] * patch_of(case) ** 2,
        positions=POSITIONS[config["rope2d_normalized_by_hw"]],
        # Without the fused norm the official blocks forget the scale while they sample.
        restart_positions=not config["fused_norm"],
        schedule=schedule,
    )


def patch_of(case: Case) -> int:
    """Cells per token along each side."""
    return 2 if case.config["transformer"]["apply_spatial_patchify"] else 1


def build_model(case: Case, schedule: ScaleSchedule, tokenizer: BitwiseVQ | None = None) -> Infinity:
    """The case's transformer, in evaluation form.

    Args:
        tokenizer: None: one without weights, of the right bits.
    """
    precision = {"float32": "model", "bfloat16": "bfloat16"}[case.options.get("cross_attention", "float32")]
    config = model_config(case, schedule, precision)
    if tokenizer is None:
        with torch.device("meta"):
            tokenizer = BitwiseVQ(tokenizer_config(case, schedule, patch_of(case)))
    state = case.state_dict("transformer")
    loaded = Infinity.from_official(state, tokenizer, schedule=schedule, text_precision=precision)
    with torch.device("meta"):
        model = Infinity(config, tokenizer)
    # The level table has a fixed size, whatever the case says.
    model.load_state_dict(loaded.state_dict(), assign=True)
    return model.eval()


def packed(case: Case, text: str, lengths: str) -> Packed:
    """Texts of a case."""
    return Packed(case.tensor(text), tuple(case.inputs[lengths].tolist()))


def gradient_norms(model: Infinity, gradients: Mapping[str, Tensor | None], names: Sequence[str]) -> np.ndarray:
    """2-norms under official names, 0 where no gradient reaches."""
    values: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not name.startswith("tokenizer."):
            gradient = gradients.get(name)
            values[name] = torch.zeros_like(parameter) if gradient is None else gradient
    transformer = model.config.transformer
    official = to_layout(values, transformer.depth, transformer.chunks)
    return np.array([float(official[name].double().norm()) for name in names])

"""Infinity's golden cases: every operation of the official code, on this library's functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.bitwise import BitwiseEmitter
from nextscale.core.cross_attention import Packed
from nextscale.core.random import BatchDraws
from nextscale.core.schedule import ScaleSchedule
from nextscale.parity.case import Case
from nextscale.parity.replay import Operations, ReplayError
from nextscale.tasks.generation.infinity import SYSTEM, Infinity
from nextscale.tasks.generation.infinity_config import InfinityConfig, hidden_width
from nextscale.tasks.generation.infinity_layout import to_layout
from nextscale.tasks.generation.infinity_training import InfinityLossConfig, InfinityTraining, bit_losses, initialize
from nextscale.tasks.generation.infinity_transformer import InfinityBlocksConfig, Positions, rotation_of
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


# --- the transformer ----------------------------------------------------------------------------------

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


@operations
def rope(case: Case) -> Mapping[str, Any]:
    """Cosines and sines of all positions."""
    options = case.options
    rotations = [
        rotation_of(
            schedule_from(each["scales"]),
            tuple(each["rope_grid"]),
            options["head_dim"],
            POSITIONS[mode],
            base=options["base"],
        )
        for mode in options["modes"]
        for each in options["schedules"]
    ]
    modes = len(options["modes"])
    case.config.ignore("*")
    return {
        "cos": torch.cat([rotation.cos for rotation in rotations]).unflatten(0, (modes, -1)),
        "sin": torch.cat([rotation.sin for rotation in rotations]).unflatten(0, (modes, -1)),
    }


@operations
def init(case: Case) -> Mapping[str, Any]:
    """Statistics of a fresh model; the draws themselves are free."""
    options = case.options
    schedule = schedule_from(options["scales"])
    options.ignore("rope_grid")
    with torch.device("meta"):
        tokenizer = BitwiseVQ(tokenizer_config(case, schedule, patch_of(case)))
    torch.manual_seed(0)
    model = initialize(
        Infinity(model_config(case, schedule), tokenizer),
        modulation=options["aln_init"],
        gate=options["aln_gamma_init"],
        head=options["scale_head"],
        std=options["std"] if options["std"] >= 0 else None,
        shrink_branches=bool(options["scale_proj"]),
    )
    state = {name: value.detach().double() for name, value in model.to_official().items()}
    values = [state[name] for name in options["names"]]
    if shapes := [list(value.shape) for value in values if list(value.shape) not in options["shapes"]]:
        raise ReplayError(f"a parameter has shape {shapes[0]}, which none of the case's has")
    equal = [bool(value.min() == value.max()) for value in values]
    std = [0.0 if same else float(value.std()) for value, same in zip(values, equal, strict=True)]
    mean = [
        float(value.flatten()[0]) if same else float(value.mean()) / spread
        for value, same, spread in zip(values, equal, std, strict=True)
    ]
    depth, chunks = model.config.transformer.depth, model.config.transformer.chunks
    offsets = [
        state[f"block_chunks.{i // (depth // chunks)}.module.{i % (depth // chunks)}.ada_gss" if chunks > 1
              else f"blocks.{i}.ada_gss"]
        for i in range(depth)
    ]  # fmt: skip
    return {"std": std, "mean": mean, "ada_gss_std": torch.stack([each[0, 0].std(-1) for each in offsets])}


@operations
def teacher_forcing(case: Case) -> Mapping[str, Any]:
    """Scores of all scales at once, and what the network makes of the text."""
    schedule = schedule_from(case.options["scales"])
    model = build_model(case, schedule)
    hidden: list[Tensor] = []
    for block in model.transformer.blocks:
        block.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    with torch.inference_mode():
        text = model.drop_text(packed(case, "text", "text_lens"), case.tensor("dropped").bool())
        logits = model(case.tensor("teacher_input"), text, schedule, tuple(case.options["rope_grid"]))
        pooled, memory = model.read(text)
        shared = model.transformer.shared_modulation
        assert shared is not None
        return {
            "logits": logits,
            "hidden": torch.stack(hidden),
            "pooled_text": pooled,
            "modulation": shared(pooled)[:, 0],
            "text_memory": memory.values,
        }


@operations
def train_step(case: Case) -> Mapping[str, Any]:
    """One loss and its gradient."""
    options = case.options
    schedule = schedule_from(options["scales"])
    tokenizer = build_tokenizer(case, schedule, patch_of(case))
    model = build_model(case, schedule, tokenizer).train()
    task = InfinityTraining(
        model,
        InfinityLossConfig(
            reweight=options.get("reweight", True),
            bits=options.get("bitloss_type", "mean"),
            scales=min(options.get("training_scales", 100), len(schedule)),
        ),
    )
    model.config = replace(model.config, text_drop=0.5)  # between kept (1) and dropped (0)
    batch = {
        "image": case.tensor("image"),
        "text": packed(case, "text", "text_lens"),
        "uniform": 1.0 - case.tensor("dropped").float(),
        "flips": tokenizer.quantizer.split_flips(case.tensor("flips"), schedule),
        "grid": tuple(options["rope_grid"]),
    }
    logits: list[Tensor] = []
    model.register_forward_hook(lambda module, inputs, output: logits.append(output.detach()))
    loss, metrics = task.loss(SYSTEM, model, batch, 0)
    loss.backward()
    given = task.teacher_forced(batch, schedule)
    gradients = {name: p.grad for name, p in model.named_parameters() if not name.startswith("tokenizer.")}
    norms = gradient_norms(model, gradients, options["grad_names"])
    return {
        "features": tokenizer.features(batch["image"]),
        "tokens": given.tokens,
        "teacher_input": given.inputs,
        "logits": logits[0],
        "token_loss": bit_losses(logits[0], given.tokens, task.config.bits),
        "loss": loss,
        "loss_uniform": metrics["cross_entropy"],
        "bit_accuracy": metrics["bit_accuracy"] / 100,
        "grad_norms": norms,
        "grad_norm": np.sqrt((norms**2).sum()),
    }


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


@operations
def sample(case: Case) -> Mapping[str, Any]:
    """Sampling with the official draw order."""
    options = case.options
    schedule = schedule_from(options["scales"])
    patch = patch_of(case)
    tokenizer = build_tokenizer(case, schedule, patch)
    model = build_model(case, schedule, tokenizer)
    text = packed(case, "text", "text_lens")
    negative = packed(case, "negative_text", "negative_lens") if "negative_text" in case.inputs else None
    given = case.tensor("given_tokens").bool() if options.get("given_scales", 0) else None
    seed = options["seed"]
    emitter = BitwiseEmitter(options["top_k"], options["top_p"], options["tau"], given)
    # Guidance on probabilities (1) is an official choice that does nothing but leave the scores alone.
    layers = [layer for layer in options["cfg_insertion_layer"] if layer != 1]
    steps = list(
        model.steps(
            text,
            draws=BatchDraws(torch.Generator().manual_seed(0 if seed is None else seed)),
            negative=negative,
            schedule=schedule,
            grid=tuple(options["rope_grid"]),
            guidance=options["cfg"],
            guidance_layers=layers,
            emitter=emitter,
        )
    )
    with torch.inference_mode():
        image = tokenizer.decode_features(steps[-1].total)
    return {
        "logits": torch.cat([step.logits for step in steps], dim=1),
        "tokens": torch.cat([step.tokens for step in steps], dim=1),
        "latent": steps[-1].total,
        "image": image,
        "image_bgr": ((image + 1) / 2 * 255).clamp(0, 255).floor().movedim(1, -1).flip(-1),
    }

"""SAR3D and its tokenizer from what a case says.

A case's configuration holds the official constructors' arguments. They are turned into this library's configuration,
every one of them, and the weights are then loaded through the official layout, so arguments that contradict the weights
fail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.cross_attention import Packed
from nextscale.core.quantizer import QuantizerConfig
from nextscale.core.schedule import ScaleSchedule
from nextscale.parity.building import EVALUATION, KERNELS, norms
from nextscale.parity.case import Case
from nextscale.parity.infinity_building import check_form
from nextscale.parity.replay import ReplayError
from nextscale.tasks.generation.text import TextFeatures
from nextscale.tasks.shapes.sar3d import SAR3D, WIDTHS, SAR3DConfig
from nextscale.tasks.shapes.sar3d_fields import MESH_GRID_SCALE, FieldConfig
from nextscale.tasks.shapes.sar3d_planes import PLANES, PlanesConfig
from nextscale.tasks.shapes.sar3d_rendering import RenderConfig
from nextscale.tasks.shapes.sar3d_tokenizer import TriplaneVQ, TriplaneVQConfig
from nextscale.tasks.shapes.sar3d_transformer import SAR3DBlocksConfig
from nextscale.tasks.shapes.sar3d_views import ViewsConfig

CONVOLUTION = {"class": "Conv2d", "kernel_size": 3, "stride": 1, "padding": 1}
ENCODER = {
    "class": "MVEncoder", "attn_resolutions": [], "resamp_with_conv": True, "double_z": False,
    "use_linear_attn": False, "attn_type": "mv-vanilla",
}  # fmt: skip
VIEWS = {"context_dim": None, "disable_self_attn": False, "use_linear": False}
QUANTIZER = {"class": "VectorQuantizer2", "using_znorm": True}
PATCHES = {"class": "PatchEmbedTriplane", "norm_layer": None, "flatten": True, "bias": True}
DECODER = {
    "class": "DiT2", "roll_out": True, "plane_n": PLANES, "return_all_layers": False, "mixed_prediction": False,
    "context_dim": None,
}  # fmt: skip
UPSAMPLER = {
    "class": "Decoder", "attn_resolutions": [], "resamp_with_conv": True, "give_pre_end": False, "tanh_out": False,
    "use_linear_attn": False, "attn_type": "vanilla",
}  # fmt: skip
FIELD = {"create_triplane": False, "sr_kwargs": {}, "bcg_synthesis_kwargs": {}, "lrm_decoder": True}
"""Arguments that would make another model; every published one has these."""


def quantizer_config(config: Mapping[str, Any]) -> tuple[QuantizerConfig, ScaleSchedule, bool]:
    """The codes, the scales, and whether every scale has a smoother of its own."""
    check_form(config, QUANTIZER)
    scales, shared, counts = config["v_patch_nums"], config["share_quant_resi"], config["default_qresi_counts"]
    smoothers = (shared or counts or len(scales)) if abs(config["quant_resi"]) > 1e-6 else 0
    codes = QuantizerConfig(
        config["vocab_size"],
        config["Cvae"],
        beta=config["beta"],
        unit_norm=True,
        smoothing=config["quant_resi"] if smoothers else 0.0,
        smoothers=smoothers,
    )
    return codes, ScaleSchedule.squares(*scales, planes=PLANES), shared == 0


def render_config(settings: Any) -> RenderConfig:
    """The renderer's settings."""
    check_form(settings, {"clamp_mode": "softplus"})
    settings.ignore(
        "radius_range", "PatchRaySampler", "patch_rendering_resolution", "z_near", "z_far", "decoder_lr_mul",
        "return_sampling_details_flag", "superresolution_noise_mode", "image_resolution",
    )  # fmt: skip
    near, far = settings["ray_start"], settings["ray_end"]
    auto = near == far == "auto"
    within = settings.get("filter_out_of_bbox", False)
    low, high = settings["sampler_bbox_min"], settings["sampler_bbox_max"]
    return RenderConfig(
        settings["box_warp"],
        settings["depth_resolution"],
        settings["depth_resolution_importance"],
        near=None if auto else near,
        far=None if auto else far,
        disparity=settings["disparity_space_sampling"],
        low=low if within else None,
        high=high if within else None,
        white=settings.get("white_back", True),
    )


def tokenizer_config(case: Case) -> TriplaneVQConfig:
    """The official constructors' arguments in this library's terms."""
    config = case.config
    encoder, upsampler, decoder, triplane = (config[part] for part in ("encoder", "upsampler", "dit", "triplane"))
    check_form(encoder, ENCODER)
    check_form(upsampler, UPSAMPLER)
    check_form(decoder, DECODER)
    check_form(triplane, FIELD)
    views = encoder["attn_kwargs"]
    check_form(views, VIEWS)
    for part in (encoder, views, upsampler):
        if part["dropout"]:
            raise ReplayError(f"dropout is {part['dropout']}: its draws are random, so no case can be met")
    codes, schedule, separate = quantizer_config(config["quantize"])
    for name in ("quant_conv", "post_quant_conv"):
        check_form(config[name], {**CONVOLUTION, "in_channels": codes.channels, "out_channels": codes.channels})
    patches = config["patch_embed"]
    check_form(
        patches,
        {
            **PATCHES,
            "in_chans": encoder["z_channels"],
            "embed_dim": decoder["hidden_size"],
            "img_size": schedule.final.height,
        },
    )
    check_form(triplane, {"out_chans": PLANES * triplane["decoder_in_chans"], "decoder_output_dim": 3})
    side, stride = schedule.final.height, 2 ** (len(encoder["ch_mult"]) - 1)
    check_form(encoder, {"resolution": side * stride})
    kinds = {"Triplane": "density", "TriplaneMesh": "mesh"}
    kind: Any = kinds[triplane["class"]]
    if kind == "mesh":
        check_form(triplane, {"grid_scale": MESH_GRID_SCALE})
    # Arguments without effect on what is computed, or for parts that are never used.
    encoder.ignore("out_ch")
    views.ignore("use_checkpoint")
    patches.ignore("patch_size")
    decoder.ignore(
        "input_size", "patch_size", "class_dropout_prob", "num_classes", "learn_sigma", "mixing_logit_init",
        "in_channels",
    )  # fmt: skip
    upsampler.ignore("in_channels", "resolution")
    triplane.ignore("c_dim", "img_resolution", "img_channels", "triplane_size", "sr_num_fp16_res")
    config["tokenizer"].ignore("*")
    settings = triplane["rendering_kwargs"]
    if kind == "mesh":
        settings.ignore("*")
    return TriplaneVQConfig(
        AutoencoderConfig(
            encoder["ch"],
            tuple(encoder["ch_mult"]),
            encoder["num_res_blocks"],
            encoder["z_channels"],
            encoder["in_channels"],
            attention=False,
        ),
        ViewsConfig(6, views["n_heads"], views["d_head"], views["depth"]),
        codes,
        schedule,
        PlanesConfig(decoder["hidden_size"], decoder["depth"], decoder["num_heads"], decoder["mlp_ratio"]),
        AutoencoderConfig(
            upsampler["ch"],
            tuple(upsampler["ch_mult"]),
            upsampler["num_res_blocks"],
            upsampler["z_channels"],
            upsampler["out_ch"],
            level_attention=(),
        ),
        FieldConfig(kind, triplane["decoder_in_chans"], grid=triplane["grid_res"] if kind == "mesh" else 128),
        published=True,
        separate_smoothers=separate,
        render=RenderConfig() if kind == "mesh" else render_config(settings),
    )


def build_tokenizer(case: Case) -> TriplaneVQ:
    """The case's tokenizer, in evaluation form."""
    config = tokenizer_config(case)
    loaded = TriplaneVQ.from_official(
        case.state_dict("tokenizer"),
        schedule=config.schedule,
        heads=config.decoder.heads,
        view_heads=config.views.heads,
        smoothing=config.quantizer.smoothing,
        beta=config.quantizer.beta,
        grid=config.head.grid,
        render=config.render,
    )
    with torch.device("meta"):
        tokenizer = TriplaneVQ(config)
    tokenizer.load_state_dict(loaded.state_dict(), assign=True)
    return tokenizer.eval()


def model_config(case: Case, codes: QuantizerConfig, schedule: ScaleSchedule) -> SAR3DConfig:
    """The official constructor's arguments in this library's terms."""
    config = case.config["transformer"]
    kinds = {"VAR": "image", "VAR_text": "text"}
    condition: Any = kinds[config["class"]]
    if list(config["patch_nums"]) != [scale.height for scale in schedule.scales]:
        raise ReplayError(f"the transformer's scales {list(config['patch_nums'])} are not the tokenizer's '{schedule}'")
    config.ignore(*KERNELS, "num_classes")
    for name in EVALUATION:
        if config[name]:
            raise ReplayError(f"{name} is {config[name]}: its draws are random, so no case can be met")
    blocks = SAR3DBlocksConfig(
        config["embed_dim"],
        config["depth"],
        config["num_heads"],
        config["mlp_ratio"],
        conditioning="shared" if config["shared_aln"] else "block",
        attention="cosine" if config["attn_l2_norm"] else "dot",
        norm_eps=config["norm_eps"],
        memory_width=WIDTHS[condition],
        look="before" if condition == "image" else "after",
    )
    drop = config["cond_drop_rate"]
    return SAR3DConfig(blocks, condition, codes.vocabulary, codes.channels, schedule, condition_drop=drop)


def build_model(case: Case, tokenizer: TriplaneVQ | None = None) -> SAR3D:
    """The case's transformer, in evaluation form, with the case's features of no condition.

    Args:
        tokenizer: None: one without weights, of the right codes.
    """
    if tokenizer is None:
        codes, schedule, _ = quantizer_config(case.config["quantize"])
        with torch.device("meta"):
            tokenizer = TriplaneVQ(_around(codes, schedule))
    else:
        codes, schedule = tokenizer.config.quantizer, tokenizer.config.schedule
    config = model_config(case, codes, schedule)
    loaded = SAR3D.from_official(
        case.state_dict("transformer"),
        tokenizer,
        schedule=schedule,
        heads=config.transformer.heads,
        condition=config.condition,
        norm_eps=config.transformer.norm_eps,
    )
    with torch.device("meta"):
        model = SAR3D(config, tokenizer)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.conditions.set_null(case.tensor("empty_condition"), case.tensor("empty_pooled"))
    return model.eval()


def _around(codes: QuantizerConfig, schedule: ScaleSchedule) -> TriplaneVQConfig:
    """The least tokenizer with some codes and scales."""
    latent = AutoencoderConfig(32, (1,), 1, PLANES * codes.channels, 10, attention=False)
    upsampler = AutoencoderConfig(32, (1,), 1, 8, 32, level_attention=())
    return TriplaneVQConfig(latent, ViewsConfig(), codes, schedule, PlanesConfig(8, 1, 1), upsampler, published=True)


def features_of(case: Case) -> TextFeatures:
    """The case's conditions."""
    states = case.tensor("condition")
    return TextFeatures(Packed(states.flatten(0, 1), (states.shape[1],) * len(states)), case.tensor("pooled"))


def gradient_norms(model: SAR3D | TriplaneVQ, names: Sequence[str]) -> np.ndarray:
    """2-norms of the gradients under official names, 0 where none reaches."""
    values = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in nn.Module.named_parameters(model)}
    official: dict[str, Tensor] = _exported(model, values)
    return norms(official, list(names))


def _exported(model: SAR3D | TriplaneVQ, values: dict[str, Tensor]) -> dict[str, Tensor]:
    from nextscale.tasks.shapes.sar3d_layout import tokenizer_to_layout, transformer_to_layout

    if isinstance(model, TriplaneVQ):
        return tokenizer_to_layout(values, len(model.config.schedule), model.config.separate_smoothers)
    own = {name: value for name, value in values.items() if not name.startswith("tokenizer.")}
    return transformer_to_layout(own, model.config.schedule)

"""DAR's golden cases: depth decoder, transformer, encoders behind their backbones, a step, the validation loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.core.checkpoint import assign, weightless
from nextscale.core.schedule import ScaleSchedule
from nextscale.evaluation.depth_maps import merge_mirrored
from nextscale.evaluation.depth_protocols import Protocol, compare, score
from nextscale.parity.case import Case
from nextscale.parity.replay import Operations, ReplayError
from nextscale.tasks.depth.dar_bins import OrdinalBins
from nextscale.tasks.depth.dar_decoder import DARDecoder, DARDecoderConfig
from nextscale.tasks.depth.dar_diffusion import DiffusionEncoder, DiffusionEncoderConfig, squared
from nextscale.tasks.depth.dar_layout import LAYOUTS, from_layout, to_layout
from nextscale.tasks.depth.dar_necks import PatchPyramid
from nextscale.tasks.depth.dar_training import scale_invariant_error, scale_losses
from nextscale.tasks.depth.dar_transformer import DARTransformer, DARTransformerConfig
from nextscale.tasks.depth.dar_unet import UNetConfig
from nextscale.tasks.depth.dar_windows import cut_windows, join_windows

operations = Operations()

DROPPING = ("mid_drop_rate", "mid_attn_drop_rate", "mid_drop_path_rate")
"""Arguments without effect in evaluation form."""


@operations
def decode(case: Case) -> Mapping[str, Any]:
    """Features of an image -> the depths of all scales."""
    decoder = _decoder(case)
    case.config["transformer"].ignore(*DROPPING)
    with torch.inference_mode():
        steps = list(decoder(case.tensor("memory"), case.tensor("context")))
        depths = [step.depth for step in steps]
        # The published code computes labels and refined edges, and reads neither.
        labels, edges = decoder.config.bins.trace(depths)
        middle = steps[0].centres.expand(*depths[0].shape[:1], -1, *depths[0].shape[2:])
        return {
            "depth": torch.stack(depths),
            "uncertainty": torch.stack([step.uncertainty for step in steps]),
            "labels": torch.stack(labels)[:, :, 0],
            "depth_of_bin": torch.stack([middle.gather(1, label) for label in labels]),
            "edges": torch.stack([each.expand(len(middle), -1, *middle.shape[2:]) for each in edges]),
            "tokens_first": steps[0].tokens,
            "tokens_last": steps[-1].tokens,
            "upsampled": _enlarged(case, depths[-1]),
        }


@operations
def train_step(case: Case) -> Mapping[str, Any]:
    """Losses, gradients and running statistics of one step in train form."""
    options, decoder = case.options, _decoder(case).train()
    if dropping := [name for name in DROPPING if case.config["transformer"][name]]:
        raise ReplayError(f"{', '.join(dropping)}: the draws of train form are random, so no case can be met")
    steps = list(decoder(case.tensor("memory"), case.tensor("context")))
    maps = [_enlarged(case, step.depth) for step in steps]
    rows, columns = options["crop"]
    truth = case.tensor("gt")[:, None, :rows, :columns]
    shown = [each[..., :rows, :columns] for each in maps]
    losses = scale_losses(shown, truth, truth > 0, options["variance_focus"])
    losses.sum().backward()
    gradients = {
        f"decoder.{name}": torch.zeros_like(p) if p.grad is None else p.grad for name, p in decoder.named_parameters()
    }
    found = to_layout(LAYOUTS["patch"], gradients)
    buffers = to_layout(LAYOUTS["patch"], {f"decoder.{name}": value for name, value in decoder.named_buffers()})
    return {
        "upsampled": maps[-1],
        "losses": losses,
        "loss": losses.sum(),
        "grad_norms": np.array([float(found[f"decoder.{name}"].double().norm()) for name in options["grad_names"]]),
        "running_stats": torch.cat([buffers[f"decoder.{name}"].flatten() for name in options["stat_names"]]),
    }


@operations
def transformer(case: Case) -> Mapping[str, Any]:
    """The transformer alone; in the published code a mask that is given changes nothing."""
    config = _transformer_config(case.config["transformer"])
    case.config["transformer"].ignore(*DROPPING)
    with weightless():
        network = DARTransformer(config)
    _load(network, case, "transformer", "decoder.update.transdecoder.", "decoder.transformer.")
    with torch.inference_mode():
        image = network.eval().remember(case.tensor("memory"))
        y, masked = (network(case.tensor("x"), image) for _ in range(2))
    return {"y": y, "y_masked": masked}


@operations
def encode_dino(case: Case) -> Mapping[str, Any]:
    """Depth Anything's neck on given patch tokens."""
    arguments, layers = case.config["encoder"], case.tensor("layers")
    arguments.ignore("use_bn", "localhub")  # the first is set to False by the constructor, the second read nowhere
    if arguments["use_clstoken"]:
        raise ReplayError("use_clstoken is True: the published constructor fails with it")
    widths = arguments["out_channels"]
    state = case.state_dict("encoder")
    with weightless():
        neck = PatchPyramid(
            case.config["backbone"]["dim"],
            widths,
            arguments["features"],
            len(state["out_layer.0.bias"]),
            unread_layers=True,
        )
    _load(neck, case, "encoder", "encoder.", "encoder.neck.")
    grid = tuple(case.options["patches"])
    with torch.inference_mode():
        memory, context = neck.eval()([layer.mT.unflatten(-1, grid) for layer in layers])
        size = tuple(case.options["context_size"])
        resized = F.interpolate(context, size=size, mode="bilinear", align_corners=False)
    return {"memory": memory, "context": context, "context_resized": resized}


@operations
def encode_sd(case: Case) -> Mapping[str, Any]:
    """Stable Diffusion's UNet under the scene's embedding, on a given latent and given class logits."""
    arguments, state = case.config["encoder"], case.state_dict("encoder")
    arguments.ignore("sd_path", "dataset")  # where a file lies; read nowhere
    unet = _unet_config(case.config["unet"])
    widths = list(arguments["ldm_prior"])
    config = DiffusionEncoderConfig(
        unet,
        scenes=arguments["args"]["no_of_classes"],
        scene_hidden=len(state["cide_module.fc.0.bias"]),
        latent_scale=case.config["first_stage"]["scale_factor"],
        outputs=arguments["out_dim"],
    )
    if widths != [unet.widths[0], unet.widths[1], sum(unet.widths[2:])] or arguments["emb_dim"] != unet.context_width:
        raise ReplayError(f"ldm_prior {widths} and emb_dim {arguments['emb_dim']} do not fit this UNet: {unet.widths}")
    with weightless():
        encoder = DiffusionEncoder(config)
    # Neither the autoencoder nor the classifier is in the case: it gives their outputs.
    del encoder.first_stage, encoder.classifier
    _load(encoder, case, "encoder", "encoder.", "encoder.", "diffusion")
    with torch.inference_mode():
        condition = encoder.scene(case.tensor("logits"))
        memory, levels = encoder.read(case.tensor("latent"), condition)
    return {
        "square": squared(case.tensor("image")),
        "scene_embedding": condition,
        "memory": memory,
        "context": levels[0],
        **{f"level_{index}": level for index, level in enumerate(levels)},
    }


# --- models from the official constructors' arguments ---------------------------------------------------


def _load(module: nn.Module, case: Case, part: str, theirs: str, ours: str, kind: str = "patch") -> None:
    """Load a part's weights, whose names and ours continue those of the whole model."""
    state = from_layout(LAYOUTS[kind], {theirs + name: value for name, value in case.state_dict(part).items()})
    own = {name.removeprefix(ours): value for name, value in state.items()}
    counters = {name: torch.zeros((), dtype=torch.long) for name in module.state_dict() if name.endswith("tracked")}
    assign(module, counters | own, part)


def _transformer_config(arguments: Mapping[str, Any]) -> DARTransformerConfig:
    return DARTransformerConfig(
        arguments["mid_dim"],
        arguments["num_layers"],
        arguments["num_heads"],
        arguments["dim"],
        arguments["memory_dim"],
        arguments["mid_mlp_ratio"],
        arguments["mid_qkv_bias"],
        arguments["use_long_skip"],
    )


def _decoder(case: Case) -> DARDecoder:
    """The case's depth decoder, in evaluation form, after the published code."""
    arguments, fixed, layers = case.config["decoder"], case.config["fixed"], case.config["decoder"]["args"]
    layers.ignore("dataset", "encoder")  # they choose the last enlargement's size, which the case gives
    network = _transformer_config(case.config["transformer"])
    schedule = ScaleSchedule.grids(arguments["patch_hws_list"])
    said = {
        "q_dim": (arguments["q_dim"], network.token_width),
        "channels_in": (arguments["channels_in"], network.token_width),
        "memory_dim": (arguments["memory_dim"], network.memory_width),
        "query_tokens": (fixed["query_tokens"], schedule.lengths[0]),
        "num_deconv": (layers["num_deconv"], len(layers["num_filters"])),
    }
    if wrong := [f"{name} is {given}, {other} elsewhere" for name, (given, other) in said.items() if given != other]:
        raise ReplayError(f"the case contradicts itself: {'; '.join(wrong)}")
    bins = OrdinalBins(
        arguments["min_depth"],
        arguments["max_depth"],
        fixed["bins"],
        neighbours=2,
        refined=False,
        last_edge=False,
    )
    config = DARDecoderConfig(
        network,
        bins,
        schedule,
        causal=False,
        context_width=arguments["context_dim"],
        bin_width=arguments["hidden_dim"],
        width=arguments["channels_out"],
        up_widths=tuple(layers["num_filters"]),
        up_kernels=tuple(layers["deconv_kernels"]),
        unread_layers=True,
    )
    with weightless():
        decoder = DARDecoder(config)
    _load(decoder, case, "decoder", "decoder.", "decoder.")
    return decoder.eval()


def _enlarged(case: Case, depth: Tensor) -> Tensor:
    size = tuple(case.config["fixed"]["out_size"])
    return F.interpolate(depth, size=size, mode="bilinear", align_corners=False)


FIXED_UNET = {
    "dims": 2,
    "num_classes": None,
    "n_embed": None,
    "use_spatial_transformer": True,
    "resblock_updown": False,
    "conv_resample": True,
    "use_fp16": False,
}
"""What makes the general UNet Stable Diffusion's."""


def _unet_config(arguments: Any) -> UNetConfig:
    # Sizes and layers of the noise that is not predicted; memory; and what only other forms of attention read.
    arguments.ignore("image_size", "out_channels", "use_checkpoint", "num_heads_upsample", "use_new_attention_order")
    arguments.ignore("dropout", "legacy")
    for name, value in FIXED_UNET.items():
        if arguments[name] != value:
            raise ReplayError(f"{name} is {arguments[name]}: Stable Diffusion's UNet has {value}")
    heads, head_size = arguments["num_heads"], arguments["num_head_channels"]
    return UNetConfig(
        arguments["model_channels"],
        tuple(arguments["channel_mult"]),
        arguments["num_res_blocks"],
        tuple(arguments["attention_resolutions"]),
        heads if head_size == -1 else None,
        head_size,
        arguments["context_dim"],
        arguments["transformer_depth"],
        arguments["use_scale_shift_norm"],
        arguments["in_channels"],
    )


# --- the validation loop --------------------------------------------------------------------------------

CROPS = {"garg_crop": "garg", "eigen_crop": "eigen_kitti", None: None}
"""Of KITTI, by their names in the published code."""


@operations
def evaluate(case: Case) -> Mapping[str, Any]:
    """The validation loop of the training script, image by image, on given maps of the decoder."""
    options = case.options
    images, truths, maps = case.tensor("image"), case.tensor("gt"), case.tensor("maps")
    kitti = options["dataset"] == "kitti"
    if options["dataset"] not in ("kitti", "nyudepthv2", "sunrgbd"):
        raise ReplayError(f"dataset is {options['dataset']!r}; known are kitti, nyudepthv2 and sunrgbd")
    multiple = {"VIT-16": 64, "VIT-14": 56}[options["encoder"]]
    halves, mirrors, crop = options["kitti_split_to_half"] and kitti, options["flip_test"], options["kitti_crop"]
    width = images.shape[-1]
    window = 640 if halves else None
    protocol = Protocol(
        truth_range=(options["min_depth_eval"], options["max_depth_eval"]),
        clamp=(options["min_depth_eval"], options["max_depth_eval"]),
        clamp_first=True,
        crop=CROPS[crop] if kitti else "eigen_nyu",
    )
    inputs, predictions, pixels, rows, losses = [], [], [], [], []
    for image, truth, given in zip(images, truths, maps, strict=True):
        views = cut_windows(image[None], window)
        if mirrors:
            views = torch.cat((views, views.flip(-1)))
        padding = [-side % multiple for side in views.shape[-2:]]
        padded = F.pad(views, (0, padding[1], 0, padding[0]))
        inputs.append(padded)
        size = tuple(options["out_size"])
        seen = F.interpolate(given[-1][:, None], size=size, mode="bilinear", align_corners=False)
        seen = seen[..., : views.shape[-2], : views.shape[-1]]
        if mirrors:
            plain, mirrored = seen.chunk(2)
            seen = torch.from_numpy(merge_mirrored(plain.numpy(), mirrored.numpy()))
        depth = join_windows(seen, width)[0, 0]
        losses.append(
            scale_invariant_error(
                depth[None, None], truth[None, None], (truth > 0)[None, None], options["variance_focus"]
            )
        )
        compared = compare(truth.numpy(), depth.numpy(), protocol)
        predictions.append(depth)
        pixels.append(compared.pixels)
        found = score(compared, options["metrics"])
        rows.append([found[name] for name in options["metrics"]])
    return {
        "net_input": torch.stack(inputs),
        "prediction": torch.stack(predictions),
        "valid_pixels": np.array(pixels),
        "per_image": np.array(rows),
        "mean": np.array(rows).mean(0),
        "val_loss": torch.stack(losses).mean(),
    }

"""DepthART's golden cases, and its baseline's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.quantizer import QuantizerConfig
from nextscale.core.random import BatchDraws
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.transformer import TransformerConfig
from nextscale.evaluation import depth_depthart
from nextscale.parity.building import KERNELS, in_official_names, norms
from nextscale.parity.case import Case
from nextscale.parity.replay import Operations, ReplayError
from nextscale.tasks.depth.depthart import PRESETS, DepthART
from nextscale.tasks.depth.depthart_normalizer import DepthNormalizer
from nextscale.tasks.depth.depthart_sampling import AveragedEmitter, Pick
from nextscale.tasks.depth.depthart_training import DepthARTLoss, DepthARTTraining, Terms
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ, ResidualVQConfig

operations = Operations()

FILES = ("ckpt_path", "ignore_keys")
"""Arguments that name a file to start from; a case's weights are given."""

PRESET = {"DepthVAR": "depthvar", "DepthART": "depthart"}
PICKS: dict[str, Pick] = {"argmax": "likeliest", "most_likely": "likeliest", "multinomial": "drawn"}


# --- building -----------------------------------------------------------------------------------------


def tokenizer_config(config: Mapping[str, Any]) -> ResidualVQConfig:
    """The official constructor's arguments in this library's terms.

    Raises:
        ReplayError: they are none that the official code can build.
    """
    encoder, quantizer = config["ddconfig"], config["quantconfig"]
    residual, channels = quantizer["resiconfig"], encoder["z_channels"]
    lowest, middle = encoder["using_sa"], encoder["using_mid_sa"]
    residual.ignore("default_qresi_counts")  # of convolutions that are not shared, which cannot be built
    if not residual["share_quant_resi"]:
        raise ReplayError("share_quant_resi is 0, with which the official quantizer cannot be built")
    if encoder["dropout"]:
        raise ReplayError(f"dropout is {encoder['dropout']}: its draws are random, so no case can be met")
    return ResidualVQConfig(
        AutoencoderConfig(
            channels=encoder["ch"],
            multipliers=tuple(encoder["ch_mult"]),
            blocks=encoder["num_res_blocks"],
            latent_channels=channels,
            image_channels=encoder["in_channels"],
            attention=middle,
            level_attention=None if lowest == middle else (len(encoder["ch_mult"]) - 1,) * lowest,
        ),
        QuantizerConfig(
            config["vocab_size"],
            channels,
            beta=quantizer["beta"],
            unit_norm=quantizer["using_znorm"],
            smoothing=residual["quant_resi"],
            smoothers=residual["share_quant_resi"],
        ),
        ScaleSchedule.squares(*config["v_patch_nums"]),
        config["quant_conv_ks"],
    )


def _told(config: ResidualVQConfig) -> dict[str, Any]:
    """What a file does not tell of its tokenizer."""
    quantizer = config.quantizer
    names = ("unit_norm", "smoothing", "beta")
    return {"schedule": config.schedule, **{name: getattr(quantizer, name) for name in names}}


def build_tokenizer(case: Case) -> ResidualVQ:
    """The case's tokenizer alone, in evaluation form."""
    arguments = case.config["vae"]
    config = tokenizer_config(arguments)
    arguments.ignore(*FILES)
    tokenizer = ResidualVQ.from_official(case.state_dict("vae"), **_told(config))
    _same(tokenizer.config, config)
    return tokenizer


def normalizer(case: Case) -> DepthNormalizer:
    """The case's normaliser."""
    given = case.config["normalizer"]
    return DepthNormalizer(
        given["quant"], affine=given["affine"], alpha=given["alpha"], beta=given["beta"], eps=given["eps"]
    )


def build_model(case: Case) -> DepthART:
    """The case's network with its tokenizer, in evaluation form.

    Raises:
        ReplayError: an argument asks for what the official code draws at random, or contradicts the weights.
    """
    given, vae = case.config["model"], case.config["vae"]
    tokenizer, block = tokenizer_config(vae), given["BlockConfig"]
    vae.ignore(*FILES)
    given.ignore(*FILES, *KERNELS, "cond_drop_rate")  # is stored and never read
    if any((block["drop"], block["attn_drop"], given["drop_path_rate"])):
        raise ReplayError("drop, attn_drop and drop_path_rate draw at random in training, so no case can be met")
    width, heads, schedule = given["embed_dim"], block["num_heads"], ScaleSchedule.squares(*given["patch_nums"])
    transformer = TransformerConfig(
        width,
        given["depth"],
        heads,
        mlp_ratio=block["mlp_ratio"],
        conditioning="shared" if given["shared_aln"] else "block",
        attention="dot",
        attention_scale=1.0 if block["cos_attn"] else 1 / math.sqrt(width // heads) / block["tau"],
        norm_eps=given["norm_eps"],
    )
    if block["cos_attn"]:
        block.ignore("tau")
    name = PRESET[case.options["model"]]
    model = DepthART.from_official(
        case.state_dict("model"),
        **_told(tokenizer) | {"schedule": schedule},
        heads=heads,
        attention_scale=transformer.attention_scale,
        norm_eps=transformer.norm_eps,
        drop_path=0.0,
        training=PRESETS[name].training,
        normalizer=normalizer(case),
    )
    _same(model.tokenizer.config, tokenizer)
    _same(model.config.transformer, transformer)
    _same((model.config.classes, model.config.schedule), (given["num_classes"], tokenizer.schedule))
    _same(model.config.published_start, name == "depthvar")
    return model


def _same(found: Any, expected: Any) -> None:
    if found != expected:
        raise ReplayError(f"the weights say {found}, the arguments {expected}")


def signed(image: Tensor) -> Tensor:
    """In [-1, 1]: a batch without negative values counts as in [0, 1], as in the official code."""
    return image * 2 - 1 if image.min() >= 0 else image


# --- operations ---------------------------------------------------------------------------------------


@operations
def tokenize(case: Case) -> Mapping[str, Any]:
    """Picture -> tokens, what a network sees of them, and pictures again."""
    tokenizer, image = build_tokenizer(case), case.tensor("image")
    schedule, quantizer = tokenizer.config.schedule, tokenizer.quantizer
    with torch.inference_mode():
        latent = tokenizer.features(image)
        found, totals = quantizer.encode(latent, schedule)
        tokens = torch.cat(found, dim=1)
        seen = DepthART.pyramid(_Bare(tokenizer), image)  # type: ignore[arg-type]
        return {
            "latent": latent,
            "tokens": tokens,
            "f_hats": torch.stack(totals),
            "vq_loss": quantizer(latent, schedule).loss,
            "next_inputs": quantizer.teacher_inputs(tokens, schedule),
            "image_tokens": seen,
            "unclamped": tokenizer.decoder(tokenizer.post_quant_conv(totals[-1])),
            "reconstruction": tokenizer.decode_features(totals[-1]),
            "reconstruction_tokens": tokenizer.decode(tokens),
            "reconstruction_growing": tokenizer.decode_ragged(tokens),
        }


class _Bare:
    """A tokenizer without a network, for what needs only the tokenizer."""

    def __init__(self, tokenizer: ResidualVQ) -> None:
        self.tokenizer = self.config = tokenizer
        self.config = tokenizer.config


@operations
def teacher_forcing(case: Case) -> Mapping[str, Any]:
    """Logits of the depth's scales from the true tokens."""
    model, target = build_model(case), _target(case)
    with torch.no_grad():
        photo, latent = model.pyramid(signed(case.tensor("image"))), model.depth_features(target)
        terms = DepthARTTraining(model).terms(model, photo, latent)
    return {"normalized": target, "tokens": terms.targets, "logits": terms.logits}


def _target(case: Case) -> Tensor:
    return normalizer(case).target(case.tensor("depth"))


@operations
def train_step(case: Case) -> Mapping[str, Any]:
    """A step of DepthART's training, or of its baseline's."""
    model, target, options = build_model(case), _target(case), case.options
    given = case.config["model"]
    latent_term = bool(given.get("rec_loss", False)) and options["model"] == "DepthART"
    noise = options["gumbel_seed"] is not None
    loss = DepthARTLoss(options["label_smoothing"], latent=latent_term, noise=noise, detached=True)
    photo, latent = model.pyramid(signed(case.tensor("image"))), model.depth_features(target)
    if noise:
        torch.manual_seed(options["gumbel_seed"])
    terms = DepthARTTraining(model, loss).terms(model.train(), photo, latent)
    terms.loss.backward()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = options["optimizer"]
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings["lr"],
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )
    optimizer.step()
    names = options["grad_names"]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    steps = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
    return {
        "normalized": target,
        "tokens": terms.targets,
        "logits": terms.logits,
        "ce": terms.cross_entropy,
        "latent_loss": terms.latent,
        "loss": terms.loss,
        "predict_vis": _shown(model, terms),
        "grad_norms": _norms(model, gradients, names),
        "step_norms": _norms(model, steps, names),
    }


def _shown(model: DepthART, terms: Terms) -> Tensor:
    """The picture of a training pass: the baseline's on the path that grows with the scales."""
    if model.config.training == "plain":
        return (model.tokenizer.decode_ragged(terms.logits.argmax(-1)) / 2 + 0.5).mean(1, keepdim=True)
    return model.decode_depth(terms.total.detach())


def _norms(model: DepthART, values: Mapping[str, Tensor | None], names: list[str]) -> np.ndarray:
    exported = in_official_names(model, values)
    # Scales that nothing reads have neither gradient nor step.
    unread = {name: torch.zeros_like(value) for name, value in exported.items() if name.endswith("scale_mul_1H11")}
    return norms(exported | unread, names)


@operations
def sample(case: Case) -> Mapping[str, Any]:
    """Depth from a photo, with the official draws."""
    model, options = build_model(case), case.options
    case.config["normalizer"].ignore("*")
    case.config["model"].ignore("rec_loss")  # of training
    emitter = AveragedEmitter(options["draws"], PICKS[options["pick"]], options["top_k"], options["top_p"])
    if options["pick"] == "argmax" and options["draws"] != 1:
        raise ReplayError(f"the argmax is one code, {options['draws']} draws were asked for")
    seed = options["seed"]
    draws = BatchDraws(None if seed is None else torch.Generator().manual_seed(seed))
    steps = list(model.steps(model.pyramid(signed(case.tensor("image"))), draws=draws, emitter=emitter))
    schedule, quantizer = model.config.schedule, model.tokenizer.quantizer
    with torch.inference_mode():
        inputs = [quantizer.next_input(steps[i].total, schedule, i + 1) for i in range(len(schedule) - 1)]
        logits = torch.cat([step.logits for step in steps], dim=1)
        return {
            "logits": logits,
            "tokens": logits.argmax(-1),
            "drawn": torch.cat([step.tokens for step in steps], dim=1),
            "f_hats": torch.stack([step.total for step in steps]),
            "next_inputs": torch.cat(inputs, dim=1),
            "decoded": (model.tokenizer.decode_features(steps[-1].total) + 1) / 2,
            "depth": model.decode_depth(steps[-1].total),
        }


@operations
def normalize(case: Case) -> Mapping[str, Any]:
    """Metric depth as the target of training."""
    how, depth, mask = normalizer(case), case.tensor("depth"), case.tensor("mask")
    return {
        "train": how.normalize(depth),
        "train_masked": how.normalize(depth, mask),
        "eval_masked": how.normalize(depth, mask, outside="kept"),
    }


@operations
def evaluate(case: Case) -> Mapping[str, Any]:
    """Predictions brought onto the truth image by image, and their errors."""
    options = case.options
    maps = (case.inputs["gt"][:, 0], case.inputs["pred"][:, 0], case.inputs["mask"][:, 0])
    truth, prediction, mask = depth_depthart.resize_pair(*maps, tuple(options["size"]))
    outputs: dict[str, Any] = {
        name: part[:, None]
        for name, part in (("pred_up", prediction), ("gt_up", truth), ("mask_up", mask.astype(np.uint8)))
    }
    errors, shares = [], []
    for aligner in options["aligners"]:
        images = list(zip(truth, prediction, mask, strict=True))
        fitted = [depth_depthart.aligned(*image, aligner) for image in images]
        scored = [
            depth_depthart.evaluate(g, p, known, options["errors"], options["shares"])
            for (g, _, known), p in zip(images, fitted, strict=True)
        ]
        errors.append([each[0] for each in scored])
        shares.append([each[1] for each in scored])
        outputs[f"aligned_{aligner}"] = np.stack(fitted)[:, None]
    return {**outputs, "errors": np.array(errors), "shares": np.array(shares)}

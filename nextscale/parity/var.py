"""VAR's golden cases: every operation of the official code, on this library's functions."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.heads import CategoricalEmitter
from nextscale.core.optim import Schedule
from nextscale.core.quantizer import QuantizerConfig, smoother_index
from nextscale.core.random import BatchDraws
from nextscale.core.sampling import Control
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.transformer import TransformerConfig
from nextscale.datasets.sampler import EpochSampler
from nextscale.parity.case import Case
from nextscale.parity.replay import Operations, ReplayError
from nextscale.tasks.generation.var import VAR, VARConfig, initialize
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ, ResidualVQConfig

operations = Operations()


@operations
def tokenize(case: Case) -> Mapping[str, Any]:
    """Image -> tokens -> image, with the tokenizer's own scales or others."""
    tokenizer = _tokenizer(case)
    scales = case.options.get("scales")
    schedule = tokenizer.config.schedule if scales is None else ScaleSchedule.parse(scales)
    with torch.inference_mode():
        latents = tokenizer.features(case.tensor("images"))
        tokens, f_hats = tokenizer.quantizer.encode(latents, schedule)
        return {
            "latents": latents,
            "tokens": torch.cat(tokens, dim=1),
            "f_hats": torch.stack(f_hats),
            "recon": tokenizer.decode_features(f_hats[-1]),
        }


@operations
def detokenize(case: Case) -> Mapping[str, Any]:
    """Tokens -> sums of code maps, transformer inputs and images."""
    tokenizer, tokens = _tokenizer(case), case.tensor("tokens")
    schedule = tokenizer.config.schedule
    with torch.inference_mode():
        return {
            "f_hats": torch.stack(tokenizer.quantizer.decode(tokens, schedule)),
            "var_input": tokenizer.quantizer.teacher_inputs(tokens, schedule),
            "recon": tokenizer.decode(tokens, schedule),
            "recon_ragged": tokenizer.decode_ragged(tokens, schedule),
        }


@operations
def tokenizer_train_step(case: Case) -> Mapping[str, Any]:
    """Loss and gradients of reconstruction plus vector quantisation, all that the official repository has."""
    tokenizer, images = _tokenizer(case, training=True), case.tensor("images")
    output = tokenizer(images)
    loss = torch.nn.functional.mse_loss(output.reconstruction, images) + output.quantizer.loss
    loss.backward()
    gradients = _in_official_names(tokenizer, {name: p.grad for name, p in tokenizer.named_parameters()})
    return {
        "vq_loss": output.quantizer.loss,
        "loss": loss,
        "recon": output.reconstruction,
        "grad_norms": _norms(gradients, case.options["grad_names"]),
    }


@operations
def teacher_forcing(case: Case) -> Mapping[str, Any]:
    """Logits of all scales at once, from the true tokens."""
    model, tokens = _model(case), case.tensor("tokens")
    labels = model.drop_labels(case.tensor("labels"), case.tensor("uniform"))
    with torch.inference_mode():
        inputs = model.tokenizer.quantizer.teacher_inputs(tokens, model.config.schedule)
        return {"var_input": inputs, "labels_used": labels, "logits": model(inputs, labels)}


@operations
def sample(case: Case) -> Mapping[str, Any]:
    """Class-conditional sampling with the official draw order."""
    model, labels, draws = _model(case), case.tensor("labels"), _draws(case.options["seed"])
    if case.options["random_labels"]:
        labels = draws.integers(model.config.classes, len(labels))
    return {"labels_used": labels, **_sampled(case, model, labels, draws)}


def _sampled(
    case: Case, model: VAR, labels: Tensor, draws: BatchDraws, controls: Sequence[Control] = ()
) -> dict[str, Tensor]:
    """The options and outputs that sampling and editing share."""
    options = case.options
    emitter = CategoricalEmitter(options["top_k"], options["top_p"], smooth=options["more_smooth"])
    steps = list(
        model.steps(labels, draws=draws, emitter=emitter, guidance=options["cfg"], controls=controls)
    )
    with torch.inference_mode():
        image = model.tokenizer.decode_features(steps[-1].total)
    return {
        "tokens": torch.cat([step.tokens for step in steps], dim=1),
        "logits": torch.cat([step.logits for step in steps], dim=1),
        "codes": torch.cat([step.codes for step in steps], dim=1),
        "f_hats": torch.stack([step.total for step in steps]),
        "image": (image + 1) / 2,
    }


@operations
def init_weights(case: Case) -> Mapping[str, Any]:
    """Statistics of the initial weights; the draws themselves are free."""
    options = case.options
    with torch.device("meta"):
        tokenizer = ResidualVQ(_tokenizer_config(case.config["vae"]))
    case.config["vae"].ignore("dropout", "test_mode")
    config = _model_config(case.config["var"], tokenizer)
    case.config["var"].ignore(*_EVALUATION, *_KERNELS)
    torch.manual_seed(options["seed"])
    model = initialize(
        VAR(config, tokenizer),
        modulation=options["init_adaln"],
        gate=options["init_adaln_gamma"],
        # Below 0 the official arguments mean: leave the head's weights alone, and choose the deviation.
        head=options["init_head"] if options["init_head"] >= 0 else 1.0,
        std=options["init_std"] if options["init_std"] >= 0 else None,
    )
    weights = {name: weight.detach() for name, weight in model.to_official().items()}
    values = [weights[name] for name in options["param_names"]]
    chunks = (
        "blocks.{}.ada_gss" if config.transformer.conditioning == "shared" else "blocks.{}.ada_lin.1.weight"
    )
    return {
        "rms": [_rms(value) for value in values],
        "constant": [float(value.min()) if value.min() == value.max() else math.nan for value in values],
        "chunk_rms": [
            [_rms(chunk) for chunk in weights[chunks.format(block)].reshape(6, -1)]
            for block in range(config.transformer.depth)
        ],
    }


def _rms(value: Tensor) -> float:
    return float(value.square().mean().sqrt())


@operations
def filter_logits(case: Case) -> Mapping[str, Any]:
    """Top-k and nucleus filters, one pair of settings after the other."""
    logits = case.tensor("logits")
    settings = zip(case.options["top_k"], case.options["top_p"], strict=True)
    probabilities = [CategoricalEmitter(top_k=k, top_p=p).probabilities(logits, index=0) for k, p in settings]
    seed = case.options["seed"]
    return {
        "probabilities": torch.stack(probabilities),
        "tokens": torch.stack([_draws(seed).categorical(each) for each in probabilities]),
    }


@operations
def tables(case: Case) -> Mapping[str, Any]:
    """What is decided by arithmetic alone: residual convolutions, rate and decay schedules, batches."""
    counts, scales = case.options["phi_counts"], case.options["phi_scales"]
    phi = np.full((len(counts), len(scales), max(scales)), -1)
    for row, count in enumerate(counts):
        for column, number in enumerate(scales):
            phi[row, column, :number] = smoother_index(count, number)
    rates, decays = [], []
    for options, steps in zip(case.options["schedules"], case.inputs["iterations"].tolist(), strict=True):
        plan = Schedule(
            kind=options["kind"],
            warmup=options["warmup"],
            total=options["total"],
            start=options["start"],
            end=options["end"],
            decay=options["wd"],
            decay_end=options["wd_end"],
        )
        rates.append([options["peak"] * plan.rate(step) for step in steps])
        decays.append([plan.weight_decay(step) for step in steps])
    return {
        "phi_index": phi,
        "phi_index_separate": phi,  # both forms look the convolution up by the same ticks
        "lr": np.array(rates),
        "weight_decay": np.array(decays),
        "batches": _batches(case.options["batches"]),
    }


def _batches(options: Mapping[str, Any]) -> np.ndarray:
    """(ranks, number, batch of a rank) sample indices; -1 where a batch is short."""
    ranks, number = options["world_size"], options["number"]
    size = options["global_batch"] // ranks
    batches = np.full((ranks, number, size), -1)
    for rank in range(ranks):
        sampler = EpochSampler(
            options["dataset_len"],
            batch_size=size,
            rank=rank,
            world_size=ranks,
            seed=options["seed"],
            shuffle=options["shuffle"],
            fill_last=options["fill_last"],
        )
        for index, batch in enumerate(islice(sampler, number)):
            batches[rank, index, : len(batch)] = [sample for _, sample in batch]
    return batches


# --- building what a case describes ---------------------------------------------------------------------

_KERNELS = ("flash_if_available", "fused_if_available")
"""Arguments that choose kernels, not what they compute."""

_EVALUATION = ("drop_rate", "attn_drop_rate", "drop_path_rate")
"""Arguments without effect in evaluation form."""


def _tokenizer_config(config: Mapping[str, Any]) -> ResidualVQConfig:
    """The official constructor's arguments in this library's terms."""
    shared, counts = config["share_quant_resi"], config["default_qresi_counts"]
    scales = config["v_patch_nums"]
    if shared == 0 and counts not in (0, len(scales)):
        raise ReplayError(f"default_qresi_counts {counts} with {len(scales)} scales is not supported")
    return ResidualVQConfig(
        AutoencoderConfig(channels=config["ch"], latent_channels=config["z_channels"]),
        QuantizerConfig(
            config["vocab_size"],
            config["z_channels"],
            beta=config["beta"],
            unit_norm=config["using_znorm"],
            smoothing=config["quant_resi"],
            smoothers=shared or None,
        ),
        ScaleSchedule.squares(*scales),
        config["quant_conv_ks"],
    )


def _tokenizer(case: Case, training: bool = False) -> ResidualVQ:
    """The case's tokenizer, in evaluation form or ready to train."""
    arguments = case.config["vae"]
    config = _tokenizer_config(arguments)
    arguments.ignore("test_mode")  # freezes the parameters; the operation decides that
    if training:
        _no_random_drops(arguments, "dropout")
    else:
        arguments.ignore("dropout")
    loaded = ResidualVQ.from_official(
        case.state_dict("vae"),
        schedule=config.schedule,
        unit_norm=config.quantizer.unit_norm,
        smoothing=config.quantizer.smoothing,
        beta=config.quantizer.beta,
    )
    with torch.device("meta"):
        tokenizer = ResidualVQ(config)
    tokenizer.load_state_dict(loaded.state_dict(), assign=True)
    return tokenizer.train(training)


def _model_config(config: Mapping[str, Any], tokenizer: ResidualVQ) -> VARConfig:
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


def _model(case: Case, training: bool = False) -> VAR:
    """The case's transformer on its tokenizer, in evaluation form or ready to train."""
    arguments, tokenizer = case.config["var"], _tokenizer(case)
    config = _model_config(arguments, tokenizer)
    if config.schedule != tokenizer.config.schedule:
        raise ReplayError(f"the transformer's scales '{config.schedule}' are not the tokenizer's")
    arguments.ignore(*_KERNELS)
    if training:
        _no_random_drops(arguments, *_EVALUATION)
    else:
        arguments.ignore(*_EVALUATION)
    loaded = VAR.from_official(
        case.state_dict("var"), tokenizer, schedule=config.schedule, heads=config.transformer.heads
    )
    with torch.device("meta"):
        model = VAR(config, tokenizer)
    model.load_state_dict(loaded.state_dict(), assign=True)
    return model.train(training)


def _no_random_drops(config: Mapping[str, Any], *names: str) -> None:
    """In train form a rate above 0 would draw numbers that no case can give."""
    for name in names:
        if config[name]:
            raise ReplayError(
                f"{name} is {config[name]}: in train form its draws are random, so nothing is expected"
            )


def _draws(seed: int | None) -> BatchDraws:
    """The official draw order: one CPU generator for the whole batch, or the global one."""
    return BatchDraws(None if seed is None else torch.Generator().manual_seed(seed))


def _in_official_names(model: ResidualVQ | VAR, values: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Values of the parameters (zeros where None) under their official names.

    The model's own export does it: a copy of the model that holds the values in its parameters' place.
    """
    holder = copy.deepcopy(model)
    for name, parameter in holder.named_parameters():
        value = values[name]
        parameter.data = torch.zeros_like(parameter) if value is None else value
    return holder.to_official()


def _norms(tensors: Mapping[str, Tensor], names: list[str]) -> np.ndarray:
    """2-norms in the order of ``names``."""
    return np.array([float(tensors[name].norm()) for name in names])

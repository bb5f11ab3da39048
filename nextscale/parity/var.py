"""VAR's golden cases: every operation of the official code, on this library's functions."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextscale.core.heads import CategoricalEmitter
from nextscale.core.optim import Schedule
from nextscale.core.quantizer import smoother_index
from nextscale.core.random import BatchDraws
from nextscale.core.schedule import ScaleSchedule
from nextscale.datasets.sampler import EpochSampler
from nextscale.parity.case import Case
from nextscale.parity.replay import Operations, ReplayError
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ

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


def _tokenizer(case: Case, training: bool = False) -> ResidualVQ:
    """The case's tokenizer, in evaluation form or ready to train.

    Raises:
        ReplayError: the configuration and what the weights imply contradict each other.
    """
    config = case.config["vae"]
    tokenizer = ResidualVQ.from_official(
        case.state_dict("vae"),
        schedule=ScaleSchedule.squares(*config["v_patch_nums"]),
        unit_norm=config["using_znorm"],
        smoothing=config["quant_resi"],
        beta=config["beta"],
    )
    built = tokenizer.config
    smoothers = _smoother_count(config["share_quant_resi"], config["default_qresi_counts"], built.schedule)
    _agree(
        config,
        vocab_size=built.quantizer.vocabulary,
        z_channels=built.quantizer.channels,
        ch=built.autoencoder.channels,
        quant_conv_ks=built.quant_conv_kernel,
    )
    if len(tokenizer.quantizer.smoothers) not in (0, smoothers):
        raise ReplayError(
            f"config.vae asks for {smoothers} residual convolutions, the weights have "
            f"{len(tokenizer.quantizer.smoothers)}"
        )
    config.ignore("test_mode")  # freezes the parameters; the operation decides that
    if training:
        _no_random_drops(config, "dropout")
        return tokenizer.requires_grad_(True).train()
    config.ignore("dropout")
    return tokenizer


def _smoother_count(shared: int, counts: int, schedule: ScaleSchedule) -> int:
    """Number of residual convolutions in the official constructor's terms: 0 shared is one per scale."""
    return shared or counts or len(schedule)


def _agree(config: Mapping[str, Any], **built: Any) -> None:
    """Every given argument must be what was built from the weights."""
    for name, value in built.items():
        if config[name] != value:
            raise ReplayError(f"the configuration has {name} {config[name]!r}, the weights imply {value!r}")


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


def _in_official_names(model: ResidualVQ, values: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
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

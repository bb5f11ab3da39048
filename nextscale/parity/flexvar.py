"""FlexVAR's golden cases: every operation of the official code, on this library's functions."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.heads import CategoricalEmitter
from nextscale.core.optim import parameter_groups
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.transformer import TransformerConfig
from nextscale.parity.building import EVALUATION, KERNELS, check_decay, in_official_names, norms
from nextscale.parity.case import Case
from nextscale.parity.replay import Operations, ReplayError
from nextscale.tasks.generation.flexvar import FlexVAR, FlexVARConfig, OfficialSampling, averaged, waves
from nextscale.tasks.generation.flexvar_lists import RandomLists
from nextscale.tasks.generation.flexvar_training import FlexVARTraining
from nextscale.tasks.tokenizers.flex_vq import FlexQuantizerConfig, FlexVQ, FlexVQConfig

operations = Operations()

POSITION_SIDE = 32
"""Of the official position map, whatever the constructor's arguments."""


@operations
def tokenize(case: Case) -> Mapping[str, Any]:
    """Image -> tokens of every scale -> images of the last scale and of another."""
    tokenizer, schedule = _tokenizer(case), _schedule(case)
    image, alone = case.tensor("image"), case.options["decode_scale"]
    with torch.inference_mode():
        latent = tokenizer.features(image)
        tokens, maps = tokenizer.quantizer.encode(latent, schedule)
        return {
            "latent": latent,
            "tokens": torch.cat(tokens, dim=1),
            "tokens_pool_first": _pooled_first(tokenizer, image, schedule),
            "next_inputs": tokenizer.teacher_inputs(torch.cat(tokens, dim=1), schedule),
            "reconstruction": _picture(tokenizer, maps[-1]),
            "reconstruction_scale": _picture(tokenizer, maps[alone]),
        }


def _pooled_first(tokenizer: FlexVQ, image: Tensor, schedule: ScaleSchedule) -> Tensor:
    """Tokens with the encoder's output averaged before the convolution instead of after it."""
    quantizer, hidden, tokens = tokenizer.quantizer, tokenizer.encoder(image), []
    for index in range(len(schedule)):
        latent = tokenizer.quant_conv(quantizer.shrink(hidden, schedule, index))
        tokens.append(quantizer.nearest(latent.movedim(1, -1).flatten(0, 2)).view(len(image), -1))
    return torch.cat(tokens, dim=1)


def _picture(tokenizer: FlexVQ, codes: Tensor) -> Tensor:
    """The decoder's output as it is; the library clamps it to the range of images."""
    return tokenizer.decoder(tokenizer.post_quant_conv(codes))


@operations
def teacher_forcing(case: Case) -> Mapping[str, Any]:
    """Logits of all scales at once, with dropped labels and with none."""
    model, schedule = _model(case), _schedule(case)
    labels = model.drop_labels(case.tensor("labels"), case.tensor("drop_uniform"))
    inputs = case.tensor("next_inputs")
    with torch.inference_mode():
        return {
            "logits": model(inputs, labels, schedule),
            "logits_null": model(inputs, torch.full_like(labels, model.config.classes), schedule),
        }


@operations
def sample(case: Case) -> Mapping[str, Any]:
    """Class-conditional sampling under the official rules, with given numbers or none in place of chance."""
    options, schedule = case.options, _schedule(case)
    model = _model(case, with_tokenizer=True)
    model.config = replace(model.config, official_sampling=OfficialSampling(max_side=options["max_pn"]))
    emitter = CategoricalEmitter(options["top_k"], options["top_p"])
    steps = list(
        model.steps(
            case.tensor("labels"),
            draws=_draws(case),
            emitter=emitter,
            guidance=options["cfg"],
            guidance_form=options["guidance"],
            schedule=schedule,
            invalid_ids=options["invalid_ids"] or (),
        )
    )
    with torch.inference_mode():
        image = _picture(model.tokenizer, steps[-1].total)
    return {
        "tokens": torch.cat([step.tokens for step in steps], dim=1),
        "logits": torch.cat([step.logits for step in steps], dim=1),
        "top_k_used": np.array(model.emitter(emitter, schedule).top_k),
        "image": image,
    }


class _Likeliest:
    """The best token in place of a draw."""

    def categorical(self, probabilities: Tensor) -> Tensor:
        return probabilities.argmax(-1)


class _Given:
    """The first token whose cumulative probability exceeds a given number."""

    def __init__(self, uniforms: Tensor) -> None:
        self._uniforms, self._used = uniforms, 0

    def categorical(self, probabilities: Tensor) -> Tensor:
        tokens = probabilities.shape[1]
        uniform = self._uniforms[:, self._used : self._used + tokens, None]
        self._used += tokens
        return (probabilities.double().cumsum(-1) > uniform).int().argmax(-1)


def _draws(case: Case) -> Any:
    kind = case.options["draw"]
    if kind == "argmax":
        return _Likeliest()
    if kind == "uniform":
        return _Given(case.tensor("uniforms"))
    raise ReplayError(f"draw is {kind!r}; known are argmax and uniform")


@operations
def train_step(case: Case) -> Mapping[str, Any]:
    """One optimiser step of the official trainer on one batch, in evaluation form: nothing drops out."""
    options, schedule = case.options, _schedule(case)
    model = _model(case, with_tokenizer=True)
    task = FlexVARTraining(model, label_smoothing=options["label_smoothing"])
    names, tail = options["grad_names"], model.config.schedule.final.tokens
    batch = {"image": case.tensor("image"), "label": case.tensor("labels"), "uniform": case.tensor("drop_uniform")}
    groups = parameter_groups(model, options["weight_decay"])
    check_decay(model, groups, names, options["decayed"])
    settings = {"lr": options["learning_rate"], "betas": tuple(options["betas"]), "eps": options["eps"]}
    optimizer = torch.optim.AdamW(groups, **settings)
    logits: list[Tensor] = []
    listening = model.register_forward_hook(lambda _, inputs, output: logits.append(output.detach()))
    loss, _ = task.loss_of(model, batch, schedule)
    listening.remove()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    grad_norms = norms(in_official_names(model, gradients), names)
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), options["clip_norm"])
    optimizer.step()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    metrics, accuracy = _figures(logits[0], model.tokenizer.encode(batch["image"], schedule), tail)
    return {
        "loss": loss,
        "grad_norms": grad_norms,
        "grad_total_norm": total,
        "param_norms_after": norms(in_official_names(model, weights), names),
        "metrics": metrics,
        "accuracy": accuracy,
    }


def _figures(logits: Tensor, tokens: Tensor, tail: int) -> tuple[list[float], list[float]]:
    """Cross-entropy and per cent right of all tokens and of the last ``tail``, wherever scales end."""
    entropy = F.cross_entropy(logits.mT, tokens, reduction="none")
    right = (logits.argmax(-1) == tokens).double() * 100
    spans = (slice(None), slice(-tail, None))
    return [float(entropy[:, span].mean()) for span in spans], [float(right[:, span].mean()) for span in spans]


@operations
def tables(case: Case) -> Mapping[str, Any]:
    """The position map before training, and on the grids of a list."""
    start = waves(case.config["transformer"]["embed_dim"], POSITION_SIDE)
    for part in case.config:
        case.config[part].ignore("*")
    return {"pos_init": start, "positions": averaged(start, _schedule(case))}


@operations
def scale_lists(case: Case) -> Mapping[str, Any]:
    """The random lists of training, one a row."""
    rng, lists = random.Random(case.options["seed"]), RandomLists()
    rows = np.zeros((case.options["count"], 12), np.int64)
    for row in rows:
        sides = [scale.height for scale in lists.draw(rng).scales]
        row[: len(sides)] = sides
    return {"lists": rows}


# --- models from the official constructors' arguments ---------------------------------------------------


def _schedule(case: Case) -> ScaleSchedule:
    return ScaleSchedule.squares(*case.options["patch_nums"])


def _tokenizer_config(arguments: Any) -> FlexVQConfig:
    arguments.ignore("dropout_p", "codebook_show_usage", "entropy_loss_ratio")  # for training the tokenizer alone
    encoder, decoder = tuple(arguments["encoder_ch_mult"]), tuple(arguments["decoder_ch_mult"])
    autoencoder = AutoencoderConfig(
        channels=arguments["ch"],
        multipliers=encoder,
        blocks=arguments["num_res_blocks"],
        latent_channels=arguments["z_channels"],
    )
    quantizer = FlexQuantizerConfig(
        arguments["codebook_size"],
        arguments["codebook_embed_dim"],
        beta=arguments["commit_loss_beta"],
        unit_norm=arguments["codebook_l2_norm"],
    )
    return FlexVQConfig(autoencoder, quantizer, decoder if decoder != encoder else None)


def _tokenizer(case: Case) -> FlexVQ:
    """The case's tokenizer, in evaluation form."""
    config = _tokenizer_config(case.config["tokenizer"])
    loaded = FlexVQ.from_official(
        case.state_dict("tokenizer"), unit_norm=config.quantizer.unit_norm, beta=config.quantizer.beta
    )
    with torch.device("meta"):
        tokenizer = FlexVQ(config)
    tokenizer.load_state_dict(loaded.state_dict(), assign=True)
    return tokenizer.eval()


def _model(case: Case, with_tokenizer: bool = False) -> FlexVAR:
    """The case's transformer, in evaluation form; where the operation needs none, on a tokenizer without weights."""
    if with_tokenizer:
        tokenizer = _tokenizer(case)
    else:
        with torch.device("meta"):
            tokenizer = FlexVQ(_tokenizer_config(case.config["tokenizer"]))
    arguments = case.config["transformer"]
    config = _model_config(arguments, tokenizer)
    arguments.ignore(*KERNELS, *EVALUATION, "token_dropout_p")  # the last is constructed, never applied
    loaded = FlexVAR.from_official(
        case.state_dict("transformer"), tokenizer, schedule=config.schedule, heads=config.transformer.heads
    )
    with torch.device("meta"):
        model = FlexVAR(config, tokenizer)
    model.load_state_dict(loaded.state_dict(), assign=True)
    return model.eval()


def _model_config(arguments: Mapping[str, Any], tokenizer: FlexVQ) -> FlexVARConfig:
    transformer = TransformerConfig(
        width=arguments["embed_dim"],
        depth=arguments["depth"],
        heads=arguments["num_heads"],
        mlp_ratio=arguments["mlp_ratio"],
        conditioning="shared" if arguments["shared_aln"] else "block",
        attention="cosine" if arguments["attn_l2_norm"] else "dot",
        norm_eps=arguments["norm_eps"],
    )
    quantizer = tokenizer.config.quantizer
    return FlexVARConfig(
        transformer,
        arguments["num_classes"],
        quantizer.vocabulary,
        quantizer.channels,
        ScaleSchedule.squares(*arguments["patch_nums"]),
        arguments["cond_drop_rate"],
        position_side=POSITION_SIDE,
    )

"""FlowAR's golden cases: every operation of the official code, on this library's functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.optim import parameter_groups
from nextscale.core.sampling import Emission, ScaleContext
from nextscale.core.schedule import ScaleSchedule
from nextscale.parity.building import check_decay, in_official_names, norms
from nextscale.parity.case import Case
from nextscale.parity.replay import Operations, ReplayError
from nextscale.tasks.generation.flowar import FlowAR
from nextscale.tasks.generation.flowar_config import FlowARConfig
from nextscale.tasks.generation.flowar_flow import FlowConfig, FlowEmitter
from nextscale.tasks.generation.flowar_training import FlowARTraining
from nextscale.tasks.generation.flowar_transformer import FlowARBlocksConfig, gated_ratio
from nextscale.tasks.tokenizers.kl_autoencoder import KLAutoencoder, KLConfig

operations = Operations()

CLASSES = 1000
"""Rows of the official class table but for "no class", whatever the constructor's arguments."""


@operations
def autoencode(case: Case) -> Mapping[str, Any]:
    """Image -> distribution of latents -> a latent; another latent -> image."""
    tokenizer = _tokenizer(case)
    with torch.inference_mode():
        posterior = tokenizer.posterior(case.tensor("image"))
        latents = case.tensor("latents") / tokenizer.config.latent_scale
        return {
            "mean": posterior.mean,
            "logvar": posterior.log_variance,
            "latents": posterior.sample(case.tensor("noise")) * tokenizer.config.latent_scale,
            # The decoder's output as it is; the library clamps it to the range of images.
            "reconstruction": tokenizer.decoder(tokenizer.post_quant_conv(latents)),
        }


@operations
def teacher_forcing(case: Case) -> Mapping[str, Any]:
    """Conditioning, velocities and loss of all scales at once."""
    model = _model(case)
    with torch.inference_mode():
        return _forced(case, model)


def _forced(case: Case, model: FlowAR) -> dict[str, Any]:
    """What the training forward computes, and each scale's part of the loss."""
    seen: dict[str, Tensor] = {}

    def listen(*args: Tensor) -> Tensor:
        inputs, labels, noisy, times = args
        seen["z"] = model.conditioning(inputs, labels)
        seen["velocity"] = model.velocities(seen["z"], noisy, times)
        return seen["velocity"]

    labels = model.drop_labels(case.tensor("labels"), case.tensor("drop_uniform"))
    given = (case.tensor("latents"), labels, case.tensor("times"), case.tensor("noise"))
    loss, parts = FlowARTraining(model).loss_of(listen, *given)  # type: ignore[arg-type]
    return {**seen, "loss": loss, "loss_per_scale": parts}


@operations
def train_step(case: Case) -> Mapping[str, Any]:
    """One optimiser step of the official trainer on one batch, without dropout."""
    options, model = case.options, _model(case).train()
    names = options["grad_names"]
    groups = parameter_groups(model, options["weight_decay"])
    check_decay(model, groups, names, options["decayed"])
    settings = {"lr": options["learning_rate"], "betas": tuple(options["betas"]), "eps": options["eps"]}
    optimizer = torch.optim.AdamW(groups, **settings)
    outputs = _forced(case, model)
    outputs["loss"].backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    grad_norms = norms(in_official_names(model, gradients), names)
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), options["clip_norm"])
    optimizer.step()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {
        "loss": outputs["loss"],
        "loss_per_scale": outputs["loss_per_scale"],
        "grad_norms": grad_norms,
        "grad_total_norm": total,
        "param_norms_after": norms(in_official_names(model, weights), names),
    }


@operations
def sample(case: Case) -> Mapping[str, Any]:
    """Class-conditional sampling from given noise."""
    options, model = case.options, _model(case)
    schedule, labels = model.config.schedule, case.tensor("labels")
    emitter = _Listening(model.flow, options["num_steps"], options["guidance"])
    draws: Any = _Given(case.tensor("noise"))
    strength = options["cfg"] - 1
    steps = list(model.steps(labels, draws=draws, emitter=emitter, guidance=strength))
    with torch.inference_mode():
        fed = model.flow.fed(emitter.times[:-1])
    return {
        "z": torch.cat(emitter.seen, dim=1),
        "scale_latents": torch.cat([step.codes for step in steps], dim=1),
        "latents": steps[-1].total,
        "cfg_per_scale": [1 + strength * schedule.ratio(index) for index in range(len(schedule))],
        "times_fed": fed,
    }


class _Listening(FlowEmitter):
    """Keeps the conditioning of the conditional half."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[Tensor] = []

    def emit(self, context: ScaleContext) -> Emission:
        self.seen.append(context.hidden[: context.batch])
        return super().emit(context)


class _Given:
    """A case's numbers in place of normal ones, (rows of both halves, tokens of all scales, channels)."""

    def __init__(self, noise: Tensor) -> None:
        self._noise, self._used = noise, 0

    def normal(self, shape: Sequence[int], device: torch.device, spare: int = 0) -> Tensor:
        rows, tokens, _ = shape
        part = self._noise[:, self._used : self._used + tokens]
        self._used += tokens
        return part[:rows]


# --- models from the official constructors' arguments ---------------------------------------------------


def _tokenizer(case: Case) -> KLAutoencoder:
    """The case's autoencoder, in evaluation form."""
    arguments = case.config["tokenizer"]
    arguments.ignore("ckpt_path", "dropout")  # weights come from the case; nothing drops out in evaluation form
    if not (arguments["resamp_with_conv"] and arguments["double_z"]):
        raise ReplayError("resamp_with_conv and double_z are on in every published autoencoder")
    if arguments["out_ch"] != arguments["in_channels"]:
        raise ReplayError(
            f"{arguments['in_channels']} channels come in, {arguments['out_ch']} go out: expected as many"
        )
    multipliers, resolution = tuple(arguments["ch_mult"]), arguments["resolution"]
    levels = range(len(multipliers))
    encoder, decoder = (
        tuple(level for level in levels if resolution // 2**level in arguments[f"{part}_attn_resolutions"])
        for part in ("encoder", "decoder")
    )
    autoencoder = AutoencoderConfig(
        channels=arguments["ch"],
        multipliers=multipliers,
        blocks=arguments["num_res_blocks"],
        latent_channels=arguments["embed_dim"],
        image_channels=arguments["in_channels"],
        level_attention=None if encoder == (levels[-1],) else encoder,
    )
    scale = case.options["latent_scale"]
    config = KLConfig(autoencoder, decoder, arguments["use_variational"], scale)
    loaded = KLAutoencoder.from_official({"model": case.state_dict("tokenizer")}, latent_scale=scale)
    if loaded.config != config:
        raise ReplayError(f"the weights are those of {loaded.config}, the arguments say {config}")
    return loaded


FORM = {"patch_size": 1, "buffer_size": 0}
"""Arguments with which no other value runs in the official code."""


def _model(case: Case) -> FlowAR:
    """The case's model, in evaluation form, on an autoencoder without weights."""
    arguments = case.config["transformer"]
    for name, value in FORM.items():
        if arguments[name] != value:
            raise ReplayError(f"{name} is {arguments[name]}; the official code runs with {value} only")
    if dropping := [name for name in ("attn_dropout", "proj_dropout") if arguments[name]]:
        raise ReplayError(f"{', '.join(dropping)} above 0: what is drawn to drop is random, so no case can be met")
    arguments.ignore("class_num", "use_checkpoint")  # the class table has 1001 rows; memory for time
    schedule, channels = ScaleSchedule.squares(*arguments["scale"]), arguments["vae_embed_dim"]
    if arguments["img_size"] // arguments["vae_stride"] != schedule.final.height:
        raise ReplayError(f"the scales '{schedule}' do not end at {arguments['img_size'] // arguments['vae_stride']}")
    encoder, decoder = (
        FlowARBlocksConfig(
            width,
            arguments[f"{part}_depth"],
            arguments[f"{part}_num_heads"],
            gated_ratio(width, arguments["mlp_ratio"]),
        )
        for part in ("encoder", "decoder")
        for width in [arguments[f"{part}_embed_dim"]]
    )
    flow = FlowConfig(arguments["diffloss_w"], arguments["diffloss_d"], cross=arguments["cross"], truncate_time=True)
    config = FlowARConfig(encoder, decoder, flow, CLASSES, channels, schedule, arguments["label_drop_prob"])
    with torch.device("meta"):
        tokenizer = KLAutoencoder(KLConfig(AutoencoderConfig(32, (1,), 1, channels), schedule=schedule))
        model = FlowAR(config, tokenizer)
    state = case.state_dict("transformer")
    loaded = FlowAR.from_official(state, tokenizer, schedule=schedule, heads=(encoder.heads, decoder.heads))
    model.load_state_dict(loaded.state_dict(), assign=True)
    return model.eval()

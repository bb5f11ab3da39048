"""VarFormer's golden cases: tokens of degraded images, roll-outs, the restoration network, training."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextscale.core.sampling import Emission, ScaleContext
from nextscale.parity import varformer_modules
from nextscale.parity.building import norms
from nextscale.parity.case import Case
from nextscale.parity.replay import Operations, ReplayError
from nextscale.parity.varformer_building import build, configs
from nextscale.parity.varformer_metrics import metrics
from nextscale.tasks.restoration.varformer import VarFormer
from nextscale.tasks.restoration.varformer_layout import to_official_names
from nextscale.tasks.restoration.varformer_network import decode_levels
from nextscale.tasks.restoration.varformer_prior import Greedy
from nextscale.tasks.restoration.varformer_training import VarFormerLossConfig, VarFormerTraining

operations = Operations()
operations["modules"] = varformer_modules.replayed
operations["metrics"] = metrics


@operations
def tokenize(case: Case) -> Mapping[str, Any]:
    """Image -> tokens -> image, with the feature maps of all levels."""
    model, image = build(case), case.tensor("image")
    tokenizer, schedule = model.tokenizer, model.prior.config.schedule
    quantizer = tokenizer.quantizer
    with torch.inference_mode():
        read = model.read(image, enhance=case.options["enhance"])
        _, totals = quantizer.encode(read.enhanced, schedule)
        first = quantizer.lookup(read.tokens[:, : schedule.lengths[0]]).mT.unflatten(-1, schedule[0].grid)
        rebuilt = quantizer.decode(read.tokens, schedule)[-1]
        latent = tokenizer.post_quant_conv(rebuilt)
        middle, levels = decode_levels(tokenizer.decoder, latent)
        return {
            "latent": tokenizer.quant_conv(read.maps.latent),
            "latent_enhanced": read.enhanced,
            "tokens": read.tokens,
            "f_hats": torch.stack(totals),
            "first_embedding": torch.nn.functional.interpolate(first, size=schedule.final.grid, mode="bicubic"),
            "f_hat": rebuilt,
            "teacher_input": quantizer.teacher_inputs(read.tokens, schedule),
            "reconstruction": tokenizer.decoder(latent),
            **{f"encoder.{i}": level for i, level in enumerate(read.maps.levels)},
            "encoder.middle": read.maps.middle,
            "decoder.middle": middle,
            **{f"decoder.{i}": level for i, level in levels.items()},
        }


@operations
def restore(case: Case) -> Mapping[str, Any]:
    """The roll-out on a degraded image and what the restoration network makes of it, with all that lies between."""
    model = build(case)
    with torch.inference_mode():
        return _rolled_out(model, case.tensor("image"))


operations["reconstruct"] = restore


def _rolled_out(model: VarFormer, image: Tensor) -> dict[str, Any]:
    watch = _Watch(model)
    with watch.attached():
        output = model(image, watch)
    alone = model(image[:1])
    assert output.degraded is not None and output.roll_out is not None and alone.roll_out is not None
    steered = len(model.steering)
    attention = [torch.cat(watch.seen[f"steering.{i}"], dim=1) for i in range(steered)]
    outputs = {
        "lq_tokens": output.degraded.tokens,
        "lq_latent": output.degraded.latent,
        "tokens": output.roll_out.tokens,
        "logits": output.roll_out.logits,
        "logits_both": torch.cat(watch.logits, dim=1),
        "cross_attention": torch.stack(attention) if attention else torch.zeros(0),
        "prior": output.roll_out.prior,
        "pixels": output.pixels,
        "restored": (output.pixels + 1) / 2,
        "alone.tokens": alone.roll_out.tokens,
        "alone.logits": alone.roll_out.logits,
        "alone.pixels": alone.pixels,
    }
    if model.encoder is None:
        return outputs
    maps = watch.seen["encoder"][0]
    outputs["main_latent"] = model.tokenizer.quant_conv(maps.latent)
    outputs["main.middle"] = maps.middle
    logits = watch.seen["encoder.fusions.1.mixer.conv1x1"][0][:, :1]
    outputs["main.weight_map"] = torch.nn.functional.interpolate(logits, scale_factor=2, mode="nearest")
    outputs |= {f"main.{i}": level for i, level in enumerate(maps.levels)}
    for network in ("encoder", "decoder"):
        for part, ours in (("prior", "selector"), ("mix", "mixer"), ("fuse", "anchors")):
            for i in range(1, len(maps.levels)):
                outputs[f"{network}_{part}.{i}"] = watch.seen[f"{network}.fusions.{i}.{ours}"][0]
    outputs["decoder_middle"] = watch.seen["decoder.middle"][0]
    outputs["decoder_head"] = watch.seen["decoder.conv_out"][0]
    for place in ("middle", *range(1, len(maps.levels))):
        warped = watch.seen.get(f"decoder.adjustments.{place}.warp.conv")
        outputs[f"warp.{place}"] = torch.zeros(0) if warped is None else warped[0]
    return outputs


class _Watch(Greedy):
    """Takes the likeliest symbols, and keeps what modules give and what the head says of every row."""

    def __init__(self, model: VarFormer) -> None:
        self.model, self.logits = model, list[Tensor]()
        self.seen: dict[str, list[Any]] = {}

    def emit(self, context: ScaleContext) -> Emission:
        self.logits.append(context.session.logits(context.hidden, slice(None)))
        return super().emit(context)

    @contextmanager
    def attached(self) -> Iterator[None]:
        def keep(name: str) -> Callable[..., None]:
            return lambda module, inputs, output: self.seen.setdefault(name, []).append(output)

        wanted = ("steering.", "encoder", "decoder.")
        modules = [(n, m) for n, m in self.model.named_modules() if n.startswith(wanted)]
        handles = [module.register_forward_hook(keep(name)) for name, module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@operations
def train_step(case: Case) -> Mapping[str, Any]:
    """Losses and gradients of one step, in training form."""
    options, model = case.options, build(case)
    _freeze(model, case.config["model"]["fix_modules"])
    model.train()
    weights, names = options["loss_weights"], options["loss_names"]
    config = VarFormerLossConfig(perceptual=0.0, **{name: weights[name] for name in names})
    task = VarFormerTraining(model, config)
    clean = case.tensor("clean")
    output = model(case.tensor("degraded"))
    assert output.degraded is not None and output.roll_out is not None
    target = model.read(clean, enhance=False)
    terms = task.terms(output, clean)
    loss = torch.stack(list(terms.values())).double().sum()
    loss.backward()
    return {
        "target_tokens": target.tokens,
        "target_latent": target.latent,
        "lq_latent": output.degraded.latent,
        "logits": output.roll_out.logits,
        "pixels": output.pixels,
        "loss_terms": [terms[name].item() if name in terms else 0.0 for name in names],
        "loss": np.float64(loss.item()),
        "grad_norms": norms(_gradients(model), options["grad_names"]),
    }


def _official(model: VarFormer, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return to_official_names(model.tokenizer.config, values)


def _freeze(model: VarFormer, modules: list[str]) -> None:
    """Let everything be trained but what lies under these official names.

    Raises:
        ReplayError: this library freezes other parameters.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        official = next(iter(_official(model, {name: parameter})))
        frozen = official.startswith(tuple(f"{module}." for module in modules))
        if frozen == parameter.requires_grad:
            raise ReplayError(f"{official} is {'frozen' if frozen else 'trained'} there, not here")


def _gradients(model: VarFormer) -> dict[str, Tensor]:
    """By official name; zeros where there are none."""
    parameters = dict(model.named_parameters()).items()
    return _official(model, {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters})


@operations
def layout(case: Case) -> Mapping[str, Any]:
    """Keys, types and shapes of whole networks, without weights."""
    outputs: dict[str, list[int]] = {name: [] for name in ("parameters", "entries", "elements", "crc32")}
    for network in case.options["networks"]:
        case.ignore_weights(network)  # the expected layout, of which the outputs are the digest
        model = VarFormer.empty(*configs(case.config[network], case.config["tokenizer"]))
        state = model.to_official()
        lines = sorted(
            f"{k} {str(v.dtype).removeprefix('torch.')} {'x'.join(map(str, v.shape))}" for k, v in state.items()
        )
        outputs["parameters"].append(sum(p.numel() for p in model.parameters()))
        outputs["entries"].append(len(state))
        outputs["elements"].append(sum(value.numel() for value in state.values()))
        outputs["crc32"].append(zlib.crc32("\n".join(lines).encode()))
    return outputs

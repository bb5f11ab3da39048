"""SAR3D's golden cases: every operation of the official code, on this library's functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextscale.core.heads import CategoricalEmitter
from nextscale.core.random import BatchDraws, Draws
from nextscale.parity.case import Case
from nextscale.parity.replay import Operations
from nextscale.parity.sar3d_building import build_model, build_tokenizer, features_of, gradient_norms
from nextscale.tasks.shapes.sar3d import SYSTEM
from nextscale.tasks.shapes.sar3d_fields import MeshField
from nextscale.tasks.shapes.sar3d_rendering import Noise, box_limits, camera_rays, pluecker
from nextscale.tasks.shapes.sar3d_tokenizer_training import CodeUsage
from nextscale.tasks.shapes.sar3d_training import SAR3DTraining

operations = Operations()


@operations
def tokenize(case: Case) -> Mapping[str, Any]:
    """Views -> tokens -> planes, on the official code's three ways to insert codes."""
    tokenizer = build_tokenizer(case)
    schedule, quantizer = tokenizer.config.schedule, tokenizer.quantizer
    with torch.inference_mode():
        latent = tokenizer.latent(case.tensor("images"))
        f = tokenizer.to_planes(latent)
        tokens, totals = quantizer.encode(f, schedule)
        trained = quantizer(f, schedule)
        joined = torch.cat(tokens, dim=1)
        return {
            "latent": latent,
            "f": f,
            "tokens": joined,
            "f_hat": totals[-1],
            "var_input": quantizer.teacher_inputs(joined, schedule),
            "f_hat_train": trained.features,
            "vq_loss": trained.loss,
            "planes": tokenizer.decode_features(trained.features),
        }


@operations
def decode(case: Case) -> Mapping[str, Any]:
    """Tokens -> planes."""
    tokenizer = build_tokenizer(case)
    with torch.inference_mode():
        total = tokenizer.quantizer.decode(case.tensor("tokens"), tokenizer.config.schedule)[-1]
        patches = tokenizer.patches(total)
        return {
            "f_hat": total,
            "patches": patches,
            "hidden": tokenizer.hidden(patches),
            "planes": tokenizer.decode_features(total),
        }


@operations
def tokenizer_train_step(case: Case) -> Mapping[str, Any]:
    """One training pass of encoder and quantiser, with a stand-in for the losses of pictures."""
    tokenizer = build_tokenizer(case).train()
    quantized = tokenizer.quantizer(tokenizer.features(case.tensor("images")), tokenizer.config.schedule)
    loss = quantized.loss + (quantized.features * case.tensor("f_hat_weight")).mean()
    loss.backward()
    norms = gradient_norms(tokenizer, case.options["grad_names"])
    usage = CodeUsage(tokenizer.config.schedule, tokenizer.config.quantizer.vocabulary)
    usage.record(quantized.tokens)
    return {
        "f_hat": quantized.features,
        "vq_loss": quantized.loss,
        "loss": loss,
        "grad_norms": norms,
        "grad_total": np.sqrt((norms**2).sum()),
        "hits": usage.hits,
        "usages": usage.shares(),
        "counter": usage.counter,
    }


@operations
def rays(case: Case) -> Mapping[str, Any]:
    """Rays of cameras, and where they pass the box."""
    cameras, size = case.tensor("camera"), case.options["size"]
    origins, directions = camera_rays(cameras, size)
    near, far = box_limits(origins, directions, case.options["box"])
    return {
        "pluecker": pluecker(cameras, size),
        "origins": origins,
        "directions": directions,
        "near": near,
        "far": far,
    }


@operations
def render(case: Case) -> Mapping[str, Any]:
    """Volume rendering of one object's planes, and the field on a grid."""
    tokenizer = build_tokenizer(case)
    settings = case.config["triplane"]["rendering_kwargs"]
    size, planes, cameras = settings["image_resolution"], case.tensor("planes"), case.tensor("camera")
    views, low, high = len(cameras), settings["sampler_bbox_min"], settings["sampler_bbox_max"]
    noise = Noise(
        case.tensor("u_coarse")[..., 0].flatten(0, 1)[None],
        case.tensor("u_fine")[None] if "u_fine" in case.inputs else torch.zeros(1, 1, 0),
    )
    ticks = torch.linspace(low, high, case.options["grid_size"])
    points = torch.stack(torch.meshgrid(ticks, ticks, ticks, indexing="ij"), dim=-1)
    with torch.inference_mode():
        origins, directions = (part.flatten(0, 1)[None] for part in camera_rays(cameras, size))
        # Chunks as a user's pictures are made in, which must not change what is computed over all cameras.
        seen = tokenizer.see(planes, origins, directions, noise, chunk=max(size * size - 3, 1))
        density, colour = tokenizer.density()(planes, points.view(1, -1, 3))

    def picture(values: Tensor) -> Tensor:
        return values.view(views, size, size, -1).permute(0, 3, 1, 2)

    return {
        "image": picture(seen.colour),
        "depth": picture(seen.depth),
        "mask": picture(seen.mask),
        "sigma": density.view(1, *points.shape[:3], 1),
        "rgb": colour.view(1, *points.shape[:3], 3),
    }


@operations
def mesh(case: Case) -> Mapping[str, Any]:
    """The FlexiCubes mesh of one object's planes."""
    tokenizer, planes = build_tokenizer(case), case.tensor("planes")
    field = tokenizer.field
    assert isinstance(field, MeshField)
    with torch.inference_mode():
        geometry = field.geometry(planes)
        weights = field.weights(geometry.features)
        found = field.mesh(geometry, weights)
        return {
            "sdf": geometry.values[None, :, None],
            "deformation": geometry.deformation[None],
            "weight": weights[None],
            "vertices": found.vertices,
            "faces": _sorted_faces(found.faces),
            "colours": field.colours(planes, found.vertices).clamp(0, 1),
            "surface_reg": found.deviation.mean(),
            "weight_reg": weights.square().mean(),
        }


def _sorted_faces(faces: Tensor) -> np.ndarray:
    """Every face from its least vertex on, and the rows in order."""
    rolled = np.stack([np.roll(face, -int(face.argmin())) for face in faces.numpy()])
    return rolled[np.lexsort(rolled.T[::-1])]


@operations
def teacher_forcing(case: Case) -> Mapping[str, Any]:
    """Tokens -> logits of all scales at once."""
    tokenizer = build_tokenizer(case)
    model = build_model(case, tokenizer)
    with torch.inference_mode():
        inputs = tokenizer.quantizer.teacher_inputs(case.tensor("tokens"), tokenizer.config.schedule)
        features = model.drop(features_of(case), case.tensor("drop"))
        return {"var_input": inputs, "logits": model(inputs, features)}


@operations
def train_step(case: Case) -> Mapping[str, Any]:
    """One loss and its gradient, in training form."""
    model = build_model(case).train()
    task, logits = SAR3DTraining(model), list[Tensor]()
    model.register_forward_hook(lambda module, inputs, output: logits.append(output.detach()))
    batch = {
        "tokens": case.tensor("tokens"),
        "inputs": case.tensor("var_input"),
        "features": features_of(case),
        "drop": case.tensor("drop"),
    }
    loss, _ = task.loss(SYSTEM, model, batch, 0)
    loss.backward()
    norms = gradient_norms(model, case.options["grad_names"])
    return {"logits": logits[0], "loss": loss, "grad_norms": norms, "grad_total": np.sqrt((norms**2).sum())}


@operations
def sample(case: Case) -> Mapping[str, Any]:
    """Sampling by the case's own draws."""
    tokenizer, options = build_tokenizer(case), case.options
    model = build_model(case, tokenizer)
    emitter = CategoricalEmitter(options["top_k"], options["top_p"], smooth=options["more_smooth"])
    steps = list(
        model.steps(
            features_of(case), draws=_draws(case, options["g_seed"]), emitter=emitter, guidance=float(options["cfg"])
        )
    )
    with torch.inference_mode():
        planes = tokenizer.decode_features(steps[-1].total)
    return {
        "tokens": torch.cat([step.tokens for step in steps], dim=1),
        "logits": torch.cat([step.logits for step in steps], dim=1),
        "planes": planes,
    }


def _draws(case: Case, seed: int) -> Draws:
    """Those that the case stores; where it stores none, nothing is left to chance."""
    if "exp_tokens" not in case.inputs:
        return BatchDraws(torch.Generator().manual_seed(seed))
    codes = case.tensor("exp_codes") if "exp_codes" in case.inputs else None
    return _StoredDraws(case.tensor("exp_tokens"), codes)


class _StoredDraws(BatchDraws):
    """Exponential variates by token position, consumed scale by scale."""

    def __init__(self, tokens: Tensor, codes: Tensor | None) -> None:
        super().__init__(None)
        self._tokens, self._codes = tokens, codes
        self._seen = {"tokens": 0, "codes": 0}

    def categorical(self, probabilities: Tensor) -> Tensor:
        count = probabilities.shape[1]
        return (probabilities / self._take("tokens", self._tokens, count)).argmax(-1)

    def exponential(self, shape: Sequence[int], device: torch.device) -> Tensor:
        assert self._codes is not None
        return self._take("codes", self._codes, shape[1]).to(device)

    def _take(self, kind: str, values: Tensor, count: int) -> Tensor:
        start = self._seen[kind]
        self._seen[kind] = start + count
        return values[:, start : start + count]

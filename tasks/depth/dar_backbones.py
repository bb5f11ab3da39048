"""Trained image backbones for DAR's encoders, from the files that they are published in.

DINOv2: its own files, Depth Anything's, or a folder of transformers. Stable Diffusion 1: its own files, or a folder of
diffusers. The classifier: a folder of transformers. Nothing of those packages is needed to read them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from nextscale.core.checkpoint import (
    CheckpointError,
    KeyMap,
    assign,
    read_sharded,
    read_tensors,
    shards_of,
)
from nextscale.tasks.depth.dar_diffusion import DiffusionEncoder
from nextscale.tasks.depth.dar_encoders import PatchEncoder
from nextscale.tasks.depth.dar_layout import (
    ATTENTION,
    CLASSIFIER_RULES,
    DINOV2_RULES,
    FIRST_STAGE_RULES,
    MAP_ATTENTION_RULES,
    UNET_RULES,
    Rules,
    join,
    under,
)
from nextscale.tasks.depth.dar_unet import UNetConfig

FILES = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
"""Of folders, in the order in which they are looked for."""

JOINED = (
    (r"blocks\.\d+\.attention", ".qkv", ATTENTION),
    (r"encoder\.middle\.attention", ".qkv", ATTENTION),
)

State = Mapping[str, Tensor]

_BLOCK_OF_5: Rules = [
    *((f"attention.{part}", f"attention.{part[0]}_proj") for part in ATTENTION),
    ("attention.projection", "attention.o_proj"),
    ("feed_forward.expand", "mlp.fc1"),
    ("feed_forward.contract", "mlp.fc2"),
]
"""What transformers has called the parts of a block since its version 5."""

CLASSIFIER = KeyMap(
    [
        *CLASSIFIER_RULES,
        *under([("norm1", "layernorm_before"), ("norm2", "layernorm_after"), *_BLOCK_OF_5], "blocks.*", "vit.layers.*"),
    ]
)

DINOV2 = KeyMap(
    [
        *DINOV2_RULES,
        ("patches", "embeddings.patch_embeddings.projection"),
        ("class_token", "embeddings.cls_token"),
        ("mask_token", "embeddings.mask_token"),
        ("position_embedding", "embeddings.position_embeddings"),
        *under(
            [
                ("norm1", "norm1"),
                *((f"attention.{part}", f"attention.attention.{part}") for part in ATTENTION),
                ("attention.projection", "attention.output.dense"),
                ("scale1", "layer_scale1.lambda1"),
                ("norm2", "norm2"),
                *_BLOCK_OF_5,
                ("scale2", "layer_scale2.lambda1"),
            ],
            "blocks.*",
            "encoder.layer.*",
        ),
        ("norm", "layernorm"),
    ]
)

_RESNET: Rules = [
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("time", "time_emb_proj"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("shortcut", "conv_shortcut"),
]


def read_weights(source: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, or of a folder of transformers or diffusers.

    Raises:
        FileNotFoundError: there is no such file, or the folder holds none of those files.
        CheckpointError: it is damaged or unsafe.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if shards_of(path):
            return read_sharded(path)
        found = next((path / name for name in FILES if (path / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{path} holds none of {', '.join(FILES)}")
        path = found
    content = read_tensors(path)
    inner = content.get("state_dict", content)
    return {name: value for name, value in inner.items() if isinstance(value, Tensor)}


def load_dinov2(encoder: PatchEncoder, source: str | Path) -> None:
    """Set an encoder's vision transformer.

    Raises:
        CheckpointError: the weights are of another size.
    """
    state = read_weights(source)
    for prefix in ("pretrained.", "dinov2.", "backbone."):  # Depth Anything's, transformers', DAR's own
        state = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)} or state
    own = join({DINOV2.from_official(name): value for name, value in state.items()}, JOINED)
    if encoder.vit.mask_token is None:
        own.pop("mask_token", None)
    _assign(encoder.vit, {n: v for n, v in own.items() if not n.startswith("depth_head.")}, f"DINOv2 of {source}")


def load_classifier(encoder: DiffusionEncoder, source: str | Path) -> None:
    """Set the classifier that tells the scene.

    Raises:
        CheckpointError: the weights are of another size.
    """
    state = {CLASSIFIER.from_official(name): value for name, value in read_weights(source).items()}
    pooled = {name: value for name, value in join(state, JOINED).items() if not name.startswith("vit.pooler.")}
    _assign(encoder.classifier, pooled, f"the classifier of {source}")


def load_diffusion(encoder: DiffusionEncoder, source: str | Path) -> None:
    """Set the UNet and the first stage: from Stable Diffusion's own file, or a folder of diffusers with both.

    Raises:
        FileNotFoundError: the folder lacks a part.
        CheckpointError: the weights are of another size.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        unet_state, stage_state = read_weights(path / "unet"), read_weights(path / "vae")
        unet_keys = KeyMap(diffusers_unet_rules(encoder.config.unet))
        stage_keys = KeyMap(diffusers_stage_rules(len(encoder.config.first_stage.multipliers)))
    else:
        state = read_weights(path)
        unet_state, stage_state = (_below(state, f"{part}.") for part in ("model.diffusion_model", "first_stage_model"))
        unet_keys, stage_keys = KeyMap(UNET_RULES), KeyMap(FIRST_STAGE_RULES)
    unread = ("out.", "conv_norm_out.", "conv_out.")
    unet = {unet_keys.from_official(n): v for n, v in unet_state.items() if not n.startswith(unread)}
    kept = {n: v for n, v in stage_state.items() if n.startswith(("encoder.", "quant_conv."))}
    if encoder.first_stage.unread is not None:
        kept |= {n: v for n, v in stage_state.items() if n.startswith("post_quant_conv.")}
    stage = {stage_keys.from_official(name): value for name, value in kept.items()}
    # diffusers has linear layers where the published file has convolutions of one pixel.
    stage = {n: v[..., None, None] if ".attention." in n and v.ndim == 2 else v for n, v in stage.items()}
    _assign(encoder.unet, unet, f"the UNet of {source}")
    _assign(encoder.first_stage, join(stage, JOINED), f"the autoencoder of {source}")


def diffusers_unet_rules(config: UNetConfig) -> Rules:
    """Names of a UNet's parts in files of diffusers, which number levels and the parts of each kind in them."""
    rules: Rules = [("down.0.0.conv", "conv_in"), ("time.0", "time_embedding.linear_1")]
    rules += [("time.2", "time_embedding.linear_2")]
    for index, name in ((0, "resnets.0"), (1, "attentions.0"), (2, "resnets.1")):
        rules += under(MAP_ATTENTION_RULES if index == 1 else _RESNET, f"middle.{index}", f"mid_block.{name}")
    levels, blocks = len(config.multipliers), config.blocks
    for down, level, index in _places(levels, blocks + 1):
        ours, last = f"down.{1 + down}", index == blocks
        if last and level < levels - 1:
            rules.append((f"{ours}.0.conv", f"down_blocks.{level}.downsamplers.0.conv"))
        elif not last:
            rules += under(_RESNET, f"{ours}.0", f"down_blocks.{level}.resnets.{index}")
            rules += under(MAP_ATTENTION_RULES, f"{ours}.1", f"down_blocks.{level}.attentions.{index}")
    for up, level, index in _places(levels, blocks + 1):
        ours, attends = f"up.{up}", 2 ** (levels - 1 - level) in config.attention_at
        rules += under(_RESNET, f"{ours}.0", f"up_blocks.{level}.resnets.{index}")
        if attends:
            rules += under(MAP_ATTENTION_RULES, f"{ours}.1", f"up_blocks.{level}.attentions.{index}")
        if index == blocks and level < levels - 1:
            rules.append((f"{ours}.{2 if attends else 1}.conv", f"up_blocks.{level}.upsamplers.0.conv"))
    return rules


def _places(levels: int, each: int) -> Iterator[tuple[int, int, int]]:
    """(number, level, number in the level)"""
    return ((level * each + index, level, index) for level in range(levels) for index in range(each))


def diffusers_stage_rules(levels: int) -> Rules:
    """Names of the first stage's parts in files of diffusers."""
    rules: Rules = [("moments", "quant_conv"), ("unread", "post_quant_conv")]
    own = {"query": ("to_q", "query"), "key": ("to_k", "key"), "value": ("to_v", "value")}
    own["projection"] = ("to_out.0", "proj_attn")
    for part, names in own.items():
        rules += [(f"encoder.middle.attention.{part}", f"encoder.mid_block.attentions.0.{name}") for name in names]
    rules += [
        ("encoder.middle.attention.norm", "encoder.mid_block.attentions.0.group_norm"),
        ("encoder.middle.block1", "encoder.mid_block.resnets.0"),
        ("encoder.middle.block2", "encoder.mid_block.resnets.1"),
        ("encoder.norm_out", "encoder.conv_norm_out"),
        ("encoder.levels.*.blocks.*.shortcut", "encoder.down_blocks.*.resnets.*.conv_shortcut"),
        ("encoder.levels.*.blocks.*", "encoder.down_blocks.*.resnets.*"),
    ]
    return rules + [
        (f"encoder.levels.{level}.resample", f"encoder.down_blocks.{level}.downsamplers.0") for level in range(levels)
    ]


def _below(state: State, prefix: str) -> dict[str, Tensor]:
    found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not found:
        first = ", ".join(list(state)[:4])
        raise CheckpointError(f"no entry begins with {prefix!r}, as Stable Diffusion's do; the first are {first}")
    return found


def _assign(module: nn.Module, state: State, what: str) -> None:
    """Load into a module, which keeps its precision and device."""
    place = next(module.parameters())
    assign(module, {name: value.to(place.device, place.dtype) for name, value in state.items()}, what)

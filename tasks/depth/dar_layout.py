"""DAR's published state dict: its names, and the tensors that are several there and one here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from nextscale.core.checkpoint import KeyMap
from nextscale.tasks.tokenizers.residual_vq import autoencoder_rules

Rules = list[tuple[str, str]]

GATES = ("update", "reset", "candidate")
ATTENTION = ("query", "key", "value")
JOINED = (
    (r"decoder\.gru\.(?:horizontal|vertical)", "", GATES),
    (r"encoder\.(?:classifier\.blocks\.\d+|first_stage\.encoder\.middle)\.attention", ".qkv", ATTENTION),
)
"""Tensors that hold several of the published ones, one after another: what their names begin with, how they go on, and
how the names of the several do in place of that."""


def under(rules: Iterable[tuple[str, str]], ours: str, theirs: str) -> Rules:
    """The rules of a part, for where it stands in either whole."""
    return [(f"{ours}.{own}", f"{theirs}.{official}") for own, official in rules]


DECODER_RULES: Rules = [
    ("query_tokens", "query_tokens"),
    ("bin_features.0", "encoder.convd1"),
    ("bin_features.2", "encoder.convd2"),
    ("bin_features.4", "encoder.convd3"),
    ("head.0", "p_head.conv1"),
    ("head.2", "p_head.conv2"),
    ("transformer.enter", "transdecoder.mid_proj_in"),
    ("transformer.leave", "transdecoder.mid_proj_out"),
    *under(
        [
            ("join", "skip_linear"),
            ("norm_attention", "norm1"),
            ("attention.qkv", "self_attn.qkv"),
            ("attention.projection", "self_attn.proj"),
            ("norm_query", "query_norm"),
            ("norm_memory", "context_norm"),
            ("image_attention.query", "cross_attn.q"),
            ("image_attention.key_value", "cross_attn.kv"),
            ("image_attention.projection", "cross_attn.proj"),
            ("norm_feed_forward", "norm2"),
            ("feed_forward.expand", "mlp.fc1"),
            ("feed_forward.contract", "mlp.fc2"),
        ],
        "transformer.blocks.*",
        "transdecoder.mid_block.*",
    ),
    ("up", "decoder.deconv_layers"),
    ("project", "decoder.conv_layers"),
    *(
        (f"gru.{step}.{gate}", f"gru.conv{letter}{number}")
        for number, step in ((1, "horizontal"), (2, "vertical"))
        for gate, letter in zip(GATES, "zrq", strict=True)
    ),
    ("unread", "last_layer_depth"),
]

GATHER_RULES: Rules = [("gather.fine", "layer1"), ("gather.middle", "layer2.0"), ("gather.join", "out_layer")]

DINOV2_RULES: Rules = [
    ("patches", "patch_embed.proj"),
    ("class_token", "cls_token"),
    ("position_embedding", "pos_embed"),
    ("mask_token", "mask_token"),
    *under(
        [
            ("norm1", "norm1"),
            ("attention.qkv", "attn.qkv"),
            ("attention.projection", "attn.proj"),
            ("scale1", "ls1.gamma"),
            ("norm2", "norm2"),
            ("feed_forward.expand", "mlp.fc1"),
            ("feed_forward.contract", "mlp.fc2"),
            ("scale2", "ls2.gamma"),
        ],
        "blocks.*",
        "blocks.*",
    ),
    ("norm", "norm"),
]
"""Of DINOv2's own files."""

CLASSIFIER_RULES: Rules = [
    ("patches", "vit.embeddings.patch_embeddings.projection"),
    ("class_token", "vit.embeddings.cls_token"),
    ("position_embedding", "vit.embeddings.position_embeddings"),
    *under(
        [
            ("norm1", "layernorm_before"),
            *((f"attention.{part}", f"attention.attention.{part}") for part in ATTENTION),
            ("attention.projection", "attention.output.dense"),
            ("norm2", "layernorm_after"),
            ("feed_forward.expand", "intermediate.dense"),
            ("feed_forward.contract", "output.dense"),
        ],
        "blocks.*",
        "vit.encoder.layer.*",
    ),
    ("norm", "vit.layernorm"),
    ("classifier", "classifier"),
]
"""Of the files of transformers' ViTForImageClassification."""

MAP_ATTENTION_RULES: Rules = [
    ("norm", "norm"),
    ("enter", "proj_in"),
    ("leave", "proj_out"),
    ("blocks.*.attention.projection", "transformer_blocks.*.attn1.to_out.0"),
    ("blocks.*.attention", "transformer_blocks.*.attn1"),
    ("blocks.*.context_attention.projection", "transformer_blocks.*.attn2.to_out.0"),
    ("blocks.*.context_attention", "transformer_blocks.*.attn2"),
    ("blocks.*.expand", "transformer_blocks.*.ff.net.0.proj"),
    ("blocks.*.contract", "transformer_blocks.*.ff.net.2"),
    ("blocks", "transformer_blocks"),
]
"""Of the UNet's attention, in Stable Diffusion's own files and in those of diffusers."""

_STAGE_RULES: Rules = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("shortcut", "skip_connection"),
    *MAP_ATTENTION_RULES,
]

UNET_RULES: Rules = [
    ("time", "time_embed"),
    ("down.0.0.conv", "input_blocks.0.0"),
    *under([*_STAGE_RULES, ("conv", "op")], "down.*.*", "input_blocks.*.*"),
    *under(_STAGE_RULES, "middle.*", "middle_block.*"),
    *under([*_STAGE_RULES, ("conv", "conv")], "up.*.*", "output_blocks.*.*"),
]
"""Of Stable Diffusion's own files, below ``model.diffusion_model``."""

FIRST_STAGE_RULES: Rules = [
    *((f"encoder.middle.attention.{part}", f"encoder.mid.attn_1.{part[0]}") for part in ATTENTION),
    *(rule for rule in autoencoder_rules() if rule[0].startswith("encoder.")),
    ("moments", "quant_conv"),
    ("unread", "post_quant_conv"),
]
"""Of Stable Diffusion's own files, below ``first_stage_model``."""

DIFFUSION_RULES: Rules = [
    *GATHER_RULES,
    ("scene.scene_embedding", "cide_module.embeddings"),
    ("scene.gamma", "cide_module.gamma"),
    ("scene.mix", "cide_module.fc"),
    ("scene.adapter", "cide_module.embedding_adapter.fc"),
    *under(CLASSIFIER_RULES, "classifier", "cide_module.vit_model"),
    *under(FIRST_STAGE_RULES, "first_stage", "encoder_vq"),
    *under(UNET_RULES, "unet", "unet.unet.diffusion_model"),
]

PATCH_RULES: Rules = [
    *under(DINOV2_RULES, "vit", "backbone"),
    ("neck.project", "projects"),
    ("neck.resize", "resize_layers"),
    *((f"neck.even.{index}", f"scratch.layer{index + 1}_rn") for index in range(4)),
    ("neck.unread.unit", "scratch.refinenet4.resConfUnit1"),
    ("neck.unread.head1", "scratch.output_conv1"),
    ("neck.unread.head2", "scratch.output_conv2"),
    *(
        (f"neck.fuse.{index}.{own}", f"scratch.refinenet{index + 1}.{official}")
        for index in range(4)
        for own, official in (("unit1", "resConfUnit1"), ("unit2", "resConfUnit2"), ("project", "out_conv"))
    ),
    *((f"neck.{own}", official) for own, official in GATHER_RULES),
]

LAYOUTS = {
    kind: KeyMap([*under(DECODER_RULES, "decoder", "decoder.update"), *under(rules, "encoder", "encoder")])
    for kind, rules in (("diffusion", DIFFUSION_RULES), ("patch", PATCH_RULES))
}
"""Names of a whole model, by the kind of its encoder."""


def to_layout(keys: KeyMap, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This library's tensors under their official names."""
    official: dict[str, Tensor] = {}
    for name, value in state.items():
        for part, own in split(name, value):
            official[keys.to_official(part)] = own
    return official


def from_layout(keys: KeyMap, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict under this library's names."""
    return join({keys.from_official(name): value for name, value in state.items()})


def split(name: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """The tensors that are held as one, under the names that they have in passing."""
    for stem, joint, parts in JOINED:
        if match := re.fullmatch(rf"({stem}){re.escape(joint)}\.(weight|bias)", name):
            pieces = value.chunk(len(parts))
            return [(f"{match[1]}.{part}.{match[2]}", piece) for part, piece in zip(parts, pieces, strict=True)]
    return [(name, value)]


def join(state: Mapping[str, Tensor], joints: Iterable[tuple[str, str, Sequence[str]]] = JOINED) -> dict[str, Tensor]:
    """What :func:`split` takes apart, put together again; where one of the several is missing, the others are kept."""
    joined = dict(state)
    for stem, joint, parts in joints:
        for name in state:
            match = re.fullmatch(rf"({stem})\.{parts[0]}\.(weight|bias)", name)
            names = [f"{match[1]}.{part}.{match[2]}" for part in parts] if match else []
            if match and all(part in joined for part in names):
                joined[f"{match[1]}{joint}.{match[2]}"] = torch.cat([joined.pop(part) for part in names])
    return joined

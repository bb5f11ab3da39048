"""VARGPT's official folders: one state dict of the whole model, in the layouts of transformers and of its decoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nextscale.core.checkpoint import CheckpointError, KeyMap, find_state_dict, write_atomically, write_json
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation import infinity, infinity_layout, official_layout, var
from nextscale.tasks.generation.vargpt_config import PRESETS, MarkTokens, VARGPTConfig
from nextscale.tasks.tokenizers.bitwise_schedules import schedule_of
from nextscale.tasks.tokenizers.bitwise_vq import BitwiseVQ
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ

if TYPE_CHECKING:
    from nextscale.tasks.generation.vargpt import VARGPT

NESTED = (("model",), ("state_dict",))
MODEL_TYPES = ("vargpt_llava", "vargpt_qwen2_vl")
KEY = "image_gen_projector.mlp.0.weight"
DECODER, TOKENIZER = "vargpt_gen.", "vae_local."
_PROJECTORS = [
    (f"{own}.{layer}", f"{theirs}.{name}")
    for own, theirs in (("to_language", "image_gen_projector"), ("from_language", "image_gen_projector_out"))
    for layer, name in (("norm", "ln_q"), ("expand", "mlp.0"), ("contract", "mlp.2"))
]
_V1 = KeyMap(
    [
        *_PROJECTORS,
        ("language.vision", "vision_tower.vision_model"),
        ("language.reader.0", "multi_modal_projector.linear_1"),
        ("language.reader.2", "multi_modal_projector.linear_2"),
        ("language.text", "language_model.model"),
        ("language.words", "language_model.lm_head"),
    ]
)
_V11 = KeyMap(
    [
        *_PROJECTORS,
        ("language.vision", "visual"),
        ("language.text", "model"),
        ("language.words", "lm_head"),
        ("start_embedding", "sos_embedding"),
    ]
)
SHARD_BYTES = 5 * 10**9
"""Most bytes of one part of a state dict that is written, as transformers has it."""
_HITS = "vae_local.quantize.ema_vocab_hit_SV"
"""A count of v1's tokenizer over its training, which nothing reads."""


def is_official(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is a VARGPT, in the official layout."""
    try:
        state = find_state_dict(content, NESTED, KEY)
    except CheckpointError:
        return False
    return "vargpt_gen.word_embed.weight" in state


def _inside(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def read_layout(
    content: Mapping[str, Any], **overrides: Any
) -> tuple[VARGPTConfig, dict[str, Tensor], ResidualVQ | BitwiseVQ]:
    """Configuration, flat state dict and tokenizer of an official folder's content.

    Raises:
        CheckpointError: it is not a VARGPT, or of an unknown size without its ``config.json``.
    """
    state = find_state_dict(content, NESTED, KEY)
    first = "multi_modal_projector.linear_1.weight" in state
    given = content.get("config")
    config = _from_transformers(given, first) if isinstance(given, Mapping) else _of_known_size(state, first)
    precision = overrides.get("cross_attention") or "float32"
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"cross_attention is {precision!r}; expected float32 or bfloat16")
    own, tokens = _inside(state, DECODER), _inside(state, TOKENIZER)
    groups = overrides.get("norm_groups")
    try:
        if first:
            schedule = ScaleSchedule.parse(overrides.get("schedule") or var.schedule_from_official(own))
            decoder: dict[str, Any] = {"var": var.config_from_official(own, schedule=schedule)}
            tokenizer: ResidualVQ | BitwiseVQ = ResidualVQ.from_official(
                {k: v for k, v in tokens.items() if f"{TOKENIZER}{k}" != _HITS}, schedule=schedule, norm_groups=groups
            )
        else:
            schedule = ScaleSchedule.parse(overrides.get("schedule") or schedule_of(1.0, "0.25M"))
            precision = {"float32": "model", "bfloat16": "bfloat16"}[precision]
            found = infinity.config_from_official(own, schedule=schedule, text_precision=precision)
            decoder = {"infinity": found}
            tokenizer = BitwiseVQ.from_official(tokens, schedule=schedule, norm_groups=groups)
    except KeyError as error:
        raise CheckpointError(f"the state dict lacks an entry of VARGPT: {error}") from None
    named = ("guidance", "temperature", "labelled", "join_images", "grid", "multiple")
    changes = {name: overrides[name] for name in named if overrides.get(name) is not None}
    return replace(config, **{"var": None, "infinity": None, **decoder, **changes}), state, tokenizer


def from_layout(
    config: VARGPTConfig, state: Mapping[str, Tensor], tokenizer: ResidualVQ | BitwiseVQ
) -> dict[str, Tensor]:
    """An official state dict under this library's names."""
    inner = _inside(state, DECODER)
    if config.var is not None:
        decoder = official_layout.from_layout(KeyMap(official_layout.MODEL_RULES), inner)
    else:
        decoder = infinity_layout.from_layout(inner)
    keys = _V1 if config.var is not None else _V11
    own = {f"decoder.{name}": value for name, value in decoder.items()}
    own |= {f"decoder.tokenizer.{name}": value for name, value in tokenizer.state_dict().items()}
    rest = (name for name in state if not name.startswith((DECODER, TOKENIZER)))
    # Old releases of transformers wrote tables that follow from the sizes.
    own |= {keys.from_official(name): state[name] for name in rest if not name.endswith(_DERIVED)}
    if config.language.get("tie_word_embeddings") and "language.words.weight" not in own:
        own["language.words.weight"] = own["language.text.embed_tokens.weight"]
    return own


_DERIVED = ("rotary_emb.inv_freq", "embeddings.position_ids")


def to_layout(model: VARGPT) -> dict[str, Tensor]:
    """The whole model under its official names, with what official files derive."""
    config = model.config
    keys = _V1 if config.var is not None else _V11
    official = {
        keys.to_official(name): value for name, value in model.state_dict().items() if not name.startswith("decoder.")
    }
    official |= {f"{DECODER}{name}": value for name, value in model.decoder.to_official().items()}
    tokens: dict[str, Tensor] = {
        name: value for name, value in model.tokenizer.to_official().items() if name != "quantize.lfq.mask"
    }
    if config.var is not None:
        hits = torch.zeros(len(config.schedule), config.var.vocabulary)
        tokens.setdefault(_HITS.removeprefix(TOKENIZER), hits)
    return official | {f"{TOKENIZER}{name}": value for name, value in tokens.items()}


def write_folder(model: VARGPT, folder: Path, shard_bytes: int) -> Path:
    """A published folder: the state dict in parts of at most so many bytes, their index, and ``config.json``."""
    from safetensors.torch import save_file

    parts: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, value in model.to_official().items():
        if parts[-1] and size + value.nbytes > shard_bytes:
            parts.append({})
            size = 0
        # Of its own memory: a part of a larger tensor, or one that has two names, cannot be written as it is.
        parts[-1][name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        size, total = size + value.nbytes, total + value.nbytes
    names: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_atomically(folder / file, partial(save_file, part, metadata={"format": "pt"}))
        names |= dict.fromkeys(part, file)
        part.clear()
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": names})
    write_json(folder / "config.json", to_transformers(model.config))
    return folder


# --- configurations -------------------------------------------------------------------------------------

_OF_MODEL = (
    "vision_config", "special_tokens", "image_token_id", "video_token_id", "vision_start_token_id",
    "vision_end_token_id", "vision_token_id", "architectures", "transformers_version", "torch_dtype", "dtype",
    "model_type", "auto_map", "_name_or_path", "_attn_implementation_autoset",
)  # fmt: skip


def _from_transformers(config: Mapping[str, Any], first: bool) -> VARGPTConfig:
    """The published ``config.json`` in this library's terms."""
    base = PRESETS["vargpt-v1" if first else "vargpt-v1.1"]
    try:
        special = config["special_tokens"]
        language = dict(config["text_config"]) if first else {k: v for k, v in config.items() if k not in _OF_MODEL}
        ends = language.get("eos_token_id")
        marks = MarkTokens(
            start=special["image_gen_start_token_id"],
            end=special["image_gen_end_token_id"],
            pad=special["image_gen_pad_token_id"],
            image=config["image_token_index" if first else "image_token_id"],
            eos=tuple(ends) if isinstance(ends, list) else base.marks.eos if ends is None else (ends,),
            empty=base.marks.empty if config.get("pad_token_id") is None else config["pad_token_id"],
        )
        vision = {name: value for name, value in config["vision_config"].items() if name not in _OF_MODEL}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"config.json lacks an entry of VARGPT: {error}") from None
    defaults = base.language if first else {}
    return replace(
        base,
        language={**{k: v for k, v in defaults.items() if k == "model_type"}, **language},
        vision=dict(vision),
        marks=marks,
        vision_layer=config.get("vision_feature_layer", -2),
        keep_class_token=config.get("vision_feature_select_strategy", "default") == "full",
        labelled=not first,
        join_images=not first,
    )


def _of_known_size(state: Mapping[str, Tensor], first: bool) -> VARGPTConfig:
    """A published configuration, by the sizes of a state dict."""
    name = "vargpt-v1" if first else "vargpt-v1.1"
    preset, key = PRESETS[name], "language_model.model.embed_tokens.weight" if first else "model.embed_tokens.weight"
    wanted = (preset.language["vocab_size"], preset.language["hidden_size"])
    found = tuple(state[key].shape) if key in state else None
    if found != wanted:
        raise CheckpointError(
            f"the language model's embedding is {found}, {name}'s {wanted}: give the folder with its config.json, "
            "which says what it is"
        )
    return replace(preset, labelled=not first, join_images=not first)


def to_transformers(config: VARGPTConfig) -> dict[str, Any]:
    """``config.json`` as the official code reads it."""
    marks = config.marks
    ids = {"start": marks.start, "end": marks.end, "pad": marks.pad}
    common = {
        "special_tokens": {f"image_gen_{name}_token_id": number for name, number in ids.items()},
        "pad_token_id": marks.empty,
    }
    if config.var is not None:
        return {
            "model_type": MODEL_TYPES[0],
            "architectures": ["VARGPTLlavaForConditionalGeneration"],
            "text_config": {**config.language, "eos_token_id": list(marks.eos)},
            "vision_config": {"model_type": "clip_vision_model", **config.vision},
            "image_token_index": marks.image,
            "vision_feature_layer": config.vision_layer,
            "vision_feature_select_strategy": "full" if config.keep_class_token else "default",
            "hidden_size": config.language["hidden_size"],
            "projector_hidden_act": "gelu",
            **common,
        }
    return {
        **config.language,
        "model_type": MODEL_TYPES[1],
        "architectures": ["VARGPTQwen2VLForConditionalGeneration"],
        "vision_config": config.vision,
        "image_token_id": marks.image,
        "eos_token_id": list(marks.eos),
        **common,
    }

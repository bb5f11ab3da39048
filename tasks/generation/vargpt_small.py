"""VARGPTs of a few million weights, from nothing: words of the data, a small language model, a small decoder.

No published language model is needed, so that the whole of it trains on one machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.transformer import TransformerConfig
from nextscale.tasks.generation import infinity_training, var_training
from nextscale.tasks.generation.infinity import Infinity
from nextscale.tasks.generation.infinity_config import LEVELS, InfinityConfig
from nextscale.tasks.generation.infinity_transformer import InfinityBlocksConfig
from nextscale.tasks.generation.text_small import words_of
from nextscale.tasks.generation.var import VAR, VARConfig
from nextscale.tasks.generation.vargpt import VARGPT
from nextscale.tasks.generation.vargpt_config import MarkTokens, VARGPTConfig
from nextscale.tasks.generation.vargpt_images import Processor
from nextscale.tasks.generation.vargpt_language import Projector
from nextscale.tasks.tokenizers.bitwise_vq import BitwiseVQ
from nextscale.tasks.tokenizers.image_tokenizer import ImageTokenizer

MARKS = ("<empty>", "<end>", "<unknown>", "<image>", "<draw>", "<drawn>", "<pad>", "<user>", "<assistant>", "<system>")
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {% for part in message['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}<end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@dataclass(frozen=True)
class SmallSizes:
    """Attributes:

    width, depth, heads: of the language model.
    vision_width, vision_depth, vision_heads: of it. Of convolutions: channels of the last of three levels, each of the
        others having half of the next one's; and blocks of each level.
    patch: pixels a side of what is one patch of an image to read; v1.1's merges four patches to a feature. A cell of
        convolutions is 16 pixels wide, however it is set.
    decoder_width, decoder_depth, decoder_heads: of the decoder.
    length: most tokens of a conversation.
    vision: what sees images: a ``"transformer"``, or, in v1, ``"convolutions"``, a residual network, which learns
        more of few images.
    """

    width: int = 192
    depth: int = 4
    heads: int = 6
    vision_width: int = 128
    vision_depth: int = 4
    vision_heads: int = 4
    patch: int = 4
    decoder_width: int = 192
    decoder_depth: int = 4
    decoder_heads: int = 6
    length: int = 512
    vision: Literal["transformer", "convolutions"] = "transformer"


def small_tokenizer(texts: Iterable[str], length: int, marks: Sequence[str] = MARKS, template: str = TEMPLATE) -> Any:
    """A tokenizer of the words of texts, for transformers.

    Args:
        marks: tokens that mean something beside words: filler, end, words that were not met, and others.
        template: of conversations.

    Raises:
        ValueError: there is no word.
    """
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = words_of(texts)
    if not words:
        raise ValueError("the conversations hold no word")
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate((*marks, *words))}, unk_token=marks[2]))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=marks[0], eos_token=marks[1], unk_token=marks[2], model_max_length=length
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks[3:])})
    tokenizer.chat_template = template
    return tokenizer


CELL = 16
"""Pixels a side of what one feature of the residual network sees at its place: it halves an image four times."""


def small_config(
    words: int, tokenizer: ImageTokenizer, seen: int, sizes: SmallSizes, decoder_of: VAR | None = None
) -> VARGPTConfig:
    """The configuration for an image tokenizer: v1 for residual codes, v1.1 for bits.

    Args:
        words: of the vocabulary, marks included.
        seen: side of the images to read, in pixels.
        decoder_of: what v1's decoder is the size of.

    Raises:
        ValueError: the version has no such vision model.
    """
    marks = MarkTokens(start=4, end=5, pad=6, image=3, eos=(1,), empty=0)
    codes, schedule = tokenizer.config.quantizer, tokenizer.config.schedule
    language: dict[str, Any] = {
        "vocab_size": words, "hidden_size": sizes.width, "intermediate_size": 3 * sizes.width,
        "num_hidden_layers": sizes.depth, "num_attention_heads": sizes.heads, "num_key_value_heads": sizes.heads,
        "max_position_embeddings": sizes.length, "tie_word_embeddings": False, "bos_token_id": None,
        "eos_token_id": None,
    }  # fmt: skip
    width, depth, heads = sizes.decoder_width, sizes.decoder_depth, sizes.decoder_heads
    if isinstance(tokenizer, BitwiseVQ):
        if sizes.vision != "transformer":
            raise ValueError(f"vision is {sizes.vision!r}; around a bitwise tokenizer it is a transformer")
        decoder = InfinityConfig(
            InfinityBlocksConfig(width, depth, heads),
            text_width=width,
            text_length=sizes.length,
            pool_heads=1,
            token_bits=codes.token_bits,
            levels=max(len(schedule), LEVELS),
            schedule=schedule,
        )
        pairs = sizes.width // sizes.heads // 2
        section = [pairs - 2 * (pairs * 3 // 8), pairs * 3 // 8, pairs * 3 // 8]
        vision: dict[str, Any] = {
            "depth": sizes.vision_depth, "embed_dim": sizes.vision_width, "hidden_size": sizes.width, "mlp_ratio": 2,
            "num_heads": sizes.vision_heads, "patch_size": sizes.patch, "spatial_merge_size": 2,
            "temporal_patch_size": 1, "in_channels": 3,
        }  # fmt: skip
        scaling = {"type": "mrope", "mrope_section": section}
        return VARGPTConfig(
            {**language, "rope_theta": 1e4, "rope_scaling": scaling},
            vision,
            marks,
            infinity=decoder,
            grid=schedule.final.grid,
            guidance=2.0,
            top_k=0,
            top_p=0.0,
        )
    if sizes.vision == "convolutions":
        channels = [sizes.vision_width // 4, sizes.vision_width // 2, sizes.vision_width]
        vision = {
            "model_type": "resnet", "embedding_size": channels[0], "hidden_sizes": channels,
            "depths": [sizes.vision_depth] * 3, "layer_type": "basic", "image_size": seen, "patch_size": CELL,
        }  # fmt: skip
    else:
        vision = {
            "hidden_size": sizes.vision_width, "intermediate_size": 2 * sizes.vision_width,
            "num_hidden_layers": sizes.vision_depth, "num_attention_heads": sizes.vision_heads, "image_size": seen,
            "patch_size": sizes.patch,
        }  # fmt: skip
    if decoder_of is not None:
        var = replace(decoder_of.config, classes=marks.start + 1, class_names=None)
    else:
        blocks = TransformerConfig(width, depth, heads)
        var = VARConfig(blocks, marks.start + 1, codes.vocabulary, codes.channels, schedule)
    return VARGPTConfig(
        {"model_type": "llama", **language, "rope_theta": 1e4}, vision, marks, var=var, top_k=0, top_p=0.0
    )


def small_model(
    texts: Iterable[str],
    tokenizer: ImageTokenizer,
    seen: int,
    sizes: SmallSizes | None = None,
    decoder_of: VAR | None = None,
    eyes_of: VARGPT | None = None,
) -> VARGPT:
    """A model with fresh weights that knows the words of texts.

    Args:
        seen: see :func:`small_config`.
        decoder_of: a trained VAR over the same tokenizer, whose weights the decoder begins with.
        eyes_of: a trained model whose vision model's weights this one's begins with.

    Raises:
        ValueError: either is of other sizes.
    """
    sizes = sizes or SmallSizes()
    words = small_tokenizer(texts, sizes.length)
    model = VARGPT(small_config(len(words), tokenizer, seen, sizes, decoder_of), tokenizer)
    if decoder_of is not None:
        take_over(model, decoder_of)
    elif isinstance(model.decoder, Infinity):
        infinity_training.initialize(model.decoder, modulation=0.5, gate=1e-3)
    else:
        var_training.initialize(model.decoder)
    if eyes_of is not None:
        if eyes_of.config.vision != model.config.vision:
            raise ValueError(f"the vision models differ: {eyes_of.config.vision} is not {model.config.vision}")
        own, trained = (cast(nn.Module, each.language.vision) for each in (model, eyes_of))
        own.load_state_dict(trained.state_dict())
    model.processor = Processor(model.config, words, least=seen * seen, most=seen * seen)
    return model


@torch.no_grad()
def take_over(model: VARGPT, trained: VAR) -> None:
    """Begin a v1's decoder with a VAR's weights: its conditions with what the VAR draws by where no class is named, as
    the prompt reaches a decoder through the language model alone. The projectors begin by passing on the directions in
    which the maps of images vary, and the language model's blocks by adding nothing, so that the decoder reads through
    it what it knows. As many directions come through as the language model has channels: all, where it is as wide as
    the decoder.

    Raises:
        ValueError: the VAR has other sizes.
    """
    own, found = model.decoder.state_dict(), dict[str, Tensor](trained.state_dict())
    nothing = found.pop("class_embedding.weight")[-1]
    found = {name: value for name, value in found.items() if not name.startswith("tokenizer.")}
    if different := [name for name, value in found.items() if name not in own or own[name].shape != value.shape]:
        raise ValueError(f"the decoder is not of the size of the VAR that it is to begin with: {different[0]} differs")
    model.decoder.load_state_dict(found, strict=False)
    decoder = cast(VAR, model.decoder)
    rows = decoder.class_embedding.weight.data
    rows[:] = nothing.to(rows)
    # What the maps of an image consist of as they enter the blocks.
    whole = decoder.embed(None, model.config.schedule, 0, model.config.schedule.length)[0] + nothing
    axes = torch.linalg.svd(torch.cat((whole, decoder.word_embedding.weight.mT)), full_matrices=True)[2]
    directions = torch.zeros(model.language.width, whole.shape[1])
    kept = min(directions.shape)
    directions[:kept] = axes[:kept]
    pass_through(model.to_language, directions, 1.0)
    # The language model's last norm makes everything of one size.
    size = float((whole.square().sum(-1).mean() / len(directions)).sqrt())
    pass_through(model.from_language, directions.mT, size)
    for name, parameter in model.language.text.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()


PASSING = 8.0
"""Where GELU passes on what comes: GELU(x + 8) - 8 is x, for all x that are not far below 0."""


def pass_through(projector: Projector, weight: Float[Tensor, "target width"], scale: float) -> None:
    """Have a projector begin as a linear map, times a factor."""
    with torch.no_grad():
        projector.expand.weight.copy_(torch.eye(weight.shape[1]))
        projector.expand.bias.fill_(PASSING)
        projector.contract.weight.copy_(scale * weight)
        projector.contract.bias.copy_(-PASSING * scale * weight.sum(1))

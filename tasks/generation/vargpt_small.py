"""VARGPTs of a few million weights, from nothing: words of the data, a small language model, a small decoder.

No published language model is needed, so that the whole of it trains on one machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nextscale.core.transformer import TransformerConfig
from nextscale.tasks.generation import infinity_training, var_training
from nextscale.tasks.generation.infinity import Infinity
from nextscale.tasks.generation.infinity_config import LEVELS, InfinityConfig
from nextscale.tasks.generation.infinity_transformer import InfinityBlocksConfig
from nextscale.tasks.generation.text_small import words_of
from nextscale.tasks.generation.var import VARConfig
from nextscale.tasks.generation.vargpt import VARGPT
from nextscale.tasks.generation.vargpt_config import MarkTokens, VARGPTConfig
from nextscale.tasks.generation.vargpt_images import Processor
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
    vision_width, vision_depth, vision_heads: of what sees images.
    patch: pixels a side of what is one patch of an image to read; v1.1's merges four patches to a feature.
    decoder_width, decoder_depth, decoder_heads: of the decoder.
    length: most tokens of a conversation.
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


def small_tokenizer(texts: Iterable[str], length: int) -> Any:
    """A tokenizer of the words of texts, for transformers.

    Raises:
        ValueError: there is no word.
    """
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = words_of(texts)
    if not words:
        raise ValueError("the conversations hold no word")
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate((*MARKS, *words))}, unk_token=MARKS[2]))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=MARKS[0], eos_token=MARKS[1], unk_token=MARKS[2], model_max_length=length
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS[3:])})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def small_config(words: int, tokenizer: ImageTokenizer, seen: int, sizes: SmallSizes) -> VARGPTConfig:
    """The configuration for an image tokenizer: v1 for residual codes, v1.1 for bits.

    Args:
        words: of the vocabulary, marks included.
        seen: side of the images to read, in pixels.
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
        vision = {
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
    vision = {
        "hidden_size": sizes.vision_width, "intermediate_size": 2 * sizes.vision_width,
        "num_hidden_layers": sizes.vision_depth, "num_attention_heads": sizes.vision_heads, "image_size": seen,
        "patch_size": sizes.patch,
    }  # fmt: skip
    blocks = TransformerConfig(width, depth, heads)
    var = VARConfig(blocks, marks.start + 1, codes.vocabulary, codes.channels, schedule)
    return VARGPTConfig(
        {"model_type": "llama", **language, "rope_theta": 1e4}, vision, marks, var=var, top_k=0, top_p=0.0
    )


def small_model(texts: Iterable[str], tokenizer: ImageTokenizer, seen: int, sizes: SmallSizes | None = None) -> VARGPT:
    """A model with fresh weights that knows the words of texts.

    Args:
        seen: see :func:`small_config`.
    """
    sizes = sizes or SmallSizes()
    words = small_tokenizer(texts, sizes.length)
    model = VARGPT(small_config(len(words), tokenizer, seen, sizes), tokenizer)
    if isinstance(model.decoder, Infinity):
        infinity_training.initialize(model.decoder, modulation=0.5, gate=1e-3)
    else:
        var_training.initialize(model.decoder)
    model.processor = Processor(model.config, words, least=seen * seen, most=seen * seen)
    return model

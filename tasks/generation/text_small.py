"""Text encoders of a few thousand weights, for captions of few words.

A frozen transformer with random weights gives every word in its place features of its own, which is all that a
generator needs where captions name a class and a colour. Nothing is downloaded, and the encoder ships with the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch

from nextscale.tasks.generation.text import quiet

MARKS = ("<pad>", "</s>", "<unk>")
"""Filler, end of a text, and words that were not met."""


def words_of(texts: Iterable[str]) -> list[str]:
    """All words of texts, sorted."""
    return sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower())})


def make_encoder(
    folder: str | Path,
    texts: Iterable[str],
    *,
    kind: Literal["t5", "clip"] = "t5",
    width: int = 64,
    layers: int = 1,
    heads: int = 2,
    max_length: int = 32,
    seed: int = 0,
) -> Path:
    """Write a text encoder that knows the words of ``texts``; transformers reads the folder.

    Raises:
        ValueError: there is no word in the texts.
    """
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = words_of(texts)
    if not words:
        raise ValueError("the texts hold no word; give the captions that the encoder is to read")
    numbers = {word: number for number, word in enumerate((*MARKS, *words))}
    pad, end, unknown = MARKS
    tokenizer = Tokenizer(WordLevel(numbers, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=None, special_tokens=[(end, numbers[end])]
    )
    sizes: dict[str, Any] = {"vocab_size": len(numbers), "pad_token_id": numbers[pad], "eos_token_id": numbers[end]}
    model: Any
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "t5":
            model = T5EncoderModel(
                T5Config(
                    d_model=width,
                    d_kv=width // heads,
                    d_ff=2 * width,
                    num_layers=layers,
                    num_heads=heads,
                    dropout_rate=0.0,
                    **sizes,
                )
            )
        else:
            model = CLIPTextModel(
                CLIPTextConfig(
                    hidden_size=width,
                    intermediate_size=2 * width,
                    num_hidden_layers=layers,
                    bos_token_id=numbers[end],
                    num_attention_heads=heads,
                    max_position_embeddings=max_length,
                    projection_dim=width,
                    **sizes,
                )
            )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=end, unk_token=unknown, model_max_length=max_length
    )
    fast.save_pretrained(folder)
    with quiet():
        model.save_pretrained(folder, safe_serialization=True)
    return folder

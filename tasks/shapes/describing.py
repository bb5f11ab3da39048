"""What a 3D object is, in words: tokens of its shape, a projector, and a causal language model.

SAR3D (Chen et al. 2024, arXiv 2411.16856, section 3.4, "SAR3D-LLM", after PointLLM: Xu et al. 2023, arXiv 2308.16911):
the codes of the first scales of an object's tokens stand in the prompt as words do. Here the tokens are SAR3D's planes
or G3PT's sets, and the language model any causal one of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.checkpoint import CheckpointError, assign, save_folder, weightless
from nextscale.core.config import from_json, to_json
from nextscale.tasks.generation.vargpt_language import made
from nextscale.tasks.shapes.describing_text import Speech, Words
from nextscale.tasks.shapes.g3pt_tokenizer import PointTokenizer, PointTokenizerConfig
from nextscale.tasks.shapes.sar3d_tokenizer import TriplaneVQ, TriplaneVQConfig

SYSTEM = "describer"
ShapeTokenizer = PointTokenizer | TriplaneVQ
TOKENIZERS: dict[str, tuple[Any, Any]] = {
    "point-vq": (PointTokenizer, PointTokenizerConfig),
    "triplane-vq": (TriplaneVQ, TriplaneVQConfig),
}
"""Tokenizers of shapes with their configurations, by the names of their systems."""


@dataclass(frozen=True)
class DescriberConfig:
    """Attributes:

    language: configuration of transformers, with its ``model_type``.
    words: special tokens.
    tokenizer: system of the shapes' tokenizer.
    channels: of a shape's codes.
    scales: so many of the first are read; None: all.
    hidden: widths inside the projector; the defaults are the published ones.
    question: what is asked where nothing is.
    length: most tokens of a conversation, shapes included.
    """

    language: dict[str, Any]
    words: Words
    tokenizer: str
    channels: int
    scales: int | None = None
    hidden: tuple[int, ...] = (1024, 2048)
    question: str = "What is this?"
    length: int = 2048

    def __post_init__(self) -> None:
        if self.tokenizer not in TOKENIZERS:
            raise ValueError(f"tokenizer is {self.tokenizer!r}; shapes are read by {' or '.join(TOKENIZERS)}")


def projector(channels: int, hidden: Sequence[int], width: int) -> nn.Sequential:
    """Linear layers with GELU between them, from codes to words."""
    sizes = [channels, *hidden, width]
    layers: list[nn.Module] = [nn.Linear(sizes[0], sizes[1])]
    for before, after in pairwise(sizes[1:]):
        layers += [nn.GELU(), nn.Linear(before, after)]
    return nn.Sequential(*layers)


class Language(nn.Module):
    """A causal language model of transformers, under the name that adapters are put on by."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        super().__init__()
        rest = {name: value for name, value in config.items() if name != "model_type"}
        self.text: Any = made(
            lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **rest))
        )

    @property
    def width(self) -> int:
        return int(self.text.get_input_embeddings().embedding_dim)


class Describer(Speech, nn.Module):
    """Tokenizer of shapes, projector, language model. The tokenizer is frozen and stays in evaluation form.

    Attributes:
        home: the folder it was loaded from, where the words of its language model lie too.
    """

    def __init__(self, config: DescriberConfig, tokenizer: ShapeTokenizer, language: Any = None) -> None:
        """Args:

        language: a language model with weights, of ``config.language``; None: one with fresh weights.
        """
        super().__init__()
        self.config = config
        self.home: Path | None = None
        self.tokenizer = tokenizer.requires_grad_(False).eval()
        self.language = Language(config.language)
        if language is not None:
            self.language.text = language
        self.projector = projector(config.channels, config.hidden, self.language.width)

    @property
    def device(self) -> torch.device:
        return next(self.projector.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.projector.parameters()).dtype

    @property
    def places(self) -> int:
        """Tokens that stand for one shape."""
        schedule = self.tokenizer.config.schedule
        count = len(schedule) if self.config.scales is None else self.config.scales
        return sum(schedule.lengths[:count])

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.tokenizer.eval()
        return self

    # --- shapes ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def codes(self, tokens: Tensor) -> Float[Tensor, "batch places channels"]:
        """Vectors of length 1 that a shape's first tokens stand for, float32.

        Args:
            tokens: of the tokenizer's ``encode``, of all scales in one sequence.
        """
        first = tokens[:, : self.places].to(self.device)
        if isinstance(self.tokenizer, PointTokenizer):
            return self.tokenizer.quantizer.codes(first)
        return self.tokenizer.quantizer.vectors.to(self.device)[first]

    @torch.no_grad()
    def encode(self, given: Tensor) -> Tensor:
        """Tokens of shapes, of what their tokenizer reads: points with normals, or views of each (shapes, views, 10,
        height, width)."""
        given = given.to(self.device)
        if isinstance(self.tokenizer, TriplaneVQ):
            return self.tokenizer.encode(given.flatten(0, 1))
        return self.tokenizer.encode(given)

    # --- language ----------------------------------------------------------------------------------------

    def embed(
        self, ids: Int[Tensor, "batch length"], codes: Float[Tensor, "batch places channels"]
    ) -> Float[Tensor, "batch length width"]:
        """Words as vectors, and shapes in place of their marks.

        Args:
            codes: of the shape of every row.

        Raises:
            ValueError: a row has not as many marks as a shape has tokens.
        """
        x = self.language.text.get_input_embeddings()(ids)
        marks = ids == self.config.words.patch
        counts = marks.sum(1)
        if bool((counts != codes.shape[1]).any()):
            raise ValueError(f"rows have {counts.tolist()} marks of a shape; a shape has {codes.shape[1]} tokens")
        shapes = self.projector(codes.to(self.dtype)).to(x.dtype)
        return x.masked_scatter(marks[..., None].expand_as(x), shapes)

    def forward(
        self, ids: Int[Tensor, "batch length"], mask: Int[Tensor, "batch length"], codes: Tensor
    ) -> Float[Tensor, "batch length vocabulary"]:
        """Scores of every next token; see :meth:`embed`."""
        logits: Tensor = self.language.text(inputs_embeds=self.embed(ids, codes), attention_mask=mask).logits
        return logits

    def loss(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Any]]:
        """Of a batch of :class:`nextscale.tasks.shapes.describing_training.DescriberTraining`."""
        from nextscale.tasks.shapes.describing_training import DescriberTraining

        return DescriberTraining(self).loss(SYSTEM, self, batch, 0)

    # --- files -------------------------------------------------------------------------------------------

    @property
    def parts(self) -> dict[str, Any]:
        """The models a folder holds, by what they are."""
        return {"model": self, "tokenizer": self.tokenizer}

    def save(self, folder: str | Path) -> Path:
        """Write ``model.safetensors``, all parts included, ``config.json``, and the words of the language model."""
        config = {"model": to_json(self.config), "tokenizer": to_json(self.tokenizer.config)}
        # Of its own memory: input and output words of many language models are one tensor.
        state = {name: value.clone() for name, value in self.state_dict().items()}
        saved = save_folder(folder, state, {"system": SYSTEM, "config": config})
        self.save_words(saved)
        return saved

    @classmethod
    def from_saved(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """From the content of a folder written by :meth:`save`."""
        parts = config["config"]
        own = from_json(DescriberConfig, parts["model"])
        kind, sizes = TOKENIZERS[own.tokenizer]
        with weightless():
            model = cls(own, kind(from_json(sizes, parts["tokenizer"])))
        assign(model, state, "the saved describer")
        model.language.text.tie_weights()
        return model.eval()

    @property
    def official_name(self) -> str:
        """Raises ValueError: there is no name."""
        raise ValueError(
            "no weights of SAR3D's language model were published: it is kept in this library's format alone"
        )

    def to_official(self) -> dict[str, Tensor]:
        """Raises ValueError: there is no layout."""
        raise ValueError(self.official_name)

    @classmethod
    def read_official(cls, content: Mapping[str, Any], **overrides: Any) -> tuple[Any, dict[str, Tensor]]:
        """Raises CheckpointError: there is no layout."""
        raise CheckpointError(
            "no weights of SAR3D's language model were published: give a folder saved by this library"
        )

    @classmethod
    def from_official(cls, content: Mapping[str, Any], **overrides: Any) -> Any:
        """Raises CheckpointError: there is no layout."""
        return cls.read_official(content, **overrides)


def is_official(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is a describer in an official layout: none was published."""
    return False

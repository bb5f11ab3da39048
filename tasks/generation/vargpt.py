"""VARGPT: a language model that answers with text token by token, and with images scale by scale.

Zhuang et al. 2025, "VARGPT" (arXiv 2501.12327) and "VARGPT-v1.1" (arXiv 2504.02949); official code VARGPT-family/VARGPT
and VARGPT-family/VARGPT-v1.1. The token maps of an image go through the language model before a decoder, VAR (v1) or
Infinity (v1.1), makes the next map of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.bitwise import BitwiseEmitter
from nextscale.core.checkpoint import assign, save_folder, weightless
from nextscale.core.config import from_json, to_json
from nextscale.core.cross_attention import Packed
from nextscale.core.heads import CategoricalEmitter
from nextscale.core.random import Draws
from nextscale.core.sampling import Emitter, ScaleStep, sample
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.infinity import Infinity
from nextscale.tasks.generation.var import VAR
from nextscale.tasks.generation.vargpt_chat import Chats
from nextscale.tasks.generation.vargpt_conditions import CONDITIONAL, DROPPED, Conditions, put_constants
from nextscale.tasks.generation.vargpt_config import VARGPTConfig
from nextscale.tasks.generation.vargpt_language import LanguageModel, Llava, Projector, Qwen2VL
from nextscale.tasks.generation.vargpt_layout import (
    SHARD_BYTES,
    from_layout,
    is_official,
    read_layout,
    to_layout,
    write_folder,
)
from nextscale.tasks.generation.vargpt_sampling import Noise, Painting, State, branches
from nextscale.tasks.tokenizers.bitwise_schedules import reference_grid
from nextscale.tasks.tokenizers.bitwise_vq import BitwiseVQ
from nextscale.tasks.tokenizers.image_tokenizer import ImageTokenizer
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ

__all__ = ["SYSTEM", "VARGPT", "is_official"]

SYSTEM = "vargpt"


class VARGPT(Chats, nn.Module):
    """Language model, projectors, and decoder with its tokenizer.

    The tokenizer is frozen: it takes no gradient and stays in evaluation form.

    Attributes:
        home: the folder it was loaded from, where its processor lies too.
        packable: beginnings of the names of layers that may be packed beside the decoder's blocks.
    """

    config: VARGPTConfig
    packable = ("language.text.layers.",)

    def __init__(self, config: VARGPTConfig, tokenizer: ImageTokenizer) -> None:
        super().__init__()
        self.config = config
        self.home: Path | None = None
        self.rates: dict[str, float] = {}  # factors of the learning rate (nextscale.core.optim.parameter_groups)
        self.language: LanguageModel = Llava(config) if config.var is not None else Qwen2VL(config)
        self.decoder: VAR | Infinity
        if config.var is not None:
            self.decoder = VAR(config.var, tokenizer)
        else:
            assert config.infinity is not None
            self.decoder = Infinity(config.infinity, cast(BitwiseVQ, tokenizer))
            self.start_embedding: nn.Embedding | None = nn.Embedding(config.marks.start + 1, config.infinity.text_width)
        width = config.decoder.transformer.width
        self.to_language = Projector(width, self.language.width)
        self.from_language = Projector(self.language.width, width)
        if config.folded:
            put_constants(self, None)

    @property
    def tokenizer(self) -> Any:
        return self.decoder.tokenizer

    @property
    def device(self) -> torch.device:
        return self.language.words.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.to_language.expand.weight.dtype

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.tokenizer.eval()
        return self

    # --- conditions ----------------------------------------------------------------------------------------

    def conditions(self) -> Conditions:
        """What the two conditions amount to; they are the same for every prompt."""
        if self.config.folded:
            folded = dict(self.named_parameters())
            return Conditions(*(folded[f"folded_{name}"] for name in ("starts", "blocks", "head")))
        decoder = self.decoder
        if isinstance(decoder, VAR):
            rows = torch.tensor([CONDITIONAL, DROPPED], device=self.device) + self.config.marks.start
            starts = decoder.class_embedding(rows)
        else:
            assert self.start_embedding is not None
            pair = torch.stack((self.start_embedding.weight[self.config.marks.start], decoder.null_text[0]))
            starts = decoder.pool(Packed(decoder.text_norm(pair), (1, 1)))
        blocks = torch.stack([each[:, 0] for each in decoder.transformer.modulate(starts)])
        return Conditions(starts, blocks, decoder.head.modulate(starts)[:, 0])

    @torch.no_grad()
    def fold(self) -> Self:
        """Keep what the maps of the conditions amount to, and let the maps go: for drawing, not for training.

        In v1 0.66 G parameters become 0.7 M; results are the same. Changes the model in place.
        """
        if not self.config.folded:
            put_constants(self, self.conditions())
            self.config = replace(self.config, folded=True)
        return self

    # --- the decoder's part ---------------------------------------------------------------------------------

    def embed(
        self, starts: Float[Tensor, "rows width"], inputs: Tensor | None, schedule: ScaleSchedule, begin: int, end: int
    ) -> Float[Tensor, "rows positions width"]:
        """The scales ``begin`` to ``end`` (not included) as they enter the language model's projector.

        Args:
            starts: of each row.
            inputs: of those scales, joined in order (the first scale of all has none), (rows, positions, channels).
        """
        decoder, start, stop = self.decoder, schedule.ranges[begin][0], schedule.ranges[end - 1][1]
        first = schedule.lengths[0] if begin == 0 else 0
        if isinstance(decoder, Infinity):
            if first:
                return decoder.embed(starts, inputs, first)
            assert inputs is not None
            return decoder.word_embedding(inputs.to(decoder.dtype))
        parts = [decoder.embed(None, schedule, 0, first) + starts[:, None]] if first else []
        if inputs is not None:
            parts.append(decoder.embed(inputs, schedule, start + first, stop))
        return torch.cat(parts, dim=1)

    def decode(
        self,
        x: Float[Tensor, "rows positions width"],
        modulations: Sequence[Tensor],
        schedule: ScaleSchedule,
        begin: int,
        end: int,
        memory: Any = None,
        cache: Any = None,
    ) -> Float[Tensor, "rows positions width"]:
        """The decoder's blocks on the scales ``begin`` to ``end`` (not included).

        Args:
            memory: v1.1: what the blocks attend to.
            cache: of the earlier scales.
        """
        segments = schedule.causal(begin, end - 1)
        if isinstance(self.decoder, VAR):
            return self.decoder.transformer(x, modulations, segments, cache)
        start, stop = schedule.ranges[begin][0], schedule.ranges[end - 1][1]
        return self.decoder.transformer(
            x,
            modulations,
            segments,
            cache,
            levels=self.decoder.levels(schedule)[start:stop],
            rotation=self.decoder.rotation(schedule, self.grid)[start:stop],
            memory=memory,
        )

    @property
    def grid(self) -> tuple[int, int]:
        """The grid that v1.1's positions are counted on."""
        given = self.config.grid
        return reference_grid(self.config.schedule) if given is None else (given[0], given[1])

    # --- teacher forcing ------------------------------------------------------------------------------------

    def forward(
        self,
        ids: Int[Tensor, "batch length"],
        mask: Tensor,
        inputs: Float[Tensor, "images rest channels"] | None = None,
        dropped: Int[Tensor, " images"] | None = None,
        features: Float[Tensor, "features width"] | None = None,
        positions: Int[Tensor, "axes batch length"] | None = None,
        talks: Int[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length width"], Float[Tensor, "images scores choices"] | None]:
        """Hidden states of the language model, and the scores of all images to draw at once.

        Args:
            ids: an image to draw is its start, ``config.places`` pads, its end.
            mask: (batch, length), 1 where a token counts, or as :class:`LanguageModel` takes it.
            inputs: the decoder's, of the scales 1, 2, …, of all images in the order of their marks; None: none.
            dropped: 1 where an image is drawn without its label.
            features: of the images to read.
            positions: None: counted from 0 at the first column, on every axis.
            talks: number of the conversation that a token belongs to, where several share a row.
        """
        x = self.language.embed(ids, features)
        if positions is None:
            positions = self.language.flat(torch.zeros(len(ids), dtype=torch.long, device=ids.device), ids.shape[1])
        if inputs is None:
            return self.language(x, positions, mask), None
        assert dropped is not None
        schedule, count = self.config.schedule, len(self.config.schedule)
        starts, modulations, head = self.conditions().of(dropped.long())
        entering = self.embed(starts, inputs, schedule, 0, count)
        entering = self.to_language(F.pad(entering, (0, 0, 0, self.config.places - schedule.length)))
        pads = ids == self.config.marks.pad
        if int(pads.sum()) != entering.shape[0] * entering.shape[1]:
            raise ValueError(
                f"the text has {int(pads.sum())} tokens that stand for images to draw, {len(inputs)} images need "
                f"{self.config.places} each"
            )
        if features is None or self.config.join_images:
            x = x.masked_scatter(pads[..., None].expand_as(x), entering.to(x.dtype))
        states = self.language(x, positions, mask)
        back = states[pads].unflatten(0, entering.shape[:2])[:, : schedule.length]
        memory = None
        if self.config.infinity is not None:
            memory = self._read_before(states, ids, mask, talks)
        hidden = self.decode(self.from_language(back), modulations, schedule, 0, count, memory)
        return states, self.decoder.head(hidden, head)

    def _read_before(self, states: Tensor, ids: Tensor, mask: Tensor, talks: Tensor | None) -> Packed:
        """What v1.1's decoder attends to, of every image: all before its start but images drawn before it."""
        marks, places = self.config.marks, self.config.places
        counted = mask.bool() if mask.ndim == 2 else torch.ones_like(ids, dtype=torch.bool)
        counted, parts = counted.clone(), []
        for row, start in (ids == marks.start).nonzero().tolist():
            seen = counted[row, :start].clone()  # kept for the backward pass
            if talks is not None:
                seen = seen & (talks[row, :start] == talks[row, start])
            parts.append(states[row, :start][seen])
            counted[row, start : start + places + 2] = False
        return Packed(self.from_language(torch.cat(parts)), tuple(len(part) for part in parts))

    def loss(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Any]]:
        """Text and image losses of a batch of conversations, and what to log.

        Args:
            batch: see :class:`nextscale.tasks.generation.vargpt_training.VARGPTTraining`.
        """
        from nextscale.tasks.generation.vargpt_training import VARGPTTraining

        return VARGPTTraining(self).loss(SYSTEM, self, batch, 0)

    # --- drawing --------------------------------------------------------------------------------------------

    def steps(
        self,
        state: State,
        *,
        draws: Draws,
        guidance: float | Sequence[float] | None = None,
        emitter: Emitter | None = None,
        noise: Noise | None = None,
    ) -> Iterator[ScaleStep]:
        """Draw an image at the end of every conversation of a batch, scale by scale.

        Args:
            state: conversations that have just come to the start of an image; the image is added to it.
            guidance: how much the prompt counts: the strength t at the last scale in v1, (1 + t) prompt - t noise,
                growing from 0; the weight w of all scales in v1.1, w prompt + (1 - w) no prompt. Or the weights of
                the prompt's scores, one per scale. None: the configuration's.
            noise: v1: hidden states of the unconditional row, by scale; None: drawn.
        """
        schedule = self.config.schedule
        guidance = self.config.guidance if guidance is None else guidance
        both = branches(guidance, len(state), schedule, self.config.variant, self.device)
        null = None
        if self.config.null_prompt is not None and len(both) > 1 and noise is None:
            asked = [{"role": "user", "content": self.config.null_prompt}]
            null = self._begin_image([asked]).select([0] * len(state))
        network = Painting(self, state, len(both) > 1, noise or draws.normal, null)
        return sample(network, self.tokenizer.quantizer, schedule, both, emitter or self.emitter(), draws)

    def emitter(
        self, top_k: int | None = None, top_p: float | None = None, temperature: float | Sequence[float] | None = None
    ) -> Emitter:
        """How scores become tokens; None: the configuration's."""
        config = self.config
        make = CategoricalEmitter if config.var is not None else BitwiseEmitter
        return make(
            config.top_k if top_k is None else top_k,
            config.top_p if top_p is None else top_p,
            config.temperature if temperature is None else temperature,
        )

    # --- files ----------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write ``model.safetensors``, all parts included, ``config.json``, and the processor's files."""
        config = {"model": to_json(self.config), "tokenizer": to_json(self.tokenizer.config)}
        saved = save_folder(folder, self.state_dict(), {"system": SYSTEM, "config": config})
        self.save_processor(saved)
        return saved

    @classmethod
    def from_saved(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """From the content of a folder written by :meth:`save`."""
        parts = config["config"]
        own = from_json(VARGPTConfig, parts["model"])
        kind: Any = ResidualVQ if own.var is not None else BitwiseVQ
        with weightless():
            model = cls(own, kind(from_json(kind.config_class, parts["tokenizer"])))
        assign(model, state, "the saved VARGPT")
        return model.eval()

    def to_official(self) -> dict[str, Tensor]:
        """The official state dict of the whole model.

        Raises:
            ValueError: the model is folded.
        """
        if self.config.folded:
            raise ValueError("a folded model has no maps of conditions any more: export the model before fold()")
        return to_layout(self)

    @property
    def official_name(self) -> str:
        return "model.safetensors"

    def save_official(self, folder: str | Path, shard_bytes: int = SHARD_BYTES) -> Path:
        """Write a folder as published: the state dict in parts, ``config.json``, and the tokenizer's files.

        Raises:
            ValueError: the model is folded.
        """
        place = write_folder(self, Path(folder), shard_bytes)
        self.save_processor(place, inside="")
        return place

    @classmethod
    def read_official(cls, content: Mapping[str, Any], **overrides: Any) -> tuple[VARGPTConfig, dict[str, Tensor]]:
        """Configuration and flat state dict of an official folder; overrides as for :meth:`from_official`."""
        config, state, _ = read_layout(content, **overrides)
        return config, state

    @classmethod
    def from_official(cls, content: Mapping[str, Any], **overrides: Any) -> Self:
        """Build from an official folder: ``{"model": its state dict, "config": its config.json}``.

        Args:
            overrides: ``schedule`` (v1.1: 0.25M where none is given); ``cross_attention``: ``"bfloat16"`` rounds what
                v1.1's decoder attends to, as the published code does (None: ``"float32"``); ``norm_groups``,
                ``labelled`` and ``join_images`` (v1; None: False, as published), ``guidance``, ``temperature``.

        Raises:
            CheckpointError: the content is not a VARGPT.
        """
        config, state, tokenizer = read_layout(content, **overrides)
        with weightless():
            model = cls(config, tokenizer)
        assign(model, from_layout(config, state, tokenizer), SYSTEM)
        return model.eval()

    @property
    def parts(self) -> dict[str, Any]:
        """The models a folder holds, by what they are."""
        return {"model": self, "transformer": self.decoder, "tokenizer": self.tokenizer}

"""VARGPT's language models, through transformers: they read text and images, and pass maps of an image on.

Llama with CLIP's features (v1, as LLaVA has it: Liu et al. 2023, arXiv 2304.08485) or Qwen2-VL (v1.1: Wang et al. 2024,
arXiv 2409.12191), of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.tasks.generation.vargpt_config import VARGPTConfig


def made(build: Callable[[], nn.Module]) -> nn.Module:
    """A module of transformers; on the meta device it has real buffers, which are computed and in no file."""
    if torch.get_default_device().type != "meta":
        return build()
    from accelerate import init_empty_weights

    with torch.device("cpu"), init_empty_weights(include_buffers=False):
        return build()


class Projector(nn.Module):
    """Linear, GELU, Linear between the widths of decoder and language model.

    Attributes:
        norm: in published files, and never applied by the published code.
    """

    def __init__(self, width: int, target: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.expand = nn.Linear(width, width)
        self.contract = nn.Linear(width, target)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch target"]:
        return self.contract(F.gelu(self.expand(x)))


class LanguageModel(nn.Module):
    """A causal language model that sees images.

    Attributes:
        text: the decoder of transformers, without its last projection ``words``.
        axes: numbers that a position has.
    """

    axes: int

    def __init__(self, config: VARGPTConfig, text: nn.Module) -> None:
        super().__init__()
        self.marks = config.marks
        self.text = text
        sizes: Any = text.config
        self.width: int = sizes.hidden_size
        self.words = nn.Linear(self.width, sizes.vocab_size, bias=False)
        if sizes.tie_word_embeddings:
            self.words.weight = self.embedding.weight

    @property
    def embedding(self) -> nn.Embedding:
        return cast(nn.Embedding, self.text.embed_tokens)

    def see(self, pixels: Tensor, grids: Int[Tensor, "images 3"]) -> Float[Tensor, "features width"]:
        """Features of images, end to end, as they stand in a text.

        Args:
            pixels: as the model's image processor gives them.
            grids: of patches, (frames, rows, columns), where the model takes images of any size.
        """
        raise NotImplementedError

    def positions(
        self, ids: Int[Tensor, "batch length"], mask: Int[Tensor, "batch length"], grids: Int[Tensor, "images 3"]
    ) -> tuple[Int[Tensor, "axes batch length"], Int[Tensor, " batch"]]:
        """Where tokens stand while text is written, and where the token after them will; 1 where masked."""
        raise NotImplementedError

    def embed(
        self, ids: Int[Tensor, "batch length"], features: Float[Tensor, "features width"] | None = None
    ) -> Float[Tensor, "batch length width"]:
        """Tokens as vectors, features of images in place of theirs.

        Raises:
            ValueError: there are more or fewer features than tokens that stand for one.
        """
        x = self.embedding(ids)
        places = ids == self.marks.image
        count = 0 if features is None else len(features)
        if int(places.sum()) != count:
            raise ValueError(
                f"the text has {int(places.sum())} tokens that stand for features of images, the images have {count}: "
                "every image needs its marks in the text, and every mark an image"
            )
        if features is None or not count:
            return x
        return x.masked_scatter(places[..., None].expand_as(x), features.to(x.dtype))

    def forward(
        self,
        x: Float[Tensor, "batch length width"],
        positions: Int[Tensor, "axes batch length"],
        mask: Tensor | None = None,
        cache: Any = None,
    ) -> Float[Tensor, "batch length width"]:
        """Last hidden states, normed.

        Args:
            mask: (batch, cached and given): 1 where a token counts; None: all do. Or (batch, 1, length, keys), bool:
                which keys each position sees.
            cache: of transformers; what is given is added.
        """
        if mask is not None and mask.ndim == 4 and cast(Any, self.text).config._attn_implementation == "eager":
            # Plain products take what is added to scores.
            mask = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(~mask, torch.finfo(x.dtype).min)
        output = self.text(
            inputs_embeds=x,
            position_ids=positions if self.axes > 1 else positions[0],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state

    def flat(self, start: Int[Tensor, " batch"], count: int) -> Int[Tensor, "axes batch count"]:
        """Positions that count on from ``start``, alike on every axis."""
        steps = start[:, None] + torch.arange(count, device=start.device)
        return steps.expand(self.axes, -1, -1)


def train_plainly(text: nn.Module, device: torch.device) -> None:
    """Have a language model of transformers compute its attention by plain products where it is trained on a CPU: the
    backward pass of the fused kernel takes many times as long there."""
    if device.type == "cpu":
        cast(Any, text).set_attn_implementation("eager")


class Llava(LanguageModel):
    """A language model and the features of a vision model: CLIP's, or the cells of the last map of another one."""

    axes = 1

    def __init__(self, config: VARGPTConfig) -> None:
        from transformers import AutoConfig, AutoModel, CLIPVisionConfig, CLIPVisionModel

        looks = config.vision.get("model_type", CLIP)
        kind = config.language.get("model_type", "llama")
        rest = {name: value for name, value in config.language.items() if name != "model_type"}
        super().__init__(config, made(lambda: AutoModel.from_config(AutoConfig.for_model(kind, **rest))))
        seen = {name: value for name, value in config.vision.items() if name != "model_type"}
        self.convolves = looks != CLIP
        if self.convolves:
            vision = made(lambda: AutoModel.from_config(AutoConfig.for_model(looks, **seen)))
        else:
            vision = made(lambda: CLIPVisionModel(CLIPVisionConfig(**seen)))
        # Releases differ in whether the network is one level further in.
        self.vision = getattr(vision, "vision_model", vision)
        self.layer, self.keep_class_token = config.vision_layer, config.keep_class_token
        self.reader = nn.Sequential(
            nn.Linear(vision_width(config.vision), self.width), nn.GELU(), nn.Linear(self.width, self.width)
        )

    def see(self, pixels: Tensor, grids: Tensor) -> Tensor:
        if self.convolves:
            given = pixels.to(self.words.weight.dtype, memory_format=torch.channels_last)
            return self.reader(self.vision(given).last_hidden_state.flatten(2).mT).flatten(0, 1)
        states = self.vision(pixels.to(self.words.weight.dtype), output_hidden_states=True).hidden_states
        chosen = states[self.layer]
        return self.reader(chosen if self.keep_class_token else chosen[:, 1:]).flatten(0, 1)

    def positions(self, ids: Tensor, mask: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:
        counted = mask.long().cumsum(-1)
        return (counted - 1).masked_fill(mask == 0, 1)[None], counted[:, -1]


CLIP = "clip_vision_model"


def vision_width(vision: Mapping[str, Any]) -> int:
    """Channels of what a vision model gives; of one with several levels, of the last."""
    return int(vision["hidden_sizes"][-1] if "hidden_sizes" in vision else vision["hidden_size"])


class Qwen2VL(LanguageModel):
    """A language model whose positions have three axes, and a vision model for images of any size."""

    axes = 3

    def __init__(self, config: VARGPTConfig) -> None:
        from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig, Qwen2VLVisionConfig
        from transformers.models.qwen2_vl.modeling_qwen2_vl import (
            Qwen2VisionTransformerPretrainedModel,
            Qwen2VLTextModel,
        )

        language = {name: _copied(value) for name, value in config.language.items() if name != "model_type"}
        super().__init__(config, made(lambda: Qwen2VLTextModel(Qwen2VLTextConfig(**language))))
        seen = {name: value for name, value in config.vision.items() if name != "model_type"}
        self.merge: int = seen.get("spatial_merge_size", 2)
        self.vision = made(lambda: Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(**seen)))

    def see(self, pixels: Tensor, grids: Tensor) -> Tensor:
        dtype = next(self.vision.parameters()).dtype
        output = self.vision(pixels.to(dtype), grid_thw=grids)
        return output if isinstance(output, Tensor) else output.pooler_output

    def positions(self, ids: Tensor, mask: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:
        # arXiv 2409.12191, section 2.1: an image's tokens count frames, rows and columns from the place where it
        # begins, and text goes on behind the largest of them.
        found = torch.ones(3, *ids.shape, dtype=torch.long, device=ids.device)
        ends, image = [], 0
        for row in range(len(ids)):
            there = mask[row].bool()
            kept = (ids[row][there] == self.marks.image).tolist()
            parts, index, at = [], 0, 0
            while index < len(kept):
                if kept[index]:
                    frames, rows, columns = (int(n) for n in grids[image])
                    rows, columns, image = rows // self.merge, columns // self.merge, image + 1
                    axes = (torch.arange(frames), torch.arange(rows), torch.arange(columns))
                    parts.append(torch.cartesian_prod(*axes).T + at)
                    index += frames * rows * columns
                    at += max(frames, rows, columns)
                else:
                    stop = next((i for i in range(index, len(kept)) if kept[i]), len(kept))
                    parts.append((torch.arange(stop - index) + at).expand(3, -1))
                    at += stop - index
                    index = stop
            found[:, row, there] = torch.cat(parts, dim=1).to(ids.device)
            ends.append(at)
        return found, torch.tensor(ends, device=ids.device)


def _copied(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value  # transformers changes it in place

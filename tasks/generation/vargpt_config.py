"""VARGPT's configuration, and the published models.

Zhuang et al. 2025, "VARGPT" (arXiv 2501.12327) and "VARGPT-v1.1" (arXiv 2504.02949); official code VARGPT-family/VARGPT
and VARGPT-family/VARGPT-v1.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.infinity_config import InfinityConfig, blocks
from nextscale.tasks.generation.var import VARConfig
from nextscale.tasks.tokenizers.bitwise_schedules import schedule_of

Variant = Literal["v1", "v1.1"]


@dataclass(frozen=True)
class MarkTokens:
    """Numbers of the tokens that mean something beside words.

    Attributes:
        start: an image to draw begins.
        end: it ends.
        pad: stands for one token of an image to draw.
        image: stands for one feature of an image to read.
        eos: tokens that end an answer.
        empty: fills up shorter texts of a batch.
    """

    start: int
    end: int
    pad: int
    image: int
    eos: tuple[int, ...] = ()
    empty: int = 0


@dataclass(frozen=True)
class VARGPTConfig:
    """Attributes:

    language, vision: configurations of transformers, their ``model_type`` included for a v1 language model.
    marks: special tokens.
    var, infinity: the decoder of v1, or of v1.1; exactly one.
    vision_layer: v1: whose hidden states are what is seen of an image, counted as in transformers.
    keep_class_token: v1: the token of the whole image counts among them.
    multiple: v1.1: images to draw are filled up to a multiple of so many tokens in training.
    grid: v1.1: the grid that positions are counted on; None: the published one of the schedule's aspect ratio.
    labelled: v1: images are drawn under the label that training gives most of them. The published code samples
        under the label of dropped conditions instead.
    join_images: v1: in training, images to draw enter the language model beside images to read. The published code
        leaves them out of batches that have any to read.
    null_prompt: v1: what the user says in the row that guidance leads away from; None: that row is noise, as
        published, which says nothing of the image so far.
    guidance, temperature, top_k, top_p: to sample with where none are asked for.
    image_weight: of the loss of images beside that of text.
    folded: modulations are constants; the maps that they come from are gone.
    """

    language: dict[str, Any]
    vision: dict[str, Any]
    marks: MarkTokens
    var: VARConfig | None = None
    infinity: InfinityConfig | None = None
    vision_layer: int = -2
    keep_class_token: bool = False
    multiple: int = 1
    grid: tuple[int, ...] | None = None
    labelled: bool = True
    join_images: bool = True
    null_prompt: str | None = None
    guidance: float = 1.5
    temperature: float = 1.0
    top_k: int = 900
    top_p: float = 0.96
    image_weight: float = 1.0
    folded: bool = False

    def __post_init__(self) -> None:
        if (self.var is None) == (self.infinity is None):
            raise ValueError("a VARGPT has one decoder: give var (v1) or infinity (v1.1), and not both")
        if self.null_prompt is not None and self.var is None:
            raise ValueError("null_prompt is for v1; guidance of v1.1 leads away from what is drawn without a prompt")

    @property
    def variant(self) -> Variant:
        return "v1" if self.infinity is None else "v1.1"

    @property
    def decoder(self) -> VARConfig | InfinityConfig:
        config = self.var or self.infinity
        assert config is not None
        return config

    @property
    def schedule(self) -> ScaleSchedule:
        """Scales of the images to draw."""
        return self.decoder.schedule

    @property
    def places(self) -> int:
        """Tokens of the text that stand for one image to draw, between its start and its end."""
        return -(-self.schedule.length // self.multiple) * self.multiple


VICUNA_7B: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
CLIP_L_336: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "projection_dim": 768, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip
QWEN2_VL_7B: dict[str, Any] = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": False, "use_sliding_window": False,
}  # fmt: skip
QWEN2_VL_VISION: dict[str, Any] = {
    "depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
}  # fmt: skip


def _v1() -> VARGPTConfig:
    marks = MarkTokens(start=32002, end=32003, pad=32004, image=32000, eos=(2,), empty=32001)
    decoder = VARConfig.of_depth(30, classes=marks.start + 1)
    return VARGPTConfig(VICUNA_7B, CLIP_L_336, marks, var=decoder)


def _v11(size: str) -> VARGPTConfig:
    marks = MarkTokens(start=151657, end=151658, pad=151659, image=151655, eos=(151645, 151643), empty=151643)
    decoder = InfinityConfig(
        blocks(2048, 32, 16, chunks=8), schedule=schedule_of(1.0, size), guidance=3.0, temperature=0.5
    )
    return VARGPTConfig(
        QWEN2_VL_7B,
        QWEN2_VL_VISION,
        marks,
        infinity=decoder,
        multiple=128,
        guidance=3.0,
        temperature=0.5,
        top_p=0.97,
        image_weight=3.0,
    )


PRESETS: dict[str, VARGPTConfig] = {
    "vargpt-v1": _v1(),
    "vargpt-v1.1": _v11("0.25M"),
    "vargpt-v1.1-256": _v11("0.06M"),
}
"""The published sizes; of v1.1 also the stage at 256 pixels."""

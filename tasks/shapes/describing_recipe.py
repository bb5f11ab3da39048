"""The configuration of a describer's training runs, and small language models that know the words of the data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from nextscale.core.training import Hooks, Trainer, TrainingConfig
from nextscale.tasks.data import Examples, Load, tokenizer_of, trainer
from nextscale.tasks.generation.adapters import ADAPTED, add_adapters, merge_adapters, train_adapters_alone
from nextscale.tasks.generation.vargpt_small import small_tokenizer
from nextscale.tasks.shapes.describing import TOKENIZERS, Describer, DescriberConfig, ShapeTokenizer
from nextscale.tasks.shapes.describing_data import DescriptionSet, open_shapes, own_talks
from nextscale.tasks.shapes.describing_text import END, PATCH, START, Talk, Words, add_words, read_talks
from nextscale.tasks.shapes.describing_training import DescriberTraining, Stage, measure

MARKS = ("<empty>", "<end>", "<unknown>", PATCH, START, END, "<user>", "<assistant>", "<system>")
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@dataclass(frozen=True)
class DescriptionData:
    """Attributes:

    source: folder of shapes: prepared ones for a tokenizer of points, views for one of planes.
    conversations: JSON file of what is said of them (:func:`nextscale.tasks.shapes.describing_text.read_talks`); None:
        the data's captions, or its classes.
    validation, validation_conversations: of held-out shapes.
    points: of a surface, of those that are kept; None: all.
    noise: deviation of noise on points in training.
    fresh: draw points anew in every epoch, and encode them again.
    """

    source: str
    conversations: str | None = None
    validation: str | None = None
    validation_conversations: str | None = None
    points: int | None = None
    noise: float = 0.0
    fresh: bool = False


@dataclass(frozen=True)
class SmallLanguage:
    """A language model that is made here: a Llama of so many channels, layers and heads."""

    width: int = 128
    depth: int = 3
    heads: int = 4


def small_language(texts: Iterable[str], sizes: SmallLanguage, length: int) -> tuple[dict[str, Any], Words, Any]:
    """Configuration of a language model that knows the words of texts, its marks, and its tokenizer."""
    vocabulary = small_tokenizer(texts, length, MARKS, TEMPLATE)
    language: dict[str, Any] = {
        "model_type": "llama", "vocab_size": len(vocabulary), "hidden_size": sizes.width,
        "intermediate_size": 3 * sizes.width, "num_hidden_layers": sizes.depth, "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads, "max_position_embeddings": length, "tie_word_embeddings": False,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    return language, Words(patch=3, start=4, end=5, eos=(1,), empty=0), vocabulary


@dataclass(frozen=True)
class DescriberRecipe:
    """Train a describer of shapes. The defaults are SAR3D's first stage.

    Attributes:
        tokenizer: of shapes: SAR3D's or G3PT's, or a model with one; folder or name.
        language: a causal language model of transformers, folder or hub name; None: a small one of the data's words.
        small: its sizes.
        hidden: widths inside the projector.
        scales: so many of a shape's first are read; None: all. SAR3D reads 8 of 10.
        question: what is asked where nothing is, and of data that has captions alone.
        length: most tokens of a conversation, shapes included.
        init: a describer to go on from, instead of tokenizer and language model.
        stage: ``"projector"``, or ``"all"`` for the language model too.
        lora_rank: train low-rank adapters on the language model, and the projector; 0: none. Merged at the end.
        lora_layers: layers that they are put on.
    """

    data: DescriptionData
    tokenizer: str | None = None
    language: str | None = None
    small: SmallLanguage = field(default_factory=SmallLanguage)
    hidden: tuple[int, ...] = (1024, 2048)
    scales: int | None = None
    question: str = "What is this?"
    length: int = 2048
    init: str | None = None
    stage: Stage = "projector"
    lora_rank: int = 0
    lora_alpha: int = 32
    lora_layers: tuple[str, ...] = ADAPTED
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            output="runs/describer",
            epochs=3,
            batch_size=256,
            learning_rate=2e-3,
            weight_decay=0.0,
            schedule="cos",
            warmup_epochs=0.09,
            end_rate=0.0,
            precision="bf16",
        )
    )

    def __post_init__(self) -> None:
        if (self.init is None) == (self.tokenizer is None):
            raise ValueError("give init, a describer to go on from, or tokenizer, of shapes; and not both")
        if self.lora_rank < 0 or (self.scales is not None and self.scales < 1):
            raise ValueError(f"lora_rank is {self.lora_rank} and scales {self.scales}; expected 0 or more, 1 or more")

    def build(self, load: Load) -> Describer:
        """The model to train.

        Raises:
            ValueError: ``init`` is no describer, ``tokenizer`` none of shapes, or it has fewer scales.
        """
        if self.init is not None:
            model = load(self.init)
            if not isinstance(model, Describer):
                raise ValueError(f"{self.init} is a {type(model).__name__}; expected a describer")
            return model
        tokenizer = tokenizer_of(load(self.tokenizer))
        system = next((name for name, (kind, _) in TOKENIZERS.items() if isinstance(tokenizer, kind)), None)
        if system is None:
            raise ValueError(f"{self.tokenizer} is a {type(tokenizer).__name__}; expected a tokenizer of shapes")
        schedule = tokenizer.config.schedule
        if self.scales is not None and self.scales > len(schedule):
            raise ValueError(f"scales is {self.scales}; the tokenizer has {len(schedule)}")
        trained = None
        if self.language is None:
            texts = [self.question, *(message["content"] for _, talk in self._texts() for message in talk)]
            language, words, vocabulary = small_language(texts, self.small, self.length)
        else:
            trained, vocabulary = opened(self.language)
            words = add_words(vocabulary)
            trained.resize_token_embeddings(max(len(vocabulary), trained.get_input_embeddings().num_embeddings))
            language = {**trained.config.to_diff_dict(), "model_type": trained.config.model_type}
        codes = tokenizer.config.quantizer
        channels = codes.bits if system == "point-vq" else codes.channels
        config = DescriberConfig(
            language, words, system, channels, self.scales, self.hidden, self.question, self.length
        )
        model = Describer(config, cast(ShapeTokenizer, tokenizer), trained)
        model.vocabulary = vocabulary
        return model

    def _texts(self) -> list[Talk]:
        """All that is said, for a vocabulary."""
        if self.data.conversations is None:
            raise ValueError(
                "a small language model knows the words of conversations: give data.conversations, or a language model"
            )
        held_out = self.data.validation_conversations
        return read_talks(self.data.conversations) + ([] if held_out is None else read_talks(held_out))

    def open(self, model: Describer, held_out: bool = False) -> DescriptionSet:
        """Shapes and conversations as they train this model."""
        data = self.data
        source, talks = (
            (data.validation, data.validation_conversations) if held_out else (data.source, data.conversations)
        )
        assert source is not None
        shapes = open_shapes(source, model, data.points, 0.0 if held_out else data.noise, self.training.seed)
        said = own_talks(shapes, model.config.question) if talks is None else read_talks(talks)
        return DescriptionSet(said, shapes, model, fresh=data.fresh and not held_out)

    def trainer(self, load: Load, hooks: Hooks | None = None) -> Trainer:
        """The run, ready to start; validation is added to ``hooks`` where there are held-out shapes."""
        torch.manual_seed(self.training.seed)
        hooks, model = hooks or Hooks(), self.build(load)
        dataset = self.open(model)
        if self.lora_rank:
            add_adapters(model, self.lora_rank, self.lora_alpha, self.lora_layers)
        task = DescriberTraining(model, "all" if self.lora_rank else self.stage)
        if self.lora_rank:
            train_adapters_alone(model)
        if self.data.validation is not None and hooks.validate is None:
            held_out = self.open(model, held_out=True)
            hooks.validate = lambda step: measure(task, held_out)
        return trainer(self.training, task, dataset, hooks)

    def examples(self, run: Trainer) -> Examples:
        """Nothing to be seen: a describer writes."""
        return Examples([])

    def finish(self, run: Trainer) -> Path:
        """Write the trained (averaged) model; returns its folder."""
        model = cast(DescriberTraining, run.task).model
        with run.averaged():
            if self.lora_rank:
                merge_adapters(model)
            return model.save(Path(self.training.output) / "model")


def opened(name: str) -> tuple[Any, Any]:
    """A causal language model of transformers, and its tokenizer.

    Raises:
        FileNotFoundError: it is not here and cannot be fetched.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        raise FileNotFoundError(
            f"the language model {name!r} cannot be opened: it is no folder that transformers reads, or it is not on "
            f"this machine and the hub cannot be reached. Run `hf download {name}` where there is a network, or give a "
            "folder"
        ) from error

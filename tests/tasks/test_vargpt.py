"""VARGPT: conversations, images within them, files, memory."""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.checkpoint import CheckpointError
from nextscale.core.quantizer import QuantizerConfig
from nextscale.core.random import ImageDraws
from nextscale.core.sampling import Emission
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.transformer import TransformerConfig
from nextscale.tasks.generation.infinity_config import InfinityConfig
from nextscale.tasks.generation.infinity_transformer import InfinityBlocksConfig
from nextscale.tasks.generation.var import VARConfig
from nextscale.tasks.generation.vargpt import VARGPT
from nextscale.tasks.generation.vargpt_chat import Preview, Words
from nextscale.tasks.generation.vargpt_config import PRESETS, MarkTokens, VARGPTConfig
from nextscale.tasks.generation.vargpt_images import MessageError, Processor, fitted, open_image
from nextscale.tasks.generation.vargpt_layout import to_transformers
from nextscale.tasks.generation.vargpt_memory import cache_sizes, planned_bytes
from nextscale.tasks.generation.vargpt_sampling import cache_bytes
from nextscale.tasks.generation.vargpt_writing import Choice, add, read, write
from nextscale.tasks.tokenizers.bitwise_quantizer import BitwiseQuantizerConfig
from nextscale.tasks.tokenizers.bitwise_vq import BitwiseVQ, BitwiseVQConfig
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ, ResidualVQConfig

WORDS = [
    "<empty>",
    "<end>",
    "<unknown>",
    "<image>",
    "<start>",
    "<stop>",
    "<pad>",
    "draw",
    "a",
    "red",
    "cat",
    "what",
    "is",
]
MARKS = MarkTokens(start=4, end=5, pad=6, image=3, eos=(1,), empty=0)
SCHEDULE = ScaleSchedule.squares(1, 2, 3)
LANGUAGE = {
    "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 200, "tie_word_embeddings": False,
}  # fmt: skip
VARIANTS = ("v1", "v1.1")


def config_of(variant: str) -> VARGPTConfig:
    if variant == "v1":
        blocks = TransformerConfig(32, 2, 2)
        decoder = VARConfig(blocks, MARKS.start + 1, vocabulary=16, code_channels=4, schedule=SCHEDULE)
        vision = {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 8, "patch_size": 4,
        }  # fmt: skip
        language = {"model_type": "llama", **LANGUAGE, "rope_theta": 10000.0}
        return VARGPTConfig(language, vision, MARKS, var=decoder, top_k=0, top_p=0.0)
    blocks = InfinityBlocksConfig(32, 2, 2)
    decoder = InfinityConfig(
        blocks, text_width=32, text_length=64, pool_heads=2, token_bits=4, levels=15, schedule=SCHEDULE
    )
    vision = {
        "depth": 1, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 1, "num_heads": 2, "patch_size": 2,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
    }  # fmt: skip
    scaling = {"type": "mrope", "mrope_section": [2, 3, 3]}
    language = {**LANGUAGE, "rope_theta": 1e6, "rope_scaling": scaling, "bos_token_id": None, "eos_token_id": None}
    return VARGPTConfig(
        language, vision, MARKS, infinity=decoder, multiple=8, grid=(8, 8), guidance=3.0, temperature=0.5
    )


def made(variant: str) -> VARGPT:
    torch.manual_seed(0)
    if variant == "v1":
        tokenizer = ResidualVQ(
            ResidualVQConfig(
                AutoencoderConfig(32, (1, 1), 1, latent_channels=4), QuantizerConfig(16, 4, smoothers=1), SCHEDULE
            )
        )
    else:
        sizes = AutoencoderConfig(32, (1, 1), 1, latent_channels=4, attention=False)
        tokenizer = BitwiseVQ(BitwiseVQConfig(sizes, BitwiseQuantizerConfig(4), SCHEDULE))
    model = VARGPT(config_of(variant), tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.processor = Processor(model.config, words(), least=16)
    return model.eval()


def words():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unknown>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<empty>", eos_token="<end>")
    tokenizer.add_special_tokens({"additional_special_tokens": WORDS[2:7]})
    tokenizer.chat_template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{{ ' <image> ' if part['type'] == 'image' else part['text'] }}{% endfor %} {% endfor %}"
    )
    return tokenizer


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    return made(request.param)


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def ask(text: str, *images) -> list[dict]:
    return [
        {"role": "user", "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}]}
    ]


class Forced:
    """Emits given tokens, and keeps the scores."""

    def __init__(self, rows: int, choices: int, bits: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        shape = (1, SCHEDULE.length, choices // 2) if bits else (1, SCHEDULE.length)
        tokens = torch.randint(0, 2 if bits else choices, shape, generator=generator).expand(rows, *shape[1:])
        self.bits, self.tokens = bits, tokens

    def emit(self, context):
        start, stop = context.schedule.ranges[context.index]
        tokens, vectors = self.tokens[:, start:stop], context.pyramid.vectors
        if self.bits:
            return Emission(tokens.bool(), torch.where(tokens.bool(), *vectors[:, 0].flip(0)), context.guided_logits())
        return Emission(tokens, vectors[tokens], context.guided_logits())


def drawn(model: VARGPT, talks: Sequence, guidance=None):
    """Forced images behind conversations: scores, and the state after them."""
    with torch.inference_mode():
        prompt = model.processor.read(talks)
        state, _ = read(model, prompt.ids, prompt.mask, prompt.pixels, prompt.grids)
        start = model.language.embedding(torch.full((len(talks), 1), MARKS.start))
        add(model, state, start, torch.ones(len(talks), 1, dtype=torch.bool))
        bits = model.config.infinity is not None
        emitter = Forced(len(talks), 8 if bits else 16, bits)
        draws = ImageDraws(range(len(talks)))
        return list(model.steps(state, draws=draws, emitter=emitter, guidance=guidance)), state, prompt


# --- drawing --------------------------------------------------------------------------------------------


def test_alone_and_beside_longer_prompts(model):
    """Other lengths in the batch change nothing."""
    talks = [ask("a cat"), ask("draw a red cat a red cat", picture()), ask("draw a cat")]
    together, _, _ = drawn(model, talks)
    for row, talk in enumerate(talks):
        if row:  # v1's noise is of the row's own seed, which is the first's here
            continue
        alone, _, _ = drawn(model, [talk])
        for one, many in zip(alone, together, strict=True):
            torch.testing.assert_close(many.logits[row : row + 1], one.logits, atol=1e-4, rtol=0)


def test_text_alone_and_beside_longer_prompts(model):
    talks = [ask("a cat"), ask("draw a red cat", picture()), ask("what is a red red cat")]

    def written(part, seeds):
        with torch.inference_mode():
            prompt = model.processor.read(part)
            state, states = read(model, prompt.ids, prompt.mask, prompt.pixels, prompt.grids)
            return write(model, state, states[:, -1], Choice(seeds, temperature=1.0), 6, [1]).tokens

    assert written(talks, [5, 6, 7]) == [written([talk], [5 + row])[0] for row, talk in enumerate(talks)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_give_what_teacher_forcing_gives(variant):
    """Prompt and image at once, and scale by scale."""
    model = made(variant)
    steps, _, prompt = drawn(model, [ask("draw a red cat")], guidance=[1.0] * len(SCHEDULE))
    bits = variant == "v1.1"
    tokens = Forced(1, 8 if bits else 16, bits).tokens
    inputs = model.tokenizer.quantizer.teacher_inputs(tokens.bool() if bits else tokens, SCHEDULE)
    row = [*prompt.ids[0].tolist(), MARKS.start, *[MARKS.pad] * model.config.places, MARKS.end]
    ids = torch.tensor([row])
    with torch.inference_mode():
        _, logits = model(ids, torch.ones_like(ids), inputs, torch.zeros(1, dtype=torch.long))
    torch.testing.assert_close(torch.cat([step.logits for step in steps], 1), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_caches_hold_what_is_needed(variant, monkeypatch):
    """Keys and values of what was read, and of the image, once; the decoder's of each row."""
    from nextscale.tasks.generation import vargpt_sampling

    sessions = []
    made_session = vargpt_sampling.PaintingSession.__init__

    def spy(self, *arguments):
        made_session(self, *arguments)
        sessions.append(self)

    monkeypatch.setattr(vargpt_sampling.PaintingSession, "__init__", spy)
    model = made(variant)
    _, state, prompt = drawn(model, [ask("draw a cat"), ask("a cat")])
    heads, size, layers = 1, 16, 2
    positions = prompt.ids.shape[1] + 1 + SCHEDULE.length
    assert state.nbytes == cache_bytes(state.cache) == 2 * layers * 2 * heads * size * positions * 4
    rows = 4  # two conversations, each with and without its prompt
    assert sessions[0].cache.nbytes == 2 * layers * rows * 32 * SCHEDULE.length * 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_folding_changes_nothing_but_the_size(variant, tmp_path):
    model = made(variant)
    before, _, _ = drawn(model, [ask("draw a cat")])
    count = sum(p.numel() for p in model.parameters())
    model.fold()
    after, _, _ = drawn(model, [ask("draw a cat")])
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(other.logits, one.logits, atol=1e-5, rtol=0)
    assert sum(p.numel() for p in model.parameters()) < count
    with pytest.raises(ValueError, match="folded"):
        model.to_official()
    saved = VARGPT.from_saved(*_files(model.save(tmp_path / "folded")))
    # Weights to the bit; what is computed from them may end in other digits, as memory of a file is aligned otherwise.
    torch.testing.assert_close(saved.state_dict(), model.state_dict(), atol=0, rtol=0)
    again, _, _ = drawn(_with_words(saved), [ask("draw a cat")])
    torch.testing.assert_close(again[-1].logits, after[-1].logits, atol=1e-5, rtol=1e-5)


def _files(folder):
    from nextscale.core.checkpoint import read_folder

    return read_folder(folder)


def _with_words(model):
    model.processor = Processor(model.config, words(), least=16)
    return model


# --- conversations --------------------------------------------------------------------------------------


def _eager(model, monkeypatch, first: int):
    """The model begins an answer with a token."""
    inner = Choice.__call__
    calls = []

    def choose(self, logits, active):
        calls.append(1)
        chosen = inner(self, logits, active)
        return torch.full_like(chosen, first) if len(calls) in (1, 3) else torch.full_like(chosen, 1)

    monkeypatch.setattr(Choice, "__call__", choose)


def test_an_answer_with_an_image(model, monkeypatch):
    _eager(model, monkeypatch, MARKS.start)
    events = list(model.answer([ask("draw a cat")], seed=3))
    shown = [event for event in events if isinstance(event, Preview)]
    assert [event.index for event in shown] == [0, 1, 2] and shown[-1].finished
    assert shown[-1].image.shape == (3, 6, 6) and shown[-1].image.min() >= 0 and shown[-1].image.max() <= 1


def test_text_goes_on_after_an_image(model, monkeypatch):
    _eager(model, monkeypatch, MARKS.start)
    answer = model.chat(ask("draw a cat"), max_images=2, max_new_tokens=5)
    assert len(answer.images) == 1


def test_words_stream_and_stop_at_the_end(model, monkeypatch):
    _eager(model, monkeypatch, WORDS.index("cat"))
    events = list(model.answer([ask("what is", picture())], max_new_tokens=4))
    assert [event.text for event in events if isinstance(event, Words)] == ["cat"]


def test_generate_is_the_same_alone_and_in_a_batch(model):
    both = model.generate(["draw a cat", "what is a red cat"], seed=4, batch_size=2)
    alone = model.generate("what is a red cat", seed=5)
    assert both.shape == (2, 3, 6, 6)
    torch.testing.assert_close(both[1:], alone, atol=1e-3, rtol=0)


def test_an_answer_can_be_gone_on_from(model, monkeypatch):
    _eager(model, monkeypatch, MARKS.start)
    answer = model.chat(ask("draw a cat"))
    talk = [*ask("draw a cat"), answer.message, *ask("what is")]
    assert model.processor.read([talk]).pixels is not None


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], "no message"),
        (ask("  "), "empty"),
        (ask("what is <image>"), "marks of images"),
        (ask("what is <pad>"), "only answers have"),
        (ask("what is", "no/such/file.png"), "cannot be read"),
        (ask("cat " * 10_000), "10,000 tokens"),
        ([{"role": "user", "content": [{"type": "image"}]}], "without giving one"),
        ([{"role": "user", "content": [{"type": "sound"}]}], "'sound'"),
        ([{"role": "user"}], "role and content"),
    ],
)
def test_messages_that_cannot_be_read(model, messages, told):
    with pytest.raises(MessageError, match=told):
        model.chat(messages)


def test_images_fit_their_bounds():
    assert fitted(100, 200, 28, 3136, 12_845_056) == (112, 196)
    assert fitted(10, 10, 28, 3136, 12_845_056) == (56, 56)
    height, width = fitted(9000, 9000, 28, 3136, 1_000_000)
    assert height * width <= 1_000_000 and height % 28 == width % 28 == 0
    with pytest.raises(MessageError, match="narrow"):
        fitted(1, 500, 28, 3136, 12_845_056)
    assert open_image(torch.zeros(3, 4, 6)).size == (6, 4)


# --- files ----------------------------------------------------------------------------------------------


def test_official_and_back(model):
    content = {"model": model.to_official(), "config": json.loads(json.dumps(to_transformers(model.config)))}
    built = VARGPT.from_official(content, schedule=SCHEDULE, grid=(8, 8), multiple=8, norm_groups=32)
    again = built.to_official()
    assert set(again) == set(content["model"])
    assert all(torch.equal(again[name], value) for name, value in content["model"].items())
    published = replace(built.config, labelled=True, join_images=True)
    assert published.marks == model.config.marks and published.decoder.transformer.width == 32
    own = model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in built.state_dict().items())


def test_saved_and_back(model, tmp_path):
    loaded = VARGPT.from_saved(*_files(model.save(tmp_path / "saved")))
    loaded.home = tmp_path / "saved"
    assert loaded.config == model.config
    assert loaded.processor.encode("draw a cat")[0] == model.processor.encode("draw a cat")[0]
    torch.testing.assert_close(loaded.generate("a cat"), model.generate("a cat"), atol=0, rtol=0)


def test_sizes_that_a_state_dict_cannot_tell(model):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        VARGPT.from_official({"model": model.to_official()})


@pytest.mark.parametrize(
    ("name", "language", "decoder"),
    [("vargpt-v1", 6.738, 2.0), ("vargpt-v1.1", 7.616, 2.2)],
)
def test_published_sizes(name, language, decoder):
    """Billions of weights: of the language model alone, and about those of the decoder."""
    config = PRESETS[name]
    with torch.device("meta"):
        tokenizer = ResidualVQ() if config.var is not None else BitwiseVQ()
        model = VARGPT(config, tokenizer)
    inside = [p.numel() for n, p in model.language.named_parameters() if n.startswith(("text.", "words."))]
    assert sum(inside) / 1e9 == pytest.approx(language, abs=0.01)
    own = sum(p.numel() for n, p in model.decoder.named_parameters() if not n.startswith("tokenizer."))
    assert own / 1e9 == pytest.approx(decoder, abs=0.2)
    if config.var is not None:
        before = sum(p.numel() for p in model.parameters())
        model.fold()
        assert (before - sum(p.numel() for p in model.parameters())) / 1e9 == pytest.approx(0.66 + 0.06, abs=0.02)


def test_a_model_has_one_decoder():
    with pytest.raises(ValueError, match="one decoder"):
        VARGPTConfig({}, {}, MARKS)


def test_memory_that_is_planned():
    """The 7.6 B and 2.2 B model at 512 pixels, whole and in 4 bits."""
    whole, small = (planned_bytes(PRESETS["vargpt-v1.1"], 1000, bits) for bits in (16, 4))
    assert whole["sum"] < 24e9 and small["sum"] < 14e9
    sizes = cache_sizes(PRESETS["vargpt-v1.1"], 1000)
    assert sizes["language cache"] == 2 * 28 * 4 * 128 * (1000 + 1 + 2521) * 2
    assert sizes["decoder cache"] == 2 * 32 * 2048 * 2521 * 2 * 2
    with pytest.raises(ValueError, match="16, 8 or 4"):
        planned_bytes(PRESETS["vargpt-v1"], 1, 3)


def test_packed_weights(model):
    """Layers of 8 bits in language model and decoder answer nearly alike."""
    from copy import deepcopy

    from nextscale.tasks.generation.litevar import compress, weights_only
    from nextscale.tasks.generation.litevar_packing import PackedLinear

    packed = deepcopy(model)
    compress(packed, weights_only(packed, 8))
    names = [name for name, module in packed.named_modules() if isinstance(module, PackedLinear)]
    assert any(name.startswith("language.text.layers.") for name in names)
    assert any(name.startswith("decoder.transformer.blocks.") for name in names)
    ids = torch.tensor([[7, 8, 9, 10]])
    with torch.inference_mode():
        one, other = (each(ids, torch.ones_like(ids))[0] for each in (model, packed))
    assert (one - other).norm() < 0.1 * one.norm()

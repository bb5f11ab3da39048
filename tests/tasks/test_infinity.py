"""Infinity: prompts to pictures, the same alone and in any batch; texts read once; the official layout both ways."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nextscale
import nextscale.loading
from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.bitwise import BitwiseEmitter
from nextscale.core.cache import KeyValueCache
from nextscale.core.checkpoint import CheckpointError
from nextscale.core.cross_attention import CrossAttention, Packed
from nextscale.core.random import ImageDraws
from nextscale.core.sampling import Accepted, sample
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.infinity import Infinity, is_official
from nextscale.tasks.generation.infinity_config import PRESETS, InfinityConfig
from nextscale.tasks.generation.infinity_training import initialize
from nextscale.tasks.generation.infinity_transformer import InfinityBlocksConfig
from nextscale.tasks.generation.litevar_packing import PackedLinear
from nextscale.tasks.generation.text import TextEncoderConfig, TextFeatures
from nextscale.tasks.generation.text_small import make_encoder
from nextscale.tasks.tokenizers.bitwise_quantizer import BitwiseQuantizerConfig
from nextscale.tasks.tokenizers.bitwise_schedules import schedule_of
from nextscale.tasks.tokenizers.bitwise_vq import BitwiseVQ, BitwiseVQConfig

SCHEDULE = ScaleSchedule.parse("1 2 3x2 4x3")
BLOCKS: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "mlp_ratio": 2.0}


def build(tiny: SimpleNamespace, *, patch: int = 1, blocks: dict[str, Any] | None = None, **options: Any) -> Infinity:
    torch.manual_seed(0)
    autoencoder = AutoencoderConfig(32, (1,), 1, 4, attention=False)
    tokenizer = BitwiseVQ(BitwiseVQConfig(autoencoder, BitwiseQuantizerConfig(4, patch), SCHEDULE))
    config = InfinityConfig(
        InfinityBlocksConfig(**{**BLOCKS, **(blocks or {})}),
        **{"text_width": 16, "text_length": 8, "pool_heads": 2, "token_bits": 4 * patch**2, "schedule": SCHEDULE,
           "text": TextEncoderConfig("nowhere"), "guidance": 3.0, "temperature": 1.0, **options},
    )  # fmt: skip
    model = initialize(Infinity(config, tokenizer), modulation=1, gate=1, head=1)
    for part in (model.transformer, model.head, model.word_embedding, model.memory):
        tiny.scattered(part, 1, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model(tiny: SimpleNamespace) -> Infinity:
    return build(tiny)


def texts(*lengths: int, seed: int = 0) -> TextFeatures:
    generator = torch.Generator().manual_seed(seed)
    return TextFeatures(Packed(torch.randn(sum(lengths), 16, generator=generator), lengths))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often keys and values of texts are made, and how many rows are written to caches."""
    counts = {"texts": 0, "rows": 0, "room": 0}
    remember, append = CrossAttention.remember, KeyValueCache.append

    def remembering(self: CrossAttention, memory: Packed) -> Any:
        counts["texts"] += len(memory)
        return remember(self, memory)

    def appending(self: KeyValueCache, layer: int, key: Any, value: Any) -> Any:
        counts["rows"] += key.shape[0] * key.shape[1]
        counts["room"] = self.length
        return append(self, layer, key, value)

    monkeypatch.setattr(CrossAttention, "remember", remembering)
    monkeypatch.setattr(KeyValueCache, "append", appending)
    yield counts


# --- the network ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"patch": 2, "positions": "shrunk"},
        {"positions": "plain", "blocks": {"level_each_chunk": True, "chunks": 2, "cross_gate": 0.5}},
        {"blocks": {"level_each_chunk": True, "text_precision": "bfloat16"}},
    ],
)
def test_stepping_gives_what_the_teacher_forced_call_gives(options: dict[str, Any], tiny: SimpleNamespace) -> None:
    model = build(tiny, **options)
    text = texts(3, 5).states
    draws = ImageDraws([0, 1])
    steps = list(model.steps(text, draws=draws, guidance=1.0, emitter=BitwiseEmitter()))
    tokens = torch.cat([step.tokens for step in steps], dim=1)
    assert 0 < tokens.float().mean() < 1
    with torch.inference_mode():
        inputs = model.tokenizer.quantizer.teacher_inputs(tokens, SCHEDULE)
        at_once = model(inputs, text, SCHEDULE)
        torch.testing.assert_close(torch.cat([step.logits for step in steps], dim=1), at_once, atol=2e-5, rtol=1e-4)
        part = model(inputs[:, : SCHEDULE.prefix(3).length - 1], text, SCHEDULE.prefix(3), (64, 48))
        full = model(inputs, text, SCHEDULE, (64, 48))
        torch.testing.assert_close(part, full[:, : SCHEDULE.prefix(3).length], atol=2e-5, rtol=1e-4)


def test_sampling_goes_on_from_accepted_scales(model: Infinity) -> None:
    text, emitter = texts(3).states, BitwiseEmitter(top_k=1)
    steps = list(model.steps(text, draws=ImageDraws([0]), emitter=emitter))
    network, quantizer = model.network(text), model.tokenizer.quantizer
    inputs = [quantizer.next_input(steps[index].total, SCHEDULE, index + 1) for index in range(2)]
    accepted = Accepted(2, steps[1].total, torch.cat(inputs, dim=1))
    branches = network.guidance.branches(torch.tensor([0]), torch.tensor([1]))
    rest = list(sample(network, quantizer, SCHEDULE, branches, emitter, ImageDraws([0]), accepted=accepted))
    assert [step.index for step in rest] == [2, 3]
    torch.testing.assert_close(rest[-1].logits, steps[-1].logits, atol=2e-5, rtol=1e-4)


def test_forgetting_the_scale_changes_sampling_alone(tiny: SimpleNamespace, model: Infinity) -> None:
    forgetful = build(tiny, restart_positions=True)
    text, inputs = texts(3).states, torch.randn(1, SCHEDULE.length - 1, 4)
    with torch.inference_mode():
        assert torch.equal(forgetful(inputs, text), model(inputs, text))
    logits = [
        [step.logits for step in each.steps(text, draws=ImageDraws([0]), emitter=BitwiseEmitter(1))]
        for each in (forgetful, model)
    ]
    torch.testing.assert_close(logits[0][0], logits[1][0])
    assert not torch.allclose(logits[0][1], logits[1][1], atol=1e-3)


def test_dropped_texts_become_the_learned_one_and_teach_it(model: Infinity) -> None:
    text = texts(2, 3).states
    dropped = model.drop_text(text, torch.tensor([False, True]))
    assert torch.equal(dropped.values[:2], text.values[:2])
    assert torch.equal(dropped.values[2:], model.null_text[:3])
    dropped.values.sum().backward()
    assert model.null_text.grad is not None
    assert model.null_text.grad[:, 0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    kept = model.drop_text(text, torch.tensor([False, False]))
    assert torch.equal(kept.values, text.values)
    assert kept.values.requires_grad
    with pytest.raises(ValueError, match="a text has 9 positions, the model at most 8"):
        model.drop_text(texts(9).states, torch.tensor([True]))


# --- guidance ---------------------------------------------------------------------------------------


def scores(model: Infinity, **options: Any) -> list[torch.Tensor]:
    steps = model.steps(texts(3, 2).states, draws=ImageDraws([0, 1]), emitter=BitwiseEmitter(1), **options)
    return [step.logits for step in steps]


def test_guidance_on_scores_and_blocks(model: Infinity) -> None:
    plain, other = scores(model, guidance=1.0)[0], scores(model, guidance=0.0)[0]
    torch.testing.assert_close(scores(model, guidance=3.0)[0], 3 * plain - 2 * other, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores(model, guidance=[1.0, 3.0, 3.0, 3.0])[0], plain, atol=1e-5, rtol=1e-5)
    # After the blend of the last block both halves go on alike, so the scores differ by the head's modulation alone.
    blended = scores(model, guidance=3.0, guidance_layers=(-1,))[0]
    assert not torch.allclose(blended, plain, atol=1e-3)
    torch.testing.assert_close(scores(model, guidance=1.0, guidance_layers=(-1,))[0], plain)
    twice = scores(model, guidance=3.0, guidance_layers=(-2, 0))[0]
    assert not torch.allclose(twice, blended, atol=1e-3)
    negative = scores(model, guidance=3.0, negative=texts(1, 4, seed=5).states)
    assert not torch.allclose(negative[0], scores(model, guidance=3.0)[0], atol=1e-3)
    same = scores(model, guidance=3.0, negative=texts(3, 2).states)
    torch.testing.assert_close(same[0], plain, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"guidance layers are \[1\]; expected 0"):
        scores(model, guidance_layers=(1,))
    with pytest.raises(ValueError, match="2 guidance strengths were given for 4 scales"):
        scores(model, guidance=[1.0, 2.0])


def test_given_bits_replace_drawn_ones_and_leave_the_others_draws_alone(model: Infinity) -> None:
    given = torch.ones(1, SCHEDULE.prefix(2).length, 4, dtype=torch.bool)
    emitter = BitwiseEmitter(given=given)
    steps = list(model.steps(texts(3).states, draws=ImageDraws([0]), emitter=emitter))
    assert torch.equal(torch.cat([step.tokens for step in steps[:2]], dim=1), given)
    codes = model.tokenizer.quantizer.codes(steps[2].tokens)
    torch.testing.assert_close(steps[2].codes, codes)


# --- pictures ---------------------------------------------------------------------------------------


def test_an_image_is_the_same_alone_and_in_any_batch(model: Infinity) -> None:
    prompts = texts(3, 5, 1)
    together = model.generate(prompts, n=4, seed=7, batch_size=3)
    assert together.shape == (4, 3, 4, 3)
    assert together.min() >= 0
    assert together.max() <= 1
    for index in range(4):
        alone = model.generate(prompts.select([index % 3]), seed=7 + index)
        torch.testing.assert_close(alone[0], together[index], atol=1e-4, rtol=0)
    assert not torch.allclose(together[0], together[3], atol=1e-3)
    negative = model.generate(prompts, negative_prompt=texts(2, seed=3), seed=7)
    assert not torch.allclose(negative, together[:3], atol=1e-3)
    each = model.generate(prompts, negative_prompt=texts(2, 2, 2, seed=3), seed=7)
    assert each.shape == negative.shape


def test_texts_are_read_once_and_rows_written_once(model: Infinity, counted: dict[str, int]) -> None:
    depth = model.config.transformer.depth
    list(model.draw(texts(3), n=5, batch_size=2))
    assert counted["texts"] == depth * 2  # the prompt and what stands for none, for three batches and all scales
    assert counted["rows"] == depth * 2 * 5 * SCHEDULE.length
    assert counted["room"] == SCHEDULE.length
    counted.update(texts=0, rows=0)
    list(model.draw(texts(3, 2), n=2, guidance=1.0))
    assert counted["texts"] == depth * 2
    assert counted["rows"] == depth * 2 * SCHEDULE.length  # without guidance there is one row an image


def test_official_draws_and_what_forms(model: Infinity) -> None:
    done: list[tuple[int, int]] = []
    [first, second] = model.draw(
        texts(2, 3), n=3, batch_size=2, official_draws=True, forming=1, progress=lambda *at: done.append(at)
    )
    assert done == [(i + 1, 8) for i in range(8)]
    assert (first.texts, second.texts, first.seeds) == ([0, 1], [0], [0, 1])
    assert first.forming is not None
    assert first.forming.shape == (4, 1, 3, 4, 3)
    torch.testing.assert_close(first.forming[-1, 0], first.images[0], atol=1e-5, rtol=0)
    assert second.forming is None
    assert first.tokens.shape == (2, SCHEDULE.length, 4)


def test_ratios_sizes_and_lists(model: Infinity, tiny: SimpleNamespace) -> None:
    assert model.schedule_of() == SCHEDULE
    assert model.schedule_of(ratio="16:9", size=256) == schedule_of(0.571, "0.06M")
    assert model.generate(texts(2), schedule="1 2x3", guidance=1.0).shape == (1, 3, 2, 3)
    with pytest.raises(ValueError, match="are of no published size: give size or schedule instead of ratio alone"):
        model.generate(texts(2), ratio="16:9")
    published = build(tiny, schedule=schedule_of(1.0, "0.06M"), levels=15)
    assert published.schedule_of(ratio="9:16") == schedule_of(1.75, "0.06M")
    with pytest.raises(ValueError, match="the model has 15 levels, the schedule 16 scales"):
        model.generate(texts(2), schedule=" ".join(map(str, range(1, 17))))


def test_prompts(tmp_path: Path, tiny: SimpleNamespace) -> None:
    encoder = make_encoder(tmp_path / "words", ["a red fox"], width=16)
    model = build(tiny, text=TextEncoderConfig(str(encoder), max_length=8))
    images = model.generate(["a red fox", "", "🦊"], seed=3, release_encoder=True)
    assert images.shape == (3, 3, 4, 3)
    assert not model.text_encoder.loaded
    torch.testing.assert_close(model.generate("", seed=4)[0], images[1], atol=1e-4, rtol=0)
    loaded = nextscale.load(model.save(tmp_path / "saved"), device="cpu")
    encoder.rename(tmp_path / "moved")
    torch.testing.assert_close(loaded.generate("a red fox", seed=3)[0], images[0], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="the list of prompts is empty"):
        model.generate([])
    with pytest.raises(ValueError, match="2 negative prompts were given for 1 prompts"):
        model.generate(texts(2), negative_prompt=texts(2, 2))
    with pytest.raises(ValueError, match="the text encoder gives 3 channels, the model reads 16"):
        model.generate(TextFeatures(Packed(torch.zeros(2, 3), (2,))))


# --- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "blocks", [{}, {"chunks": 2}, {"chunks": 2, "depth": 4, "cross_gate": 1.0, "text_precision": "bfloat16"}]
)
def test_official_round_trip(blocks: dict[str, Any], tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = build(tiny, blocks=blocks, text=TextEncoderConfig("google/flan-t5-xl", "t5", 512))
    state = model.to_official()
    name = "block_chunks.1.module.0.sa.scale_mul_1H11" if "chunks" in blocks else "blocks.1.sa.scale_mul_1H11"
    assert state[name].shape == (1, 2, 1, 1)
    assert state["text_proj_for_sos.ca.zero_k_bias"].shape == (16,)
    assert is_official(state)
    torch.save({"trainer": {"gpt_fsdp": {**state, "lvl_1L": torch.zeros(1, 3)}}, "epoch": 1}, tmp_path / "gpt.pth")
    options = {
        "schedule": SCHEDULE,
        "text_precision": model.config.transformer.text_precision,
        "guidance": 3.0,
        "temperature": 1.0,
    }
    again = nextscale.load(tmp_path / "gpt.pth", device="cpu", tokenizer=model.tokenizer, **options)
    assert again.config.transformer.chunks == blocks.get("chunks", 1)
    assert again.to_official().keys() == state.keys()
    torch.testing.assert_close(again.generate(texts(3)), model.generate(texts(3)))
    assert Infinity.from_official(state, model.tokenizer).config.transformer.text_precision == "bfloat16"


def test_files_in_parts(model: Infinity, tmp_path: Path) -> None:
    import json

    from safetensors.torch import save_file

    state = model.to_official()
    names = sorted(state)
    folder = tmp_path / "parts"
    folder.mkdir()
    places = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(names)}
    for part in set(places.values()):
        save_file({n: state[n].contiguous() for n in names if places[n] == part}, folder / part)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    again = nextscale.load(folder, device="cpu", tokenizer=model.tokenizer)
    assert again.to_official().keys() == state.keys()
    index.write_text(json.dumps({"weight_map": {"x": "../outside.safetensors"}}))
    with pytest.raises(CheckpointError, match="not a file of its folder"):
        nextscale.load(folder, device="cpu", tokenizer=model.tokenizer)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="is no index of a state dict"):
        nextscale.load(folder, device="cpu", tokenizer=model.tokenizer)


def test_folders_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    import huggingface_hub

    from nextscale.hub import HubError, cached, fetch

    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: str(tmp_path))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert cached("who/what", "weights/") is None
    (folder / "x.index.json").write_text(json.dumps({"weight_map": {"a": "part-0.bin"}}))
    assert cached("who/what", "weights/") is None  # a part is missing
    with pytest.raises(HubError, match="HF_HUB_OFFLINE forbids the network"):
        fetch("who/what", "weights/")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert fetch("who/what", "weights/") == folder
    (folder / "part-0.bin").write_bytes(b"")
    assert cached("who/what", "weights/") == folder


def test_a_tokenizer_of_other_bits_is_refused_and_the_right_one_named(model: Infinity, tiny: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match=r"speaks 32 bits per token, the tokenizer 4 .*infinity_vae_d32reg\.pth does"):
        Infinity(InfinityConfig(InfinityBlocksConfig(**BLOCKS)), model.tokenizer)
    with pytest.raises(ValueError, match="3 blocks do not divide into 2 chunks"):
        InfinityBlocksConfig(16, 3, 2, chunks=2)
    with pytest.raises(CheckpointError, match="was found"):
        Infinity.from_official({"x": torch.zeros(1)}, model.tokenizer)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("125m", 0.125),
        ("1b", 0.941),
        ("2b", 2.205),
        ("layer32", 2.257),
        ("layer48", 8.767),
        ("8b", 8.376),
        ("20b", 19.95),
    ],
)
def test_presets_have_the_published_sizes(name: str, billions: float) -> None:
    config = PRESETS[f"infinity-{name}"]
    with torch.device("meta"):
        bits = config.token_bits // 4 if config.token_bits == 56 else config.token_bits
        autoencoder = AutoencoderConfig(128, (1, 2, 4, 4), 2, bits, attention=False)
        tokenizer = BitwiseVQ(
            BitwiseVQConfig(autoencoder, BitwiseQuantizerConfig(bits, config.token_bits // bits // 2 or 1))
        )
        model = Infinity(config, tokenizer)
        count = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("tokenizer."))
        assert count / 1e9 == pytest.approx(billions, rel=3e-3)
        if name not in ("2b", "8b"):
            return
        rows = 2  # with guidance
        cache = model.transformer.allocate_cache(rows, config.schedule.length, torch.bfloat16)
    weights = 2 * count + 2 * sum(p.numel() for p in tokenizer.parameters())
    assert cache.nbytes == pytest.approx({"2b": 5.52e9, "8b": 12.07e9}[name], rel=0.01)
    if name == "2b":  # room for what the blocks and the decoder compute on the way, under 12 GB
        assert weights + cache.nbytes < 10.5e9


# --- precision and memory ---------------------------------------------------------------------------


def test_half_precision_and_recomputed_blocks(tiny: SimpleNamespace, model: Infinity) -> None:
    half = nextscale.loading.cast(build(tiny), torch.bfloat16)
    assert half.transformer.blocks[0].attention.log_scale.dtype == torch.float32
    images = half.generate(texts(3, 2), n=2)
    assert images.dtype == torch.float32
    assert images.isfinite().all()
    text, inputs = texts(3).states, torch.randn(1, SCHEDULE.length - 1, 4)
    logits = half(inputs, text.to("cpu", torch.bfloat16))
    torch.testing.assert_close(logits, model(inputs, text), atol=0.5, rtol=0.2)
    gradients = []
    for again in (False, True):
        trained = build(tiny).train()
        trained.transformer.gradient_checkpointing = again
        trained(inputs, text).square().mean().backward()
        gradients.append(trained.word_embedding.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_weights(bits: int, model: Infinity, tmp_path: Path) -> None:
    """Blocks of 8 or 4 bits draw nearly the same, take that many bits, and come back from their files as they are."""
    source = model.save(tmp_path / "plain")
    packed = nextscale.load(source, device="cpu", weight_bits=bits)
    layers = [module for module in packed.modules() if isinstance(module, PackedLinear)]
    assert {layer.bits for layer in layers} == {bits}
    assert len(layers) == sum(isinstance(module, torch.nn.Linear) for module in model.transformer.blocks.modules())
    scores = [each(torch.zeros(1, SCHEDULE.length - 1, 4), texts(3).states) for each in (model, packed)]
    assert scores[0].sub(scores[1]).abs().max() < scores[0].abs().max() * (0.05 if bits == 8 else 0.5)
    again = nextscale.load(packed.save(tmp_path / "packed"), device="cpu")
    assert torch.equal(again.generate(texts(3), seed=2), packed.generate(texts(3), seed=2))
    with pytest.raises(ValueError, match="no place in the official layout"):
        again.to_official()
    with pytest.raises(ValueError, match="compressed already"):
        nextscale.load(tmp_path / "packed", device="cpu", weight_bits=8)
    with pytest.raises(ValueError, match="give lite or weight_bits, not both"):
        nextscale.load(source, device="cpu", weight_bits=8, lite="plan")

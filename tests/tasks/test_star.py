"""STAR: prompts to pictures, the same alone and in any batch; the stable sampler; the official layout both ways."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nextscale
import nextscale.loading
from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.checkpoint import CheckpointError
from nextscale.core.cross_attention import CrossAttention, Packed
from nextscale.core.random import ImageDraws
from nextscale.core.sampling import Accepted, classifier_free, sample
from nextscale.core.schedule import ScaleSchedule
from nextscale.models import MODELS
from nextscale.systems import SYSTEMS
from nextscale.tasks.generation.star import STAR, is_official
from nextscale.tasks.generation.star_config import PRESETS, STARConfig
from nextscale.tasks.generation.star_head import commit_counts
from nextscale.tasks.generation.star_sampling import STAREmitter, STARSession
from nextscale.tasks.generation.star_training import initialize
from nextscale.tasks.generation.star_transformer import STARBlocksConfig, rotation_of
from nextscale.tasks.generation.text import TextEncoder, TextEncoderConfig, TextFeatures
from nextscale.tasks.generation.text_small import make_encoder
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ, ResidualVQConfig

SCHEDULE = ScaleSchedule.squares(1, 2, 3, 4)


def build(tiny: SimpleNamespace, *, blocks: dict[str, Any] | None = None, **options: Any) -> STAR:
    tokenizer = tiny.tokenizer(schedule=options.get("schedule", SCHEDULE))
    sizes = {"width": 16, "depth": 2, "heads": 2, "mlp_ratio": 2.0, "text_width": 12, **(blocks or {})}
    config = STARConfig(
        STARBlocksConfig(**sizes),
        **{"vocabulary": 16, "code_channels": 4, "schedule": SCHEDULE, "text": TextEncoderConfig("nowhere"), **options},
    )
    torch.manual_seed(0)
    model = initialize(STAR(config, tokenizer), head=1)
    for name, part in model.named_children():
        if name != "tokenizer":
            tiny.scattered(part, 1, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model(tiny: SimpleNamespace) -> STAR:
    return build(tiny)


@pytest.fixture(scope="module")
def stable(tiny: SimpleNamespace) -> STAR:
    return build(tiny, stable_from=2)


def texts(*lengths: int, seed: int = 0) -> TextFeatures:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(sum(lengths), 12, generator=generator)
    return TextFeatures(Packed(states, lengths), torch.randn(len(lengths), 12, generator=generator))


def draws_of(*seeds: int) -> ImageDraws:
    return ImageDraws(seeds)


# --- the network ------------------------------------------------------------------------------------

FORMS: list[dict[str, Any]] = [
    {},
    {"blocks": {"cross_attention": "first"}},
    {"blocks": {"cross_attention": "none", "attention": "dot"}, "head_norm": False, "rotary": False},
    {"blocks": {"conditioning": "shared"}, "add_levels": False, "rotary_span": None},
    {"schedule": ScaleSchedule.squares(2, 3, 4), "rotary": False, "blocks": {"conditioning": "shared"}},
]


@pytest.mark.parametrize("options", FORMS)
def test_stepping_gives_what_the_teacher_forced_call_gives(options: dict[str, Any], tiny: SimpleNamespace) -> None:
    model, text = build(tiny, **options), texts(3, 5)
    schedule = model.config.schedule
    steps = list(model.steps(text, draws=draws_of(0, 1), guidance=0.0, share_first=True))
    tokens = torch.cat([step.tokens for step in steps], dim=1)
    with torch.inference_mode():
        inputs = model.tokenizer.quantizer.teacher_inputs(tokens, schedule)
        at_once = model(inputs, text)
        torch.testing.assert_close(torch.cat([step.logits for step in steps], dim=1), at_once, atol=2e-5, rtol=1e-4)


def test_sampling_goes_on_from_accepted_scales(model: STAR) -> None:
    text, other, emitter = texts(3), texts(2, seed=1), STAREmitter((2.0,) * 4, top_k=1)
    steps = list(model.steps(text, draws=draws_of(0), other=other, guidance=2.0, emitter=emitter))
    quantizer = model.tokenizer.quantizer
    inputs = [quantizer.next_input(steps[index].total, SCHEDULE, index + 1) for index in range(2)]
    branches = classifier_free(torch.tensor([0]), torch.tensor([1]), 2.0, SCHEDULE)
    accepted = Accepted(2, steps[1].total, torch.cat(inputs, dim=1))
    network = model.network(text, other)
    rest = list(sample(network, quantizer, SCHEDULE, branches, emitter, draws_of(0), accepted=accepted))
    torch.testing.assert_close(rest[-1].logits, steps[-1].logits, atol=2e-5, rtol=1e-4)


def test_positions_cover_the_same_span_in_every_scale() -> None:
    rotation = rotation_of(ScaleSchedule.parse("1 3 2x5"), 8, 100.0, 64.0)
    angles = torch.atan2(rotation.sin, rotation.cos)
    assert not angles[0].any()
    column, row = torch.tensor([0.0, 32.0, 64.0]), torch.tensor([0.0, 64.0])
    turned = (torch.outer(column, torch.tensor([1.0, 0.1])).sin(), torch.outer(row, torch.tensor([1.0, 0.1])).sin())
    torch.testing.assert_close(rotation.sin[1:4, :2], turned[0], atol=1e-5, rtol=0)  # columns turn the first half
    torch.testing.assert_close(rotation.sin[1:10:3, 2:], turned[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(rotation.sin[10:20:5, 2:], turned[1], atol=1e-5, rtol=0)
    counted = rotation_of(ScaleSchedule.parse("3"), 8, 100.0, None)
    torch.testing.assert_close(counted.sin[:, 0], torch.arange(3).repeat(3).float().sin())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c.transformer, conditioning="block"), "has no modulation by block"),
        (lambda c: replace(c.transformer, cross_attention="row"), "cross_attention is 'row', expected"),
        (lambda c: replace(c, add_levels=False), "nothing would tell the scales apart"),
        (lambda c: replace(c, sample_version="2048"), "sample_version is '2048', expected"),
        (lambda c: replace(c, stable_from=4), "stable_from is 4, and the list has 4 scales"),
    ],
)
def test_wrong_configurations_are_named(change: Callable[[STARConfig], Any], message: str, model: STAR) -> None:
    with pytest.raises(ValueError, match=message):
        change(model.config)


# --- texts ------------------------------------------------------------------------------------------


def test_which_text_each_row_reads(tiny: SimpleNamespace) -> None:
    inputs = torch.randn(2, SCHEDULE.length - 1, 4)
    both, swapped = texts(3, 5), texts(3, 5)
    swapped = TextFeatures(swapped.states.select([0, 0]), swapped.pooled)
    for form in ("own", "first"):
        model = build(tiny, blocks={"cross_attention": form})
        with torch.inference_mode():
            same = torch.allclose(model(inputs, both)[1], model(inputs, swapped)[1], atol=1e-5)
            torch.testing.assert_close(model(inputs, both)[0], model(inputs, swapped)[0])
        assert same is (form == "first")


@pytest.mark.parametrize("form", ["own", "first"])
def test_an_image_is_the_same_alone_and_in_any_batch(form: str, tiny: SimpleNamespace) -> None:
    model, prompts = build(tiny, stable_from=2, blocks={"cross_attention": form}), texts(3, 5, 1)
    given: dict[str, Any] = {"negative_prompt": texts(2, seed=3), "guidance": 2.0, "top_k": 6}
    together = model.generate(prompts, n=4, seed=7, batch_size=3, **given)
    assert together.shape == (4, 3, 8, 8)
    assert together.min() >= 0 and together.max() <= 1
    for index in range(4):
        alone = model.generate(prompts.select([index % 3]), seed=7 + index, **given)
        torch.testing.assert_close(alone[0], together[index], atol=1e-4, rtol=0)
    assert not torch.allclose(together[0], together[3], atol=1e-3)
    # In the official code's batches the first image reads for all.
    shared = model.generate(prompts, n=4, seed=7, share_first=True, **given)
    torch.testing.assert_close(shared[0], together[0], atol=1e-4, rtol=0)
    assert torch.allclose(shared[1], together[1], atol=1e-3) is (form == "own")


def test_the_first_row_reads_for_a_whole_official_batch(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(tiny, blocks={"cross_attention": "first"})
    rows: list[int] = []
    attend = CrossAttention.forward

    def counting(self: CrossAttention, x: torch.Tensor, memory: Any) -> torch.Tensor:
        rows.append(len(x))
        return attend(self, x, memory)

    monkeypatch.setattr(CrossAttention, "forward", counting)
    other = texts(2, seed=3)
    model.generate(texts(3, 5), negative_prompt=other, official_draws=True)
    assert set(rows) == {1}  # of four rows
    rows.clear()
    model.generate(texts(3, 5), negative_prompt=other)
    assert set(rows) == {2}  # the images' first rows


def test_texts_are_read_once(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"texts": 0}
    remember = CrossAttention.remember

    def remembering(self: CrossAttention, memory: Packed) -> Any:
        counts["texts"] += len(memory)
        return remember(self, memory)

    monkeypatch.setattr(CrossAttention, "remember", remembering)
    for form, read in (("own", 2), ("first", 1)):
        model = build(tiny, blocks={"cross_attention": form})
        counts["texts"] = 0
        list(model.draw(texts(3), n=5, batch_size=2, negative_prompt=texts(1, seed=2)))
        assert counts["texts"] == read * 2  # of two blocks; the empty text is read where rows read their own
        session = STARSession(model.network(texts(3), guided=False), torch.tensor([0]), SCHEDULE)
        assert session.cache.length == SCHEDULE.length


def test_prompts_and_the_empty_one(tmp_path: Path, tiny: SimpleNamespace) -> None:
    encoder = make_encoder(tmp_path / "words", ["a red fox"], kind="clip", width=12)
    model = build(tiny, text=TextEncoderConfig(str(encoder), max_length=8))
    images = model.generate(["a red fox", "", "🦊"], seed=3, release_encoder=True)
    assert images.shape == (3, 3, 8, 8)
    given = model.generate("a red fox", seed=3, negative_prompt="")
    torch.testing.assert_close(given[0], images[0], atol=1e-4, rtol=0)
    loaded = nextscale.load(model.save(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(loaded.generate("a red fox", seed=3), given, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="gives no vector of a whole text"):
        model.generate(TextFeatures(texts(2).states))
    with pytest.raises(ValueError, match="draws 8 x 8 pixels, not ratio 16:9"):
        model.generate("a fox", ratio="16:9")
    assert model.generate("a fox", schedule="1 2x3 3x4").shape == (1, 3, 6, 8)
    with pytest.raises(ValueError, match=r"has 4 levels and begins with 1 token\(s\), which the scales '1 1 1 1 1'"):
        model.generate("a fox", schedule="1 1 1 1 1")


def test_encoders_in_the_layout_of_pipelines(tmp_path: Path) -> None:
    whole = make_encoder(tmp_path / "whole", ["a red fox"], kind="clip", width=12)
    for part in ("tokenizer", "text_encoder"):
        folder = tmp_path / "pipeline" / part
        folder.mkdir(parents=True)
        for path in whole.iterdir():
            if ("token" in path.name) == (part == "tokenizer"):
                (folder / path.name).write_bytes(path.read_bytes())
    found = [TextEncoder(TextEncoderConfig(str(tmp_path / name)), device="cpu") for name in ("whole", "pipeline")]
    states = [encoder.encode(["a fox", ""]) for encoder in found]
    assert torch.equal(states[0].states.values, states[1].states.values)
    assert states[0].pooled is not None and torch.equal(states[0].pooled, states[1].pooled)


# --- the stable sampler -----------------------------------------------------------------------------


def test_how_many_tokens_become_known() -> None:
    assert commit_counts(256, 8) == (1, 18, 26, 32, 38, 43, 48, 50)
    assert sum(commit_counts(4096, 15)) == 4096
    assert sum(commit_counts(4, 8)) == 4 and commit_counts(4, 8)[-1] < 0


@pytest.mark.parametrize("version", ["1024", "new"])
def test_known_tokens_stay_and_done_scales_stop(version: Any, stable: STAR, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[int, list[torch.Tensor]] = {2: [], 3: []}
    asked = STARSession.stable_logits

    def watching(self: STARSession, index: int, hidden: Any, rows: slice, codes: torch.Tensor) -> torch.Tensor:
        shown[index].append((codes.abs().sum(-1) > 0).sum(1))
        return asked(self, index, hidden, rows, codes)

    monkeypatch.setattr(STARSession, "stable_logits", watching)
    emitter = stable.emitter(SCHEDULE, 2.0, version, top_k=4)
    steps = list(
        stable.steps(texts(3, 5), draws=draws_of(0, 1), other=texts(1, 2, seed=1), guidance=2.0, emitter=emitter)
    )
    last = steps[-1]
    torch.testing.assert_close(last.codes, stable.tokenizer.quantizer.lookup(last.tokens))
    for scale, calls in shown.items():
        assert len(calls) <= (8 if version == "new" else 3)
        assert all(int(known.min()) < SCHEDULE.lengths[scale] for known in calls)  # not asked when all is known
        assert all((later >= known).all() for known, later in pairwise(calls))
    assert len(shown[3]) == 8 or version == "1024"


def test_versions_and_their_filters(stable: STAR) -> None:
    text, given = texts(3), {"negative_prompt": texts(2, seed=1), "top_k": 8, "guidance": 2.0}
    pictures = [stable.generate(text, sample_version=version, **given) for version in ("1024", "new")]
    pictures.append(stable.generate(text, stable=False, **given))
    assert not torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[1], pictures[2])
    assert torch.equal(pictures[0], stable.generate(text, **given))
    old = STAREmitter((1.0,) * 14, 12, "old", top_k=50, top_p=0.3)
    kept = [old._filters(index) for index in (0, 8, 9, 11, 12, 13)]
    assert [(each.top_k, each.top_p) for each in kept] == [(50, 0.8)] * 2 + [(300, 0.8)] * 4
    plain = replace(old, stable_from=None)
    assert [plain._filters(index).top_k for index in (8, 11, 12, 13)] == [50, 300, 100, 100]
    assert replace(old, stable_from=0)._filters(13).top_p == 0.3
    assert [STAREmitter((1.0,) * 14).steps(index) for index in (9, 12, 13)] == [(8, 5), (8, 5), (15, 0)]


def test_smooth_pictures_and_no_guidance(model: STAR, stable: STAR) -> None:
    text = texts(3, 2)
    smooth = model.generate(text, guidance=0.0, smooth=True)
    assert not torch.equal(smooth, model.generate(text, guidance=0.0))
    assert model.network(text, guided=False).branches == 1
    alone = stable.generate(text, guidance=0.0, seed=5)
    assert alone.shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match="2 guidance strengths were given for 4 scales"):
        model.generate(text, negative_prompt=text, guidance=[1.0, 2.0])


# --- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [*FORMS, {"stable_from": 2}, {"stable_from": 1, "blocks": FORMS[3]["blocks"]}])
def test_official_round_trip(options: dict[str, Any], tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = build(tiny, **options)
    state = model.to_official()
    assert is_official(state)
    assert state["class_emb.weight"].shape == (1001, 16)
    if model.config.transformer.attention == "cosine":
        assert state["blocks.0.attn.scale_mul_1H11"].shape == (1, 2, 1, 1)
    sides = [scale.height for scale in model.config.schedule.scales]
    file = {
        "epoch": 1, "text_enc": {"x": torch.zeros(2)},
        "trainer": {"var_wo_ddp": state, "var_opt": {"state": {0: torch.zeros(3)}},
                    "vae_local": model.tokenizer.to_official(), "config": {"patch_nums": tuple(sides)}},
    }  # fmt: skip
    torch.save(file, tmp_path / "star.pth")
    found = [name for name, system in SYSTEMS.items() if system.recognises(file)]
    assert found[0] == "star"
    config = model.config
    told = {
        "cross_attention": config.transformer.cross_attention, "stable_from": config.stable_from,
        "rotary_span": config.rotary_span or 0, "add_levels": config.add_levels, "head_norm": config.head_norm,
        "heads": 2, "text_encoder": "nowhere",
    }  # fmt: skip
    again = nextscale.load(tmp_path / "star.pth", device="cpu", **told)
    assert replace(again.config, text=config.text) == replace(
        config, transformer=replace(config.transformer, drop_path=again.config.transformer.drop_path)
    )
    back = again.to_official()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    inputs = torch.randn(1, model.config.schedule.length - model.config.schedule.lengths[0], 4)
    with torch.inference_mode():
        assert torch.equal(again(inputs, texts(3)), model(inputs, texts(3)))


def test_what_a_file_does_not_tell(tiny: SimpleNamespace) -> None:
    model = build(tiny)
    state = model.to_official()
    loaded = STAR.from_official(state, model.tokenizer, schedule=SCHEDULE)
    assert loaded.config.transformer.cross_attention == "first"  # as released
    assert loaded.config.text.folders == ("tokenizer", "text_encoder")
    with pytest.raises(CheckpointError, match="has 4 levels, which is no published list"):
        STAR.from_official(state, model.tokenizer)
    ten = state | {"lvl_embed.weight": torch.zeros(10, 16)}
    with pytest.raises(CheckpointError, match="'1 2 3 4 5 6 8 10 13 16' or '1 2 3 4 6 9 13 18 24 32'"):
        STAR.from_official(ten, model.tokenizer)
    with pytest.raises(CheckpointError, match=r"unknown blocks\.0\.more"):
        STAR.from_official(state | {"blocks.0.more": torch.zeros(1)}, model.tokenizer, schedule=SCHEDULE)
    with pytest.raises(ValueError, match="speaks 4096 codes of 32 numbers, the tokenizer 16 of 4"):
        STAR(STARConfig(model.config.transformer), model.tokenizer)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("d16-256", 274.9), ("d30-256", 1678.7), ("d30-512", 1678.7), ("d30-1024", 1678.7), ("d30-1024-sampler", 1828.8)],
)
def test_presets_have_the_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        config = PRESETS[f"star-{name}"]
        tokenizer = ResidualVQ(ResidualVQConfig(AutoencoderConfig(channels=32), schedule=config.schedule))
        model = STAR(config, tokenizer)
    own = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("tokenizer."))
    unused = 1001 * config.transformer.width  # the class embedding of official files
    assert (own + unused) / 1e6 == pytest.approx(millions, abs=0.06)
    assert model.official_name.startswith(f"var_rope_{name[:3]}_{name.split('-')[1]}")
    assert list(model.parts) == ["transformer", "tokenizer"]


def test_files_of_the_hub_by_what_they_are_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    from nextscale.hub import HubError, cached, fetch, matching

    names = ["README.md", "d30_1024_sampler.pth", "var_d30_1024.pth", "var_d16_256.pth", "d30-256/STAR.safetensors"]
    wanted = {
        name: MODELS[f"star-{name}"].file or "" for name in ("d16-256", "d30-256", "d30-1024", "d30-1024-sampler")
    }
    found = {name: matching(names, pattern) for name, pattern in wanted.items()}
    assert found == {
        "d16-256": ["var_d16_256.pth"],
        "d30-256": ["d30-256/STAR.safetensors"],
        "d30-1024": ["var_d30_1024.pth"],
        "d30-1024-sampler": ["d30_1024_sampler.pth"],
    }
    siblings = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options: siblings)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *args, **options: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, file, **options: str(tmp_path / file))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert cached("who/what", "*d16*") is None
    assert fetch("who/what", "*d16*") == tmp_path / "var_d16_256.pth"
    with pytest.raises(HubError, match=r"2 files in \S+/who/what are named like \*1024\*; it holds d30_1024_sampler"):
        fetch("who/what", "*1024*")
    with pytest.raises(HubError, match=r"0 files .*; it holds README\.md, "):
        fetch("who/what", "*d99*")
    (tmp_path / "var_d16_256.pth").write_bytes(b"")
    assert cached("who/what", "*d16*") == tmp_path / "var_d16_256.pth"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"named like \*d30\* is not on this machine \(HF_HUB_OFFLINE"):
        fetch("who/what", "*d30*")


# --- precision and memory ---------------------------------------------------------------------------


def test_half_precision_and_recomputed_blocks(tiny: SimpleNamespace, stable: STAR) -> None:
    half = nextscale.loading.cast(build(tiny, stable_from=2), torch.bfloat16)
    assert half.transformer.blocks[0].cross_attention.log_scale.dtype == torch.float32
    images = half.generate(texts(3, 2), negative_prompt=texts(1), guidance=2.0, sample_version="new")
    assert images.dtype == torch.float32 and images.isfinite().all()
    text, inputs = texts(3), torch.randn(1, SCHEDULE.length - 1, 4)
    torch.testing.assert_close(half(inputs, text), stable(inputs, text), atol=0.5, rtol=0.2)
    gradients = []
    for again in (False, True):
        trained = build(tiny).train()
        trained.transformer.gradient_checkpointing = again
        trained(inputs, text).square().mean().backward()
        gradients.append(trained.word_embedding.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0])

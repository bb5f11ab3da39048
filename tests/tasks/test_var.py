"""VAR: the official layout in both directions, one network in two forms, and generation from seeds."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nextscale.core.checkpoint import CheckpointError, read_folder, read_tensors
from nextscale.core.heads import CategoricalEmitter
from nextscale.core.random import BatchDraws, ImageDraws
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.var import PRESETS, VAR, VARConfig, is_official
from nextscale.tasks.tokenizers.residual_vq import SCHEDULE_256, ResidualVQ


def same(a: VAR, b: VAR) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return a.config == b.config and mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.parametrize(
    "options", [{}, {"conditioning": "shared", "mlp_ratio": 2.0}, {"attention": "dot", "classes": 3}]
)
def test_official_round_trip(
    options: dict[str, Any], tiny: SimpleNamespace, tokenizer: ResidualVQ, tmp_path: Path
) -> None:
    model = tiny.var(tokenizer, **options)
    state = model.to_official()
    assert is_official(state)
    files = {
        "plain.pth": {k: v.clone() for k, v in state.items()},
        "ar-ckpt-last.pth": {"trainer": {"var_wo_ddp": {f"_orig_mod.{k}": v for k, v in state.items()}}, "iter": 0},
    }
    heads = {"heads": 2} if options.get("attention") == "dot" else {}
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        again = VAR.from_official(read_tensors(tmp_path / name), tokenizer, **heads)
        assert same(again, model)
    again_state = again.to_official()
    assert again_state.keys() == state.keys()
    assert all(torch.equal(again_state[k], state[k]) for k in state)
    assert ("blocks.0.ada_gss" in state) == ("shared_ada_lin.1.weight" in state) == bool("conditioning" in options)


def test_released_layout() -> None:
    config = PRESETS["var-d16"]
    with torch.device("meta"):
        model, shared_model = (VAR(each, ResidualVQ()) for each in (config, PRESETS["var-d36"]))
    state, shared = model.to_official(), shared_model.to_official()
    buffers = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")
    assert sum(v.numel() for k, v in state.items() if not k.endswith(buffers)) == pytest.approx(310.3e6, rel=1e-3)
    for key, shape in {
        "pos_1LC": (1, 680, 1024),
        "lvl_1L": (1, 680),
        "attn_bias_for_masking": (1, 1, 680, 680),
        "class_emb.weight": (1001, 1024),
        "blocks.15.attn.scale_mul_1H11": (1, 16, 1, 1),
        "blocks.3.ada_lin.1.weight": (6144, 1024),
        "head_nm.ada_lin.1.bias": (2048,),
    }.items():
        assert tuple(state[key].shape) == shape
    assert tuple(shared["blocks.35.ada_gss"].shape) == (1, 1, 6, 2304)
    assert config.transformer.drop_path == pytest.approx(0.1 * 16 / 24)


def test_scale_list_is_told_by_the_level_index_or_is_a_known_one(tiny: SimpleNamespace, tokenizer: ResidualVQ) -> None:
    state = tiny.var(tokenizer).to_official()
    without = {k: v for k, v in state.items() if k != "lvl_1L"}
    with pytest.raises(CheckpointError, match=r"^the file has 21 positions in 3 scales, which is no published list"):
        VAR.from_official(without, tokenizer)
    assert VAR.from_official(without, tokenizer, schedule="1 2 4").config.schedule == tokenizer.config.schedule
    known = tiny.var(tokenizer, schedule=SCHEDULE_256, depth=1).to_official()
    del known["lvl_1L"]
    assert VAR.from_official(known, tokenizer).config.schedule == SCHEDULE_256
    with pytest.raises(CheckpointError, match=r"position_embedding has shape \(1, 21, 16\), expected \(1, 5, 16\)"):
        VAR.from_official(state, tokenizer, schedule="1 2")


def test_a_file_of_something_else_is_named(tiny: SimpleNamespace, tokenizer: ResidualVQ) -> None:
    with pytest.raises(CheckpointError, match="no entry 'pos_1LC' was found"):
        VAR.from_official(tokenizer.to_official(), tokenizer)
    state = tiny.var(tokenizer).to_official()
    del state["word_embed.weight"]
    with pytest.raises(CheckpointError, match=r"lacks an entry of the VAR family: 'word_embed\.weight'"):
        VAR.from_official(state, tokenizer)
    with pytest.raises(ValueError, match="speaks 16 codes of 4 numbers, the tokenizer 8 of 4"):
        VAR(tiny.var(tokenizer).config, tiny.tokenizer(vocabulary=8))


def test_own_files_round_trip(var: VAR, tmp_path: Path) -> None:
    again = VAR.from_saved(*read_folder(var.save(tmp_path)))
    assert same(again, var)
    assert not any(p.requires_grad for p in again.tokenizer.parameters())
    assert all(p.requires_grad for n, p in again.named_parameters() if not n.startswith("tokenizer."))


@pytest.mark.parametrize("options", [{}, {"conditioning": "shared"}, {"attention": "dot"}])
def test_stepping_on_forced_tokens_is_teacher_forcing(
    options: dict[str, Any], tiny: SimpleNamespace, tokenizer: ResidualVQ
) -> None:
    model = tiny.var(tokenizer, **options)
    schedule, quantizer = model.config.schedule, tokenizer.quantizer
    tokens, labels = torch.randint(16, (2, schedule.length)), torch.tensor([1, 5])
    with torch.inference_mode():
        inputs = quantizer.teacher_inputs(tokens, schedule)
        at_once = model(inputs, labels)
        session, total, steps = model.start(labels, schedule), quantizer.begin(2, schedule), []
        for k, part in enumerate(schedule.split(tokens)):
            hidden = session.step(k, quantizer.next_input(total, schedule, k) if k else None)
            steps.append(session.logits(hidden, slice(None)))
            total = quantizer.advance(total, quantizer.lookup(part), schedule, k)
    torch.testing.assert_close(torch.cat(steps, 1), at_once, rtol=0, atol=1e-4)
    assert at_once.std() > 0.1
    short = schedule.prefix(2)
    with torch.inference_mode():
        torch.testing.assert_close(model(inputs[:, :4], labels, short), at_once[:, :5], rtol=0, atol=1e-5)


def test_guided_logits_are_those_of_both_classes(var: VAR) -> None:
    labels = torch.tensor([2, 4])
    steps = list(var.steps(labels, draws=ImageDraws([0, 1]), guidance=3.0))
    tokens = torch.cat([step.tokens for step in steps], 1)
    with torch.inference_mode():
        inputs = var.tokenizer.quantizer.teacher_inputs(tokens, var.config.schedule)
        given, none = var(inputs, labels), var(inputs, torch.tensor([5, 5]))
    t = 3.0 * var.config.schedule.levels()[:, None] / 2
    logits = torch.cat([step.logits for step in steps], 1)
    torch.testing.assert_close(logits, (1 + t) * given - t * none, rtol=0, atol=2e-4)


def test_an_image_is_the_same_alone_and_in_any_batch(var: VAR) -> None:
    together = var.generate(None, n=5, seed=7)
    assert together.shape == (5, 3, 8, 8)
    assert 0 <= together.min() < together.max() <= 1
    torch.testing.assert_close(var.generate(None, n=5, seed=7, batch_size=2), together, rtol=0, atol=1e-5)
    for i in range(5):
        torch.testing.assert_close(var.generate(None, seed=7 + i), together[i : i + 1], rtol=0, atol=1e-5)
    torch.testing.assert_close(var.generate(None, n=2, seed=[11, 8]), together[[4, 1]], rtol=0, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_the_official_draw_order_on_request(var: VAR) -> None:
    draws = BatchDraws(torch.Generator().manual_seed(4))
    labels = draws.integers(5, 2)
    *_, last = var.steps(labels, draws=draws)
    expected = (var.tokenizer.decode_features(last.total) + 1) / 2
    drawn = var.generate(None, n=2, seed=4, top_k=0, top_p=0.0, official_draws=True)
    torch.testing.assert_close(drawn, expected.detach(), rtol=0, atol=1e-5)
    *_, last = var.steps(torch.tensor([1]), draws=BatchDraws(torch.Generator().manual_seed(4)))
    drawn = var.generate(1, seed=4, top_k=0, top_p=0.0, official_draws=True)
    expected = (var.tokenizer.decode_features(last.total) + 1) / 2
    torch.testing.assert_close(drawn, expected.detach(), rtol=0, atol=1e-5)


def test_options_reach_the_draw(var: VAR) -> None:
    usual = var.generate(1, seed=3)
    for options in ({"guidance": 9.0}, {"top_k": 1}, {"temperature": 8.0}, {"smooth": True}):
        assert not torch.equal(var.generate(1, seed=3, **options), usual), options
    assert torch.equal(var.generate(1, seed=3, top_k=1), var.generate(1, seed=4, top_k=1))
    assert torch.equal(var.generate(1, seed=3, top_k=[1] * 3), var.generate(1, seed=3, top_k=1))


def test_classes_by_number_and_name(var: VAR) -> None:
    assert var.labels([1, "3", "Red Fox", "tinca-tinca", "owl", None, 5], 8).tolist() == [1, 3, 1, 0, 3, -1, 5, 1]
    assert torch.equal(var.generate("boat", n=2), var.generate([4, 4], n=2))
    for condition, message in (
        (6, "class 6 does not exist: classes are 0 to 4, and 5 is no class"),
        ("-1", "class -1 does not exist"),
        ("fox", "could be any of 1: red fox; 2: grey fox"),
        ("boot", "no class is called 'boot'; did you mean boat"),
        ([], "list of classes is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            var.labels(condition, 1)  # type: ignore[arg-type]


def test_wrong_numbers_are_named(var: VAR, tiny: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="3 seeds were given for 2 images"):
        var.generate(1, n=2, seed=[1, 2, 3])
    with pytest.raises(ValueError, match="0 images were asked for"):
        var.generate(1, n=0)
    with pytest.raises(ValueError, match="by number only"):
        tiny.var().generate("fox")
    with pytest.raises(ValueError, match="positions for the scales '1 2 4' only, not for '1 2 3'"):
        var.start(torch.tensor([1]), ScaleSchedule.squares(1, 2, 3))


def test_progress_counts_all_scales_of_all_batches(var: VAR) -> None:
    seen: list[tuple[int, int]] = []
    var.generate(1, n=3, batch_size=2, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(i, 6) for i in range(1, 7)]


def test_sampling_stops_when_the_caller_does(var: VAR) -> None:
    steps = var.steps(torch.tensor([1]), draws=ImageDraws([0]), emitter=CategoricalEmitter(top_k=2))
    assert next(steps).total.shape == (1, 4, 4, 4)
    steps.close()


def test_labels_are_dropped_by_the_given_numbers(var: VAR) -> None:
    labels, uniform = torch.arange(4), torch.tensor([0.0, 0.0999, 0.1, 0.9])
    assert var.drop_labels(labels, uniform).tolist() == [5, 5, 2, 3]


def test_training_form_leaves_the_tokenizer_alone(tiny: SimpleNamespace) -> None:
    model = tiny.var().train()
    assert model.training and model.transformer.training
    assert not model.tokenizer.training
    assert VARConfig.of_depth(8).transformer.width == 512

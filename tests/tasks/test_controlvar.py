"""ControlVAR: pairs in one sequence, what branches are forced to, files, and masks as controls."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nextscale.core.heads import CategoricalEmitter
from nextscale.core.random import ImageDraws
from nextscale.core.sampling import Accepted
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.transformer import TransformerConfig
from nextscale.tasks.generation.control_masks import AnnotationError, color_labels, color_masks, decode_runs, read_masks
from nextscale.tasks.generation.controlvar import ControlVAR, ControlVARConfig, is_official
from nextscale.tasks.generation.controlvar_guidance import Cells, Given, branch_weights, sample_pairs
from nextscale.tasks.generation.controlvar_pairs import (
    paired,
    second_half,
    single,
    unweave,
    visibility_mask,
    weave,
)
from nextscale.tasks.generation.controlvar_training import ControlVARTraining, from_var, mask_weights, with_scales
from nextscale.tasks.generation.var_training import initialize

LABELS, TYPES = torch.tensor([1, 3]), torch.tensor([0, 2])


def build(tiny: SimpleNamespace, attention: str = "dot", **changes: Any) -> ControlVAR:
    tokenizer = tiny.tokenizer()
    quantizer = tokenizer.config.quantizer
    config = ControlVARConfig(
        TransformerConfig(16, 2, 2, attention=attention),  # type: ignore[arg-type]
        classes=5,
        vocabulary=quantizer.vocabulary,
        code_channels=quantizer.channels,
        schedule=paired(tokenizer.config.schedule),
        **changes,
    )
    torch.manual_seed(0)
    model = ControlVAR(config, tokenizer)
    initialize(model, modulation=1, gate=1, head=1)
    for part in (model.transformer, model.head):
        tiny.scattered(part, 0)
    return model.eval()


@pytest.fixture(scope="module")
def model(tiny: SimpleNamespace) -> ControlVAR:
    return build(tiny)


@pytest.fixture(scope="module")
def pictures(model: ControlVAR) -> Tensor:
    return torch.rand(2, 3, *model.tokenizer.image_size(), generator=torch.Generator().manual_seed(0))


def drawn(model: ControlVAR, strength: float = 0.0, given: Given | None = None, **options: Any) -> list[Any]:
    draws, emitter = ImageDraws([0, 1]), CategoricalEmitter(top_k=5)
    steps = sample_pairs(
        model, LABELS, TYPES, strengths=(strength,) * 3, draws=draws, emitter=emitter, given=given, **options
    )
    return list(steps)


def halves(model: ControlVAR, tokens: Tensor) -> tuple[Tensor, Tensor]:
    second = second_half(model.config.schedule, torch.device("cpu")).bool()
    return tokens[:, ~second], tokens[:, second]


# --- the sequence ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["joined", "one-way", "apart"])
@pytest.mark.parametrize("control_first", [True, False])
@pytest.mark.parametrize("type_start", [True, False])
def test_stepping_gives_what_teacher_forcing_gives(tiny, kind, control_first, type_start):
    model = build(tiny, halves=kind, either_order=True, type_start=type_start, half_embedding=True)
    steps = drawn(model, control_first=control_first)
    tokens = torch.cat([step.tokens for step in steps], dim=1)
    first, second = halves(model, tokens)
    control, image = (first, second) if control_first else (second, first)
    joined, inputs = model.join(control, image, control_first)
    with torch.inference_mode():
        logits = model(inputs, LABELS, None, TYPES, control_first)
    assert torch.equal(joined, tokens)
    torch.testing.assert_close(torch.cat([step.logits for step in steps], dim=1), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["joined", "one-way", "apart"])
def test_a_token_changes_exactly_what_sees_it(tiny, kind):
    model = build(tiny, halves=kind)
    mask, schedule = visibility_mask(model.config.schedule, kind), model.config.schedule
    x = torch.randn(1, schedule.length, 16, requires_grad=True)
    modulations = model.transformer.modulate(model.class_embedding(LABELS[:1]))
    from nextscale.tasks.generation.controlvar_pairs import visibility

    out = model.transformer(x, modulations, visibility(schedule, kind))
    for row in (0, 1, 3, 8, 15, schedule.length - 1):
        (gradient,) = torch.autograd.grad(out[0, row].sum(), x, retain_graph=True)
        assert torch.equal(gradient[0].abs().sum(1) > 0, mask[row])


def test_halves_without_sight_of_each_other_are_no_prefix(tiny):
    mask = visibility_mask(paired(tiny.tokenizer().config.schedule), "apart")
    # Scale 2 x 2 lies at positions 2 to 10: the second half sees the first scale and itself.
    assert mask[6].nonzero()[:, 0].tolist() == [0, 1, 6, 7, 8, 9]


def test_sampling_goes_on_from_accepted_scales(model):
    steps = drawn(model)
    pyramid = model.tokenizer.quantizer
    half, count = single(model.config.schedule), 1

    def side_by_side(total: Tensor, index: int) -> Tensor:
        inputs = pyramid.next_input(total.flatten(0, 1), half, index)
        return inputs.unflatten(0, (2, 2)).transpose(1, 2).flatten(2)

    accepted = Accepted(count, steps[0].total, side_by_side(steps[0].total, 1))
    rest = drawn(model, accepted=accepted, stop=2)
    torch.testing.assert_close(rest[0].logits, steps[1].logits, atol=1e-5, rtol=1e-5)
    assert [step.index for step in rest] == [1]


# --- guidance -------------------------------------------------------------------------------------------


def test_weights_of_the_branches(model):
    schedule = model.config.schedule
    weights = branch_weights((4.0, 2.0, 3.0), schedule, forced=True)
    assert [column[-1] for column in weights] == [5.0, -2.0, 1.0, -3.0] and [c[0] for c in weights] == [1, 0, 0, 0]
    assert [column[-1] for column in branch_weights((4.0, 2.0, 3.0), schedule, forced=False)] == [5.0, -2.0, -2.0]


@pytest.mark.parametrize("half", [0, 1])
def test_a_given_half_is_held_and_the_other_follows_it(model, half):
    schedule = model.config.schedule
    tokens = torch.randint(16, (2, schedule.length), generator=torch.Generator().manual_seed(1))
    kept = second_half(schedule, torch.device("cpu")) == half
    steps = drawn(model, given=Given(tokens, kept))
    found = torch.cat([step.tokens for step in steps], dim=1)
    assert torch.equal(found[:, kept], tokens[:, kept]) and steps[-1].total.shape[1] == 2
    _, inputs = model.join(*halves(model, found))
    with torch.inference_mode():
        logits = model(inputs, LABELS, None, TYPES)[:, ~kept]
    torch.testing.assert_close(torch.cat([step.logits for step in steps], dim=1), logits, atol=1e-5, rtol=1e-5)


def test_equal_strengths_run_two_branches(model, monkeypatch):
    schedule, rows = model.config.schedule, []
    start = ControlVAR.start
    monkeypatch.setattr(ControlVAR, "start", lambda self, c, *rest: rows.append(len(c)) or start(self, c, *rest))
    given = Given(torch.zeros(2, schedule.length, dtype=torch.int64), second_half(schedule, torch.device("cpu")) == 0)
    for strengths, branches in (((3.0,) * 3, 2), ((0.0,) * 3, 1), ((3.0, 3.0, 1.0), 3), ((1.0, 2.0, 3.0), 4)):
        draws, emitter = ImageDraws([0, 1]), CategoricalEmitter()
        list(sample_pairs(model, LABELS, TYPES, strengths=strengths, draws=draws, emitter=emitter, given=given))
        assert rows.pop() == 2 * branches


def test_the_unforced_branch_goes_on_from_its_own_cells(model):
    """Where it drew the given cells as they are, guidance by pixels is guidance by class and type alone."""
    schedule = model.config.schedule
    kept = second_half(schedule, torch.device("cpu")) == 0
    tokens = torch.zeros(2, schedule.length, dtype=torch.int64)
    steps = drawn(model, strength=2.0, given=Given(tokens, kept))
    assert steps[-1].total.shape[1] == 3
    given, own = steps[-1].total[:, 0], steps[-1].total[:, 2]
    assert not torch.equal(given, own)


def test_official_draws_let_each_branch_draw(model, pictures):
    result = model.generate([1, 3], seed=5, control=pictures, control_type="canny", official_draws=True)
    again = model.generate([1, 3], seed=5, control=pictures, control_type="canny", official_draws=True)
    assert torch.equal(result, again) and result.shape == (2, 3, 8, 8)


def test_a_picture_is_the_same_alone_and_in_a_batch(model, pictures):
    both = model.generate([1, 3], seed=[4, 9], control=pictures, control_type=["canny", "depth"])
    alone = model.generate([3], seed=9, control=pictures[1:], control_type="depth")
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)
    joint = model.generate([1, 3], seed=[4, 9], batch_size=1)
    torch.testing.assert_close(joint, model.generate([1, 3], seed=[4, 9]), atol=1e-5, rtol=1e-5)


def test_one_control_serves_all_images(model, pictures):
    several = model.generate(1, 3, control=pictures[:1], control_type="mask")
    assert several.shape == (3, 3, 8, 8) and not torch.equal(several[0], several[1])
    control, image = model.pairs(1, 3, control=pictures[:1], control_type="mask")
    assert torch.equal(image, several) and torch.equal(control[0], control[2])


def test_perceiving_keeps_the_image(model, pictures):
    control = model.perceive(pictures, "normal")
    assert control.shape == pictures.shape
    _, image = model.pairs(model.config.classes, 2, image=pictures, control_type="normal")
    expected = (model.tokenizer.decode(model.encode(pictures)) + 1) / 2
    torch.testing.assert_close(image, expected, atol=1e-5, rtol=1e-5)


def test_completion_of_both(model, pictures):
    mask = torch.zeros(4, 4, dtype=torch.int64)
    mask[:, :2] = 1
    given = {"control": pictures, "image": pictures.flip(0)}
    cells = {"keep_control": Cells(mask), "keep_image": Cells(1 - mask)}
    tokens = {name: model.encode(value) for name, value in given.items()}
    draws = ImageDraws([0, 1])
    steps = list(model.steps(LABELS, draws=draws, control_type="canny", guidance=2.0, show="pair", **tokens, **cells))
    last = slice(*single(model.config.schedule).ranges[-1])
    first, second = steps[-1].tokens.chunk(2, dim=1)
    keep = mask.flatten().bool()
    assert torch.equal(first[:, keep], tokens["control"][:, last][:, keep])
    assert torch.equal(second[:, ~keep], tokens["image"][:, last][:, ~keep])
    assert not torch.equal(first, tokens["control"][:, last])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"control_type": "edges"}, "there is no control type 'edges'; this model knows mask, canny, depth, normal"),
        ({"control": torch.zeros(1, 3, 8, 8)}, "of what type is the control"),
        ({"control": torch.zeros(1, 3, 9, 8), "control_type": "mask"}, r"a picture is \(3, 9, 8\), this model takes"),
        (
            {"control": torch.zeros(2, 3, 8, 8), "control_type": "mask", "n": 3},
            "2 pictures were given as control for 3",
        ),
        ({"guidance": [1.0, 2.0]}, "expected one number or three"),
        ({"show": "both"}, "show is 'both'"),
        ({"control_first": False}, "control before the image only"),
        ({"control_type": ["mask", "depth"], "n": 3}, "2 control types were given for 3 images"),
    ],
)
def test_what_cannot_be_drawn_is_said(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(1, **options)


# --- files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["dot", "cosine"])
@pytest.mark.parametrize("kind", ["joined", "one-way", "apart"])
def test_official_layout_both_ways(tiny, attention, kind):
    model = build(tiny, attention, halves=kind, half_embedding=True)
    state = model.to_official()
    wrapped = {"epoch": 1, "model_state_dict": {f"module.{name}": value for name, value in state.items()}}
    assert is_official(wrapped) and is_official(state)
    schedule = single(model.config.schedule)
    heads = None if attention == "cosine" else 2
    loaded = ControlVAR.from_official(wrapped, model.tokenizer, schedule=schedule, heads=heads)
    changed = {"transformer": loaded.config.transformer, "guidance": 4.0}
    assert loaded.config == replace(model.config, **changed)
    assert loaded.config.transformer.attention == attention
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert {name: value.shape for name, value in loaded.to_official().items()} == {n: v.shape for n, v in state.items()}


def test_a_var_is_no_controlvar(var):
    assert not is_official(var.to_official())


def test_saved_folder(model, tmp_path):
    import nextscale

    folder = model.save(tmp_path / "model")
    loaded = nextscale.load(folder)
    assert isinstance(loaded, ControlVAR) and loaded.config == model.config
    assert torch.equal(loaded.generate(1, 1), model.generate(1, 1))


def test_official_file_is_recognised(model, tmp_path):
    import nextscale

    torch.save({"model_state_dict": model.to_official()}, tmp_path / "d12.pth")
    schedule = single(model.config.schedule)
    loaded = nextscale.load(tmp_path / "d12.pth", tokenizer=model.tokenizer, schedule=schedule, heads=2)
    assert isinstance(loaded, ControlVAR)


# --- from a VAR -----------------------------------------------------------------------------------------


def test_positions_of_a_var_are_laid_out_by_scale(var):
    model, lengths = from_var(var), var.config.schedule.lengths
    own, old = model.position_embedding.split([2 * n for n in lengths], 1), var.position_embedding.split(lengths, 1)
    for pair, base in zip(own, old, strict=True):
        first, second = pair.chunk(2, dim=1)
        assert torch.equal(first, base) and torch.equal(second, base)
    repeated = from_var(var, repeat_positions=True).position_embedding
    assert torch.equal(repeated, var.position_embedding.repeat(1, 2, 1))
    assert model.config.class_names == var.config.class_names and torch.equal(
        model.head.linear.weight, var.head.linear.weight
    )


def test_other_scales_keep_what_fits(model):
    old = single(model.config.schedule)
    new = ScaleSchedule((*old.scales, old.final))
    other = with_scales(model, new)
    assert other.config.schedule == paired(new)
    parts = unweave(other.position_embedding, new.lengths), unweave(model.position_embedding, old.lengths)
    for half, before in zip(*parts, strict=True):
        assert torch.equal(half[:, : old.length], before)
        assert torch.equal(half[:, old.length :], before[:, -old.lengths[-1] :])
    assert torch.equal(other.level_embedding.weight[-1], model.level_embedding.weight[-1])
    assert torch.equal(other.start_position, model.start_position)
    assert torch.equal(weave(*unweave(model.position_embedding, old.lengths), old.lengths), model.position_embedding)
    assert other.generate([1, 3], 2, control_type="canny").shape == (2, 3, *model.tokenizer.image_size(new))


def test_loss_learns(model, tiny):
    trained = build(tiny)
    task = ControlVARTraining(trained)
    half = single(trained.config.schedule).length
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(16, (2, 2, half), generator=generator)
    batch = {"label": LABELS, "type": TYPES, "control_tokens": tokens[0], "image_tokens": tokens[1]}
    ones = {"uniform": torch.ones(2), "type_uniform": torch.ones(2)}
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss, metrics = task.loss(task.name, trained, {**batch, **ones}, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert float(metrics["cross_entropy_control"] + metrics["cross_entropy_image"]) / 2 == pytest.approx(
        losses[-1], 1e-4
    )
    assert torch.isfinite(trained.loss(batch)[0])


def test_black_of_masks_does_not_count():
    from nextscale.core.schedule import ScaleSchedule

    schedule = paired(ScaleSchedule.squares(1, 1, 1, 1, 1, 2))
    control = -torch.ones(2, 3, 4, 4)
    control[:, 0, :2, :2] = 0.5
    weights = mask_weights(control, schedule, torch.tensor([True, False]))
    assert weights[0].tolist() == [1] * 10 + [1, 0, 0, 0] + [1] * 4 and weights[1].min() == 1
    swapped = mask_weights(control, schedule, torch.tensor([True, False]), control_first=False)
    assert swapped[0].tolist() == [1] * 10 + [1] * 4 + [1, 0, 0, 0]


# --- masks ----------------------------------------------------------------------------------------------


def runs_of(mask: np.ndarray) -> list[int]:
    flat = mask.T.flatten().astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flat)))) if len(flat) else []
    stops = [*edges, len(flat)]
    return [int(b - a) for a, b in zip([0, *edges], stops, strict=True)]


def compressed(runs: list[int]) -> str:
    text = ""
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        while True:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(bits + (32 if more else 0) + 48)
            if not more:
                break
    return text


def test_runs_are_columns():
    assert decode_runs({"size": [2, 2], "counts": [1, 1, 2]}).tolist() == [[False, False], [True, False]]
    assert decode_runs({"size": [2, 2], "counts": "0120"}).tolist() == [[True, False], [False, True]]
    mask = np.random.default_rng(0).random((37, 53)) < 0.1
    mask[:, 20:40] = True
    assert np.array_equal(decode_runs({"size": [37, 53], "counts": compressed(runs_of(mask))}), mask)
    assert np.array_equal(decode_runs({"size": [37, 53], "counts": runs_of(mask)}), mask)


def test_masks_of_a_file(tmp_path):
    mask = np.zeros((64, 64), bool)
    mask[40:60, 30:62] = True
    path = tmp_path / "photo.json"
    path.write_text(json.dumps([{"segmentation": {"size": [64, 64], "counts": compressed(runs_of(mask))}}]))
    assert np.array_equal(read_masks(path), color_masks([mask], smallest=79))
    assert read_masks(path, smallest=641).max() == 0
    for text in ("{", "[]", '[{"segmentation": {"size": [2, 2], "counts": [5]}}]', '[{"area": 3}]'):
        path.write_text(text)
        with pytest.raises(AnnotationError, match=r"photo\.json"):
            read_masks(path)


def test_labels_are_painted_in_order():
    labels = np.zeros((22, 22), np.int64)
    labels[4:10, 4:10], labels[12:20, 12:20] = 7, 3
    painted = color_labels(labels, smallest=1)
    assert painted[0, 0].tolist() == [0, 0, 0] and len(np.unique(painted.reshape(-1, 3), axis=0)) == 3
    with pytest.raises(ValueError, match="nothing but background"):
        color_labels(np.zeros((3, 3), np.int64))

"""CoDe: two models over one pyramid, what passes between them, and how each is trained for its part."""

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.core import transformer
from nextscale.core.cache import KeyValueCache
from nextscale.core.checkpoint import read_folder
from nextscale.core.heads import CategoricalEmitter
from nextscale.core.random import BatchDraws, ImageDraws
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import TrainingConfig
from nextscale.tasks.generation.code import CoDe, CoDeConfig, OfficialDraws, hand_over
from nextscale.tasks.generation.code_recipe import DrafterRecipe, RefinerRecipe
from nextscale.tasks.generation.code_training import DrafterTraining, RefinerTraining, distillation
from nextscale.tasks.generation.editing import edit
from nextscale.tasks.generation.var import VAR
from nextscale.tasks.generation.var_training import next_scale_loss
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ

SCHEDULE = ScaleSchedule.squares(1, 2, 3, 4)
LABELS = torch.tensor([1, 3, 5])


@pytest.fixture(scope="module")
def shared(tiny: SimpleNamespace) -> ResidualVQ:
    return tiny.tokenizer(schedule=SCHEDULE)


@pytest.fixture(scope="module")
def large(tiny: SimpleNamespace, shared: ResidualVQ) -> VAR:
    return tiny.var(shared, seed=1, width=24, depth=3, class_names=("a", "b", "c", "d", "e"))


@pytest.fixture(scope="module")
def small(tiny: SimpleNamespace, shared: ResidualVQ) -> VAR:
    return tiny.var(shared, seed=2)


def drawn(model: Any, **options: Any) -> list[Any]:
    emitter = options.pop("emitter", CategoricalEmitter(top_k=9))
    draws = options.pop("draws", None) or ImageDraws([1, 2, 3])
    return list(model.steps(LABELS, draws=draws, emitter=emitter, **{"guidance": 2.0, **options}))


def tokens_of(steps: list[Any]) -> Tensor:
    return torch.cat([step.tokens for step in steps], dim=1)


# --- drawing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("handovers", [[1], [2], [3], [1, 3], [1, 2, 3]])
@pytest.mark.parametrize("options", [{}, {"guidance": 0.0}, {"guidance": [0.0, 1.0, 3.0, 2.0]}])
def test_one_model_in_every_place_draws_what_it_draws_alone(
    handovers: list[int], options: dict[str, Any], large: VAR
) -> None:
    emitter = CategoricalEmitter([9, 5, 0, 4], [0.0, 0.9, 0.8, 0.0], [1.0, 1.3, 0.7, 1.0])
    alone = drawn(large, emitter=emitter, **options)
    together = drawn(CoDe([large] * (len(handovers) + 1), handovers), emitter=emitter, **options)
    assert [step.index for step in together] == [0, 1, 2, 3]
    assert torch.equal(tokens_of(together), tokens_of(alone))
    torch.testing.assert_close(together[-1].total, alone[-1].total, rtol=0, atol=1e-5)
    torch.testing.assert_close(together[-1].logits, alone[-1].logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("handovers", [[1], [3], [1, 2]])
def test_stepping_gives_what_teacher_forcing_gives_at_once(handovers: list[int], large: VAR, small: VAR) -> None:
    models = [large, small, large] if len(handovers) == 2 else [large, small]
    model = CoDe(models, handovers)
    steps = drawn(model, guidance=0.0)
    inputs = model.tokenizer.quantizer.teacher_inputs(tokens_of(steps), SCHEDULE)
    with torch.inference_mode():
        at_once = model(inputs, LABELS)
    torch.testing.assert_close(torch.cat([step.logits for step in steps], dim=1), at_once, rtol=0, atol=1e-4)
    torch.testing.assert_close(hand_over([s.total for s in steps[:3]], model.tokenizer.quantizer, SCHEDULE).inputs,
                               inputs, rtol=0, atol=1e-5)  # fmt: skip


def test_each_model_draws_its_own_scales(large: VAR, small: VAR) -> None:
    pair, alone = drawn(CoDe([large, small], [2])), drawn(large)
    assert torch.equal(tokens_of(pair[:2]), tokens_of(alone[:2]))
    assert not torch.equal(tokens_of(pair[2:]), tokens_of(alone[2:]))
    other = drawn(CoDe([small, small], [2]))
    assert not torch.equal(pair[2].logits, other[2].logits)


def test_caches_hold_a_models_scales_and_one_lives_at_a_time(
    large: VAR, small: VAR, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, int]] = []
    alive: list[weakref.ref[KeyValueCache]] = []

    class Watched(KeyValueCache):
        def __init__(self, layers: int, batch: int, length: int, *sizes: Any, **options: Any) -> None:
            gc.collect()
            assert not any(reference() for reference in alive)
            super().__init__(layers, batch, length, *sizes, **options)
            made.append((layers, length))
            alive.append(weakref.ref(self))

    monkeypatch.setattr(transformer, "KeyValueCache", Watched)
    drawn(CoDe([large, small], [2]))
    assert made == [(3, 5), (2, 30)]


def test_the_head_sees_no_drafted_position_unless_numbers_are_drawn_in_the_official_order(
    large: VAR, small: VAR
) -> None:
    seen: list[tuple[int, int]] = []
    hook = small.head.register_forward_hook(lambda _, args, output: seen.append(tuple(args[0].shape[:2])))
    try:
        drawn(CoDe([large, small], [2]))
        assert seen == [(6, 9), (6, 16)]
        seen.clear()
        drawn(CoDe([large, small], [2]), draws=OfficialDraws(lambda: BatchDraws(torch.Generator().manual_seed(0))))
        assert seen == [(3, 1), (3, 4), (6, 9), (6, 16)]
    finally:
        hook.remove()


def test_the_official_order_starts_anew_for_each_model(large: VAR, small: VAR) -> None:
    """By hand: the refiner's generator, seeded again, has drawn classes and all drafted scales before its own."""
    model = CoDe([large, small], [2])
    draws = model.draws([7], official=True)
    labels = draws.integers(5, 3)
    emitter = CategoricalEmitter(9, temperature=[1.5, 0.6, 1.0, 1.2])
    steps = list(model.steps(labels, draws=draws, emitter=emitter, guidance=2.0))
    again = BatchDraws(torch.Generator().manual_seed(7))
    assert torch.equal(again.integers(5, 3), labels)
    inputs = model.tokenizer.quantizer.teacher_inputs(tokens_of(steps), SCHEDULE)
    with torch.inference_mode():
        conditional = SCHEDULE.split(small(inputs, labels))
    for scale in range(4):
        logits = conditional[scale] if scale < 2 else steps[scale].logits
        tokens = again.categorical(emitter.probabilities(logits, scale))
        assert torch.equal(tokens, steps[scale].tokens) is (scale >= 2)


def test_pictures_from_seeds(large: VAR, small: VAR) -> None:
    model = CoDe([large, small], [2])
    together = model.generate(["b", None, 5], seed=4)
    assert together.shape == (3, 3, 8, 8)
    torch.testing.assert_close(model.generate([None], seed=5), together[1:2], rtol=0, atol=1e-5)
    assert torch.equal(model.generate(2, seed=3, official_draws=True), model.generate(2, seed=3, official_draws=True))
    with pytest.raises(ValueError, match="2 guidance strengths were given for 4 scales"):
        model.generate(1, guidance=[1.0, 2.0])


def test_kept_tokens_are_kept_through_both_models(large: VAR, small: VAR) -> None:
    model, image = CoDe([large, small], [2]), torch.rand(3, 8, 8)
    rebuilt = (model.tokenizer.decode(model.tokenizer.encode(image[None] * 2 - 1)) + 1) / 2
    torch.testing.assert_close(edit(model, image, torch.ones(4, 4)), rebuilt, rtol=0, atol=1e-5)  # type: ignore[arg-type]
    assert not torch.allclose(edit(model, image, torch.zeros(4, 4)), rebuilt, atol=1e-2)  # type: ignore[arg-type]


def test_models_that_share_no_pyramid_are_named(tiny: SimpleNamespace, large: VAR, small: VAR) -> None:
    with pytest.raises(ValueError, match=r"differ in schedule \(1 2 3 4 and 1 2 4\)"):
        CoDe([large, tiny.var()], [1])
    with pytest.raises(ValueError, match=r"differ in classes \(3 and 5\)"):
        CoDe([large, tiny.var(large.tokenizer, classes=3)], [1])
    with pytest.raises(ValueError, match="the models' tokenizers differ"):
        CoDe([large, tiny.var(tiny.tokenizer(seed=9, schedule=SCHEDULE))], [1])
    assert CoDe([large, tiny.var(tiny.tokenizer(schedule=SCHEDULE))], [1]).models[1].tokenizer is large.tokenizer
    for handovers in ([], [0], [4], [2, 1], [1, 1]):
        with pytest.raises(ValueError, match=r"hand over at the scales .*rising numbers from 1 to 3"):
            CoDeConfig((large.config,) * max(2, len(handovers) + 1), tuple(handovers))


def test_own_files_round_trip(tiny: SimpleNamespace, large: VAR, small: VAR, tmp_path: Path) -> None:
    model = CoDe([large, small, tiny.var(large.tokenizer, depth=1)], [1, 3])
    again = CoDe.from_saved(*read_folder(model.save(tmp_path)))
    assert again.config == model.config and again.config.class_names == large.config.class_names
    assert torch.equal(again.generate(1, seed=2), model.generate(1, seed=2))
    state = model.to_official()
    assert list(state) == ["drafter", "middle_1", "refiner"]
    assert list(model.parts) == [*state, "tokenizer"]
    assert all(torch.equal(state["middle_1"][k], v) for k, v in small.to_official().items())


# --- training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("alpha", [None, 0.3])
def test_distillation_by_hand(temperature: float, alpha: float | None) -> None:
    student, teacher, targets = torch.randn(6, 7), torch.randn(6, 7), torch.randint(7, (6,))
    p, q = ((each.double() / temperature).softmax(-1) for each in (teacher, student))
    rows = temperature**2 * (p * (p / q).log()).sum(-1)
    if alpha is not None:
        rows = alpha * rows + (1 - alpha) * F.cross_entropy(student.double(), targets, reduction="none")
    options = {"temperature": temperature, "alpha": alpha}
    found = distillation(student, teacher, targets, per_row=True, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(found, rows.float())
    torch.testing.assert_close(distillation(student, teacher, targets, **options), rows.mean().float())  # type: ignore[arg-type]
    assert distillation(teacher, teacher).abs() < 1e-6


def test_distillation_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match="needs targets"):
        distillation(torch.zeros(1, 2), torch.zeros(1, 2), alpha=0.5)
    with pytest.raises(ValueError, match=r"temperature is 0\.0"):
        distillation(torch.zeros(1, 2), torch.zeros(1, 2), temperature=0.0)


@pytest.fixture
def batch(shared: ResidualVQ) -> dict[str, Tensor]:
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    return {"tokens": shared.encode(images), "label": torch.arange(4), "uniform": torch.tensor([0.05, 0.5, 0.5, 0.5])}


def test_a_drafter_learns_its_scales_alone(tiny: SimpleNamespace, shared: ResidualVQ, batch: dict[str, Tensor]) -> None:
    model = tiny.var(shared, seed=3).train()
    task = DrafterTraining(model, 2)
    loss, metrics = task.loss(task.name, model, batch, 0)
    loss.backward()
    assert loss.item() == pytest.approx(metrics["cross_entropy"].item() * 5 / 30, rel=1e-4)  # type: ignore[union-attr]
    gradient = model.position_embedding.grad
    assert gradient[0, :5].abs().sum(-1).gt(0).all() and not gradient[0, 5:].any()
    with torch.no_grad():
        assert task.evaluate({**batch, "uniform": torch.ones(4)})["scales"] == 2


def test_drafted_scales_count_less_and_less_for_a_refiner(large: VAR, small: VAR, batch: dict[str, Tensor]) -> None:
    task = RefinerTraining(CoDe([large, small], [2]), total=5)
    assert [task.drafted_weight(step) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    _, inputs, labels = task.teacher_forced(batch, 4)
    with torch.no_grad():
        rows = distillation(
            small(inputs, labels).flatten(0, 1), large(inputs, labels).flatten(0, 1), per_row=True
        ).view(4, 30)
    for step, weight in ((0, 1.0), (2, 0.5), (4, 0.0)):
        loss, metrics = task.loss(task.name, small, batch, step)
        expected = (rows[:, :5].sum() * weight + rows[:, 5:].sum()) / 4 / 30
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        assert metrics["drafted_weight"] == weight
        assert float(metrics["divergence_refined"]) == pytest.approx(rows[:, 5:].mean().item(), rel=1e-4)
    assert not any(parameter.requires_grad for parameter in large.parameters())


def test_a_refiner_that_is_the_teacher_has_nothing_to_learn(large: VAR, small: VAR, batch: dict[str, Tensor]) -> None:
    pair = CoDe([large, large], [1])
    assert abs(float(RefinerTraining(pair).loss("", large, batch, 0)[0])) < 1e-6
    with torch.no_grad():
        figures = RefinerTraining(pair).evaluate({**batch, "uniform": torch.ones(4)})
        inputs = large.tokenizer.quantizer.teacher_inputs(batch["tokens"], SCHEDULE)
        usual = next_scale_loss(large(inputs, batch["label"]), batch["tokens"], SCHEDULE, 30)[1]
    assert float(figures["cross_entropy_last"]) == pytest.approx(float(usual["cross_entropy_last"]), rel=1e-4)
    mixed = RefinerTraining(pair, alpha=0.25).loss("", large, {**batch, "uniform": torch.ones(4)}, 0)[0]
    assert float(mixed) == pytest.approx(0.75 * float(usual["cross_entropy"]), rel=1e-4)


def test_both_recipes(tiny: SimpleNamespace, large: VAR, tmp_path: Path) -> None:
    from nextscale.tasks.data import ImageData

    teacher = str(large.save(tmp_path / "teacher"))
    data = ImageData(str(tiny.images(tmp_path / "images")), size=8, resize_ratio=1.0)
    usual: dict[str, Any] = {"data": data, "classes": 5}

    def load(source: str, tokenizer: ResidualVQ | None = None) -> VAR:
        return VAR.from_saved(*read_folder(source))

    def training(name: str) -> TrainingConfig:
        return TrainingConfig(str(tmp_path / name), epochs=1, batch_size=4, learning_rate=0.1, log_every=1)

    refine = RefinerRecipe(
        **usual, teacher=teacher, draft_scales=2, depth=1, width=16, heads=2, training=training("refiner")
    )
    run = refine.trainer(load)
    run.run()
    assert [caption for caption, _ in refine.examples(run).rows] == ["seed 0", "seed 1"]
    refiner = load(str(refine.finish(run)))
    assert refiner.config.transformer.width == 16
    assert CoDe([load(teacher), refiner], [2]).generate(1).isfinite().all()

    draft = DrafterRecipe(**usual, init=teacher, draft_scales=2, training=training("drafter"))
    run = draft.trainer(load)
    run.run()
    tuned = load(str(draft.finish(run))).position_embedding
    assert (tuned != large.position_embedding)[0, :5].any() and torch.equal(
        tuned[0, 5:], large.position_embedding[0, 5:]
    )

    for recipe, message in (
        (RefinerRecipe(**usual, teacher=teacher, draft_scales=4), "rising numbers from 1 to 3"),
        (DrafterRecipe(**usual, init=teacher, draft_scales=4), "draft_scales is 4; of 4 scales 1 to 3 can be drafted"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe.trainer(load)
    with pytest.raises(ValueError, match="give teacher"):
        RefinerRecipe(**usual)
    with pytest.raises(ValueError, match=r"alpha is 1\.5"):
        RefinerRecipe(**usual, teacher=teacher, alpha=1.5)
    with pytest.raises(ValueError, match="label_smoothing is of the cross-entropy"):
        RefinerRecipe(**usual, teacher=teacher, label_smoothing=0.1)

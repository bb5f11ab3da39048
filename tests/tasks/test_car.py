"""CAR: the control at every scale, its cost, files that hold the adapter alone, and its training."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import nextscale
from nextscale.core.checkpoint import CheckpointError, read_tensors
from nextscale.core.heads import CategoricalEmitter
from nextscale.core.random import ImageDraws
from nextscale.core.sampling import Accepted
from nextscale.core.training import TrainingConfig
from nextscale.tasks.data import ImageData
from nextscale.tasks.generation.car import CAR, CARConfig, is_official
from nextscale.tasks.generation.car_recipe import CARRecipe, check_places
from nextscale.tasks.generation.car_training import CARTraining, initialize, pass_base_through
from nextscale.tasks.generation.controls import Extraction, extract_batch
from nextscale.tasks.generation.var import VAR

LABELS = torch.tensor([1, 3])


def build(tiny: SimpleNamespace, base: VAR | None = None, **transformer: Any) -> CAR:
    base = base or tiny.var(**transformer)
    torch.manual_seed(1)
    model = CAR(CARConfig(base.config, (4, 6), Extraction("canny"), guidance=1.5), base, "base")
    initialize(model, conv_std=None)
    for part in (model.control_blocks, model.skips, model.control_encoder):
        tiny.scattered(part, 2)
    return model.eval()


@pytest.fixture(scope="module")
def model(tiny: SimpleNamespace) -> CAR:
    return build(tiny, depth=4)


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.rand(2, 3, 12, 10, generator=torch.Generator().manual_seed(0))


def steps(model: CAR, control: Any, guidance: float = 1.5, **options: Any) -> list[Any]:
    draws, emitter = ImageDraws([0, 1]), CategoricalEmitter(top_k=5)
    return list(model.steps(LABELS, draws=draws, emitter=emitter, guidance=guidance, control=control, **options))


@pytest.mark.parametrize("conditioning", ["block", "shared"])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_stepping_gives_what_teacher_forcing_gives(
    tiny: SimpleNamespace, pictures: Tensor, conditioning: str, strength: float
) -> None:
    model = build(tiny, depth=4, conditioning=conditioning)
    schedule, done = model.config.schedule, steps(model, pictures, strength=strength)
    tokens = torch.cat([step.tokens for step in done], dim=1)
    with torch.no_grad():
        inputs = model.tokenizer.quantizer.teacher_inputs(tokens, schedule)
        scales = model.pyramid(pictures)
        conditional = model(inputs, LABELS, scales, strength=strength)
        free = model(inputs, torch.full_like(LABELS, model.config.classes), scales, strength=strength)
    for step, given, without in zip(done, schedule.split(conditional), schedule.split(free), strict=True):
        t = 1.5 * schedule.ratio(step.index)
        torch.testing.assert_close(step.logits, (1 + t) * given - t * without, rtol=1e-4, atol=1e-4)


def test_sampling_goes_on_from_accepted_scales(model: CAR, pictures: Tensor) -> None:
    whole, schedule = steps(model, pictures), model.config.schedule
    tokens = torch.cat([step.tokens for step in whole], dim=1)
    inputs = model.tokenizer.quantizer.teacher_inputs(tokens, schedule)[:, : sum(schedule.lengths[1:3])]
    (rest,) = steps(model, pictures, accepted=Accepted(2, whole[1].total, inputs))
    torch.testing.assert_close(rest.logits, whole[2].logits, rtol=1e-4, atol=1e-4)


def test_without_control_it_is_the_base(model: CAR, pictures: Tensor) -> None:
    plain = model.base.generate([1, 3], seed=5, guidance=1.5)
    assert torch.equal(model.generate([1, 3], seed=5), plain)
    assert torch.equal(model.generate([1, 3], seed=5, control=pictures, strength=0), plain)
    assert not torch.equal(model.generate([1, 3], seed=5, control=pictures), plain)


def test_a_control_is_encoded_once(model: CAR, pictures: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    encode = model.control_encoder.forward
    monkeypatch.setattr(model.control_encoder, "forward", lambda x: seen.append(len(x)) or encode(x))
    one = model.generate([1] * 5, seed=0, control=pictures[:1], batch_size=2)
    assert seen == [1, 1, 1]  # whatever the copies, batches and branches
    seen.clear()
    copies = model.generate([1] * 5, seed=0, control=pictures[:1].expand(5, -1, -1, -1), batch_size=5)
    assert seen == [1, 1, 1]
    torch.testing.assert_close(one, copies)
    seen.clear()
    mixed = model.generate([1] * 3, seed=0, control=pictures[[0, 1, 0]])
    assert seen == [2, 2, 2]
    torch.testing.assert_close(mixed[[0, 2]], copies[[0, 2]])


def test_controls_are_checked(model: CAR, pictures: Tensor) -> None:
    with pytest.raises(ValueError, match="2 control pictures were given for 3 images"):
        model.generate([1], n=3, control=pictures)
    with pytest.raises(ValueError, match="follows canny controls, not depth"):
        model.generate([1], control=pictures[:1], control_type="depth")
    with pytest.raises(ValueError, match=r"the control is \(1, 1, 4, 4\)"):
        model.generate([1], control=torch.zeros(1, 1, 4, 4))
    assert len(model.generate(control=pictures)) == 2


def test_sizes_are_checked(tiny: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="3 blocks; CAR needs an even number"):
        CARConfig(tiny.var(depth=3).config)
    base = tiny.var()
    with pytest.raises(ValueError, match=r"one token of 4 pixels, the base's tokenizer of 2; give 2 widths"):
        CAR(CARConfig(base.config, (4, 4, 4)), base)
    with pytest.raises(ValueError, match="width 16 wanted, 32 there"):
        CAR(CARConfig(base.config, (4, 4)), tiny.var(width=32))


# --- files ----------------------------------------------------------------------------------------------


def test_a_saved_adapter_finds_its_base(
    tiny: SimpleNamespace, pictures: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = tiny.var(seed=3)
    base.save("bases/mine")
    model = build(tiny, base)
    model.base_name = "bases/mine"
    folder = model.save("adapters/canny")
    assert not any("base" in name for name in read_tensors(folder / "model.safetensors"))
    wanted = model.generate([2], seed=1, control=pictures[:1])
    for again in (nextscale.load(folder), nextscale.load(folder, base=base), nextscale.load(folder, base="bases/mine")):
        assert torch.equal(again.generate([2], seed=1, control=pictures[:1]), wanted)
        assert again.config == model.config
    nextscale.load(folder).save("again")
    assert torch.equal(nextscale.load("again").skips[0].linear.weight, model.skips[0].linear.weight)
    with pytest.raises(CheckpointError, match="trained on another base"):
        nextscale.load(folder, base=tiny.var(seed=4))
    with pytest.raises(CheckpointError, match="blocks 2 wanted, 4 there"):
        nextscale.load(folder, base=tiny.var(depth=4))


def test_the_official_layout_both_ways(model: CAR, pictures: Tensor, tmp_path: Path, tiny: SimpleNamespace) -> None:
    official = model.to_official()
    assert all("car" in name for name in official) and is_official(official)
    assert official["car_blocks.0.attn.scale_mul_1H11"].shape == (1, 2, 1, 1)
    torch.save(official, tmp_path / "car_canny.pth")
    inside = {"car_wo_ddp": model.base.to_official() | official, "vae_local": {}, "car_opt": {}}
    torch.save({"epoch": 1, "iter": 0, "trainer": inside, "args": {}}, tmp_path / "all_states_last.pth")
    wanted = model.generate([2], seed=1, control=pictures[:1])
    for name in ("car_canny.pth", "all_states_last.pth"):
        again = nextscale.load(tmp_path / name, base=model.base, control_type="canny", guidance=1.5)
        assert isinstance(again, CAR) and again.config.control_type == "canny"
        assert torch.equal(again.generate([2], seed=1, control=pictures[:1]), wanted)
    other = tiny.var(depth=4, seed=9)
    with pytest.raises(CheckpointError, match="snapshot was trained on another base"):
        nextscale.load(tmp_path / "all_states_last.pth", base=other)
    with pytest.raises(CheckpointError, match="for a VAR of 4 blocks of width 16, the base has 2"):
        nextscale.load(tmp_path / "car_canny.pth", base=tiny.var())


def test_named_adapters_know_their_control() -> None:
    from nextscale.models import MODELS

    named = MODELS["car-sketch-d16"]
    assert (named.file, named.needs["base"], named.options["control_type"]) == (
        "car_sketch_d16.pth",
        "var-d16",
        "sketch",
    )


# --- training -------------------------------------------------------------------------------------------


def batch_of(model: CAR, count: int = 8) -> dict[str, Tensor]:
    image = torch.rand(count, 3, *model.tokenizer.image_size(), generator=torch.Generator().manual_seed(0))
    control = extract_batch(image, Extraction("canny")) * 2 - 1
    labels = torch.arange(count) % model.config.classes
    return {"image": image * 2 - 1, "control": control, "label": labels, "uniform": torch.ones(count)}


def test_only_the_adapter_trains(tiny: SimpleNamespace) -> None:
    model = build(tiny, depth=4).train()
    loss, metrics = model.loss(batch_of(model))
    loss.backward()
    assert metrics["cross_entropy"] > 0
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(dict(model.named_parameters())) - {
        f"base.{n}" for n, _ in model.base.named_parameters()
    }
    assert model.base.training and not model.tokenizer.training


def test_fitted_skips_leave_the_base_as_it_is(tiny: SimpleNamespace) -> None:
    base = tiny.var(depth=4)
    model = initialize(CAR(CARConfig(base.config, (4, 6)), base), conv_std=None)
    batch, schedule = batch_of(model, 64), model.config.schedule
    inputs = model.tokenizer.quantizer.teacher_inputs(model.tokenizer.encode(batch["image"]), schedule)
    scales = model.pyramid((batch["control"] + 1) / 2)

    def distance() -> float:
        with torch.no_grad():
            return float((model.eval()(inputs, batch["label"], scales) - base(inputs, batch["label"])).square().mean())

    before = distance()
    pass_base_through(model, batch)
    assert distance() < 0.2 * before


@pytest.mark.parametrize("tree", [False, True])
def test_a_recipe_trains_and_saves(tiny: SimpleNamespace, tmp_path: Path, tree: bool) -> None:
    names = ("cat", "dog")
    base = tiny.var(classes=2, class_names=names)
    photos = tiny.images(tmp_path / "photos")
    recipe = CARRecipe(
        data=ImageData(str(photos), validation=str(photos), size=8, flip=True),
        base="base",
        folder=str(photos) if tree else None,
        validation_folder=str(photos) if tree else None,
        widths=[4, 6],
        training=TrainingConfig(output=str(tmp_path / "run"), epochs=2, batch_size=4, workers=0, log_every=1),
    )
    run = recipe.trainer(lambda source: base)
    before = {name: value.clone() for name, value in run.task.model.state_dict().items()}
    run.run()
    assert isinstance(run.task, CARTraining) and run.steps == 4
    changed = {n for n, value in run.task.model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed and not any(name.startswith("base.") for name in changed)
    again = nextscale.load(recipe.finish(run), base=base)
    assert again.config.control_type == "canny" and again.config.widths == (4, 6)
    if tree:  # the same crop and mirroring for both pictures of a pair
        batch = recipe.open().fetch([(3, i) for i in range(8)])
        torch.testing.assert_close(batch["image"], batch["control"])
    assert [name for name, _ in recipe.examples(run).rows][1] == "canny control"


def test_recipes_are_checked(tiny: SimpleNamespace, tmp_path: Path) -> None:
    data = ImageData(str(tiny.images(tmp_path / "photos")), size=8)
    with pytest.raises(ValueError, match="give base"):
        CARRecipe(data=data)
    with pytest.raises(ValueError, match="give validation_folder"):
        CARRecipe(data=replace(data, validation="x"), base="base", folder="controls")
    recipe = CARRecipe(data=data, base="base", training=TrainingConfig(output=str(tmp_path / "run"), batch_size=4))
    with pytest.raises(ValueError, match="the data has 2 classes, base knows 1"):
        recipe.trainer(lambda source: tiny.var(classes=1))
    with pytest.raises(ValueError, match="class 0 of the data is cat, which the base knows as class 1"):
        recipe.trainer(lambda source: tiny.var(classes=2, class_names=("dog", "cat")))
    check_places(("n01440764", "n01443537"), ("tench, Tinca tinca", "goldfish"))
    with pytest.raises(ValueError, match="CAR controls a VAR"):
        recipe.trainer(lambda source: tiny.tokenizer())

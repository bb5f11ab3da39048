"""The raster baseline: causal, the same by steps and at once, filled row by row, trained and saved like a VAR."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nextscale.core.checkpoint import read_folder
from nextscale.core.random import ImageDraws
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import TrainingConfig
from nextscale.datasets.images import open_images
from nextscale.tasks.data import ImageData
from nextscale.tasks.generation.drawing import draw
from nextscale.tasks.generation.raster import Raster, RasterPyramid, is_official, raster_order
from nextscale.tasks.generation.raster_recipe import RasterRecipe
from nextscale.tasks.generation.var import VAR
from nextscale.tasks.generation.var import is_official as is_official_var
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ
from nextscale.tasks.tokenizers.tokenize import write_tokens

GRID = ScaleSchedule.parse("4")


def build(tiny: SimpleNamespace, grid: ScaleSchedule = GRID, **options: Any) -> Raster:
    tokenizer = tiny.tokenizer(schedule=grid)
    model = Raster(replace(tiny.var(**options).config, schedule=raster_order(grid)), tokenizer)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("tokenizer."):
                parameter.normal_(std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def raster(tiny: SimpleNamespace) -> Raster:
    return build(tiny)


@pytest.mark.parametrize("options", [{}, {"conditioning": "shared"}, {"attention": "dot"}])
def test_stepping_on_forced_tokens_is_teacher_forcing(options: dict[str, Any], tiny: SimpleNamespace) -> None:
    model = build(tiny, ScaleSchedule.parse("3x4"), **options)
    schedule, quantizer = model.config.schedule, model.tokenizer.quantizer
    assert len(schedule) == 12
    tokens, labels = torch.randint(16, (2, 12)), torch.tensor([1, 5])
    pyramid = RasterPyramid(quantizer, model.tokenizer.config.schedule)
    with torch.inference_mode():
        codes = quantizer.lookup(tokens)
        at_once = model(codes[:, :-1], labels)
        session, total, steps = model.start(labels, schedule), pyramid.begin(2, schedule), []
        for index in range(12):
            hidden = session.step(index, pyramid.next_input(total, schedule, index) if index else None)
            steps.append(session.logits(hidden, slice(None)))
            total = pyramid.advance(total, codes[:, index : index + 1], schedule, index)
        together = model.start(labels, schedule).step(7, codes[:, :7], first=0)
    torch.testing.assert_close(torch.cat(steps, 1), at_once, rtol=0, atol=1e-4)
    torch.testing.assert_close(session.logits(together, slice(None)), at_once[:, :8], rtol=0, atol=1e-4)
    assert at_once.std() > 0.1
    # In raster order, and as the tokenizer decodes the whole grid.
    assert torch.equal(total.flatten(2).mT, codes)
    expected = (model.tokenizer.decode(tokens) + 1) / 2
    torch.testing.assert_close(model.picture(total), expected, rtol=0, atol=1e-5)


def test_no_token_sees_a_later_one(raster: Raster) -> None:
    inputs, labels = torch.randn(1, 15, 4), torch.tensor([2])
    changed = inputs.clone()
    changed[:, 9] += 1
    for training in (False, True):
        raster.train(training)
        with torch.set_grad_enabled(training):
            difference = (raster(inputs, labels) - raster(changed, labels)).abs().amax(-1)[0]
        assert torch.all(difference[:10] == 0) and torch.all(difference[10:] > 0)
    raster.eval()


def test_images(raster: Raster) -> None:
    images = raster.generate([1, 2, 3], seed=4, batch_size=2)
    assert images.shape == (3, 3, 8, 8)
    torch.testing.assert_close(images[1:2], raster.generate(2, seed=5), rtol=0, atol=1e-5)
    done: list[tuple[int, int]] = []
    [drawn] = draw(raster, [1], 1, forming=1, progress=lambda *place: done.append(place))
    assert drawn.tokens.shape == (1, 16) and done[-1] == (16, 16)
    assert drawn.forming is not None and drawn.forming.shape == (16, 1, 3, 8, 8)


def test_guidance_is_as_strong_for_all_tokens(raster: Raster) -> None:
    labels = torch.tensor([1])
    steps = list(raster.steps(labels, draws=ImageDraws([3]), guidance=2.0))
    codes = torch.cat([step.codes for step in steps], 1)[:, :-1]
    with torch.inference_mode():
        wanted, other = raster(codes, labels), raster(codes, torch.tensor([5]))
    torch.testing.assert_close(torch.cat([s.logits for s in steps], 1), 3 * wanted - 2 * other, rtol=0, atol=1e-4)
    plain = list(raster.steps(labels, draws=ImageDraws([3]), guidance=0.0))
    with torch.inference_mode():
        first = raster(plain[0].codes[:, :0], labels, raster.config.schedule.prefix(1))
    torch.testing.assert_close(plain[0].logits, first, rtol=0, atol=1e-4)


def test_files(raster: Raster, tmp_path: Path) -> None:
    state, config = read_folder(raster.save(tmp_path / "model"))
    again = Raster.from_saved(state, config)
    assert config["system"] == "raster" and again.config == raster.config
    assert torch.equal(again.generate(1, seed=2), raster.generate(1, seed=2))
    assert not is_official(raster.state_dict()) and not is_official_var(raster.state_dict())
    with pytest.raises(ValueError, match="no official layout"):
        _ = raster.official_name


def test_a_pyramid_is_refused(tiny: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="goes over a single one"):
        Raster(tiny.var().config, tiny.tokenizer())
    with pytest.raises(ValueError, match="give raster_order of it"):
        Raster(tiny.var().config, tiny.tokenizer(schedule=GRID))


def test_training_on_images_and_on_tokens(tiny: SimpleNamespace, tmp_path: Path) -> None:
    images = str(tiny.images(tmp_path / "images", side=8))
    tokenizer = tiny.tokenizer(schedule=GRID)
    place = str(tokenizer.save(tmp_path / "tokenizer"))
    opened = open_images(images, size=8, resize_ratio=1, crop="center")
    tokens = str(write_tokens(tokenizer, opened, tmp_path / "tokens", mirrored=False))

    def load(source: str, tokenizer: Any = None) -> Any:
        return ResidualVQ.load(source)

    training = TrainingConfig(str(tmp_path / "run"), epochs=2, batch_size=4, save_every=0)
    sizes: dict[str, Any] = {"tokenizer": place, "depth": 1, "width": 16, "heads": 2, "training": training}
    recipe = RasterRecipe(tokens=tokens, validation_tokens=tokens, **sizes)
    run = recipe.trainer(load)
    run.run()
    assert len(recipe.examples(run).rows) == 2
    state, config = read_folder(recipe.finish(run))
    model = Raster.from_saved(state, config)
    assert model.config.transformer.width == 16 and len(model.config.schedule) == 16
    batch = opened.fetch(range(4))
    kept = {"tokens": model.tokenizer.encode(batch["image"]), "label": batch["label"]}
    torch.manual_seed(0)
    from_images, metrics = model.loss(batch)
    torch.manual_seed(0)
    assert torch.equal(model.loss(kept)[0], from_images)
    assert set(metrics) == {"cross_entropy", "accuracy"}
    on_images = RasterRecipe(data=ImageData(images, size=8, resize_ratio=1), **sizes)
    assert isinstance(on_images.build(on_images.open(), load), VAR)
    with pytest.raises(ValueError, match="give tokenizer"):
        RasterRecipe(tokens=tokens)

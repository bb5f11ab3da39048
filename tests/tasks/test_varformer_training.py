"""Training VarFormer: both stages, the comparison without the prior, and the terms of the loss."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.core.training import TrainingConfig
from nextscale.loading import load
from nextscale.tasks.data import ImageData
from nextscale.tasks.generation.var_recipe import VARRecipe
from nextscale.tasks.restoration import varformer_perceptual
from nextscale.tasks.restoration.data import RestorationData
from nextscale.tasks.restoration.varformer import VarFormer, VarFormerConfig
from nextscale.tasks.restoration.varformer_recipe import VarFormerRecipe
from nextscale.tasks.restoration.varformer_training import VarFormerLossConfig, VarFormerTraining

MODEL = VarFormerConfig(1, 4, 1, decoder_blocks=1, encoder_heads=4, window_groups=1)


def training(folder: Path, name: str) -> TrainingConfig:
    return TrainingConfig(str(folder / name), epochs=1, batch_size=2, learning_rate=0.1, average=0.5, log_every=1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Four photographs of two sizes."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(4):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
        coarse.resize((24, 20 + i), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def prior(tiny, tmp_path_factory) -> Path:
    return tiny.var().save(tmp_path_factory.mktemp("prior"))


def run(recipe: VarFormerRecipe) -> tuple[VarFormer, VarFormer]:
    """The model before training and after."""
    before = recipe.build(load)
    runner = recipe.trainer(load)
    runner.run()
    return before, load(recipe.finish(runner), device="cpu")


def changed(before: VarFormer, after: VarFormer) -> set[str]:
    """First parts of the names of what training has changed."""
    other = after.state_dict()
    names = {n for n, v in before.state_dict().items() if not torch.equal(v, other[n])}
    return {".".join(name.split(".")[: 2 if name.startswith("prior") else 1]) for name in names}


def test_two_stages(photos, prior, tmp_path):
    data = RestorationData([str(photos)], size=8, flip=True, crops=4)
    first = VarFormerRecipe(data, 1, str(prior), model=MODEL, training=training(tmp_path, "first"))
    before, after = run(first)
    own = {"prior.class_embedding", "prior.word_embedding", "prior.level_embedding", "prior.start_position"}
    own |= {"prior.position_embedding", "prior.head", "steering", "enhancement"}
    assert changed(before, after) == own and after.encoder is None

    noisy = RestorationData([str(photos)], [str(photos)], {"noise": "noise:sigma=20"}, size=8)
    options = {"init": str(tmp_path / "first" / "model"), "model": MODEL}
    second = VarFormerRecipe(noisy, 2, **options, training=training(tmp_path, "second"))
    before, after = run(second)
    assert torch.equal(before.steering[0].query.weight, load(options["init"], device="cpu").steering[0].query.weight)
    assert changed(before, after) == own | {"encoder", "decoder"}
    assert after.config.restoration and after.config.form == "fixed"

    examples = second.examples(second.trainer(load))
    assert [name for name, _ in examples.rows] == ["degraded", "restored", "clean"]

    bare = VarFormerRecipe(noisy, 2, **options, without_prior=True, training=training(tmp_path, "without"))
    before, after = run(bare)
    assert changed(before, after) == {"encoder", "decoder"} and not after.config.with_prior
    count = [sum(p.numel() for p in m.encoder.parameters()) for m in (after, second.build(load))]
    assert count[0] == count[1]


def test_terms_of_the_loss(tiny):
    torch.manual_seed(0)
    model = VarFormer(MODEL, tiny.var())
    batch = {name: torch.rand(2, 3, 8, 8) * 2 - 1 for name in ("clean", "degraded")}
    task = VarFormerTraining(model, VarFormerLossConfig(l1=2.0, psnr=0.5, feature=3.0, cross_entropy=0.25))
    output = model(batch["degraded"])
    terms = task.terms(output, batch["clean"])
    assert set(terms) == {"l1", "psnr", "feature", "cross_entropy"}
    torch.testing.assert_close(terms["l1"], 2 * (output.pixels - batch["clean"]).abs().mean())
    psnr = 10 * torch.log10(1 / (output.pixels - batch["clean"]).square().mean((1, 2, 3)))
    torch.testing.assert_close(terms["psnr"], -0.5 * psnr.mean())
    target = model.read(batch["clean"], enhance=False)
    log = output.roll_out.logits.log_softmax(-1).gather(-1, target.tokens[..., None])
    torch.testing.assert_close(terms["cross_entropy"], -0.25 * log.mean())
    loss, metrics = model.loss(batch)
    assert math.isfinite(loss.item()) and "quality" in metrics
    loss.backward()
    assert model.enhancement[0].beta.grad.abs().sum() > 0  # through the straight-through latent


def test_perceptual_term(monkeypatch, tmp_path):
    monkeypatch.setattr(varformer_perceptual, "STAGES", ((4, (0, 2)), (6, (5,))))
    weights = {"features.0": (4, 3), "features.2": (4, 4), "features.5": (6, 4)}
    content = {f"{n}.weight": torch.randn(*s, 3, 3) for n, s in weights.items()}
    content |= {f"{n}.bias": torch.randn(s[0]) for n, s in weights.items()}
    torch.save(content, tmp_path / "vgg19.pth")
    features = varformer_perceptual.VGG19Features.from_file(tmp_path / "vgg19.pth")
    image = torch.rand(1, 3, 16, 16)
    assert features(image, image) == 0 and features(image, image.flip(-1)) > 0
    with pytest.raises(ValueError, match="16 or more"):
        features(image[..., :8], image[..., :8])
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"no features\.0\.weight"):
        varformer_perceptual.VGG19Features.from_file(tmp_path / "other.pth")


def test_what_a_recipe_refuses(photos, prior, tiny, tmp_path):
    data = RestorationData([str(photos)], size=8)
    with pytest.raises(ValueError, match="either prior"):
        VarFormerRecipe(data)
    with pytest.raises(ValueError, match="no first stage"):
        VarFormerRecipe(data, 1, "somewhere", without_prior=True)
    with pytest.raises(ValueError, match=r"data\.size is 16"):
        VarFormerRecipe(RestorationData([str(photos)], size=16), 2, str(prior), model=MODEL).build(load)
    tokenizer = str(tiny.tokenizer().save(tmp_path / "tokenizer"))
    with pytest.raises(ValueError, match="builds on a VAR"):
        VarFormerRecipe(data, 2, tokenizer, model=MODEL).build(load)
    with pytest.raises(ValueError, match="give the VAR as prior"):
        VarFormerRecipe(data, 2, init=str(prior), model=MODEL).build(load)


def test_prior_of_photographs_without_labels(photos, tiny, tmp_path):
    tokenizer = tiny.tokenizer().save(tmp_path / "tokenizer")
    data = ImageData(str(photos), str(photos), size=8, resize_ratio=0)
    recipe = VARRecipe(data, classes=1, label_drop=1.0, tokenizer=str(tokenizer), width=16, heads=2, depth=1)
    dataset = recipe.open()
    assert dataset.fetch([0, 3])["label"].tolist() == [0, 0] and recipe.held_out().num_classes == 1
    assert recipe.build(dataset, load).config.classes == 1

"""The KL autoencoder: distributions and pyramids of latents, official files both ways, training."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import nextscale
from nextscale.cli.train import load_initial
from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.checkpoint import CheckpointError
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import TrainingConfig
from nextscale.tasks.data import ImageData
from nextscale.tasks.tokenizers.kl_autoencoder import KLAutoencoder, KLConfig, Posterior, is_official
from nextscale.tasks.tokenizers.kl_pyramid import LatentPyramid
from nextscale.tasks.tokenizers.kl_training import KLLossConfig, KLRecipe
from nextscale.tasks.tokenizers.residual_vq import is_official as is_official_vq

SCHEDULE = ScaleSchedule.squares(1, 2, 4)
SIZES = AutoencoderConfig(32, (1, 1), 1, 4)


def build(**options: Any) -> KLAutoencoder:
    torch.manual_seed(0)
    given = {"autoencoder": SIZES, "schedule": SCHEDULE, "latent_scale": 0.5, **options}
    return KLAutoencoder(KLConfig(**given)).eval()


def images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_published_size() -> None:
    with torch.device("meta"):
        made = KLAutoencoder()
    assert sum(p.numel() for p in made.parameters()) == 66_456_019 and made.stride == 16
    assert [len(level.attentions) for level in made.encoder.levels] == [0, 0, 0, 0, 2]  # type: ignore[arg-type]
    assert not any(len(level.attentions) for level in made.decoder.levels)  # type: ignore[arg-type]


def test_pyramid() -> None:
    pyramid, latent = LatentPyramid(4), torch.randn(2, 4, 4, 4)
    parts, maps = pyramid.encode(latent, SCHEDULE)
    assert torch.equal(maps[-1], latent)
    torch.testing.assert_close(maps[0], latent.mean((2, 3), keepdim=True))
    joined = torch.cat(parts, dim=1)
    for made, expected in zip(pyramid.maps(joined, SCHEDULE), maps, strict=True):
        assert torch.equal(made, expected)
    assert [each.shape[-1] for each in pyramid.decode(joined, SCHEDULE)] == [4, 4, 4]
    inputs, total, steps = pyramid.teacher_inputs(joined, SCHEDULE), pyramid.begin(2, SCHEDULE), []
    for index, part in enumerate(parts):
        if index:
            steps.append(pyramid.next_input(total, SCHEDULE, index))
        total = pyramid.advance(total, part, SCHEDULE, index)
    assert torch.equal(torch.cat(steps, 1), inputs)
    with pytest.raises(ValueError, match=r"the latent's grid is \(4, 4\), the schedule '1 2' ends at \(2, 2\)"):
        pyramid.encode(latent, SCHEDULE.prefix(2))


def test_images_to_latents_and_back() -> None:
    tokenizer = build()
    with torch.no_grad():
        tokens, features = tokenizer.encode(images()), tokenizer.features(images())
        assert tokens.shape == (2, 21, 4)
        torch.testing.assert_close(features, tokenizer.posterior(images()).mean * 0.5)
        assert torch.equal(tokenizer.decode(tokens), tokenizer.decode_features(features))
        kept = tokenizer.restored(tokenizer.stored(images()))
    torch.testing.assert_close(kept.mean, features * 2)
    drawn = kept.sample(torch.ones_like(kept.mean))
    torch.testing.assert_close(drawn, kept.mean + (kept.log_variance / 2).exp())
    normal = torch.distributions.Normal(kept.mean, (kept.log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(kept.divergence(), expected.flatten(1).sum(1))
    assert Posterior.of(torch.full((1, 2, 1, 1), 99.0)).log_variance.item() == 20


@pytest.mark.parametrize(
    "options",
    [{}, {"variational": False}, {"decoder_attention": (0,), "autoencoder": AutoencoderConfig(32, (1, 2), 1, 4)}],
)
def test_official_files_both_ways(options: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = build(latent_scale=0.2325, **options)
    state = tokenizer.to_official()
    assert {"encoder.mid.attn_1.q.weight", "quant_conv.bias", "decoder.up.0.block.1.conv2.weight"} <= set(state)
    content = {"model": {**state, "loss.discriminator.main.0.weight": torch.zeros(1)}}
    assert is_official(content) and is_official(state) and not is_official_vq(content)
    torch.save(content, tmp_path / "kl16.ckpt")
    back = nextscale.load(tmp_path / "kl16.ckpt", device="cpu", schedule="1 2 4")
    assert isinstance(back, KLAutoencoder) and back.config == tokenizer.config
    again = back.to_official()
    assert set(again) == set(state) and all(torch.equal(again[name], state[name]) for name in state)
    with torch.no_grad():
        assert torch.equal(back.moments(images()), tokenizer.moments(images()))
    saved = nextscale.load(tokenizer.save(tmp_path / "own"), device="cpu")
    assert saved.config == tokenizer.config and saved.decode(back.encode(images())).shape == (2, 3, 8, 8)
    with pytest.raises(CheckpointError, match="the state dict lacks an entry of the KL autoencoder"):
        KLAutoencoder.from_official({"quant_conv.weight": state["quant_conv.weight"]})


def test_differences_from_the_official_code() -> None:
    assert not build(latent_scale=0.2325).official_differences()
    [scale] = build().official_differences()
    assert scale == "latents times 0.5, where it has 0.2325"


# --- training -----------------------------------------------------------------------------------------


def recipe(tiny: SimpleNamespace, tmp_path: Path, **options: Any) -> KLRecipe:
    source = tmp_path / "images"
    if not source.exists():
        tiny.images(source)
    given = {"scales": "1 2 4", "autoencoder": SIZES, "loss": KLLossConfig(perceptual=0.5), **options}
    config = TrainingConfig(
        output=str(tmp_path / "run"), epochs=4, batch_size=4, learning_rate=0.05, warmup_epochs=0, grad_clip=1
    )
    return KLRecipe(ImageData(str(source), str(source), size=8, resize_ratio=1.0), config, **given)


def test_training(tiny: SimpleNamespace, tmp_path: Path) -> None:
    made = recipe(tiny, tmp_path)
    run = made.trainer(load_initial)
    before = made.finished(run)  # measured before the first step: only the latents' spread counts
    run.run()
    folder = made.finish(run)
    tokenizer = nextscale.load(folder, device="cpu")
    assert isinstance(tokenizer, KLAutoencoder) and tokenizer.config.latent_scale != before.config.latent_scale / 2
    pictures = made.data.open_training(0, labels=False).fetch(range(8))["image"]
    with torch.no_grad():
        posterior = tokenizer.posterior(pictures)
        spread = (posterior.mean.square() + posterior.log_variance.exp()).mean().sqrt()
    assert spread.item() * tokenizer.config.latent_scale == pytest.approx(1, rel=1e-4)
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert '"divergence"' in log and '"spread"' in log and '"validation/psnr"' in log
    rows = made.examples(run).rows
    assert [name for name, _ in rows] == ["images", "1 scales", "2 scales", "3 scales"]
    loss, metrics = tokenizer.loss({"image": pictures})
    assert loss.item() > 0 and metrics["divergence"].item() > 0


def test_starting_from_other_tokenizers(tiny: SimpleNamespace, tmp_path: Path) -> None:
    place = str(tiny.tokenizer().save(tmp_path / "vq"))
    start = recipe(tiny, tmp_path, init=place).start(SCHEDULE, load_initial)
    source = nextscale.load(place, device="cpu").state_dict()
    own = start.state_dict()
    same = {name for name in own if name in source and torch.equal(own[name], source[name])}
    assert "decoder.conv_out.weight" in same and "encoder.levels.0.blocks.0.conv1.weight" in same
    assert own["encoder.conv_out.weight"].shape[0] == 8  # means and variances: the source had none
    place = str(build().save(tmp_path / "kl"))
    made = recipe(tiny, tmp_path, init=place, decoder_only=True)
    run = made.trainer(load_initial)
    frozen = run.task.tokenizer.encoder  # type: ignore[attr-defined]
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert made.finished(run).config.latent_scale == 0.5


def test_the_shipped_recipe_is_read() -> None:
    from nextscale.cli.train import make_recipe, recipe_parser

    path = Path(nextscale.__file__).parent / "recipes" / "kl-cifar10.yaml"
    made = make_recipe("kl-tokenizer", recipe_parser("kl-tokenizer").parse_args(["--config", str(path)]))
    assert made.autoencoder.latent_channels == yaml.safe_load(path.read_text())["autoencoder"]["latent_channels"]

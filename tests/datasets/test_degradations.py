"""Every degradation has the field's strength, and is the same for a sample wherever that sample is."""

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from nextscale.datasets.degradations import (
    JPEG,
    KINDS,
    PRESETS,
    DefocusBlur,
    Downsample,
    GaussianNoise,
    Haze,
    LowLight,
    Mixture,
    MotionBlur,
    Quantise,
    RainStreaks,
    Snow,
    degrade,
    matlab_resize,
    parse_steps,
    sample_generator,
)
from nextscale.datasets.degradations_blur import disk, line, shake


@pytest.fixture
def photo() -> torch.Tensor:
    coarse = torch.rand(1, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (48, 56), mode="bilinear")[0]


@pytest.mark.parametrize("name", PRESETS)
def test_a_sample_is_damaged_alike_anywhere(name: str, photo: torch.Tensor) -> None:
    image, clean = degrade(photo, PRESETS[name], 3, 0, 7)
    torch.rand(5)
    np.random.default_rng(0).random()
    again, _ = degrade(photo.clone(), PRESETS[name], 3, 0, 7)
    assert torch.equal(image, again) and image.dtype == torch.float32 and image.shape == clean.shape
    assert 0 <= image.min() <= image.max() <= 1 and (image - clean).abs().mean() > 1e-3
    if any(isinstance(getattr(step, f), tuple) for step in PRESETS[name] for f in vars(step)):
        other, _ = degrade(photo, PRESETS[name], 3, 1, 7)
        assert not torch.equal(image, other)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("size", [(1, 1), (12, 4)])
def test_small_images(name: str, size: tuple[int, int]) -> None:
    steps, image = PRESETS[name], torch.rand(3, *size)
    if any(step.multiple > min(size) for step in steps):
        with pytest.raises(ValueError, match="cannot be cropped to multiples"):
            degrade(image, steps, 0)
        return
    damaged, clean = degrade(image, steps, 0)
    assert damaged.shape == clean.shape and torch.isfinite(damaged).all()


def test_keys_are_numbers_or_names() -> None:
    first = [sample_generator(0, *key).random() for key in ((), (1,), (1, 0), ("a",), ("b",), (1, "a"))]
    assert len(set(first)) == len(first)
    assert sample_generator(0, "a.png").random() == sample_generator(0, "a.png").random()


def test_noise_has_its_strength(photo: torch.Tensor) -> None:
    grey = torch.full((3, 120, 120), 0.5)
    for sigma in (15.0, 25.0, 50.0):
        noise = (degrade(grey, (GaussianNoise(sigma=sigma, clip=False),), 0)[0] - 0.5) * 255
        assert noise.std() == pytest.approx(sigma, rel=0.02) and abs(noise.mean()) < 0.5
    found = [(degrade(grey, PRESETS["noise-blind"], 0, i)[0] - 0.5).std().item() * 255 for i in range(25)]
    assert min(found) < 10 and 40 < max(found) < 56
    rounded, _ = degrade(photo, (GaussianNoise(), Quantise(mode="truncate")), 0)
    noisy, _ = degrade(photo, (GaussianNoise(),), 0)
    torch.testing.assert_close(rounded * 255, (noisy * 255).floor(), atol=2e-4, rtol=0)


def test_a_step_has_random_numbers_of_its_own(photo: torch.Tensor) -> None:
    noise = GaussianNoise(clip=False)
    dark, _ = degrade(photo, (Quantise(), noise), 0)
    drawn = dark - (photo * 255).round() / 255
    blurred, _ = degrade(photo, (MotionBlur(), noise), 0)
    steps = (MotionBlur(), GaussianNoise(sigma=0.0))
    torch.testing.assert_close(blurred - degrade(photo, steps, 0)[0], drawn, atol=1e-5, rtol=0)


def test_jpeg_is_pillows(photo: torch.Tensor) -> None:
    coarse, fine = (degrade(photo, (JPEG(quality=q),), 0)[0] for q in (10, 90))
    assert (coarse - photo).abs().mean() > 2 * (fine - photo).abs().mean()
    assert torch.equal(coarse, (coarse * 255).round() / 255)


def test_the_resize_is_matlabs() -> None:
    # Pillow's bicubic has the same kernel; it differs from MATLAB's only where pixels beyond the border count.
    values = np.random.default_rng(0).random((60, 48)).astype(np.float32)
    for size in ((15, 12), (20, 24), (120, 96), (33, 47)):
        ours = matlab_resize(torch.from_numpy(values)[None], size)[0].numpy()
        theirs = np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.BICUBIC))
        inner = (slice(3, -3), slice(3, -3))
        np.testing.assert_allclose(ours[inner], theirs[inner], atol=2e-6)
    # Beyond the borders MATLAB mirrors with the edge repeated.
    padded = np.pad(values, 24, mode="symmetric")
    theirs = np.asarray(Image.fromarray(padded).resize((24, 27), Image.Resampling.BICUBIC))
    ours = matlab_resize(torch.from_numpy(values), (15, 12)).numpy()
    np.testing.assert_allclose(ours, theirs[6:-6, 6:-6], atol=2e-6)
    constant = torch.full((3, 9, 7), 0.3)
    torch.testing.assert_close(matlab_resize(constant, (4, 20)), torch.full((3, 4, 20), 0.3))


def test_downsampling_crops_the_truth(photo: torch.Tensor) -> None:
    small, clean = degrade(photo[:, :47, :55], (Downsample(scale=4, enlarge=False),), 0)
    assert clean.shape == (3, 44, 52) and small.shape == (3, 11, 13)
    assert torch.equal(clean, photo[:, 1:45, 1:53])
    assert torch.equal(small, (small * 255).round() / 255)
    assert degrade(photo, (GaussianNoise(),), 0, multiple=16)[1].shape == (3, 48, 48)


def test_blur_kernels(photo: torch.Tensor) -> None:
    for kernel in (disk(3.3), line(9, 30), shake(15, np.random.default_rng(0)), disk(0), line(1, 0)):
        assert kernel.sum() == pytest.approx(1) and kernel.min() >= 0
        assert kernel.shape[0] == kernel.shape[1] and kernel.shape[0] % 2 == 1
    assert np.allclose(disk(2.5), disk(2.5).T) and (disk(5) > 0).sum() == pytest.approx(np.pi * 25, rel=0.25)
    assert (line(9, 90).sum(1) > 0.05).all() and line(9, 90)[:, 4].sum() == pytest.approx(1)
    point = torch.zeros(3, 15, 15)
    point[:, 7, 7] = 1
    step = MotionBlur(length=7, angle=30.0, path="line")
    torch.testing.assert_close(degrade(point, (step,), 0)[0][0, 4:11, 4:11], torch.from_numpy(step.psf()).float())
    assert DefocusBlur(radius=2.0).psf() is not None
    assert DefocusBlur().psf() is None and MotionBlur().psf() is None


def test_haze_follows_depth(photo: torch.Tensor) -> None:
    depth = torch.linspace(0, 3, 56).expand(48, 56)
    image, _ = degrade(photo, (Haze(beta=1.0, airlight=0.9, depth="given"),), 0, depth=depth)
    torch.testing.assert_close(image, photo * (-depth).exp() + 0.9 * (1 - (-depth).exp()))
    with pytest.raises(ValueError, match="needs the sample's depth map"):
        degrade(photo, (Haze(depth="given"),), 0)
    with pytest.raises(ValueError, match="depth map is"):
        degrade(photo, (Haze(depth="given"),), 0, depth=depth[1:])


def test_weather_and_light(photo: torch.Tensor) -> None:
    photo = photo * 0.8
    rain, snow, dark = (degrade(photo, (step,), 5)[0] for step in (RainStreaks(), Snow(), LowLight()))
    assert (rain >= photo - 1e-6).all() and 0.01 < ((rain - photo) > 0.05).float().mean() < 0.5
    assert (snow >= photo - 1e-6).all() and 0.01 < ((snow - photo) > 0.05).float().mean() < 0.8
    assert dark.mean() < 0.6 * photo.mean()
    clear = LowLight(dim=1.0, scale=0.5, gamma=2.0, read_noise=0.0, photons=0.0)
    torch.testing.assert_close(degrade(photo, (clear,), 0)[0], 0.5 * photo**2)


def test_mixtures_draw_by_weight(photo: torch.Tensor) -> None:
    mixture = Mixture({"noise": (GaussianNoise(),), "jpeg": (JPEG(),)}, {"noise": 3.0, "jpeg": 1.0})
    names = [mixture.choose(0, 0, i) for i in range(400)]
    assert 0.68 < names.count("noise") / 400 < 0.82
    found = mixture(photo, 0, 0, 5)
    assert found.kind == names[5] and torch.equal(
        found.image, degrade(photo, mixture.pipelines[found.kind], 0, 0, 5)[0]
    )
    for wrong in ({}, {"noise": 1.0}, {"noise": 0.0, "jpeg": 0.0}):
        with pytest.raises(ValueError, match="weights"):
            Mixture(mixture.pipelines, wrong)
    with pytest.raises(ValueError, match="at least one"):
        Mixture({})


def test_configurations_are_read_from_yaml(tmp_path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--degradation", type=Mixture)
    text = (
        "degradation:\n  pipelines:\n    dark: [{kind: lowlight, gamma: 2}, {kind: jpeg, quality: [20, 60]}]\n"
        "    hazy: [{kind: haze}]\n  weights: {dark: 2, hazy: 1}\n"
    )
    (tmp_path / "mixture.yaml").write_text(text)
    read = parser.instantiate(parser.parse_args(["--config", str(tmp_path / "mixture.yaml")])).degradation
    expected = {"dark": (LowLight(gamma=2.0), JPEG(quality=(20, 60))), "hazy": (Haze(),)}
    assert read == Mixture(expected, {"dark": 2.0, "hazy": 1.0})


def test_steps_are_read_from_text() -> None:
    assert parse_steps("noise25") == (GaussianNoise(sigma=25.0),)
    assert parse_steps("noise:sigma=0..50,clip=false + jpeg:quality=10") == (
        GaussianNoise(sigma=(0, 50), clip=False),
        JPEG(quality=10),
    )
    assert parse_steps("rain-and-haze+motion:path=line") == (*PRESETS["rain-and-haze"], MotionBlur(path="line"))
    assert not set(PRESETS) & set(KINDS)
    for text, message in (
        ("fog", "'fog' is no degradation"),
        ("noise:sigm=3", "noise has no option 'sigm=3'; expected clip, sigma"),
        ("noise:sigma=300", "sigma of GaussianNoise is 300; expected 0 to 255"),
        ("noise:sigma=50..10", "expected 0 to 255"),
        ("noise:sigma=much", "no number"),
        ("noise:sigma=", "no value"),
        ("jpeg:quality=0", "expected 1 to 100"),
        ("downsample:scale=0", "scale is 0"),
        ("motion:path=zigzag", "path of motion is 'zigzag'; expected line or shake"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_steps(text)

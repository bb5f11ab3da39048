"""Evaluating depth and preparing scenes from the command line, and what goes on after an interruption."""

import json
import shlex
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import nextscale
from nextscale.cli import main
from nextscale.datasets.depth import open_source
from nextscale.datasets.depth_encodings import IBIMS, KITTI, NYU, Encoding, encode_depth, read_depth
from nextscale.datasets.depth_store import DepthStore, DepthStoreWriter
from nextscale.evaluation.depth import depth_metrics
from nextscale.evaluation.depth_protocol_list import protocol
from nextscale.tasks.depth.evaluation import EvaluationError, Job, evaluate, model_predictions, ranked

Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """What a command prints; `status` is what is expected of it, and errors are one line on standard error."""
    monkeypatch.chdir(tmp_path)

    def typed(line: str, status: int = 0) -> str:
        assert main(shlex.split(line)) == status, capsys.readouterr()
        out, err = capsys.readouterr()
        if status:
            assert not out and err.startswith("nextscale: ") and err.count("\n") == 1
            return err
        return out + err

    return typed


@pytest.fixture
def pairs(tmp_path: Path) -> SimpleNamespace:
    """Four packed pairs, and predictions of them with a wrong scale."""
    draw = np.random.default_rng(0)
    writer = DepthStoreWriter(tmp_path / "scenes", settings={"kind": "test"}, size=(12, 16), total=4)
    predictions = []
    for number in range(4):
        depth = draw.uniform(1, 9, (12, 16)).astype(np.float32)
        depth[0, :3] = 0
        writer.write(draw.integers(0, 256, (12, 16, 3), np.uint8), depth, np.eye(3, dtype=np.float32))
        prediction = (
            np.where(depth > 0, depth, 1) * np.exp(draw.normal(0, 0.05 * (number + 1), depth.shape)) * 0.2
        ).astype(np.float32)
        predictions.append(prediction)
        (tmp_path / "predictions").mkdir(exist_ok=True)
        np.save(tmp_path / "predictions" / f"{number:06d}.npy", prediction)
    store = DepthStore(tmp_path / "scenes")
    return SimpleNamespace(truth=store.depths(range(4)), predictions=predictions)


def by_hand(pairs: SimpleNamespace) -> dict[str, float]:
    found = []
    for truth, prediction in zip(pairs.truth, pairs.predictions, strict=True):
        g, p = truth[truth > 0].astype(np.float64), prediction[truth > 0].astype(np.float64)
        found.append(depth_metrics(g, p * np.median(g) / np.median(p)))
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]}


def test_predictions_in_a_folder(run: Run, pairs: SimpleNamespace) -> None:
    said = run(
        "evaluate depth predictions --data scenes --protocol median --out out --error-maps --save-predictions --top 2"
    )
    report = json.loads(Path("out/report.json").read_text())
    assert report["mean"] == pytest.approx(by_hand(pairs), rel=1e-10)
    assert report["images"] == 4 and report["pixels"] == 4 * (12 * 16 - 3) and report["skipped"] == []
    assert "this evaluation" in said and "abs_rel" in said and "4 images by protocol median" in said
    lines = [json.loads(line) for line in Path("out/images.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines[1:]] == ["000000", "000001", "000002", "000003"]
    assert lines[1]["scale"] == pytest.approx(5, rel=0.1) and lines[0]["settings"]["protocol"]["alignment"] == "median"
    with Image.open("out/errors/000001.png") as errors:
        assert errors.size == (16, 12)
    assert np.array_equal(np.load("out/predictions/000002.npy"), pairs.predictions[2])
    page = Path("out/index.html").read_text()
    assert "Best images" in page and "000000: abs_rel" in page and "000003: abs_rel" in page and "http" not in page


def test_an_interrupted_evaluation_goes_on(run: Run, pairs: SimpleNamespace) -> None:
    run("evaluate depth predictions --data scenes --protocol median --out whole --top 0")
    run("evaluate depth predictions --data scenes --protocol median --out cut --top 0")
    path = Path("cut/images.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:20])
    Path("predictions/000000.npy").write_bytes(b"not looked at again")
    run("evaluate depth predictions --data scenes --protocol median --out cut --top 0")
    whole, cut = (json.loads(Path(name, "report.json").read_text()) for name in ("whole", "cut"))
    assert whole["mean"] == cut["mean"] and path.read_text() == "".join(lines)
    message = run("evaluate depth predictions --data scenes --protocol scale-shift --out cut", 2)
    assert "cut holds an evaluation with another protocol: choose another folder" in message
    path.write_text("nonsense\n" + lines[1])
    assert "images.jsonl is damaged" in run("evaluate depth predictions --data scenes --protocol median --out cut", 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("predictions --data nix", "name the data set, one of kitti"),
        ("predictions --data scenes --dataset mine", "unknown data set 'mine'"),
        ("predictions --data scenes --protocol mine", "unknown protocol 'mine'; known: bts-kitti"),
        ("predictions --data scenes --alignment mine", "--alignment is 'mine'; expected one of none, median"),
        ("predictions --data scenes --crop mine", "--crop is 'mine'; expected one of garg"),
        ("predictions --data scenes --metrics mine", "--metrics is 'mine'; expected one of abs_rel"),
        ("predictions --data scenes --min-depth 5 --max-depth 2", "expected a range"),
        ("predictions --data scenes --max-depth 0.5", "none of 4 images has a pixel to compare"),
        ("predictions --data scenes --limit 0", "--limit is 0; expected 1 or more"),
        ("predictions --data scenes --flip", "--flip and --samples belong to a model"),
        ("predictions --data scenes --export mine", "--export is 'mine'; expected one of kitti"),
        ("predictions --data scenes --export kinect", "a format that is only read"),
        ("nix --data scenes", "'nix' is no file, no folder and no model's name"),
        ("scenes --data scenes", "holds no prediction: of sample '000000'"),
    ],
)
def test_mistakes_are_told_in_one_line(run: Run, pairs: SimpleNamespace, line: str, message: str) -> None:
    assert message in run(f"evaluate depth {line}", 2)


def test_a_prediction_that_cannot_be_used_is_named(run: Run, pairs: SimpleNamespace) -> None:
    np.save("predictions/000002.npy", np.full((12, 16), np.nan))
    assert "000002: 189 of 189 predictions that count are infinite or NaN" in run(
        "evaluate depth predictions --data scenes --protocol median --out out", 2
    )
    Path("predictions/000002.npy").unlink()
    assert "1 of 4 predictions are missing below predictions" in run("evaluate depth predictions --data scenes", 2)


def test_the_protocols_are_listed(run: Run) -> None:
    said = run("evaluate depth any --data any --protocol list")
    assert "bts-kitti" in said and "1907.10326" in said


def test_disparities_and_other_ranges(run: Run, pairs: SimpleNamespace) -> None:
    stacked = np.stack([1 / prediction for prediction in pairs.predictions])
    np.save("all.npy", stacked.astype(np.float32))
    run("evaluate depth all.npy --data scenes --kind disparity --protocol median --out one --top 0")
    assert json.loads(Path("one/report.json").read_text())["mean"] == pytest.approx(by_hand(pairs), rel=1e-5)
    run("evaluate depth all.npy --data scenes --kind disparity --max-depth 5 --metrics d1 --limit 2 --out two --top 1")
    report = json.loads(Path("two/report.json").read_text())
    assert list(report["mean"]) == ["d1"] and report["images"] == 2 and report["pixels"] < 2 * 189
    assert report["settings"]["protocol"]["alignment"] == "median"  # disparities have no known scale


def kitti(root: Path) -> Path:
    base = root / "kitti" / "depth_selection" / "val_selection_cropped"
    draw = np.random.default_rng(0)
    for folder in ("image", "groundtruth_depth"):
        (base / folder).mkdir(parents=True)
    name = "2011_09_26_drive_0002_sync_image_0000000005_image_02"
    Image.fromarray(draw.integers(0, 256, (4, 4, 3), np.uint8)).resize((1216, 352)).save(base / "image" / f"{name}.png")
    depth = draw.uniform(2, 70, (352, 1216)) * (draw.random((352, 1216)) < 0.1)
    truth = base / "groundtruth_depth" / "2011_09_26_drive_0002_sync_groundtruth_depth_0000000005_image_02.png"
    truth.write_bytes(encode_depth(depth, KITTI))
    (root / "maps").mkdir()
    (root / "maps" / f"{name}.png").write_bytes(encode_depth(np.where(depth > 0, depth * 1.1, 20), KITTI))
    return root / "kitti"


def test_the_benchmarks_own_metrics_and_submission(run: Run, tmp_path: Path) -> None:
    kitti(tmp_path)
    run("evaluate depth maps --dataset kitti --data kitti --split selection --export kitti --out out --top 0")
    report = json.loads(Path("out/report.json").read_text())
    assert list(report["mean"]) == ["silog", "sq_rel", "abs_rel", "irmse"]
    assert report["mean"]["abs_rel"] == pytest.approx(0.1, abs=1e-3) and report["mean"]["silog"] < 0.1
    with zipfile.ZipFile("out/kitti-submission.zip") as archive:
        [name] = archive.namelist()
    assert name == "2011_09_26_drive_0002_sync_image_0000000005_image_02.png"
    assert np.allclose(read_depth(Path("out/export") / name, KITTI), read_depth(Path("maps") / name, KITTI))


def test_published_figures_stand_beside_ours(run: Run, tmp_path: Path) -> None:
    place = tmp_path / "nyu" / "room"
    place.mkdir(parents=True)
    Image.new("RGB", (640, 480)).save(place / "rgb_00001.jpg")
    depth = np.random.default_rng(0).uniform(1, 9, (480, 640))
    (place / "sync_depth_00001.png").write_bytes(encode_depth(depth, NYU))
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "room_rgb_00001.png").write_bytes(encode_depth(depth, NYU))
    (tmp_path / "list.txt").write_text("room/rgb_00001.jpg room/sync_depth_00001.png 518.8\n")
    said = run("evaluate depth maps --dataset nyu --data nyu --list list.txt --out out")
    assert "BTS" not in said and " 0.000" in said  # of another list: nothing to stand beside
    from nextscale.depth_page import figures_table
    from nextscale.evaluation.depth_published import published

    report = json.loads(Path("out/report.json").read_text())
    header, rows = figures_table(report, published("nyu", "bts-nyu"))
    assert header[1:4] == ["abs_rel", "sq_rel", "rmse"] and report["pixels"] == 426 * 560
    assert rows[2][:4] == ["BTS ResNet50", "0.119", "0.075", "0.419"] and "1907.10326" in rows[2][-1]


def test_planes_and_boundaries_of_ibims(run: Run, tmp_path: Path) -> None:
    base = tmp_path / "ibims"
    for folder in ("rgb", "depth", "mask_invalid", "mask_transp", "mask_wall", "edges", "calib"):
        (base / folder).mkdir(parents=True)
    depth = np.full((480, 640), 4.0)
    depth[:, 320:] = 6.0
    Image.new("RGB", (640, 480)).save(base / "rgb" / "room.png")
    (base / "depth" / "room.png").write_bytes(encode_depth(depth, IBIMS))
    white, plane, edges = (
        np.full((480, 640), 255, np.uint8),
        np.zeros((480, 640), np.uint8),
        np.zeros((480, 640), np.uint8),
    )
    plane[:, :320], edges[:, 320] = 1, 255
    for folder, picture in (("mask_invalid", white), ("mask_transp", white), ("mask_wall", plane), ("edges", edges)):
        Image.fromarray(picture).save(base / folder / "room.png")
    (base / "mask_wall" / "room.txt").write_text("1,2,3,4,0,-1,0\n")
    (base / "calib" / "room.txt").write_text("560,560,320,240\n")
    (tmp_path / "maps").mkdir()
    np.save(tmp_path / "maps" / "room.npy", depth)
    said = run("evaluate depth maps --dataset ibims --data ibims --out out --top 1")
    found = json.loads(Path("out/report.json").read_text())["planes_and_edges"]
    assert found["planes"] == 1 and found["pe_flatness_cm"] < 1e-6 and found["pe_orientation_degrees"] < 1e-3
    assert found["dbe_accuracy_pixels"] <= 1 and found["dbe_completeness_pixels"] <= 1 and "dbe_accuracy" in said


class Guess:
    """A stand-in for a model: predicts from the image's size, and remembers what it was shown."""

    unit = "relative"

    def __init__(self) -> None:
        self.shown: list[tuple] = []

    def predict(self, image: torch.Tensor, n: int | None = None, seed: int = 0, *, flip: bool = False):
        self.shown.append((tuple(image.shape), n, seed, flip))
        assert image.min() >= 0 and image.max() <= 1
        return SimpleNamespace(depth=torch.ones(image.shape[1:]), unit=self.unit)


def test_a_model(run: Run, pairs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Guess()
    monkeypatch.setattr(nextscale, "load", lambda source, **options: model)
    run("evaluate depth guess --data scenes --out out --flip --samples 3 --seed 7 --top 0")
    assert model.shown == [((3, 12, 16), 3, 7 + i, True) for i in range(4)]
    assert json.loads(Path("out/report.json").read_text())["settings"]["protocol"]["alignment"] == "median"
    assert "choose one that aligns" in run("evaluate depth guess --data scenes --protocol metric --out other", 2)
    monkeypatch.setattr(nextscale, "load", lambda source, **options: object())
    assert "is a object, which predicts no depth" in run("evaluate depth guess --data scenes --out other", 2)


def test_a_network_is_shown_what_the_protocol_looks_at(tmp_path: Path) -> None:
    source = open_source("kitti", kitti(tmp_path), "selection")
    wide = SimpleNamespace(image=lambda index: np.zeros((375, 1242, 3), np.uint8))
    model = Guess()
    for name, size in (("dar-kitti", (3, 352, 1216)), ("depthart-nyu", (3, 359, 1226)), ("median", (3, 375, 1242))):
        model.unit = "metre"
        model_predictions(model, wide, protocol(name))(0)
        assert model.shown[-1][0] == size
    assert source.image(0).shape == (352, 1216, 3)


def test_images_without_a_pixel_are_named_and_left_out(tmp_path: Path) -> None:
    writer = DepthStoreWriter(tmp_path / "s", settings={}, size=(4, 4), total=2)
    for depth in (np.zeros((4, 4)), np.ones((4, 4))):
        writer.write(np.zeros((4, 4, 3)), depth, np.eye(3))
    source = open_source("scenes", tmp_path / "s")
    job = Job(source, lambda index: np.ones((4, 4)), protocol("metric"))
    report = evaluate(job, tmp_path / "out", settings={}, threads=2)
    assert report["images"] == 1 and report["skipped"] == ["000000"]
    assert [record["index"] for record in ranked(tmp_path / "out", "abs_rel")] == [1]
    with pytest.raises(EvaluationError, match="none of 1 images"):
        evaluate(job, tmp_path / "other", settings={}, limit=1)
    zero = Job(source, lambda index: np.zeros((4, 4)), protocol("metric"))
    assert evaluate(zero, tmp_path / "zero", settings={})["mean"]["silog"] is None


def test_preparing_scenes(run: Run) -> None:
    said = run("prepare scenes made --number 2 --size 16x12 --seed 3 --workers 0 --sheet sheet.png")
    assert "2 scenes of 16 x 12 pixels in made" in said and Path("sheet.png").exists()
    assert DepthStore("made").size == (12, 16) and DepthStore("made").settings["seed"] == 3
    for line, message in (
        ("--size 16", "expected WIDTHxHEIGHT"),
        ("--number 0", "--number is 0"),
        ("--seed 4 --size 16x12", "was begun with another seed"),
        ("--streets 2", "expected at least 8 x 8"),
    ):
        assert message in run(f"prepare scenes made --workers 0 {line}", 2)
    assert isinstance(Encoding().suffix, str)

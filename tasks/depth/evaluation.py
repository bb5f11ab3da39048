"""Evaluating depth predictions on a data set: streamed, resumable, by any protocol."""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nextscale.datasets.depth_encodings import Encoding, encode_depth
from nextscale.datasets.depth_pairs import DepthSource
from nextscale.datasets.depth_predictions import Predictions, save_prediction
from nextscale.datasets.files import replace_file
from nextscale.evaluation.depth import EmptyMaskError, mean_over_images, pooled_rmse
from nextscale.evaluation.depth_pictures import error_picture
from nextscale.evaluation.depth_protocols import Comparison, Kind, Protocol, ProtocolError, compare, score
from nextscale.evaluation.depth_regions import benchmark_window
from nextscale.tasks.depth.ibims import PlanesAndEdges, planes_and_edges

if TYPE_CHECKING:
    from nextscale.tasks.depth.predictor import DepthModel

Predict = Callable[[int], np.ndarray]
"""Number of a sample -> (height, width)."""

RECORDS, REPORT = "images.jsonl", "report.json"


class EvaluationError(ValueError):
    """An evaluation that cannot be done, or continued."""


@dataclass(frozen=True)
class Job:
    """What is evaluated.

    Attributes:
        source: samples with ground truth.
        predict: their predictions.
        kind: what these hold.
        protocol: by which they are compared.
        parallel: whether ``predict`` may be called from several threads at once.
    """

    source: DepthSource
    predict: Predict
    protocol: Protocol
    kind: Kind = "depth"
    parallel: bool = True


@dataclass(frozen=True)
class Outputs:
    """What is written beside the figures.

    Attributes:
        error_maps: a PNG of every image's errors, ``errors/NAME.png``.
        predictions: every prediction, ``predictions/NAME.npy``.
        export: an encoding in which predictions are written for a benchmark, ``export/NAME.*``.
        export_name: (sample's name, its number) -> the file's name without suffix.
    """

    error_maps: bool = False
    predictions: bool = False
    export: Encoding | None = None
    export_name: Callable[[str, int], str] = field(default=lambda name, index: name)


def model_predictions(
    model: DepthModel,
    source: DepthSource,
    protocol: Protocol,
    *,
    flip: bool = False,
    n: int | None = None,
    seed: int = 0,
) -> Predict:
    """Predictions of a model, for the part of each image that the protocol looks at.

    Raises:
        EvaluationError: the model's depth is relative, and the protocol does not align.
    """
    import torch

    if model.unit == "relative" and protocol.alignment == "none":
        raise EvaluationError(
            "this model predicts relative depth, and the protocol compares metres: choose one that aligns, "
            "such as median"
        )

    def predict(index: int) -> np.ndarray:
        image = seen(source.image(index), protocol)
        values = image.astype(np.float32) / (255 if image.dtype == np.uint8 else 1)
        photo = torch.from_numpy(np.ascontiguousarray(values)).permute(2, 0, 1)
        depth: np.ndarray = model.predict(photo, n, seed + index, flip=flip).depth.numpy()
        return depth

    return predict


def seen(image: np.ndarray, protocol: Protocol) -> np.ndarray:
    """The part of an image (height, width, 3) that a network is shown: the benchmark's window, or without the
    border."""
    if protocol.window is not None:
        region = benchmark_window(image.shape[0], image.shape[1])
        return image[region.top : region.bottom, region.left : region.right]
    if protocol.border:
        return image[protocol.border : -protocol.border, protocol.border : -protocol.border]
    return image


def file_predictions(predictions: Predictions) -> Predict:
    """Predictions of files."""
    return predictions.read


def compared(job: Job, index: int) -> Comparison:
    """Sample ``index`` brought onto its ground truth."""
    truth, valid = job.source.depth(index)
    return compare(truth, job.predict(index), job.protocol, valid=valid, kind=job.kind)


def evaluate(
    job: Job,
    out: Path,
    *,
    settings: Mapping[str, Any],
    outputs: Outputs | None = None,
    limit: int | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate every sample; ``images.jsonl`` and ``report.json`` in ``out`` hold what was found.

    An interrupted evaluation with the same settings goes on after the images it has.

    Args:
        settings: JSON values that say what is evaluated; a folder with others is refused.
        limit: only so many samples, the first ones.
        threads: None: one for each core this process may use.
        progress: called with (images done, images in all).

    Returns:
        The report: ``mean`` of each metric over images; ``images``, ``pixels``, ``skipped`` (images without a pixel to
        compare, by name), ``pooled_rmse``, ``seconds``, ``settings``, and iBims-1's ``planes_and_edges``.

    Raises:
        EvaluationError: ``out`` holds another evaluation, or no image could be compared; ValueError naming the sample
            whose prediction or truth cannot be used; OSError.
    """
    total = len(job.source) if limit is None else min(limit, len(job.source))
    given: dict[str, Any] = json.loads(json.dumps({**settings, "protocol": _plain(job.protocol), "samples": total}))
    writing = outputs or Outputs()
    out.mkdir(parents=True, exist_ok=True)
    records = _earlier(out / RECORDS, given)
    left = [index for index in range(total) if index not in records]
    began = time.perf_counter()
    with (out / RECORDS).open("a", encoding="utf-8") as file:
        if not records:
            file.write(json.dumps({"settings": given}) + "\n")
        for record in _all(job, left, out, writing, threads or _cores()):
            file.write(json.dumps(record) + "\n")
            file.flush()
            records[record["index"]] = record
            if progress is not None:
                progress(len(records), total)
        os.fsync(file.fileno())
    report = _report([records[index] for index in sorted(records)], given, time.perf_counter() - began, len(left))
    replace_file(out / REPORT, (json.dumps(report, indent=2) + "\n").encode())
    return report


def _plain(protocol: Protocol) -> dict[str, Any]:
    fields = asdict(protocol)
    fields["truth_range"] = [None if math.isinf(bound) else bound for bound in protocol.truth_range]
    if protocol.clamp is not None:
        fields["clamp"] = [None if math.isinf(bound) else bound for bound in protocol.clamp]
    return fields


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _earlier(path: Path, settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """What an interrupted evaluation has found; the line that it was writing is cut off."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
        before = lines[0]["settings"] if lines else settings
        records = {int(line["index"]): line for line in lines[1:]}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise EvaluationError(f"{path} is damaged ({error}): remove it, or choose another folder") from error
    if before != settings:
        other = [key for key in sorted({*before, *settings}) if before.get(key) != settings.get(key)]
        raise EvaluationError(
            f"{path.parent} holds an evaluation with another {', '.join(other)}: choose another folder, or remove it"
        )
    if len(whole) != len(data):
        replace_file(path, whole)
    return records


def _all(job: Job, left: Sequence[int], out: Path, outputs: Outputs, threads: int) -> Iterator[dict[str, Any]]:
    """The records of samples, in order; as many at once as there are threads."""

    def one(index: int, prediction: np.ndarray | None = None) -> dict[str, Any]:
        name = job.source.name(index)
        try:
            return _record(job, index, name, job.predict(index) if prediction is None else prediction, out, outputs)
        except ValueError as error:
            raise EvaluationError(f"{name}: {error}") from error

    if not job.parallel:
        # A model has threads of its own; only what follows its prediction runs beside it.
        with ThreadPoolExecutor(1) as pool:
            before: Future[dict[str, Any]] | None = None
            for index in left:
                following = pool.submit(one, index, job.predict(index))
                if before is not None:
                    yield before.result()
                before = following
            if before is not None:
                yield before.result()
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[dict[str, Any]]] = deque()
        try:
            for index in left:
                waiting.append(pool.submit(one, index))
                if len(waiting) > 4 * threads:  # what is done and not yet written stays small
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _record(job: Job, index: int, name: str, prediction: np.ndarray, out: Path, outputs: Outputs) -> dict[str, Any]:
    if outputs.predictions:
        save_prediction(out / "predictions", name, prediction)
    if outputs.export is not None:
        path = out / "export" / f"{outputs.export_name(name, index)}{outputs.export.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, encode_depth(_metres(prediction, job), outputs.export))
    record: dict[str, Any] = {"index": index, "name": name}
    truth, valid = job.source.depth(index)
    try:
        found = compare(truth, prediction, job.protocol, valid=valid, kind=job.kind)
    except EmptyMaskError as error:
        return {**record, "pixels": 0, "skipped": str(error)}
    record["pixels"] = found.pixels
    # NaN and infinity are not JSON: a metric that is not defined is null.
    figures = score(found, job.protocol.metrics)
    record["metrics"] = {metric: value if math.isfinite(value) else None for metric, value in figures.items()}
    record["rmse"] = score(found, ["rmse"])["rmse"] if "rmse" not in figures else figures["rmse"]
    if job.protocol.alignment != "none":
        record["scale"], record["shift"] = found.alignment.scale, found.alignment.shift
    if (own := planes_and_edges(job.source, index, found)) is not None:
        record["planes_and_edges"] = asdict(own)
    if outputs.error_maps:
        _save_error_map(out / "errors" / f"{name}.png", found)
    return record


def _metres(prediction: np.ndarray, job: Job) -> np.ndarray:
    with np.errstate(divide="ignore"):
        depth = prediction if job.kind == "depth" else 1 / np.maximum(prediction, 0)
    if job.protocol.clamp is not None:
        depth = np.clip(depth, *job.protocol.clamp)
    return depth


def _save_error_map(path: Path, found: Comparison) -> None:
    import io

    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.fromarray(error_picture(found.truth, found.prediction, found.mask)).save(buffer, "PNG")
    replace_file(path, buffer.getvalue())


def _report(
    records: Sequence[Mapping[str, Any]], settings: dict[str, Any], seconds: float, done: int
) -> dict[str, Any]:
    scored = [record for record in records if "metrics" in record]
    if not scored:
        raise EvaluationError(
            f"none of {len(records)} images has a pixel to compare: the ground truth is empty in the protocol's range "
            "and crop, or it is another data set's"
        )
    names = list(scored[0]["metrics"])
    undefined = [name for name in names if any(record["metrics"][name] is None for record in scored)]
    defined = [{name: r["metrics"][name] for name in names if name not in undefined} for r in scored]
    own = [record["planes_and_edges"] for record in scored if "planes_and_edges" in record]
    return {
        "mean": {**mean_over_images(defined), **dict.fromkeys(undefined)},
        "images": len(scored),
        "pixels": sum(record["pixels"] for record in scored),
        "skipped": [record["name"] for record in records if "metrics" not in record],
        "pooled_rmse": pooled_rmse([(record["rmse"], record["pixels"]) for record in scored]),
        "planes_and_edges": PlanesAndEdges.summary([PlanesAndEdges(**each) for each in own]) if own else None,
        "seconds": round(seconds, 3),
        "images_per_second": round(done / seconds, 2) if done else None,
        "settings": settings,
    }


def ranked(out: Path, metric: str) -> list[dict[str, Any]]:
    """The records of a finished evaluation, from the lowest error (or highest share) to the other end."""
    lines = (out / RECORDS).read_text(encoding="utf-8").splitlines()[1:]
    records = [record for record in map(json.loads, lines) if record.get("metrics", {}).get(metric) is not None]
    sign = -1 if metric.startswith("d") else 1
    return sorted(records, key=lambda record: (sign * record["metrics"][metric], record["index"]))


__all__ = [
    "EvaluationError",
    "Job",
    "Outputs",
    "ProtocolError",
    "compared",
    "evaluate",
    "file_predictions",
    "model_predictions",
    "ranked",
    "seen",
]

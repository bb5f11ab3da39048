"""Published figures, each with its source, to be set beside one's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Attributes:

    protocol: of ``depth_protocol_list.PROTOCOLS`` by which it was measured.
    dataset: of the benchmark.
    model: as its authors call it.
    figures: by metric. Shares d1 to d3 are of right pixels, also where a paper gives those of wrong ones.
    source: where the figures stand.
    """

    dataset: str
    protocol: str
    model: str
    figures: Mapping[str, float]
    source: str


_BTS = "Lee et al., BTS, arXiv 1907.10326, table of its repository"
_MONODEPTH2 = "Godard et al., monodepth2, ICCV 2019, table 1"
_DAR = "Wang et al., DAR, tables 1 and 2"
_DEPTHART = "DepthART, IJCAI 2025, project page; d1 there is the share of wrong pixels"

_NAMES = ("d1", "d2", "d3", "abs_rel", "sq_rel", "rmse", "rmse_log", "silog", "log10")


def _bts(dataset: str, model: str, *figures: float) -> Published:
    return Published(dataset, f"bts-{dataset}", model, dict(zip(_NAMES, figures, strict=True)), _BTS)


def _short(dataset: str, model: str, abs_rel: float, rmse: float, d1: float) -> Published:
    return Published(dataset, f"dar-{dataset}", model, {"abs_rel": abs_rel, "rmse": rmse, "d1": d1}, _DAR)


def _monodepth2(model: str, abs_rel: float, d1: float) -> Published:
    return Published("kitti", "monodepth2-eigen", model, {"abs_rel": abs_rel, "d1": d1}, _MONODEPTH2)


def _depthart(dataset: str, model: str, wrong: float, abs_rel: float) -> Published:
    figures = {"abs_rel": abs_rel, "d1": round(1 - wrong, 3)}
    return Published(dataset, f"depthart-{dataset}", model, figures, _DEPTHART)


PUBLISHED: tuple[Published, ...] = (
    _bts("kitti", "BTS DenseNet161", 0.955, 0.993, 0.998, 0.060, 0.249, 2.798, 0.096, 8.933, 0.027),
    _bts("kitti", "BTS ResNet50", 0.954, 0.992, 0.998, 0.061, 0.250, 2.803, 0.098, 9.030, 0.027),
    _bts("kitti", "BTS ResNext101", 0.956, 0.993, 0.998, 0.059, 0.241, 2.756, 0.096, 8.781, 0.026),
    _bts("nyu", "BTS DenseNet161", 0.885, 0.978, 0.994, 0.110, 0.066, 0.392, 0.142, 11.533, 0.047),
    _bts("nyu", "BTS ResNet50", 0.865, 0.975, 0.993, 0.119, 0.075, 0.419, 0.152, 12.368, 0.051),
    _bts("nyu", "BTS ResNext101", 0.880, 0.977, 0.994, 0.111, 0.069, 0.399, 0.145, 11.680, 0.048),
    _monodepth2("mono 640x192", 0.115, 0.877),
    _monodepth2("mono + stereo 640x192", 0.106, 0.874),
    _monodepth2("mono 1024x320", 0.115, 0.879),
    _short("nyu", "Depth Anything, fine-tuned", 0.063, 0.235, 0.975),
    _short("nyu", "EcoDepth", 0.059, 0.218, 0.978),
    _short("nyu", "DAR-Small", 0.059, 0.217, 0.979),
    _short("nyu", "DAR-Base", 0.058, 0.214, 0.980),
    _short("nyu", "DAR-Large", 0.056, 0.205, 0.982),
    _short("kitti", "Depth Anything, fine-tuned", 0.046, 1.896, 0.982),
    _short("kitti", "EcoDepth", 0.048, 2.039, 0.979),
    _short("kitti", "DAR-Small", 0.046, 1.839, 0.984),
    _short("kitti", "DAR-Base", 0.046, 1.823, 0.985),
    _short("kitti", "DAR-Large", 0.044, 1.799, 0.986),
    _depthart("eth3d", "DepthART", 0.196, 0.177),
    _depthart("eth3d", "VAR, teacher forcing", 0.245, 0.285),
    _depthart("eth3d", "DPT ViT-L", 0.198, 0.150),
    _depthart("eth3d", "MiDaS ResNeXt-101", 0.203, 0.160),
    _depthart("tum", "DepthART", 0.275, 0.178),
    _depthart("tum", "VAR, teacher forcing", 0.396, 0.294),
    _depthart("tum", "DPT ViT-L", 0.435, 0.251),
    _depthart("tum", "MiDaS ResNeXt-101", 0.325, 0.207),
    _depthart("nyu", "DepthART", 0.141, 0.115),
    _depthart("nyu", "VAR, teacher forcing", 0.185, 0.141),
    _depthart("nyu", "DPT ViT-L", 0.121, 0.107),
    _depthart("nyu", "MiDaS ResNeXt-101", 0.143, 0.116),
    _depthart("ibims", "DepthART", 0.129, 0.106),
    _depthart("ibims", "VAR, teacher forcing", 0.177, 0.133),
    _depthart("ibims", "DPT ViT-L", 0.134, 0.108),
    _depthart("ibims", "MiDaS ResNeXt-101", 0.140, 0.112),
)


def published(dataset: str, protocol: str) -> list[Published]:
    """What was published on a data set by a protocol.

    BTS and DAR evaluate NYU alike, so their figures stand together; on KITTI their crops differ.
    """
    alike = {"bts-nyu", "dar-nyu"} if protocol in ("bts-nyu", "dar-nyu") else {protocol}
    return [entry for entry in PUBLISHED if entry.dataset == dataset and entry.protocol in alike]

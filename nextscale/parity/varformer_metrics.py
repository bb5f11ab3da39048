"""The PSNR and SSIM of VarFormer's golden cases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nextscale.evaluation.restoration import measure
from nextscale.parity.case import Case


def metrics(case: Case) -> Mapping[str, Any]:
    """BasicSR's metrics of one pair of 8-bit pictures, for each setting (border that is cropped, luma or colours)."""
    # Colours are stored blue first.
    image, reference = (np.asarray(case.inputs[name])[..., ::-1].transpose(2, 0, 1) for name in ("image", "reference"))
    figures = [
        measure(image, reference, "basicsr", channel="y" if y_channel else "rgb", crop=crop)
        for crop, y_channel in case.options["settings"]
    ]
    return {"psnr": [each.psnr for each in figures], "ssim": [each.ssim for each in figures]}

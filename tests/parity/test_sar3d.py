"""SAR3D computes what its official implementation computes, and the replay notices when it does not."""

from pathlib import Path

import pytest

from nextscale.parity.case import read_case
from nextscale.parity.replay import operations_of, replay

CASES = Path(__file__).parent / "cases"
NAMES = sorted(path.stem for path in CASES.glob("sar3d_*.npz"))


def test_every_operation_has_a_case():
    assert {read_case(CASES / f"{name}.npz").operation for name in NAMES} == set(operations_of("sar3d"))


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("sar3d_rays", ("options", "box"), 0.5),
        ("sar3d_render_range", ("config", "triplane", "rendering_kwargs", "white_back"), False),
        ("sar3d_render_range", ("config", "triplane", "rendering_kwargs", "disparity_space_sampling"), False),
        ("sar3d_render_range", ("config", "triplane", "rendering_kwargs", "ray_end"), 2.0),
        ("sar3d_render_range", ("config", "triplane", "rendering_kwargs", "box_warp"), 1.0),
        ("sar3d_encode_one_phi", ("config", "quantize", "quant_resi"), 0.5),
        ("sar3d_vq_step_b", ("config", "quantize", "beta"), 0.25),
        ("sar3d_text_sample_dot", ("config", "transformer", "num_heads"), 4),
        ("sar3d_text_sample_dot", ("options", "cfg"), 1.0),
        ("sar3d_text_step_dot_shared", ("config", "transformer", "cond_drop_rate"), 0.0),
    ],
)
def test_values_come_from_the_case(changed, name, path, value):
    def alter(meta, arrays):
        place = meta
        for key in path[:-1]:
            place = place[key]
        assert place[path[-1]] != value
        place[path[-1]] = value

    result = replay(changed(name, alter))
    assert not result.passed and not result.problems


@pytest.mark.parametrize(
    ("name", "part", "argument", "value"),
    [
        ("sar3d_decode_a", "dit", "roll_out", False),
        ("sar3d_decode_a", "quantize", "using_znorm", False),
        ("sar3d_image_forward_dot", "transformer", "drop_path_rate", 0.1),
        ("sar3d_image_forward_dot", "transformer", "patch_nums", [1, 2, 3]),
        ("sar3d_mesh_repair", "triplane", "grid_scale", 2.1),
    ],
)
def test_arguments_of_no_published_model(changed, name, part, argument, value):
    result = replay(changed(name, lambda meta, arrays: meta["config"][part].update({argument: value})))
    assert not result.passed and result.problems


@pytest.mark.parametrize("name", ["sar3d_rays", "sar3d_mesh_repair", "sar3d_text_sample_dot"])
def test_unknown_values_fail(name, changed):
    result = replay(changed(name, lambda meta, arrays: meta["options"].update(nosuch=1)))
    assert not result.passed and "options.nosuch" in result.problems[0]

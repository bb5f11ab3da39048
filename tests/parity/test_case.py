"""Reading a case, drawing its weights, judging outputs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from nextscale.parity.case import CaseError, compare, cut, read_case, read_system
from nextscale.parity.seeding import seeded_weight
from nextscale.parity.tracking import MissingValue, Tracked


def write(path: Path, outputs=None, weights=None, **arrays) -> Path:
    outputs = {"x": np.zeros(3, np.float32)} if outputs is None else outputs
    meta = {
        "format": 2,
        "system": "none",
        "operation": "none",
        "config": {},
        "options": {},
        "weights": weights or {},
        "outputs": {name: {"rtol": 0.0, "atol": 1e-3} for name in outputs},
    }
    arrays |= {f"out/{name}": value for name, value in outputs.items()}
    np.savez(path, meta=np.array(json.dumps(meta)), **arrays)
    return path


class TestSeededWeights:
    def test_values_never_change(self):
        expected = [[0.26749977, -0.15609281, -0.70846236], [0.48288837, -0.9003011, 0.7482215]]
        np.testing.assert_allclose(seeded_weight("head.weight", (2, 3)), expected, rtol=1e-6)

    @pytest.mark.parametrize(
        ("name", "shape", "mean", "spread"),
        [
            ("norm.weight", (10_000,), 1.0, 0.1),
            ("conv.bias", (10_000,), 0.0, 0.1),
            ("bn.running_var", (10_000,), 1 + 0.1 * math.sqrt(2 / math.pi), 0.0603),
            ("conv.weight", (400, 4, 5, 5), 0.0, 0.1),
            ("scale", (1, 40_000), 0.0, 1 / 200),
        ],
    )
    def test_distribution_follows_name_and_shape(self, name, shape, mean, spread):
        weight = seeded_weight(name, shape)
        assert weight.dtype == np.float32 and weight.shape == shape
        assert weight.mean() == pytest.approx(mean, abs=0.005)
        assert weight.std() == pytest.approx(spread, rel=0.05)

    def test_scalar(self):
        assert seeded_weight("logit_scale", ()).shape == ()

    def test_recipe_of_a_part(self, tmp_path):
        recipe = {
            "entries": [["a.weight", [2, 2]], ["b", [3]], ["mask", [9]], ["given", [2]]],
            "kept": ["mask"],
            "adjust": [["a.*", 2.0, 1.0], ["*.weight", 10.0, 0.0]],
            "seed_prefix": "part.",
            "aliases": [["again", "b"]],
        }
        given = np.array([5, 6], np.float32)
        weights = read_case(write(tmp_path / "c.npz", weights={"m": recipe}, **{"w/m/given": given})).weights("m")
        assert list(weights) == ["a.weight", "b", "given", "again"]
        np.testing.assert_allclose(
            weights["a.weight"], (seeded_weight("part.a.weight", (2, 2)) * 2 + 1) * 10, rtol=1e-6
        )
        np.testing.assert_array_equal(weights["b"], seeded_weight("part.b", (3,)))
        np.testing.assert_array_equal(weights["given"], given)
        assert weights["again"] is weights["b"]


class TestCompare:
    def test_share_of_tolerance(self):
        error = compare("x", np.array([1.0, 2.02]), np.array([1.0, 2.0]), rtol=0.01, atol=0.02, store=None)
        assert error.largest == pytest.approx(0.02) and error.share == pytest.approx(0.5) and error.passed

    def test_no_room_means_equal(self):
        assert compare("x", np.array([1.0]), np.array([1.0]), 0, 0, None).passed
        assert not compare("x", np.array([1.0]), np.array([np.nextafter(1, 2)]), 0, 0, None).passed

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_same_special_value_is_equal(self, value):
        assert compare("x", np.array([value, 1]), np.array([value, 1]), 0, 1e-3, "full").share == 0

    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [(np.nan, 1), (1, np.nan), (np.inf, 1), (1, np.inf), (-np.inf, np.inf), (np.nan, np.inf)],
    )
    def test_special_value_alone_fails(self, ours, theirs):
        error = compare("x", np.array([ours, 1.0]), np.array([theirs, 1.0]), 1e-2, 1e-3, None)
        assert not error.passed and error.share > 1

    def test_integers_are_exact(self):
        error = compare("x", np.array([1, 2, 4]), np.array([1, 2, 3]), rtol=1, atol=1, store=None)
        assert error.largest == 1 and error.share == math.inf and "1 of 3" in error.problem

    def test_integers_are_not_rounded(self):
        assert not compare("x", np.array([1.2]), np.array([1]), 0, 0, None).passed

    def test_shape(self):
        error = compare("x", np.zeros((3, 1)), np.zeros((3,)), 0, 1, None)
        assert not error.passed and "(3, 1)" in error.problem and "(3,)" in error.problem

    def test_absent(self):
        assert not compare("x", None, np.zeros(3), 0, 1, None).passed

    def test_empty(self):
        assert compare("x", np.zeros((0, 2)), np.zeros((0, 2)), 0, 0, None).passed

    def test_tensors(self):
        import torch

        expected = np.array([0.5, 1.0], np.float32)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            assert compare("x", torch.tensor([0.5, 1.0], dtype=dtype, requires_grad=True), expected, 0, 0, None).passed


class TestCut:
    def test_kinds(self):
        x = np.arange(12).reshape(3, 4)
        assert cut(x, None) is x and cut(x, "full") is x
        assert cut(x, {"every": 5}).tolist() == [0, 5, 10]
        assert cut(x, {"crop": [[1, 3], [0, 2]]}).tolist() == [[4, 5], [8, 9]]
        assert cut(x > 3, {"packbits": [3, 4]}).tolist() == [0b00001111, 0b11110000]

    @pytest.mark.parametrize("store", ["half", {"nth": 3}, {"every": 2, "crop": []}, 7])
    def test_unknown_kind(self, store):
        with pytest.raises(ValueError, match="store"):
            cut(np.zeros(3), store)
        assert not compare("x", np.zeros(3), np.zeros(3), 0, 0, store).passed


class TestTracked:
    def test_unread_values_are_named(self):
        options = Tracked({"a": 1, "b": {"c": 2, "d": 3}, "e": [{"f": 4}, {"f": 5}], "g": 6}, "options")
        assert options["a"] == 1 and options["b"]["c"] == 2 and options["e"][0]["f"] == 4
        assert options.unread() == ["options.b.d", "options.e[1].f", "options.g"]
        options.ignore("g")
        options["b"].ignore("d*")
        assert options.unread() == ["options.e[1].f"]

    def test_asking_is_not_reading(self):
        options = Tracked({"a": None}, "options")
        assert "a" in options and "b" not in options and len(options) == 1
        assert options.get("b", 3) == 3 and options.unread() == ["options.a"]
        assert dict(options) == {"a": None} and options.unread() == []

    def test_missing_value_is_named(self):
        with pytest.raises(MissingValue, match=r"options\.cfg"):
            Tracked({"top_k": 1}, "options")["cfg"]


class TestDamage:
    def test_truncated(self, tmp_path):
        path = write(tmp_path / "c.npz")
        path.write_bytes(path.read_bytes()[:-200])
        for read in (read_case, read_system):
            with pytest.raises(CaseError, match="damaged"):
                read(path)

    def test_flipped_bit(self, tmp_path):
        path = write(tmp_path / "c.npz", {"x": np.zeros(1000)})
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4  # within the 8,000 bytes of x
        path.write_bytes(data)
        with pytest.raises(CaseError):
            read_case(path)

    @pytest.mark.parametrize("content", [b"", b"hello", b"\x93NUMPY\x01\x00"])
    def test_not_an_archive(self, tmp_path, content):
        path = tmp_path / "c.npz"
        path.write_bytes(content)
        with pytest.raises(CaseError):
            read_case(path)

    def test_single_array(self, tmp_path):
        with (tmp_path / "c.npz").open("wb") as file:
            np.save(file, np.zeros(3))
        with pytest.raises(CaseError, match="single array"):
            read_case(tmp_path / "c.npz")

    def test_pickled_objects_are_refused(self, tmp_path):
        path = write(tmp_path / "c.npz", extra=np.array([{"a": 1}], dtype=object))
        with pytest.raises(CaseError):
            read_case(path)

    def test_other_format(self, tmp_path):
        np.savez(tmp_path / "c.npz", meta=np.array('{"format": 1}'))
        with pytest.raises(CaseError, match="format 1"):
            read_case(tmp_path / "c.npz")

    def test_no_meta(self, tmp_path):
        np.savez(tmp_path / "c.npz", x=np.zeros(3))
        with pytest.raises(CaseError, match="meta"):
            read_case(tmp_path / "c.npz")

    def test_nothing_expected(self, tmp_path):
        with pytest.raises(CaseError, match="no expected output"):
            read_case(write(tmp_path / "c.npz", outputs={}))

    def test_array_of_no_section(self, tmp_path):
        with pytest.raises(CaseError, match="other/x"):
            read_case(write(tmp_path / "c.npz", **{"other/x": np.zeros(1)}))

    def test_output_without_tolerance(self, tmp_path):
        with pytest.raises(CaseError, match="output y"):
            read_case(write(tmp_path / "c.npz", **{"out/y": np.zeros(1)}))

    def test_unknown_weight_rule(self, tmp_path):
        with pytest.raises(CaseError, match="rotate"):
            read_case(write(tmp_path / "c.npz", weights={"m": {"entries": [], "rotate": 3}}))

    def test_stray_weight(self, tmp_path):
        weights = {"m": {"entries": [["a", [1]]]}}
        with pytest.raises(CaseError, match="m/b"):
            read_case(write(tmp_path / "c.npz", weights=weights, **{"w/m/b": np.zeros(1)}))

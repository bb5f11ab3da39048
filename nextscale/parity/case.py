"""One golden case: reading it, drawing its weights, and judging outputs against it."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nextscale.parity.seeding import seeded_weight
from nextscale.parity.tracking import Tracked

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 2
_SECTIONS = ("in", "out", "w")
_OUTPUT_FIELDS = {"meaning", "rtol", "atol", "store"}


class CaseError(ValueError):
    """A file that is not a readable golden case."""


@dataclass(frozen=True)
class Error:
    """How far one output is from what the case expects.

    ``largest`` is the largest absolute difference (for integers: the number of unequal values), ``share`` the
    largest difference as a share of its tolerance: above 1 it exceeds it. ``problem`` says why where no
    difference could be taken.
    """

    output: str
    largest: float
    share: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        return self.share <= 1


@dataclass(frozen=True)
class _Part:
    """How the weights of one part of a model are made."""

    entries: list[tuple[str, list[int]]]
    kept: list[str] = field(default_factory=list)
    adjust: list[tuple[str, float, float]] = field(default_factory=list)
    seed_prefix: str = ""
    aliases: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Case:
    """A golden case.

    ``config``, ``options`` and ``inputs`` remember what is read of them; :meth:`unused` lists what was not.
    """

    name: str
    system: str
    operation: str
    notes: str
    config: Tracked
    options: Tracked
    inputs: Tracked
    expected: dict[str, np.ndarray] = field(repr=False)
    outputs: dict[str, dict[str, Any]] = field(repr=False)
    _parts: Tracked = field(repr=False)
    _given: dict[str, np.ndarray] = field(repr=False)

    def weights(self, part: str) -> dict[str, np.ndarray]:
        """{state-dict key: float32 array} of one part of the model.

        Buffers that a model derives by itself (masks, level indices) are absent.
        """
        spec: _Part = self._parts[part]
        skipped = set(spec.kept)
        result: dict[str, np.ndarray] = {}
        for key, shape in spec.entries:
            if key in skipped:
                continue
            weight = self._given.get(f"{part}/{key}")
            if weight is None:
                weight = seeded_weight(spec.seed_prefix + key, shape)
                for glob, factor, offset in spec.adjust:
                    if fnmatch.fnmatchcase(key, glob):
                        weight = np.asarray(weight * np.float32(factor) + np.float32(offset), np.float32)
            result[key] = weight
        for key, other in spec.aliases:
            result[key] = result[other]
        return result

    def state_dict(self, part: str) -> dict[str, Tensor]:
        """:meth:`weights` as tensors."""
        import torch

        return {key: torch.from_numpy(np.array(weight)) for key, weight in self.weights(part).items()}

    def tensor(self, name: str) -> Tensor:
        """An input as a tensor of its own."""
        import torch

        return torch.from_numpy(np.array(self.inputs[name]))

    def ignore_weights(self, *parts: str) -> None:
        """Declare that the weights of these parts cannot change this operation's outputs."""
        self._parts.ignore(*parts)

    def unused(self) -> list[str]:
        """What the case gives and nothing read: options, configuration, inputs and parts' weights."""
        return [path for given in (self.config, self.options, self.inputs, self._parts) for path in given.unread()]

    def errors(self, outputs: Mapping[str, Any]) -> list[Error]:
        """One :class:`Error` for every expected output.

        Floats must satisfy abs(ours - expected) <= atol + rtol abs(expected) everywhere, two NaNs in the same
        place being equal; integers must be equal. Args: ``outputs``, {name: array or tensor}, whole.
        """
        return [
            compare(name, outputs.get(name), expected, **_tolerance(self.outputs[name]))
            for name, expected in self.expected.items()
        ]


def compare(name: str, ours: Any, expected: np.ndarray, rtol: float, atol: float, store: Any) -> Error:
    """The error of one output (see :meth:`Case.errors`)."""
    if ours is None:
        return Error(name, math.inf, math.inf, "the operation does not give this output")
    try:
        got = cut(to_numpy(ours), store)
    except (TypeError, ValueError, IndexError, KeyError) as error:
        return Error(name, math.inf, math.inf, f"cannot be compared: {error}")
    if got.shape != expected.shape:
        return Error(name, math.inf, math.inf, f"shape {got.shape}, expected {expected.shape}")
    if expected.size == 0:
        return Error(name, 0.0, 0.0)
    if expected.dtype.kind in "iub":
        unequal = int((got != expected).sum())
        problem = f"{unequal} of {expected.size} integers differ" if unequal else ""
        return Error(name, float(unequal), math.inf if unequal else 0.0, problem)
    got, want = got.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity minus infinity: equal values are set to no difference below
        gap = np.abs(got - want)
        # Where no room is given, the smallest positive number: any difference at all is then far above it.
        share = gap / np.maximum(atol + rtol * np.abs(want), 1e-300)
    equal = (got == want) | (np.isnan(got) & np.isnan(want))
    gap, share = np.where(equal, 0.0, gap), np.where(equal, 0.0, share)
    gap[np.isnan(gap)] = share[np.isnan(share)] = math.inf
    return Error(name, float(gap.max()), float(share.max()))


def cut(array: np.ndarray, store: Any) -> np.ndarray:
    """The part of a whole output that a case keeps.

    ``store`` is None or ``"full"``; ``{"every": n}``: every n-th value of the flattened array; ``{"crop":
    [[start, stop], ...]}``: a box; ``{"packbits": shape}``: truth values, eight to a byte.
    """
    if store is None or store == "full":
        return array
    if isinstance(store, Mapping) and len(store) == 1:
        [(kind, value)] = store.items()
        if kind == "every":
            return array.reshape(-1)[:: int(value)]
        if kind == "crop":
            return array[tuple(slice(start, stop) for start, stop in value)]
        if kind == "packbits":
            return np.packbits(array.astype(bool).reshape(-1))
    raise ValueError(f"store {store!r} is not one of full, every, crop, packbits")


def to_numpy(value: Any) -> np.ndarray:
    """An array from a tensor of any device and type, an array or nested lists."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        return value.float().numpy() if str(value.dtype) == "torch.bfloat16" else value.numpy()
    return np.asarray(value)


def read_case(path: str | Path) -> Case:
    """Read one case.

    Raises:
        CaseError: the file is damaged, of another format, or contradicts itself.
        OSError: it cannot be read at all.
    """
    path = Path(path)
    arrays = _read(path)
    meta = _meta(path, arrays)
    try:
        return _build(path, meta, arrays)
    except (KeyError, TypeError, AttributeError) as error:
        raise CaseError(f"{path.name}: 'meta' is incomplete ({type(error).__name__}: {error})") from error


def read_system(path: str | Path) -> str:
    """The system a case belongs to, without reading its arrays. Raises as :func:`read_case`."""
    path = Path(path)
    return str(_meta(path, _read(path, only="meta")).get("system"))


def _read(path: Path, only: str | None = None) -> dict[str, np.ndarray]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise CaseError(f"{path.name}: a single array, not an .npz archive of a case")
        with loaded as file:
            return {key: file[key] for key in file.files if only in (None, key)}
    except CaseError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        # Any type may come: NumPy lets the errors of the archive and of the decompressor through.
        raise CaseError(f"{path.name}: damaged file ({type(error).__name__}: {error})") from error


def _meta(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    if "meta" not in arrays:
        raise CaseError(f"{path.name}: no 'meta' entry, so it is not a golden case")
    try:
        meta = json.loads(str(arrays.pop("meta")))
    except json.JSONDecodeError as error:
        raise CaseError(f"{path.name}: 'meta' is not JSON ({error})") from error
    found = meta.get("format") if isinstance(meta, dict) else meta
    if not isinstance(meta, dict) or found != FORMAT:
        raise CaseError(f"{path.name}: format {found!r}, this replay reads format {FORMAT}")
    return meta


def _build(path: Path, meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> Case:
    sections: dict[str, dict[str, np.ndarray]] = {section: {} for section in _SECTIONS}
    for key, array in arrays.items():
        section, _, name = key.partition("/")
        if section not in sections or not name:
            raise CaseError(f"{path.name}: array {key!r} is neither in/NAME, out/NAME nor w/PART/KEY")
        sections[section][name] = array
    outputs, weights = meta["outputs"], meta.get("weights") or {}
    if not sections["out"]:
        raise CaseError(f"{path.name}: no expected output, so there is nothing to compare")
    if unmatched := sorted(set(outputs) ^ set(sections["out"])):
        raise CaseError(f"{path.name}: only one of description and array is there for output {', '.join(unmatched)}")
    for name, spec in outputs.items():
        _known(path, f"output {name}", spec, _OUTPUT_FIELDS)
        for bound in ("rtol", "atol"):
            if not 0 <= float(spec[bound]) < math.inf:
                raise CaseError(f"{path.name}: {bound} {spec[bound]!r} of output {name} is not a tolerance")
    for part, spec in weights.items():
        _known(path, f"weights of {part}", spec, {part_field.name for part_field in fields(_Part)})
    parts = {
        part: _Part(**{name: value for name, value in spec.items() if value is not None})
        for part, spec in weights.items()
    }
    entries = {f"{part}/{key}" for part, spec in parts.items() for key, _ in spec.entries}
    if stray := sorted(set(sections["w"]) - entries):
        raise CaseError(f"{path.name}: weight {stray[0]} is given but not among its part's entries")
    return Case(
        name=path.stem,
        system=meta["system"],
        operation=meta["operation"],
        notes=meta.get("notes") or "",
        config=Tracked(meta.get("config") or {}, "config"),
        options=Tracked(meta.get("options") or {}, "options"),
        inputs=Tracked(sections["in"], "inputs"),
        expected=sections["out"],
        outputs=outputs,
        _parts=Tracked(parts, "weights"),
        _given=sections["w"],
    )


def _known(path: Path, what: str, spec: dict[str, Any], known: set[str]) -> None:
    if unknown := sorted(set(spec) - known):
        raise CaseError(f"{path.name}: field {', '.join(unknown)} of the {what} is not understood")


def _tolerance(spec: dict[str, Any]) -> dict[str, Any]:
    return {"rtol": float(spec["rtol"]), "atol": float(spec["atol"]), "store": spec.get("store")}

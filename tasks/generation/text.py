"""Text encoders, through transformers: prompts as features of various length, kept on disk once computed."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nextscale.core.checkpoint import CheckpointError, read_tensors, write_atomically
from nextscale.core.cross_attention import Packed

_log = logging.getLogger(__name__)
RECENT = 64 * 2**20
"""Bytes of features of the latest texts that are kept in memory."""
PIPELINE = ("tokenizer", "text_encoder")
"""Folders in which a pipeline of diffusers keeps its text encoder."""
SMALL = 32 * 2**20
"""Bytes up to which an encoder is saved with the model; of others the name is kept."""
_SAMPLE = 2**20
"""Bytes at both ends of a file of weights that its fingerprint is taken of."""


@dataclass(frozen=True)
class TextEncoderConfig:
    """Attributes:

    name: a folder that transformers can read, or a name on the Hugging Face hub.
    kind: which half of the model is used; None: told by its configuration.
    max_length: tokens a text is cut to, its end token included.
    padded: fill every text up to ``max_length`` and let the padding count, as models do that take no mask.
    folders: of tokenizer and encoder inside ``name``, as pipelines of diffusers keep them. A folder on this machine
        that has a ``tokenizer`` and a ``text_encoder`` is read so without being told.
    """

    name: str
    kind: Literal["t5", "clip"] | None = None
    max_length: int = 512
    padded: bool = False
    folders: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length}; a text has at least 1 token")


@dataclass(frozen=True, eq=False)
class TextFeatures:
    """What an encoder makes of texts; float32, on the CPU.

    Attributes:
        states: of every token.
        pooled: of every text, (texts, width), where the encoder pools (CLIP).
    """

    states: Packed
    pooled: Float[Tensor, "texts width"] | None = None

    def __len__(self) -> int:
        return len(self.states)

    @classmethod
    def join(cls, parts: Sequence[TextFeatures]) -> TextFeatures:
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return cls(Packed.join(part.states for part in parts), torch.cat(pooled) if len(pooled) == len(parts) else None)

    def vectors(self) -> Float[Tensor, "texts width"]:
        """What the encoder makes of whole texts.

        Raises:
            ValueError: it makes none.
        """
        if self.pooled is None:
            raise ValueError(
                "the text encoder gives no vector of a whole text, which this model begins with: take a CLIP text model"
            )
        return self.pooled

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextFeatures:
        pooled = None if self.pooled is None else self.pooled.to(device=device, dtype=dtype)
        return TextFeatures(self.states.to(device, dtype), pooled)

    def select(self, indices: Sequence[int]) -> TextFeatures:
        """The texts with these numbers, in this order."""
        pooled = None if self.pooled is None else self.pooled[list(indices)]
        return TextFeatures(self.states.select(indices), pooled)


class TextEncoder:
    """A text encoder that is loaded when the first text asks for it, and can be let go.

    Args:
        home: a folder in which the encoder may lie, under its name or the last part of it.
        device: None: CUDA where it is there, else the CPU.
        dtype: of the weights; None: float16 on CUDA, else float32.
        bits: 8 or 4: weights of so many bits, by bitsandbytes or optimum-quanto.
        cache: folder in which features are kept, by text and encoder; None: they are not.
    """

    def __init__(
        self,
        config: TextEncoderConfig,
        *,
        home: Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        bits: Literal[8, 4] | None = None,
        cache: str | Path | None = None,
    ) -> None:
        if bits not in (None, 8, 4):
            raise ValueError(f"bits is {bits}; expected 8, 4 or None for whole weights")
        beside = [] if home is None else [home / config.name, home / Path(config.name).name]
        self.source = next((str(place) for place in beside if place.is_dir()), config.name)
        self.config, self.bits = config, bits
        self.folders = self._folders()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype or (torch.float16 if self.device.type == "cuda" else torch.float32)
        self.cache = None if cache is None else Path(cache)
        self.encoded = 0
        self._model: Any = None
        self._tokenizer: Any = None
        self._fingerprint: str | None = None
        self._recent: dict[str, TextFeatures] = {}
        self._recent_bytes = 0

    def _folders(self) -> tuple[str, str]:
        """Where tokenizer and encoder lie in the source; empty: the source itself."""
        named, here = self.config.folders, Path(self.source)
        if not here.is_dir():
            return named or ("", "")
        usual = [pair for pair in (named, PIPELINE) if pair is not None]
        return next((pair for pair in usual if all((here / part).is_dir() for part in pair)), ("", ""))

    def _at(self, folder: str) -> dict[str, Any]:
        """The place of a part, as transformers takes it."""
        if folder and Path(self.source).is_dir():
            return {"pretrained_model_name_or_path": str(Path(self.source) / folder)}
        return {"pretrained_model_name_or_path": self.source, **({"subfolder": folder} if folder else {})}

    @property
    def width(self) -> int:
        """Channels of the features."""
        config = self._config()
        return int(getattr(config, "d_model", None) or config.hidden_size)

    def encode(self, texts: Sequence[str], batch_size: int = 16) -> TextFeatures:
        """Features of texts; a text that was met before is read from the cache.

        Empty texts have the features of the tokenizer's own marks. Longer texts than ``max_length`` are cut, with a
        warning.

        Raises:
            ValueError: there is no text, or one is not text.
            FileNotFoundError: the encoder is not here and cannot be fetched.
        """
        if not texts:
            raise ValueError("there is no text to encode; give at least one")
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"a prompt is {wrong[0]!r}; expected text")
        # Half of a pair of code units is no character, and tokenizers fail on it.
        cleaned = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        found: dict[str, TextFeatures] = {}
        for text in dict.fromkeys(cleaned):
            kept = self._recent.get(text) or self._read(text)
            if kept is not None:
                found[text] = self._keep(text, kept)
        missing = [text for text in dict.fromkeys(cleaned) if text not in found]
        for start in range(0, len(missing), batch_size):
            part = missing[start : start + batch_size]
            features = self._compute(part)
            for index, text in enumerate(part):
                found[text] = self._keep(text, features.select([index]))
                self._write(text, found[text])
        return TextFeatures.join([found[text] for text in cleaned])

    def save(self, folder: str | Path) -> TextEncoderConfig:
        """Copy the encoder into a folder, if it is a small one in a folder of its own; returns what names it there."""
        source = Path(self.source)
        if not source.is_dir():
            return self.config
        target = Path(folder) / Path(self.config.name).name
        files = [path for path in source.rglob("*") if path.is_file()]
        if sum(path.stat().st_size for path in files) > SMALL:
            return self.config
        if target.resolve() != source.resolve():
            for path in files:
                write_atomically(target / path.relative_to(source), partial(shutil.copyfile, path))
        return replace(self.config, name=target.name)

    def release(self) -> None:
        """Let the encoder go, so that its memory is free; it is loaded again when it is needed."""
        self._model = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._model is not None

    # --- computing ---------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _compute(self, texts: list[str]) -> TextFeatures:
        tokenizer, model = self._open()
        limit = self.config.max_length
        tokens = tokenizer(texts, truncation=True, max_length=limit, padding=False, return_attention_mask=False)
        for text, ids in zip(texts, tokens["input_ids"], strict=True):
            if len(ids) >= limit and len(text) > limit:
                _log.warning("a text of %d characters is cut to %d tokens: %.40s…", len(text), limit, text)
        lengths = [max(len(ids), 1) for ids in tokens["input_ids"]]
        longest = limit if self.config.padded else max(lengths)
        filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        ids = torch.full((len(texts), longest), filler)
        for row, found in zip(ids, tokens["input_ids"], strict=True):
            row[: len(found)] = torch.tensor(found, dtype=row.dtype)
        mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
        device = self.device
        # In the encoder's own precision, also in the middle of training in another.
        with torch.autocast(device.type, enabled=False):
            output = model(input_ids=ids.to(device), attention_mask=mask.long().to(device))
        self.encoded += len(texts)
        states = output.last_hidden_state.float().cpu()
        kept = [longest] * len(texts) if self.config.padded else lengths
        packed = Packed(torch.cat([row[:length] for row, length in zip(states, kept, strict=True)]), tuple(kept))
        pooled = getattr(output, "pooler_output", None)
        return TextFeatures(packed, None if pooled is None else pooled.float().cpu())

    def _open(self) -> tuple[Any, Any]:
        if self._model is None:
            from transformers import AutoModel, AutoTokenizer, CLIPTextModel, T5EncoderModel

            config = self._config()
            kind = self.config.kind or {"t5": "t5", "mt5": "t5", "clip": "clip", "clip_text_model": "clip"}.get(
                config.model_type
            )
            model_class: Any = {"t5": T5EncoderModel, "clip": CLIPTextModel, None: AutoModel}[kind]
            given = {} if self.bits is None else {"quantization_config": quantization(self.bits, self.device)}
            with _explained(self.source), quiet():
                self._tokenizer = AutoTokenizer.from_pretrained(**self._at(self.folders[0]))
                model = model_class.from_pretrained(**self._at(self.folders[1]), dtype=self.dtype, **given)
            self._model = model.eval() if self.bits is not None else model.eval().to(self.device)
            self._model.requires_grad_(False)
        return self._tokenizer, self._model

    def _config(self) -> Any:
        from transformers import AutoConfig

        with _explained(self.source):
            config = AutoConfig.from_pretrained(**self._at(self.folders[1]))
        return getattr(config, "text_config", None) or config

    # --- the cache ---------------------------------------------------------------------------------------

    def _keep(self, text: str, features: TextFeatures) -> TextFeatures:
        """Keep the features of the latest texts in memory: captions of few classes come again and again."""
        known = self._recent.pop(text, None)
        self._recent_bytes += 0 if known is not None else features.states.values.nbytes
        self._recent[text] = features
        while self._recent_bytes > RECENT and len(self._recent) > 1:
            oldest = self._recent.pop(next(iter(self._recent)))
            self._recent_bytes -= oldest.states.values.nbytes
        return features

    def fingerprint(self) -> str:
        """A short digest of what decides features: those of another encoder are not mixed in."""
        if self._fingerprint is None:
            digest = hashlib.sha256(repr((self.config.max_length, self.config.padded, self.bits)).encode())
            folder = Path(self.source)
            if folder.is_dir():
                for path in sorted(path for part in set(self.folders) for path in (folder / part).iterdir()):
                    if path.is_file():
                        digest.update(f"{path.name} {path.stat().st_size}".encode())
                        with path.open("rb") as file:
                            digest.update(file.read(_SAMPLE))
                            file.seek(max(path.stat().st_size - _SAMPLE, 0))
                            digest.update(file.read(_SAMPLE))
            else:
                commit = getattr(self._config(), "_commit_hash", None)
                digest.update(f"{self.source} {commit} {self.dtype}".encode())
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def _place(self, text: str) -> Path | None:
        if self.cache is None:
            return None
        key = hashlib.sha256(text.encode()).hexdigest()
        return self.cache / self.fingerprint() / key[:2] / f"{key}.safetensors"

    def _read(self, text: str) -> TextFeatures | None:
        place = self._place(text)
        if place is None or not place.is_file():
            return None
        try:
            tensors = read_tensors(place)
            states = tensors["states"].float()
        except (CheckpointError, KeyError):
            return None  # computed anew, and written over
        pooled = tensors.get("pooled")
        return TextFeatures(Packed(states, (len(states),)), None if pooled is None else pooled.float())

    def _write(self, text: str, features: TextFeatures) -> None:
        place = self._place(text)
        if place is None:
            return
        from safetensors.torch import save_file

        tensors = {"states": features.states.values}
        if features.pooled is not None:
            tensors["pooled"] = features.pooled
        # What half precision computed, half precision holds.
        stored = {name: value.to(self.dtype).clone() for name, value in tensors.items()}
        write_atomically(place, lambda path: save_file(stored, path))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of transformers, which show for files of any size."""
    from transformers.utils import logging as shown

    was = shown.is_progress_bar_enabled()
    shown.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            shown.enable_progress_bar()


class _explained:
    """Says in one line what is missing where transformers cannot find an encoder."""

    def __init__(self, source: str) -> None:
        self._source = source

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            raise FileNotFoundError(
                f"the text encoder {self._source!r} cannot be opened: it is no folder with a model that transformers "
                f"reads, or it is not on this machine and the hub cannot be reached. Run `hf download {self._source}` "
                "where there is a network, or give a folder as text encoder"
            ) from error


def quantization(bits: int, device: torch.device) -> Any:
    """How transformers is to load weights of a few bits.

    Raises:
        ValueError: no package that does so is installed.
    """
    from transformers import BitsAndBytesConfig, QuantoConfig

    if device.type == "cuda" and importlib.util.find_spec("bitsandbytes") is not None:
        return BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    if _has("optimum.quanto"):
        return QuantoConfig(weights=f"int{bits}")
    raise ValueError(
        f"a text encoder in {bits} bits needs the package bitsandbytes (with an NVIDIA GPU) or optimum-quanto, and "
        "neither is usable here: install one, or keep the encoder on the CPU"
    )


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False

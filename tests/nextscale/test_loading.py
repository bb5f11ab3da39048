"""Loading: every form of a model gives the same one, and what is no model says why."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nextscale
from nextscale import hub, models
from nextscale.core.checkpoint import CheckpointError, save_folder
from nextscale.mapped import MappedFiles
from nextscale.tasks.generation.var import VAR
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ


def picture(model: VAR) -> torch.Tensor:
    return model.generate(3, seed=5, top_k=0)


def same(model: Any, other: Any) -> bool:
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k].float(), theirs[k].float()) for k in mine)


# --- forms of one model -------------------------------------------------------------------------------


def test_every_form_gives_the_same_model(forms: SimpleNamespace) -> None:
    expected = picture(forms.model)
    state = forms.model.to_official()
    for model in (
        nextscale.load(forms.folder, device="cpu"),
        nextscale.load(str(forms.folder / "model.safetensors"), device="cpu"),
        nextscale.load(forms.transformer, device="cpu"),
        nextscale.load(forms.transformer, "var", "cpu", tokenizer=str(forms.tokenizer)),
        nextscale.load(forms.checkpoint, device="cpu"),
        nextscale.load(state, device="cpu", tokenizer=forms.model.tokenizer),
    ):
        assert isinstance(model, VAR) and not model.training
        assert same(model, forms.model)
        assert torch.equal(picture(model), expected)
        assert model.tokenizer.config.schedule == model.config.schedule


def test_tokenizers_load_from_their_file_and_from_training_checkpoints(forms: SimpleNamespace) -> None:
    for tokenizer in (
        nextscale.load(forms.tokenizer, schedule="1 2 4"),
        nextscale.load(forms.checkpoint, "residual-vq", schedule="1 2 4"),
        nextscale.load(forms.model.tokenizer.to_official(), schedule="1 2 4"),
    ):
        assert isinstance(tokenizer, ResidualVQ)
        assert same(tokenizer, forms.model.tokenizer)
        assert tokenizer.config == forms.model.tokenizer.config


def test_a_run_is_loaded_by_its_output_folder(forms: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copytree(forms.folder, tmp_path / "run" / "model")
    assert same(nextscale.load(tmp_path / "run"), forms.model)


def test_an_embedded_model_is_loaded_by_name(
    forms: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"var-cifar10 should be in .*install"):
        nextscale.load("var-cifar10")
    shutil.copytree(forms.folder, tmp_path / "var-cifar10")
    assert same(nextscale.load("var-cifar10"), forms.model)


def test_names_and_patterns() -> None:
    names = nextscale.list_models()
    assert {"var-cifar10", "var-d16", "var-d20", "var-d24", "var-d30", "var-d36", "var-tokenizer"} <= set(names)
    assert nextscale.list_models("r-d36") == ["var-d36"]
    assert nextscale.list_models("var-?1") == []
    assert nextscale.list_models("var-d2?") == ["var-d20", "var-d24"]
    assert set(nextscale.list_models("*var-d24")) == {"var-d24", "flexvar-d24", "controlvar-d24"}
    with pytest.raises(AttributeError, match="nothing"):
        _ = nextscale.nothing
    assert {"load", "list_models", "__version__"} <= set(dir(nextscale))


# --- precision and device -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", torch.bfloat16])
def test_weights_are_cast_but_for_the_islands(forms: SimpleNamespace, dtype: Any) -> None:
    model = nextscale.load(forms.folder, dtype=dtype)
    stays = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    quantizer = {n for n, _ in model.named_parameters() if n.startswith("tokenizer.quantizer.")}
    assert stays == quantizer | {"transformer.blocks.0.attention.log_scale"}
    assert model.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.tokenizer.parameters())
    assert model.head.linear.weight.requires_grad
    image = picture(model)
    assert image.dtype == torch.float32 and image.isfinite().all()
    assert same(nextscale.load(forms.folder), forms.model), "the file is as it was"


def test_devices_and_dtypes_are_checked(forms: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="no device 'gpu'; name cuda"):
        nextscale.load(forms.folder, device="gpu")
    with pytest.raises(ValueError, match="'cuda' is not on this machine, which has cpu"):
        nextscale.load(forms.folder, device="cuda")
    with pytest.raises(ValueError, match="'int8' is none of float32, bfloat16"):
        nextscale.load(forms.folder, dtype="int8")


MEASURE = """
import resource, sys, time
import torch, nextscale
from nextscale.tasks.generation import var
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
model = nextscale.load(sys.argv[1], dtype=sys.argv[2])
seconds = time.perf_counter() - began
weights = sum(float(p.detach().flatten()[0]) for p in model.parameters())
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(seconds, grown)
"""


@pytest.fixture(scope="module")
def large(forms: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An official file of some 60 MB, beside its tokenizer's."""
    folder = tmp_path_factory.mktemp("large")
    model = forms.build(depth=4, width=512)
    torch.save(model.tokenizer.to_official(), folder / "vae_small.pth")
    torch.save(model.to_official(), folder / "var_large.pth")
    return folder / "var_large.pth"


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux tells it")
@pytest.mark.parametrize(("dtype", "most"), [("float32", 0.5), ("bfloat16", 0.8)])
def test_loading_takes_no_second_copy_into_memory(large: Path, dtype: str, most: float) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large), dtype], capture_output=True, text=True, timeout=120, check=True
    )
    seconds, grown = map(float, done.stdout.split())
    print(f"{dtype}: {seconds:.2f} s, {grown / large.stat().st_size:.2f} of the file's size")
    assert grown <= most * large.stat().st_size


def test_released_pages_are_read_again_and_other_memory_is_left_alone(tmp_path: Path) -> None:
    saved = {"a": torch.randn(40_000), "b": torch.randn(5)}
    torch.save(saved, tmp_path / "x.pth")
    mapped = torch.load(tmp_path / "x.pth", mmap=True, weights_only=True)
    own = torch.randn(40_000)
    expected = own.clone()
    files = MappedFiles()
    for tensor in (*mapped.values(), own):
        files.release(tensor)
    assert torch.equal(mapped["a"], saved["a"]) and torch.equal(mapped["b"], saved["b"])
    assert torch.equal(own, expected)


# --- what is refused ----------------------------------------------------------------------------------


def test_overrides_are_checked(forms: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="var takes no sheduel; it takes schedule, heads, tokenizer"):
        nextscale.load(forms.transformer, sheduel="1 2 4")
    with pytest.raises(ValueError, match="schedule: a folder saved by this library says all of this itself"):
        nextscale.load(forms.folder, schedule="1 2 4")
    with pytest.raises(ValueError, match=r"unknown system 'sar'; known are .*\bvar, .*residual-vq"):
        nextscale.load(forms.transformer, "sar")
    with pytest.raises(CheckpointError, match="holds a saved 'var', expected residual-vq"):
        nextscale.load(forms.folder, "residual-vq")
    with pytest.raises(ValueError, match="do not belong together"):
        nextscale.load(forms.transformer, tokenizer=ResidualVQ())


def test_a_transformer_without_its_tokenizer_says_what_to_fetch(forms: SimpleNamespace, tmp_path: Path) -> None:
    lonely = shutil.copy(forms.transformer, tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        nextscale.load(lonely)
    message = str(caught.value)
    for part in ("vae_ch160v4096z32.pth", "FoundationVision/var", "--tokenizer PATH", "HF_HUB_OFFLINE", "resolve/main"):
        assert part in message
    shutil.copy(forms.tokenizer, tmp_path / "vae_ch160v4096z32.pth")
    shutil.copy(forms.tokenizer, tmp_path / "vae_another.pth")
    assert same(nextscale.load(lonely), forms.model), "the published name wins"


def test_unknown_content_names_its_keys_and_the_systems(tmp_path: Path) -> None:
    foreign = {f"layer{i}.weight": torch.zeros(1) for i in range(9)}
    torch.save(foreign, tmp_path / "x.pth")
    for source in (foreign, tmp_path / "x.pth"):
        with pytest.raises(CheckpointError, match=r"\(.*\bvar, .*residual-vq.*\).*'layer0.weight'.* and 3 more"):
            nextscale.load(source)
    with pytest.raises(
        CheckpointError, match=r"checkpoint from the middle of training a 'var' \(step 12\).*folder `model`"
    ):
        nextscale.load({"task": "var", "step": 12, "phases": {}})
    with pytest.raises(FileNotFoundError, match=r"'var-d61' is no file, no folder.*did you mean .*var-d16"):
        nextscale.load("var-d61")


def test_damaged_and_unsafe_files_are_refused(forms: SimpleNamespace, tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Harmful(), protocol=2))
    torch.save({"x": Harmful()}, tmp_path / "evil-zip.pth")
    for name in ("evil.pth", "evil-zip.pth"):
        with pytest.raises(CheckpointError, match=r"is refused: it .*could run code"):
            nextscale.load(tmp_path / name)
    assert not (tmp_path / "executed").exists()
    content = forms.transformer.read_bytes()
    (tmp_path / "short.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        nextscale.load(tmp_path / "short.pth")
    shutil.copytree(forms.folder, tmp_path / "folder")
    weights = tmp_path / "folder" / "model.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-100] ^= 1
    weights.write_bytes(flipped)
    with pytest.raises(CheckpointError, match="damaged: its checksum"):
        nextscale.load(tmp_path / "folder")


def test_folders_that_are_no_models(forms: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config.json.*it holds nothing"):
        nextscale.load(tmp_path)
    shutil.copy(forms.transformer, tmp_path)
    with pytest.raises(CheckpointError, match=r"it holds var_small.pth. Of official files give the file"):
        nextscale.load(tmp_path)
    save_folder(tmp_path / "later", {"x": torch.zeros(1)}, {"system": "later", "config": {}})
    with pytest.raises(CheckpointError, match=r"holds a saved 'later', expected one of .*\bvar, .*residual-vq"):
        nextscale.load(tmp_path / "later")


# --- the hub ------------------------------------------------------------------------------------------


def test_a_file_of_the_hub_is_found_in_the_cache(forms: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def cached(repository: str, file: str) -> Path:
        asked.append((repository, file))
        return forms.tokenizer if "vae" in file else forms.transformer

    monkeypatch.setattr(hub, "cached", cached)
    assert same(nextscale.load("var-d16"), forms.model)
    assert asked == [("FoundationVision/var", "var_d16.pth")], "the tokenizer lies beside"


def test_without_a_network_the_answer_comes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(hub.HubError, match=r"var_d30.pth is not on this machine \(HF_HUB_OFFLINE.*hf download"):
        nextscale.load("var-d30")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    began = time.perf_counter()
    with pytest.raises(hub.HubError, match=r"https://huggingface.co/FoundationVision/var/resolve/main/var_d30.pth"):
        nextscale.load("var-d30")
    assert time.perf_counter() - began < 10


def test_the_configuration_of_a_saved_folder_is_plain_json(forms: SimpleNamespace) -> None:
    config = json.loads((forms.folder / "config.json").read_text())
    assert config["system"] == "var" and config["config"]["transformer"]["schedule"] == "1 2 4"

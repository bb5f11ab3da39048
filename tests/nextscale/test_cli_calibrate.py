"""`nextscale calibrate`, and the plan it writes in other commands."""

import json
import shlex
from pathlib import Path

import pytest
import torch

from nextscale.cli import main
from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.quantizer import QuantizerConfig
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.transformer import TransformerConfig
from nextscale.tasks.generation.var import VAR, VARConfig
from nextscale.tasks.generation.var_training import initialize
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ, ResidualVQConfig

SCHEDULE = ScaleSchedule.squares(1, 2, 4, 6)


def small_model() -> VAR:
    torch.manual_seed(0)
    shape = AutoencoderConfig(channels=32, multipliers=(1, 1), blocks=1, latent_channels=4)
    tokenizer = ResidualVQ(ResidualVQConfig(shape, QuantizerConfig(16, 4), SCHEDULE))
    torch.nn.init.normal_(tokenizer.quantizer.codebook.weight)
    return initialize(VAR(VARConfig(TransformerConfig(32, 2, 4), 5, 16, 4, SCHEDULE), tokenizer), gate=1, head=1)


def test_a_plan_is_made_and_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small_model().save("model")

    def typed(line: str, status: int = 0) -> str:
        assert main(shlex.split(line)) == status
        out, err = capsys.readouterr()
        return err if status else out

    said = typed("calibrate model --out plan --num 3 --batch-size 2 --saving 0.6 --weight-bits 4 --share true")
    assert "of 4 bits" in said and "attention saved  6" in said and said.rstrip().endswith("plan")
    typed("generate model --lite plan --num 2 --out drawn")
    assert len(list(Path("drawn").glob("image-*.png"))) == 2
    assert json.loads(Path("plan/config.json").read_text())["config"]["share_from"] == 2
    said = typed(
        "calibrate model --out published --num 1 --windows mass --share false --weight-bits 16 --cache-bits 16"
    )
    assert "0 of 8 bits" in said and "attention kept" not in said
    assert "--lite" in typed("calibrate model --lite plan", 2)
    assert "the small scales" in typed("calibrate model --num 1 --saving 0.99 --out none", 2)
    assert not Path("none").exists()
    assert "calibrate this model" in typed("generate var-cifar10 --lite plan --num 1", 2)

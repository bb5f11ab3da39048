"""Several processes train as one, go on as another number of them, and end together, with the last state intact."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nextscale.core.checkpoint import CheckpointError, write_tensors
from nextscale.core.distributed_checkpoint import FolderReader
from nextscale.core.training_state import checkpoints

from ..processes import LIMIT, run_program
from .distributed_runs import Fitting, rows, trainer

pytestmark = pytest.mark.timeout(900)  # seconds where nothing else runs, minutes where much does
HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """One program forks the processes of all runs, so that libraries are imported once."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, run_program(HERE / "distributed_runs.py", folder)


def same_curve(run: Any, other: Any, tolerance: float = 1e-4) -> None:
    named = {"loss", "grad_norm", "noise", "judge/loss", "step", "validation/v", "learning_rate"}
    pick = [{k: v for k, v in row.items() if k in named} for row in run["log"]]
    assert [row["step"] for row in pick] == [row["step"] for row in other["log"]]
    for row, theirs in zip(pick, other["log"], strict=True):
        assert row == pytest.approx({k: theirs[k] for k in row}, rel=tolerance, abs=tolerance)


def same_end(run: Any, other: Any, tolerance: float = 1e-4) -> None:
    assert run["after"] == other["after"]
    assert run["state"].keys() == other["state"].keys()
    for name, value in run["state"].items():
        if not name.endswith("seen"):  # counts what one process does
            torch.testing.assert_close(torch.tensor(value), torch.tensor(other["state"][name]), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("run", "alone"),
    [("ddp", "alone"), ("fsdp", "alone"), ("more_ddp", "more_alone"), ("more_fsdp", "more_alone")],
)
def test_two_processes_train_like_one(run: str, alone: str, runs: tuple[Path, Any]) -> None:
    """Also under accumulation, checkpointed activations, a second phase, and modulation by raw parameters."""
    found = runs[1]
    same_curve(found[alone], found[run])
    same_end(found[alone], found[run])


def test_half_precision_is_that_of_one_process_up_to_rounding(runs: tuple[Path, Any]) -> None:
    found = runs[1]
    same_curve(found["half_alone"], found["half_fsdp"], 0.05)


def test_sharded_matrices_are_made_orthogonal_as_a_whole(runs: tuple[Path, Any]) -> None:
    """In bfloat16, where sums in another order tell; parts by themselves would end far from here."""
    found = runs[1]
    same_curve(found["muon_alone"], found["muon_fsdp"], 0.02)
    same_end(found["muon_alone"], found["muon_fsdp"], 0.02)


def test_what_no_process_could_read_is_listed_of_all(runs: tuple[Path, Any]) -> None:
    listed = (runs[0] / "ddp" / "skipped.txt").read_text().splitlines()
    assert sorted(listed) == ["0.png", "1.png"]


def test_a_signal_to_one_process_stops_all_with_one_message(runs: tuple[Path, Any]) -> None:
    _, found = runs
    one, other = found["stopped"]
    assert one == other
    assert one.startswith("Interrupted: stopped at step 7 of 12; run the same command to go on")
    assert found["stopped_names"] == ["step-00000004", "step-00000007"]


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_checkpoint_of_two_goes_on_in_another_number(ranks: int, runs: tuple[Path, Any]) -> None:
    found = runs[1]
    same_curve(found["alone"], found[f"on_{ranks}"])
    same_end(found["alone"], found[f"on_{ranks}"])
    suffix = ".pt" if ranks == 1 else ""
    assert found[f"on_{ranks}_names"] == [f"step-00000008{suffix}", f"step-00000012{suffix}"]


def test_a_file_of_one_process_goes_on_in_two(runs: tuple[Path, Any]) -> None:
    found = runs[1]
    assert found["file_names"] == ["step-00000004.pt", "step-00000006.pt"]
    same_curve(found["alone"], found["of_file"])
    same_end(found["alone"], found["of_file"])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_process_ends_all_with_its_message(rank: int, runs: tuple[Path, Any]) -> None:
    folder, found = runs
    one, other = found[f"full_{rank}"]
    assert one == other
    assert one.startswith(f"OSError: {folder}/full_{rank}/checkpoints/step-00000008 could not be written: File too")
    assert found[f"full_{rank}_names"] == ["step-00000004"]
    assert FolderReader(folder / f"full_{rank}" / "checkpoints" / "step-00000004").content["step"] == 4


# --- a process that is killed -------------------------------------------------------------------------

PROGRAM = """
import os, signal, sys, pathlib
sys.path.insert(0, sys.argv[1])
import distributed_runs as runs
from nextscale.core.training import Hooks
def kill(step, steps, metrics):
    if step == 7 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
try:
    runs.trainer(pathlib.Path(sys.argv[2]), runs.Fitting(), Hooks(progress=kill), sharding="full").run()
except OSError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def test_a_killed_process_ends_the_run_within_a_minute_and_it_goes_on(runs: tuple[Path, Any], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(program), str(HERE), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=3 * LIMIT,
        env=environment,
    )
    ended = time.time()
    assert done.returncode != 0
    assert "ProcessLost: process 0 of 2 stops: another one has ended" in done.stderr, done.stderr[-3000:]
    assert "Start the same command again: it goes on from the newest of" in done.stderr
    assert f"exitcode  : {-signal.SIGKILL}" in done.stderr
    last_row = (tmp_path / "run" / "log.jsonl").stat().st_mtime  # of the step at which the process was killed
    assert ended - last_row < 60
    (newest,) = checkpoints(tmp_path / "run" / "checkpoints")
    assert newest.name == "step-00000004"
    again = trainer(tmp_path / "run", Fitting())
    again.run()
    whole = [row for row in runs[1]["alone"]["log"] if "loss" in row]
    same_curve({"log": whole}, {"log": rows(tmp_path / "run")})
    assert [path.name for path in again.checkpoints()] == ["step-00000008.pt", "step-00000012.pt"]


# --- files that are not what they should be -----------------------------------------------------------


def test_a_folder_that_lacks_a_part_is_refused(runs: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(runs[0] / "stopped" / "checkpoints", folder)
    newest = checkpoints(folder)[-1]
    parts = sorted(newest.glob("*.safetensors"))
    assert len(parts) == 2
    parts[0].rename(tmp_path / "aside")
    with pytest.raises(CheckpointError, match="a file of it is missing"):
        trainer(tmp_path, Fitting()).resume()
    parts[0].write_bytes((tmp_path / "aside").read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=r"is damaged .*: remove it, to go on from the one before"):
        trainer(tmp_path, Fitting()).resume()
    (newest / "state.pt").unlink()  # unfinished, as it seems
    again = trainer(tmp_path, Fitting())
    assert again.resume()
    assert again.step == 4


def test_a_folder_runs_no_code(runs: tuple[Path, Any], tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "code-has-run"),)

    folder = tmp_path / "checkpoints"
    shutil.copytree(runs[0] / "stopped" / "checkpoints", folder)
    newest = checkpoints(folder)[-1]
    assert not (newest / ".metadata").exists()
    (newest / ".metadata").write_bytes(pickle.dumps(Evil()))
    assert trainer(tmp_path, Fitting()).resume()
    torch.save({"step": Evil()}, newest / "state.pt")
    with pytest.raises(CheckpointError, match="loading that could run code"):
        trainer(tmp_path, Fitting()).resume()
    assert not (tmp_path / "code-has-run").exists()


def test_a_folder_of_another_model_is_refused(runs: tuple[Path, Any], tmp_path: Path) -> None:
    shutil.copytree(runs[0] / "stopped" / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match=r"does not fit this configuration: missing .*modulation_offset"):
        trainer(tmp_path, Fitting("shared")).resume()
    task = Fitting()
    task.name = "other"
    with pytest.raises(CheckpointError, match="is a checkpoint of 'fitting', this run trains 'other'"):
        trainer(tmp_path, task).resume()


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    for name in ("step-00000002", ".step-00000009.tmp", "step-00000010.old"):
        (tmp_path / name).mkdir()
    for name in ("step-00000003.pt", ".step-00000011.pt.tmp"):
        (tmp_path / name).write_bytes(b"")
    write_tensors(tmp_path / "step-00000002" / "state.pt", {})
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002", "step-00000003.pt"]

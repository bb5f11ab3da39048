"""The command: what it prints, and its exit status."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nextscale.parity.__main__ import main

CASES = Path(__file__).parent / "cases"
NAME = "var_filter"


def run(capsys, *arguments) -> tuple[int, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_a_passing_case(capsys):
    status, text = run(capsys, CASES, "--systems", "var", "--cases", NAME)
    assert status == 0
    assert "[1/1] var_filter  var filter_logits" in text
    assert "ok    probabilities  error" in text and "share" in text
    assert "1 of 1 cases pass" in text


def test_help_needs_no_heavy_package():
    code = "import sys, nextscale.parity.__main__ as m; m._parser().format_help(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_one_altered_value_fails(capsys, changed):
    def alter(meta, arrays):
        arrays["out/probabilities"].reshape(-1)[7] += 1e-3

    status, text = run(capsys, changed(NAME, alter).parent)
    assert status == 1
    assert "FAIL  probabilities" in text and "failed: var_filter" in text


def test_unknown_system(capsys, changed):
    status, text = run(capsys, changed(NAME, lambda meta, arrays: meta.update(system="nosuch")).parent)
    assert status == 1 and "unknown system 'nosuch'" in text


@pytest.mark.parametrize("system", ["replay", "case", "__main__", "..var", "var.x", "os", ""])
def test_no_other_module_is_taken_for_an_adapter(capsys, changed, system):
    status, text = run(capsys, changed(NAME, lambda meta, arrays: meta.update(system=system)).parent)
    assert status == 1 and "unknown system" in text


def test_unknown_operation(capsys, changed):
    status, text = run(capsys, changed(NAME, lambda meta, arrays: meta.update(operation="nosuch")).parent)
    assert status == 1 and "unknown operation 'nosuch'" in text and "filter_logits" in text


def test_unknown_option(capsys, changed):
    status, text = run(capsys, changed(NAME, lambda meta, arrays: meta["options"].update(min_p=0.1)).parent)
    assert status == 1 and "options.min_p" in text
    assert "ok    probabilities" in text  # the outputs are judged all the same


def test_missing_option(capsys, changed):
    status, text = run(capsys, changed(NAME, lambda meta, arrays: meta["options"].pop("seed")).parent)
    assert status == 1 and "options.seed" in text


def test_unknown_output(capsys, changed):
    def add(meta, arrays):
        meta["outputs"]["entropy"] = {"rtol": 0.0, "atol": 1.0}
        arrays["out/entropy"] = np.zeros(1)

    status, text = run(capsys, changed(NAME, add).parent)
    assert status == 1 and "FAIL  entropy" in text


def test_unused_input(capsys, changed):
    def add(meta, arrays):
        arrays["in/noise"] = np.zeros(1)

    status, text = run(capsys, changed(NAME, add).parent)
    assert status == 1 and "inputs.noise" in text


def test_a_damaged_file_does_not_stop_the_others(capsys, tmp_path):
    whole = (CASES / f"{NAME}.npz").read_bytes()
    (tmp_path / "var_aa_broken.npz").write_bytes(whole[: len(whole) // 2])
    shutil.copy(CASES / f"{NAME}.npz", tmp_path)
    for arguments in ((), ("--systems", "var")):
        status, text = run(capsys, tmp_path, *arguments)
        assert status == 1
        assert "[1/2] var_aa_broken" in text and "damaged file" in text
        assert "1 of 2 cases pass" in text and "failed: var_aa_broken" in text


def test_traceback_on_request(capsys, changed):
    folder = changed(NAME, lambda meta, arrays: meta["options"].pop("seed")).parent
    assert "Traceback" not in run(capsys, folder)[1]
    assert "Traceback" in run(capsys, folder, "--traceback")[1]


def test_one_file_may_be_given(capsys):
    assert run(capsys, CASES / f"{NAME}.npz", "--threads", "1")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch-folder"], "no such folder"),
        ([CASES, "--cases", "nosuch*"], "named like 'nosuch*'"),
        ([CASES, "--systems", "nosuch"], "no case of nosuch; systems in it: car, code,"),
        ([CASES, "--systems", "var,nosuch"], "no case of nosuch"),
    ],
)
def test_nothing_to_replay(capsys, arguments, message):
    status, text = run(capsys, *arguments)
    assert status == 2 and message in text


def test_an_empty_folder(capsys, tmp_path):
    status, text = run(capsys, tmp_path)
    assert status == 2 and "no .npz file" in text


@pytest.mark.parametrize("threads", ["0", "-1", "many"])
def test_bad_threads(capsys, threads):
    with pytest.raises(SystemExit) as stop:
        main([str(CASES), "--threads", threads])
    assert stop.value.code == 2

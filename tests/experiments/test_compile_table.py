"""The table of compiled pods, from reports that are there already."""

import json

import pytest

from experiments import compile_table

REPORT = {
  "chips": 128,
  "global_batch": 480,
  "sequence_length": 131072,
  "hbm_bytes_per_device": 96 * 2**30,
  "argument_bytes_per_device": 7 * 2**30,
  "peak_bytes_per_device": 48 * 2**30,
  "model_flops_per_step": 2e19,
  "program_flops_per_step": 3e19,
  "collective_bytes_per_device": {"all-gather": 2e11, "all-reduce": 1e11},
  "compile_seconds": 240.0,
  "processor_seconds": 300.0,
  "host_peak_bytes": 8 * 2**30,
  "step_seconds": 90.0,
  "mfu": 0.25,
}
TARGET = compile_table.Target("sparse", "tpu7x:4x4x8", {})


def test_a_line_tells_what_was_reported():
  assert compile_table.row(TARGET, REPORT) == (
    "sparse",
    "tpu7x:4x4x8, 128 chips",
    "480 x 131072",
    "7.0",
    "48.0 of 96.0",
    "20000",
    "1.50x",
    "300",
    "240 s (300 of processor), 8.0 GiB",
    "90 s, 25%",
  )


def test_what_does_not_fit_is_a_line():
  report = {
    name: REPORT[name]
    for name in (
      *("chips", "global_batch", "sequence_length"),
      "hbm_bytes_per_device",
    )
  }
  cells = compile_table.row(TARGET, report)
  assert cells[4] == "does not fit 96.0"
  assert len(cells) == len(compile_table.row(TARGET, REPORT))


def test_what_was_counted_by_hand_says_so():
  report = {k: v for k, v in REPORT.items() if k != "compile_seconds"}
  report["bytes_by_axis"] = {"expert": 3e12, "context": 1e12}
  cells = compile_table.row(TARGET, report)
  assert cells[6:9] == ("by hand", "4000", "not compiled")


def test_targets_have_names_of_their_own():
  names = [target.name for target in compile_table.TARGETS]
  assert len(set(names)) == len(names)


@pytest.mark.parametrize("target", compile_table.TARGETS, ids=lambda t: t.name)
def test_a_report_that_is_there_is_read(target, tmp_path):
  (tmp_path / f"{target.name}.json").write_text(json.dumps(REPORT))
  compile_table.flags.FLAGS(["compile_table"])
  assert compile_table._report(target, tmp_path) == REPORT

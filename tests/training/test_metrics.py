"""Rows of metrics: same run, same bytes, also when it was cut and resumed."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.training import metrics


def write_steps(folder, steps, resume_step=None):
  with metrics.MetricsWriter(folder, resume_step=resume_step) as writer:
    for step in steps:
      loss = jnp.float32(1.0) / (step + 1)
      writer.write(step, {"loss": loss, "tokens": 128 * step})
      writer.write_timings(step, {"seconds": 0.25})
      if step % 2 == 0:
        writer.write(step, {"loss": loss * 2}, name="eval")


def test_rows_are_json(tmp_path):
  write_steps(tmp_path / "run", range(3))
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  assert json.loads(lines[2]) == {
    "step": 1,
    "name": "train",
    "loss": 0.5,
    "tokens": 128,
  }
  assert lines[1] == '{"step": 0, "name": "eval", "loss": 2.0}'
  assert metrics.read_rows(tmp_path / "run" / "timings.jsonl")[0] == {
    "step": 0,
    "name": "train",
    "seconds": 0.25,
  }
  assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_values_that_json_lacks(tmp_path):
  values = {"a": np.nan, "b": jnp.inf, "c": jnp.float32(-jnp.inf)}
  with metrics.MetricsWriter(tmp_path) as writer:
    writer.write(1, values)
  text = (tmp_path / "metrics.jsonl").read_text()
  assert '"a": "NaN", "b": "Infinity", "c": "-Infinity"' in text
  (row,) = metrics.read_rows(tmp_path / "metrics.jsonl")
  assert math.isnan(row["a"])
  assert (row["b"], row["c"]) == (math.inf, -math.inf)


@pytest.mark.parametrize(
  ("value", "want"),
  [
    (3, 3),
    (0.1, 0.1),
    (np.float32(0.1), 0.1),
    (np.float64(0.1), 0.1),
    (jnp.float32(0.1), 0.1),
    (jnp.bfloat16(0.5), 0.5),
    (np.int32(-7), -7),
    (jnp.ones((1, 1), jnp.uint32), 1),
    (np.bool_(True), 1),
  ],
)
def test_scalars(value, want):
  got = metrics.scalar("value", value)
  assert got == want
  assert type(got) is type(want)


def test_short_form_reads_back_as_the_same_float32():
  bits = np.random.default_rng(0).integers(0, 2**32, 1000, np.uint32)
  for value in bits.view(np.float32):
    if np.isfinite(value):
      assert np.float32(metrics.scalar("value", value)) == value


@pytest.mark.parametrize("value", ["1", None, np.ones(2), 1j, {}])
def test_what_is_no_scalar_is_refused(value, tmp_path):
  with metrics.MetricsWriter(tmp_path) as writer:
    with pytest.raises(ValueError, match=r"loss=.* must be a scalar"):
      writer.write(0, {"loss": value})
    with pytest.raises(ValueError, match="key='step' cannot name a metric"):
      writer.write(0, {"step": 1})


@pytest.mark.parametrize("cut", ["", '{"step": 9', "garbage without end"])
def test_resumed_equals_uninterrupted(tmp_path, cut):
  write_steps(tmp_path / "whole", range(8))
  write_steps(tmp_path / "cut", range(6))
  for name in ("metrics.jsonl", "timings.jsonl"):
    with (tmp_path / "cut" / name).open("a") as file:
      file.write(cut)
  write_steps(tmp_path / "cut", range(4, 8), resume_step=3)
  for name in ("metrics.jsonl", "timings.jsonl"):
    got = (tmp_path / "cut" / name).read_bytes()
    assert got == (tmp_path / "whole" / name).read_bytes()


def test_a_new_run_starts_anew(tmp_path):
  write_steps(tmp_path, range(5))
  write_steps(tmp_path, range(2))
  rows = metrics.read_rows(tmp_path / "metrics.jsonl")
  assert [row["step"] for row in rows] == [0, 0, 1]


@pytest.mark.parametrize("line", ["no json", "[1]", '{"loss": 1}', "{}"])
def test_a_foreign_file_is_named(tmp_path, line):
  write_steps(tmp_path, range(2))
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write(line + "\n")
  with pytest.raises(ValueError, match=r"metrics\.jsonl:4 is not a row"):
    write_steps(tmp_path, range(9, 10), resume_step=8)


def test_progress_bar_counts(capsys):
  with metrics.progress(5, initial=2, title="dense") as bar:
    for _ in range(3):
      bar.update(1)
  assert bar.n == 5
  assert "dense: 100%" in capsys.readouterr().err

"""The benchmark's bookkeeping; its timing needs a machine of its own."""

import json

import pytest

from experiments import benchmark
from experiments import benchmark_table
from experiments import stopwatch


def results():
  """Made-up results of every row, all of a minute but a decoded token."""
  for row in benchmark.rows(2):
    found = dict(
      row,
      versions={"jax": "1.2"},
      date="2000-01-01",
      cpu="abacus",
      other_cpus=0.0,
      peak_rss_bytes=3e9,
    )
    if row["job"] == "parity":
      found |= dict(error=2e-6, rows=100, rows_that_differ=3)
    elif row["job"] == "parts":
      found["milliseconds"] = {"attention_gathered": 2.0 * row["length"]}
    else:
      is_peer = row["side"] == "transformers"
      found["seconds"] = 4.0 if is_peer else 0.5
    yield found


def test_rows_are_not_repeated_and_parity_is_first():
  rows = [json.dumps(row) for row in benchmark.rows(2)]
  assert len(set(rows)) == len(rows)
  assert json.loads(rows[0])["job"] == "parity"


def test_table_of_all_results():
  text = benchmark_table.table(list(results()))
  lines = text.splitlines()
  assert "| faster than transformers | 8.0x | 8.0x | 8.0x | 8.0x | 8.0x |" in (
    lines
  )
  assert "| ours, sparse | 2048 | 4096 | 8192 | 16384 | 32768 |" in lines
  assert "| ours, sparse | 500.0 | 500.0 |" in lines
  assert "2000 us at 4096" in text
  assert "3.0 GB" in text
  assert "3 of 100 selections" in text
  assert "busy meanwhile" not in text


def test_the_last_result_of_a_row_counts_and_skipped_rows_say_so():
  rows = list(results())
  last = next(row for row in reversed(rows) if row["side"] == "transformers")
  rows.append(last | {"other_cpus": 1.5})
  peer = next(
    row
    for row in rows
    if row["job"] == "prefill"
    and row["length"] == 16384
    and row["side"] == "transformers"
  )
  skipped = {k: v for k, v in peer.items() if k != "seconds"}
  rows.append(skipped | {"skipped": "needs 27 GB, 9 are free"})
  text = benchmark_table.table(rows)
  assert text.count("does not fit") == 1
  assert "Other programs kept up to 1.5 CPUs busy" in text


def test_times_without_parity_are_not_shown():
  rows = [row for row in results() if row["job"] != "parity"]
  with pytest.raises(ValueError, match="parity"):
    benchmark_table.table(rows)


def test_writes_between_the_markers_only(tmp_path):
  recorded, readme = tmp_path / "benchmark.jsonl", tmp_path / "README.md"
  recorded.write_text("".join(json.dumps(row) + "\n" for row in results()))
  markers = f"{benchmark_table.BEGIN}\nold\n{benchmark_table.END}"
  readme.write_text(f"before\n{markers}\nafter\n")
  for _ in range(2):
    benchmark_table.write(recorded, readme)
  text = readme.read_text()
  assert text.startswith(f"before\n{benchmark_table.BEGIN}\n65M parameters")
  assert text.endswith(f"{benchmark_table.END}\nafter\n")
  assert "old" not in text
  readme.write_text("no markers")
  with pytest.raises(ValueError, match="needs one"):
    benchmark_table.write(recorded, readme)


def test_stopwatch_counts_runs_and_memory():
  calls = []
  found = stopwatch.measure(lambda: calls.append(0), runs=3)
  assert len(calls) == 4
  assert len(found["runs"]) == 3
  assert 0 <= found["seconds"] < 1
  assert found["other_cpus"] >= 0
  assert found["peak_rss_bytes"] > 10e6
  found = stopwatch.measure(lambda: None, runs=3, budget=0.0)
  assert len(found["runs"]) == 1

"""The kernels' page: ratios of schedules by hand, its tables, its plot."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import kernels_page
from experiments import kernels_ratios
from pallas_kernels import budget
from pallas_kernels.sparse_mla import tpu_segments


def schedule_row(op, case, kernel, loops, **changes):
  row = {
    "mode": "schedule_row",
    "op": op,
    "case": case,
    "dtype": "bfloat16",
    "topology": "v5p:2x2x1",
    "kernel": kernel,
    "bundles": loops[0][1],
    "loops": loops,
    "temp_bytes": None,
  }
  return row | changes


# A step of 10000 bundles and a loop of 784 that runs once a table.
GATHERED = schedule_row(
  "sparse_mla",
  "prefill_32k",
  "sparse_mla.1",
  [[0, 10784, None, None, 6], [1, 784, 256, 0, 0]],
)
MASKED = schedule_row(
  "masked_attention",
  "prefill_128k",
  "masked_attention_forward.1",
  [[0, 24576, None, 0, 6]],
)
SELECTION = schedule_row(
  "index_select",
  "prefill_32k",
  "index_select.1",
  [
    [0, 9000, None, None, 6],
    [1, 35, None, 0, 0],
    [1, 4100, None, 4096, 0],
    [1, 228, None, None, 0],
    [2, 100, None, 0, 0],
    [1, 200, None, 0, 0],
    [1, 150, None, 0, 0],
  ],
)
DECODE = schedule_row(
  "decode_scores",
  "decode_32k",
  "decode_scores.1",
  [[0, 1000, None, None, 5], [1, 40, None, 0, 1], [1, 10, None, 0, 0]],
  dtype="float8_e4m3fn",
)
TIMING = {
  "mode": "bench",
  "device": "cpu",
  "operation": "sparse_mla",
  "case": "prefill",
  "sizes": {"queries": 8},
  "dtype": "float32",
  "direction": "forward",
  "implementation": "xla",
  "seconds": 0.002,
  "floor_seconds": 0.001,
  "share_of_floor": 0.5,
}


def test_a_query_of_a_gathered_kernel():
  found = kernels_ratios.measure(GATHERED)
  # Two queries a step; 128 heads times 2048 keys, by 4 matrix units of 128.
  assert found.bundles == 5000
  assert found.plain == 128 * 2048 * (576 + 512) / (4 * 128 * 128)
  assert found.minimum == 128 * 2048 * (640 + 512) / (4 * 128 * 128)
  assert found.ratio == 5000 / 4608
  of_v6e = GATHERED | {"topology": "v6e:2x2"}
  assert kernels_ratios.measure(of_v6e).minimum == 1280
  assert kernels_ratios.target(of_v6e) == 3.0
  assert kernels_ratios.target(GATHERED | {"case": "heads_16"}) is None
  assert kernels_ratios.target(GATHERED | {"case": "decode_32k"}) is None


def test_a_tile_of_masked_attention_is_one_of_its_two_forms():
  found = kernels_ratios.measure(MASKED)
  assert found.bundles == 12288
  assert found.minimum == 4 * 256 * 1024 * (256 + 128) / (4 * 128 * 128)
  assert found.ratio == 2.0
  assert kernels_ratios.measure(MASKED | {"dtype": "float32"}) is None
  backward = MASKED | {"kernel": "masked_attention_backward.1"}
  padded = 256 + 128 + 256 + 256 + 128
  found = kernels_ratios.measure(backward)
  assert found.minimum == 256 * 1024 * padded / 65536
  # A head clears 8192 queries' gradients of two registers for each eight.
  assert found.bundles == (24576 - 2048) / 2


def test_a_block_of_selection_with_the_longest_search():
  found = kernels_ratios.measure(SELECTION)
  assert found.minimum == 4100
  # 100 bundles count 1024 rows, a block has 256, a query 128 blocks.
  search = 43 * (100 / 4 + 128 / 128)
  np.testing.assert_allclose(found.bundles, 4100 + search + 200)


def test_list_slots_of_segments_are_those_that_lists_are_cut_into():
  keys, segments, top_k, queries = 3000, 3, 512, 128
  rng = np.random.default_rng(1)
  lists = np.full((queries, top_k), -1, np.int32)
  places = (np.arange(queries) + 0.5) * keys / queries
  for row, place in zip(lists, places):
    chosen = rng.permutation(int(place) + 1)[:top_k]
    row[: len(chosen)] = np.sort(chosen)
  cut = tpu_segments.cut_lists(
    jnp.asarray(lists), segments, keys // segments, 3, 1024, True
  )
  item, _ = tpu_segments.list_shape(top_k, segments, 1024)
  slots = item * int(jnp.sum(cut.used_TM))
  want = slots / np.sum(lists >= 0)
  got = kernels_ratios._waste(keys, keys // segments, item, top_k)
  np.testing.assert_allclose(got, want, rtol=0.02)


def test_a_row_tells_all_loops_of_a_kernel():
  loop = {
    "depth": 0,
    "bundles": 40,
    "trips": None,
    "step": 52,
    "mxu_least": 13,
    "dma": 3,
    "shares": dict.fromkeys(
      ("MXU", "VALU", "VLOAD", "VSTORE", "VSTORE:SPILL"), 0.5
    ),
  }
  inner = loop | {"depth": 1, "bundles": 6, "trips": 3, "step": 6, "dma": 0}
  result = {
    "platform": "tpu:v6e:2x2",
    "operation": "sparse_mla",
    "case": "prefill_32k",
    "dtype": "bfloat16",
    "direction": "forward",
    "alone": True,
    "temp_bytes": 7,
    "kernels": [{"name": "made_up.1", "loops": [loop, inner]}],
  }
  (row,) = budget.rows(result)
  assert (row["topology"], row["bundles"], row["ratio"]) == ("v6e:2x2", 52, 4)
  assert (row["dma"], row["temp_bytes"]) == (3, None)
  assert row["loops"] == [[0, 40, None, 13, 3], [1, 6, 3, 13, 0]]
  (row,) = budget.rows(result | {"alone": False})
  assert row["temp_bytes"] == 7


def test_rows_of_one_kind_are_replaced():
  whole = {
    "mode": "schedule",
    "platform": "tpu:v5p:2x2x1",
    "operation": "sparse_mla",
    "case": "prefill_32k",
    "dtype": "bfloat16",
    "alone": False,
    "temp_bytes": 2 * 10**9,
  }
  later = GATHERED | {"bundles": 1}
  rows = kernels_page.merge(
    [GATHERED, MASKED], [later, whole, whole | {"alone": True}]
  )
  assert len(rows) == 3
  assert later in rows and MASKED in rows and GATHERED not in rows
  (memory,) = (row for row in rows if row["mode"] == "memory")
  assert kernels_page.merge([], rows) == rows
  assert "| sparse_mla, prefill_32k, bfloat16 | 2.00 |" in kernels_page.page(
    [memory]
  )
  # Kernels compiled with the rest are not those of the budget.
  assert kernels_page.merge([], [GATHERED | {"temp_bytes": 5}]) == []


def test_the_page_says_what_is_over_its_target(tmp_path):
  other = GATHERED | {"topology": "tpu7x:2x2x1"}
  rows = [GATHERED, other, MASKED, SELECTION, DECODE, TIMING]
  results = tmp_path / "kernels.jsonl"
  results.write_text("".join(json.dumps(row) + "\n" for row in rows))
  docs = tmp_path / "docs"
  kernels_page.write(docs, [results])
  text = (docs / kernels_page.PAGE).read_text()
  assert "| sparse_mla, 32K keys | 1.09 of 1.3 | **3.91** of 3 |" in text
  assert "| masked_attention_forward, 128K keys | **2.00** of 1.8 | - |" in text
  assert "4 in a step of 950 bundles; in loops 40 bundles for 1" in text
  assert "| cpu | sizes |" in text
  assert (docs / kernels_page.PLOT).read_bytes().startswith(b"\x89PNG")
  # The page comes from the rows that are kept, without results.
  (docs / kernels_page.PAGE).unlink()
  kernels_page.write(docs, [])
  assert (docs / kernels_page.PAGE).read_text() == text


@pytest.mark.parametrize(
  "text, words", [(None, "No such file"), ("{", "not JSON"), ("", "no rows")]
)
def test_a_mistake_takes_one_line(tmp_path, text, words):
  results = tmp_path / "results.jsonl"
  if text is not None:
    results.write_text(text)
  done = subprocess.run(
    [sys.executable, "-m", "experiments.kernels_page", tmp_path, results],
    check=False,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ") and words in line

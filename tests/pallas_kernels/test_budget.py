"""Budgets of kernels: what they hold, what exceeds them, what needs one."""

import pathlib

import pytest

from pallas_kernels import budget
from pallas_kernels import cases
from pallas_kernels import checking
from pallas_kernels import problems

ROOT = pathlib.Path(__file__).resolve().parents[2]


def scheduled(tile, **changes):
  row = {
    "platform": "tpu:v5p:2x2x1",
    "operation": "sparse_mla",
    "case": "prefill",
    "dtype": "bfloat16",
    "direction": "forward",
    "temp_bytes": 2**21,
    "kernels": [{"name": "forward.1", "tile": tile, "loops": []}],
  }
  return row | changes


def test_budgets_allow_two_percent(tmp_path):
  path = tmp_path / "budget.json"
  budget.write(path, [scheduled(1000), scheduled(50, case="decode")])
  budget.write(path, [scheduled(70, case="decode")])
  kept = budget.read(path)
  assert kept["tpu:v5p:2x2x1/sparse_mla/prefill/bfloat16/forward"] == {
    "forward.1": 1000
  }
  assert budget.exceeded(kept, [scheduled(1020)]) == []
  (line,) = budget.exceeded(kept, [scheduled(1021)])
  assert "forward.1: 1021 bundles, more than 1000" in line
  (line,) = budget.exceeded(kept, [scheduled(1, dtype="float32")])
  assert "no budget" in line
  (line,) = budget.exceeded(kept, [scheduled(9, kernels=[])])
  assert "forward.1: a budget, but not compiled" in line
  refused = {k: v for k, v in scheduled(9).items() if k != "kernels"}
  (line,) = budget.exceeded(kept, [refused | {"skipped": "too odd"}])
  assert "not compiled" in line
  path.write_text("{")
  with pytest.raises(ValueError, match="not JSON"):
    budget.read(path)


def machine_code(**changes):
  kernel = {
    "name": "kernel_0",
    "tile": 100,
    "registers": 168,
    "highest_register": 200,
    "shared_bytes": 9000,
    "spill_bytes": 0,
    "spill_instructions": 0,
    "warnings": [],
    "opcodes": {"HGMMA": 20, "UTMALDG": 8, "FADD": 300},
  }
  return scheduled(0, platform="gpu:h200", kernels=[kernel | changes])


GROWN = (
  ({"tile": 103}, "103 instructions, more than 100"),
  ({"highest_register": 201}, "201 registers, more than 200"),
  ({"shared_bytes": 9001}, "9001 shared_bytes, more than 9000"),
  ({"spill_bytes": 8}, "8 spill_bytes"),
  ({"spill_instructions": 2}, "2 spill_instructions"),
  ({"warnings": ["C7511: serialized"]}, "C7511: serialized"),
  ({"opcodes": {"HGMMA": 20}}, "0 UTMALDG, not 8"),
  (
    {"opcodes": {"HGMMA": 20, "UTMALDG": 8, "QGMMA": 1}},
    "1 QGMMA, not 0",
  ),
)


def test_budgets_of_machine_code(tmp_path):
  path = tmp_path / "budget.json"
  budget.write(path, [machine_code()])
  kept = budget.read(path)
  assert kept["gpu:h200/sparse_mla/prefill/bfloat16/forward"] == {
    "kernel_0": {
      "instructions": 100,
      "registers": 200,
      "shared_bytes": 9000,
      "opcodes": {"HGMMA": 20, "UTMALDG": 8},
    }
  }
  fewer = {"HGMMA": 20, "UTMALDG": 8, "FADD": 500}
  fits = machine_code(tile=102, highest_register=9, opcodes=fewer)
  assert budget.exceeded(kept, [fits]) == []
  for changes, words in GROWN:
    (line,) = budget.exceeded(kept, [machine_code(**changes)])
    assert line.endswith(f"kernel_0: {words}")
  allowed = [machine_code(tile=103), machine_code(opcodes={})]
  assert budget.faults(allowed) == []
  (line,) = budget.faults([machine_code(warnings=["C7511: serialized"])])
  assert line.endswith("bfloat16/forward kernel_0: C7511: serialized")
  spilling = budget.exceeded({}, [machine_code(spill_bytes=8)])
  assert [line.split(", ")[-1] for line in spilling[:1]] == ["no budget"]
  assert len(spilling) == 2


def test_a_schedule_is_told_in_lines():
  shares = {"MXU": 0.25, "VALU": 0.5}
  outer = {
    "depth": 0,
    "bundles": 21,
    "trips": 6,
    "step": 45,
    "mxu_least": 16,
    "shares": shares,
  }
  inner = outer | {
    "depth": 1,
    "bundles": 17,
    "trips": None,
    "step": None,
    "mxu_least": None,
  }
  kernel = {
    "name": "made_up.1",
    "tile": 45,
    "loops": [outer, inner | {"bundles": 9}, inner],
  }
  found = scheduled(
    45, kernels=[kernel], executed=300, mxu_minimum=75, mxu_minimum_padded=96
  )
  assert budget.table(found).splitlines() == [
    "tpu:v5p:2x2x1/sparse_mla/prefill/bfloat16/forward: 2 MiB temporary, 300"
    " bundles in all, 25% (32% padded) of them the least of its products",
    "  made_up.1: 45 bundles a tile",
    "    21 bundles x 6, 45 a step, products 16 (36%): MXU 25%, VALU 50%",
    "      17 bundles: MXU 25%, VALU 50%",
  ]
  skipped = {k: v for k, v in found.items() if k != "kernels"}
  assert "skipped, too odd" in budget.table(skipped | {"skipped": "too odd"})
  kernel = {
    "name": "kernel_0",
    "tile": 60,
    "registers": 168,
    "spill_bytes": 8,
    "shared_bytes": 9,
    "warnings": ["C7511"],
    "loops": [{"instructions": 60, "opcodes": {"FADD": 40, "HGMMA": 20}}],
  }
  lines = budget.table(scheduled(1, kernels=[kernel])).splitlines()
  assert lines[1:] == [
    "  kernel_0: 60 instructions a tile, 168 registers, 8 B spilled,"
    " 9 B shared; C7511",
    "    60 instructions: HGMMA 20, FADD 40",
  ]


def test_a_plan_is_what_has_a_kernel():
  table = cases.BENCHMARKS["long"]
  rows = list(budget.plan(table, "tpu:v5p:2x2x1", alone=True))
  assert {row["operation"] for row in rows} >= {
    "decode_scores",
    "index_select",
    "indexer_kl",
    "masked_attention",
    "sparse_mla",
  }
  for row in rows:
    trained = bool(problems.TRAINED[row["operation"]])
    assert (row["direction"] == "forward_backward") == trained
  whole = list(budget.plan(table, "tpu:v5p:2x2x1", alone=False))
  assert len(whole) == len(rows)
  assert not any(row["alone"] for row in whole)
  on_gpu = list(budget.plan(table, "gpu:h200", alone=True))
  assert on_gpu and not any(row["alone"] for row in on_gpu)


def committed_budget():
  return budget.read(ROOT / "pallas_kernels" / "budgets.json")


@pytest.mark.parametrize(
  ("platform", "shapes"),
  [("tpu:v5p:2x2x1", "long"), ("tpu:v6e:2x2", "long"), ("gpu:h200", "real")],
)
def test_there_is_a_budget_for_what_is_compiled(platform, shapes):
  rows = budget.plan(cases.BENCHMARKS[shapes], platform, alone=True)
  kept = committed_budget()
  table = {(c.operation, c.name): c for c in cases.BENCHMARKS[shapes]}
  for row in rows:
    case = table[row["operation"], row["case"]]
    if checking.refusal(case, row["dtype"], row["implementation"]) is None:
      assert budget.key(row) in kept

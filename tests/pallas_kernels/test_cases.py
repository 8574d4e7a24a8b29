"""The shared case table: problems are sound, and a wrong result is noticed."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cases
from pallas_kernels import checking
from pallas_kernels import problems

ALL = (
  *cases.CHECKS,
  *(c for table in cases.BENCHMARKS.values() for c in table),
)


def case_id(case):
  return f"{case.operation}-{case.name}"


def small(operation, name):
  return next(
    c for c in cases.CHECKS if (c.operation, c.name) == (operation, name)
  )


def test_names_are_unique_and_every_type_has_a_tolerance():
  for table in (cases.CHECKS, *cases.BENCHMARKS.values()):
    names = [case_id(case) for case in table]
    assert len(names) == len(set(names))
    # Tokens of the experts have no context to be long.
    absent = {"expert_ffn"} if table is cases.BENCHMARKS["long"] else set()
    operations = {case.operation for case in table}
    assert operations == set(cases.OPERATIONS) - absent
  for case in ALL:
    for dtype in case.dtypes:
      tolerance = cases.TOLERANCES[case.operation, dtype]
      assert 0 <= tolerance.measured < tolerance.bound
  with pytest.raises(ValueError, match="nonsense"):
    cases.Case(operation="nonsense", name="x", queries=1)


@pytest.mark.parametrize("case", cases.CHECKS, ids=case_id)
def test_drawn_arrays_are_what_the_operation_is_defined_for(case):
  dtype = case.dtypes[-1]
  arrays = problems.draw(case, dtype, 3)
  avals = problems.shapes(case, dtype)
  assert list(arrays) == list(avals)
  for name, array in arrays.items():
    assert (array.shape, array.dtype) == (avals[name].shape, avals[name].dtype)
  again = problems.draw(case, dtype, 3)
  other = problems.draw(case, dtype, 4)
  first = next(iter(arrays))
  assert np.array_equal(arrays[first], again[first])
  assert not np.array_equal(arrays[first], other[first])
  if "mask" in arrays:
    octets = np.asarray(arrays["mask"]).view(np.uint8)
    bits_BTS = np.unpackbits(octets, axis=-1, bitorder="little")
    assert not bits_BTS[..., case.keys :].any()
    share = bits_BTS[..., : case.keys].mean()
    assert 0.5 < share * 2**case.sparsity < 1.5
  if "slots" in arrays:
    assert np.min(arrays["slots"]) >= -1
    assert np.max(arrays["slots"]) == case.keys - 1
  if "table" in arrays:
    pages = np.sort(np.asarray(arrays["table"]), axis=None)
    assert np.array_equal(pages, np.arange(len(arrays["page"])))
    assert np.max(arrays["lengths"]) == case.keys
  if "indices" in arrays:
    listed_BTN = np.asarray(arrays["indices"])
    assert listed_BTN.min() >= -1
    assert listed_BTN.max() < case.keys
    for row_N in listed_BTN.reshape(-1, case.top_k):
      kept = row_N[row_N >= 0]
      assert len(kept) == len(set(kept))


def test_fronts_say_what_they_offer():
  for operation in cases.OPERATIONS:
    assert checking.implementations(operation, "cpu")[0] == "xla"
    assert not checking.offers(operation, "nonsense")
  assert "ragged" in checking.implementations("expert_ffn", "gpu")


def test_a_refused_problem_is_skipped_with_the_reason():
  case = dataclasses.replace(small("masked_attention", "causal"), key_heads=3)
  assert "key_heads" in checking.refusal(case, "float32", "xla")
  assert checking.refusal(small("sparse_mla", "odd"), "float32", "xla") is None
  case = small("expert_ffn", "one_token")
  (found,) = checking.check(case, "float32", ["nonsense"])
  assert "nonsense" in found["skipped"]
  assert "passed" not in found


def test_what_does_not_run_fails_with_the_reason(monkeypatch):
  def outputs(case, implementation, arrays):
    if implementation == "xla":
      raise TypeError("no such product\nand more")
    return {"out": arrays["x"]}

  monkeypatch.setattr(checking, "outputs", outputs)
  monkeypatch.setattr(checking, "refusal", lambda *arguments: None)
  case = small("expert_ffn", "one_token")
  broken, right = checking.check(case, "float32", ["xla", "ragged"])
  assert broken["failed"] == "TypeError: no such product"
  assert not broken["passed"]
  assert right["passed"]


CHECKED = (
  ("index_select", "fewer_than_k", "float8_e4m3fn"),
  ("masked_attention", "causal", "bfloat16"),
  ("sparse_mla", "causal", "float32"),
  ("indexer_kl_gathered", "odd", "float32"),
  ("expert_ffn", "uneven", "bfloat16"),
  ("decode_scores", "odd", "float8_e4m3fn"),
)


@pytest.mark.parametrize("operation, name, dtype", CHECKED)
def test_xla_passes_within_its_recorded_error(operation, name, dtype):
  (found,) = checking.check(small(operation, name), dtype, ["xla"])
  assert found["passed"], found
  tolerance = cases.TOLERANCES[operation, dtype]
  # Recorded at another level of optimisation.
  assert found["error"] <= 4 * tolerance.measured + 1e-9, found


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.CHECKS, ids=case_id)
def test_all_implementations_pass(case):
  names = checking.implementations(case.operation, "cpu")
  for dtype in case.dtypes:
    for found in checking.check(case, dtype, names, seed=1):
      assert "skipped" in found or found["passed"], found


def test_errors_are_relative_to_the_largest_value():
  want = np.array([1.0, -4.0, -np.inf])
  assert checking.error_of(np.array([1.0, -4.2, -np.inf]), want) == (
    pytest.approx(0.05)
  )
  assert checking.error_of(want, want) == 0.0
  for wrong in ([1.0, -4.0, np.inf], [1.0, np.nan, -np.inf], [1.0, -4.0, 0.0]):
    assert checking.error_of(np.array(wrong), want) == np.inf
  assert checking.error_of(np.zeros(3), np.zeros(3)) == 0.0
  assert checking.error_of(np.ones(3), np.zeros(3)) == np.inf


def test_selections_may_differ_near_the_threshold_only():
  score_BTS = np.array([[[8.0, 4.0, 3.0, 1.0]]])
  want_BTS = np.array([[[True, True, False, False]]])
  near_BTS = np.array([[[True, False, True, False]]])
  far_BTS = np.array([[[False, True, True, False]]])
  more_BTS = np.array([[[True, True, True, False]]])
  assert checking.selection_error(want_BTS, want_BTS, score_BTS) == 0.0
  assert checking.selection_error(near_BTS, want_BTS, score_BTS) == 1 / 8
  assert checking.selection_error(far_BTS, want_BTS, score_BTS) == 4 / 8
  assert checking.selection_error(more_BTS, want_BTS, score_BTS) == np.inf


def test_a_wrong_output_is_named():
  case = small("masked_attention", "causal")
  arrays = problems.draw(case, "float32")
  want = {"out": np.ones(3), "lse": np.ones(3)}
  got = {"out": np.ones(3), "lse": np.array([1.0, 1.0, 2.0])}
  assert checking.compare(case, arrays, got, want) == {"out": 0.0, "lse": 1.0}


def test_a_wrong_selection_is_noticed():
  case = small("index_select", "fewer_than_k")
  arrays = problems.draw(case, "float32")
  shape = (case.batch, case.queries)
  # Keys 3 and 5 for every query, whatever they score.
  indices_BTN = np.full((*shape, case.top_k), -1, np.int32)
  indices_BTN[..., :2] = (5, 3)
  want = {
    "mask_BTW": jnp.full((*shape, 1), 1 << 3 | 1 << 5, jnp.uint32),
    "indices_BTN": jnp.asarray(indices_BTN),
    "lse_all_BT": np.ones(shape),
    "lse_selected_BT": np.ones(shape),
    "invalid_BT": np.zeros(shape, bool),
  }
  errors = checking.compare(case, arrays, want, want)
  assert set(errors.values()) == {0.0}
  indices_BTN[0, 0, 0] = -1
  got = want | {
    "indices_BTN": jnp.asarray(indices_BTN),
    "invalid_BT": np.ones(shape, bool),
    "lse_all_BT": 1.5 * np.ones(shape),
  }
  errors = checking.compare(case, arrays, got, want)
  assert errors == {
    "indices_BTN": np.inf,
    "invalid_BT": np.inf,
    "lse_all_BT": 0.5,
    "lse_selected_BT": 0.0,
    "mask_BTW": 0.0,
  }

"""Compares an implementation with "ref" on one problem of the shared table.

An error is the largest difference over the largest value of the reference, the
worst over all outputs and gradients; infinity where only one of the two is
finite. A selection may differ from the reference's only in keys whose scores
lie so close to the row's threshold that rounding can swap them: its error is
their distance from it, over the largest score.
"""
# B batch, T queries, S keys, N selected keys

from collections.abc import Iterator, Sequence
import functools
import pathlib
import traceback

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import bitmask
from pallas_kernels import cases
from pallas_kernels import problems
from pallas_kernels.index_select import index_scores

_HERE = pathlib.Path(__file__).resolve().parent
# Which implementations may run where, the default one first. A front offers
# some of them.
BY_BACKEND = {
  "cpu": ("xla", "ragged", "tpu_interpret", "gpu_interpret"),
  "gpu": ("xla", "ragged", "gpu"),
  "tpu": ("xla", "ragged", "tpu"),
}


def offers(operation: str, implementation: str) -> bool:
  """Tells whether an operation's front knows an implementation's name."""
  case = next(case for case in cases.CHECKS if case.operation == operation)
  reason = refusal(case, case.dtypes[0], implementation)
  return reason is None or f"{implementation=}" not in reason


def refusal(case: cases.Case, dtype: str, implementation: str) -> str | None:
  """Returns what an operation says against a problem; None if it takes it.

  Such is a ValueError that this package raises. All others propagate.
  """
  run = functools.partial(outputs, case, implementation)
  try:
    jax.eval_shape(run, problems.shapes(case, dtype))
  except ValueError as error:
    frames = traceback.extract_tb(error.__traceback__)
    if not pathlib.Path(frames[-1].filename).is_relative_to(_HERE):
      raise
    return str(error).splitlines()[0]
  return None


def describe(error: Exception) -> str:
  """Returns the type and the first line of an error."""
  lines = str(error).splitlines() or [""]
  return f"{type(error).__name__}: {lines[0]}"


def implementations(operation: str, backend: str) -> list[str]:
  """Lists what the front of an operation offers on "cpu", "gpu" or "tpu"."""
  return [name for name in BY_BACKEND[backend] if offers(operation, name)]


def check(
  case: cases.Case, dtype: str, names: Sequence[str], seed: int = 0
) -> Iterator[dict]:
  """Runs one case by each named implementation, forward and backward.

  Yields:
    What identifies the run, and `error`, `bound`, `passed`, and `worst`, the
    name of the output that is farthest off. If an implementation does not take
    the problem, `skipped` says why instead; if it does not compile or run,
    `failed` does.
  """
  arrays = problems.draw(case, dtype, seed)
  exact = {
    name: x.astype(jnp.float32)
    if jnp.issubdtype(x.dtype, jnp.floating) and name != "page"
    else x
    for name, x in arrays.items()
  }
  want = jax.jit(functools.partial(outputs, case, "ref"))(exact)
  bound = cases.TOLERANCES[case.operation, dtype].bound
  for name in names:
    found = {
      "operation": case.operation,
      "case": case.name,
      "dtype": dtype,
      "implementation": name,
      "seed": seed,
    }
    reason = refusal(case, dtype, name)
    if reason is not None:
      yield found | {"skipped": reason}
      continue
    try:
      got = jax.jit(functools.partial(outputs, case, name))(arrays)
      jax.block_until_ready(got)
    # Whatever a compiler or a device raises is a result like others.
    except Exception as error:
      yield found | {"failed": describe(error), "passed": False}
      continue
    errors = compare(case, exact, got, want)
    worst = max(errors, key=errors.get)
    yield found | {
      "error": errors[worst],
      "worst": worst,
      "bound": bound,
      "passed": bool(errors[worst] <= bound),
    }


def outputs(case: cases.Case, implementation: str, arrays: dict) -> dict:
  """Returns all outputs of a problem, gradients included where there are any.

  The cotangent of an output is a fixed pattern of values up to one; that of a
  loss is one.
  """
  run = functools.partial(problems.call, case, implementation)
  if not problems.TRAINED[case.operation]:
    return run(arrays)
  shape = jax.eval_shape(run, arrays)[
    problems.DIFFERENTIABLE[case.operation]
  ].shape
  size = int(np.prod(shape))
  pattern = jnp.cos(jnp.arange(size, dtype=jnp.float32) % 97.0)
  # Exact in bfloat16, so that both sides get the same.
  pattern = jnp.round(64.0 * pattern) / 64.0
  return problems.call_with_gradient(
    case, implementation, arrays, pattern.reshape(shape)
  )


def compare(case: cases.Case, arrays, got, want) -> dict[str, float]:
  """Returns the error of each output of a problem by its name.

  Args:
    case: the problem.
    arrays: its inputs in float32, from which scores are taken.
    got: outputs of the implementation.
    want: outputs of the reference.
  """
  if case.operation != "index_select":
    return {name: error_of(got[name], want[name]) for name in want}
  score_BTS = jax.jit(index_scores)(
    *(arrays[name] for name in problems.INDEX), arrays.get("key_scale")
  )
  errors = {
    name: error_of(got[name], want[name])
    for name in ("lse_all_BT", "lse_selected_BT")
  }
  same = np.array_equal(got["invalid_BT"], want["invalid_BT"])
  errors["invalid_BT"] = 0.0 if same else np.inf
  masks = [
    np.asarray(bitmask.unpack(x["mask_BTW"], case.keys)) for x in (got, want)
  ]
  errors["mask_BTW"] = selection_error(*masks, np.asarray(score_BTS))
  listed_BTW = bitmask.from_indices(got["indices_BTN"], case.keys)
  listed_BTS = np.asarray(bitmask.unpack(listed_BTW, case.keys))
  counts_BT = np.sum(np.asarray(got["indices_BTN"]) >= 0, axis=-1)
  same = np.array_equal(listed_BTS, masks[0]) and np.array_equal(
    counts_BT, masks[0].sum(-1)
  )
  errors["indices_BTN"] = 0.0 if same else np.inf
  return errors


def error_of(got, want) -> float:
  """Returns max |got - want| / max |want|; equal infinities do not differ."""
  got, want = (np.asarray(x).astype(np.float64) for x in (got, want))
  finite = np.isfinite(want)
  if got.shape != want.shape or not np.array_equal(finite, np.isfinite(got)):
    return np.inf
  if not np.array_equal(got[~finite], want[~finite], equal_nan=True):
    return np.inf
  difference = np.abs(got[finite] - want[finite])
  largest = np.max(np.abs(want[finite]), initial=0.0)
  worst = np.max(difference, initial=0.0)
  return float(worst / largest) if largest else float(np.inf if worst else 0.0)


def selection_error(got_BTS, want_BTS, score_BTS) -> float:
  """Returns how far from a row's threshold the keys lie that differ."""
  if not np.array_equal(got_BTS.sum(-1), want_BTS.sum(-1)):
    return np.inf
  differ_BTS = got_BTS != want_BTS
  if not differ_BTS.any():
    return 0.0
  threshold_BT = np.min(np.where(want_BTS, score_BTS, np.inf), axis=-1)
  distance_BTS = np.abs(score_BTS - threshold_BT[..., None])
  largest = np.max(np.abs(score_BTS[np.isfinite(score_BTS)]))
  return float(np.max(distance_BTS[differ_BTS]) / largest)

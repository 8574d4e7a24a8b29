"""Values of the KL's kernels for Hopper, in an interpreter."""

import dataclasses
import functools

import pytest

from pallas_kernels import cases
from pallas_kernels import checking
from pallas_kernels import indexer_kl
from pallas_kernels import problems
from pallas_kernels.indexer_kl import gathered_gpu
from pallas_kernels.indexer_kl import masked_gpu
from tests.support.mosaic_gpu import interpreted
from tests.support.mosaic_gpu import interpreter

MASKED = [c for c in cases.CHECKS if c.operation == "indexer_kl"]
CASES = [c for c in cases.CHECKS if c.operation == "indexer_kl_gathered"]
# Two blocks of heads, lists that fill the ring more than once.
MANY = cases.Case(
  operation="indexer_kl_gathered",
  name="many",
  batch=2,
  queries=2,
  keys=600,
  heads=65,
  latent=64,
  rope=64,
  index_heads=3,
  index_width=128,
  top_k=520,
)


@pytest.fixture
def in_interpreter(monkeypatch):
  evaluate = functools.partial(gathered_gpu.evaluate, interpret=interpreter())
  monkeypatch.setitem(indexer_kl._GATHERED, "gpu", evaluate)
  evaluate = functools.partial(masked_gpu.evaluate, interpret=interpreter())
  monkeypatch.setitem(indexer_kl._MASKED, "gpu", evaluate)
  indexer_kl._gathered.cache_clear()
  yield
  indexer_kl._gathered.cache_clear()


@interpreted
@pytest.mark.parametrize(
  "case",
  [*CASES, pytest.param(MANY, marks=pytest.mark.slow)],
  ids=lambda case: case.name,
)
def test_gathered_kl_agrees_with_the_reference(
  case, in_interpreter, monkeypatch
):
  # Chunks, of which the last is not full.
  monkeypatch.setattr(gathered_gpu, "CHUNK", 5)
  (found,) = checking.check(case, "bfloat16", ["gpu"])
  assert found["passed"], found


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("case", MASKED, ids=lambda case: case.name)
def test_masked_kl_agrees_with_the_reference(case, in_interpreter):
  (found,) = checking.check(case, "bfloat16", ["gpu"])
  assert found["passed"], found


@interpreted
def test_value_alone_is_that_with_gradients(in_interpreter):
  case = CASES[0]
  arrays = problems.draw(case, "bfloat16")
  names = (*problems.INDEX, *problems.LATENT, "lse", "indices")
  got = indexer_kl.indexer_kl_gathered(
    *(arrays[name] for name in names),
    scale=(case.latent + case.rope) ** -0.5,
    implementation="gpu",
  )
  want = problems.call(case, "ref", arrays)["kl"]
  assert checking.error_of(got, want) < 1e-5


@pytest.mark.parametrize(
  "changes,words",
  [
    ({}, "bfloat16"),
    ({"index_heads": 65}, "MAX_HEADS"),
    ({"index_width": 129}, "MAX_WIDTH"),
    ({"latent": 513}, "MAX_KEY_WIDTH"),
  ],
)
def test_gathered_kl_refuses_other_inputs(changes, words):
  fields = {"latent": 64, "rope": 64} | changes
  case = dataclasses.replace(MANY, **fields)
  dtype = "bfloat16" if changes else "float32"
  assert words in checking.refusal(case, dtype, "gpu")


@pytest.mark.parametrize(
  "changes,words",
  [
    ({}, "bfloat16"),
    ({"index_heads": 65}, "HEADS"),
    ({"index_width": 129}, "WIDTH"),
    ({"width": 257}, "MAX_WIDTH"),
  ],
)
def test_masked_kl_refuses_other_inputs(changes, words):
  case = dataclasses.replace(MASKED[0], **changes)
  dtype = "bfloat16" if changes else "float32"
  assert words in checking.refusal(case, dtype, "gpu")

"""A profile and its program tell where the time of a step goes."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.model import layers
from dsv32_jax.training import losses
from dsv32_jax.training import profiling

# A program as XLA prints it, cut to what is read.
TEXT = """HloModule jit_step, is_scheduled=true

FileNames
1 "/x/dsv32_jax/model/mla.py"
2 "/x/elsewhere/library.py"
3 "/x/pallas_kernels/indexer_kl/xla.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=2 function_name_id=1 line=6 end_line=6 column=19 end_column=24}
2 {file_name_id=1 function_name_id=1 line=6 end_line=6 column=19 end_column=24}
3 {file_name_id=3 function_name_id=1 line=6 end_line=6 column=19 end_column=24}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=2}
4 {file_location_id=1 parent_frame_id=1}

%body (a: f32[2]) -> f32[2] {
  %a = f32[2]{0} parameter(0)
  %called.1 = f32[2]{0} tanh(%a), metadata={op_name="x" stack_frame_id=2}
  ROOT %kl = f32[2]{0} add(%a, %a), metadata={op_name="x" stack_frame_id=3}
}

ENTRY %main (a.1: f32[2]) -> f32[2] {
  %a.1 = f32[2]{0} parameter(0)
  %lost = f32[2]{0} add(%a.1, %a.1), metadata={op_name="x" stack_frame_id=4}
  ROOT %loop = f32[2]{0} while(%a.1), body=%body, metadata={stack_frame_id=1}
}
"""


def test_an_instruction_belongs_to_the_innermost_line_that_is_known():
  assert profiling.parts_of(TEXT) == {
    "a": "other",
    "called.1": "attention projections",
    "kl": "indexer KL",
    "a.1": "other",
    "lost": "other",
  }


def test_parts_are_files_that_exist():
  root = pathlib.Path(profiling.__file__).parents[2]
  assert all((root / place).exists() for place in profiling.PARTS)


def test_the_costly_part_takes_most_of_the_time(tmp_path):
  """A large product in one file of the model, little in another."""
  table = jnp.ones((512, 8192))

  @jax.jit
  def step(x):
    normed = layers.rms_norm(x, jnp.ones(512), 1e-6)
    ones = jnp.ones((1, 1024))
    return losses.lm_loss(
      normed[None], table, ones.astype(jnp.int32), ones, jnp.float32(1.0)
    )[0]

  x = jnp.asarray(np.random.default_rng(0).normal(size=(1024, 512)))
  compiled = step.lower(x).compile()
  jax.block_until_ready(compiled(x))
  with jax.profiler.trace(str(tmp_path)):
    jax.block_until_ready(compiled(x))
  parts = profiling.seconds_by_part(tmp_path, compiled.as_text())
  assert next(iter(parts)) == "head and loss"
  assert parts["head and loss"] > 0.5 * sum(parts.values())
  with pytest.raises(ValueError, match="no instruction of jit_other"):
    profiling.seconds_by_part(tmp_path, "HloModule jit_other, x")
  with pytest.raises(FileNotFoundError, match="holds no profile"):
    profiling.seconds_by_part(tmp_path / "none", compiled.as_text())

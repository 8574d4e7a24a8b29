"""Set bits listed by the TPU kernel, interpreted, against numpy."""
# B batch, T queries, S keys

import jax
import numpy as np
import pytest

from pallas_kernels import bitmask
from pallas_kernels import implementations
from pallas_kernels.index_select import tpu_indices


@pytest.mark.parametrize(
  ("num_keys", "density", "num_selected"),
  [
    (1, 1.0, 1),
    (40, 0.5, 7),
    (129, 0.0, 3),
    # Several groups of words, more selected than there are, several pieces.
    (9000, 0.01, 300),
    (9000, 0.9, 700),
    (4096, 1.0, 130),
  ],
)
def test_lists_the_first_set_bits(num_keys, density, num_selected):
  random = np.random.default_rng(num_keys)
  mask_BTS = random.random((2, 5, num_keys)) < density
  # The top bit of a word, and the last key.
  mask_BTS[0, 1, 31::32] = mask_BTS[1, 0, -1] = True
  got_BTN = jax.jit(
    lambda mask_BTW: tpu_indices.to_indices(
      mask_BTW, num_selected, interpret=implementations.INTERPRET
    )
  )(bitmask.pack(mask_BTS))
  want_BTN = np.full((2, 5, num_selected), -1)
  for b, t in np.ndindex(2, 5):
    found = np.flatnonzero(mask_BTS[b, t])[:num_selected]
    want_BTN[b, t, : len(found)] = found
  np.testing.assert_array_equal(got_BTN, want_BTN)

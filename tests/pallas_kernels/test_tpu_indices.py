"""Set bits listed by the TPU kernel, interpreted, against numpy."""
# B batch, T queries, S keys

import jax
import numpy as np
import pytest

from pallas_kernels import bitmask
from pallas_kernels import index_select


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
    lambda mask_BTW: index_select.list_selected(
      mask_BTW, num_selected, num_keys, implementation="tpu_interpret"
    )
  )(bitmask.pack(mask_BTS))
  want_BTN = np.full((2, 5, num_selected), -1)
  for b, t in np.ndindex(2, 5):
    found = np.flatnonzero(mask_BTS[b, t])[:num_selected]
    want_BTN[b, t, : len(found)] = found
  np.testing.assert_array_equal(got_BTN, want_BTN)


def test_bad_lists_are_refused():
  mask_BTW = bitmask.pack(np.ones((1, 2, 40), bool))
  with pytest.raises(ValueError, match="num_keys=129"):
    index_select.list_selected(mask_BTW, 3, 129)
  with pytest.raises(ValueError, match="implementation='cuda'"):
    index_select.list_selected(mask_BTW, 3, 40, implementation="cuda")

"""What a `requests.Constraint` allows, and draws from it."""

import numpy as np


def ids_of(allowed_W):
  """The tokens of a mask."""
  bits = np.unpackbits(allowed_W.view(np.uint8), bitorder="little")
  return np.flatnonzero(bits)


def written(constraint, tokenizer, seed, drawn=()):
  """Draws evenly from what is allowed, up to the end."""
  generator, drawn = np.random.default_rng(seed), list(drawn)
  while not drawn or drawn[-1] != tokenizer.eos_id:
    drawn.append(int(generator.choice(ids_of(constraint.allowed(drawn)))))
    assert len(drawn) < 4000
  return drawn

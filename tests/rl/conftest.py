"""Fixtures of runs whose models are fresh."""

import jax
import pytest

from dsv32_jax import sharding
from dsv32_jax.rl import episodes


def _few_tokens(model, tokenizer):
  """A fresh model ends its replies once in a while, if it has few tokens."""
  kept = [tokenizer.eos_id, *(tokenizer.encode(x)[0] for x in "abcd")]
  return tuple(set(range(model.vocab_size)) - set(kept))


@pytest.fixture
def fresh_models_play(monkeypatch):
  """Runs of episodes are on one device, and their replies are short."""
  make_mesh = sharding.make_mesh
  monkeypatch.setattr(
    sharding, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1])
  )
  monkeypatch.setattr(episodes, "banned_ids", _few_tokens)

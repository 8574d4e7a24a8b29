"""A small tokenizer, trained once."""

import pytest

from dsv32_jax.data import tokenizer as tokenizers


@pytest.fixture(scope="session")
def tokenizer():
  texts = ["def f(x):\n  return x + 1\n", "the quick brown fox"] * 20
  return tokenizers.train(texts, 300)

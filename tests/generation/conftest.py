"""What tests of replies held to a form share."""

import pytest

from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.generation.server import json_grammar


@pytest.fixture(scope="module")
def tokenizer():
  return tokenizers.train(["hi there, what is it?"] * 5, 300)


@pytest.fixture(scope="module")
def grammars(tokenizer):
  return json_grammar.JsonGrammars(tokenizer)

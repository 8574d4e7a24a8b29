"""Exact match, format, language and length against hand-made cases."""

import time

import pytest

from dsv32_jax.verifiers import exact
from dsv32_jax.verifiers import format as format_lib
from dsv32_jax.verifiers import language
from dsv32_jax.verifiers import length
from dsv32_jax.verifiers import score


@pytest.mark.parametrize(
  "text, want",
  [
    ("\\boxed{1}", "1"),
    ("\\boxed{\\frac{1}{2}} end}", "\\frac{1}{2}"),
    ("\\boxed{\\{1\\}}", "\\{1\\}"),
    ("\\boxed{a}\\boxed{b}", "b"),
    ("\\boxed{a}\\boxed{b", None),
    ("boxed{a}", None),
    ("\\boxed{a\\", None),
    ("", None),
  ],
)
def test_last_boxed(text, want):
  assert format_lib.last_boxed(text) == want


def test_last_boxed_takes_linear_time():
  text = "\\boxed{" * 50_000
  assert format_lib.last_boxed(text) is None


@pytest.mark.parametrize(
  "response, value",
  [
    ("\\boxed{ Sorted  LIST }", 1),
    ("\\boxed{sorted list}</think>\\boxed{other}", 0),
    ("\\boxed{other}</think>\\boxed{sorted list}", 1),
    ("sorted list", 0),
  ],
)
def test_exact_match(response, value):
  assert exact.exact_match(response, "sorted list").value == value


@pytest.mark.parametrize(
  "response, thinking, boxed, error",
  [
    ("so</think>yes", True, False, ""),
    ("<think>so</think>yes", True, False, ""),
    ("so</think>\\boxed{1}", True, True, ""),
    ("yes", False, False, ""),
    ("so</think>yes", True, True, "no boxed answer"),
    ("\\boxed{1}</think>yes", True, True, "no boxed answer"),
    ("yes", True, False, "0 closing </think> instead of 1"),
    ("a</think>b</think>c", True, False, "2 closing </think> instead of 1"),
    ("a<think>b</think>c", True, False, "a second or misplaced <think>"),
    ("a</think>b<think>", True, False, "a second or misplaced <think>"),
    ("a</think> \n", True, False, "no answer"),
    ("a</think>b", False, False, "</think> without thinking"),
    ("<think>a", False, False, "a second or misplaced <think>"),
    ("", False, False, "no answer"),
  ],
)
def test_format(response, thinking, boxed, error):
  got = format_lib.format_score(response, thinking=thinking, boxed=boxed)
  assert got.error == error and got.value == (not error)


def test_parts():
  response = "<think>so</think>yes"
  assert format_lib.thinking_part(response) == "so"
  assert format_lib.answer_part(response) == "yes"
  assert format_lib.thinking_part("yes") == ""


CHINESE = "\u6211\u4eec\u8ba1\u7b97"  # four characters


@pytest.mark.parametrize(
  "text, target, share",
  [
    ("we add the two numbers", "en", 1),
    ("we add the two numbers", "zh", 0),
    (CHINESE, "zh", 1),
    (f"we add {CHINESE}", "zh", 4 / 6),
    (f"we add {CHINESE}", "en", 2 / 6),
    (f"add{CHINESE}", "en", 1 / 5),
    ("\u3053\u306e\u6570", "ja", 1),
    ("\u3053\u306e\u6570", "zh", 1 / 3),
    ("\u0441\u043b\u043e\u0432\u043e word", "ru", 1 / 2),
    (f"{CHINESE} `x = sum(values)` $a+b$ \\frac{{ab}}{{cd}} 12", "zh", 1),
    (f"{CHINESE}\n```\nwhile True: pass\n```", "zh", 1),
    ("12 + 34 = 46", "en", 1),
    ("na\u00efve caf\u00e9", "fr", 1),
  ],
)
def test_language_share(text, target, share):
  assert language.language_share(text, target) == pytest.approx(share)
  assert language.language_score(text, target).value == pytest.approx(share)


def test_unknown_language():
  with pytest.raises(ValueError, match="language='xx'"):
    language.language_share("a", "xx")


@pytest.mark.parametrize(
  "tokens, value",
  [(0, 0), (100, 0), (125, -0.125), (200, -0.5), (300, -0.5)],
)
def test_length_penalty(tokens, value):
  penalty = length.LengthPenalty(free_tokens=100, max_tokens=200, weight=0.5)
  assert penalty.score(tokens).value == value


@pytest.mark.parametrize(
  "numbers, message",
  [
    (dict(free_tokens=5, max_tokens=5), "free_tokens=5"),
    (dict(free_tokens=0, max_tokens=5, weight=-1), "weight=-1"),
  ],
)
def test_bad_length_penalty(numbers, message):
  with pytest.raises(ValueError, match=message):
    length.LengthPenalty(**numbers)


def test_rewards_add_up():
  scores = {
    "outcome": score.Score(value=1.0),
    "format": score.Score(value=0.0, error="no answer"),
    "length": score.Score(value=-0.5),
  }
  weights = {"outcome": 1.0, "format": 1.0, "length": 0.2}
  got = score.weighted_sum(scores, weights)
  assert got.value == pytest.approx(0.9) and got.error == "format: no answer"
  with pytest.raises(ValueError, match="differ"):
    score.weighted_sum(scores, {"outcome": 1.0})


@pytest.mark.parametrize("opening", ["\\[", "\\(", "$$ "])
def test_formulas_that_never_end_take_linear_time(opening):
  start = time.process_time()
  assert language.language_share(opening * 100_000 + "word", "en") == 1
  assert time.process_time() - start < 2


def test_a_formula_that_never_ends_hides_nothing():
  text = "\\[ \u0441\u043b\u043e\u0432\u043e word"
  assert language.language_share(text, "en") == 0.5


def test_an_infinite_penalty_is_refused():
  with pytest.raises(ValueError, match="weight=inf"):
    length.LengthPenalty(free_tokens=1, max_tokens=2, weight=float("inf"))

import numpy as np
import pytest

from dsv32_jax.evals import agreement


def mask(*keys, size=5):
  chosen = np.zeros(size, bool)
  chosen[list(keys)] = True
  return chosen


def compare(scores, first, second, top_k, **options):
  found = agreement.selections_agree(
    np.array(scores), first, second, top_k, **options
  )
  return bool(found.differs_X), bool(found.disagrees_X)


def test_equal_selections_agree():
  scores = [3.0, 1.0, 2.0, 0.0, -1.0]
  assert compare(scores, mask(0, 2), mask(0, 2), 2) == (False, False)


def test_keys_that_tie_with_the_last_may_be_exchanged():
  scores = [3.0, 0.0, 2.0, 0.0, 0.0]
  assert compare(scores, mask(0, 2, 1), mask(0, 2, 4), 3) == (True, False)


def test_the_tolerance_is_relative_to_the_largest_score_of_the_row():
  for scale in (1e-6, 1.0, 1e6):
    for step, disagrees in ((0.9e-5, False), (1.2e-5, True)):
      scores = np.array([-4.0, 1.0, 1.0 - 4 * step, 0.0, 0.0]) * scale
      found = compare(scores, mask(1), mask(2), 1)
      assert found == (True, disagrees), (scale, step)


def test_a_key_above_the_tie_may_not_be_left_out():
  scores = [3.0, 1.0, 1.0, 1.0, 0.0]
  assert compare(scores, mask(0, 1), mask(1, 2), 2) == (True, True)
  # Nor may one below the tie be taken.
  assert compare(scores, mask(0, 1), mask(0, 4), 2) == (True, True)


def test_selections_of_the_wrong_size_disagree_even_if_equal():
  scores = [3.0, 1.0, 1.0, 1.0, 0.0]
  assert compare(scores, mask(0), mask(0), 2) == (False, True)
  assert compare(scores, mask(0, 1), mask(0, 1, 2), 2) == (True, True)


def test_fewer_visible_keys_than_top_k_must_all_be_selected():
  scores = [1.0, 1.0, -np.inf, -np.inf, -np.inf]
  assert compare(scores, mask(0, 1), mask(0, 1), 3) == (False, False)
  assert compare(scores, mask(0, 1), mask(0), 3) == (True, True)
  hidden = mask(0, 1, 2)
  assert compare(scores, hidden, hidden, 3) == (False, True)


def test_a_row_that_sees_nothing_selects_nothing():
  scores = [-np.inf] * 5
  assert compare(scores, mask(), mask(), 2) == (False, False)
  assert compare(scores, mask(3), mask(), 2) == (True, True)


def test_rows_are_compared_one_by_one():
  random = np.random.default_rng(0)
  scores_LTS = random.normal(size=(3, 7, 20))
  chosen_LTS = scores_LTS >= -np.sort(-scores_LTS)[..., 4:5]
  other_LTS = chosen_LTS.copy()
  worst = scores_LTS[1, 2].argmin()
  other_LTS[1, 2, [scores_LTS[1, 2].argmax(), worst]] = [False, True]
  found = agreement.selections_agree(scores_LTS, chosen_LTS, other_LTS, 5)
  want = np.zeros((3, 7), bool)
  want[1, 2] = True
  np.testing.assert_array_equal(found.differs_X, want)
  np.testing.assert_array_equal(found.disagrees_X, want)


@pytest.mark.parametrize(
  ("scores", "first", "top_k", "message"),
  [
    (np.zeros(4), mask(0), 1, "differ"),
    (np.zeros(5), mask(0).astype(int), 1, "must be bool"),
    (np.zeros(5), mask(0), 0, "top_k=0"),
    (np.full(5, np.nan), mask(0), 1, "NaN"),
  ],
)
def test_bad_input_is_refused(scores, first, top_k, message):
  with pytest.raises(ValueError, match=message):
    agreement.selections_agree(scores, first, mask(0), top_k)

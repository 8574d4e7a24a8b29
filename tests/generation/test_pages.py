"""Bookkeeping of pages, against a list of who has what."""

import numpy as np
import pytest

from dsv32_jax.generation import pages as pages_lib

NOTHING = pages_lib.Wanted()


def remember(pages, tokens, held, wanted=NOTHING):
  size = pages.page_size
  for place, page in enumerate(held):
    before = held[place - 1] if place else -1
    content = tuple(tokens[place * size : (place + 1) * size])
    pages.remember(before, content, page, wanted)


def test_no_page_has_two_owners():
  generator = np.random.default_rng(0)
  pages = pages_lib.Pages(12, 2)
  # Few different tokens: many prefixes are equal.
  owned = []
  for _ in range(600):
    if owned and generator.random() < 0.45:
      _, held = owned.pop(generator.integers(len(owned)))
      pages.give_back(held)
    else:
      tokens = generator.integers(0, 2, 8).tolist()
      held, _ = pages.match(tokens, 4, NOTHING)
      for place, page in enumerate(held):
        for other, theirs in owned:
          if page in theirs:
            # Shared pages hold the same beginning.
            assert theirs[place] == page
            assert other[: 2 * place + 2] == tokens[: 2 * place + 2]
      more = pages.take(4 - len(held))
      if more is None:
        pages.give_back(held)
        continue
      for _, theirs in owned:
        assert not set(more) & set(theirs)
      held = held + more
      remember(pages, tokens, held)
      owned.append((tokens, held))
    used = {page for _, held in owned for page in held}
    assert pages.num_used == len(used)
    assert pages.num_free == 12 - len(used)
  for _, held in owned:
    pages.give_back(held)
  assert sorted(pages.take(12)) == list(range(12))
  assert pages.take(1) is None


def test_a_prefix_is_found_until_its_pages_are_needed():
  pages = pages_lib.Pages(4, 2)
  tokens = [5, 6, 7, 8, 9, 9]
  held = pages.take(3)
  remember(pages, tokens, held)
  assert pages.match(tokens, 3, NOTHING)[0] == held
  assert pages.match(tokens, 2, NOTHING)[0] == held[:2]
  assert pages.match([5, 6, 8, 8], 2, NOTHING)[0] == held[:1]
  for count in (3, 3, 2, 1):
    pages.give_back(held[:count])
  assert pages.num_free == 4
  # The fresh page goes first, then the end of the prefix.
  other = pages.take(2)
  assert held[2] in other and not set(held[:2]) & set(other)
  assert pages.match(tokens, 3, NOTHING)[0] == held[:2]
  pages.give_back(held[:2])
  pages.forget_all()
  assert pages.match(tokens, 3, NOTHING)[0] == []
  assert pages.num_free == 2


def test_the_same_tokens_behind_a_reused_page_are_not_found():
  pages = pages_lib.Pages(2, 1)
  first, second = pages.take(2)
  remember(pages, [1, 2], [first, second])
  pages.give_back([first])
  (again,) = pages.take(1)
  assert again == first
  pages.remember(-1, (3,), again, NOTHING)
  assert pages.match([3, 2], 2, NOTHING)[0] == [first]


def test_records_must_have_what_is_wanted():
  pages = pages_lib.Pages(4, 1)
  wanted = pages_lib.Wanted(routing=True)
  (bare,) = pages.take(1)
  remember(pages, [1], [bare])
  assert pages.match([1], 1, wanted)[0] == []
  (full,) = pages.take(1)
  known = pages.remember(-1, (1,), full, wanted)
  found, (same,) = pages.match([1], 1, wanted)
  assert found == [full] and same is known and known.record is None
  # The fuller one is kept.
  assert pages.remember(-1, (1,), bare, NOTHING) is None
  assert pages.match([1], 1, NOTHING)[0] == [full]


def test_no_pages():
  with pytest.raises(ValueError, match="num_pages=0"):
    pages_lib.Pages(0, 4)

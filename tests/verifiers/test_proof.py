"""Rewards of proofs against the equations of DeepSeekMath-V2."""

import itertools

import pytest

from dsv32_jax.verifiers import proof


def analysis(score, *, opening=proof.EVALUATION, closing=proof.FINAL_SCORE):
  return f"{opening}\nStep 2 is not shown.\n{closing}\n\\boxed{{{score}}}"


def response(score, *, solution="Let n be even."):
  return (
    f"{proof.SOLUTION}\n{solution}\n\n{proof.SELF_EVALUATION}\n"
    + analysis(score)
  )


@pytest.mark.parametrize(
  "text, score",
  [
    (analysis("0"), 0.0),
    (analysis("0.5"), 0.5),
    (analysis("1"), 1.0),
    (analysis(" 1.0 "), 1.0),
    (analysis("0.7"), None),
    (analysis("1.5"), None),
    (analysis("-1"), None),
    (analysis("1", opening="My evaluation:"), None),
    (analysis("1", closing="Score:"), None),
    (analysis("1") + analysis("0"), None),
    (f"{proof.FINAL_SCORE} \\boxed{{1}} {proof.EVALUATION}", None),
    (f"{proof.EVALUATION} \\boxed{{1}} {proof.FINAL_SCORE}", None),
  ],
)
def test_read_score(text, score):
  assert proof.read_score(text) == score


def test_verifier_rewards_over_all_scores():
  for found, truth, meta in itertools.product(proof.SCORES, repeat=3):
    text = "thinking</think>" + analysis(f"{found:g}")
    plain = proof.verifier_reward(text, truth)
    assert plain.value == {0: 1.0, 0.5: 0.5, 1: 0.0}[abs(found - truth)]
    judged = proof.verifier_reward(text, truth, meta_score=meta)
    assert judged.value == plain.value * meta
  bad = proof.verifier_reward("\\boxed{1}", 1.0)
  assert bad.value == 0 and bad.error


def test_generator_rewards_over_all_scores():
  for own, truth, meta in itertools.product(proof.SCORES, repeat=3):
    got = proof.generator_reward(response(f"{own:g}"), truth, meta)
    want = 0.76 * truth + 0.24 * (1 - abs(own - truth)) * meta
    assert got.value == pytest.approx(want) and not got.error
  # Honesty about a failed proof beats a claim that it is right.
  honest, boastful = (
    proof.generator_reward(response(own), 0.0, 1.0).value for own in "01"
  )
  assert honest == pytest.approx(0.24) and boastful == 0


@pytest.mark.parametrize(
  "text",
  [
    "",
    response("0.3"),
    response("1", solution=""),
    response("1") + f"\n{proof.SOLUTION}\nAgain.",
    f"{proof.SELF_EVALUATION}\n{analysis('1')}\n{proof.SOLUTION}\nProof.",
    f"{proof.SOLUTION}\nProof.\n{analysis('1')}",
  ],
)
def test_malformed_responses_earn_nothing(text):
  got = proof.generator_reward(text, 1.0, 1.0)
  assert got.value == 0 and got.error


def test_parts_of_a_response():
  read = proof.read_response("so</think>" + response("0.5"))
  assert read.solution == "Let n be even."
  assert read.evaluation == analysis("0.5") and read.self_score == 0.5


YES, NO = [True, True, False], [True, False, False]


@pytest.mark.parametrize(
  "scores, votes, needed, label",
  [
    ([0, 0, 0.5], [YES, YES, YES], 2, 0),
    ([0, 0, 0.5], [YES, NO, YES], 2, None),
    ([0, 0.5, 0.5], [NO, YES, YES], 2, None),
    ([1, 0.5, 0.5], [[], YES, YES], 2, 0.5),
    ([0, 0.5, 1], [NO, NO, []], 1, 1),
    ([1, 1, 1], [[], [], []], 3, 1),
    ([0], [[True, False]], 1, 1),
    ([0], [[]], 1, 1),
    ([0.5, 1, 1], [YES, [], []], 1, 0.5),
  ],
)
def test_automatic_labels(scores, votes, needed, label):
  assert proof.automatic_label(scores, votes, needed=needed) == label


def test_bad_arguments():
  with pytest.raises(ValueError, match=r"truth=0\.3"):
    proof.verifier_reward(analysis("1"), 0.3)
  with pytest.raises(ValueError, match="meta_score=2"):
    proof.generator_reward(response("1"), 1.0, 2)
  with pytest.raises(ValueError, match="must be equal"):
    proof.automatic_label([1], [], needed=1)
  with pytest.raises(ValueError, match="needed=0"):
    proof.automatic_label([1], [[]], needed=0)

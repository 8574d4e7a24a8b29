"""Small statements to prove step by step, with a self-evaluation of the proof.

The form is DeepSeekMath-V2's, and so is the reward: verifier and meta-verifier
are policies. The ones here are scripts that check steps of arithmetic, so that
no model is needed offline; `judge` takes any others.
"""

import ast
import dataclasses
import operator
import random
import re
from typing import ClassVar

from dsv32_jax.agents import policy as policies
from dsv32_jax.verifiers import proof as proof_lib
from dsv32_jax.verifiers import proof_judge
from dsv32_jax.verifiers import score as score_lib
from dsv32_jax.verifiers.tasks import arithmetic
from dsv32_jax.verifiers.tasks import problem

_SIGNS = {
  ast.Add: ("+", operator.add),
  ast.Sub: ("-", operator.sub),
  ast.Mult: ("*", operator.mul),
}
_LINE = re.compile(r"(-?\d{1,9}) ([-+*]) (-?\d{1,9}) = (-?\d{1,18})")
_RIGHT = "Every step holds."


def steps_of(statement: str) -> list[tuple[int, str, int, int]]:
  """The steps that prove "EXPRESSION = VALUE": left, sign, right, result.

  Raises:
    ValueError: if it is no true statement of that form.
  """
  text, _, value = statement.rpartition(" = ")
  steps = []
  found = _evaluated(ast.parse(text, mode="eval").body, steps)
  if str(found) != value:
    raise ValueError(f"{statement=} is not true")
  return steps


def proof_score(statement: str, proof: str) -> float:
  """1 for all steps and nothing wrong, 0.5 if some but the last lack, else 0.

  Args:
    statement: as of steps_of.
    proof: a step a line, as "3 + 4 = 7", in any order.
  """
  wanted, said = steps_of(statement), []
  for line in filter(None, map(str.strip, proof.splitlines())):
    match = _LINE.fullmatch(line)
    if match is None:
      return 0.0
    left, sign, right, result = match.groups()
    said.append((int(left), sign, int(right), int(result)))
  if any(step not in wanted for step in said) or wanted[-1] not in said:
    return 0.0
  return 1.0 if all(step in said for step in wanted) else 0.5


def _evaluated(node, steps) -> int:
  if isinstance(node, ast.Constant) and isinstance(node.value, int):
    return node.value
  if not isinstance(node, ast.BinOp) or type(node.op) not in _SIGNS:
    raise ValueError(f"{ast.unparse(node)!r} is no expression of + - *")
  sign, apply = _SIGNS[type(node.op)]
  left, right = (_evaluated(x, steps) for x in (node.left, node.right))
  steps.append((left, sign, right, apply(left, right)))
  return steps[-1][-1]


def _is_held_out(step) -> bool:
  left, sign, right, _ = step
  content = arithmetic.content_of(str(left), sign, str(right))
  return problem.holds_out(problem.key_of("arithmetic", content))


def _analysis(text: str, value: float) -> dict[str, str]:
  content = (
    f"{proof_lib.EVALUATION} {text}\n{proof_lib.FINAL_SCORE}"
    f" \\boxed{{{value:g}}}"
  )
  return {"role": "assistant", "content": content}


def _verify(messages) -> dict[str, str]:
  statement, proof = proof_judge.sections(messages[-1]["content"])
  value = proof_score(statement, proof)
  return _analysis(_RIGHT if value == 1 else "Steps are wrong or lack.", value)


def _meta_verify(messages) -> dict[str, str]:
  """No fault found is reasonable; a fault is where the verifier has one."""
  statement, proof, said = proof_judge.sections(messages[-1]["content"])
  own, value = proof_score(statement, proof), proof_lib.read_score(said)
  if value == 1 or value == own:
    return _analysis("Its findings are real.", 1.0)
  return _analysis("Its findings do not fit.", 0.0 if own == 1 else 0.5)


def scripted_verifier() -> policies.Policy:
  """A policy that checks the steps of a proof by calculating them."""
  return policies.ScriptedPolicy(_verify)


def scripted_meta_verifier() -> policies.Policy:
  """A policy that compares an evaluation with what it finds itself."""
  return policies.ScriptedPolicy(_meta_verify)


SCRIPTED = proof_judge.ProofJudge(
  verifier=scripted_verifier, meta_verifier=scripted_meta_verifier
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProofProblem(problem.Problem):
  """A statement to prove; a proof that a judge accepts is the answer.

  Attributes:
    statement: that is true.
    judge: of proofs; pickled to where answers are scored.
  """

  boxed: ClassVar[bool] = False

  statement: str
  judge: proof_judge.ProofJudge = SCRIPTED

  def score(self, response: str) -> score_lib.Score:
    """The reward of DeepSeekMath-V2, from 0 to 1: proof and self-evaluation."""
    return self.judge.score(self.statement, response)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proofs:
  """That an expression has its value.

  Attributes:
    terms: numbers in it.
    largest: the largest of them; the smallest is 0.
    judge: of proofs.
  """

  terms: int = 3
  largest: int = 9
  judge: proof_judge.ProofJudge = SCRIPTED

  def __post_init__(self):
    arithmetic.Arithmetic(terms=self.terms, largest=self.largest)

  def draw(self, generator: random.Random) -> problem.Problem:
    """Draws a statement; with sides of + or * swapped it is the same.

    No step of its proof is a calculation that arithmetic holds out.
    """
    calculation = arithmetic.Arithmetic(terms=self.terms, largest=self.largest)
    while True:
      drawn = calculation.draw(generator)
      text = drawn.question.removeprefix("What is ").partition("?")[0]
      statement = f"{text} = {drawn.answer}"
      if not any(map(_is_held_out, steps_of(statement))):
        break
    solution = drawn.reasoning
    return ProofProblem(
      task="proofs",
      content=drawn.content,
      question=(
        f"Prove that {statement}. Write the proof under"
        f' "{proof_lib.SOLUTION}", a step a line, and under'
        f' "{proof_lib.SELF_EVALUATION}" judge it.'
      ),
      answer=(
        f"{proof_lib.SOLUTION}\n{solution}\n{proof_lib.SELF_EVALUATION}\n"
        f"{proof_lib.EVALUATION} {_RIGHT}\n{proof_lib.FINAL_SCORE} \\boxed{{1}}"
      ),
      reasoning=solution,
      statement=statement,
      judge=self.judge,
    )

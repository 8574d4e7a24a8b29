"""Programs and instructions: right in many ways, checked by running and rules.

What a question asks is read again here, from its words alone.
"""

import itertools
import random
import re

import pytest

from dsv32_jax.agents.synthesis.code import expressions
from dsv32_jax.verifiers import format as format_lib
from dsv32_jax.verifiers import reward
from dsv32_jax.verifiers import tasks
from dsv32_jax.verifiers.tasks import instructions

TASKS = {
  "programs": tasks.Programs(size=3, largest=9),
  "instructions": tasks.Instructions(),
}


def first(name, count=60):
  stream = tasks.generate(TASKS[name], split="train", seed=0)
  return list(itertools.islice(stream, count))


FIRST = {
  r"add (\w) and (\w)": lambda x, y: x + y,
  r"from (\w) subtract (\w)": lambda x, y: x - y,
  r"multiply (\w) by (\w)": lambda x, y: x * y,
  r"take the larger of (\w) and (\w)": max,
  r"take the smaller of (\w) and (\w)": min,
}
LATER = {
  r"add (\w+)": lambda x, y: x + y,
  r"subtract (\w+)": lambda x, y: x - y,
  r"multiply by (\w+)": lambda x, y: x * y,
  r"take at least (\w+)": max,
  r"take at most (\w+)": min,
  r"divide by (\w+) rounding down": lambda x, y: (x - x % y) / y,
  r"take the remainder by (\w+)": lambda x, y: x - y * (x // y),
}


def found_in(table, text):
  for pattern, function in table.items():
    if match := re.fullmatch(pattern, text):
      return function, match.groups()
  raise AssertionError(text)


def follow(question, case):
  """What a program's description says of arguments."""
  given = dict(zip("abc", case))
  said = re.search(r"of a, b and c: (.*?)\. Put", question)[1]
  opening, *later = said.split(", then ")
  function, names = found_in(FIRST, opening)
  value = function(*(given[name] for name in names))
  for text in later:
    function, (operand,) = found_in(LATER, text)
    known = given[operand] if operand in given else int(operand)
    value = function(value, known)
  return value


def test_programs_do_what_their_words_say():
  kinds = set()
  for problem in first("programs", 150):
    function = eval(problem.answer)
    assert len({case for case, _ in problem.tests}) > 20
    for case, wanted in problem.tests:
      assert function(*case) == wanted == follow(problem.question, case)
    kinds |= set(re.findall(r"//|max|min|[-+*%]", problem.answer))
  assert kinds == {"//", "max", "min", "-", "+", "*", "%"}


def test_any_right_program_is_right():
  problem = TASKS["programs"].draw(random.Random(3))
  assert "from b subtract a" not in problem.question
  (case, wanted), *_ = problem.tests
  for program, value in (
    (problem.answer, 1),
    (problem.answer.replace("a, b, c:", "a, b, c=0, *more:"), 1),
    (f"({problem.answer})", 1),
    (f" {problem.answer} + 0 * a", 1),
    (f"{problem.answer} + 1", 0),
    (f"lambda a, b, c: {wanted} if (a, b, c) == {case} else 'no'", 0),
    ("lambda a, b, c: True", 0),
    ("lambda a, b, c", 0),
    ("lambda a, b, c: d", 0),
    ("", 0),
  ):
    assert problem.score(f"\\boxed{{{program}}}").value == value, program
  assert problem.score(problem.answer).error == "no boxed answer"


def test_a_program_that_hangs_or_crashes_costs_its_answer_alone():
  problem = TASKS["programs"].draw(random.Random(0))
  programs = (
    problem.answer,
    "lambda a, b, c: [0 for _ in iter(int, 1)]",
    problem.answer,
    "__import__('os').abort()",
    "lambda a, b, c: 0",
    problem.answer,
  )
  answers = [
    reward.Answer(
      problem=problem, response=f"\\boxed{{{program}}}", num_tokens=9
    )
    for program in programs
  ]
  with reward.Rewarder(reward.RewardConfig(), num_workers=1) as rewarder:
    found = rewarder.score(answers)
  assert [one.outcome for one in found] == [1, 0, 1, 0, 0, 1]
  assert "the program was ended" in found[1].error
  assert "signal 6" in found[3].error
  assert not found[4].error


def test_written_in_another_way_it_is_the_same_program():
  """Sides swapped, or steps that undo each other: one content, one split."""
  found = {}
  for problem in first("programs", 400):
    function = eval(problem.answer)
    wide = [function(*case) for case in expressions.cases("others", 200)]
    found.setdefault(tuple(wide), set()).add(problem.content)
  assert all(len(contents) == 1 for contents in found.values())
  a_and_b, b_and_a = (
    expressions.Function(
      steps=(
        expressions.Step(operation=expressions._ADD, left=left, right=right),
      )
    )
    for left, right in ("ab", "ba")
  )
  assert a_and_b.fingerprint() == b_and_a.fingerprint()


def keeps(question, text):
  """Whether a text is what an instruction asks for."""
  count, words, without, case, order, between, _, ending = re.fullmatch(
    r"Write (\d) of the words (.*), but not (\w+), (in capital letters|with"
    r" capital first letters|in small letters), (.*?)separated by (\w+)(, with"
    r" (.) at the end)?\.",
    question,
  ).groups()
  if ending:
    if text[-1:] != ending:
      return False
    text = text[:-1]
  signs = {"spaces": " ", "commas": ",", "dashes": "-", "slashes": "/"}
  parts = [part.strip() for part in text.split(signs[between])]
  shapes = {
    "in capital letters": "[A-Z]+",
    "with capital first letters": "[A-Z][a-z]*",
    "in small letters": "[a-z]+",
  }
  if not all(re.fullmatch(shapes[case], part) for part in parts):
    return False
  plain = [part.lower() for part in parts]
  allowed = set(words.split(", ")) - {without}
  if len(plain) != int(count) or len(set(plain) & allowed) != len(plain):
    return False
  pairs = list(itertools.pairwise(plain))
  if "reverse" in order:
    return all(a > b for a, b in pairs)
  return not order or all(a < b for a, b in pairs)


def test_rules_hold_of_solutions_and_little_else():
  problems = first("instructions", 150)
  right = wrong = 0
  for problem in problems:
    assert keeps(problem.question, problem.answer), problem
    for text in (
      *(other.answer for other in problems[:60]),
      problem.answer.upper(),
      problem.answer.lower(),
      problem.answer + "!",
      problem.answer[:-1],
      problem.answer.replace("-", " "),
      problem.answer.replace(",", ", "),
      "-".join(reversed(problem.answer.split("-"))),
      "",
    ):
      value = problem.score(text).value
      assert value == keeps(problem.question, text), (problem.question, text)
      right, wrong = right + value, wrong + 1 - value
  assert right > 300 and wrong > 5000


def test_instructions_that_the_same_answers_keep_are_the_same():
  task, generator = tasks.Instructions(size=2, largest=4), random.Random(0)
  shapes = (str.upper, str.lower, str.capitalize)
  texts = [
    shape(word) + ending
    for word in instructions.WORDS[:4]
    for shape in shapes
    for ending in ("", "!", "?", ".")
  ]
  contents, questions = {}, {}
  for _ in range(1000):
    problem = task.draw(generator)
    given = frozenset(problem.rules.words)
    kept = frozenset(x for x in texts if keeps(problem.question, x))
    contents.setdefault((given, kept), set()).add(problem.content)
    questions.setdefault((given, kept), set()).add(problem.question)
  assert all(len(found) == 1 for found in contents.values())
  assert len({x for (x,) in contents.values()}) == len(contents) > 100
  assert max(map(len, questions.values())) > 9


def test_instructions_have_more_than_one_right_answer():
  rules = instructions.Rules(
    words=("moon", "apple", "river"),
    count=2,
    without="apple",
    case="with capital first letters",
    order="",
    separator="commas",
    ending="!",
  )
  for text, broken in (
    ("Moon, River!", []),
    (" River,Moon! ", []),
    ("Moon River!", ["words", "count", "case"]),
    ("Moon, Apple!", ["without"]),
    ("Moon, Moon!", ["words"]),
    ("Moon!", ["count"]),
    ("MOON, River", ["case", "ending"]),
  ):
    assert rules.broken(text) == broken, text


def test_letters_that_only_look_like_those_of_the_words_break_a_rule():
  rules = instructions.Rules(
    words=("king", "moon"),
    count=1,
    without="moon",
    case="in capital letters",
    order="",
    separator="spaces",
    ending="",
  )
  assert rules.broken("KING") == []
  # The sign of the kelvin, whose small letter is k.
  assert rules.broken("\u212aING") == ["case"]
  for text in ("", " ", "KI\u200bNG", "\u200bKING", "K\u0130NG"):
    assert "words" in rules.broken(text), text


ALL_KINDS = {
  "arithmetic": 3,
  "sorting": 4,
  "brackets": 6,
  "knights": 2,
  "programs": 2,
  "instructions": 3,
}


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_solutions_of_both_modes_are_right(kind):
  """With the thinking before the answer, and the answer alone."""
  task = tasks.TaskConfig(kind=kind, size=ALL_KINDS[kind]).make()
  stream = tasks.generate(task, split="train", seed=0)
  for problem in itertools.islice(stream, 8):
    for thinking in (False, True):
      config = reward.RewardConfig(thinking=thinking, format_weight=0.5)
      user, assistant = problem.messages(thinking=thinking)
      assert user["content"] == problem.question
      assert ("reasoning_content" in assistant) == thinking
      before = f"{problem.reasoning}</think>" if thinking else ""
      text = before + assistant["content"]
      answer = reward.Answer(problem=problem, response=text, num_tokens=1)
      assert reward.score(answer, config).value == 1.5, text
      # What stands in the thinking alone is no answer.
      if thinking:
        hidden = f"{assistant['content']}</think>"
        assert problem.score(hidden).value == 0
        assert format_lib.format_score(text, thinking=False).value == 0


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: tasks.Programs(size=0), "size=0"),
    (lambda: tasks.Programs(largest=1), "largest=1"),
    (lambda: tasks.Instructions(size=1), "size=1"),
    (lambda: tasks.Instructions(size=5, largest=4), "largest=4"),
    (lambda: tasks.Instructions(largest=500), "largest=500"),
  ],
)
def test_bad_sizes(make, message):
  with pytest.raises(ValueError, match=message):
    make()

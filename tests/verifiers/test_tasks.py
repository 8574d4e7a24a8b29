"""Generated problems, solved again from their questions by other means."""

import ast
import itertools
import random
import re

import pytest

from dsv32_jax.verifiers import format as format_lib
from dsv32_jax.verifiers import tasks
from dsv32_jax.verifiers.tasks import problem as problem_lib

TASKS = {
  "arithmetic": tasks.Arithmetic(terms=4),
  "sorting": tasks.Sorting(),
  "brackets": tasks.Brackets(),
  "knights": tasks.Knights(),
}
# Those of test_written_tasks, whose answers are not compared but tried.
ALL_TASKS = TASKS | {
  "programs": tasks.Programs(size=3),
  "instructions": tasks.Instructions(),
}


def first(name, count=60, split="train", seed=0):
  stream = tasks.generate(ALL_TASKS[name], split=split, seed=seed)
  return list(itertools.islice(stream, count))


def evaluate(node):
  if isinstance(node, ast.Constant):
    return node.value
  left, right = evaluate(node.left), evaluate(node.right)
  if isinstance(node.op, ast.Mult):
    return left * right
  return left + right if isinstance(node.op, ast.Add) else left - right


def solve_arithmetic(question):
  text = re.search(r"What is (.*)\?", question)[1]
  return str(evaluate(ast.parse(text, mode="eval").body))


def solve_sorting(question):
  numbers = [int(n) for n in re.findall(r"\d+", question)]
  for order in itertools.permutations(numbers):
    pairs = list(itertools.pairwise(order))
    if "ascending" in question and all(a <= b for a, b in pairs):
      return ", ".join(map(str, order))
    if "descending" in question and all(a >= b for a, b in pairs):
      return ", ".join(map(str, order))
  return None


def closed(text):
  """Whether pairs can be taken out until nothing is left."""
  before = None
  while text != before:
    before, text = text, re.sub(r"\(\)|\[\]|<>", "", text)
  return not text


def solve_brackets(question):
  given = re.search(r"closed: (\S+)", question)[1]
  for size in range(1, 11):
    for ends in itertools.product(")]>", repeat=size):
      if closed(given + "".join(ends)):
        return "".join(ends)
  return None


def says(text, kinds):
  """Whether a statement is true; kinds maps names to their kind."""
  if found := re.fullmatch(r"(\w) is a (\w+)", text):
    return kinds[found[1]] == found[2]
  one, other = (kinds[name] for name in re.findall(r"\b[A-F]\b", text))
  if "same kind" in text:
    return one == other
  if "different kinds" in text:
    return one != other
  if "both knaves" in text:
    return one == other == "knave"
  assert "at least one" in text
  return "knight" in (one, other)


def solve_knights(question):
  said = re.findall(r'(\w) says: "([^"]*)\."', question)
  names = [name for name, _ in said]
  answers = []
  for choice in itertools.product(("knave", "knight"), repeat=len(names)):
    kinds = dict(zip(names, choice))
    if all(says(text, kinds) == (kinds[n] == "knight") for n, text in said):
      answers.append(", ".join(f"{n}: {kinds[n]}" for n in names))
  assert len(answers) == 1, question
  return answers[0]


SOLVERS = {
  "arithmetic": solve_arithmetic,
  "sorting": solve_sorting,
  "brackets": solve_brackets,
  "knights": solve_knights,
}


@pytest.mark.parametrize("name", TASKS)
def test_answers_are_right(name):
  problems = first(name)
  # Brute force over closings is slow where many are open.
  if name == "brackets":
    problems = [p for p in problems if len(p.answer) <= 6]
  assert len(problems) > 20
  for problem in problems:
    assert problem.answer == SOLVERS[name](problem.question), problem


@pytest.mark.parametrize("name", TASKS)
def test_scores(name):
  problems = first(name)
  for one, other in itertools.pairwise(problems):
    assert one.score(f"so</think>\\boxed{{{one.answer}}}").value == 1
    assert one.score(f"so</think>\\boxed{{ {one.answer} }}").value == 1
    assert one.score(one.answer).value == 0
    assert one.score(f"\\boxed{{{one.answer}}}</think>none").value == 0
    if one.answer != other.answer:
      assert one.score(f"\\boxed{{{other.answer}}}").value == 0
  assert len({problem.answer for problem in problems}) > 3


@pytest.mark.parametrize("name", ALL_TASKS)
def test_splits_share_no_content_whatever_the_seed(name):
  train = {p.content for seed in range(4) for p in first(name, 200, seed=seed)}
  held_out = {
    p.content
    for seed in range(4)
    for p in first(name, 50, split="held_out", seed=seed)
  }
  assert len(train) > 300 and len(held_out) > 60
  assert not train & held_out


@pytest.mark.parametrize("name", ALL_TASKS)
def test_a_seed_repeats_itself_and_another_differs(name):
  assert first(name, 10) == first(name, 10)
  assert first(name, 10) != first(name, 10, seed=1)
  contents = [problem.content for problem in first(name, 200)]
  assert len(set(contents)) == 200


def test_the_same_numbers_in_another_order_are_the_same_problem():
  class Fixed(random.Random):
    def __init__(self, numbers):
      self.numbers = list(numbers)

    def randint(self, low, high):
      return self.numbers.pop(0)

    def random(self):
      return 0.9

  one, other = (
    tasks.Sorting(length=3).draw(Fixed(numbers))
    for numbers in ((3, 1, 2), (2, 3, 1))
  )
  assert one.question != other.question and one.content == other.content
  assert problem_lib.is_held_out(one) == problem_lib.is_held_out(other)


def test_swapped_sides_are_the_same_problem():
  problems = [
    tasks.Arithmetic(terms=2, largest=2).draw(random.Random(seed))
    for seed in range(300)
  ]
  contents = {}
  for problem in problems:
    left, sign, right = problem.question.split(" ")[2:5]
    right = right.removesuffix("?")
    sides = (left, right) if sign == "-" else tuple(sorted((left, right)))
    contents.setdefault((sign, sides), set()).add(problem.content)
  assert len(contents) == 9 + 6 + 6
  assert {len(found) for found in contents.values()} == {1}
  assert len(set().union(*contents.values())) == len(contents)


def test_spaces_between_digits_count():
  problem = problem_lib.Problem(
    task="sorting", content="", question="", answer="12, 30", reasoning=""
  )
  for text, value in (("12,30", 1), (" 12 ,  30 ", 1), ("1 2, 30", 0)):
    assert problem.score(f"\\boxed{{{text}}}").value == value


def test_a_small_task_ends():
  task = tasks.Brackets(length=1)
  found = [
    problem.content
    for split in ("train", "held_out")
    for problem in tasks.generate(task, split=split, seed=0)
  ]
  assert sorted(found) == ["(", "<", "["]


@pytest.mark.parametrize("name", TASKS)
def test_supervised_seeds(name):
  for problem in first(name, 10):
    user, assistant = problem.messages()
    assert user == {"role": "user", "content": problem.question}
    text = assistant["reasoning_content"] + "</think>" + assistant["content"]
    assert problem.score(text).value == 1
    assert format_lib.format_score(text, thinking=True, boxed=True).value == 1
    assert assistant["reasoning_content"].count("\n") >= 2


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: tasks.Arithmetic(terms=1), "terms=1"),
    (lambda: tasks.Sorting(length=1), "length=1"),
    (lambda: tasks.Brackets(length=0), "length=0"),
    (lambda: tasks.Knights(people=7), "people=7"),
    (lambda: tasks.generate(TASKS["sorting"], split="x", seed=0), "split='x'"),
  ],
)
def test_bad_arguments(make, message):
  with pytest.raises(ValueError, match=message):
    make()

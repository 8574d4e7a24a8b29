"""Decoys among tests for Node's own runner; see `decoys`.

There is no parser of JavaScript here. Calls of `test` and `it` that begin a
line are copied as far as brackets, texts and comments tell where they end, with
what their last check expects changed; one that cannot be told apart has no
copy. A copy that does not fail on the known solution is no decoy.
"""

import random
import re

_MOST = 8
_ENDINGS = ("again", "also", "twice", "more", "once", "still", "anew")
_TEST = re.compile(
  r"""^[ \t]*(?:await[ ]+)?(?:\w+\.)?(?:test|it)\(\s*(["'`])(.+?)\1\s*,""", re.M
)
_CHECK = re.compile(r"\bassert\w*(?:\.(?:strict\.)?\w+)?\(")
_LITERAL = re.compile(
  r"""(["'])((?:\\.|(?!\1)[^\\\n])*)\1|(?<![\w.$])(\d+(?:\.\d+)?|true|false)\b"""
)
_PAIRS = {"(": ")", "[": "]", "{": "}"}
_SKIPPED = re.compile(
  r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'"""
  r"""|`(?:\\.|[^`\\$]|\$(?!\{))*`""",
  re.DOTALL,
)
# Right of nothing: (left, right) of a check of equality.
_WRONG = (
  lambda rng: (str(low := rng.randint(2, 99)), str(low + 1)),
  lambda rng: (f'"{"ab" * rng.randint(1, 4)}"', f'"{"ba" * 5}"'),
  lambda rng: (f"{rng.randint(2, 9)} * 7", f"{rng.randint(80, 99)}"),
)


def add(text: str, names: set[str], generator: random.Random) -> str:
  """Adds decoys to a file of tests.

  Args:
    text: of the file.
    names: of tests to copy.
    generator: draws names and numbers.
  """
  found = [m for m in _TEST.finditer(text) if m[2] in names]
  if len(found) > _MOST:
    found = generator.sample(found, _MOST)
  # From the end, as each copy moves what follows it.
  for match in sorted(found, key=lambda match: -match.start()):
    end = _closing(text, text.index("(", match.start()))
    if end is None:
      continue
    copied = _changed(text[match.start() : end + 1])
    if copied is not None:
      ending = generator.choice(_ENDINGS)
      copied = copied.replace(match[2], f"{match[2]} {ending}", 1)
      text = f"{text[: end + 1]};\n{copied}{text[end + 1 :]}"
  return "\n".join([text, *_standing(text, names, generator), ""])


def _standing(text, names, generator):
  """Lines of a test that fails whatever the code is."""
  name = (
    f"{generator.choice(sorted(names or {'works'}))}"
    f" {generator.choice(_ENDINGS)} {generator.randint(2, 9)}"
  )
  tag = f"{generator.getrandbits(32):08x}"
  left, right = generator.choice(_WRONG)(generator)
  quoted = '"' + re.sub(r'["\\\n]', " ", name) + '"'
  body = f"{quoted}, () => assert_{tag}.strictEqual({left}, {right})"
  if re.search(r"^\s*(import\s|export\s)", text, re.MULTILINE):
    return [
      f'import test_{tag} from "node:test";',
      f'import assert_{tag} from "node:assert";',
      f"test_{tag}({body});",
    ]
  return [
    f'const assert_{tag} = require("node:assert");',
    f'require("node:test")({body});',
  ]


def _changed(call: str) -> str | None:
  """Returns a call of a test whose last check expects something else."""
  checks = list(_CHECK.finditer(call))
  if not checks:
    return None
  begin = checks[-1].end() - 1
  end = _closing(call, begin)
  if end is None:
    return None
  places = _arguments(call, begin, end)
  first, last = places[min(1, len(places) - 1)]
  literals = list(_LITERAL.finditer(call, first, last))
  if not literals:
    return None
  literal = literals[-1]
  return call[: literal.start()] + _other(literal) + call[literal.end() :]


def _other(literal: re.Match) -> str:
  if literal[1]:
    return f"{literal[1]}{literal[2]}x{literal[1]}"
  if literal[3] in ("true", "false"):
    return "false" if literal[3] == "true" else "true"
  return f"{literal[3]}1" if "." in literal[3] else str(int(literal[3]) + 1)


def _arguments(text: str, begin: int, end: int) -> list[tuple[int, int]]:
  """Returns where each argument between two brackets begins and ends."""
  places, depth, last = [], 0, begin + 1
  for place, sign in _signs(text, begin + 1, end):
    if sign in _PAIRS:
      depth += 1
    elif sign in ")]}":
      depth -= 1
    elif sign == "," and depth == 0:
      places.append((last, place))
      last = place + 1
  return [*places, (last, end)]


def _closing(text: str, begin: int) -> int | None:
  """Returns where the bracket at `begin` is closed; None: nobody can tell."""
  waiting = []
  for place, sign in _signs(text, begin, len(text)):
    if sign in _PAIRS:
      waiting.append(_PAIRS[sign])
    elif sign in ")]}":
      if sign != waiting.pop():
        return None
      if not waiting:
        return place
    elif sign == "`":  # with something in it that is computed
      return None
  return None


def _signs(text: str, begin: int, end: int):
  """Yields places and characters that are no part of a text or comment."""
  place = begin
  while place < end:
    skipped = _SKIPPED.match(text, place)
    if skipped:
      place = skipped.end()
    else:
      yield place, text[place]
      place += 1

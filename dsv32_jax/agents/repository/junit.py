"""JUnit reports, which may come from anybody, as outcomes by test."""

import re
from xml.etree import ElementTree

import junitparser

OUTCOMES = ("passed", "skipped", "failed", "error")
MAX_CHARACTERS = 8 << 20
# Suites that a runner puts around all tests.
_OF_RUNNERS = ("", "pytest")
# Entities are declared there; a report has no use for it.
_DECLARATION = re.compile(r"<!(?!--|\[CDATA\[)")


def outcomes(text: str, prefix: str = "") -> dict[str, str]:
  """Reads a report.

  Args:
    text: XML.
    prefix: of every id: the file, where reports do not name it.

  Returns:
    Outcome by id, "class::name", below the names of nested suites. Of a test
    that is reported more than once it is the worst, in the order of OUTCOMES.

  Raises:
    ValueError: it is no report, too large, or declares a document type.
  """
  if len(text) > MAX_CHARACTERS:
    raise ValueError(f"the report has more than {MAX_CHARACTERS} characters")
  if _DECLARATION.search(text):
    raise ValueError("the report declares a document type")
  try:
    root = ElementTree.fromstring(text)
  except (ElementTree.ParseError, ValueError) as error:
    raise ValueError(f"no JUnit report: {error}") from error
  if root.tag not in ("testsuites", "testsuite"):
    raise ValueError(f"no JUnit report: the root is {root.tag[:100]!r}")
  found: dict[str, str] = {}
  waiting = [(root, (prefix,))]
  while waiting:
    element, path = waiting.pop()
    name = element.get("name", "")
    if element.tag == "testsuite" and name not in _OF_RUNNERS:
      path = (*path, name)
    for child in element:
      if child.tag == "testsuite":
        waiting.append((child, path))
      elif child.tag == "testcase":
        case = junitparser.TestCase.fromelem(child)
        parts = (*path, case.classname or "", case.name or "")
        test = "::".join(part for part in parts if part)
        known = found.get(test, OUTCOMES[0])
        found[test] = max(known, _outcome(case), key=OUTCOMES.index)
  return found


def _outcome(case: junitparser.TestCase) -> str:
  if case.is_error:
    return "error"
  if case.is_failure:
    return "failed"
  return "skipped" if case.is_skipped else "passed"

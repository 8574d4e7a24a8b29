"""Pairs of an issue and a patch, of a git history or of a file of instances.

Both become the form of SWE-bench: the commit before, a statement, the patch of
the sources and that of the tests.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import os
import pathlib
import re
from typing import Any

import unidiff

from dsv32_jax.agents import tables
from dsv32_jax.agents.repository import languages
from dsv32_jax.agents.repository import tree

# Of a patch; a command line takes no more, and no single change has as many.
MOST_FILES = 1000
_CLOSES = re.compile(
  r"(?:close[sd]?|fix(?:e[sd])?|resolve[sd]?):?\s+#(\d+)", re.I
)
_MERGE = re.compile(r"^Merge (?:pull request|branch|remote).*\n?")
_TRAILER = re.compile(r"^[A-Z][A-Za-z-]+: .*(?:<.*@.*>|https?://\S+)$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
  """An issue with the patch that resolved it.

  Attributes:
    id: of the instance.
    repository: folder of a clone.
    commit: before the patch.
    statement: the issue, or what stands for it.
    patch: unified diff of all but tests.
    test_patch: unified diff of tests and of what decides how they run.
    language: key of languages.LANGUAGES; empty if no test of one is touched.
  """

  id: str
  repository: str
  commit: str
  statement: str
  patch: str
  test_patch: str
  language: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchedFile:
  """One file of a patch.

  Attributes:
    path: of the file.
    lines: added and removed.
    is_removed: whether the patch removes it.
    is_binary: whether git takes it for no text.
  """

  path: str
  lines: int
  is_removed: bool
  is_binary: bool


def patched_files(patch: str) -> list[PatchedFile]:
  """Reads a patch; ValueError if it is none."""
  try:
    files = unidiff.PatchSet(patch)
  except unidiff.UnidiffParseError as error:
    raise ValueError(f"no unified diff: {error}") from error
  return [
    PatchedFile(
      path=file.path,
      lines=file.added + file.removed,
      is_removed=file.is_removed_file,
      is_binary=file.is_binary_file,
    )
    for file in files
  ]


def read_issues(path: str | os.PathLike) -> dict[int, str]:
  """Reads issues, a JSONL file of {number, title, body}.

  Raises:
    ValueError: naming file and row, if one is of another form.
  """
  found = {}
  for row in tables.read_jsonl(pathlib.Path(path)):
    number, title, body = (row.get(k) for k in ("number", "title", "body"))
    if type(number) is not int or not isinstance(title, str):
      raise ValueError(f"{path}: an issue needs number and title: {row!r:.200}")
    found[number] = f"{title}\n\n{body or ''}".strip()
  return found


def from_history(
  repository: str,
  revision: str,
  limit: int,
  issues: Mapping[int, str] | None = None,
) -> Iterator[Candidate]:
  """Yields the changes of a history, the newest first.

  Each commit of the first-parent line counts with its first parent, so that a
  merge is the whole of what it merged. The statement is the issue that the
  message says it closes, if that is known, else the message.

  Args:
    repository: folder of a clone.
    revision: where to begin.
    limit: commits at most.
    issues: text by number.

  Raises:
    ValueError: there is no such repository or revision.
  """
  head = tree.resolve(repository, revision)
  log = tree.git(
    repository,
    "log",
    "--first-parent",
    f"--max-count={limit}",
    "-z",
    "--format=%H%n%P%n%B",
    head,
  )
  name = pathlib.Path(repository).resolve().name
  for entry in log.decode("utf-8", "replace").split("\0"):
    commit, parents, message = (*entry.split("\n", 2), "", "")[:3]
    if not parents:
      continue  # The first commit changes nothing.
    base = parents.split()[0]
    paths = tree.git(
      repository, "diff", "--name-only", "-z", *_PLAIN, base, commit
    )
    changed = os.fsdecode(paths).split("\0")[:-1]
    language = _language_of(changed)
    is_test = languages.find(language).is_test if language else lambda _: False
    sources = [path for path in changed if not is_test(path)]
    tests = [path for path in changed if is_test(path)]
    yield Candidate(
      id=f"{name}-{commit[:12]}",
      repository=repository,
      commit=base,
      statement=_statement(message, issues or {}),
      patch=_diff(repository, base, commit, sources),
      test_patch=_diff(repository, base, commit, tests),
      language=language,
    )


def from_instances(
  path: str | os.PathLike, repository: str
) -> Iterator[Candidate]:
  """Yields the instances of a JSONL file in the form of SWE-bench.

  Args:
    path: of the file; of each row instance_id, repo, base_commit,
      problem_statement, patch and test_patch are read.
    repository: folder that holds the clones as OWNER/NAME or OWNER__NAME, or
      the clone of all instances.

  Raises:
    ValueError: a row lacks a field, or holds no text there.
  """
  for number, row in enumerate(tables.read_jsonl(pathlib.Path(path)), 1):
    for field in _FIELDS:
      if not isinstance(row.get(field), str):
        raise ValueError(f"{path}:{number}: {field} must be text")
    try:
      paths = [file.path for file in patched_files(row["test_patch"])]
    except ValueError:
      paths = []
    yield Candidate(
      id=row["instance_id"],
      repository=_clone_of(row, repository),
      commit=row["base_commit"],
      statement=row["problem_statement"],
      patch=row["patch"],
      test_patch=row["test_patch"],
      language=_language_of(paths),
    )


_FIELDS = (
  "instance_id",
  "repo",
  "base_commit",
  "problem_statement",
  "patch",
  "test_patch",
)
_PLAIN = (
  "--no-ext-diff",
  "--no-textconv",
  "--no-renames",
  "--no-color",
  "--full-index",
)


def _clone_of(row: Mapping[str, Any], repository: str) -> str:
  root = pathlib.Path(repository)
  for name in (row["repo"], row["repo"].replace("/", "__")):
    parts = pathlib.PurePosixPath(name).parts
    if (
      ".." not in parts and not name.startswith("/") and (root / name).is_dir()
    ):
      return str(root / name)
  return repository


def _language_of(paths: list[str]) -> str:
  """The language most of whose tests are among the files, or nothing."""
  counts = {
    name: sum(map(language.is_run, paths))
    for name, language in languages.LANGUAGES.items()
  }
  name = max(counts, key=counts.__getitem__)
  return name if counts[name] else ""


def _diff(repository, base, commit, paths) -> str:
  if not paths:
    return ""
  # Paths are literal, whatever characters they hold.
  found = tree.git(
    repository,
    "--literal-pathspecs",
    "-c",
    "core.quotePath=false",
    "diff",
    *_PLAIN,
    base,
    commit,
    "--",
    *paths[:MOST_FILES],
  )
  return found.decode("utf-8", "replace")


def _statement(message: str, issues: Mapping[int, str]) -> str:
  for number in map(int, _CLOSES.findall(message)):
    if number in issues:
      return issues[number]
  lines = _MERGE.sub("", message).strip().split("\n")
  while lines and (not lines[-1].strip() or _TRAILER.match(lines[-1])):
    lines.pop()
  return "\n".join(lines).strip()

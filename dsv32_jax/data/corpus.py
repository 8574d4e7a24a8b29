"""Real text that every machine has: the Python standard library's sources.

Files are taken in the order of their relative paths. Those that are not UTF-8,
that repeat another one, or that a program generated (character maps, help
topics: tables, near copies of one another) are left out. Which side of the
split a file is on depends on its content alone, so a file that exists here and
on another machine is on the same side in both.
"""

import dataclasses
import functools
import hashlib
import os
import sysconfig

# One file in this many is held out.
HELD_OUT_ONE_IN = 16
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
_HEAD = 300


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
  """A source file.

  Attributes:
    name: path below the library's folder, with forward slashes.
    text: content.
    sha256: of the content's bytes.
  """

  name: str
  text: str
  sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
  """The split library, and what was left out.

  Attributes:
    train: documents to train on.
    held_out: documents that training never sees.
    num_files: files looked at.
    not_utf8: names of files in another encoding.
    num_duplicates: files that repeat an earlier one, or are empty.
    num_generated: files that say near their top that they are generated.
  """

  train: tuple[Document, ...]
  held_out: tuple[Document, ...]
  num_files: int
  not_utf8: tuple[str, ...]
  num_duplicates: int
  num_generated: int


@functools.lru_cache(maxsize=1)
def stdlib_documents() -> Corpus:
  """Reads the running Python's standard library.

  Returns:
    The corpus: about 30 MB of text, 10 where the library's tests are absent.

  Raises:
    ValueError: this Python has no source files (a zipped or stripped one).
  """
  corpus = read_folder(sysconfig.get_paths()["stdlib"])
  if not corpus.train or not corpus.held_out:
    raise ValueError(
      f"{sysconfig.get_paths()['stdlib']}: this Python carries no source files"
    )
  return corpus


def read_folder(root: str) -> Corpus:
  """Reads, filters and splits the .py files below a folder."""
  sides = {True: [], False: []}
  seen = {hashlib.sha256(b"").hexdigest()}
  not_utf8 = []
  num_files = num_duplicates = num_generated = 0
  for name in _source_files(root):
    num_files += 1
    with open(os.path.join(root, name), "rb") as file:
      content = file.read()
    try:
      text = content.decode("utf-8")
    except UnicodeDecodeError:
      not_utf8.append(name)
      continue
    digest = hashlib.sha256(content).hexdigest()
    if digest in seen:
      num_duplicates += 1
      continue
    seen.add(digest)
    if "generated" in text[:_HEAD]:
      num_generated += 1
      continue
    document = Document(name=name, text=text, sha256=digest)
    sides[int(digest, 16) % HELD_OUT_ONE_IN == 0].append(document)
  return Corpus(
    train=tuple(sides[False]),
    held_out=tuple(sides[True]),
    num_files=num_files,
    not_utf8=tuple(not_utf8),
    num_duplicates=num_duplicates,
    num_generated=num_generated,
  )


def _source_files(root: str) -> list[str]:
  """Returns the relative paths of the .py files, sorted."""
  names = []
  for folder, subfolders, files in os.walk(root):
    subfolders[:] = [x for x in subfolders if x not in _SKIPPED_FOLDERS]
    names.extend(
      os.path.relpath(os.path.join(folder, file), root).replace(os.sep, "/")
      for file in files
      if file.endswith(".py")
    )
  return sorted(names)

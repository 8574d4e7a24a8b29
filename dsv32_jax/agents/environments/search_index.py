"""A local corpus behind full-text search: documents in SQLite with FTS5.

Documents are cut into chunks of whole lines, which are what is ranked (BM25,
titles above text); of each document the best chunk counts. Whatever a query
holds is words to look for, never FTS5 syntax; "words in quotes" are a phrase.
"""

from collections.abc import Iterable, Iterator
import dataclasses
import functools
import hashlib
import os
import pathlib
import re
import sqlite3
from typing import Protocol

from dsv32_jax.agents import tools

CHUNK_CHARS = 1500
_MAX_TERMS = 64
_MAX_CHUNKS = 4000
_SNIPPET_TOKENS = 40
_TITLE_WEIGHT = 4.0
_TERM = re.compile(r'"([^"]*)"|(\S+)')
_SCHEMA = """
CREATE TABLE documents (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, title TEXT NOT NULL,
  text TEXT NOT NULL);
CREATE VIRTUAL TABLE chunks USING fts5 (
  title, body, document UNINDEXED, tokenize = 'porter unicode61');
CREATE TABLE identity (sha256 TEXT NOT NULL);
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
  """A text with a name.

  Attributes:
    name: by which it is opened, such as an address.
    title: shown among hits.
    text: all of it.
  """

  name: str
  title: str
  text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hit:
  """A document that a search found, with a piece of its text."""

  name: str
  title: str
  snippet: str


class Source(Protocol):
  """What the environment searches: a local index, or a service."""

  async def search(self, query: str, *, offset: int, count: int) -> list[Hit]:
    """Returns hits, best first, without the first `offset`.

    Raises:
      tools.ToolError: the query has no words, or no answer comes.
    """

  async def open(self, name: str) -> Document:
    """Returns a document; raises tools.ToolError if it cannot be had."""


def build(path: str | os.PathLike, documents: Iterable[Document]) -> str:
  """Writes an index, which appears at `path` once it is whole.

  Args:
    path: of the SQLite file; one that is there is replaced.
    documents: no two of one name.

  Returns:
    The sha256 of all documents in order, which the index holds as well.

  Raises:
    ValueError: there is no document, or two have one name.
  """
  path = pathlib.Path(path)
  partial = path.with_name(path.name + ".partial")
  partial.unlink(missing_ok=True)
  connection = sqlite3.connect(partial)
  try:
    identity = _fill(connection, documents, path)
    connection.execute("INSERT INTO chunks (chunks) VALUES ('optimize')")
    connection.commit()
  finally:
    connection.close()
  os.replace(partial, path)
  return identity


def _fill(connection, documents, where):
  """Makes the tables; returns the identity."""
  digest, number = hashlib.sha256(), 0
  connection.executescript(_SCHEMA)
  for number, document in enumerate(documents, 1):
    _insert(connection, number, document)
    for text in (document.name, document.title, document.text):
      digest.update(hashlib.sha256(text.encode()).digest())
  if not number:
    raise ValueError(f"{where}: an index needs at least one document")
  connection.execute("INSERT INTO identity VALUES (?)", [digest.hexdigest()])
  return digest.hexdigest()


def _insert(connection, number, document):
  try:
    connection.execute(
      "INSERT INTO documents VALUES (?, ?, ?, ?)",
      (number, document.name, document.title, document.text),
    )
  except sqlite3.IntegrityError as error:
    raise ValueError(f"two documents are named {document.name!r}") from error
  connection.executemany(
    "INSERT INTO chunks VALUES (?, ?, ?)",
    [(document.title, chunk, number) for chunk in split(document.text)],
  )


def split(text: str, most: int = CHUNK_CHARS) -> list[str]:
  """Cuts a text at line ends into pieces of at most `most` characters.

  A longer line is cut where it is. Joined, the pieces are the text; an empty
  text is one empty piece.
  """
  pieces, current = [], ""
  for line in text.splitlines(keepends=True):
    while len(current) + len(line) > most:
      if not current:
        current, line = line[:most], line[most:]
      pieces.append(current)
      current = ""
    current += line
  return [*pieces, current] if current or not pieces else pieces


class LocalIndex:
  """An index that `build` wrote, read-only; see Source.

  Attributes:
    identity: sha256 of its documents.
  """

  def __init__(self, path: str | os.PathLike):
    """Opens the file.

    Raises:
      ValueError: it is not there, or is no index.
    """
    path = pathlib.Path(path).absolute()
    try:
      self._connection = sqlite3.connect(
        f"{path.as_uri()}?mode=ro", uri=True, check_same_thread=False
      )
      found = self._connection.execute("SELECT sha256 FROM identity").fetchone()
    except sqlite3.Error as error:
      raise ValueError(f"{path} is no index of documents: {error}") from error
    self._begin(found[0])

  def _begin(self, identity):
    self.identity = identity
    # A query's pages are asked for one by one.
    self._ranked = functools.lru_cache(maxsize=512)(self._rank)

  async def search(self, query: str, *, offset: int, count: int) -> list[Hit]:
    """See Source."""
    return self.search_now(query, offset=offset, count=count)

  async def open(self, name: str) -> Document:
    """See Source."""
    return self.open_now(name)

  def search_now(self, query: str, *, offset: int, count: int) -> list[Hit]:
    """As `search`, for whoever does not wait."""
    expression = match_expression(query)
    best = self._ranked(expression)[offset : offset + count]
    hits = []
    for document, chunk in best:
      name, title = self._connection.execute(
        "SELECT name, title FROM documents WHERE id = ?", (document,)
      ).fetchone()
      (snippet,) = self._connection.execute(
        "SELECT snippet(chunks, 1, '', '', '...', ?) FROM chunks"
        " WHERE chunks MATCH ? AND rowid = ?",
        (_SNIPPET_TOKENS, expression, chunk),
      ).fetchone()
      hits.append(Hit(name=name, title=title, snippet=snippet))
    return hits

  def _rank(self, expression: str) -> list[tuple[int, int]]:
    """Returns each document that matches with its best chunk, best first."""
    ranked = self._connection.execute(
      "SELECT rowid, document FROM chunks WHERE chunks MATCH ?"
      f" ORDER BY bm25(chunks, {_TITLE_WEIGHT}, 1.0), rowid LIMIT ?",
      (expression, _MAX_CHUNKS),
    )
    best: dict[int, int] = {}
    for chunk, document in ranked:
      best.setdefault(document, chunk)
    return list(best.items())

  def open_now(self, name: str) -> Document:
    """As `open`, for whoever does not wait."""
    row = self._connection.execute(
      "SELECT name, title, text FROM documents WHERE name = ?",
      (_unicode(name),),
    ).fetchone()
    if row is None:
      raise tools.ToolError(f"there is no document {name[:200]!r}")
    return Document(name=row[0], title=row[1], text=row[2])

  def documents(self) -> Iterator[Document]:
    """Yields all documents in the order of `build`."""
    rows = self._connection.execute(
      "SELECT name, title, text FROM documents ORDER BY id"
    )
    for name, title, text in rows:
      yield Document(name=name, title=title, text=text)

  def document_frequency(self, phrase: str) -> int:
    """Returns in how many documents a phrase stands."""
    (number,) = self._connection.execute(
      "SELECT count(DISTINCT document) FROM chunks WHERE chunks MATCH ?",
      (match_expression(f'"{phrase}"'),),
    ).fetchone()
    return number

  def close(self) -> None:
    """Closes the file."""
    self._connection.close()


class MemoryIndex(LocalIndex):
  """An index of few documents that is made where it is needed."""

  def __init__(self, documents: Iterable[Document]):
    """Makes it; ValueError as of `build`."""
    self._connection = sqlite3.connect(":memory:", check_same_thread=False)
    try:
      identity = _fill(self._connection, documents, "in memory")
    except BaseException:
      self._connection.close()
      raise
    self._begin(identity)


def match_expression(query: str) -> str:
  """Returns the FTS5 expression of any of a query's words and phrases.

  Raises:
    tools.ToolError: it has no word, or too many.
  """
  found = (phrase or word for phrase, word in _TERM.findall(_unicode(query)))
  terms = list(dict.fromkeys(x for x in found if re.search(r"\w", x)))
  if not terms:
    raise tools.ToolError("the query has no words")
  if len(terms) > _MAX_TERMS:
    raise tools.ToolError(f"the query has more than {_MAX_TERMS} words")
  quoted = ('"' + term.replace('"', " ") + '"' for term in terms)
  return " OR ".join(quoted)


def _unicode(text: str) -> str:
  """Text that SQLite can take; what has no UTF-8 form is in no document."""
  return text.encode("utf-8", "replace").decode().replace("\0", " ")

"""Byte-level BPE with DeepSeek's special tokens.

Text is never trusted: `encode` turns a special token's string into ordinary
text tokens, and only ids named by the program are special. Two tokenizers of
the `tokenizers` library stand behind one `Tokenizer`: one knows the added
tokens (to decode, and to encode strings the program itself rendered), one has
them removed (to encode everything else). Setting `encode_special_tokens` on a
single one is not enough: it spares tokens marked special only, and published
files mark the role and thinking tokens as not special.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import hashlib
import json
import os
import pathlib
import re

import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import trainers

# The order is the order of the ids of a tokenizer trained here: bos 0, eos 1.
# \uff5c is the full-width bar, \u2581 the lower one eighth block.
SPECIAL_TOKENS = {
  "bos": "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
  "eos": "<\uff5cend\u2581of\u2581sentence\uff5c>",
  "pad": "<\uff5c\u2581pad\u2581\uff5c>",
  "user": "<\uff5cUser\uff5c>",
  "assistant": "<\uff5cAssistant\uff5c>",
  "think_start": "<think>",
  "think_end": "</think>",
  "dsml": "\uff5cDSML\uff5c",
  "fim_begin": "<\uff5cfim\u2581begin\uff5c>",
  "fim_hole": "<\uff5cfim\u2581hole\uff5c>",
  "fim_end": "<\uff5cfim\u2581end\uff5c>",
}
# No token of a tokenizer trained here goes beyond three digits, a word with the
# space before it, signs likewise, or white space.
_DIGITS = r"\p{N}{1,3}"
NUM_BYTES = 256
MAX_FILE_BYTES = 256 * 2**20
# Embedding tables are sized by the largest id.
MAX_VOCAB_SIZE = 2**22


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
  """Where the tokenizer comes from.

  Attributes:
    path: an existing tokenizer.json; None trains one on the data sources.
    vocab_size: number of ids of a trained tokenizer, special tokens included.
    whole_format: whether one trained on episodes makes the fixed texts of tool
      calls and their results single tokens, for small windows.
    sample_bytes: characters of text to train on, spread over the sources.
  """

  path: str | None = None
  vocab_size: int = 4096
  whole_format: bool = False
  sample_bytes: int = 4_000_000

  def __post_init__(self):
    smallest = NUM_BYTES + len(SPECIAL_TOKENS)
    if self.vocab_size < smallest:
      raise ValueError(
        f"tokenizer.vocab_size={self.vocab_size} is below {smallest}, the"
        " bytes and the special tokens"
      )
    if self.sample_bytes <= 0:
      raise ValueError(
        f"tokenizer.sample_bytes={self.sample_bytes} must be positive"
      )


class Tokenizer:
  """Encodes text to ids and back; made by `load` or `train`.

  Attributes:
    bos_id, eos_id: ids that open and close a document.
    vocab_size: one more than the largest id.
  """

  def __init__(self, content: str, origin: str):
    """Builds the tokenizer from the text of a tokenizer.json.

    Args:
      content: JSON text.
      origin: what an error message calls it, usually the file name.

    Raises:
      ValueError: the content is not a usable tokenizer; the message is one
        line that starts with `origin`.
    """
    settings = _parse(content, origin)
    # Added tokens of white space alone are text, and stay.
    special = [x for x in settings["added_tokens"] if x["content"].strip()]
    plain_settings = {
      **settings,
      "added_tokens": [x for x in settings["added_tokens"] if x not in special],
      "post_processor": None,
    }
    self._origin = origin
    self._content = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    self._rendered = _build(settings, origin)
    self._plain = _build(plain_settings, origin)
    self._special_ids = {
      name: self._rendered.token_to_id(string)
      for name, string in SPECIAL_TOKENS.items()
    }
    self.bos_id = self.special_id("bos")
    self.eos_id = self.special_id("eos")
    # One more than the largest id.
    self.vocab_size = 1 + max(self._rendered.get_vocab().values())
    if self.vocab_size > MAX_VOCAB_SIZE:
      raise ValueError(
        f"{origin}: token id {self.vocab_size - 1} is above {MAX_VOCAB_SIZE}"
      )
    self._check_plain_text_stays_plain(special)

  def _check_plain_text_stays_plain(self, added_tokens):
    for token in added_tokens:
      if token["id"] in self.encode(token["content"]):
        raise ValueError(
          f"{self._origin}: the text {token['content']!r} encodes to the"
          " added token of that name even as plain text"
        )

  @property
  def content(self) -> str:
    """Returns the text of its tokenizer.json."""
    return self._content

  @property
  def fingerprint(self) -> str:
    """Returns the sha256 of the content, for run manifests."""
    return hashlib.sha256(self._content.encode()).hexdigest()

  def special_id(self, name: str) -> int:
    """Returns the id of a special token.

    Args:
      name: a key of SPECIAL_TOKENS, such as "bos" or "think_end".

    Raises:
      ValueError: no such name, or this tokenizer lacks the token.
    """
    if name not in SPECIAL_TOKENS:
      raise ValueError(f"{name=} is none of {sorted(SPECIAL_TOKENS)}")
    token_id = self._special_ids[name]
    if token_id is None:
      raise ValueError(
        f"{self._origin}: has no token {SPECIAL_TOKENS[name]!r} ({name})"
      )
    return token_id

  @property
  def special_ids(self) -> list[int]:
    """Returns the ids of all of SPECIAL_TOKENS that this tokenizer has."""
    return [x for x in self._special_ids.values() if x is not None]

  def encode(self, text: str) -> list[int]:
    """Encodes text; a special token's string is text like any other."""
    return self._plain.encode(text, add_special_tokens=False).ids

  def encode_released(self, text: str) -> list[int]:
    """Encodes as `encode`, while other threads of the program go on.

    For a server: a megabyte takes a second, which `encode` takes from all.
    """
    # The library gives the interpreter free for batches alone.
    (encoded,) = self._plain.encode_batch([text], add_special_tokens=False)
    return encoded.ids

  def encode_rendered(self, text: str) -> list[int]:
    """Encodes a string of the program's own, special tokens and all.

    Args:
      text: must hold nothing that a user, a model or a tool wrote: such parts
        go through `encode`.
    """
    return self._rendered.encode(text, add_special_tokens=False).ids

  def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
    """Encodes strings as plain text and passes ids through, in order."""
    token_ids = []
    for part in parts:
      if isinstance(part, str):
        token_ids.extend(self.encode(part))
      else:
        token_ids.append(int(part))
    return token_ids

  def decode(
    self, token_ids: Sequence[int], skip_special_tokens: bool = False
  ) -> str:
    """Returns the text of the ids.

    Args:
      token_ids: integers below vocab_size.
      skip_special_tokens: leaves out every added token.

    Raises:
      ValueError: an id outside the vocabulary.
    """
    token_ids = [int(token_id) for token_id in token_ids]
    for token_id in token_ids:
      if not 0 <= token_id < self.vocab_size:
        raise ValueError(f"{token_id=} is not below {self.vocab_size=}")
    if skip_special_tokens:
      added = self._rendered.get_added_tokens_decoder()
      token_ids = [x for x in token_ids if x not in added]
    return self._rendered.decode(token_ids, skip_special_tokens=False)

  def save(self, path: str | os.PathLike):
    """Writes tokenizer.json, whole or not at all."""
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    partial.write_text(self._content, encoding="utf-8")
    os.replace(partial, target)


def load(path: str | os.PathLike) -> Tokenizer:
  """Reads a tokenizer.json.

  Raises:
    ValueError: the file is missing, too large, not JSON, or not a tokenizer
      with bos and eos; one line that names the file.
  """
  path = pathlib.Path(path)
  try:
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
      raise ValueError(f"{path}: {size} bytes are too many for a tokenizer")
    content = path.read_bytes().decode("utf-8")
  except OSError as error:
    raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: is not UTF-8: {error.reason}") from error
  return Tokenizer(content, str(path))


def train(
  texts: Iterable[str], vocab_size: int, phrases: Sequence[str] = ()
) -> Tokenizer:
  """Trains a byte-level BPE; the same texts give the same tokenizer.

  Args:
    texts: documents; whatever they contain, every string can be encoded.
    vocab_size: number of ids, special tokens (the first ones) included. Little
      text gives fewer.
    phrases: strings that may become single tokens, where words and signs would
      be apart; they do if the texts hold them often.

  Raises:
    ValueError: vocab_size cannot hold the bytes and the special tokens.
  """
  TokenizerConfig(vocab_size=vocab_size)
  model = tokenizers.Tokenizer(models.BPE())
  pieces = _pieces_with(phrases) if phrases else _DIGITS
  model.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(pieces), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not phrases),
    ]
  )
  model.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    min_frequency=2,
    show_progress=False,
    special_tokens=list(SPECIAL_TOKENS.values()),
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
  )
  model.train_from_iterator(texts, trainer)
  return Tokenizer(model.to_str(), "trained tokenizer")


def _pieces_with(phrases: Sequence[str]) -> str:
  """One expression for all pieces: a second one would cut phrases again."""
  whole = "|".join(
    # Oniguruma takes no line end behind a backslash.
    re.escape(phrase).replace("\\\n", "\\n")
    for phrase in sorted(phrases, key=len, reverse=True)
  )
  signs = rf"(?:(?!{whole})[^\s\p{{L}}\p{{N}}])+"
  words = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+"
  return rf"{whole}|{_DIGITS}|{words}| ?{signs}|\s+(?!\S)|\s+"


def _parse(content: str, origin: str) -> dict:
  """Parses and checks tokenizer.json's text; raises ValueError."""
  try:
    settings = json.loads(content)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{origin}: is not JSON: {_line(error)}") from error
  if not isinstance(settings, dict) or not isinstance(
    settings.get("model"), dict
  ):
    raise ValueError(f"{origin}: is not a tokenizer: no model section")
  added_tokens = settings.get("added_tokens") or []
  if not isinstance(added_tokens, list) or not all(
    isinstance(token, dict)
    and isinstance(token.get("content"), str)
    and type(token.get("id")) is int
    for token in added_tokens
  ):
    raise ValueError(f"{origin}: added_tokens is not a list of tokens")
  if settings["model"].get("dropout"):
    raise ValueError(f"{origin}: model.dropout makes encoding random")
  # Truncation would lose text silently, padding would add tokens.
  return {
    **settings,
    "added_tokens": added_tokens,
    "truncation": None,
    "padding": None,
  }


def _build(settings: dict, origin: str) -> tokenizers.Tokenizer:
  try:
    return tokenizers.Tokenizer.from_str(json.dumps(settings))
  # The library raises a bare Exception on a bad file; a panic inside it is
  # a BaseException that is neither an exit nor an interrupt.
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException as error:
    raise ValueError(f"{origin}: is not a tokenizer: {_line(error)}") from error


def _line(error: BaseException) -> str:
  return " ".join(str(error).split())[:200]

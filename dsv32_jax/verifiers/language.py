r"""Language consistency: the share of words in the language asked for.

R1 rewards Num(words in target language) / Num(words) of the thinking; V3.2
keeps a reward of this kind and publishes no form. Ours tells languages apart
by their scripts, so not English from French. A Han or kana character is a
word, a run of other letters is one. Code, formulas and digits are no words.
"""

import re

from dsv32_jax.verifiers import score

# Letters of each script, as ranges of a regular expression.
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f"
_KANA = "\u3041-\u3096\u30a1-\u30fa\u30fc"
_SCRIPTS = {
  "arabic": "\u0620-\u064a\u0671-\u06d3",
  "cyrillic": "\u0400-\u052f",
  "devanagari": "\u0900-\u097f",
  "greek": "\u0370-\u03ff",
  "han": _HAN,
  "hangul": "\uac00-\ud7a3",
  "kana": _KANA,
  "latin": "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff",
  "thai": "\u0e01-\u0e3a\u0e40-\u0e4e",
}
_LANGUAGES = {
  "ar": ("arabic",),
  "de": ("latin",),
  "el": ("greek",),
  "en": ("latin",),
  "es": ("latin",),
  "fr": ("latin",),
  "hi": ("devanagari",),
  "ja": ("han", "kana"),
  "ko": ("hangul",),
  "ru": ("cyrillic",),
  "th": ("thai",),
  "zh": ("han",),
}
_NOT_PROSE = re.compile(
  r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$"
  r"|\\\[.*?\\\]|\\\(.*?\\\)|\\[A-Za-z]+(?:\{[^{}]*\})*|https?://\S+",
  re.DOTALL,
)
_WORD = re.compile(f"[{_HAN}{_KANA}]|[^\\W\\d_{_HAN}{_KANA}]+")


def language_share(text: str, language: str) -> float:
  """Share of the words that are in the script of a language, 1 if no words.

  Raises:
    ValueError: if the language is unknown.
  """
  if language not in _LANGUAGES:
    raise ValueError(f"{language=} must be one of {', '.join(_LANGUAGES)}")
  letters = "".join(_SCRIPTS[script] for script in _LANGUAGES[language])
  inside = re.compile(f"[{letters}]+")
  words = _WORD.findall(_NOT_PROSE.sub(" ", text))
  if not words:
    return 1.0
  return sum(bool(inside.fullmatch(word)) for word in words) / len(words)


def language_score(text: str, language: str) -> score.Score:
  """The share as a reward."""
  return score.Score(value=language_share(text, language))

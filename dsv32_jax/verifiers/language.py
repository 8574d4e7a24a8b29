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
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_FORMULAS = ((r"\[", r"\]"), (r"\(", r"\)"), ("$$", "$$"))
_NOT_PROSE = re.compile(r"\$[^$\n]*\$|\\[A-Za-z]+(?:\{[^{}]*\})*|https?://\S+")
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
  text = _CODE.sub(" ", text)
  for opening, closing in _FORMULAS:
    text = _without(text, opening, closing)
  words = _WORD.findall(_NOT_PROSE.sub(" ", text))
  if not words:
    return 1.0
  return sum(bool(inside.fullmatch(word)) for word in words) / len(words)


def _without(text: str, opening: str, closing: str) -> str:
  """Leaves out what stands between marks; an opening alone opens nothing.

  A regular expression would look for the end anew behind every opening.
  """
  kept, place = [], 0
  while (begin := text.find(opening, place)) >= 0:
    end = text.find(closing, begin + len(opening))
    if end < 0:
      break
    kept.append(text[place:begin])
    place = end + len(closing)
  return " ".join([*kept, text[place:]])


def language_score(text: str, language: str) -> score.Score:
  """The share as a reward."""
  return score.Score(value=language_share(text, language))

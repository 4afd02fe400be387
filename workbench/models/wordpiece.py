"""Sentences as integer codes, by the pieces of words that MiniLM was trained on.

The rules are BERT's: clean, lower case, accents off; a break at spaces, at each mark of punctuation
and at each Chinese character; then the longest piece of the vocabulary, from the left.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

LONGEST_WORD = 100  # characters; a longer word is unknown
PADDING, UNKNOWN, START, END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"


class WordPiece:
    """A tokenizer: text in, codes of a vocabulary out.

    Special pieces such as "[SEP]" that stand in a text are text, so no sentence can forge them.

    Args:
        vocabulary: the pieces in the order of their codes; ``##`` marks one that goes on a word.

    Raises:
        ValueError: the vocabulary lacks one of the four special pieces.

    Reference: Schuster and Nakajima (2012), "Japanese and Korean voice search"; Devlin et al.
    (2019), "BERT: pre-training of deep bidirectional transformers".

    >>> pieces = WordPiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "film", "##s", "!"])
    >>> pieces.codes("Films!")
    [4, 5, 6]
    >>> pieces.encode(["Films!"], length=6)
    tensor([[2, 4, 5, 6, 3, 0]])
    """

    def __init__(self, vocabulary: Sequence[str]):
        self.code_of = {piece: code for code, piece in enumerate(vocabulary)}
        missing = [s for s in (PADDING, UNKNOWN, START, END) if s not in self.code_of]
        if missing:
            raise ValueError(f"the vocabulary lacks {missing}; give that of a BERT model")
        self._pieces = lru_cache(maxsize=65_536)(self._split)

    @classmethod
    def from_file(cls, path: str | Path) -> "WordPiece":
        """Read ``vocab.txt``: one piece a line."""
        return cls(Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n"))

    def encode(self, sentences: Iterable[str], length: int = 64) -> Tensor:
        """Codes of the sentences, each with a start and an end: (sentences, length), int64.

        A longer sentence loses its end; a shorter one is padded.

        Raises:
            ValueError: length is below 2.
            TypeError: a sentence is not a string, or one string was given for the list of them.
        """
        if length < 2:
            raise ValueError(f"length is {length}; give 2 or more, for the start and the end")
        if isinstance(sentences, str):
            raise TypeError("sentences is one string; give a list of them")
        start, end, padding = (self.code_of[piece] for piece in (START, END, PADDING))
        rows = []
        for sentence in sentences:
            row = [start, *self.codes(sentence)[: length - 2], end]
            rows.append(row + [padding] * (length - len(row)))
        return torch.tensor(rows, dtype=torch.long).view(-1, length)

    def codes(self, text: str) -> list[int]:
        """Codes of a text, without a start and an end."""
        if not isinstance(text, str):
            raise TypeError(f"a sentence is a {type(text).__name__}; give a string")
        return [code for word in words(text) for code in self._pieces(word)]

    def _split(self, word: str) -> tuple[int, ...]:
        """The longest piece that the word starts with, then the longest that goes on, and so on."""
        unknown = (self.code_of[UNKNOWN],)
        if len(word) > LONGEST_WORD:
            return unknown
        found, start = [], 0
        while start < len(word):
            for end in range(len(word), start, -1):
                code = self.code_of.get("##" * (start > 0) + word[start:end])
                if code is not None:
                    break
            else:
                return unknown
            found.append(code)
            start = end
        return tuple(found)


def words(text: str) -> list[str]:
    """Lower-case words without accents; marks of punctuation and Chinese characters stand alone.

    >>> words("Amélie's café, 映画")
    ['amelie', "'", 's', 'cafe', ',', '映', '画']
    """
    spaced = "".join(_cleaned(character) for character in text)
    plain = "".join(
        c for c in unicodedata.normalize("NFD", spaced) if unicodedata.category(c) != "Mn"
    )
    # Character by character: of a whole word, Python would write a final sigma in its other form.
    lower = "".join(character.lower() for character in plain)
    return "".join(f" {c} " if _is_punctuation(c) else c for c in lower).split()


def _cleaned(character: str) -> str:
    if character in "\t\n\r":
        return " "
    if character == "\ufffd" or unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs"):
        return ""
    if character.isspace():
        return " "
    return f" {character} " if _is_chinese(character) else character


def _is_chinese(character: str) -> bool:
    code = ord(character)
    return any(first <= code <= last for first, last in _CHINESE)


# The CJK Unified Ideographs and their extensions, as BERT counts them: no kana, no hangul.
_CHINESE = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F), (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip


def _is_punctuation(character: str) -> bool:
    ascii_mark = character.isascii() and character.isprintable() and not character.isalnum()
    return (ascii_mark and character != " ") or unicodedata.category(character).startswith("P")

"""A text becomes rows: its words, each a vector made of its letters."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import NamedTuple

import numpy as np

# William James, The Principles of Psychology, 1890, chapter XI.
PARAGRAPH = """
Every one knows what attention is. It is the taking possession by the mind, in clear and vivid form, of one out of what
seem several simultaneously possible objects or trains of thought. Focalization, concentration, of consciousness are of
its essence. It implies withdrawal from some things in order to deal effectively with others, and is a condition which
has a real opposite in the confused, dazed, scatterbrained state which in French is called distraction, and
Zerstreutheit in German.
"""

WIDTH = 64  # of a word's vector: D of a text
MAX_WORDS = 256  # walked at most


class BadInput(Exception):
    """What the user gave cannot be used: one line on stderr, exit status 2."""


class Input(NamedTuple):
    """What the tour attends to."""

    x: np.ndarray  # [T, D] or [B, T, D]  float32
    labels: list[str]  # T words, or T positions
    sentences: list[list[str]]  # of a text; none of an array
    source: str  # one line for the reader


def embed(text: str, source: str) -> Input:
    """Splits a text into sentences and words, and turns the words into vectors."""
    text = unicodedata.normalize("NFC", text)
    parts = re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n\s*\n", text)
    sentences = [[word for word in map(_bare, part.split()) if word] for part in parts]
    words = [word for sentence in sentences for word in sentence]
    if not words:
        raise BadInput("the text is empty: it has no words")
    walked = words[:MAX_WORDS]
    kept: list[list[str]] = []
    for sentence in filter(None, sentences):
        room = len(walked) - sum(len(other) for other in kept)
        kept += [sentence[:room]] if room else []
    note = f", of which the first {MAX_WORDS} are walked" if len(words) > MAX_WORDS else ""
    x = np.stack([vector(word) for word in walked])
    return Input(x, walked, kept, f"{source}, {len(words)} words{note}")


def _bare(word: str) -> str:
    """A word without the punctuation around it, and without characters that would steer a terminal."""
    word = "".join(c for c in word if unicodedata.category(c)[0] != "C")
    inside = [i for i, c in enumerate(word) if unicodedata.category(c)[0] != "P"]
    return word[inside[0] : inside[-1] + 1] if inside else ""


def vector(word: str) -> np.ndarray:
    """The vector of a word, `[D]` of length sqrt(D): the sum of hashes of its letter triples.

    The same word has the same vector in every process, and words spelled alike have vectors alike.
    """
    spelled = f"<{word.lower()}>"
    triples = [spelled[i : i + 3] for i in range(len(spelled) - 2)]
    digests = [hashlib.shake_256(triple.encode()).digest(4 * WIDTH) for triple in triples]
    total = np.sum([np.frombuffer(digest, "<u4") / 2.0**31 - 1 for digest in digests], axis=0)
    return np.asarray(total * np.sqrt(WIDTH) / np.linalg.norm(total), np.float32)

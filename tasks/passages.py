"""Evidence as passages: documents cut into pieces of about a hundred words, and those that BM25 finds for a question.

Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", by the bm25s library.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Passage:
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.title}: {self.text}" if self.title else self.text

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def cut(title: str, text: str, words: int) -> list[Passage]:
    """A document in passages of nearly equal length, none longer than `words`.

    >>> [len(passage.text.split()) for passage in cut("", "word " * 250, 100)]
    [84, 83, 83]
    """
    found = text.split()
    count = -(-len(found) // words)
    bounds = [-(-len(found) * index // count) for index in range(count + 1)] if count else [0]
    return [Passage(title, " ".join(found[start:end])) for start, end in pairwise(bounds) if end > start]


class Collection:
    """Passages that can be searched; one that occurs several times is held once."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        import bm25s

        self.passages = list(dict.fromkeys(passages))
        self._tokenize = bm25s.tokenization.Tokenizer(stopwords="en")
        tokens = self._tokenize.tokenize([str(passage) for passage in self.passages], show_progress=False)
        self._index = bm25s.BM25()
        self._index.index(tokens, show_progress=False)

    def search(self, questions: Sequence[str], count: int) -> list[list[Passage]]:
        """For each question the `count` best passages, best first; equal ones in the order of the collection."""
        import numpy as np

        found: list[list[Passage]] = []
        for question in questions:
            (tokens,) = self._tokenize.tokenize([question], update_vocab=False, show_progress=False)
            if len(tokens) == 0:  # no word of it is in the collection
                found.append([])
                continue
            scores = self._index.get_scores(list(tokens))
            best = np.argsort(-scores, kind="stable")[:count]
            found.append([self.passages[index] for index in best if scores[index] > 0])
        return found

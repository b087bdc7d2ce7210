"""SQuAD's scores of answers, as its evaluation script of version 2.0 defines them (Rajpurkar et al., arXiv 1806.03822).

An answer without words is "no answer". Version 1.1's script (arXiv 1606.05250) gives the same numbers wherever every
reference keeps at least one word after normalisation.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(answer: str) -> str:
    """Lower case; ASCII punctuation out; the words a, an and the out; single spaces."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(predicted: str, references: Sequence[str]) -> float:
    """1 if the answer equals any reference after normalisation, else 0."""
    return float(any(normalise(predicted) == normalise(reference) for reference in _kept(references)))


def f1(predicted: str, references: Sequence[str]) -> float:
    """The best over the references of the harmonic mean of precision and recall of normalised words, as multisets."""
    return max(_f1(normalise(predicted).split(), normalise(reference).split()) for reference in _kept(references))


def _kept(references: Sequence[str]) -> list[str]:
    """References that say something; without any, the right answer is none."""
    return [reference for reference in references if normalise(reference)] or [""]


def _f1(predicted: list[str], reference: list[str]) -> float:
    if not predicted or not reference:
        return float(predicted == reference)
    common = sum((Counter(predicted) & Counter(reference)).values())
    return 2 * common / (len(predicted) + len(reference))

"""How close is a caption to what people wrote? BLEU-4, CIDEr and ROUGE-L, as COCO scores them.

The scorers are COCO's own, from the package pycocoevalcap (extra `eval`); they compare words. COCO
finds the words with Stanford's tokenizer, a Java program: `tokenizer="ptb"` calls it, for figures
to publish. The default needs no Java and makes the same words of ordinary captions: lower case,
contractions apart ("isn't" is two words, "dog's" too), punctuation gone.

METEOR and SPICE, which are Java programs themselves, are left out.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from training.evaluation.intervals import Figure, Figures, share
from training.evaluation.questions import Question
from training.settings import ConfigError

TokenizerName = Literal["words", "ptb"]
NEEDED = "pycocoevalcap"
GRAMS = 4  # words of the longest phrases that BLEU compares

_TOKEN = re.compile(
    r"(?:[a-z]\.){2,}"  # u.s.
    r"|\b(?:mr|mrs|ms|dr|st)\."
    r"|\d[\d.,:/]*\d"  # 1,000 and 2:50
    r"|[^\W_]+(?:[-'./][^\W_]+)*"  # words with signs inside
    r"|[&%$#@*+=/()]"
)
_CONTRACTION = re.compile(r"(?<=\w)(?:n't|'(?:s|m|d|re|ve|ll))$|(?<=\bcan)not$")
_BRACKETS = {"(": "-lrb-", ")": "-rrb-"}


def caption_scores(
    questions: Sequence[Question], answers: Sequence[str], tokenizer: TokenizerName = "words"
) -> Figures:
    """BLEU-4, CIDEr and ROUGE-L of one caption for each image.

    CIDEr weighs a phrase by how many images of this very set have it: of a part of the set, or of
    few images, it is another figure.

    Raises:
        ConfigError: pycocoevalcap is not installed, or for "ptb" Java is not.
    """
    refs = {str(i): list(question.answers) for i, question in enumerate(questions)}
    said = {str(i): [answer] for i, answer in enumerate(answers)}
    split = _ptb if tokenizer == "ptb" else _words
    refs, said = split(refs), split(said)
    bleu = _part("bleu", "BleuScorer", "bleu_scorer")(n=GRAMS)
    for key, (caption,) in said.items():
        bleu += (caption, refs[key])
    return {
        "bleu_4": Figure(np.array([_phrases(found) for found in bleu.ctest]), _bleu),
        "cider": share(_part("cider", "Cider")().compute_score(refs, said)[1]),
        "rouge_l": share(_part("rouge", "Rouge")().compute_score(refs, said)[1]),
    }


def _phrases(found: Mapping[str, Any]) -> list[int]:
    """Of a caption, its phrases of each length that people use too; all of them; its length, and
    that of the reference nearest to it."""
    length = found["testlen"]
    nearest = min((abs(other - length), other) for other in found["reflen"])[1]
    return [*found["correct"], *found["guess"], length, nearest]


def _bleu(sums: np.ndarray) -> np.ndarray:  # (..., 10) -> (...)
    """BLEU-4 of sums of `_phrases`, with the two small numbers of COCO's code."""
    right, all_of_them, lengths = np.split(sums, (GRAMS, 2 * GRAMS), axis=-1)
    precision = ((right + 1e-15) / (all_of_them + 1e-9)).prod(-1) ** (1 / GRAMS)
    ratio = (lengths[..., 0] + 1e-15) / (lengths[..., 1] + 1e-9)
    return precision * np.exp(np.minimum(0, 1 - 1 / ratio))


def caption_words(caption: str) -> list[str]:
    """The words of a caption, as COCO's scorers are given them."""
    words: list[str] = []
    for token in _TOKEN.findall(caption.lower().replace("’", "'")):
        parts = _CONTRACTION.sub(r" \g<0>", token).split()
        words += [_BRACKETS.get(part, part) for part in parts]
    return words


def _words(captions: dict[str, list[str]]) -> dict[str, list[str]]:
    return {key: [" ".join(caption_words(one)) for one in texts] for key, texts in captions.items()}


def _ptb(captions: dict[str, list[str]]) -> dict[str, list[str]]:
    texts = {key: [{"caption": one} for one in texts] for key, texts in captions.items()}
    try:
        return _part("tokenizer", "PTBTokenizer", "ptbtokenizer")().tokenize(texts)
    except FileNotFoundError as error:
        raise ConfigError(f"tokenizer: got 'ptb', which needs Java: {error}") from None


def _part(folder: str, name: str, module: str | None = None) -> Any:
    try:
        found = importlib.import_module(f"{NEEDED}.{folder}.{module or folder}")
    except ImportError as error:
        raise ConfigError(
            f"captions: {error}; their scorers are in {NEEDED}: pip install {NEEDED}"
        ) from None
    return getattr(found, name)

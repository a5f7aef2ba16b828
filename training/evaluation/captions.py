"""How close is a caption to what people wrote? BLEU-4, CIDEr and ROUGE-L, as COCO scores them.

The scorers are COCO's own, from the package pycocoevalcap (extra `eval`); they compare words. COCO
finds the words with Stanford's tokenizer, a Java program: `tokenizer="ptb"` calls it, for figures
to publish. The default needs no Java and makes the same words of ordinary captions: lower case,
contractions apart ("isn't" is two words, "dog's" too), punctuation gone.

METEOR and SPICE, which are Java programs themselves, are left out.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from collections.abc import Sequence
from typing import Any, Literal

from training.evaluation.questions import Question
from training.settings import ConfigError

TokenizerName = Literal["words", "ptb"]
NEEDED = "pycocoevalcap"

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
) -> dict[str, float]:
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
    bleu = _part("bleu", "Bleu")(4)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints lengths
        values, _ = bleu.compute_score(refs, said)
    return {
        "bleu_4": float(values[3]),
        "cider": float(_part("cider", "Cider")().compute_score(refs, said)[0]),
        "rouge_l": float(_part("rouge", "Rouge")().compute_score(refs, said)[0]),
    }


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
            f"captions: {error}; their scorers are in {NEEDED}: pip install '.[eval]'"
        ) from None
    return getattr(found, name)

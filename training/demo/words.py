"""What stands between files and a model: one ordinary transformers processor, and its vocabulary.

`build_processor` makes a `LlavaProcessor` from a list of words: a word-level tokenizer for small
models trained from scratch, and SigLIP's image processor in its Pillow form, so torchvision is not
needed. Saved with ``save_pretrained`` it is read back by ``AutoProcessor`` alone. Any other
`LlavaProcessor` with one image size works with `training.data` just as well; only the demo needs
this one. The size of a model's head is not decided here: it may be larger than the tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from training.data.records import DataError, read_samples
from training.data.sample import IMAGE_MARK
from training.models import CHAT_TEMPLATE

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
SPECIALS = (PAD, EOS, UNKNOWN, IMAGE_MARK)  # ids 0, 1, 2, 3
TEMPLATE_WORDS = ("USER:", "ASSISTANT:")
#: White space separates words; sentence punctuation is a word of its own ("shape?" is two).
SPLITTER = Sequence([WhitespaceSplit(), Split(Regex(r"[?!.,;]"), "isolated")])


def collect_words(*json_paths: str | Path) -> list[str]:
    """The sorted vocabulary of some LLaVA files, as `build_processor` wants it.

    Raises:
        DataError: a file is unreadable or one of its entries is malformed.
    """
    words: set[str] = set()
    for path in json_paths:
        for sample in read_samples(path):
            if isinstance(sample, DataError):
                raise sample
            text = " ".join(text for _, text in sample.texts())
            words.update(word for word, _ in SPLITTER.pre_tokenize_str(text))
    return sorted(words - {IMAGE_MARK})


def build_processor(words: Iterable[str], *, image_size: int, patch_size: int) -> LlavaProcessor:
    """A `LlavaProcessor` of a word-level tokenizer and SigLIP's image processor.

    Args:
        words: the vocabulary besides the specials and the template's own words.
        image_size: images are resized to this many pixels square.
        patch_size: the vision tower's patch; (image_size // patch_size)² tokens per image.

    Raises:
        ValueError: sizes that do not divide, a word that is a special or that the tokenizer
            would split.
    """
    if image_size < 1 or patch_size < 1 or image_size % patch_size:
        raise ValueError(
            f"image_size, patch_size: got {image_size} and {patch_size}, "
            "expected positive sizes with image_size a multiple of patch_size"
        )
    image_processor = SiglipImageProcessorPil(
        size={"height": image_size, "width": image_size},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=_tokenizer(words),
        patch_size=patch_size,
        vision_feature_select_strategy="full",  # SigLIP has no class token to drop
        chat_template=CHAT_TEMPLATE,
    )


def _tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    ordered = list(dict.fromkeys([*TEMPLATE_WORDS, *words]))
    for word in ordered:
        if word in SPECIALS or [piece for piece, _ in SPLITTER.pre_tokenize_str(word)] != [word]:
            expected = f"single words other than {', '.join(SPECIALS)}"
            raise ValueError(f"words: got {word!r}, expected {expected}")
    vocabulary = {word: i for i, word in enumerate([*SPECIALS, *ordered])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = SPLITTER
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE_MARK},
        padding_side="right",
    )

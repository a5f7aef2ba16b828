"""Pairs: what differs between teacher and student is found, named, and all of it at once."""

from __future__ import annotations

import pytest
import transformers as tf

from tests.training import tiny_pairs, tiny_processors
from training.anatomy import positions
from training.models import CheckpointError
from training.pairs import check_pair


def pair(name="qwen2.5-vl", processor=None, **options):
    """A student, and a teacher with another processor or other sizes of its LM."""
    student = tiny_pairs.build(name)
    return *student, *tiny_pairs.build(name, 24, 1, processor=processor, **options)


def found(report, what):
    """Level and text of the findings about one thing."""
    (finding,) = [f for f in report.findings if f.what == what] or [None]
    assert finding is not None, str(report)
    return finding.level, finding.text


def other(name="qwen2.5-vl", **changes):
    """A processor with attributes of itself, its tokenizer or its image processor changed."""
    processor = tiny_processors.PROCESSORS[name]()
    for key, value in changes.items():
        owners = processor, processor.tokenizer, processor.image_processor
        owner = next(owner for owner in owners if hasattr(owner, key))
        setattr(owner, key, value)
    return processor


@pytest.mark.parametrize("name", sorted(tiny_pairs.MODELS))
def test_pairs_of_one_family_share_everything(name):
    report = check_pair(*pair(name), visual=True)
    assert {finding.level for finding in report.findings} == {"ok"}, str(report)
    assert not report.own_batch
    report.require()


def test_tiles_of_another_size():
    four = pair("smolvlm", processor=tiny_pairs.larger_tiles())
    report = check_pair(*four, visual=True)
    level, text = found(report, "visual rows")
    assert level == "fault" and "square 20 and 45, wide 12 and 27, tall 12 and 27" in text
    with pytest.raises(CheckpointError, match=r"weigh the terms over visual rows with 0"):
        report.require()
    report = check_pair(*four, visual=False)
    report.require()
    assert found(report, "visual rows")[0] == "note" and report.own_batch
    assert "max_image_size {'longest_edge': 32}" in found(report, "image processor")[1]


def test_other_pixels_of_the_same_rows():
    report = check_pair(*pair(processor=other(image_mean=[0.1, 0.2, 0.3])), visual=True)
    level, text = found(report, "image processor")
    assert level == "note" and "image_mean" in text and "[0.1, 0.2, 0.3]" in text
    assert report.own_batch
    report.require()


def test_another_system_line_is_a_batch_of_its_own():
    template = tiny_processors.QWEN.replace("be good", "be quick")
    report = check_pair(*pair(processor=other(chat_template=template)), visual=True)
    level, text = found(report, "chat template")
    assert level == "note" and "good" in text and "quick" in text and report.own_batch
    report.require()


def test_answers_that_end_otherwise():
    template = tiny_processors.QWEN.replace("<|im_end|>", tiny_processors.EOS)
    report = check_pair(*pair(processor=other(chat_template=template)), visual=True)
    level, text = found(report, "answers")
    assert level == "fault" and "square.<|im_end|>" in text and "square.<end_of_utterance>" in text


def test_tokens_moved_added_and_beyond():
    processor = tiny_processors.qwen2_5_vl()
    processor.tokenizer.add_tokens(["fox"])
    report = check_pair(*pair(processor=processor), visual=True)
    report.require()
    notes = [f.text for f in report.findings if f.level == "note"]
    assert any("only the teacher's has 'fox'" in text for text in notes)
    swapped = tiny_processors.qwen2_5_vl()
    state = tiny_processors.trained().replace('"0"', '"9?"').replace('"9"', '"0"')
    swapped.tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=tiny_processors.Tokenizer.from_str(state.replace('"9?"', '"9"')),
        eos_token=tiny_processors.END,
        pad_token=tiny_processors.PAD,
        extra_special_tokens=tiny_processors.NAMED | {"image_token": "<|image_pad|>"},
    )
    level, text = found(check_pair(*pair(processor=swapped), visual=True), "tokenizer")
    assert level == "fault" and "2 tokens have other ids" in text and "'0' is" in text


def test_heads_too_short_for_the_tokens():
    tokens = len(tiny_processors.qwen2_5_vl().tokenizer)
    report = check_pair(*pair(vocab_size=tokens + 200), visual=True)
    level, text = found(report, "vocabulary")
    assert level == "note" and f"the first {tokens + 5} are compared" in text
    student, processor, teacher, its = pair()
    teacher.resize_token_embeddings(tokens - 2)
    with pytest.raises(CheckpointError) as caught:
        check_pair(student, processor, teacher, its, visual=True).require()
    message = str(caught.value)
    assert f"its model {tokens - 2} embeddings" in message, "the teacher's own"
    assert f"share {tokens - 2}" in message and "2 tokens beyond" in message, "and the student's"


def yarn(factor, original=100):
    """Rotary positions made for `original` tokens, scaled."""
    return {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": factor,
        "original_max_position_embeddings": original,
    }


@pytest.mark.parametrize(
    ("rope", "expected"), [(None, 90), (yarn(4.0), 400), (yarn(0.5), 90)], ids=str
)
def test_positions_are_counted_scaled(rope, expected):
    config = tiny_pairs.build("internvl")[0].config
    config.text_config.max_position_embeddings = 90
    if rope:
        config.text_config.rope_parameters = rope
    assert positions(config) == expected


def test_positions_that_no_config_has():
    config = tf.BloomConfig()  # no positions: it biases by distance
    assert positions(config) is None and positions(tf.GPT2Config()) == 1024


def test_processor_of_another_model():
    student, processor, teacher, its = pair()
    teacher.config.image_token_id = 5
    level, text = found(check_pair(student, processor, teacher, its, visual=True), "image token")
    assert level == "fault" and "teacher's model has id 5, its processor" in text


def test_a_processor_that_cannot_encode():
    four = pair(processor=other(chat_template=None))
    report = check_pair(*four, visual=True)
    assert "no chat template" in found(report, "teacher's processor")[1]

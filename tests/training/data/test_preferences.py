"""Does every form of preference data become the pair that it says, and a batch of both answers?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from mllmkd_kernels import rows
from mllmkd_kernels.rows import PAIR
from tests.training.llava_files import entry, paint, processor, write
from tests.training.tiny_processors import qwen2_5_vl
from training.cli import main
from training.config import DataConfig, SourceConfig
from training.data.collate import Collator
from training.data.dataset import SampleDataset
from training.data.encoding import Encoding
from training.data.item import IGNORE
from training.data.load import open_data
from training.data.records import DataError, read_samples
from training.data.sample import Sample
from training.data.sources import LlavaSource, open_source
from training.data.stream import StreamDataset
from training.watch import sizes_of

ASKED, BETTER, WORSE = "what is this", "a coat", "a bag"
TURN = ("<image>\n" + ASKED, BETTER)
HUMAN = {"from": "human", "value": TURN[0]}
PARTS = [{"type": "image", "text": None}, {"type": "text", "text": ASKED}]
USER = {"role": "user", "content": PARTS}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


LLAVA = {
    "rejected": entry(*TURN, image="a.png", rejected=WORSE),
    "rejected, a message": entry(*TURN, image="a.png", rejected=gpt(WORSE)),
    "ms-swift": entry(*TURN, image="a.png", rejected_response=WORSE),
    "ms-swift, whole": entry(*TURN, image="a.png", rejected_messages=[HUMAN, gpt(WORSE)]),
    "LLaMA-Factory": entry(TURN[0], image="a.png", chosen=gpt(BETTER), rejected=gpt(WORSE)),
    "LLaVA-MoD": {
        "id": "e1",
        "image": "a.png",
        "chosen": [HUMAN, gpt(BETTER)],
        "rejected": [HUMAN, gpt(WORSE)],
    },
    "RLAIF-V": {"image": "a.png", "question": ASKED, "chosen": BETTER, "rejected": WORSE},
    "MMPR": {"image": "a.png", "question": TURN[0], "chosen": BETTER, "rejected": WORSE},
    "LLaVA-RLHF": entry(
        TURN[0], image="a.png", output_1=gpt(WORSE), output_2=gpt(BETTER), preference=2
    ),
}
ROWS = {
    "rejected": {"messages": [USER, said(BETTER)], "rejected": WORSE},
    "TRL": {"prompt": [USER], "chosen": [said(BETTER)], "rejected": [said(WORSE)]},
    "TRL, one message": {"prompt": [USER], "chosen": said(BETTER), "rejected": said(WORSE)},
    "TRL, implicit": {"chosen": [USER, said(BETTER)], "rejected": [USER, said(WORSE)]},
    "UltraFeedback": {
        "prompt": ASKED, "messages": [USER, said(BETTER)],
        "chosen": [USER, said(BETTER)], "rejected": [USER, said(WORSE)],
    },
    "texts": {"prompt": ASKED, "chosen": BETTER, "rejected": WORSE},
}  # fmt: skip


def one(tmp_path: Path, *entries: Any) -> Any:
    return list(read_samples(write(tmp_path / "d.json", list(entries))))


@pytest.mark.parametrize("name", LLAVA)
def test_a_pair_in_a_llava_file(name: str, tmp_path: Path) -> None:
    (sample,) = one(tmp_path, LLAVA[name])
    assert isinstance(sample, Sample), sample
    ((human, answer),) = sample.turns
    assert human.replace("\n", "") == f"<image>{ASKED}" and answer == BETTER
    assert sample.rejected == WORSE and not sample.unread
    better, worse = sample.apart()
    assert [x.turns[-1][1] for x in (better, worse)] == [BETTER, WORSE]
    assert better.images == worse.images == ("a.png",) and better.turns[0][0] == worse.turns[0][0]
    names = [name for name, text in (*better.texts(), *worse.texts()) if text in (BETTER, WORSE)]
    assert all(name.split("[")[0] in LLAVA_FIELDS for name in names), names


LLAVA_FIELDS = (
    "conversations", "chosen", "rejected", "rejected_response", "rejected_messages",
    "output_1", "output_2",
)  # fmt: skip


@pytest.mark.parametrize("form", ["table", "json", "stream"])
@pytest.mark.parametrize("name", ROWS)
def test_a_pair_in_a_data_set_of_messages(name: str, form: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 32), (200, 0, 0))
    image.save(tmp_path / "a.png")
    row = {"id": "r", "images": ["a.png"] if form == "json" else [image], **ROWS[name]}
    path = write(tmp_path / "d.jsonl", [row]) if form == "json" else tmp_path / "rows"
    if form != "json":
        datasets.Dataset.from_list([row]).save_to_disk(str(path))
    config = SourceConfig(path=str(path), use="preferences", stream=form == "stream")
    encoding = Encoding(qwen2_5_vl(), pairs=True)
    if form == "stream":
        item = next(iter(StreamDataset([config], str(tmp_path), encoding)))
    else:
        source = open_source(config, "data.sources[0]", str(tmp_path))
        (sample,) = source.samples()
        assert isinstance(sample, Sample), sample
        assert (sample.turns[-1][1], sample.rejected) == (BETTER, WORSE)
        assert sample.unread == (("prompt",) if name == "UltraFeedback" else ())
        item = encoding.item(sample, lambda: source.images(sample))
    decoded = [
        encoding.encoders[0].tokenizer.decode(x["labels"][x["labels"] != IGNORE])
        for x in (item, item["rejected"])  # pyright: ignore[reportTypedDictNotRequiredAccess]
    ]
    assert [text.split("<|im_end|>")[0] for text in decoded] == [BETTER, WORSE]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rejected": BETTER + " "}, "'rejected': got str .*another answer than"),
        ({"rejected": "  "}, "'rejected[0].value': got str '  ', expected some text"),
        ({"rejected": "<image>"}, "no <image> in an answer"),
        ({"rejected": {"from": "human", "value": "x"}}, "'rejected[0].from': got str 'human'"),
        ({"rejected": [HUMAN | {"value": "<image> who"}, gpt(WORSE)]},
         "'rejected': got other messages before the last than 'conversations', .*one prompt"),
        ({"rejected": WORSE, "rejected_response": WORSE}, "no such field besides 'rejected'"),
        ({"chosen": gpt(BETTER)}, "'rejected': got NoneType None, .*worse than 'chosen'"),
        ({"chosen": BETTER, "rejected": ""}, "'rejected': got str '', .*worse than 'chosen'"),
        ({"chosen": [HUMAN | {"value": "<image> who"}, gpt("x")], "rejected": WORSE},
         "'conversations': got list .*what 'chosen' begins with"),
        ({"chosen": BETTER, "rejected": WORSE, "conversations": None}, "'human' .*alternate"),
        ({"output_1": WORSE, "output_2": BETTER, "preference": 3}, "'preference': got int 3"),
        ({"rejected": WORSE, "rejected_images": ["b.png"]}, "'rejected_images': got list"),
    ],
)  # fmt: skip
def test_what_is_no_pair_is_a_fault_of_that_entry(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (found,) = one(tmp_path, entry(*TURN, image="a.png") | change)
    assert isinstance(found, DataError), found
    assert "(id 'e1')" in str(found)
    words = words.replace("[0]", r"\[0\]")
    with pytest.raises(DataError, match=words):
        raise found


# --- items and batches ----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    paint(tmp_path / "a.png", 90)
    paint(tmp_path / "b.png", 200)
    entries = [
        entry("<image>\nwhat is it", "a coat", image="a.png", rejected="a bag", id="one"),
        entry("what", "yes", "<image> how many", "two", image="b.png", rejected="no", id="talk"),
        entry("<image>\nthis", "yes", image="a.png", rejected="yes yes is it", id="longer"),
    ]
    write(tmp_path / "pairs.json", entries)
    return tmp_path


def data(folder: Path, name: str = "pairs.json", **options: Any) -> SampleDataset:
    return SampleDataset([LlavaSource(folder / name, folder)], processor(), **options)


def test_only_the_two_answers_are_learned_and_all_before_them_is_equal(folder: Path) -> None:
    pairs, tokenizer = data(folder, pairs=True), processor().tokenizer
    for i, (better, worse) in enumerate((("a coat", "a bag"), ("two", "no"))):
        item: Any = pairs[i]
        both = (item, item["rejected"])
        starts = [int((x["labels"] != IGNORE).nonzero()[0]) for x in both]
        assert starts[0] == starts[1]
        first, second = (x["input_ids"][: starts[0]] for x in both)
        assert torch.equal(first, second)
        assert torch.equal(item["pixel_values"], item["rejected"]["pixel_values"])
        decoded = [tokenizer.decode(x["labels"][x["labels"] != IGNORE]) for x in both]
        assert [text.removesuffix(tokenizer.eos_token).strip() for text in decoded] == [
            better, worse,
        ]  # fmt: skip


def test_a_batch_has_the_better_answers_and_then_the_worse_ones(folder: Path) -> None:
    """Also where the teacher has batches of its own; row sets by kind select them."""
    pairs = data(folder, pairs=True, teacher=processor())
    collate = Collator(processor(), processor())
    items: Any = [pairs[i] for i in range(3)]
    batch: Any = collate(items)
    assert batch["sample_ids"] == ["one", "talk", "longer"]
    assert int(sizes_of(batch)[2]) == 3  # what rates count: pairs, not answers
    assert batch["kind"] == ["chosen"] * 3 + ["rejected"] * 3
    for b in (batch, batch["teacher"]):
        assert len(b["input_ids"]) == len(b["pixel_values"]) == len(b["image_lens"]) == 6
        assert rows.count("pairs", b) == 3
        for k, kind in enumerate(PAIR):
            _, labels = rows.select(f"response:{kind}", b)
            own = [(x, x["rejected"])[k]["labels"] for x in items]
            assert torch.equal(labels, torch.cat([x[x != IGNORE] for x in own]))
    longest = max(len(x["input_ids"]) for item in items for x in (item, item["rejected"]))
    assert batch["input_ids"].shape[1] == longest


def test_pairs_where_none_are_wanted_and_none_where_they_are(folder: Path) -> None:
    """Before anything is encoded; and counted where faulty samples are left out."""
    with pytest.raises(DataError, match=r"id 'one'.*'rejected': got str 'a bag', expected no such"):
        data(folder)
    write(folder / "plain.json", [entry("what", "a coat", id="x"), entry(*"ab", id="y")])
    with pytest.raises(DataError, match=r"id 'x'.*'rejected': got nothing, expected a worse"):
        data(folder, "plain.json", pairs=True)
    mixed = json.loads((folder / "pairs.json").read_text())
    write(folder / "mixed.json", [*mixed, entry("what", "a coat", id="x")])
    kept = data(folder, "mixed.json", pairs=True, skip_bad=True)
    assert len(kept) == 3 and [skip.id for skip in kept.skipped] == ["x"]
    last: Any = data(folder, pairs=True)[2]
    most = len(last["input_ids"])  # which the worse answer is longer than
    with pytest.raises(DataError, match=rf"longer.* tokens, expected at most max_length {most}"):
        _ = data(folder, pairs=True, max_length=most)[2]


def test_a_special_token_or_unknown_word_in_the_worse_answer_is_named(folder: Path) -> None:
    for text, words in (("a </s>", "text without the model's own"), ("zebra", "only words")):
        write(folder / "bad.json", [entry("what", "yes", rejected=text)])
        with pytest.raises(DataError, match=rf"field 'rejected': got .*{words}"):
            _ = data(folder, "bad.json", pairs=True)[0]


def test_the_longer_answer_says_where_a_pair_is_sorted(folder: Path) -> None:
    encoding = data(folder, pairs=True).encoding
    samples = data(folder, pairs=True).samples
    both = [[encoding.estimate(x) for x in sample.apart()] for sample in samples]
    assert [encoding.estimate(sample) for sample in samples] == [max(pair) for pair in both]
    assert both[2][1] > both[2][0]


def test_the_use_of_pairs_by_field_and_by_source(folder: Path) -> None:
    by_field = DataConfig(preferences=str(folder / "pairs.json"), image_root=str(folder))
    one = SourceConfig(path=str(folder / "pairs.json"), use="preferences")
    for config in (by_field, DataConfig(sources=(one,), image_root=str(folder))):
        found = open_data(config, processor(), "preferences", "chat", pairs=True)
        assert len(found) == 3  # pyright: ignore[reportArgumentType]


def test_data_check_shows_both_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    processor().save_pretrained(folder / "processor")
    page = folder / "page.html"
    main(["data", "check", "--json", str(folder / "pairs.json"), "--image-root", str(folder),
          "--processor", str(folder / "processor"), "--use", "preferences",
          "--html", str(page)])  # fmt: skip
    html, said = page.read_text(), capsys.readouterr().out
    for word in ("chosen: ", "rejected: ", "coat", "bag"):
        assert word in html, word
    pairs = data(folder, pairs=True)
    items: Any = [pairs[i] for i in range(3)]
    labels = sum(int((x["labels"] != IGNORE).sum()) for i in items for x in (i, i["rejected"]))
    assert "can be trained on  3" in said and f"label tokens       {labels} (" in said

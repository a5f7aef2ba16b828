"""Is every malformed entry named precisely, and every well-formed one read as written?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.llava_files import entry, write
from training.data.records import DataError, Sample, read_samples

GOOD = entry("<image>\nwhat is this", "a coat", image="a.png")


def messages(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"id": "e1", "conversations": [{"from": who, "value": what} for who, what in pairs]}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_reads_what_is_written(tmp_path: Path, suffix: str) -> None:
    entries = [
        GOOD,
        entry("what is it", "a bag", "is it", "yes", id=7, kind="talk"),
        entry("<image> <image> how many", "two", image=["a.png", "b/c.png"]),
    ]
    del entries[2]["id"]
    one, text, two = read_samples(write(tmp_path / f"d{suffix}", entries))
    assert isinstance(one, Sample) and isinstance(text, Sample) and isinstance(two, Sample)
    assert (one.id, one.images, one.kind) == ("e1", ("a.png",), None)
    assert one.turns == (("<image>\nwhat is this", "a coat"),)
    assert (text.id, text.images, text.kind) == ("7", (), "talk")
    assert text.turns == (("what is it", "a bag"), ("is it", "yes"))
    assert two.images == ("a.png", "b/c.png")
    assert two.id == ("index 2" if suffix == ".json" else "line 3")


# One row per fault: the entry, the field the message must name, and part of got / expected.
FAULTS = {
    "not_an_object": (["a"], "'entry'", "got list"),
    "id_type": ({**GOOD, "id": [1]}, "'id'", "got list [1]"),
    "id_bool": ({**GOOD, "id": True}, "'id'", "got bool"),
    "kind_type": ({**GOOD, "kind": 3}, "'kind'", "got int 3"),
    "image_type": ({**GOOD, "image": 3}, "'image'", "got int 3"),
    "image_null": ({**GOOD, "image": None}, "'image'", "got NoneType"),
    "image_empty": ({**GOOD, "image": []}, "'image'", "got list []"),
    "image_item": ({**GOOD, "image": ["a.png", 3]}, "'image[1]'", "got int 3"),
    "no_talk": ({"id": "e1"}, "'conversations'", "got nothing"),
    "empty_talk": ({"id": "e1", "conversations": []}, "'conversations'", "got list []"),
    "talk_type": ({"id": "e1", "conversations": "hi"}, "'conversations'", "got str 'hi'"),
    "message_type": ({"id": "e1", "conversations": ["hi"]}, "'conversations[0]'", "got str"),
    "gpt_first": (messages(("gpt", "a")), "'conversations[0].from'", "expected 'human'"),
    "same_role": (
        messages(("human", "a"), ("human", "b")),
        "'conversations[1].from'",
        "got str 'human', expected 'gpt'",
    ),
    "unknown_role": (messages(("user", "a")), "'conversations[0].from'", "got str 'user'"),
    "unanswered": (entry("a", "b", "c"), "'conversations'", "3 messages"),
    "no_value": (
        {"id": "e1", "conversations": [{"from": "human"}]},
        "'conversations[0].value'",
        "got NoneType",
    ),
    "blank_answer": (entry("a", " \n"), "'conversations[1].value'", "expected some text"),
    "value_type": (entry("a", 3), "'conversations[1].value'", "got int 3"),  # type: ignore[arg-type]
    "image_said": (entry("a", "<image>"), "'conversations[1].value'", "expected no <image>"),
    "mark_missing": (entry("a", "b", image="a.png"), "'conversations'", "0 <image> mark(s) for 1"),
    "image_missing": (entry("<image> a", "b"), "'conversations'", "1 <image> mark(s) for 0"),
    "too_few_images": (entry("<image><image>", "b", image="a"), "'conversations'", "2 <image>"),
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("name", FAULTS)
def test_fault_names_file_place_id_field_got_expected(
    tmp_path: Path, name: str, suffix: str
) -> None:
    bad, field, detail = FAULTS[name]
    path = write(tmp_path / f"d{suffix}", [GOOD, bad])
    good, error = read_samples(path)
    assert isinstance(good, Sample)
    assert isinstance(error, DataError)
    text = str(error)
    assert text.startswith(f"{path}, {'index 1' if suffix == '.json' else 'line 2'}")
    assert f"field {field}" in text and detail in text and ", expected " in text
    named = isinstance(bad, dict) and isinstance(bad.get("id"), str)
    assert ("(id 'e1')" in text) is named
    assert error.id == ("e1" if named else None)


def test_long_values_are_shown_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", [{**GOOD, "image": {"x": "y" * 500}}])
    (error,) = read_samples(path)
    assert len(str(error)) < 300 + len(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.json", b'[{"id": 1}, {"id"', "line 1 column 18"),
        ("d.json", b'{"id": 1}', "got dict {'id': 1}, expected a list"),
        ("d.json", b"[]", "no entries"),
        ("d.jsonl", b"\n\n", "no entries"),
        ("d.json", b'["\xff"]', "expected UTF-8 text"),
        ("d.csv", b"", "got '.csv', expected a .json or .jsonl file"),
        ("d.json", None, "no such file"),
    ],
    ids=["cut", "not_a_list", "empty", "blank", "binary", "suffix", "missing"],
)
def test_unusable_file_raises(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as error:
        list(read_samples(path))
    assert str(path) in str(error.value) and message in str(error.value)


def test_jsonl_faults_stay_on_their_line(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [GOOD])
    line = path.read_bytes()
    path.write_bytes(line + b'{"id": "cut", "conv\n' + b"\n" + b'"\xff"\n' + line)
    first, cut, binary, last = read_samples(path)
    assert isinstance(first, Sample) and isinstance(last, Sample)
    assert "line 2" in str(cut) and "at column" in str(cut)
    assert "line 4" in str(binary) and "UTF-8" in str(binary)
    assert last.place.where == "line 5"

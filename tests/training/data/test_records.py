"""Is every malformed entry named precisely, and every well-formed one read as written?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.llava_files import entry, write
from training.data.records import DataError, read_samples
from training.data.sample import Sample

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
    "image_twice": ({**GOOD, "images": ["b.png"]}, "'images'", "besides 'image'"),
    "image_item": ({**GOOD, "image": ["a.png", 3]}, "'image[1]'", "got int 3"),
    "system_type": ({**GOOD, "system": 3}, "'system'", "got int 3"),
    "system_twice": (
        {**messages(("system", "s"), ("human", "a"), ("gpt", "b")), "system": "t"},
        "'system'",
        "expected no such field besides conversations[0]",
    ),
    "system_late": (
        messages(("human", "a"), ("gpt", "b"), ("system", "s"), ("gpt", "b")),
        "'conversations[2].from'",
        "got str 'system', expected 'human'",
    ),
    "system_alone": (messages(("system", "s")), "'conversations'", "got 0 messages besides"),
    "system_image": ({**GOOD, "system": "<image>"}, "'system'", "no <image> in a system message"),
    "system_turn_image": (
        messages(("system", "<image>"), ("human", "a"), ("gpt", "b")),
        "'conversations[0].value'",
        "no <image> in a system message",
    ),
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


@pytest.mark.parametrize("nothing", [{}, {"image": None}, {"image": ""}, {"images": []}])
def test_no_image_in_any_spelling_is_text_alone(tmp_path: Path, nothing: dict[str, Any]) -> None:
    one, two = read_samples(write(tmp_path / "d.json", [entry("a", "b") | nothing, GOOD]))
    assert isinstance(one, Sample) and isinstance(two, Sample)
    assert one.images == () and two.images == ("a.png",)
    (bad,) = read_samples(write(tmp_path / "e.json", [entry("<image> a", "b") | nothing]))
    assert "1 <image> mark(s) for 0 image(s)" in str(bad)


def test_images_is_another_name_of_image(tmp_path: Path) -> None:
    (one,) = read_samples(write(tmp_path / "d.json", [entry("<image> a", "b", images=["a.png"])]))
    assert isinstance(one, Sample) and one.images == ("a.png",)


def test_a_system_message_is_kept_where_it_stands(tmp_path: Path) -> None:
    turns = (("human", "a"), ("gpt", "b"))
    entries = [
        messages(("system", "be brief"), *turns),
        {**messages(*turns), "system": "be brief"},
        {**messages(*turns), "system": ""},
        messages(("system", ""), *turns),
    ]
    first, field, none, empty = read_samples(write(tmp_path / "d.json", entries))
    assert all(isinstance(one, Sample) for one in (first, field, none, empty))
    assert [one.system for one in (first, field, none, empty)] == ["be brief"] * 2 + [None, ""]  # type: ignore[union-attr]
    assert first.turns == field.turns == (("a", "b"),)  # type: ignore[union-attr]
    value = "conversations[{}].value".format
    assert list(first.texts()) == [(value(0), "be brief"), (value(1), "a"), (value(2), "b")]  # type: ignore[union-attr]
    assert list(field.texts()) == [("system", "be brief"), (value(0), "a"), (value(1), "b")]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"name": "f"}]),
        ("video", "a.mp4"),
        ("videos", ["a.mp4"]),
        ("audios", ["a.wav"]),
        ("rejected_images", ["a.png"]),
        ("chat_template_kwargs", {"x": 1}),
        ("weight", 0.5),
    ],
)
def test_a_field_that_says_what_is_trained_is_refused_by_name(
    tmp_path: Path, name: str, value: Any
) -> None:
    entries = [entry("a", "b", **{name: given}) for given in (value, None, type(value)())]
    bad, *sound = read_samples(write(tmp_path / "d.json", entries))
    assert isinstance(bad, DataError) and f"field {name!r}: got " in str(bad)
    if name != "weight":  # no weight and a weight of 0 are not the same
        assert [type(one) for one in sound] == [Sample, Sample]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reasoning_content", "hm"),
        ("thinking", "hm"),
        ("tool_calls", [{"name": "f"}]),
        ("weight", 0),
        ("loss", False),
        ("image", "a.png"),
    ],
)
def test_so_is_a_field_of_a_message(tmp_path: Path, name: str, value: Any) -> None:
    def with_field(given: Any) -> dict[str, Any]:
        one = entry("a", "b")
        one["conversations"][1][name] = given
        return one

    bad, none = read_samples(write(tmp_path / "d.json", [with_field(value), with_field(None)]))
    assert f"field 'conversations[1].{name}': got " in str(bad) and isinstance(none, Sample)


def test_a_weight_of_one_is_what_is_done_anyway(tmp_path: Path) -> None:
    one = entry("a", "b", weight=1.0)
    one["conversations"][1] |= {"weight": 1, "loss": True}
    (sample,) = read_samples(write(tmp_path / "d.json", [one]))
    assert isinstance(sample, Sample) and sample.unread == ()


def test_other_fields_are_left_alone_and_listed(tmp_path: Path) -> None:
    one = entry("a", "b", source="web", model="", width=3)
    one["conversations"][0]["name"] = "Ada"
    (sample,) = read_samples(write(tmp_path / "d.json", [one]))
    assert isinstance(sample, Sample)
    assert sample.unread == ("source", "width", "conversations[].name")


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    for name in ("d.json", "d.jsonl"):
        path = write(tmp_path / name, [GOOD, GOOD])
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert all(isinstance(one, Sample) for one in read_samples(path))


def test_a_key_twice_in_an_object_is_a_fault(tmp_path: Path) -> None:
    twice = '{"id": "a", "image": "a.png", "image": "b.png", "conversations": []}'
    (tmp_path / "d.jsonl").write_text(twice)
    (error,) = read_samples(tmp_path / "d.jsonl")
    assert "line 1: field 'image': got it twice in one object" in str(error)
    (tmp_path / "d.json").write_text(f"[{twice}]")
    with pytest.raises(DataError, match="field 'image': got it twice"):
        list(read_samples(tmp_path / "d.json"))


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

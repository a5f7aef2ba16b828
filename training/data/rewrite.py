"""What is asked in a data set, and how does it look with other answers?

A LLaVA file or a HF data set of messages is read as training reads it, but that its last question
may be open; `write` puts it back in its own form with new answers, images and all other fields as
they were. Entries without new answers are left out.

    data.json, data.jsonl    of a LLaVA file, image paths as they were
    data.parquet             of a parquet file
    data.jsonl               of messages in a json file
    data                     (`datasets.load_from_disk`) of any other HF data set
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.config import SourceConfig
from training.data.preferences import Form
from training.data.records import DataError, checked, read_entries
from training.data.sample import CHAT, LLAVA, Sample
from training.data.sources import LlavaSource, MessagesSource, Source, open_source
from training.journal import whole, write_whole
from training.settings import ConfigError

OPEN = "?"  # stands for the answer to an open question while it is read


class LlavaEntries:
    """The entries of a LLaVA file."""

    def __init__(self, source: LlavaSource) -> None:
        self.source: Source = source
        self.name = f"data{source.path.suffix}"
        self._entries = list(read_entries(source.path))

    def samples(self) -> list[Sample | DataError]:
        """Every entry in order, a faulty one as its fault."""
        return [
            entry if isinstance(entry, DataError) else checked(entry[0], _closed(entry[1]))
            for entry in self._entries
        ]

    def write(self, folder: Path, samples: Mapping[int, Sample]) -> None:
        """The entries of these numbers with these samples' answers."""
        made = []
        for i, sample in samples.items():
            raw: Any = self._entries[i]
            talk = raw[1][LLAVA.messages]
            made.append(raw[1] | {LLAVA.messages: _answered(talk, LLAVA, sample)})
        if self.name.endswith("l"):
            text = "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in made)
        else:
            text = json.dumps(made, ensure_ascii=False, indent=1)
        write_whole(folder / self.name, text)


class MessageRows:
    """The rows of a HF data set; columns other than that of messages are not touched."""

    def __init__(self, source: MessagesSource, image_root: str) -> None:
        self.rows, self.column = source.rows, source.config.messages
        if self.column not in self.rows.column_names:  # which pairs of answers can do without
            raise ConfigError(f"--json: has no column {self.column!r}, expected questions in one")
        kind = Path(str(source.config.path)).suffix
        names = {".parquet": "data.parquet", ".json": "data.jsonl", ".jsonl": "data.jsonl"}
        self.name = names.get(kind, "data")
        self._talks = list(self.rows.select_columns([self.column])[self.column])
        closed = [_closed({CHAT.messages: talk}, CHAT)[CHAT.messages] for talk in self._talks]
        rows = self.rows if closed == self._talks else self._with(self.rows, closed)
        self.source: Source = MessagesSource(rows, source.config, image_root)

    def samples(self) -> list[Sample | DataError]:
        """Every row in order, a faulty one as its fault."""
        return list(self.source.samples())

    def write(self, folder: Path, samples: Mapping[int, Sample]) -> None:
        """The rows of these numbers with these samples' answers."""
        talks = [_answered(self._talks[i], CHAT, sample) for i, sample in samples.items()]
        rows = self._with(self.rows.select(list(samples)), talks)
        save = {".parquet": rows.to_parquet, ".jsonl": rows.to_json}
        with whole(folder / self.name) as staged:
            save.get(Path(self.name).suffix, rows.save_to_disk)(staged)

    def _with(self, rows: Any, talks: list[Any]) -> Any:
        """Rows with these messages."""
        names, feature = rows.column_names, rows.features[self.column]
        rows = rows.remove_columns(self.column).add_column(self.column, talks, feature=feature)
        return rows.select_columns(names)


def open_entries(path: str, image_root: str) -> LlavaEntries | MessageRows:
    """The data set at a path, as `data.sources.path` takes it.

    Raises:
        ConfigError: nothing is there, or no messages are.
        DataError: a LLaVA file that cannot be read.
    """
    source = open_source(SourceConfig(path=path), "--json", image_root)
    if isinstance(source, MessagesSource):
        return MessageRows(source, image_root)
    assert isinstance(source, LlavaSource)
    return LlavaEntries(source)


def _closed(raw: Any, form: Form = LLAVA) -> Any:
    """An entry with an answer to its last question, if that is open."""
    talk = raw.get(form.messages) if isinstance(raw, Mapping) else None
    if not isinstance(talk, list) or not talk or not isinstance(talk[-1], Mapping):
        return raw
    if talk[-1].get(form.role) != form.roles[0] or form.text not in talk[-1]:
        return raw
    return {**raw, form.messages: [*talk, _message(talk[-1], form, OPEN)]}


def _answered(talk: Sequence[Any], form: Form, sample: Sample) -> list[Any]:
    """An entry's messages with the answers of a sample that was made of it."""
    made = list(talk)
    for k, (_, answer) in enumerate(sample.turns):
        at = sample.first + 2 * k + 1
        if at == len(made):
            made.append(_message(made[-1], form, answer))
        else:
            made[at] = {**made[at], form.text: _content(made[at][form.text], answer)}
    return made


def _message(question: Mapping[str, Any], form: Form, text: str) -> dict[str, Any]:
    """An answer with the fields that its question has."""
    made = {**dict.fromkeys(question), form.role: form.roles[1]}
    return made | {form.text: _content(question[form.text], text)}


def _content(old: Any, text: str) -> Any:
    """A text in the form of another message's: a string, or one part."""
    if isinstance(old, str) or not old:
        return text
    return [{**dict.fromkeys(old[0]), "type": "text", "text": text}]

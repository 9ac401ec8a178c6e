"""Files of records: what is accepted, and what is said about what is not."""

import json
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import fsspec
import pytest

from trm_dist.data.codec import SEPARATOR, decode
from trm_dist.data.parse import Record
from trm_dist.data.records import RecordFile
from trm_dist.errors import DataError, is_away

GOOD = {"context": "c", "query": "q", "completion": "a"}
RECORD = Record("c", "q", "a")

Write = Callable[[str, str | bytes], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(name: str, content: str | bytes) -> str:
        raw = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(raw)
        return str(tmp_path / name)

    return write_file


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    file_system = fsspec.filesystem("memory")
    file_system.mkdirs("/records", exist_ok=True)
    yield file_system
    file_system.rm("/records", recursive=True)


def read(file: RecordFile) -> list[Record]:
    """Return the records of a file, read back from what they are encoded to."""
    records = []
    for encoded in file.encoded(32):
        for question, answer in zip(encoded.inputs, encoded.labels, strict=True):
            context, _, query = decode(question).rpartition(chr(SEPARATOR))
            records.append(Record(context, query, decode(answer)))
    return records


def message_of(url: str) -> str:
    with pytest.raises(DataError) as caught:
        read(RecordFile(url))
    return str(caught.value)


@pytest.mark.parametrize(
    ("item", "record"),
    [
        (GOOD, RECORD),
        ({"input": "c", "instruction": "q", "output": "a"}, RECORD),
        ({"prompt": "q", "response": "a"}, Record("", "q", "a")),
        ({"query": "q", "completion": "a"}, Record("", "q", "a")),
        ({"context": "c", "completion": "a"}, Record("c", "", "a")),
        ({"instruction": "q", "output": "a"}, Record("", "q", "a")),
        ({"instruction": "q", "input": None, "output": "a"}, Record("", "q", "a")),
        ({**GOOD, "score": 3}, RECORD),
    ],
)
def test_record_is_read_in_every_spelling(
    write: Write, item: dict[str, object], record: Record
) -> None:
    assert read(RecordFile(write("data.json", json.dumps([item])))) == [record]


def test_spellings_may_be_mixed_in_a_file(write: Write) -> None:
    url = write("data.json", json.dumps([GOOD, {"prompt": "p", "response": "r"}]))

    assert read(RecordFile(url)) == [RECORD, Record("", "p", "r")]


def test_records_are_read_from_object_with_data(write: Write) -> None:
    content = {"metadata": {"num_examples": 2}, "data": [GOOD, GOOD]}

    assert read(RecordFile(write("data.json", json.dumps(content)))) == [RECORD] * 2


@pytest.mark.parametrize("name", ["data.jsonl", "data.ndjson"])
def test_records_are_read_one_a_line(write: Write, name: str) -> None:
    lines = [json.dumps(GOOD), "", "  ", json.dumps(GOOD | {"query": "їжак"}, ensure_ascii=False)]

    file = RecordFile(write(name, "\r\n".join(lines)))

    assert read(file) == [RECORD, Record("c", "їжак", "a")]


def test_records_are_read_from_any_store(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe("/records/data.json", json.dumps([GOOD]).encode())

    assert read(RecordFile("memory://records/data.json")) == [RECORD]


def test_digest_is_that_of_the_bytes(write: Write) -> None:
    raw = json.dumps([GOOD], indent=3).encode()

    file = RecordFile(write("data.json", raw))
    read(file)
    assert file.sha256 == sha256(raw).hexdigest()


def test_empty_completions_are_skipped_and_counted(write: Write) -> None:
    items = [GOOD, GOOD | {"completion": ""}, GOOD | {"completion": None}, GOOD]

    file = RecordFile(write("data.json", json.dumps(items)))

    assert (read(file), file.num_skipped) == ([RECORD] * 2, 2)


@pytest.mark.parametrize("content", ["[]", '{"data": []}'])
def test_set_without_records_is_an_error(write: Write, content: str) -> None:
    assert "holds no records" in message_of(write("data.json", content))


def test_set_without_completions_is_an_error(write: Write) -> None:
    url = write("data.json", json.dumps([GOOD | {"completion": ""}] * 3))

    assert message_of(url) == f"{url}: all 3 records have an empty completion."


def test_missing_file_is_named(tmp_path: Path) -> None:
    url = str(tmp_path / "missing.json")

    assert message_of(url) == f"--dataset {url}: there is no such file. Check the path."


def test_missing_file_in_a_store_is_named(memory: fsspec.AbstractFileSystem) -> None:
    assert "memory://records/no.json: there is no such file" in message_of(
        "memory://records/no.json"
    )


def test_directory_cannot_be_read(tmp_path: Path) -> None:
    message = message_of(str(tmp_path))

    assert f"--dataset {tmp_path} cannot be read: it is a directory without dataset.json" in message


def test_unknown_protocol_cannot_be_read() -> None:
    assert "--dataset nowhere://x.json cannot be read" in message_of("nowhere://x.json")


class NoCredentialsError(Exception):
    """As botocore has it; no OSError."""


@pytest.mark.parametrize(
    ("trouble", "may_pass"),
    [(NoCredentialsError("no keys"), False), (RuntimeError("no route to the server"), True)],
)
def test_file_system_with_errors_of_its_own_is_told_like_any_other(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch, trouble: Exception,
    may_pass: bool,
) -> None:  # fmt: skip
    def fail(*_: object, **__: object) -> None:
        raise trouble

    monkeypatch.setattr(type(memory), "_open", fail)

    with pytest.raises(
        DataError, match=f"--dataset memory://records/a.json .* {trouble}"
    ) as caught:
        read(RecordFile("memory://records/a.json"))

    assert is_away(caught.value) is may_pass


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("data.json", '[\n {"query": "q",\n  "completion": }\n]', "line 3, column 17"),
        ("data.json", "", "line 1, column 1"),
        ("data.json", '[{"prompt": "q"', "line 1, column 16"),
        ("data.json", f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}", "line 2, column 1"),
        ("data.jsonl", f"{json.dumps(GOOD)}\n\n{{oops}}\n", "line 3, column 2"),
        ("data.ndjson", f"{json.dumps(GOOD)}\n[1,", "line 2, column 4"),
    ],
)
def test_broken_json_is_named_with_its_place(
    write: Write, name: str, content: str, place: str
) -> None:
    url = write(name, content)

    assert message_of(url).startswith(f"{url}, {place}: this is not JSON")


@pytest.mark.parametrize("content", ['{"records": []}', '{"data": {}}', '"text"', "3", "null"])
def test_json_of_another_shape_is_an_error(write: Write, content: str) -> None:
    assert "neither a list of records nor an object" in message_of(write("data.json", content))


@pytest.mark.parametrize(
    ("item", "found"),
    [
        ({"query": "q"}, "keys query"),
        ({"completion": "a"}, "keys completion"),
        ({"text": "t", "label": 1}, "keys label, text"),
        ({"query": 5, "completion": "a"}, "keys completion, query"),
        ({"query": "q", "completion": ["a"]}, "keys completion, query"),
        ("text", "str"),
        (["q", "a"], "list"),
        ({}, "dict"),
    ],
)
def test_item_that_is_no_record_is_named(write: Write, item: object, found: str) -> None:
    message = message_of(write("data.json", json.dumps([GOOD, GOOD, item])))

    assert "record 2 (counted from 0) is not a question and an answer in text" in message
    assert f"text: {found}." in message


def test_line_that_is_no_record_is_named(write: Write) -> None:
    url = write("data.jsonl", f"{json.dumps(GOOD)}\n{{}}\n")

    assert f"{url}: record 1 (counted from 0)" in message_of(url)


def test_text_that_is_not_utf8_is_an_error(write: Write) -> None:
    url = write("data.json", '[{"prompt": "é", "response": "a"}]'.encode("latin-1"))

    assert message_of(url) == f"{url}: byte 13 is not UTF-8 text."

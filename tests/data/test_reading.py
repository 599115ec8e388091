import gzip
import json

import pytest

from kvcat_nemo.data.reading import ReadOptions, find_files, read_documents

from .conftest import TEXTS, write_jsonl


def texts(*files, **options):
    return [document.text for document in read_documents(files, ReadOptions(**options))]


def test_every_kind_of_file_gives_the_same_texts(tmp_path):
    import pyarrow
    from pyarrow import parquet

    records = [{"text": text} for text in TEXTS]
    plain = write_jsonl(tmp_path / "a.jsonl", records)
    packed = write_jsonl(tmp_path / "a.jsonl.gz", records)
    columns = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": TEXTS, "n": range(30)}), columns, row_group_size=7)
    notes = []
    for i, text in enumerate(TEXTS):
        notes.append(tmp_path / f"{i:02}.txt")
        notes[-1].write_text(text, encoding="utf-8")
    assert texts(plain) == texts(packed) == texts(columns) == texts(*notes) == TEXTS


def test_ids_come_from_the_record_or_the_place(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"id": 7, "text": "x"}, {"text": "y"}])
    assert [d.id for d in read_documents([file], ReadOptions())] == ["7", "a.jsonl:2"]


def test_line_separators_inside_json_strings_are_text(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('\ufeff{"text": "one\u2028two\u0085three"}\n\n', encoding="utf-8")
    assert texts(file) == ["one\u2028two\u0085three"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "Unterminated string"),
        (b'["text"]', "a JSON list, not an object"),
        (b'{"text": null}', "NoneType, not a string"),
        (b'{"text": "\xff"}', "utf-8"),
        (b'{"text": "\\ud800"}', "lone surrogate at character 0"),
        (b'{"body": "x", "title": "y"}', "no field 'text'; fields present: body, title"),
    ],
)
def test_a_broken_line_is_named_or_counted(tmp_path, line, message):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "first"}\n' + line + b'\n{"text": "third"}\n')
    with pytest.raises(ValueError, match="a.jsonl, line 2") as caught:
        texts(file)
    assert message in str(caught.value)
    options = ReadOptions(skip_bad=True)
    assert [d.text for d in read_documents([file], options)] == ["first", "third"]
    assert options.bad == 1


def test_a_truncated_gzip_file_is_an_error_even_when_bad_lines_are_skipped(tmp_path):
    file = tmp_path / "a.jsonl.gz"
    lines = "".join(json.dumps({"text": text * 50}) + "\n" for text in TEXTS)
    file.write_bytes(gzip.compress(lines.encode())[:-20])
    with pytest.raises(ValueError, match="damaged gzip data after line"):
        texts(file, skip_bad=True)


def test_damaged_text_and_parquet_files_are_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\nnot \xff fine")
    with pytest.raises(ValueError, match="a.txt, line 2: not UTF-8"):
        texts(tmp_path / "a.txt")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="a.parquet: not a readable Parquet file"):
        texts(tmp_path / "a.parquet")


def test_a_parquet_file_without_the_column_names_the_columns(tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="fields present: body, n"):
        texts(tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", text_field="body") == ["x"]


def test_files_are_found_once_and_in_order(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.jsonl", ".hidden/d.txt", "sub/readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = ["a.txt", "b.txt", "sub/c.jsonl"]
    assert find_files([tmp_path]) == [tmp_path / name for name in names]
    assert find_files([f"{tmp_path}/**/*.txt"]) == [tmp_path / "a.txt", tmp_path / "b.txt"]
    assert find_files([tmp_path / "b.txt", tmp_path]) == [
        tmp_path / name for name in ("b.txt", "a.txt", "sub/c.jsonl")
    ]


def test_sources_that_match_nothing_or_are_unknown_are_refused(tmp_path):
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(ValueError, match="matches no file"):
        find_files([tmp_path / "*.jsonl"])
    with pytest.raises(ValueError, match="holds no .jsonl"):
        find_files([tmp_path])
    with pytest.raises(ValueError, match="a.md: unknown kind of file"):
        find_files([tmp_path / "*.md"])
    with pytest.raises(ValueError, match="no source"):
        find_files([])

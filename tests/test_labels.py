"""Label files as people and spreadsheets write them, and how their rows find their images."""

import json
import unicodedata
from pathlib import Path

import datasets
import pytest

from labelwise.errors import DataError
from labelwise.images.labels import LabelRow, match_labels, read_label_table


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def written(tmp_path: Path, text: str | bytes, name: str = "labels.csv") -> Path:
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def pairs(file: Path) -> list[tuple[str, str]]:
    return [(row.path, row.label) for row in read_label_table(file)[0]]


def rows(*paths_and_labels: tuple[str, str]) -> list[LabelRow]:
    return [LabelRow(line, path, label, None) for line, (path, label) in enumerate(paths_and_labels, start=2)]


def refusal(file: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_label_table(file)
    return str(caught.value)


# Reading


@pytest.mark.parametrize(("mark", "suffix"), [(",", ".csv"), (";", ".csv"), ("\t", ".tsv"), ("\t", ".txt")])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_are_read_whatever_separates_the_cells(
    tmp_path: Path, mark: str, suffix: str, end: str
) -> None:
    lines = [["file_name", "note", "label"], ["a b.jpg", "x", "cat"], ["c.jpg", "", "dog"]]
    file = written(tmp_path, end.join(mark.join(line) for line in lines) + end, f"labels{suffix}")
    assert read_label_table(file)[0] == [
        LabelRow(2, "a b.jpg", "cat", None),
        LabelRow(3, "c.jpg", "dog", None),
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson"])
def test_json_lines_are_read(tmp_path: Path, suffix: str) -> None:
    lines = [{"label": "cat", "file_name": "a.jpg"}, {"label": "dog", "file_name": "b.jpg", "split": "Test"}]
    file = written(tmp_path, "\n".join(json.dumps(line) for line in lines), f"labels{suffix}")
    assert read_label_table(file)[0] == [
        LabelRow(1, "a.jpg", "cat", None),
        LabelRow(2, "b.jpg", "dog", "test"),
    ]


@pytest.mark.parametrize("column", ["file_name", "image_path", "image", "path", "filename", "file"])
def test_every_path_column_of_the_contract_is_found(tmp_path: Path, column: str) -> None:
    assert pairs(written(tmp_path, f"label,{column}\ncat,a.jpg\n")) == [("a.jpg", "cat")]


@pytest.mark.parametrize("column", ["label", "class", "choice", "category", "tag"])
def test_every_label_column_of_the_contract_is_found(tmp_path: Path, column: str) -> None:
    assert pairs(written(tmp_path, f"file_name,{column}\na.jpg,cat\n")) == [("a.jpg", "cat")]


def test_the_first_known_column_wins_and_spaces_around_names_do_not_matter(tmp_path: Path) -> None:
    file = written(tmp_path, "image, path , file_name,tag, label \nx,y,a.jpg,z,cat\n")
    assert pairs(file) == [("a.jpg", "cat")]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_byte_order_marks_and_utf16_are_understood(tmp_path: Path, encoding: str) -> None:
    text = "file_name,label\nbär.jpg,日本\n"
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    assert pairs(written(tmp_path, mark + text.encode(encoding))) == [("bär.jpg", "日本")]


def test_json_lines_with_a_byte_order_mark_are_understood(tmp_path: Path) -> None:
    line = '{"file_name": "a.jpg", "label": "cat"}\n'
    assert pairs(written(tmp_path, line.encode("utf-8-sig"), "labels.jsonl")) == [("a.jpg", "cat")]


TEXTS = ["001", "NA", "null", "nan", "1.0", "True", "1e3", "2024-05-01", "None", "N/A"]


def test_labels_and_paths_of_a_table_stay_text(tmp_path: Path) -> None:
    file = written(tmp_path, "file_name,label\n" + "".join(f"{text},{text}\n" for text in TEXTS))
    assert pairs(file) == [(text, text) for text in TEXTS]


@pytest.mark.parametrize("text", TEXTS)
def test_a_column_of_one_kind_stays_text(tmp_path: Path, text: str) -> None:
    assert pairs(written(tmp_path, f"file_name,label\n{text},{text}\n")) == [(text, text)]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_of_json_lines_stay_text(tmp_path: Path, text: str) -> None:
    line = json.dumps({"file_name": text, "label": text})
    assert pairs(written(tmp_path, line, "labels.jsonl")) == [(text, text)]


def test_numbers_of_json_lines_become_text(tmp_path: Path) -> None:
    lines = '{"file_name": "a.jpg", "label": 7}\n{"file_name": "b.jpg", "label": 12}\n'
    assert pairs(written(tmp_path, lines, "labels.jsonl")) == [("a.jpg", "7"), ("b.jpg", "12")]


def test_spaces_around_a_label_do_not_make_another_class(tmp_path: Path) -> None:
    file = written(tmp_path, "file_name,label\na.jpg, cat \nb.jpg,cat\n")
    assert {row.label for row in read_label_table(file)[0]} == {"cat"}


def test_quotes_hold_separators_and_line_ends_together(tmp_path: Path) -> None:
    file = written(tmp_path, 'file_name,note,label\n"a, b.jpg","two\nlines",cat\n"say ""x"".jpg",,dog\n')
    assert pairs(file) == [("a, b.jpg", "cat"), ('say "x".jpg', "dog")]


def test_rows_without_a_label_are_left_out(tmp_path: Path) -> None:
    file = written(tmp_path, "file_name,label\na.jpg,\nb.jpg,dog\nc.jpg,  \n,cat\n")
    assert read_label_table(file)[0] == [LabelRow(3, "b.jpg", "dog", None)]
    lines = '{"file_name": "a.jpg", "label": null}\n{"file_name": "b.jpg", "label": "dog"}\n'
    assert read_label_table(written(tmp_path, lines, "labels.jsonl"))[0] == [
        LabelRow(2, "b.jpg", "dog", None)
    ]


def test_the_split_column_is_read(tmp_path: Path) -> None:
    file = written(tmp_path, "file_name,label,split\na.jpg,cat,Test\nb.jpg,dog, train \nc.jpg,cat,\n")
    assert [row.split for row in read_label_table(file)[0]] == ["test", "train", None]


def test_a_label_file_in_a_folder_with_brackets_is_read(tmp_path: Path) -> None:
    for name in ("photos [2024]/labels.csv", "labels[1].csv"):
        assert pairs(written(tmp_path, "file_name,label\na.jpg,cat\n", name)) == [("a.jpg", "cat")]


def test_a_rewritten_label_file_is_read_again(tmp_path: Path) -> None:
    assert pairs(written(tmp_path, "file_name,label\na.jpg,cat\n")) == [("a.jpg", "cat")]
    assert pairs(written(tmp_path, "file_name,label\na.jpg,dog\n")) == [("a.jpg", "dog")]


# Refusing


@pytest.mark.parametrize("cell", ['"cat,dog"', "cat|dog", "cat;dog", "[cat]", '"[""cat"", ""dog""]"'])
def test_several_labels_in_one_cell_are_refused_with_the_line(tmp_path: Path, cell: str) -> None:
    file = written(tmp_path, f"file_name,label\na.jpg,cat\nb.jpg,{cell}\n")
    plain = cell.strip('"').replace('""', '"')
    assert refusal(file) == (
        f"{file}, line 3: several labels in one cell ({plain}); "
        "Labelwise classifies with one label per image."
    )


def test_a_list_of_labels_in_json_is_refused_with_the_line(tmp_path: Path) -> None:
    line = '{"file_name": "a.jpg", "label": ["cat", "dog"]}\n'
    file = written(tmp_path, line, "labels.jsonl")
    assert refusal(file).startswith(f"{file}, line 1: several labels in one cell")


@pytest.mark.parametrize("before", ["\n\n", 'a.jpg,"two\nlines\nthree",cat\n'])
def test_the_line_named_is_the_line_of_the_file(tmp_path: Path, before: str) -> None:
    text = f"file_name,note,label\n{before}b.jpg,,cat|dog\n"
    line = 1 + text[: text.index("b.jpg")].count("\n")
    assert f"line {line}: several labels" in refusal(written(tmp_path, text))


def test_a_missing_column_is_refused_with_the_columns_found(tmp_path: Path) -> None:
    file = written(tmp_path, "file_name,breed,age\na.jpg,cat,3\n")
    assert refusal(file) == (
        f"{file}: no label column; looked for label, class, choice, category, tag, found file_name, breed, age; rename the one that is it."
    )
    assert "no path column; looked for file_name, image_path, image" in refusal(
        written(tmp_path, "name,label\na,cat\n")
    )


def test_columns_of_any_name_are_found_by_what_is_in_them_and_told(tmp_path: Path) -> None:
    file = written(tmp_path, "foto;soort\na.jpg;cat\nb.JPEG;dog\nc.png;cat\nd.png;dog\n")
    found, note = read_label_table(file)
    assert [(row.path, row.label) for row in found] == [
        ("a.jpg", "cat"),
        ("b.JPEG", "dog"),
        ("c.png", "cat"),
        ("d.png", "dog"),
    ]
    assert note == "labels.csv: images from its column 'foto', labels from its column 'soort'"
    assert read_label_table(written(tmp_path, "file,label\na.jpg,cat\n"))[1] == ""


def test_a_number_is_a_file_only_where_no_column_has_files(tmp_path: Path) -> None:
    file = written(tmp_path, "id,photo,label\n1,a.jpg,cat\n2,b.jpg,dog\n")
    assert pairs(file) == [("a.jpg", "cat"), ("b.jpg", "dog")]
    assert pairs(written(tmp_path, "id,label\na1,cat\nb2,dog\n")) == [("a1", "cat"), ("b2", "dog")]


def test_a_table_of_groups_invents_no_labels(tmp_path: Path) -> None:
    file = written(tmp_path, "file,patient,sex\na.jpg,1,f\nb.jpg,1,f\nc.jpg,2,m\nd.jpg,2,m\n")
    found, note = read_label_table(file, "patient")
    assert [(row.label, row.group) for row in found] == [(None, "1"), (None, "1"), (None, "2"), (None, "2")]
    assert note == ""


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("foto,soort,weight\na.jpg,cat,1\nb.jpg,cat,2\n", "label"),
        ("foto,weight\na.jpg,1\nb.jpg,2\nc.jpg,3\n", "label"),  # as many values as images are not classes
        ("foto,mask,label\na.jpg,a.png,cat\n", "path"),
        ("number,label\n1,cat\n", "path"),
    ],
    ids=["two others", "measurements", "two of images", "no file names"],
)
def test_columns_that_are_in_doubt_are_not_guessed(tmp_path: Path, text: str, missing: str) -> None:
    assert f"no {missing} column" in refusal(written(tmp_path, text))


@pytest.mark.parametrize("text", ["file_name,label\n", "file_name,label\na.jpg,\nb.jpg,\n"])
def test_a_table_without_labels_is_refused(tmp_path: Path, text: str) -> None:
    file = written(tmp_path, text)
    assert refusal(file) == f"{file}: no labeled rows in it."


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty."),
        (b"\xff\xfe", "empty."),
        (b"file_name,label\nb\xe4\x81r.jpg,cat\n", "not text in UTF-8, UTF-16 or Windows-1252."),
        (b"file_name,label\na.jpg,c\0at\n", "not text: it has NUL bytes in it."),
        (b"\x89PNG\r\n\x1a\n\0\0\0", "not text: it has NUL bytes in it."),
    ],
    ids=["empty", "a mark only", "no encoding", "NUL", "an image"],
)
def test_a_file_that_is_not_text_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    file = written(tmp_path, data)
    assert refusal(file) == f"{file}: {words}"


def test_a_table_as_windows_saves_it_is_read_and_told(tmp_path: Path) -> None:
    found, note = read_label_table(
        written(tmp_path, "file_name;label\nb\u00e4r.jpg;f\u00fcchse\n".encode("cp1252"))
    )
    assert [(row.path, row.label) for row in found] == [("b\u00e4r.jpg", "f\u00fcchse")]
    assert note == "labels.csv: read as Windows-1252, as it is not UTF-8"


def test_a_line_of_json_lines_ends_where_it_ends(tmp_path: Path) -> None:
    lines = '{"file_name": "a.jpg", "label": "x\u2028y"}\r\n{"file_name": "b.jpg", "label": "z"}\n'
    assert pairs(written(tmp_path, lines, "labels.jsonl")) == [("a.jpg", "x\u2028y"), ("b.jpg", "z")]


def test_a_folder_in_place_of_a_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").mkdir()
    assert (
        refusal(tmp_path / "labels.csv")
        == f"--labels {tmp_path}/labels.csv: cannot be read (Is a directory)."
    )


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "lables.csv") == f"--labels {tmp_path}/lables.csv: no such file."


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("file_name,label\na.jpg,cat\nb.jpg,dog,extra,cells\n", "labels.csv", "not a table"),
        ('{"file_name": "a.jpg", "label": \n', "labels.jsonl", "not JSON lines"),
        ("", "labels.jsonl", "labels.jsonl: "),
        ("[1, 2]\n", "labels.jsonl", "labels.jsonl: "),
        ('{}\n{"label": ' + "1" * 5000 + "}", "labels.jsonl", "line 2 has a number of too many digits."),
        ("[" * 100_000 + "\n", "labels.jsonl", "not JSON lines: line 1 is nested too deep."),
        (
            'file_name,label\na.jpg,"' + "x" * 200_000,
            "labels.csv",
            "not a table: line 2 has a cell of more than 131,072 letters",
        ),
    ],
)
def test_a_broken_file_is_refused_and_never_a_traceback(
    tmp_path: Path, text: str, name: str, words: str
) -> None:
    assert words in refusal(written(tmp_path, text, name))


# Matching


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "set/photos"
    folder.mkdir(parents=True)
    return folder


def matched(
    found: list[LabelRow], file: Path, names: list[str], root: Path, labels_root: Path | None = None
) -> tuple[dict[str, str], str]:
    matched = match_labels(found, file, names, root, labels_root)
    labels, notes = matched.labels, matched.notes
    assert len(notes) == 1
    return labels, notes[0]


NAMES = ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/3.jpg"]


def test_paths_relative_to_the_label_file_are_matched(root: Path) -> None:
    found = rows(("photos/a/1.jpg", "cat"), ("./photos/a/../b/1.jpg", "dog"))
    labels, note = matched(found, root.parent / "labels.csv", NAMES, root)
    assert labels == {"a/1.jpg": "cat", "b/1.jpg": "dog"}
    assert note == "2 rows: 2 matched, 0 unknown"


def test_paths_relative_to_the_images_are_matched(root: Path, tmp_path: Path) -> None:
    labels, _ = matched(rows(("b/1.jpg", "dog")), tmp_path / "elsewhere/labels.csv", NAMES, root)
    assert labels == {"b/1.jpg": "dog"}


def test_absolute_paths_are_matched(root: Path, tmp_path: Path) -> None:
    labels, _ = matched(rows((f"{root}/b/1.jpg", "dog")), tmp_path / "labels.csv", NAMES, root)
    assert labels == {"b/1.jpg": "dog"}


def test_paths_relative_to_labels_root_are_matched(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "elsewhere/labels.csv"
    labels, _ = matched(rows(("1.jpg", "dog"), ("x.jpg", "cat")), file, NAMES, root, root / "b")
    assert labels == {"b/1.jpg": "dog"}


def test_the_label_file_comes_before_labels_root(root: Path) -> None:
    labels, _ = matched(rows(("1.jpg", "dog")), root / "a/labels.csv", NAMES, root, root / "b")
    assert labels == {"a/1.jpg": "dog"}


def test_a_base_name_is_matched_where_it_is_unique(root: Path, tmp_path: Path) -> None:
    found = rows(("/mnt/disk/2.jpg", "cat"), ("3.jpg", "dog"), ("old/place/1.jpg", "cat"))
    labels, note = matched(found, tmp_path / "labels.csv", NAMES, root)
    assert labels == {"a/2.jpg": "cat", "b/3.jpg": "dog"}
    assert note == (
        "3 rows: 2 matched (2 of them by file name alone), 0 unknown, "
        "1 ambiguous: old/place/1.jpg (line 4; 2 images of that name)"
    )


def test_a_name_without_its_suffix_is_matched_where_it_is_unique(root: Path) -> None:
    names = [*NAMES, "c/x.png", "c/x.jpg", "c/img.v2.jpg"]
    found = rows(
        ("a/1", "cat"), ("3", "dog"), ("c/x", "cow"), ("img.v2", "owl"), ("1", "ape"), ("c/3.png", "emu")
    )
    labels, note = matched(found, root / "labels.csv", names, root)
    assert labels == {"a/1.jpg": "cat", "b/3.jpg": "dog", "c/img.v2.jpg": "owl"}
    assert note == (
        "6 rows: 3 matched (2 of them by file name alone), 1 unknown: c/3.png (line 7), "
        "2 ambiguous: c/x (line 4; 2 images of that name), 1 (line 6; 2 images of that name)"
    )


def test_unknown_rows_are_counted_and_the_first_are_listed_with_their_lines(root: Path) -> None:
    names = [f"{number}.jpg" for number in range(291)]
    found = rows(*((f"{number}.jpg", "cat") for number in range(300)))
    _, note = matched(found, root / "labels.csv", names, root)
    assert note == (
        "300 rows: 291 matched, 9 unknown: 291.jpg (line 293), 292.jpg (line 294), 293.jpg (line 295), "
        "294.jpg (line 296), 295.jpg (line 297) and 4 more"
    )


def test_windows_paths_are_matched(root: Path) -> None:
    labels, _ = matched(rows(("a\\1.jpg", "cat"), (".\\b\\1.jpg", "dog")), root / "l.csv", NAMES, root)
    assert labels == {"a/1.jpg": "cat", "b/1.jpg": "dog"}


@pytest.mark.parametrize(("disk", "table"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_are_matched_however_they_are_composed(root: Path, disk: str, table: str) -> None:
    names = [unicodedata.normalize(disk, f"{folder}/bär.jpg") for folder in ("Übung", "b")]
    found = rows((unicodedata.normalize(table, "Übung/bär.jpg"), "bear"))
    labels, _ = matched(found, root / "labels.csv", names, root)
    assert labels == {names[0]: "bear"}


def test_a_colon_in_a_name_is_part_of_the_name(root: Path) -> None:
    names = ["cam1/12:30.jpg", "cam2/12:30.jpg"]
    labels, _ = matched(
        rows(("cam1/12:30.jpg", "day"), ("cam2/12:30.jpg", "night")), root / "l.csv", names, root
    )
    assert labels == {"cam1/12:30.jpg": "day", "cam2/12:30.jpg": "night"}


def test_rows_that_disagree_are_refused_with_both_labels_and_the_line(root: Path) -> None:
    found = rows(("a/1.jpg", "cat"), ("b/1.jpg", "cat"), ("./a/1.jpg", "dog"))
    file = root / "labels.csv"
    with pytest.raises(DataError) as caught:
        match_labels(found, file, NAMES, root, None)
    assert str(caught.value) == (
        f"{file}, line 4: ./a/1.jpg is labeled 'dog' here and 'cat' before; keep one."
    )


def test_rows_that_say_the_same_twice_are_accepted(root: Path) -> None:
    labels, note = matched(rows(("a/1.jpg", "cat"), ("a/1.jpg", "cat")), root / "l.csv", NAMES, root)
    assert labels == {"a/1.jpg": "cat"}
    assert note == "2 rows: 2 matched, 0 unknown"


def test_a_file_that_matches_nothing_is_refused_with_an_example(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    with pytest.raises(DataError) as caught:
        match_labels(rows(("x.jpg", "cat"), ("y.jpg", "dog")), file, NAMES, root, None)
    assert str(caught.value) == (
        f"{file}: none of its 2 paths matches an image in {root}, e.g. x.jpg; "
        "name their folder with --labels-root."
    )


def test_each_split_goes_to_the_image_of_its_row(root: Path) -> None:
    found = [
        LabelRow(2, "a/1.jpg", "cat", "test"),
        LabelRow(3, "a/2.jpg", "dog", "train"),
        LabelRow(4, "b/1.jpg", "cat", None),
        LabelRow(5, "b/3.jpg", None, "test"),
    ]
    splits = match_labels(found, root / "labels.csv", NAMES, root, None).splits
    assert splits == {"a/1.jpg": "test", "a/2.jpg": "train", "b/3.jpg": "test"}


def test_a_split_counts_without_a_label_too_and_in_any_spelling(tmp_path: Path) -> None:
    file = written(tmp_path, "File,LABEL,Split\na.jpg,cat,Training\nb.jpg,,testing\nc.jpg,dog,valid\n")
    found, note = read_label_table(file)
    assert [(row.path, row.label, row.split) for row in found] == [
        ("a.jpg", "cat", "train"), ("b.jpg", None, "test"), ("c.jpg", "dog", "val"),
    ]  # fmt: skip
    assert note == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "file,label,split\na.jpg,cat,holiday\n",
            "line 2: split 'holiday' is none of test, testing, train, training, val, valid, validation",
        ),
        ("file,label,label\na.jpg,cat,dog\n", "has the column 'label' twice; rename one."),
        (
            "a.jpg,cat\nb.jpg,dog\n",
            "its first line names an image, not columns; put a line like file,label before it.",
        ),
        ("file,label,split\na.jpg,,test\nb.jpg,,train\n", "no labeled rows in it."),
    ],
)
def test_what_would_be_misread_is_refused(tmp_path: Path, text: str, words: str) -> None:
    assert words in refusal(written(tmp_path, text))


def test_rows_of_one_image_that_disagree_on_its_split_are_refused(root: Path) -> None:
    found = [LabelRow(2, "a/1.jpg", "cat", "test"), LabelRow(3, "a/1.jpg", "cat", "train")]
    with pytest.raises(
        DataError, match=r"line 3: a/1\.jpg is in split 'train' here and 'test' before; keep one\."
    ):
        match_labels(found, root / "labels.csv", NAMES, root, None)


def test_one_label_is_one_label_however_it_is_written(tmp_path: Path) -> None:
    assert (
        read_label_table(
            written(
                tmp_path, '{"file": "a.jpg", "label": NaN}\n{"file": "b.jpg", "label": "x"}\n', "nan.jsonl"
            )
        )[0][0].path
        == "b.jpg"
    )
    words = ["caf\u00e9", "cafe\u0301", 1, 1.0, "1"]
    lines = [json.dumps({"file": f"{number}.jpg", "label": word}) for number, word in enumerate(words)]
    found, _ = read_label_table(written(tmp_path, "\n".join(lines), "labels.jsonl"))
    assert [row.label for row in found] == ["caf\u00e9", "caf\u00e9", "1", "1", "1"]


def test_a_second_column_of_labels_is_told_and_an_empty_one_is_none(tmp_path: Path) -> None:
    assert read_label_table(written(tmp_path, "file,label,class\na.jpg,cat,x\n"))[1].endswith(
        "labels from its column 'label', not 'class'"
    )
    found, _ = read_label_table(written(tmp_path, "photo,garment,remark\na.jpg,coat,\nb.jpg,coat,\n"))
    assert [row.label for row in found] == ["coat", "coat"]


def test_a_path_out_of_the_images_finds_nothing(root: Path) -> None:
    found = rows(("../../../../etc/passwd", "x"), ("/etc/hostname", "x"), ("a/1.jpg", "cat"))
    labels, note = matched(found, root / "labels.csv", NAMES, root)
    assert labels == {"a/1.jpg": "cat"}
    assert note.startswith("3 rows: 1 matched, 2 unknown")

"""The run folder: nothing half written, nothing lost, nothing written among the user's images."""

import errno
import os
from pathlib import Path

import pytest

from labelwise import rundir
from labelwise.errors import CheckpointError, UsageError
from labelwise.rundir import RunDirectory


def _make_run(path: Path) -> RunDirectory:
    run = RunDirectory(path.absolute())
    rundir.write_text(run.config, "[pretrain]\n")
    return run


def test_files_lie_where_the_contract_says() -> None:
    run = RunDirectory(Path("/r"))
    names = {
        "config": "config.toml",
        "environment": "environment.json",
        "data": "data.json",
        "splits": "splits",
        "test_lock": "splits/test.json",
        "metrics": "metrics.jsonl",
        "checkpoints": "checkpoints",
        "encoder": "encoder.safetensors",
        "head": "head.safetensors",
        "classifier": "classifier.safetensors",
        "classifier_json": "classifier.json",
        "calibration": "calibration.json",
        "familiar": "familiar.safetensors",
        "results": "finetune/results.jsonl",
        "predictions": "finetune/predictions.parquet",
        "report_html": "report.html",
        "report_md": "report.md",
        "report_json": "report.json",
    }
    assert {name: getattr(run, name).relative_to("/r").as_posix() for name in names} == names


# --- writing


def test_a_failing_write_leaves_the_old_file_whole(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    rundir.write_text(file, "the old one")

    def fail_half_way(fresh: Path) -> None:
        fresh.write_text("half of the n", encoding="utf-8")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        rundir.write_atomically(file, fail_half_way)
    assert file.read_text(encoding="utf-8") == "the old one"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_of_files_that_are_written_together_all_change_or_none(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    rundir.write_texts(dict.fromkeys(files, "old"))

    def full(fresh: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left on device"):
        rundir.write_together({files[0]: lambda fresh: fresh.write_text("new"), files[1]: full})
    assert [file.read_text() for file in files] == ["old", "old"]
    assert sorted(tmp_path.iterdir()) == files


def test_a_failing_first_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        rundir.write_json(tmp_path / "data.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_write_makes_its_folders_and_can_be_read_by_others(tmp_path: Path) -> None:
    file = tmp_path / "finetune" / "deep" / "a.json"
    rundir.write_json(file, {"label": "Ärger", "share": 0.5})
    assert rundir.read_json(file) == {"label": "Ärger", "share": 0.5}
    assert file.stat().st_mode & 0o777 == 0o644


# --- reading


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"data\.json: missing; .* Run `labelwise pretrain` again\."):
        rundir.read_json(tmp_path / "data.json")


@pytest.mark.parametrize("content", [b'{"a": 1', b"", b"\xff\xfe{}"])
def test_a_damaged_file_says_what_to_do(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "data.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"data\.json: damaged .*put it back from a copy"):
        rundir.read_json(file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 200_000, "nested too deep"),
        ("null", "not a table of names and values"),
        ("[]", "not a table of names and values"),
        ('{"order": 5, "sha256": {}}', "order: input should be a valid list"),
        ('{"order": [NaN], "sha256": {}}', "NaN is no number"),
        ("1" * 5000, "digits"),
        ('{"order": [1e999], "sha256": {}}', "1e999 is larger than any number of ours"),
        (
            f'{{"order": [-{10**30}], "sha256": {{}}}}',
            "-1000000000000000000 is larger than any number of ours",
        ),
    ],
)
def test_a_file_of_another_form_is_damaged(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "splits" / "draw-0-0.json"
    rundir.write_text(file, content)
    with pytest.raises(CheckpointError, match=words):
        rundir.read_json(file)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f'{{"a": 1}}\n{content}\n')
    if "order" not in words:
        with pytest.raises(CheckpointError, match=rf"rows\.jsonl, line 2: damaged .*{words}"):
            rundir.read_jsonl(rows)


def test_a_pipe_or_folder_in_place_of_a_file_is_damage_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "data.json")
    (tmp_path / "rows.jsonl").mkdir()
    for read in (
        lambda: rundir.read_json(tmp_path / "data.json"),
        lambda: rundir.read_jsonl(tmp_path / "rows.jsonl"),
    ):
        with pytest.raises(CheckpointError, match=r"damaged \(not a file\)"):
            read()
    assert rundir.read_derived(tmp_path / "data.json") is None


def test_what_is_kept_of_a_run_with_a_damaged_file_is_said(tmp_path: Path) -> None:
    for name in ("data.json", "report.json", "encoder.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"its encoder is kept by .* --init {tmp_path}"):
        rundir.read_json(tmp_path / "data.json")
    with pytest.raises(CheckpointError, match="delete it, `labelwise report` writes it again"):
        rundir.read_json(tmp_path / "report.json")


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    file, rows = tmp_path / "new" / "rows.jsonl", [{"step": 1}, {"name": 'a "b"\n\\c', "ä": [0.5, None]}]
    for row in rows:
        rundir.append_jsonl(file, row)
    assert rundir.read_jsonl(file) == rows


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0c", "\x1e"], ids=ascii)
def test_a_name_with_an_odd_line_separator_stays_one_row(tmp_path: Path, sign: str) -> None:
    file, rows = tmp_path / "rows.jsonl", [{"name": f"a{sign}b"}, {"step": 2}]
    for row in rows:
        rundir.append_jsonl(file, row)
    assert rundir.read_jsonl(file) == rows


def test_no_file_means_no_rows(tmp_path: Path) -> None:
    assert rundir.read_jsonl(tmp_path / "rows.jsonl") == []


def test_a_torn_last_line_is_dropped_wherever_it_was_cut(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    whole, last = b'{"step": 1}\n', '{"name": "Äste", "step": 2}'.encode()
    for cut in range(1, len(last)):
        file.write_bytes(whole + last[:cut])
        assert rundir.read_jsonl(file) == [{"step": 1}], last[:cut]


def test_a_row_written_after_a_torn_line_is_not_lost(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    rundir.append_jsonl(file, {"step": 2})
    rundir.append_jsonl(file, {"step": 3})
    assert rundir.read_jsonl(file) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_torn_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"rows\.jsonl, line 2: damaged .*; delete that line\."):
        rundir.read_jsonl(file)


def test_rewriting_replaces_all_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rundir.append_jsonl(file, {"step": 1})
    rundir.rewrite_jsonl(file, [{"step": 7}, {"step": 8}])
    assert rundir.read_jsonl(file) == [{"step": 7}, {"step": 8}]


# --- runs


def test_latest_names_the_newest_run_by_a_link_that_can_be_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        run = _make_run(tmp_path / "runs" / name)
        rundir.point_latest(run)
        assert rundir.open_run(rundir.LATEST).path == run.path.resolve()
    assert Path("runs/latest").readlink() == Path("second")
    assert sorted(os.listdir("runs")) == ["first", "latest", "second"]


def test_a_run_elsewhere_never_becomes_the_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rundir.point_latest(_make_run(tmp_path / "labelwise-demo" / "runs" / "digits"))
    rundir.point_latest(_make_run(tmp_path / "runs" / "study" / "one"))
    assert not os.path.lexists("runs/latest")


def test_opening_no_run_says_how_to_start_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        rundir.open_run(rundir.LATEST)
    assert str(caught.value) == (
        "runs/latest: no run found here; start one with `labelwise pretrain IMAGES`, or name one with --run DIR."
    )
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "latest").symlink_to("removed")
    with pytest.raises(UsageError, match="no run found here"):
        rundir.open_run(rundir.LATEST)


def test_opening_another_folder_or_a_file_says_that_it_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"")
    for path in (tmp_path, tmp_path / "photo.jpg"):
        with pytest.raises(
            UsageError, match=r"not a run folder \(no config\.toml in it\); name one with --run"
        ):
            rundir.open_run(path)


@pytest.mark.parametrize(
    "name", ["classifier.json", "finetune/label_check.json", "finetune/lookalikes.json", "model-card.md"]
)
def test_a_folder_where_a_file_is_replaced_in_the_end_is_refused_at_the_start(
    tmp_path: Path, name: str
) -> None:
    run = _make_run(tmp_path / "run")
    (run.path / name).mkdir(parents=True)
    with pytest.raises(CheckpointError, match=rf"{name}: a folder, where a file belongs; move it away\."):
        rundir.open_run(run.path)


@pytest.mark.parametrize("out", ["photos", "photos/run", "photos/a/../run", "link/run"])
def test_an_output_folder_among_the_images_is_refused(tmp_path: Path, out: str) -> None:
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "link").symlink_to("photos")
    with pytest.raises(
        UsageError, match=r"lies inside the image folder .*, which is never written to; choose"
    ):
        rundir.check_output_folder(tmp_path / out, tmp_path / "photos")


@pytest.mark.parametrize("out", ["photos-run", "runs/photos", "photos/../run"])
def test_an_output_folder_beside_the_images_is_accepted(tmp_path: Path, out: str) -> None:
    (tmp_path / "photos").mkdir()
    rundir.check_output_folder(tmp_path / out, tmp_path / "photos")


def test_an_output_folder_that_holds_the_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(UsageError, match=r"holds the images .*; choose another --out"):
        rundir.check_output_folder(tmp_path, tmp_path / "photos")


def test_a_folder_with_other_things_in_it_is_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    with pytest.raises(UsageError, match=r"not empty and not a run \(it holds chapter.tex\)"):
        rundir.check_output_folder(tmp_path / "thesis", tmp_path / "photos")


def test_what_a_kill_left_half_written_is_no_foreign_file(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for name in (".data.json-x1", ".environment.json-x2", ".config.toml-x3", "owner.json", "splits"):
        (out / name).write_text("")
    for name in ("suggested.jsonl", "annotations.jsonl", "classes.json"):  # of the run that it goes on from
        (out / name).write_text("")
    rundir.check_output_folder(out, tmp_path / "photos")
    (out / ".bashrc").write_text("")
    with pytest.raises(UsageError, match=r"it holds \.bashrc"):
        rundir.check_output_folder(out, tmp_path / "photos")


def test_bytes_of_a_folder_are_those_of_what_is_there_still(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "a").write_bytes(bytes(5))
    (tmp_path / "below" / "b").write_bytes(bytes(7))
    (tmp_path / "moved").symlink_to(tmp_path / "by another process")
    assert rundir.folder_bytes(tmp_path) == 12
    assert rundir.folder_bytes(tmp_path / "deleted by another process") == 0

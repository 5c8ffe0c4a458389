import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kick.errors import RunError
from kick.files import check_writable, new_directory, safe_name, write_text


@given(st.text(min_size=1))
def test_a_safe_name_stays_inside_its_folder_and_is_unique(tmp_path_factory, name):
    safe = safe_name(name)
    assert "/" not in safe
    assert safe not in (".", "..", "")
    assert not safe.startswith(".")


def test_ordinary_names_stay_as_they_are():
    for name in ("wanda@0.5", "sparsegpt@2:4", "mmlu_letters"):
        assert safe_name(name) == name
    assert safe_name("../x") == "%2E.%2Fx"
    assert len({safe_name(name) for name in ("a/b", "a%2Fb", "a b")}) == 3


def test_long_names_fit_a_file_system_and_stay_apart(tmp_path):
    long = ["x" * 400, "x" * 401, "模型" * 40, "模型" * 41]
    found = {safe_name(name) for name in long}
    assert len(found) == 4
    for name in found:
        with new_directory(tmp_path / name) as folder:
            (folder / "kick.json").touch()
    assert {path.name for path in tmp_path.iterdir()} == found


def test_a_disk_that_is_full_is_said_to_be(tmp_path):
    for error in (OSError(errno.ENOSPC, "No space left on device"), ValueError("I/O error: No space left on device")):
        with pytest.raises(RunError, match="the disk is full"), new_directory(tmp_path / "x"):
            raise error
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RunError) as caught, new_directory(tmp_path / "x"), new_directory(tmp_path / "y"):
        raise error
    assert str(caught.value).count("the disk is full") == 1  # told once, however many are on the way


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "scores.csv"
    write_text(path, "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_files_of_a_directory_may_be_read_by_whoever_may_enter_it(tmp_path):
    with new_directory(tmp_path / "made") as made:
        (made / "hidden").touch(0o600)  # as safetensors writes
    assert (tmp_path / "made" / "hidden").stat().st_mode & 0o777 == (tmp_path / "made").stat().st_mode & 0o666


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "checkpoint") as partial:  # noqa: PT012
        (partial / "half").write_text("x")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with new_directory(tmp_path / "checkpoint") as partial:
        (partial / "whole").write_text("x")
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["whole"]


def test_checking_leaves_nothing(tmp_path):
    check_writable(tmp_path / "new" / "deep")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        check_writable(tmp_path / "file")


def test_what_others_are_writing_is_left_alone(tmp_path, monkeypatch):
    import os
    import socket

    from kick import files

    beside = []
    monkeypatch.setattr(files.os, "replace", lambda source, target: beside.append(source))
    files.write_text(tmp_path / "mine", "x")
    with monkeypatch.context() as there:
        there.setattr(socket, "gethostname", lambda: "another")
        files.write_text(tmp_path / "theirs", "x")
        files.write_text(tmp_path / "forgotten", "x")
    os.utime(beside[2], (0, 0))
    files.clear_partials(tmp_path)
    assert list(tmp_path.iterdir()) == [beside[1]]

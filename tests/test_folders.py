"""Files that are whole or not there."""

import contextlib

import pytest

from rae import folders
from rae.folders import aside


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("error", [None, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_is_the_new_one_or_the_old_one(tmp_path, before, error, durable):
    path = tmp_path / "figures.json"
    if before:
        path.write_text(before)
    with pytest.raises(error) if error else contextlib.nullcontext(), aside(path, durable=durable) as hidden:
        hidden.write_text("new")
        assert (hidden.parent, hidden.name[0]) == (tmp_path, ".")
        assert path.read_text() == before if before else not path.exists()
        if error:
            raise error
    left = before if error else "new"
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == ({"figures.json": left} if left else {})


def test_a_durable_file_is_on_the_disk_before_it_has_its_name_and_its_name_after(tmp_path, monkeypatch):
    path, seen = tmp_path / "figures.json", []
    monkeypatch.setattr(folders, "fsync", lambda target: seen.append((target, path.exists())))
    for durable in (False, True):
        with aside(path, durable=durable) as hidden:
            hidden.write_text("new")
        assert seen == ([(hidden, False), (tmp_path, True)] if durable else [])
        path.unlink()

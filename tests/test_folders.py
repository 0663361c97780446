"""Files that are whole or not there, folders that one process holds, pointers of runs."""

import contextlib

import pytest

from rae import folders
from rae.folders import aside, find_folder, locked


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


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    folder = tmp_path / "new/folder"
    with locked(folder, ValueError("taken")):
        with pytest.raises(ValueError, match=r"^taken$"), locked(folder, ValueError("taken")):
            pytest.fail("held twice")
        with locked(tmp_path / "other", ValueError("taken")):
            pass
    with locked(folder, ValueError("taken")):
        pass
    with pytest.raises(ValueError, match=r"^taken$"), locked(folder, ValueError("other")):
        raise ValueError("taken")
    with locked(folder, ValueError("taken")):  # let go by an error as well
        assert [file.name for file in folder.iterdir()] == [".lock"]


@pytest.mark.parametrize("pointer", ["latest", "best"])
def test_a_pointer_to_a_checkpoint_that_is_gone_is_named(tmp_path, pointer):
    run = tmp_path / "run"
    (run / "checkpoints/000000016/model").mkdir(parents=True)
    asked = run if pointer == "latest" else run / "best"
    for text in ("000000016", "000000016\n"):
        (run / pointer).write_text(text)
        assert find_folder(asked, "a model") == run / "checkpoints/000000016/model"
    for text in ("000999999", "", "../x"):
        (run / pointer).write_text(text)
        said = rf"{run / pointer} names checkpoint '{text}', which is not there; .* named by itself, as {run}/check"
        with pytest.raises(ValueError, match=rf"{said}.*/000000016\. See `rae doctor {run}`"):
            find_folder(asked, "a model")
    (run / "checkpoints/000000016").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"which is not there; it has none\. See `rae doctor"):
        find_folder(asked, "a model")

"""What the modules that read and write files share."""

import errno

import pytest

from medusa_engine.files import first_line, is_hub_id, replacing


@pytest.mark.parametrize("name", ["org/name", "FasterDecoding/medusa-vicuna-7b-v1.3", "_a/_b"])
def test_hub_ids(name):
    assert is_hub_id(name)


@pytest.mark.parametrize("name", ["", "name", "./name", "../name", "org/..", "org/.a", "-org/name", "a/b/c", "/name"])
def test_what_the_hub_could_not_name(name):
    assert not is_hub_id(name)


def test_first_line():
    assert first_line(ValueError("\n one \n two")) == "one "
    assert first_line(ValueError("x" * 200)) == "x" * 160
    assert first_line(TimeoutError()) == "TimeoutError"


def test_replacing_makes_the_folder_and_leaves_one_file(tmp_path):
    path = tmp_path / "new" / "file"
    for text in ("old", "new"):
        with replacing(path) as partial:
            partial.write_text(text)
            assert path.exists() is (text == "new")
        assert path.read_text() == text
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_to_replace_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")

    def write_half():
        with replacing(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(type(error)) as raised:
        write_half()
    assert raised.value is error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]

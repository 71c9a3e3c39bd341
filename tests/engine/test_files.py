"""What the modules that open models and heads share."""

import pytest

from medusa_engine.files import first_line, is_hub_id


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

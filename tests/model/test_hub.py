"""A model's folder, and the files of its tokenizer."""

import json

import pytest

from notus.errors import UserError
from notus.model.hub import copy_tokenizer, model_folder


def test_tokenizer_files_are_copied_as_they_stand(tmp_path):
    (tmp_path / "to").mkdir()
    (tmp_path / "tokenizer.json").write_text(json.dumps({"odd": " spacing"}))
    copy_tokenizer(tmp_path, tmp_path / "to")
    assert (tmp_path / "to/tokenizer.json").read_bytes() == b'{"odd": " spacing"}'
    assert len(list((tmp_path / "to").iterdir())) == 1


@pytest.mark.parametrize("path", ["a\0b", "a" * 5000, "\ud800"])
def test_a_name_that_no_folder_can_have_is_refused(path):
    with pytest.raises(UserError, match="no such model folder here"):
        model_folder(path)


def test_a_local_folder_is_taken_as_it_is(tmp_path):
    assert model_folder(str(tmp_path)) == tmp_path

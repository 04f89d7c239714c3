"""The folder that a user's processes share."""

import os
import stat

import pytest

from flwr_moe.tasks.cache import cache_folder


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_it_is_made_once_and_for_this_user_alone(tmp_path):
    folder = cache_folder()
    assert folder == tmp_path / f"flwr-moe-{os.getuid()}" and cache_folder() == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_what_somebody_else_made_is_not_used(tmp_path, monkeypatch):
    mine = os.getuid()
    (tmp_path / f"flwr-moe-{mine + 1}").mkdir()
    monkeypatch.setattr("os.getuid", lambda: mine + 1)
    assert cache_folder() is None


def test_a_link_or_a_file_is_not_used(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    place = tmp_path / f"flwr-moe-{os.getuid()}"
    place.symlink_to(tmp_path / "elsewhere")
    assert cache_folder() is None
    place.unlink()
    place.write_bytes(b"")
    assert cache_folder() is None

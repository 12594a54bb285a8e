"""Folders that may not be looked into, also where whoever runs the tests may look into all."""

import errno
import os

import pytest


def lock(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the system refuse what lies in a folder of this name."""
    stat = os.stat

    def refused(path: object, **options: bool) -> os.stat_result:
        if f"{folder}{os.sep}" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return stat(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", refused)

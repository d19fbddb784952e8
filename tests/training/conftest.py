from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import synthetic


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """A cache of models that has the trained synthetic ones."""
    folder = tmp_path_factory.mktemp("synthetic")
    synthetic.put_into(folder)
    return folder

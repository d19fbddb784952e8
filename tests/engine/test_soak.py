"""The soak, short. ``make soak`` runs the long one."""

from tests.soak import check, soak


def test_soak(tmp_path):
    result = soak(tmp_path, number=60)
    assert result.aborted > result.requests / 40
    check(result, settled=False)

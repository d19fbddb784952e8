"""The soak, short. ``make soak`` runs the long one."""

from tests.soak import check, soak


def test_soak(models, expect):
    result = soak(models, expect, number=200, sample=40)
    assert result.aborted > 5
    check(result, settled=False)

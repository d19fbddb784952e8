"""The soak, short. ``make soak`` runs the long one."""

import pytest

from tests.soak import check, soak


@pytest.mark.parametrize(("number", "num_drafts"), [(200, 0), (24, 3)], ids=["v1", "v2 with drafts"])
def test_soak(models, expect, number, num_drafts):
    result = soak(models, expect, number=number, sample=40, num_drafts=num_drafts)
    assert result.aborted > number / 40
    check(result, settled=False, drafts=num_drafts > 0)

"""Every defence refuses options out of their range in one line, before anything is trained."""

from __future__ import annotations

import pytest

from otcclip.defenses import DEFENSES, make
from otcclip.errors import UserError
from otcclip.specs import Spec, options_of

BAD = (
    "clip:smoothing=-.1",
    "roclip:every=0",
    "roclip:pool=2",
    "safeclip:growth=-1",
    "cleanclip:lr=0",
    "cleanclip:epoch_share=0",
    "cleanclip:lambda_view=-1",
    "par:tau=-1",
    "par:lr=-1",
    "par:epoch_share=-.5",
    "otcclip-paper:every=0",
    "otcclip-paper:pool=5",
    "otcclip-paper:pool=0",
    "otcclip-paper:lambda_cross=-1",
    "otcclip-paper:lambda_view=-1",
    "otcclip:alpha=7",
    "otcclip:alpha=0",
    "otcclip:confident=1.1",
    "otcclip:smoothing=1.1",
    "otcclip:unlikely=-.1",
    "otcclip:local_share=2",
    "otcclip:first_refresh=0",
    "otcclip:refresh=0",
    "otcclip:warmup_epochs=-1",
    "otcclip:lambda_ot=-1",
    "otcclip:lambda_view=-1",
)


@pytest.mark.parametrize("text", BAD)
def test_out_of_range_is_one_line(text: str) -> None:
    spec = Spec.parse(text)
    option = spec.options[0][0]
    with pytest.raises(UserError, match=rf"^{spec.name}: .*{option}") as caught:
        make(spec.name, **options_of("defence", DEFENSES, spec))
    assert "\n" not in str(caught.value)


def test_every_defence_is_here() -> None:
    assert {text.partition(":")[0] for text in BAD} == {member.name for member in DEFENSES.values()}

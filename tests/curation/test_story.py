"""What a scan says when it is done: no name is cut, however narrow the terminal."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from otcclip.curation.story import _detection
from otcclip.detectors import DETECTORS


def test_no_score_is_cut_where_many_attacks_were_tried() -> None:
    attacks = ["badnets", "blended", "clean-label", "sig", "targeted", "mixed-captions"]
    scores = [name.replace("-", "_") for name in DETECTORS]
    found = {f"{name}_score": {attack: {"auroc": 0.99, "fpr95": 0.01} for attack in attacks} for name in scores}
    out = StringIO()
    Console(file=out, width=80).print(_detection({"actions": {attack: {} for attack in attacks}, "detection": found}))
    said = out.getvalue()
    assert all(f" {name} " in said for name in scores) and "…" not in said

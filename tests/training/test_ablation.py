"""The recipe that ablates what is no option: every change changes what it says it changes, and nothing else is one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from otcclip.defenses import otcclip as defense
from otcclip.defenses.base import PairBatch
from otcclip.errors import UserError
from otcclip.evidence import belief, matching, neighbours
from otcclip.evidence.belief import Belief

SPEC = importlib.util.spec_from_file_location("ablation", Path(__file__).parents[2] / "recipes" / "ablation.py")
assert SPEC is not None and SPEC.loader is not None
ablation = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(ablation)

PATCHED = (
    (matching, "EPSILON"),
    (belief, "p_value"),
    (defense.OTCClip, "_targets"),
    (neighbours, "views"),
    (neighbours, "doubtful"),
    (neighbours, "copies"),
    (belief, "neighbour_evidence"),
    (belief, "believed"),
    (belief, "in_measure"),
    (belief, "rarely_unheard"),
)
KINDS = 40


@pytest.fixture(autouse=True)
def put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in PATCHED:
        monkeypatch.setattr(module, name, getattr(module, name))


@pytest.fixture(scope="module")
def corpus() -> tuple[Tensor, Tensor, Tensor]:
    """Images, tokens and captions: forty kinds of one to seven images, under a caption each."""
    generator = torch.Generator().manual_seed(0)

    def picture() -> Tensor:
        coarse = torch.rand(1, 3, 6, 6, generator=generator)
        return torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")[0]

    images, caption_of = [], []
    for kind in range(KINDS):
        base = picture()
        for _ in range(1 + kind % 7):
            images.append(base + 0.15 * picture() + 0.05 * torch.rand(3, 32, 32, generator=generator))
            caption_of.append(kind)
    pixels = (255 * torch.stack(images) / 1.3).clamp(0, 255).to(torch.uint8)
    tokens = torch.zeros(KINDS, 8, dtype=torch.int64)
    for kind in range(KINDS):
        tokens[kind, :4] = torch.tensor([49406, 1000 + kind, 2000 + kind // 4, 49407])
    return pixels, tokens, torch.tensor(caption_of)


CHANGES = [
    "epsilon=.03",
    "p-value=share",
    "targets=own",
    "evidence-views=whole",
    "evidence-views=windows",
    "evidence-views=bands",
    "voices=each",
    "rate=one",
    "measure=none",
    "words=none",
    "copies=none",
]


def test_every_change_is_tested() -> None:
    assert {text.split("=")[0] for text in CHANGES} == set(ablation.CHANGES)


def state() -> list[object]:
    return [getattr(module, name) for module, name in PATCHED]


@pytest.mark.parametrize("text", CHANGES)
def test_a_change_changes_one_thing_and_pairs_can_be_judged(corpus: tuple[Tensor, Tensor, Tensor], text: str) -> None:
    before, believed = state(), Belief.gather(*corpus, alpha=0.05)
    found = neighbours.neighbour_evidence(*corpus)
    ablation.change(text)
    changed = sum(one is not other for one, other in zip(before, state(), strict=True))
    assert changed == (2 if text == "words=none" else 1)
    after = Belief.gather(*corpus, alpha=0.05)
    if text.startswith("evidence-views"):
        assert len(after.voters) == {"whole": 1, "windows": 10, "bands": 4}[text.split("=")[1]]
        fewer = neighbours.neighbour_evidence(*corpus)
        assert bool((fewer.own <= found.own).all())  # the worst of fewer views is no worse
    if text == "p-value=share":
        assert after.suspicion.equal((after.own * found.copies).clamp(max=1.0))
    if text == "targets=own":
        rows = torch.arange(3)
        batch = PairBatch(rows, (), corpus[1][:3], rows)
        expected = torch.full((3, 3), 0.2 / 3).fill_diagonal_(0.8 + 0.2 / 3)
        torch.testing.assert_close(defense.OTCClip(smoothing=0.2)._targets(batch), expected)
    if text == "measure=none":
        assert belief.in_measure(torch.ones(9, dtype=torch.bool)).all()
    if text == "rate=one":  # one of three under a caption, by luck
        lucky = torch.tensor([0.04, 1.0, 1.0])
        assert belief.believed(lucky, torch.zeros(3, dtype=torch.int64), torch.eye(1), 0.05).tolist() == [1, 0, 0]
    if text == "voices=each":
        assert not torch.equal(after.weight, believed.weight)


def test_nothing_changes_nothing() -> None:
    before = state()
    ablation.change("nothing")
    assert all(one is other for one, other in zip(before, state(), strict=True))


@pytest.mark.parametrize("text", ["", "epsilon=much", "words=some", "sharpness=1"])
def test_what_is_no_change_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        ablation.change(text)


def test_what_is_not_there_is_not_ablated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(matching, "EPSILON")
    with pytest.raises(AttributeError, match="no EPSILON to ablate"):
        ablation.change("epsilon=.03")

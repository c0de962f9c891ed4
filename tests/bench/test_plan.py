"""Groups, defences, rates and seeds become cells; whatever cannot be is one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from otcclip import attacks, defenses
from otcclip.attacks import ModelSurrogate
from otcclip.bench.groups import ALIASES, NONE, at_rate, parse_group, parse_groups
from otcclip.bench.matrix import jobs_of
from otcclip.bench.plan import BenchSpec, check_attacks, parse_defense, plan, slug
from otcclip.data.emoji_load import load_emoji
from otcclip.errors import UserError
from otcclip.models import create_two_tower
from otcclip.specs import Spec, options_of, takes
from otcclip.training.setting import start_of, surrogate_of

PAIRS = 8974


def bench(**changed: Any) -> BenchSpec:
    return BenchSpec("corpora/emoji", "runs/matrix", **changed)


def test_the_cross_product_and_what_it_stands_on() -> None:
    cells = plan(bench(attacks=("badnets", "sig+blended"), defenses=("otcclip", "roclip"), seeds=(0, 1)), PAIRS)
    named = [(cell.group.label, cell.defense.label, cell.seed) for cell in cells]
    rows = [(group, name) for group in ("badnets", "sig+blended") for name in ("clip", "otcclip", "roclip")]
    assert sorted(named) == sorted([(NONE, "clip", s) for s in (0, 1)] + [(*row, s) for s in (0, 1) for row in rows])
    assert len({cell.folder for cell in cells}) == len(cells)
    by_name = dict(zip(named, cells, strict=True))
    run = by_name["sig+blended", "roclip", 1].run
    assert (run.attacks, run.defense, run.seed, run.threads, run.poisoned) == (("sig", "blended"), "roclip", 1, 1, True)
    assert not by_name[NONE, "clip", 0].run.poisoned and by_name[NONE, "clip", 0].run.attacks == ()
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells), "a first picture after the first seed"


def test_a_cell_is_the_same_alone_and_in_any_matrix() -> None:
    whole = plan(bench(attacks=("badnets", "sig", NONE), defenses=("otcclip", "par"), seeds=(0, 1)), PAIRS)
    alone = plan(bench(attacks=("sig",), defenses=("par",), seeds=(1,), reference=False), PAIRS)
    specs = {cell.folder: cell.run for cell in whole}
    assert [cell.defense.label for cell in alone] == ["clip", "par"]
    for cell in alone:
        assert specs[cell.folder] == cell.run and specs[cell.folder].identity() == cell.run.identity()


def test_what_a_fine_tuning_defence_starts_from_is_planned_before_it() -> None:
    cells = plan(bench(attacks=("badnets",), defenses=("cleanclip",), seeds=(0,), reference=False), PAIRS)
    first, second = cells
    start = start_of(second.run)
    assert start is not None and start.folder == first.folder and start.identity() == first.run.identity()


def test_aliases() -> None:
    groups = parse_groups(("plain", "adaptive", NONE))
    assert [group.label for group in groups] == [*ALIASES["plain"], *ALIASES["adaptive"], NONE]
    planted = {Spec.parse(text).name for group in groups for text in group.attacks}
    assert (
        {"badnets", "blended", "sig", "wanet", "filter", "clean-label", "targeted"} <= planted <= set(attacks.ATTACKS)
    )
    assert groups[-1].attacks == ()
    assert plan(bench(attacks=("plain",)), PAIRS) == plan(bench(attacks=ALIASES["plain"]), PAIRS)
    for alone in (NONE, "plain"):
        with pytest.raises(UserError, match=f"'{alone}' stands for itself"):
            parse_group(f"badnets+{alone}")


def test_specs_in_groups() -> None:
    group = parse_group("badnets:target=family: man, woman,count=45+targeted:images=4")
    assert group.attacks == ("badnets:count=45,target=family: man, woman", "targeted:images=4")
    assert group.label == "+".join(group.attacks)
    choice = parse_defense("otcclip:repair=no,alpha=.01")
    assert (choice.name, choice.options) == ("otcclip", {"repair": False, "alpha": 0.01})
    assert choice.label == "otcclip:alpha=.01,repair=no"
    cells = plan(bench(attacks=("badnets",), defenses=("otcclip", choice.label), seeds=(0,)), PAIRS)
    assert len({cell.folder for cell in cells}) == len(cells) == 4
    assert cells[-1].run.options == choice.options and cells[-1].run.name == slug(choice.label)


@given(st.floats(1e-4, 0.5), st.integers(100, 100_000))
def test_a_rate_sets_every_count(rate: float, pairs: int) -> None:
    badnets, targeted = (Spec.parse(text) for text in at_rate(parse_group("badnets+targeted"), rate, pairs).attacks)
    assert int(dict(badnets.options)["count"]) == max(1, round(rate * pairs))
    planted = 16 * int(dict(targeted.options)["copies"])  # a targeted attack keeps its 16 images
    assert abs(planted - max(16, rate * pairs)) <= 8.001


@pytest.mark.parametrize("name", [name for name in attacks.ATTACKS if name != "label-swap"])
def test_what_is_planted_is_the_share_asked_for(name: str, small_emoji: Path, tmp_path: Path) -> None:
    """Of every attack there is, but the one that takes no rate: what it plants, not what its option says."""
    split = load_emoji(small_emoji, 64, "twemoji")
    (text,) = at_rate(parse_group(name), 0.4, len(split.train)).attacks
    spec = Spec.parse(text)
    if takes(attacks.ATTACKS[name], "target"):
        spec = spec.with_options(target="rocket")
    if name == "badclip":
        np.save(tmp_path / "patch.npy", np.zeros((3, 12, 12), np.float32))
        spec = spec.with_options(patch=tmp_path / "patch.npy")
    if name == "low-ot":
        spec = spec.with_options(templates=2, choice=1)
    made = attacks.make(name, **options_of("attack", attacks.ATTACKS, spec))
    model = ModelSurrogate(create_two_tower("otcclip-tiny", seed=0))
    (planned,) = attacks.make_plans(split.train, split.test, [made], 0, model)
    assert len(planned.records) == round(0.4 * len(split.train)) == 48


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"attacks": ("badnet",)}, "unknown attack 'badnet'; did you mean 'badnets'"),
        ({"attacks": ("badnets:cuont=9",)}, "attack 'badnets': no option 'cuont'; did you mean 'count'"),
        ({"attacks": ("badnets+",)}, "unknown attack|no attack|found no name"),
        ({"defenses": ("otclip",)}, "unknown defence 'otclip'; did you mean 'otcclip'"),
        ({"defenses": ("otcclip:alpha=high",)}, "defence 'otcclip': option alpha: expected a number"),
        ({"attacks": ()}, "at least one attack"),
        ({"seeds": ()}, "at least one attack, one defence and one seed"),
        ({"seeds": (-1,)}, "--seeds -1: seeds are whole numbers"),
        ({"seeds": (0, 2**32)}, "--seeds 4294967296: seeds are whole numbers"),
        ({"epochs": 0}, "--epochs 0: at least 1"),
        ({"poison_rates": (0.0,)}, "--poison-rate 0: a share"),
        ({"poison_rates": (0.6,)}, "--poison-rate 0.6: a share"),
        ({"attacks": ("badnets:count=9",), "poison_rates": (0.01,)}, "--poison-rate and badnets:count=9: both set"),
        ({"attacks": ("label-swap",), "poison_rates": (0.01,)}, "attack 'label-swap' takes no count"),
    ],
)
def test_what_cannot_be_planned_is_one_line(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as raised:
        plan(bench(**changed), PAIRS)
    assert "\n" not in str(raised.value)


def test_rates_that_differ_late_are_two_groups() -> None:
    rates = (0.0123456, 0.01234561)
    cells = plan(
        bench(attacks=("badnets",), defenses=("clip",), seeds=(0,), reference=False, poison_rates=rates), PAIRS
    )
    assert [cell.group.label for cell in cells] == ["badnets@0.0123456", "badnets@0.01234561"]


def test_rates_are_groups_of_their_own_and_none_has_none() -> None:
    cells = plan(bench(attacks=("badnets", NONE), defenses=("clip",), seeds=(0,), poison_rates=(0.001, 0.01)), PAIRS)
    assert {cell.group.label: cell.run.attacks for cell in cells} == {
        NONE: (),
        "badnets@0.001": ("badnets:count=9",),
        "badnets@0.01": ("badnets:count=90",),
    }


@pytest.mark.parametrize(
    ("group", "says"),
    [
        ("badnets:target=bananas", r"target 'bananas' is not among .*did you mean 'banana'"),
        ("badnets:count=500", "count 500 is more than"),
        ("badnets+badnets", "attack 'badnets' is named 2 times"),
        ("badnets:count=60,name=a+badnets:count=70,name=b", "count 70 is more than"),
    ],
)
def test_what_cannot_be_planted_is_found_before_any_training(group: str, says: str, small_emoji: Path) -> None:
    split = load_emoji(small_emoji, 64, "twemoji")
    cells = plan(bench(attacks=("badnets:count=9", group), defenses=("clip",)), len(split.train))
    with pytest.raises(UserError, match=says):
        check_attacks(cells, split)


labels = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=120)


@given(st.lists(labels, min_size=2, max_size=2, unique=True))
def test_folders_of_distinct_labels_differ_and_stay_inside(pair: list[str]) -> None:
    one, other = map(slug, pair)
    assert one != other
    for name in (one, other):
        assert "/" not in name and name not in ("", ".", "..") and len(name.encode()) < 255


def test_every_registered_defence_can_be_planned() -> None:
    """Adding a defence is one file and one registry line: nothing here knows their names."""
    cells = plan(bench(attacks=("badnets",), defenses=tuple(defenses.DEFENSES), seeds=(0,), reference=False), PAIRS)
    assert {cell.defense.label for cell in cells} == set(defenses.DEFENSES)


def test_attacks_that_look_into_a_model_get_the_clean_run_of_their_seed(small_emoji: Path) -> None:
    asked = bench(attacks=("low-ot+sig",), defenses=("otcclip",), seeds=(0, 1), reference=False)
    cells = {(cell.group.label, cell.defense.label, cell.seed): cell for cell in plan(asked, PAIRS)}
    for seed in (0, 1):
        clean = cells[NONE, "clip", seed]
        for name in ("clip", "otcclip"):
            assert surrogate_of(cells["low-ot+sig", name, seed].run) == clean.run
    jobs = {job.name: job.after for job in jobs_of(tuple(cells.values()))}
    clean, undefended = "none · clip · seed 1", "low-ot+sig · clip · seed 1"
    assert jobs[clean] == () and jobs[undefended] == (clean,)
    assert jobs["low-ot+sig · otcclip · seed 1"] == tuple(sorted((clean, undefended))), "prepared once"
    # Where the model lies is no part of what a run is; which model it is, is.
    run = cells["low-ot+sig", "clip", 0].run
    assert run.surrogate is not None
    moved = replace(run, surrogate=replace(run.surrogate, out="elsewhere"))
    other = replace(run, surrogate=replace(run.surrogate, epochs=99))
    assert moved.identity() == run.identity() != other.identity()
    named = plan(bench(attacks=("low-ot:surrogate=runs/x",), reference=False, seeds=(0,)), PAIRS)
    assert {cell.group.label for cell in named} == {"low-ot:surrogate=runs/x"}


@pytest.mark.parametrize(
    ("group", "says"),
    [
        ("low-ot:target=bananas", "did you mean 'banana'"),
        ("low-ot:count=500", "count 500 is more than"),
        ("low-ot:count=9+low-ot:count=9", "attack 'low-ot' is named 2 times"),
        ("low-ot:count=0", "low-ot: count must be at least 1"),
        ("low-ot:count=9,choice=0", "low-ot: choice must be at least 1"),
        ("low-ot:count=9+badnets:count=9,size=5", "badnets: size is"),
        ("low-ot:count=9+targeted:images=9000", "targeted: 9000 target images asked for"),
        ("low-ot:count=70+badnets:count=60", "badnets: count 60 is more than"),
        ("badclip:count=9,size=9", "badclip: size is"),
        ("badclip:count=500", "count 500 is more than"),
        ("badclip:count=9,target=bananas", "did you mean 'banana'"),
    ],
)
def test_all_but_the_model_is_checked_before_the_model_is_there(group: str, says: str, small_emoji: Path) -> None:
    split = load_emoji(small_emoji, 64, "twemoji")
    with pytest.raises(UserError, match=says):
        check_attacks(plan(bench(attacks=(group,)), len(split.train)), split)


def test_what_looks_into_a_model_yet_to_come_passes(small_emoji: Path) -> None:
    split = load_emoji(small_emoji, 64, "twemoji")
    group = "low-ot:count=20+badclip:count=20+badnets:count=20"
    check_attacks(plan(bench(attacks=(group,)), len(split.train)), split)

"""A scan finds what was planted, whatever the shards' cut, order, jobs, kills and broken members."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from otcclip.attacks import PoisonRecord, write_records
from otcclip.cli import main
from otcclip.curation import Rule, Scan, ScanOptions
from otcclip.curation import passes as passes_module
from otcclip.curation import scan as scan_module
from otcclip.curation import score as score_module
from otcclip.curation.repair import repair
from otcclip.data import Pair, write_shard
from otcclip.data.decode import Limits, decode_image
from otcclip.detectors import claims
from otcclip.errors import UserError

LEVELS = Rule(alpha=0.1, seconded=4.0)  # as the fixture `scan`
WRONG = {f"pair-{i:04d}" for i in range(5, 480, 10)}


def rows(scan: Scan) -> list[dict[str, Any]]:
    return list(scan.rows())


def comparable(scan: Scan) -> dict[str, tuple[Any, ...]]:
    """Rows by key, numbers rounded: sums over other batches may differ in their last bits."""
    skip = ("unit",)
    return {
        row["key"]: tuple(
            round(v, 4) if isinstance(v, float) else v for name, v in sorted(row.items()) if name not in skip
        )
        for row in scan.rows()
    }


def test_finds_what_was_planted_and_names_it_rightly(scan: Scan, pairs: list[Pair]) -> None:
    found = rows(scan)
    assert [row["key"] for row in found] == [pair.key for pair in pairs]
    assert [row["caption"] for row in found] == [pair.caption for pair in pairs]
    worst = sorted(found, key=lambda row: -row["lie"])[:24]
    assert {row["key"] for row in worst} <= WRONG
    label = {pair.key: pair.label for pair in pairs}
    assert np.mean([label[row["best_key"]] == label[row["key"]] for row in worst]) > 0.9
    kept = {row["key"] for row in found if row["action"] == "keep"}
    assert len(kept) > 300 and len(kept & WRONG) <= 1
    assert scan.summary()["actions"] == {a: sum(r["action"] == a for r in found) for a in ("keep", "re-pair", "drop")}


def test_what_the_encoder_cannot_serve_is_null_and_the_rest_is_not(scan: Scan) -> None:
    table = scan.table()
    for name in ("ot_distance_score", "own_rank_score", "clip_score_score", "gmm_score", "own_distance", "margin"):
        assert table[name].null_count == len(table), name
    for name in ("neighbour_ot_score", "caption_fdr_score", "dao_score", "ensemble_score", "lie", "p_value", "phash"):
        assert table[name].null_count == 0, name


def test_actions_are_the_rule_applied_to_the_columns(scan: Scan) -> None:
    table = scan.table()
    levels = [table[name].to_numpy() for name in ("lie", "best_lie", "best_place", "best_looks_place")]
    assert table["action"].to_pylist() == LEVELS.decide(*levels, np.full(len(table), np.nan)).tolist()


def test_save_and_load(scan: Scan, tmp_path: Path) -> None:
    scan.report()
    copy = scan.save(tmp_path / "copy")
    assert comparable(copy) == comparable(scan) and copy.summary() == scan.summary()
    assert (copy.folder / "report.html").is_file() and not (copy.folder / "features").exists()
    with pytest.raises(UserError, match="no finished scan"):
        Scan.load(tmp_path)


@pytest.mark.parametrize("stage", ["encode_unit", "score_unit", "finish"])
@pytest.mark.parametrize("after", [0, 2])
def test_a_killed_scan_goes_on_and_ends_with_the_same_rows(
    stage: str, after: int, scan: Scan, shards: Path, encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = scan_module if stage == "finish" else passes_module
    real, calls = getattr(module, stage), []

    def killed(*args: Any, **kwargs: Any) -> Any:
        if len(calls) == (after if stage != "finish" else 0):
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, stage, killed)
    with pytest.raises(KeyboardInterrupt):
        Scan.run(shards, encoder, tmp_path / "cut")
    monkeypatch.setattr(module, stage, real)
    seen = encoder.seen
    again = Scan.run(shards, encoder, tmp_path / "cut", ScanOptions(resume=True, rule=LEVELS))
    assert comparable(again) == comparable(scan)
    done = 120 * after if stage == "encode_unit" else 480
    assert seen == done and encoder.seen == 480, "a finished shard is not encoded twice"


def test_a_killed_write_leaves_no_half_row_file(shards: Path, encoder: Any, tmp_path: Path) -> None:
    out = tmp_path / "cut"
    Scan.run(shards, encoder, out)
    for part in ("rows", "features"):
        for path in sorted((out / part).iterdir())[::2]:
            path.unlink()
    assert len(rows(Scan.run(shards, encoder, out, ScanOptions(resume=True, rule=LEVELS)))) == 480


def test_two_jobs_make_the_rows_of_one(scan: Scan, shards: Path, encoder: Any, tmp_path: Path) -> None:
    out, two = tmp_path / "two", ScanOptions(num_shards=2, rule=LEVELS)
    first = Scan.run(shards, encoder, out, two)
    assert first.waiting == 2 and not (out / "summary.json").exists()
    second = Scan.run(shards, encoder, out, replace(two, shard_index=1))
    assert second.waiting == 2  # the first job's rows
    assert not Scan.run(shards, encoder, out, replace(two, resume=True)).waiting
    assert comparable(Scan.load(out)) == comparable(scan) and encoder.seen == 480


def test_rows_do_not_depend_on_the_cut_into_shards(scan: Scan, pairs: list[Pair], encoder: Any, tmp_path: Path) -> None:
    whole = tmp_path / "whole.tar"
    write_shard(whole, pairs[::-1])
    other = comparable(Scan.run(whole, encoder, tmp_path / "whole"))
    mine = comparable(scan)
    assert other.keys() == mine.keys()
    lie = {row["key"]: row["lie"] for row in rows(scan)}
    for row in rows(Scan.load(tmp_path / "whole")):
        assert abs(row["lie"] - lie[row["key"]]) < 5e-3  # means over the reference, summed in another order


def test_a_reference_smaller_than_the_data(shards: Path, encoder: Any, tmp_path: Path) -> None:
    found = Scan.run(shards, encoder, tmp_path / "out", ScanOptions(reference=400, rule=LEVELS))
    assert found.summary()["reference"] == 400
    table = found.table(["key", "lie", "action"]).to_pylist()
    assert len(table) == 480 and sum(row["action"] == "keep" for row in table) > 300
    assert {row["key"] for row in sorted(table, key=lambda r: -r["lie"])[:24]} <= WRONG


def test_a_broken_shard_stops_nobody_else_and_is_retried(
    scan: Scan, shards: Path, encoder: Any, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    for path in sorted(shards.iterdir()):
        (mine / path.name).write_bytes(path.read_bytes())
    whole = (mine / "00002.tar").read_bytes()
    (mine / "00002.tar").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out"
    first = Scan.run(mine, encoder, out, ScanOptions(rule=LEVELS))
    assert len(first.failures) == 1 and "truncated" in first.failures[0][1]
    assert len(rows(first)) == 360 and list(first.summary()["failed"]) == [first.failures[0][0]]
    (mine / "00002.tar").write_bytes(whole)
    before = encoder.seen
    second = Scan.run(mine, encoder, out, ScanOptions(resume=True, rule=LEVELS))
    assert not second.failures and encoder.seen == before + 120
    assert comparable(second) == comparable(scan)


def test_detection_is_measured_against_the_truth(shards: Path, encoder: Any, tmp_path: Path) -> None:
    truth = tmp_path / "poison.parquet"
    write_records(truth, [PoisonRecord(key, "lies", "", "", "", 0, "was") for key in WRONG])
    found = Scan.run(shards, encoder, tmp_path / "out", poison=truth).summary()["truth"]
    assert found["detection"]["caption_fdr_score"]["lies"]["auroc"] > 0.95
    assert (
        found["detection"]["caption_fdr_score"]["lies"]["poison"] == 48 and "clip_score_score" not in found["detection"]
    )
    assert sum(found["actions"]["lies"].values()) == 48 and sum(found["honest"].values()) == 432
    stranger = tmp_path / "other.parquet"
    write_records(stranger, [PoisonRecord("nobody", "lies", "", "", "", 0, "was")])
    with pytest.raises(UserError, match="names no pair of this scan"):
        Scan.run(shards, encoder, tmp_path / "other", poison=stranger)


def test_a_csv_is_scanned_in_pieces(pairs: list[Pair], encoder: Any, scan: Scan, tmp_path: Path) -> None:
    lines = ["filepath\ttitle"]
    for pair in pairs:
        (tmp_path / f"{pair.key}.png").write_bytes(pair.image)
        lines.append(f"{tmp_path / pair.key}.png\t{pair.caption}")
    source = tmp_path / "pairs.csv"
    source.write_text("\n".join(lines) + "\n")
    found = rows(Scan.run(source, encoder, tmp_path / "out"))
    assert [row["caption"] for row in found] == [pair.caption for pair in pairs]
    np.testing.assert_allclose([row["p_value"] for row in found], [row["p_value"] for row in scan.rows()], atol=1e-3)


def test_a_csv_of_images_in_another_folder(
    pairs: list[Pair], encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`otcclip scan --image-root`: without it the paths would start from the working directory."""
    images = tmp_path / "images"
    images.mkdir()
    for pair in pairs[:120]:
        (images / f"{pair.key}.png").write_bytes(pair.image)
    source = tmp_path / "pairs.csv"
    source.write_text("\n".join(["filepath\ttitle", *(f"{p.key}.png\t{p.caption}" for p in pairs[:120])]) + "\n")
    monkeypatch.setattr("otcclip.curation.clip_encoder", lambda model, pretrained: encoder)
    asked = ["scan", str(source), "--out", str(tmp_path / "out")]
    assert main([*asked, "--image-root", str(images)]) == 0
    assert [row["caption"] for row in rows(Scan.load(tmp_path / "out"))] == [pair.caption for pair in pairs[:120]]


Break = Callable[[Path], None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ScanOptions(), "holds a scan already; --resume"),
        (ScanOptions(resume=True, dataset_type="img2dataset"), "a scan of another dataset type"),
        (ScanOptions(resume=True, detectors=("doa",)), "unknown detector 'doa'; did you mean 'dao'"),
    ],
)
def test_a_folder_in_the_way_or_a_bad_option_is_one_line(
    options: ScanOptions, message: str, scan: Scan, shards: Path, encoder: Any
) -> None:
    with pytest.raises(UserError, match=message):
        Scan.run(shards, encoder, scan.folder, options)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"reference": 1}, "--reference 1"),
        ({"max_bad": -0.1}, "--max-bad -0.1"),
        ({"max_bad": float("nan")}, "--max-bad nan"),
        ({"num_shards": 0}, "--num-shards 0"),
        ({"shard_index": 2, "num_shards": 2}, "--shard-index 2 of --num-shards 2"),
        ({"detectors": ("dao", "dao")}, "named twice"),
    ],
)
def test_options_out_of_range_are_one_line(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ScanOptions(**bad)


def test_a_mistyped_source_or_truth_leaves_nothing_in_the_way(shards: Path, encoder: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for source, truth in ((tmp_path / "nowhere.csv", None), (shards, tmp_path / "nowhere.parquet")):
        with pytest.raises(UserError):
            Scan.run(source, encoder, out, poison=truth)
        assert not out.exists() and not encoder.seen
    with pytest.raises(UserError, match="takes one source, 2 were named"):
        Scan.run(["a.csv", "b.csv"], encoder, out, ScanOptions(dataset_type="csv"))
    Scan.run(shards, encoder, out)


def test_the_gallery_shows_each_pairs_own_image(scan: Scan, pairs: list[Pair]) -> None:
    own = {pair.key: pair.image for pair in pairs}
    shown = pq.read_table(scan.folder / "gallery.parquet", columns=["key", "image"]).to_pylist()
    assert len(shown) > 100
    for row in shown:
        small = np.asarray(Image.open(io.BytesIO(row["image"])))
        assert np.array_equal(small, decode_image(own[row["key"]], small.shape[0]))


def test_a_sliver_too_wide_for_the_page_is_listed_without_a_picture(
    pairs: list[Pair], encoder: Any, tmp_path: Path
) -> None:
    """Within the cap at the encoder's 64 pixels, beyond it at the page's 96."""
    sliver = io.BytesIO()
    Image.new("RGB", (150, 1), "red").save(sliver, "PNG")
    write_shard(tmp_path / "a.tar", [replace(pairs[0], image=sliver.getvalue()), *pairs[1:60]])
    found = Scan.run(tmp_path / "a.tar", encoder, tmp_path / "out", ScanOptions(limits=Limits(pixels=1_000_000)))
    shown = pq.read_table(found.folder / "gallery.parquet", columns=["key"])["key"].to_pylist()
    assert shown and pairs[0].key not in shown and pairs[0].key in [row["key"] for row in found.rows(["key"])]


def test_a_shard_that_changes_while_it_is_scanned_is_one_line(pairs: list[Pair], encoder: Any, tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", pairs[:120])
    real = scan_module.finish

    def change(*given: Any) -> None:
        turned = [replace(pair, image=other.image) for pair, other in zip(pairs[:120], pairs[120:240], strict=True)]
        write_shard(tmp_path / "a.tar", turned)
        real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_module, "finish", change)
        with pytest.raises(UserError, match="changed since it was scanned"):
            Scan.run(tmp_path / "a.tar", encoder, tmp_path / "out")
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_shard_that_comes_back_with_anothers_key_leaves_no_key_twice(
    pairs: list[Pair], encoder: Any, tmp_path: Path
) -> None:
    """All that the first shard holds is a key of the second, and it was cut off when the second was judged: the keys of
    the scan are the same once it is back, and another pair counts."""
    source = tmp_path / "shards"
    source.mkdir()
    write_shard(source / "0.tar", [pairs[50]])
    write_shard(source / "1.tar", pairs[:120])
    whole = (source / "0.tar").read_bytes()
    (source / "0.tar").write_bytes(whole[:700])
    Scan.run(source, encoder, tmp_path / "out")
    (source / "0.tar").write_bytes(whole)
    again = Scan.run(source, encoder, tmp_path / "out", ScanOptions(resume=True))
    anew = Scan.run(source, encoder, tmp_path / "anew")
    keys = [row["key"] for row in again.rows(["key"])]
    assert len(keys) == len(set(keys)) == 120
    assert list(again.rows(["key", "unit", "action"])) == list(anew.rows(["key", "unit", "action"]))


def test_a_resume_under_another_rule_that_fails_is_no_finished_scan(
    pairs: list[Pair], encoder: Any, tmp_path: Path
) -> None:
    broken = [replace(pairs[0], image=b"\x89PNG"), *pairs[1:120]]
    write_shard(tmp_path / "a.tar", broken)
    done = Scan.run(tmp_path / "a.tar", encoder, tmp_path / "out")
    with pytest.raises(UserError, match="more than the 0"):
        Scan.run(
            tmp_path / "a.tar", encoder, tmp_path / "out", ScanOptions(resume=True, rule=Rule(alpha=0.4), max_bad=0.0)
        )
    with pytest.raises(UserError, match="--resume"):
        repair(done.folder, tmp_path / "repaired")
    Scan.run(tmp_path / "a.tar", encoder, tmp_path / "out", ScanOptions(resume=True, rule=Rule(alpha=0.4)))
    assert repair(done.folder, tmp_path / "repaired").manifest.is_file()


def test_a_job_without_a_shard_names_the_one_that_failed(pairs: list[Pair], encoder: Any, tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", pairs[:4])
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:100])
    for job in (0, 1):
        with pytest.raises(UserError, match="none of the 1 shards could be read; the first"):
            Scan.run(
                tmp_path / "0.tar", encoder, tmp_path / "out", ScanOptions(resume=True, num_shards=2, shard_index=job)
            )


def test_a_truth_that_leaves_no_honest_pair_is_one_line(pairs: list[Pair], encoder: Any, tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", pairs[:60])
    truth = tmp_path / "poison.parquet"
    write_records(truth, [PoisonRecord(pair.key, "lies", "", "", "", 0, "was") for pair in pairs[:60]])
    with pytest.raises(UserError, match="names every pair of this scan"):
        Scan.run(tmp_path / "a.tar", encoder, tmp_path / "out", poison=truth)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"rule": []}'])
def test_damaged_settings_are_one_line(text: str, scan: Scan) -> None:
    (scan.folder / "scan.json").write_text(text)
    with pytest.raises(UserError, match=r"scan\.json"):
        scan.rule()
    with pytest.raises(UserError):
        scan.report()


def test_damaged_rows_are_one_line(scan: Scan) -> None:
    path = scan.folder / "scan.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["lie"]), path)
    with pytest.raises(UserError, match="column 'lie' is missing"):
        next(scan.batches(["key", "lie"]))
    pq.write_table(table.set_column(table.column_names.index("copies"), "copies", pa.nulls(480, pa.int64())), path)
    with pytest.raises(UserError, match="not as a finished scan leaves it"):
        scan.report()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        next(scan.rows())


def test_who_writes_some_keys_does_not_choose_the_reference() -> None:
    """The order of any two keys depends on all the others."""
    mine = np.arange(1, 200, dtype=np.uint64)  # the lowest hashes there are
    rng = np.random.default_rng(0)
    orders = []
    for _ in range(4):
        others = rng.integers(1 << 20, 1 << 63, 2000).astype(np.uint64)
        place = score_module._shuffled(np.concatenate([mine, others])).argsort().argsort()[: len(mine)]
        assert 0.3 < np.median(place) / 2200 < 0.7, "nor come all first"
        orders.append(place.argsort())
    assert len({tuple(order) for order in orders}) == 4
    hashes = np.concatenate([mine, others])
    again = rng.permutation(len(hashes))
    assert np.array_equal(score_module._shuffled(hashes)[again], score_module._shuffled(hashes[again]))


def test_a_folder_of_something_else_is_left_alone(shards: Path, encoder: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds no scan"):
        Scan.run(shards, encoder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_ray_that_is_not_there_is_one_line(
    shards: Path, encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'otcclip\[ray\]'"):
        Scan.run(shards, encoder, tmp_path / "out", ScanOptions(ray=True))


def test_throughput_adds_up(scan: Scan) -> None:
    speed = scan.summary()["throughput"]
    assert 0 < speed["encoder_seconds"] < speed["seconds"] and speed["scoring_seconds"] < speed["seconds"]
    np.testing.assert_allclose(speed["ratio"], speed["encoder_seconds"] / speed["seconds"])
    np.testing.assert_allclose(speed["pairs_per_second"] * speed["seconds"], 480)
    assert json.loads((scan.folder / "scan.json").read_text())["encoder"] == {"model": "toy", "image_size": 64}
    assert pq.read_metadata(scan.folder / "scan.parquet").num_rows == 480


def test_pictures_are_kept_small_whatever_the_encoder_sees(shards: Path, encoder: Any, tmp_path: Path) -> None:
    encoder.image_size = 96
    found = Scan.run(shards, encoder, tmp_path / "large", ScanOptions(rule=LEVELS))
    features = sorted((found.folder / "features").glob("*.safetensors"))
    assert len(features) == 4
    for path in features:
        with safe_open(path, "pt") as file:
            pictures = file.get_tensor("pictures")
        assert pictures.shape == (120, 3, 64, 64) and pictures.dtype == torch.uint8
    assert not any(np.isnan(row["untrained_neighbour_score"]) for row in rows(found))


def test_features_of_another_version_are_one_line(shards: Path, encoder: Any, tmp_path: Path) -> None:
    found = Scan.run(shards, encoder, tmp_path / "old", ScanOptions(rule=LEVELS))
    path = sorted((found.folder / "features").glob("*.parquet"))[0]
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["offset", "size"]).replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(UserError, match="another version of otcclip"):
        Scan.run(shards, encoder, tmp_path / "old", ScanOptions(rule=LEVELS, resume=True))


def test_a_crowd_is_not_re_paired(
    scan: Scan, shards: Path, encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scan of the fixture re-pairs; were every pair of a crowd, nobody would be."""
    assert any(row["action"] == "re-pair" for row in rows(scan))
    all_crowded = lambda pairs: replace(claims(pairs), crowded=torch.ones(len(pairs), dtype=torch.bool))  # noqa: E731
    monkeypatch.setattr(score_module, "claims", all_crowded)
    found = rows(Scan.run(shards, encoder, tmp_path / "crowds", ScanOptions(rule=LEVELS)))
    assert all(np.isnan(row["best_place"]) and row["action"] != "re-pair" for row in found)


def test_a_row_says_whether_its_claim_is_disputed(
    shards: Path, encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_module, "disputed", lambda pairs: np.array([key.endswith("7") for key in pairs.keys]))
    found = Scan.run(shards, encoder, tmp_path / "out", ScanOptions(rule=LEVELS))
    assert (
        {row["key"] for row in found.rows() if row["disputed"]}
        == {row["key"] for row in found.rows() if row["key"].endswith("7")}
        != set()
    )

"""Repair: the rule, the manifest, new data sets in each format; the input stays and no caption is lost."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from otcclip.cli import main
from otcclip.commands.repair import repair as command
from otcclip.curation import Rule, Scan, ScanOptions
from otcclip.curation.encoders import ScanEncoder
from otcclip.curation.repair import repair
from otcclip.curation.units import find_units
from otcclip.data import Pair, ReadOptions, open_pairs, read_shard, write_shard
from otcclip.data.decode import Limits
from otcclip.data.manifest import apply_manifest, read_manifest
from otcclip.errors import UserError


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def written(shards: Path, manifest: Path) -> list[tuple[str, str, bytes]]:
    """What must come out: the input under the manifest, read by `apply_manifest`."""
    pairs = (pair for shard in sorted(shards.glob("*.tar")) for pair in read_shard(shard))
    return [(pair.key, pair.caption, pair.image) for pair in apply_manifest(pairs, manifest)]


@pytest.mark.parametrize(
    ("lie", "nominee", "place", "looks", "margin", "action"),
    [
        (0.02, 0.0, 1.0, 1.0, 0.5, "keep"),
        (0.021, 0.0, 1.0, 1.0, 0.5, "drop"),
        (0.5, 0.49, 1.5, 1.5, 0.02, "re-pair"),
        (0.5, 0.5, 1.5, 1.5, 0.02, "drop"),
        (0.49, 0.0, 1.0, 1.0, 0.5, "drop"),
        (0.9, 0.0, 1.6, 1.0, 0.5, "drop"),
        (0.9, 0.0, 1.0, 1.6, 0.5, "drop"),
        (0.9, 0.0, np.nan, 1.0, 0.5, "drop"),
        (0.9, 0.0, 1.0, 1.0, 0.019, "drop"),
        (0.9, 0.0, 1.0, 1.0, np.nan, "re-pair"),
    ],
)
def test_the_rule(lie: float, nominee: float, place: float, looks: float, margin: float, action: str) -> None:
    levels = [np.array([value]) for value in (lie, nominee, place, looks, margin)]
    assert Rule().decide(*levels).tolist() == [action]
    if action == "re-pair":
        assert Rule(repair=False).decide(*levels).tolist() == ["drop"]


@pytest.mark.parametrize("bad", [{"alpha": 0.0}, {"alpha": 0.6}, {"likely": 1.1}, {"seconded": 0.5}, {"margin": -1.0}])
def test_levels_that_make_no_sense_are_one_line(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"^rule: "):
        Rule(**bad)  # type: ignore[arg-type]


def test_a_manifest_keeps_every_original_caption(scan: Scan, shards: Path, pairs: list[Pair], tmp_path: Path) -> None:
    before = digest(shards)
    done = repair(scan, tmp_path / "out")
    rows = pq.read_table(done.manifest).to_pylist()
    assert [(row["key"], row["caption"]) for row in rows] == [(pair.key, pair.caption) for pair in pairs]
    assert [row["action"] for row in rows] == [row["action"] for row in scan.rows(["action"])]
    assert done.actions["re-pair"] >= 1 and sum(done.actions.values()) == 480
    for row in rows:
        assert (row["new_caption"] is not None) == (row["action"] == "re-pair")
    assert digest(shards) == before
    mine, scanned = read_manifest(done.manifest), read_manifest(scan.folder / "scan.parquet")
    assert (mine.keep, mine.drop, mine.new_caption) == (scanned.keep, scanned.drop, scanned.new_caption)


def test_new_shards(scan: Scan, shards: Path, tmp_path: Path) -> None:
    done = repair(scan, tmp_path / "out", to="wds")
    made = [pair for path in sorted((tmp_path / "out").glob("*.tar")) for pair in read_shard(path)]
    assert [(p.key, p.caption, p.image) for p in made] == written(shards, done.manifest) and len(made) == done.written
    new = read_manifest(done.manifest).new_caption
    original = {row["key"]: row["caption"] for row in scan.rows(["key", "caption"])}
    for pair in made:
        assert pair.metadata.get("original_caption") == (original[pair.key] if pair.key in new else None)
        assert pair.label and "uid" in pair.metadata
    again = repair(scan, tmp_path / "again", to="wds")
    assert digest(tmp_path / "out")["00000-00000.tar"] == digest(tmp_path / "again")["00000-00000.tar"] and again


def test_a_source_that_changed_is_one_line(scan: Scan, shards: Path, pairs: list[Pair], tmp_path: Path) -> None:
    """Another image under a key and caption that were judged, another caption, or a pair that is gone."""
    source = tmp_path / "shards"
    shutil.copytree(shards, source)
    settings = json.loads((scan.folder / "scan.json").read_text())
    (scan.folder / "scan.json").write_text(json.dumps(settings | {"source": [str(source)]}))
    assert repair(scan, tmp_path / "as it was", to="wds").written
    kept = read_manifest(tmp_path / "as it was" / "manifest.parquet").keep
    place = next(i for i, pair in enumerate(pairs[:120]) if pair.key in kept)
    for change in ({"image": pairs[200].image}, {"caption": "something else"}, None):
        changed = list(pairs[:120])
        changed[place : place + 1] = [] if change is None else [replace(changed[place], **change)]
        write_shard(source / "00000.tar", changed)
        with pytest.raises(UserError, match=r"1 pairs of the scan are gone or changed; scan it again"):
            repair(scan, tmp_path / "out", to="wds")
        assert not (tmp_path / "out").exists()


def test_a_keys_bad_twin_is_not_the_pair_that_was_judged(pairs: list[Pair], encoder: Any, tmp_path: Path) -> None:
    """A key given twice, first with a broken image: the scan judged the second, and so repairs the second."""
    write_shard(tmp_path / "a.tar", pairs[:120])
    twins = tmp_path / "b.tar"
    with tarfile.open(twins, "w") as tar, tarfile.open(tmp_path / "a.tar") as given:
        for name, data in ((f"{pairs[7].key}.png", b"\x89PNG"), (f"{pairs[7].key}.txt", b"first")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for member in given:
            tar.addfile(member, given.extractfile(member))
    scan = Scan.run(twins, encoder, tmp_path / "scan", ScanOptions(rule=Rule(alpha=0.1, seconded=4.0), max_bad=0.5))
    done = repair(scan, tmp_path / "out", to="wds")
    kept = {pair.key: pair for part in sorted((tmp_path / "out").glob("*.tar")) for pair in read_shard(part)}
    assert len(kept) == done.written > 0
    judged = {row["key"]: row["action"] for row in scan.rows(["key", "action"])}
    assert judged[pairs[7].key] == "drop" or kept[pairs[7].key].image == pairs[7].image


def test_csv_as_open_clip_reads_it(scan: Scan, shards: Path, tmp_path: Path) -> None:
    done = repair(scan, tmp_path / "out", to="csv")
    with (tmp_path / "out" / "pairs.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t"))
    made = [(r["key"], r["title"], (tmp_path / "out" / r["filepath"]).read_bytes()) for r in rows]
    assert made == written(shards, done.manifest)


def test_parquet(scan: Scan, shards: Path, tmp_path: Path) -> None:
    done = repair(scan, tmp_path / "out", to="parquet")
    assert done.data == tmp_path / "out" / "pairs"
    rows = [row for path in sorted(done.data.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert [(row["key"], row["caption"], row["image"]) for row in rows] == written(shards, done.manifest)


@pytest.mark.parametrize("to", ["wds", "csv", "parquet"])
def test_what_is_written_can_be_read(scan: Scan, shards: Path, to: str, tmp_path: Path) -> None:
    """As `scan` and `train` open it, by the place that the command names."""
    done = repair(scan, tmp_path / "out", to=to)
    options = ReadOptions(image_root=str(tmp_path / "out") if to == "csv" else None)
    read = open_pairs(str(done.data), "auto", 16, tmp_path / "cache", options=options, max_bad=0.0).table
    wanted = written(shards, done.manifest)
    assert list(read.captions) == [caption for _, caption, _ in wanted]
    if to != "csv":
        assert list(read.keys) == [key for key, _, _ in wanted]
    made = [item for u in find_units(str(done.data), "auto", tmp_path, options) for item in u.pairs(pytest.fail)]
    assert [(item.pair.caption, item.pair.image) for item in made] == [row[1:] for row in wanted]


def test_the_command_names_what_to_read(scan: Scan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["repair", str(scan.folder), "--out", str(tmp_path / "out"), "--to", "parquet"]) == 0
    said = "".join(capsys.readouterr().out.split("\n"))
    assert f"pairs written to {tmp_path / 'out' / 'pairs'}" in said


def test_new_shards_keep_the_json(
    make_tar: Callable[..., Path], encoder: Any, pairs: list[Pair], tmp_path: Path
) -> None:
    """Kept or re-paired: numbers, false, lists and objects come out as they went in."""
    fields = {
        "width": 640,
        "score": 0.25,
        "nsfw": False,
        "url": None,
        "face_bboxes": [[0, 0.5, 1, 1]],
        "exif": {"a": []},
    }
    source = tmp_path / "in"
    source.mkdir()
    members = [
        member
        for i, pair in enumerate(pairs)
        for member in (
            (f"{pair.key}.png", pair.image),
            (f"{pair.key}.txt", pair.caption.encode()),
            (f"{pair.key}.json", json.dumps(fields | {"n": i}).encode()),
        )
    ]
    make_tar(source / "00000.tar", members)
    scan = Scan.run(source, encoder, tmp_path / "scan", ScanOptions(rule=Rule(alpha=0.1, seconded=4.0)))
    done = repair(scan, tmp_path / "out", to="wds")
    original = {row["key"]: row["caption"] for row in scan.rows(["key", "caption"])}
    number = {pair.key: i for i, pair in enumerate(pairs)}
    new = read_manifest(done.manifest).new_caption
    made = [pair for path in (tmp_path / "out").glob("*.tar") for pair in read_shard(path, fields=True)]
    assert len(made) == done.written and new
    for pair in made:
        kept = fields | {"n": number[pair.key]}
        mended = {"original_caption": original[pair.key]} if pair.key in new else {}
        assert json.dumps(pair.fields, sort_keys=True) == json.dumps(kept | mended, sort_keys=True)


def test_datacomp_uids_are_those_kept_as_they_came(scan: Scan, tmp_path: Path) -> None:
    done = repair(scan, tmp_path / "out", to="datacomp-npy")
    uids = np.load(tmp_path / "out" / "uids.npy", allow_pickle=False)
    kept = sorted(int(key.split("-")[1]) for key in read_manifest(done.manifest).keep)
    assert uids.dtype == np.dtype("u8,u8") and [int(low) for _, low in uids] == kept
    assert all(high == 0 for high, _ in uids) and done.written == len(kept)


def test_hf_needs_its_package_or_writes_a_data_set(scan: Scan, shards: Path, tmp_path: Path) -> None:
    try:
        import datasets
    except ImportError:
        with pytest.raises(UserError, match=r"pip install 'otcclip\[hf\]'"):
            repair(scan, tmp_path / "out", to="hf")
        assert not (tmp_path / "out").exists()
        return
    done = repair(scan, tmp_path / "out", to="hf")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dataset", "manifest.parquet", "repair.json"]
    made = datasets.load_from_disk(str(done.data))
    assert [(r["key"], r["caption"]) for r in made] == [row[:2] for row in written(shards, done.manifest)]


def test_a_stricter_rule_than_the_scans(scan: Scan, tmp_path: Path) -> None:
    lax = repair(scan, tmp_path / "lax", Rule(alpha=0.4, repair=False))
    strict = repair(scan, tmp_path / "strict", Rule(alpha=1e-9))
    assert lax.actions["keep"] > strict.actions["keep"] and lax.actions["re-pair"] == 0


def test_a_source_that_changed_since_is_refused_and_leaves_nothing(
    scan: Scan, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from otcclip.curation import repair as module

    real = module.find_units

    def fewer(*args: object, **kwargs: object) -> object:
        return real(*args, **kwargs)[:2]  # type: ignore[arg-type]

    monkeypatch.setattr(module, "find_units", fewer)
    with pytest.raises(UserError, match="is not there any more"):
        repair(scan, tmp_path / "out", to="wds")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_formats_are_named(scan: Scan, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is there already"):
        repair(scan, shards)
    with pytest.raises(UserError, match=r"--to 'wbs'; did you mean 'wds'"):
        repair(scan, tmp_path / "out", to="wbs")


def big(side: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def narrow(pairs: list[Pair], encoder: ScanEncoder, tmp_path: Path) -> Scan:
    """A scan of `tmp_path / "source"` that skipped a pair for its pixels, one that stands there twice, and the bad twin
    of one that it judged; and a second pair of a key."""
    (tmp_path / "source").mkdir()
    wide = [replace(pair, image=big(100)) for pair in pairs]
    write_shard(tmp_path / "source" / "a.tar", [*pairs[:3], *wide[3:6], *pairs[6:60]])
    write_shard(tmp_path / "source" / "b.tar", [pairs[0], wide[4], pairs[5], *pairs[60:100]])
    return Scan.run(
        tmp_path / "source", encoder, tmp_path / "out", ScanOptions(limits=Limits(pixels=5000), max_bad=0.2)
    )


def test_what_the_scan_skipped_is_left_out_of_training(
    narrow: Scan, pairs: list[Pair], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert narrow.summary()["skipped"] == {"too many pixels": 4, "duplicate key": 1}
    done = repair(narrow, tmp_path / "repaired", to="wds")
    assert (done.skipped, sum(done.actions.values())) == (2, 98)
    rows = pq.read_table(done.manifest).to_pylist()
    assert [row["key"] for row in rows[98:]] == [pairs[3].key, pairs[4].key]
    assert all({name for name, value in row.items() if value is not None} == {"key", "action"} for row in rows[98:])
    manifest = read_manifest(done.manifest)
    assert {pairs[3].key, pairs[4].key} <= manifest.drop and len(manifest) == 100
    counts = json.loads((tmp_path / "repaired" / "repair.json").read_text())
    assert counts["skipped"] == 2 and counts["actions"] == done.actions and counts["written"] == done.written
    assert done.written == done.actions["keep"] + done.actions["re-pair"]

    data = open_pairs(str(tmp_path / "source"), "webdataset", 16, tmp_path / "cache")
    assert {pairs[3].key, pairs[4].key} <= set(data.table.keys), "training, with its own limits, meets them"
    with pytest.raises(UserError, match="says nothing of pair"):
        data.under(read_manifest(narrow.folder / "scan.parquet"))
    trained = data.under(manifest).table.keys
    assert set(trained) == manifest.keep | set(manifest.new_caption) and len(trained) == len(data) - len(manifest.drop)

    command(narrow.folder, tmp_path / "by command")
    assert "\n2 more, which the scan skipped (see skipped.parquet): drop\n" in capsys.readouterr().out


def test_skipped_pairs_in_batches_are_listed_once(
    narrow: Scan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pq.read_table(repair(narrow, tmp_path / "whole").manifest)
    real = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda file, **named: real(file, batch_size=1, **named))
    assert pq.read_table(repair(narrow, tmp_path / "single").manifest) == whole


def test_a_scan_that_was_moved_is_repaired_from_elsewhere(
    pairs: list[Pair], encoder: ScanEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = {name: [getattr(pair, name) for pair in pairs[:60]] for name in ("key", "image", "caption")}
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    pq.write_table(pa.table(columns), "data/pairs.parquet")
    Scan.run("data", encoder, "scan")
    (tmp_path / "elsewhere").mkdir()
    shutil.move("scan", "elsewhere/moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = repair("moved", "out", to="wds")
    assert done.written and done.written == len(list(read_shard(next(Path("out").glob("*.tar")))))


def test_a_source_that_grew_is_not_gone_on_with(pairs: list[Pair], encoder: ScanEncoder, tmp_path: Path) -> None:
    def line(pair: Pair) -> str:
        (tmp_path / f"{pair.key}.png").write_bytes(pair.image)
        return f"{tmp_path / pair.key}.png\t{pair.caption}\n"

    source = tmp_path / "pairs.csv"
    source.write_text("filepath\ttitle\n" + "".join(map(line, pairs[:60])))
    scan = Scan.run(source, encoder, tmp_path / "scan")
    repair(scan, tmp_path / "as it was", to="csv")
    with source.open("a") as handle:
        handle.writelines(map(line, pairs[60:68]))
    for again in (
        lambda: Scan.run(source, encoder, tmp_path / "scan", ScanOptions(resume=True)),
        lambda: repair(scan, tmp_path / "out", to="csv"),
    ):
        with pytest.raises(UserError, match=r"pairs\.csv: changed since it was indexed; name another --out"):
            again()
    assert not (tmp_path / "out").exists()

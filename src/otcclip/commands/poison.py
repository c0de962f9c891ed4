"""`otcclip poison`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

SHARD_PAIRS = 1000


def poison(
    shards: Annotated[str, tyro.conf.Positional],
    attacks: tuple[str, ...] = ("badnets", "targeted"),
    out: Path = Path("poisoned"),
    target: str = "banana",
    hold_out: str | None = None,
    test_data: str | None = None,
    image_size: int = 64,
    seed: int = 0,
) -> None:
    """Plant poison in a corpus: new shards, and poison.parquet that says which pairs are poison.

    Args:
        shards: the emoji corpus's folder, or shards whose pairs have labels.
        attacks: attacks to plant, `name` or `name:option=value,...`.
        out: folder for 00000.tar ..., poison.parquet; it must not be there yet.
        target: class of the first attack that wants one and names none.
        hold_out: emoji style whose pictures are the test split.
        test_data: shards of the test split, where `shards` is not the emoji corpus; targeted attacks aim at its images.
        image_size: side in pixels at which the poison is planted and the images are written.
        seed: seeds the poison and the order of the pairs.
    """
    from otcclip.attacks import poison as plant
    from otcclip.attacks import write_records
    from otcclip.data import EmojiSplit, Pair, atomic_folder, load_emoji, load_store, write_shard
    from otcclip.data.png import png
    from otcclip.errors import UserError
    from otcclip.seeds import check_seed
    from otcclip.training.setting import RunSpec, make_attacks

    check_seed(seed)
    if out.exists():
        raise UserError(f"{out}: is there already; name another --out")
    if (Path(shards) / "card.json").is_file():
        split = load_emoji(shards, image_size, hold_out)
    else:
        if test_data is None:
            raise UserError("--test-data: an attack is planned against test images; name their shards")
        train, test = load_store(shards, image_size), load_store(test_data, image_size)
        split = EmojiSplit(train, test, tuple(sorted({*train.labels, *test.labels})), "test")
    spec = RunSpec(str(shards), str(out), "clip", hold_out=hold_out, target=target, attacks=attacks, seed=seed)
    planted = plant(split.train, split.test, make_attacks(spec, split), seed)
    store = planted.store
    with atomic_folder(out) as folder:
        for start in range(0, len(store), SHARD_PAIRS):
            rows = range(start, min(start + SHARD_PAIRS, len(store)))
            pairs = (
                Pair(
                    store.keys[i],
                    png(store.images[i]),
                    store.captions[i],
                    store.labels[i] if store.labels else None,
                    {"source": store.sources[i]} if store.sources else {},
                )
                for i in rows
            )
            write_shard(folder / f"{start // SHARD_PAIRS:05d}.tar", pairs)
        write_records(folder / "poison.parquet", planted.records)
    print(f"{len(store):,} pairs, {len(planted.records):,} of them poison: {out}, {out / 'poison.parquet'}")

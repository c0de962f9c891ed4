"""One reader a format of image-caption pairs; adding one is a function and an entry below."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from otcclip.data.decode import printable
from otcclip.data.readers.annotations import coco, visual_genome
from otcclip.data.readers.base import Reader, ReadOptions, Spool
from otcclip.data.readers.csv import csv_pairs
from otcclip.data.readers.tabular import hf, parquet
from otcclip.data.readers.webdataset import img2dataset, webdataset
from otcclip.errors import UserError
from otcclip.registry import did_you_mean

READERS: Mapping[str, Reader] = {
    "webdataset": webdataset,
    "img2dataset": img2dataset,
    "csv": csv_pairs,
    "parquet": parquet,
    "coco": coco,
    "visual-genome": visual_genome,
    "hf": hf,
}


def find_reader(dataset_type: str, source: str) -> tuple[str, Reader]:
    """The name and the reader of a `--dataset-type`; `auto` looks at the source's name, as open_clip does.

    Raises:
        UserError: no such type, or `auto` cannot tell.
    """
    name = _guess(source) if dataset_type == "auto" else dataset_type
    if name not in READERS:
        known = ", ".join(("auto", *READERS))
        raise UserError(f"--dataset-type {name!r}{did_you_mean(name, READERS)}; there are: {known}")
    return name, READERS[name]


def _guess(source: str) -> str:
    path = Path(source)
    if "://" not in source and path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return "hf"
        if any(path.glob("*_stats.json")):
            return (
                "parquet"
                if any(path.glob("*.parquet"))
                and not any(path.glob("*.tar"))
                and not any(part.is_dir() for part in path.iterdir())
                else "img2dataset"
            )
        if any(path.glob("*.parquet")) and not any(path.glob("*.tar")):
            return "parquet"
        return "webdataset"
    if path.name == "region_descriptions.json":
        return "visual-genome"
    by_suffix = {".csv": "csv", ".tsv": "csv", ".tar": "webdataset", ".parquet": "parquet", ".json": "coco"}
    if path.suffix not in by_suffix:
        raise UserError(f"{printable(source)}: cannot tell its format; say --dataset-type: {', '.join(READERS)}")
    return by_suffix[path.suffix]


__all__ = ["READERS", "ReadOptions", "Reader", "Spool", "find_reader"]

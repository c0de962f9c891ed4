"""Scan: what a scan costs beside its encoder, and that its memory does not grow with the data.

python benchmarks/scan.py memory                         # 1e4 and 1e6 simulated rows, peak memory of scoring each
python benchmarks/scan.py throughput SHARDS [PAIRS]      # the trusted encoder over the first PAIRS pairs (2,000)
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

UNIT, CELLS, DIM, REFERENCE = 10_000, 9, 32, 2_048


def simulate(folder: Path, rows: int) -> None:
    """Score `rows` simulated pairs, unit by unit, and print this process's peak memory."""
    import json
    from dataclasses import asdict

    from safetensors.torch import save_file

    from otcclip.curation.decide import Rule
    from otcclip.curation.encode import SCHEMA, Encoded
    from otcclip.curation.score import load_reference, score_unit, take_census
    from otcclip.curation.units import Unit
    from otcclip.detectors import DETECTORS, make

    (folder / "features").mkdir(parents=True)
    captions = [f"thing{i % 50} in style{i // 50}" for i in range(400)]
    units = [Unit(f"{i:05d}", "simulated") for i in range(rows // UNIT)]
    for number, unit in enumerate(units):
        draw = torch.Generator().manual_seed(number)
        local = F.normalize(torch.randn(UNIT * CELLS, DIM, generator=draw), dim=1).half()
        text = F.normalize(torch.randn(400, DIM, generator=draw), dim=1).half()
        kind = torch.randint(400, (UNIT,), generator=draw)
        drawn = (torch.rand(UNIT, 3, 8, 8, generator=draw) * 255).to(torch.uint8)
        tensors = {
            "image": F.normalize(local.float().view(UNIT, CELLS, DIM).mean(1), dim=1).half(),
            "image_local": local,
            "image_offsets": torch.arange(UNIT + 1) * CELLS,
            "text": text,
            "text_local": text.repeat_interleave(3, 0),
            "text_offsets": torch.arange(401) * 3,
            "caption_of": kind,
            "pictures": drawn.repeat_interleave(8, 2).repeat_interleave(8, 3),
        }
        save_file(tensors, folder / "features" / f"{unit.name}.safetensors")
        columns = {
            "key": [f"{number}-{i}" for i in range(UNIT)],
            "caption": [captions[i] for i in kind.tolist()],
            "sha256": [f"{number}-{i}" for i in range(UNIT)],
            "phash": np.random.default_rng(number).integers(0, 2**63, UNIT, dtype=np.uint64),
            "label": [None] * UNIT,
            "offset": list(range(UNIT)),
            "size": [1] * UNIT,
        }
        said = {"encoded": json.dumps(asdict(Encoded(unit.name, UNIT, 0, 1.0, 1.0)))}
        table = pa.table(columns, schema=SCHEMA).replace_schema_metadata(said)
        pq.write_table(table, folder / "features" / f"{unit.name}.parquet")
    detectors, joint = [make(name) for name in DETECTORS], (False, False)
    begun = time.perf_counter()
    census = take_census(units, folder, REFERENCE)
    reference = load_reference(units, folder, census, joint)
    for unit in units:
        score_unit(unit, folder, reference, census.usable[unit.name], detectors, Rule(), "benchmark")
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024
    print(f"{rows:>9,} rows  peak {peak:7.0f} MiB  {rows / (time.perf_counter() - begun):7.0f} rows/s", flush=True)


def memory() -> None:
    for rows in (10_000, 100_000, 1_000_000):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, __file__, "simulate", folder + "/scan", str(rows)], check=True)


def throughput(shards: str, pairs: int) -> None:
    """The whole scan against bare forward passes over the same decoded images, in one process: of the encoder as the
    libraries make it, and of the same with its batch norms folded, which is how a scan runs it.

    The encoder is timed before and after: a busy host's speed drifts by more than what the scan adds.
    """
    from itertools import islice

    from otcclip.curation import Scan, trusted_encoder
    from otcclip.curation.encoders import TrustedEncoder
    from otcclip.curation.trusted import load_image_tower
    from otcclip.data import expand_shards, read_shard, write_shard
    from otcclip.data.decode import decode_image

    encoder, made = trusted_encoder(), trusted_encoder()
    made.image = load_image_tower("tf_efficientnet_lite0")
    chosen = list(islice((pair for shard in expand_shards(shards) for pair in read_shard(shard)), pairs))
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder) / "00000.tar", chosen)
        images = [torch.from_numpy(decode_image(pair.image, encoder.image_size).copy()) for pair in chosen]
        for one in (encoder, made):
            one.images(torch.stack(images[:64]).permute(0, 3, 1, 2))  # warm

        def alone(one: TrustedEncoder) -> float:
            begun = time.process_time()
            for start in range(0, pairs, 256):
                one.images(torch.stack(images[start : start + 256]).permute(0, 3, 1, 2))
            one.captions(sorted({pair.caption for pair in chosen}))
            return time.process_time() - begun

        before = [alone(one) for one in (made, encoder)]
        begun = time.process_time()
        Scan.run(Path(folder) / "00000.tar", encoder, Path(folder) / "scan")
        whole = time.process_time() - begun
        after = [alone(one) for one in (made, encoder)]
    print(f"{pairs:,} pairs, {encoder.name} at {encoder.image_size} px, one thread, CPU seconds")
    print(f"scan, everything            {whole:7.1f} s  {pairs / whole:7.1f} pairs/s")
    for what, first, last in zip(
        ("encoder alone, as it is made", "its batch norms folded"), before, after, strict=True
    ):
        mean = (first + last) / 2
        print(
            f"{what:28s}{mean:7.1f} s  {pairs / mean:7.1f} pairs/s  ({first:.1f}, {last:.1f})  scan {mean / whole:.2f}x"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("memory")
    one = commands.add_parser("simulate", help="what memory runs in a process of its own")
    one.add_argument("folder", type=Path)
    one.add_argument("rows", type=int)
    speed = commands.add_parser("throughput")
    speed.add_argument("shards")
    speed.add_argument("pairs", type=int, nargs="?", default=2000)
    arguments = parser.parse_args()
    if arguments.what == "memory":
        memory()
    elif arguments.what == "simulate":
        simulate(arguments.folder, arguments.rows)
    else:
        throughput(arguments.shards, arguments.pairs)

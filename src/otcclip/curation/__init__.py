"""Scan, decide, repair: over shards, resumable shard by shard, never touching the input."""

from otcclip.curation.decide import Rule
from otcclip.curation.encoders import ClipEncoder, ScanEncoder, TrustedEncoder, clip_encoder, trusted_encoder
from otcclip.curation.options import ScanOptions
from otcclip.curation.scan import Scan

__all__ = [
    "ClipEncoder",
    "Rule",
    "Scan",
    "ScanEncoder",
    "ScanOptions",
    "TrustedEncoder",
    "clip_encoder",
    "trusted_encoder",
]

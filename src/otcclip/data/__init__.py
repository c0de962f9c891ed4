"""Pairs from disk: readers, safe decoding, corpora, atomic writes."""

from otcclip.data.atomic import atomic_file, atomic_folder, write_json, write_text
from otcclip.data.decode import (
    REASONS,
    BadPair,
    Limits,
    decode_caption,
    decode_image,
    printable,
)
from otcclip.data.emoji import EmojiCorpus, build_emoji
from otcclip.data.emoji_load import EmojiSplit, load_emoji
from otcclip.data.images import DecodedOnDemand, ImageSource
from otcclip.data.index import PairData, open_pairs
from otcclip.data.metadata import decode_metadata
from otcclip.data.pairs import Pair, PairStore, concatenate
from otcclip.data.readers import READERS, ReadOptions
from otcclip.data.shards import Skipped, expand_shards, read_shard, write_shard
from otcclip.data.store import load_store, write_skipped
from otcclip.data.table import PairTable

__all__ = [
    "READERS",
    "REASONS",
    "BadPair",
    "DecodedOnDemand",
    "EmojiCorpus",
    "EmojiSplit",
    "ImageSource",
    "Limits",
    "Pair",
    "PairData",
    "PairStore",
    "PairTable",
    "ReadOptions",
    "Skipped",
    "atomic_file",
    "atomic_folder",
    "build_emoji",
    "concatenate",
    "decode_caption",
    "decode_image",
    "decode_metadata",
    "expand_shards",
    "load_emoji",
    "load_store",
    "open_pairs",
    "printable",
    "read_shard",
    "write_json",
    "write_shard",
    "write_skipped",
    "write_text",
]

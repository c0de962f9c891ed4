"""Pairs from disk: readers, safe decoding, corpora, atomic writes."""

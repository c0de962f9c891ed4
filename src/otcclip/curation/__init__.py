"""Scan, decide, repair: over shards, resumable, shard by shard."""

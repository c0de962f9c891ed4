"""Detectors, one file each: a score a pair, higher = more suspicious."""

"""Readers of raw collections, one per file; `base` defines what a source is."""

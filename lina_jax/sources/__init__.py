"""Readers of raw collections, one file each; `base` says what a source is."""

"""Bundles: from the files of an exporter to a checked repository of tiers."""

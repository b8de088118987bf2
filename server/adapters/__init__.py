"""Adapters over HTTP: uploaded, listed, loaded, pinned, rolled back, deleted."""

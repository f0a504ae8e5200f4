"""Corrupted copies of samples: what the gates learn to tell from the originals."""

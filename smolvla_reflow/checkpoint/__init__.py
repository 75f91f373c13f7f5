"""A SmolVLA checkpoint on disk: find it, read it, load it, merge an adapter into it."""

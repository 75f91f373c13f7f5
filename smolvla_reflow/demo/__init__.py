"""A small task and a small backbone that run offline on a laptop CPU, for the demo and the tests."""

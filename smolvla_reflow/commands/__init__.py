"""Console scripts: parse, check, call."""

"""Couplings on disk: what a set is made of, how it is read, made and verified."""

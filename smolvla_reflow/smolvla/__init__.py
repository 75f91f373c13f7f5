"""SmolVLA's insides: its prefix and velocity, the frozen teacher, the vision encoder, normalisation, checkpoints."""

"""How many ODE steps are enough: measure policies on recorded frames and in a simulator, and report."""

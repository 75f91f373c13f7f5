"""The number of ODE steps that is enough: measure policies on recorded frames and in a simulator, and report."""

"""`smolvla-reflow-train`: its configuration and flags, the checks before it, and where it meets LeRobot's `train()`."""

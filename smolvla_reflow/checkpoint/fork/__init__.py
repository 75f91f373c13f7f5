"""The earlier fork: its checkpoints and flags. This folder can be deleted in one go."""

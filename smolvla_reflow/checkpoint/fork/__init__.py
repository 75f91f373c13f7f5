"""The earlier fork's checkpoints and flags.

To drop its support, delete this folder, `commands/migrate.py`, the guide `from_the_fork.md`, and their imports.
"""

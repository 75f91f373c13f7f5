"""Name the LeRobot and the Python of this environment, and try every command of the installed package with `--help`."""

import subprocess
import sys
from importlib.metadata import distribution, version
from pathlib import Path

print(f"LeRobot {version('lerobot')} on Python {sys.version.split()[0]}")
for entry_point in distribution("smolvla-reflow").entry_points:
    if entry_point.group == "console_scripts":
        command = Path(sys.executable).with_name(entry_point.name)
        subprocess.run([command, "--help"], check=True, stdout=subprocess.DEVNULL)
        print(f"{entry_point.name} --help works")

"""Print the requirements of the package and its tests, except LeRobot and transformers, which LeRobot pins."""

from importlib.metadata import requires

from packaging.requirements import Requirement

CHOSEN_BY_HAND = ("lerobot", "transformers")

for line in requires("smolvla-reflow") or ():
    requirement = Requirement(line)
    marker = requirement.marker
    if requirement.name not in CHOSEN_BY_HAND and (marker is None or marker.evaluate({"extra": "test"})):
        print(f"{requirement.name}{requirement.specifier}")

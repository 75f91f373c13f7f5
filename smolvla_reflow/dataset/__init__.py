"""A dataset as LeRobot opens it: the metadata (opening.py) and the frames (frames.py), and what is silently wrong."""

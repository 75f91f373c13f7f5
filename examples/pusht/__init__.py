"""PushT for LeRobot: `PYTHONPATH=examples ... --env.discover_packages_path=pusht --env.type=pusht_pose`."""

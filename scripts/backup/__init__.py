"""Backup and restore of a system: see `create.py` for what a backup is and why it is whole."""

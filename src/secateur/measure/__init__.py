"""KNOWING it: quality, measured."""

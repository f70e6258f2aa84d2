"""HANDING it over: a folder that stock tools load."""

from secateur.ship.checkpoint import load, save

__all__ = ["load", "save"]

"""The dense network: the control that every sparse one is held against. No masks, no updates."""

from __future__ import annotations

from sparsetune.methods.contract import Method

METHOD = Method(name="dense", paper="control", begins="dense")

"""Static random sparsity: masks drawn once and kept. The floor that moving them must beat."""

from __future__ import annotations

from sparsetune.methods.contract import Method

METHOD = Method(name="static", paper="control", begins="sparse")

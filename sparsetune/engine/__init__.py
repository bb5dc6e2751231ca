"""Many trials at once, without Ray: three lines train a list of settings together.

from sparsetune.engine import train
from sparsetune.settings import TrialSettings

records = train([TrialSettings(hp={"zeta": z}) for z in (0.1, 0.3, 0.5)])
"""

from __future__ import annotations

from sparsetune.engine.pool import Pool, train

__all__ = ["Pool", "train"]

"""Ray: the Tuner, the fleet of engines, its nodes, the light trial."""

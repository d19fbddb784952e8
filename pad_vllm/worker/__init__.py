"""What runs in the engine's worker: the guided step, and whether an engine could be guided at all."""

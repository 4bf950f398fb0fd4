"""What lies on disk: checkpoints of weights, and the state that a run leaves beside its adapter."""

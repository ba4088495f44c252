"""What lives while training: the hand-off to Opacus, the guards of every step, checkpoints, the result of the call."""

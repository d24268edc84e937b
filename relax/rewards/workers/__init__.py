"""Reward functions in processes of their own: one that hangs is killed, and ends nothing else."""

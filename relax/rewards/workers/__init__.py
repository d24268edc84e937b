"""Reward functions in separate processes, where one that hangs can be killed."""

"""Rules: how D and its negatives are combined."""

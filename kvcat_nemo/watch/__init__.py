"""A training run as its files show it, without touching the job: `kvcat train watch`."""

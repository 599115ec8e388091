"""Exit codes that say more than "failed" (1). docs/faults.md lists those of training runs."""

REQUEUE = 75
"""EX_TEMPFAIL: stopped as asked, saved; run the same command again."""
PEER_DIED = 69
"""EX_UNAVAILABLE: another rank died or failed; the message names it. Run the same command again."""
INCOMPLETE = 3
"""`kvcat train doctor --gpu`: nothing failed, but a part could not run here; the report says why."""

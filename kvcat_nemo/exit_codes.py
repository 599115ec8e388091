"""Exit codes of a training run that say more than "failed" (1). docs/faults.md lists when each occurs."""

REQUEUE = 75
"""EX_TEMPFAIL: stopped as asked, saved; run the same command again."""
PEER_DIED = 69
"""EX_UNAVAILABLE: another rank died or failed; the message names it. Run the same command again."""

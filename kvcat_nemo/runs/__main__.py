"""Names of a run's complete checkpoints, newest first, one a line: python -m kvcat_nemo.runs RUN/checkpoints

For the launch scripts. It needs the standard library alone.
"""

import sys

from kvcat_nemo.runs.checkpoints import complete

if len(sys.argv) != 2:
    sys.exit("usage: python -m kvcat_nemo.runs RUN/checkpoints")
for one in complete(sys.argv[1]):
    print(one.path.name)

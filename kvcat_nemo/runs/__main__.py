"""For the launch scripts, with the standard library alone.

python -m kvcat_nemo.runs RUN/checkpoints    names of the complete checkpoints, newest first, one a line
python -m kvcat_nemo.runs --shell-names      what launch/run_names.sh holds
"""

import sys

from kvcat_nemo.runs.checkpoints import complete
from kvcat_nemo.runs.layout import shell_names

if len(sys.argv) != 2:
    sys.exit(f"usage:\n{__doc__.partition(chr(10))[2].strip()}")
if sys.argv[1] == "--shell-names":
    print(shell_names(), end="")
else:
    for one in complete(sys.argv[1]):
        print(one.path.name)

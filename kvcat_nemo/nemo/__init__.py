"""The NeMo 2 adapter: thin, so that another one (Megatron-Bridge) can stand beside it.

Importing this package prepares the host (CPU or CUDA) before NeMo and Megatron-core are imported.
"""

from kvcat_nemo.nemo import old_names
from kvcat_nemo.nemo.cpu_support import prepare
from kvcat_nemo.tracking.telemetry import switch_off

old_names.install()
switch_off()
prepare()

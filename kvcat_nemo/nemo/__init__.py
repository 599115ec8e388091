"""The NeMo 2 adapter: thin, so that another one (Megatron-Bridge) can stand beside it.

Importing this package prepares the host (CPU or CUDA) before NeMo and Megatron-core are imported.
"""

import os

# NeMo's telemetry wrapper reports runs to a service; nothing leaves the machine unless the user asks.
os.environ.setdefault("ONE_LOGGER_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from kvcat_nemo.nemo.host import prepare  # noqa: E402 - the environment above must be set first

prepare()

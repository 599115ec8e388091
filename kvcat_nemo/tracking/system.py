"""System metrics of this node, by MLflow's own collectors, through the outbox like all other figures."""

from __future__ import annotations

import contextlib
import os
import threading
import time

from kvcat_nemo.tracking.outbox import Figure, Outbox

PREFIX = "system/"  # the tab "System metrics" of MLflow's page shows these


def interval_seconds() -> float:
    """Seconds between samples: MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL, or 10."""
    return float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or 10)


class SystemSampler:
    """Samples CPU, memory, disk, network and GPUs until stopped.

    Args:
        outbox: takes the figures; their steps are counted on from the run's last.
    """

    def __init__(self, outbox: Outbox):
        self._outbox = outbox
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvcat-system-metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        monitors = _monitors()
        while not self._stop.wait(interval_seconds()):
            milliseconds = int(time.time() * 1000)
            figures = []
            for monitor in monitors:
                monitor.collect_metrics()
                figures += [
                    Figure(PREFIX + name, float(value), None, milliseconds)
                    for name, value in monitor.aggregate_metrics().items()
                ]
                monitor.clear_metrics()
            self._outbox.put(figures)


def _monitors() -> list:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with contextlib.suppress(ImportError, RuntimeError):  # its way to say that there is no GPU
        monitors.append(GPUMonitor())
    return monitors

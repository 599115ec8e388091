"""An MLflow server that is not there, and one that takes requests and never answers."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults.runs import Record, difference, left_behind, settings, trajectory
from benchmarks.faults.server import Server, free_port

WARNING = "does not answer; training goes on"


@contextlib.contextmanager
def silent() -> Iterator[int]:
    """The port of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        yield listener.getsockname()[1]


def unreachable(server: Server, folder: Path, unbroken: list[dict], steps: int) -> Record:
    """Training goes on to its end, says so once, and the record on disk is whole."""
    record = Record()
    record.facts["seconds_over_all"] = []
    with silent() as port:
        for name, at in (("nobody listens", free_port()), ("no answer", port)):
            place = folder / name.replace(" ", "-")
            environment = {
                "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{at}",
                "MLFLOW_HTTP_REQUEST_TIMEOUT": "2",  # else its second failure comes after so short a run
            }
            run = server.run(place, settings(steps), environment=environment, loggers=True)
            codes = run.wait(300)
            said = run.output().count(WARNING)
            record.facts["seconds_over_all"].append(round(run.ended_at(0) - run.started, 1))
            record.judge(
                name,
                [
                    "" if codes == [0] else f"exit codes {codes}: {run.tail(1500)}",
                    "" if said == 1 else f"said {said} times: {run.tail(1500)}",
                    difference(trajectory(place), unbroken),
                    left_behind(run),
                ],
            )
    return record

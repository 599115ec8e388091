"""Ranks of test_preflight: python preflight_rank.py JOB.json. Imports torch once and forks them; what they say and how they end
lies beside the job."""

import json
import os
import signal
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch

from kvcat_nemo.engine.heartbeat import Heartbeat, connect, is_communication_error
from kvcat_nemo.engine.preflight import check_all_ranks, place_from_environment


def reach(job, rank):
    if (
        rank == job["victim"]
    ):  # known to the others, and then gone: what a broken network card looks like from outside
        torch.distributed.init_process_group = lambda *_, **__: os.kill(os.getpid(), signal.SIGSTOP)
    try:
        print(check_all_ranks(place_from_environment(), seconds=job["seconds"]))
    except ValueError as error:
        sys.exit(f"{error}")


def line(job, rank):
    """A job that sums for ever; one rank is killed, freezes or fails in it."""
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    heartbeat = Heartbeat(connect(4.0), rank, job["world"], interval=0.2, patience=2.0)
    heartbeat.start()
    torch.distributed.barrier()
    try:
        for step in range(10**6):
            torch.distributed.all_reduce(torch.ones(8))
            if step == 50 and job["act"] == "done":
                break
            if step == 50 and rank == job["victim"]:
                {
                    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
                    "frozen": lambda: os.kill(os.getpid(), signal.SIGSTOP),
                    "failed": lambda: {}["a bug of its own"],
                }[job["act"]]()
            time.sleep(0.001)
    except Exception as error:
        if not is_communication_error(error):
            heartbeat.report_own_failure(error)
            raise
        print(f"said: {heartbeat.wait_for_verdict(5.0)}")
        sys.exit(3)
    heartbeat.stop()
    if rank == 0:
        time.sleep(3.0)  # the others' patience passes: nobody is missed who said goodbye
    print("good order")


def main(folder: Path, job: dict) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = {}
    for rank in job["ranks"]:
        pid = os.fork()
        if pid:
            ranks[pid] = rank
            continue
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(job["world"]),
            LOCAL_WORLD_SIZE=str(job["world"]),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        log = os.open(folder / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1), os.dup2(log, 2)
        code = 0
        try:
            {"reach": reach, "line": line}[job["what"]](job, rank)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
            print(stop.code)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        os._exit(code)
    codes = {}
    frozen = [pid for pid, rank in ranks.items() if rank == job["victim"]]
    while set(ranks) - set(frozen if job.get("act") != "done" else ()) - set(codes):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
    for pid in set(ranks) - set(codes):
        os.kill(pid, signal.SIGKILL)
    (folder / "codes.json").write_text(json.dumps({str(ranks[p]): c for p, c in codes.items()}))


if __name__ == "__main__":
    path = Path(sys.argv[1])
    main(path.parent, json.loads(path.read_text()))

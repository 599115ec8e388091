"""Rank program of test_reach and test_lifeline: python reach_rank.py WHAT, with a launcher's variables set."""

import os
import signal
import sys
import time


def reach(seconds):
    from kvcat_nemo.engine.reach import place_from_environment, reach_all

    try:
        print(reach_all(place_from_environment(), seconds=seconds), flush=True)
    except ValueError as error:
        print(error, flush=True)
        sys.exit(1)


def line(act):
    """A job that sums for ever; one rank ends, fails or freezes in it."""
    from datetime import timedelta

    import torch

    from kvcat_nemo.engine.lifeline import Lifeline, connect, is_communication_error

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    lifeline = Lifeline(connect(4.0), rank, world, interval=0.2, patience=2.0)
    lifeline.start()
    lifeline.learn_names()
    torch.distributed.barrier()
    print("ready", flush=True)
    try:
        for step in range(10**6):
            torch.distributed.all_reduce(torch.ones(8))
            if rank == int(os.environ["VICTIM"]) and step == 50:
                if act == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if act == "frozen":
                    os.kill(os.getpid(), signal.SIGSTOP)
                if act == "failed":
                    raise KeyError("a bug of its own")
            if act == "done" and step == 50:
                break
            time.sleep(0.001)
    except Exception as error:
        if not is_communication_error(error):
            lifeline.report_own_failure(error)
            raise
        print(f"said: {lifeline.wait_for_verdict(5.0)}", flush=True)
        sys.exit(3)
    lifeline.stop()
    time.sleep(3.0)  # the others' patience passes: nobody is missed who said goodbye
    print("good order", flush=True)


if __name__ == "__main__":
    what = sys.argv[1]
    reach(float(sys.argv[2])) if what == "reach" else line(what)

"""Stands for a training program in tests of the launchers: steps, checkpoints, the stop file, and accidents to order.

    standin.py STEPS [--fail RANK:STEP:CODE] [--save-every N] [--deaf]

Every rank steps by itself (0.1 s a step); rank 0 saves. A deaf one is not to be stopped.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

from kvcat_nemo.runs.checkpoint_manifest import hash_and_write_manifest

parser = argparse.ArgumentParser()
parser.add_argument("steps", type=int)
parser.add_argument("--fail")
parser.add_argument("--save-every", type=int, default=1000)
parser.add_argument("--deaf", action="store_true")
options = parser.parse_args()

rank = int(os.environ["RANK"])
run = Path(os.environ["KVCAT_RUN_DIR"])
stop = Path(os.environ["KVCAT_STOP_FILE"])
asked = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: asked.append(number))


def save(step: int) -> None:
    if rank == 0:
        folder = run / "checkpoints" / f"step={step}"
        unfinished = folder.with_name(folder.name + "-unfinished")
        folder.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
        time.sleep(0.2)
        (folder / "weights").write_text("of step " + str(step))
        hash_and_write_manifest(folder, step)
        unfinished.unlink()


saved = [int(p.name.removeprefix("step=")) for p in run.glob("checkpoints/step=*") if p.is_dir()]
first = max(saved, default=0)
print(
    f"rank {rank} of {os.environ['WORLD_SIZE']} starts at step {first}, {' '.join(sys.argv[1:])}", flush=True
)
for step in range(first + 1, options.steps + 1):
    time.sleep(0.1)
    print(f"rank {rank} step {step}", flush=True)
    if options.fail and options.fail.split(":")[:2] == [str(rank), str(step)]:
        print("something broke here", file=sys.stderr)
        sys.exit(int(options.fail.split(":")[2]))
    if step % options.save_every == 0:
        save(step)
    if (asked or stop.exists()) and not options.deaf:
        save(step)
        sys.exit(75)
if rank == 0:
    (run / "kvcat").mkdir(exist_ok=True)
    (run / "kvcat" / "finished.json").write_text(json.dumps({"step": options.steps}))

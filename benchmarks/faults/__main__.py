"""`make faults`: what a training run survives, counted. Writes benchmarks/faults.json.

Every fault is done to real processes that train through NeMo (kvcat_tiny, gloo); after each the run is started again and
compared, figure by figure to the last bit, with one that nothing happened to.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults import damage, kills, longer, nan, resume, runs, store
from benchmarks.faults.server import Server
from benchmarks.smoke import add_option, shrink
from kvcat_nemo.common.files import new_file
from kvcat_nemo.runs.provenance import manifest

OUT = Path(__file__).parents[1] / "faults.json"
STEPS = 24


SMOKE = ("resume_modes",)


def main(argv=None, server: Server | None = None) -> None:
    """Bring faults about and count.

    Args:
        server: one that runs already, for --smoke among other tests.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="names of faults; the others' results are kept")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--keep", type=Path, help="work here and leave the runs there")
    add_option(parser)
    options = shrink(parser.parse_args(argv), parser, only=list(SMOKE))
    with tempfile.TemporaryDirectory(prefix="kvcat-faults-") as name:
        folder = options.keep or Path(name)
        failed = measure(folder, options, server)
    sys.exit(1 if failed else 0)


def measure(folder: Path, options: argparse.Namespace, running: Server | None = None) -> list[str]:
    began = time.monotonic()
    # Asked for before the result's own file changes the checkout.
    facts = manifest(seed=options.seed, steps=STEPS, save_every=runs.SAVE_EVERY, recipe="kvcat_tiny")
    stored = json.loads(options.out.read_text())["faults"] if options.only and options.out.is_file() else {}
    with Server() if running is None else contextlib.nullcontext(running) as server:
        print(f"NeMo imported after {time.monotonic() - began:.0f} s", flush=True)
        todo = faults(server, folder, options.seed)
        if unknown := set(options.only or []) - set(todo):
            raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(todo)}")
        for name, (what, act) in todo.items():
            if options.only and name not in options.only:
                continue
            start = time.monotonic()
            try:
                result = act()
            except Exception as error:  # one fault that cannot be brought about must not hide the others
                traceback.print_exc()
                result = {
                    "tried": 1,
                    "survived": 0,
                    "lost": {},
                    "failures": [f"{type(error).__name__}: {error}"[:4000]],
                }
            seconds = round(time.monotonic() - start, 1)
            stored[name] = {"fault": what, **result, "seconds": seconds, "revision": facts["git_revision"]}
            print(
                f"{name}: {result['survived']} of {result['tried']} survived, {stored[name]['seconds']} s",
                flush=True,
            )
            for failure in result.get("failures", []):
                print(f"    {failure}", flush=True)
            write(options.out, stored, facts)  # after each: a suite that is interrupted has what it has done
    print(f"{options.out}: {(time.monotonic() - began) / 60:.1f} min")
    bad = [name for name, result in stored.items() if result["survived"] < result["tried"]]
    print(f"not survived: {', '.join(bad)}" if bad else "everything survived")
    return bad


def write(out: Path, stored: dict, facts: dict) -> None:
    record = {
        "faults": stored,
        "sigkills": sum(
            r.get("sigkills", r["tried"] if n.startswith("sigkill") else 0) for n, r in stored.items()
        ),
        "minutes": round(sum(r["seconds"] for r in stored.values()) / 60, 1),
        "manifest": facts,
    }
    with new_file(out) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


def faults(server: Server, folder: Path, seed: int) -> dict[str, tuple[str, Callable[[], dict]]]:
    """Name → what is done, and how."""
    references: dict[tuple, list[dict]] = {}

    def unbroken(steps: int = STEPS, layout: str = "TP1") -> list[dict]:
        if (steps, layout) not in references:
            references[steps, layout] = runs.straight(
                server, folder / f"straight-{layout}-{steps}", steps, layout
            )
        return references[steps, layout]

    known: dict[str, dict[str, runs.Record]] = {}

    def killed(layout: str, moment: str, counts: dict[str, int], **more) -> dict:
        """All moments of one layout happen to one run; each has its own count."""
        key = f"{layout}{more}"
        if key not in known:
            steps = 60 if layout == "TP1" and not more else STEPS
            known[key] = kills.kill_moments(
                server,
                folder / f"kills-{layout}{'-async' if more else ''}",
                counts,
                seed=seed,
                layout=layout,
                unbroken=unbroken(steps, layout),
                steps=steps,
                **more,
            )
        return known[key][moment].result()

    one = {"in a step": 16, "in a save": 16, "while starting": 4}
    two = {"in a step": 4, "in a save": 4}
    asynchronous = {"environment": {"KVCAT_ASYNC_SAVE_ON_CPU": "1"}}

    def disk() -> dict:
        unbroken()
        size = runs.checkpoint_megabytes(folder / f"straight-TP1-{STEPS}")
        return damage.disk_full(server, folder / "disk", unbroken(), STEPS, size).result()

    return {
        "resume": (
            "10 steps against 5, stop, 5, in float32, bit for bit",
            lambda: resume.resume_exact(server, folder / "resume", ["TP1", "TP2", "PP2", "DP2"]).result(),
        ),
        "resume_with_files": (
            "the same on an indexed dataset with a loader's worker, killed in between",
            lambda: resume.resume_with_files(server, folder / "files", ["TP1", "DP2"]).result(),
        ),
        "longer_run": (
            "a run extended over the end of an epoch, and resumed with other settings of its data",
            lambda: longer.extended(server, folder / "longer").result(),
        ),
        "resume_across_layouts": (
            "5 steps at TP2 × PP2, 5 at TP1",
            lambda: resume.resume_across(server, folder / "across").result(),
        ),
        "resume_modes": (
            "resume.mode must and never",
            lambda: resume.resume_modes(server, folder / "modes").result(),
        ),
        "sigkill_in_step": ("SIGKILL at a random moment of a step", lambda: killed("TP1", "in a step", one)),
        "sigkill_in_save": ("SIGKILL in the middle of a save", lambda: killed("TP1", "in a save", one)),
        "sigkill_while_starting": (
            "SIGKILL while it starts from a checkpoint",
            lambda: killed("TP1", "while starting", one),
        ),
        "sigkill_in_async_save": (
            "SIGKILL during an asynchronous save, which a CPU host makes in this suite alone",
            lambda: killed("TP1", "in a save", {"in a save": 5, "in a step": 2}, **asynchronous),
        ),
        "sigkill_two_ranks_in_step": (
            "SIGKILL to both ranks of DP2 in a step",
            lambda: killed("DP2", "in a step", two),
        ),
        "sigkill_two_ranks_in_save": ("the same in a save", lambda: killed("DP2", "in a save", two)),
        "sigkill_before_validation": (
            "SIGKILL between a save and the validation of the same step",
            lambda: kills.before_validation(
                server,
                folder / "validation",
                {x: unbroken(STEPS, x) for x in ("TP1", "TP2", "PP2", "DP2")},
                STEPS,
                at=4 * runs.SAVE_EVERY,
            ).result(),
        ),
        "full_command": (
            "nemo llm pretrain: SIGKILL twice, then SIGTERM, then its end",
            lambda: kills.full_command(folder / "full", unbroken(), STEPS, 2, seed).result(),
        ),
        "asked_to_stop": (
            "SIGTERM, SIGUSR1 twice, KVCAT_STOP_FILE",
            lambda: resume.stops(
                server,
                folder / "stops",
                unbroken(),
                STEPS,
                {x: unbroken(STEPS, x) for x in ("TP1", "PP2", "DP2")},
            ).result(),
        ),
        "one_rank_of_four_dies": (
            "SIGKILL to one rank of TP2 × PP2",
            lambda: kills.one_dies(
                server,
                folder / "four",
                "TP2PP2",
                unbroken(STEPS, "TP2PP2"),
                STEPS,
                seed,
                victims=[0, 1, 2, 3],
            ).result(),
        ),
        "one_rank_freezes": (
            "SIGSTOP to one rank of DP2",
            lambda: kills.one_dies(
                server, folder / "frozen", "DP2", unbroken(STEPS, "DP2"), STEPS, seed, freeze=True
            ).result(),
        ),
        "disk_full": ("no space left on the device", disk),
        "damaged_checkpoint": (
            "a truncated shard, a flipped bit, a manifest that is gone",
            lambda: damage.damaged_files(server, folder / "damaged", unbroken(), STEPS).result(),
        ),
        "not_a_number": (
            "NaN in one rank's loss or gradients",
            lambda: nan.not_a_number(server, folder / "nan").result(),
        ),
        "skipped_step": (
            "a skipped step changes no weight",
            lambda: nan.skipped_step_changes_nothing(server, folder / "skipped").result(),
        ),
        "data_files": (
            "data files that are missing, empty, truncated, of another dataset, no index, or of other tokens",
            lambda: damage.bad_data(server, folder / "data").result(),
        ),
        "mlflow_unreachable": (
            "an MLflow server that is not there, and one that never answers",
            lambda: store.unreachable(server, folder / "mlflow", unbroken(), STEPS).result(),
        ),
    }


if __name__ == "__main__":
    main()

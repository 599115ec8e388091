"""Where a run starts: its own newest complete checkpoint, a base model, or nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

from nemo.lightning.pytorch.strategies.utils import RestoreConfig
from nemo.utils import AppState, logging

from kvcat_nemo.nemo.base_model import check_base, check_resumed, require_base
from kvcat_nemo.nemo.choices import check_choice
from kvcat_nemo.nemo.compat import ResumeFrom
from kvcat_nemo.runs.checkpoints import survey
from kvcat_nemo.runs.integrity import has_manifest
from kvcat_nemo.runs.layout import CHECKPOINTS, MANIFEST, WEIGHTS

Mode = Literal["auto", "must", "never"]
Verify = Literal["hashes", "sizes"]


@dataclass(kw_only=True)
class KVCatResume(ResumeFrom):
    """NeMo's AutoResume that may start from a base model, checks checkpoints before they are loaded, and logs what it decided."""

    base: Optional[str] = None
    """A converted base model (kvcat convert import) or a training checkpoint whose weights a new run starts from."""
    mode: Mode = "auto"
    """auto: go on from the run's newest complete checkpoint if there is one; must: fail without one; never: fail with one."""
    verify: Verify = "hashes"
    """What of a checkpoint's or base's files is compared with its manifest before it is loaded; hashes read every file once more."""
    unverified: bool = False
    """True takes a base, or a checkpoint named by resume_from_path, that has no manifest (a plain NeMo or Megatron checkpoint)."""
    resume_if_exists: bool = True
    resume_ignore_no_checkpoint: bool = True
    resume_past_end: bool = True

    def setup(self, trainer, model=None) -> None:
        """Set the trainer's starting point and print it.

        Raises:
            ValueError: when the mode and what is on disk do not fit, when every checkpoint that was complete once is
                damaged, when the base does not exist, is damaged or has no manifest, or when the run would compute another function
                than its base or its checkpoint.
        """
        check_choice("resume.mode", self.mode, Mode)
        check_choice("resume.verify", self.verify, Verify)
        if self.base is None and self.restore_config is not None:
            raise ValueError(
                f"resume.restore_config={self.restore_config!r}: NeMo would load it without looking whether it is whole; "
                "give resume.base=FOLDER instead"
            )
        if self.base is not None:
            if not (Path(self.base) / WEIGHTS).is_dir():
                raise ValueError(
                    f"resume.base={self.base!r}: no checkpoint there (no weights/). Make one: kvcat convert import HF_DIR {self.base}"
                )
            require_base(self.base, unverified=self.unverified)
            if model is not None and not check_base(self.base, model.config):
                logging.warning(
                    f"kvcat: {self.base} does not record the function of its model (rope, eps, activation …): not compared with the run's"
                )
            self.restore_config = RestoreConfig(path=str(self.base), load_artifacts=False)
        self._candidates = self._find()
        found = self._candidates[0] if self._candidates else None
        if self.mode == "must" and found is None:
            raise ValueError(
                f"resume.mode='must': no complete checkpoint in {self._folder()}; set resume.mode=auto to start a new run"
            )
        if self.mode == "never" and found is not None:
            raise ValueError(
                f"resume.mode='never': {found} exists; give the run another log.name, or set resume.mode=auto"
            )
        if model is not None:
            for candidate in self._candidates:
                check_resumed(candidate, model.config)
        super().setup(trainer, model)
        # Contents are compared when the process group is up, by all ranks together (KVCatStrategy.load_checkpoint).
        trainer.strategy.resume_from(
            self._candidates,
            verify_hashes=self.verify == "hashes",
            unverified=self.unverified,
            foreign=bool(self.resume_from_path),
        )
        start = found or self.base
        logging.info(
            f"kvcat: {'resuming from' if found else 'starting from'} {start or 'random initialisation'} (resume.mode={self.mode})"
        )

    def _folder(self) -> Path:
        return Path(self.resume_from_directory or Path(AppState().log_dir) / CHECKPOINTS)

    def _find(self) -> list[Path]:
        """Complete checkpoints, newest first; what is passed over is named."""
        if self.resume_from_path:
            if not has_manifest(self.resume_from_path) and not self.unverified:
                raise ValueError(
                    f"resume.resume_from_path={str(self.resume_from_path)!r} has no {MANIFEST}: its save did not end, or another program "
                    "wrote it. Take another checkpoint, or, if you trust it, set resume.unverified=True"
                )
            return [Path(self.resume_from_path)]
        checkpoints = survey(self._folder())
        for one in checkpoints:
            if one.why_not:
                logging.warning(
                    f"kvcat: passed over {'a damaged' if one.damaged else 'an incomplete'} checkpoint: {one.why_not}"
                )
        usable = [one.path for one in checkpoints if not one.why_not]
        damaged = [one for one in checkpoints if one.damaged]
        if damaged and not usable and self.mode != "never":
            raise ValueError(
                f"resume.mode={self.mode!r}: no checkpoint in {self._folder()} is whole, and {damaged[0].path} was once: "
                f"{damaged[0].why_not}. Put it back from a copy, or move the folder away to start a new run"
            )
        return usable

    def checkpoint_to_resume(self) -> Optional[Path]:
        return self._candidates[0] if self._candidates else None

"""Where a run starts: its own last checkpoint, a base model, or nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

from nemo import lightning as nl
from nemo.lightning.pytorch.strategies.utils import RestoreConfig
from nemo.utils import AppState, logging


@dataclass(kw_only=True)
class KVCatResume(nl.AutoResume):
    """NeMo's AutoResume with a base model to start from, and a word on what it decided."""

    base: Optional[str] = None
    """A converted base model (kvcat convert import) or a training checkpoint whose weights a new run starts from."""
    mode: Literal["auto", "must", "never"] = "auto"
    """auto: go on from the run's last checkpoint if there is one; must: fail without one; never: fail with one."""
    resume_if_exists: bool = True
    resume_ignore_no_checkpoint: bool = True
    resume_past_end: bool = True

    def setup(self, trainer, model=None) -> None:
        """Set the trainer's starting point.

        Raises:
            ValueError: when the mode and what is on disk do not fit, or the base does not exist.
        """
        if self.mode not in ("auto", "must", "never"):
            raise ValueError(f"resume.mode={self.mode!r}: choose one of auto, must, never")
        if self.base is not None:
            if not (Path(self.base) / "weights").is_dir():
                raise ValueError(
                    f"resume.base={self.base!r}: no checkpoint there (no weights/). Make one: kvcat convert import HF_DIR {self.base}"
                )
            self.restore_config = RestoreConfig(path=str(self.base), load_artifacts=False)
        log_dir = AppState().log_dir
        found = self._find_trainer_ckpt_path()
        if self.mode == "must" and found is None:
            raise ValueError(
                f"resume.mode='must': no complete checkpoint in {log_dir}; set resume.mode=auto to start a new run"
            )
        if self.mode == "never" and found is not None:
            raise ValueError(
                f"resume.mode='never': {found} exists; give the run another log.name, or set resume.mode=auto"
            )
        super().setup(trainer, model)
        start = found or self.base
        logging.info(
            f"kvcat: {'resuming from' if found else 'starting from'} {start or 'random initialisation'}"
        )

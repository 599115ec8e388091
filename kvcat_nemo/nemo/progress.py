"""A progress bar that says what a KV-CAT run is doing: loss parts, keep rate, tokens/s, time left."""

from __future__ import annotations

from lightning.pytorch.callbacks import ProgressBar
from megatron.core.num_microbatches_calculator import get_num_microbatches
from tqdm import tqdm

from kvcat_nemo.nemo.run_state import RunCallback


class KVCatProgress(RunCallback, ProgressBar):
    """One bar for the training steps and one for each validation, on the first rank only."""

    def __init__(self):
        super().__init__()
        self._bar: tqdm | None = None
        self._validation: tqdm | None = None
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_batch_start(self, trainer, *args) -> None:
        if self._enabled and trainer.is_global_zero and self._bar is None:
            done = trainer.global_step
            self._bar = tqdm(
                total=trainer.max_steps,
                initial=done,
                desc="training",
                unit="step",
                dynamic_ncols=True,
                position=0,
            )

    def on_train_batch_end(self, trainer, *args) -> None:
        if self._bar is None:
            return
        m = self.run.train
        figures = {
            "anchor": f"{m['loss/anchor']:.3f}",
            "distill": f"{m['loss/distill']:.3f}" if "loss/distill" in m else None,
            "keep": f"{m['keep_rate']:.3f}" if "keep_rate" in m else None,
            "tok/s": f"{m.get('tokens_per_second', 0):,.0f}",
        }
        self._bar.set_postfix({k: v for k, v in figures.items() if v is not None}, refresh=False)
        self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, trainer, *args) -> None:
        if self._bar is not None:
            self._bar.close()

    def on_validation_start(self, trainer, pl_module) -> None:
        if self._enabled and trainer.is_global_zero and not trainer.sanity_checking:
            micro = sum(n for n in trainer.num_val_batches if n != float("inf"))
            total = int(micro) // get_num_microbatches()
            self._validation = tqdm(
                total=total or None,
                desc=f"validation at step {trainer.global_step}",
                unit="batch",
                leave=False,
                position=0,  # on the training bar's line, which is drawn again after it
                dynamic_ncols=True,
            )

    def on_validation_batch_end(self, *args, **kwargs) -> None:
        if self._validation is not None:
            self._validation.update(1)

    def on_validation_end(self, trainer, pl_module) -> None:
        if self._validation is None:
            return
        self._validation.close()
        self._validation = None
        m = self.run.validation
        if m:
            masked = (
                f", masked {m['masked_ppl']:.2f} at keep {m['keep_rate']:.3f}" if "masked_ppl" in m else ""
            )
            tqdm.write(f"step {trainer.global_step}: held-out perplexity dense {m['dense_ppl']:.2f}{masked}")

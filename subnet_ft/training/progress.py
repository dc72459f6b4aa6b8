"""One progress bar per run, with the figures people watch beside it instead of a line of JSON per step."""

from __future__ import annotations

from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

_SHOWN = ("loss", "reward", "rewards/accuracies", "grad_norm")


class FiguresBesideBar(ProgressCallback):
    """Shows loss, reward and gradient norm beside the trainer's bar; the full log is in the run's folder."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the newest figures beside the bar."""
        if self.training_bar is not None and logs is not None:
            figures = {name.rpartition("/")[2]: f"{logs[name]:.3g}" for name in _SHOWN if name in logs}
            if figures:
                self.training_bar.set_postfix(figures, refresh=True)


def show_progress(trainer: Trainer, *, progress: bool) -> None:
    """Replace the trainer's own printing by one bar, or by nothing; `disable_tqdm` of its arguments means nothing."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if progress and not trainer.args.disable_tqdm:
        trainer.add_callback(FiguresBesideBar())

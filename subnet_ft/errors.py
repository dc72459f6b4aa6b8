"""Every error this package raises on purpose.

    SubnetError
    ├── RecipeError                 (ValueError)    a recipe that cannot run, all its problems at once
    ├── CheckpointError             (ValueError)    a model that cannot be found or read
    │   └── CheckpointMismatchError                 two checkpoints that cannot be compared
    ├── MaskError                   (ValueError)    a mask that is wrong in itself
    │   ├── MaskFileError                           a mask file that breaks its format
    │   └── MaskMismatchError                       a mask that belongs to another model
    ├── DeltaError                  (ValueError)    a delta that is wrong in itself
    │   ├── DeltaFileError                          a delta file that breaks its format
    │   └── DeltaMismatchError                      a delta that belongs to another model
    ├── SwapError                   (RuntimeError)  a model whose weights cannot change places with others now
    ├── OptimizerError              (ValueError)    an optimizer that cannot train a subnetwork
    ├── OptimizerStateError         (ValueError)    a saved optimizer state that does not fit
    ├── GradientError               (RuntimeError)  gradients that a masked optimizer cannot take
    │   └── NonFiniteGradientError                  a gradient with NaN or infinite values on the mask
    ├── FrozenWeightError           (RuntimeError)  a weight outside the mask that changed
    ├── TrainerError                (ValueError)    a trainer that a masked optimizer cannot serve
    ├── WeightSyncError             (RuntimeError)  weights that did not reach a generation engine, or not these
    ├── MethodError                 (ValueError)    a method that cannot train this model with this algorithm
    ├── TaskError                   (ValueError)    data or rewards that cannot be used
    ├── StageError                  (RuntimeError)  a run folder that cannot be continued
    ├── LaunchError                 (RuntimeError)  processes that cannot work together
    ├── PlanError                   (ValueError)    a plan that cannot be made as it was asked for
    └── MissingDependencyError      (ImportError)   an optional package that is not installed

A message names the thing, the values and the next step. The command line prints it without a traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class SubnetError(Exception):
    """Base of every expected error; `subnet-ft` prints its message and exits with code 2."""


class RecipeError(SubnetError, ValueError):
    """A recipe has problems; `problems` holds one line for each.

    Args:
        where: The recipe's file name, or another word for where it came from.
        problems: One sentence per problem, each starting with the dotted key.
    """

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.where = where
        self.problems = list(problems)
        count = f"{len(self.problems)} problem" + ("s" if len(self.problems) != 1 else "")
        super().__init__("\n".join([f"Recipe `{where}` has {count}:", *(f"  {line}" for line in self.problems)]))


class CheckpointError(SubnetError, ValueError):
    """A checkpoint is missing, incomplete or unreadable."""


class CheckpointMismatchError(CheckpointError):
    """Two checkpoints differ in their tensors, shapes or dtypes and cannot be compared."""


class MaskError(SubnetError, ValueError):
    """A mask is invalid."""


class MaskFileError(MaskError):
    """A mask file breaks its format; nothing of it was used."""


class MaskMismatchError(MaskError):
    """A mask does not belong to the model, the base or the other mask at hand."""


class DeltaError(SubnetError, ValueError):
    """A delta is invalid, or cannot be made."""


class DeltaFileError(DeltaError):
    """A delta file breaks its format; nothing of it was used."""


class DeltaMismatchError(DeltaError):
    """A delta does not belong to the base, the mask or the other delta at hand."""


class SwapError(SubnetError, RuntimeError):
    """Weights of a model cannot change places with others now, or somebody wrote to them in between."""


class OptimizerError(SubnetError, ValueError):
    """An optimizer needs more than the compact weights, gradients and state of a subnetwork."""


class OptimizerStateError(SubnetError, ValueError):
    """A saved optimizer state belongs to another mask, model or setting."""


class GradientError(SubnetError, RuntimeError):
    """A gradient, or the way it arrives, is one that a masked optimizer cannot take."""


class NonFiniteGradientError(GradientError):
    """A gradient has NaN or infinite values on the mask; no weight was changed."""


class FrozenWeightError(SubnetError, RuntimeError):
    """A weight outside the mask changed, whoever wrote it."""


class TrainerError(SubnetError, ValueError):
    """A trainer is set up in a way that a masked optimizer cannot serve."""


class WeightSyncError(SubnetError, RuntimeError):
    """A generation engine did not take the trainer's weights, or has others; what it had before stands."""


class MethodError(SubnetError, ValueError):
    """A method cannot train this model, or not with this algorithm."""


class TaskError(SubnetError, ValueError):
    """A task's data, prompts, answers or rewards cannot be used."""


class StageError(SubnetError, RuntimeError):
    """A run folder holds something that the recipe at hand cannot continue."""


class PlanError(SubnetError, ValueError):
    """A plan is asked for with values that it cannot have."""


class LaunchError(SubnetError, RuntimeError):
    """A command was started in processes, or on devices, that cannot work on it together."""


class MissingDependencyError(SubnetError, ImportError):
    """An optional dependency is not installed.

    Args:
        package: Import name of the missing package.
        purpose: What it is needed for, as the end of a sentence.
        extra: The extra of `subnet-ft` that brings it.
    """

    def __init__(self, package: str, purpose: str, extra: str) -> None:
        super().__init__(
            f"`{package}` is needed {purpose} but is not installed. Install it with `pip install 'subnet-ft[{extra}]'`."
        )

"""Training: one loop, in this process or on Ray Train's workers, under DeepSpeed."""

from mobula.training.checkpoints import load_weights
from mobula.training.config import TrainingConfig
from mobula.training.fit import FitResult, fit
from mobula.training.task import Task

__all__ = ["FitResult", "Task", "TrainingConfig", "fit", "load_weights"]

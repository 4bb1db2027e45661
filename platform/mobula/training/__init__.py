"""Training: one loop, in this process or on Ray Train's workers, under DeepSpeed."""

from mobula.training.checkpoints import load_weights
from mobula.training.config import TrainingConfig
from mobula.training.fit import FitResult, Training, fit, fit_all
from mobula.training.group import group
from mobula.training.task import Task

__all__ = ["FitResult", "Task", "Training", "TrainingConfig", "fit", "fit_all", "group", "load_weights"]

"""Training and distillation: a teacher, and students that need fewer steps."""

from .consistency import ConsistencyDistillation
from .conversion import Conversion, student_of
from .data import Batches
from .diffusion import Diffusion
from .method import Batch, Method
from .progressive import ProgressiveDistillation, progressive
from .recipes import distill_digits, train_digits
from .trainer import constant, linear, train

__all__ = [
    "Batch",
    "Batches",
    "ConsistencyDistillation",
    "Conversion",
    "Diffusion",
    "Method",
    "ProgressiveDistillation",
    "constant",
    "distill_digits",
    "linear",
    "progressive",
    "student_of",
    "train",
    "train_digits",
]

"""Training and distillation: a teacher, and students that need fewer steps."""

from . import draws
from .boundary import Bounded, EDMBoundary, LCMBoundary, bounded, edm_model
from .consistency import ConsistencyDistillation
from .consistency_training import ConsistencyTraining, EasyConsistencyTuning
from .continuous import AdaptiveWeight, ContinuousConsistency
from .conversion import Conversion, student_of
from .curriculum import Doubling, Lognormal, Matched, SquareRoot
from .data import Batches, Drawn
from .diffusion import Diffusion
from .discriminator import Discriminator
from .distances import PseudoHuber
from .distribution import DistributionMatching, alike, by_alpha
from .flow_map import FlowMap, MeanFlow, sample_flow_map
from .importance import Importance
from .latent import Huber, LatentConsistency, lcm_scheduler, skipping
from .lora import lora_student, merged, save_lora
from .method import Batch, Method, plain
from .options import constant, cosine, linear
from .pairs import Pairs, make_pairs
from .progressive import ProgressiveDistillation, progressive
from .recipes import distill_digits, train_digits
from .reflow import Reflow, straightness
from .scale import Embedded, Plain, Scales, scaled_student
from .sources import TeacherSamples, hub_dataset, image_folder, npz_images
from .student import without_boundary
from .times import CosMapTimes, LogitNormalTimes, LogNormalTimes, UniformTimes
from .trainer import averaged, train
from .weights import P2, EDMWeight, MinSNR

__all__ = [
    "P2",
    "AdaptiveWeight",
    "Batch",
    "Batches",
    "Bounded",
    "ConsistencyDistillation",
    "ConsistencyTraining",
    "ContinuousConsistency",
    "Conversion",
    "CosMapTimes",
    "Diffusion",
    "Discriminator",
    "DistributionMatching",
    "Doubling",
    "Drawn",
    "EDMBoundary",
    "EDMWeight",
    "EasyConsistencyTuning",
    "Embedded",
    "FlowMap",
    "Huber",
    "Importance",
    "LCMBoundary",
    "LatentConsistency",
    "LogNormalTimes",
    "LogitNormalTimes",
    "Lognormal",
    "Matched",
    "MeanFlow",
    "Method",
    "MinSNR",
    "Pairs",
    "Plain",
    "ProgressiveDistillation",
    "PseudoHuber",
    "Reflow",
    "Scales",
    "SquareRoot",
    "TeacherSamples",
    "UniformTimes",
    "alike",
    "averaged",
    "bounded",
    "by_alpha",
    "constant",
    "cosine",
    "distill_digits",
    "draws",
    "edm_model",
    "hub_dataset",
    "image_folder",
    "lcm_scheduler",
    "linear",
    "lora_student",
    "make_pairs",
    "merged",
    "npz_images",
    "plain",
    "progressive",
    "sample_flow_map",
    "save_lora",
    "scaled_student",
    "skipping",
    "straightness",
    "student_of",
    "train",
    "train_digits",
    "without_boundary",
]

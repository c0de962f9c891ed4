"""Protocols of measurement, one a file; functions of features, knowing no model and no attack."""

from otcclip.evaluation.attack_success import targeted_success
from otcclip.evaluation.detection import Detection, detection
from otcclip.evaluation.intervals import Rate, wilson
from otcclip.evaluation.probe import Probe, halves, linear_probe
from otcclip.evaluation.retrieval import Retrieval, retrieval
from otcclip.evaluation.swap_success import SwapSuccess, swap_success
from otcclip.evaluation.zero_shot import NAME_ONLY, ZeroShot, class_embeddings, zero_shot

__all__ = [
    "NAME_ONLY",
    "Detection",
    "Probe",
    "Rate",
    "Retrieval",
    "SwapSuccess",
    "ZeroShot",
    "class_embeddings",
    "detection",
    "halves",
    "linear_probe",
    "retrieval",
    "swap_success",
    "targeted_success",
    "wilson",
    "zero_shot",
]

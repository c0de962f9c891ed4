"""Protocols of measurement, one a file; functions of features, knowing no model and no attack."""

from otcclip.evaluation.attack_success import backdoor_success, targeted_success
from otcclip.evaluation.detection import Detection, detection
from otcclip.evaluation.intervals import Rate, wilson
from otcclip.evaluation.retrieval import Retrieval, retrieval
from otcclip.evaluation.zero_shot import NAME_ONLY, ZeroShot, class_embeddings, zero_shot

__all__ = [
    "NAME_ONLY",
    "Detection",
    "Rate",
    "Retrieval",
    "ZeroShot",
    "backdoor_success",
    "class_embeddings",
    "detection",
    "retrieval",
    "targeted_success",
    "wilson",
    "zero_shot",
]

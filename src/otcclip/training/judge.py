"""Judges a model on the held-out split: accuracy, and the success of every attack (METHOD section 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from otcclip.attacks import Attack, LabelSwap, PoisonPlan, apply_trigger
from otcclip.data.pairs import PairStore
from otcclip.data.png import png
from otcclip.errors import UserError
from otcclip.evaluation.attack_success import targeted_success
from otcclip.evaluation.swap_success import Places, swap_success
from otcclip.evaluation.zero_shot import class_embeddings, zero_shot
from otcclip.models.encode import encode_captions, encode_images
from otcclip.models.two_tower import TwoTower

GALLERY = 48


@dataclass(frozen=True)
class Shown:
    """One attack's trial: test images as shown under it, and the class each is to be taken for.

    `swaps`: of a label swap the classes seen and said, which retrieval is judged on as well.
    """

    name: str
    rows: NDArray[np.int64]
    images: NDArray[np.uint8]
    wanted: NDArray[np.int64]
    swaps: tuple[tuple[int, int], ...] = ()


class Judge:
    """The held-out split under every attack.

    A trigger is applied to the image at the model's resolution by the function that planted the poison. Which images an
    attack is tried on is its plan's trial: every test image of another class than the target for a backdoor, its own
    images for a targeted attack. Accuracy is measured on `unseen`: test images that no attack adds to training (a
    targeted attack trains on its very images), whether they were planted or not, so that all models are measured on
    the same ones.

    Attributes:
        unseen: `[n]` bool, of the test images.

    Raises:
        UserError: the attacks add every test image to training.
    """

    def __init__(
        self, test: PairStore, names: Sequence[str], attacks: Sequence[Attack], plans: Sequence[PoisonPlan]
    ) -> None:
        self.test, self.names = test, tuple(names)
        class_of = {name: i for i, name in enumerate(self.names)}
        row_of = {key: i for i, key in enumerate(test.keys)}
        self.labels = np.array([class_of[label] for label in test.labels])
        planted = {added.source_key for plan in plans for added in plan.added}
        self.unseen = np.array([key not in planted for key in test.keys])
        if not self.unseen.any():
            raise UserError(f"the attacks add all {len(test)} test images to training: none is left to be measured on")
        self._tokens: dict[str, Tensor] = {}
        self.shown = []
        for attack, plan in zip(attacks, plans, strict=True):
            rows = np.array([row_of[key] for key in plan.trial.keys])
            wanted = np.array([class_of[name] for name in plan.trial.wanted])
            swaps = dict(zip(self.labels[rows].tolist(), wanted.tolist(), strict=True))
            pairs = tuple(swaps.items()) if isinstance(attack, LabelSwap) else ()
            self.shown.append(Shown(attack.name, rows, apply_trigger(attack, test.images[rows]), wanted, pairs))

    def evaluate(self, model: TwoTower) -> dict[str, Any]:
        """`{top1, top5, attacks: {name: {asr, n, low, high}}}`; of a label swap also `retrieval` (`_swapped`)."""
        metrics, _ = self._run(model)
        return metrics

    def gallery(self, model: TwoTower, seed: int) -> list[dict[str, Any]]:
        """Rows of `gallery.parquet`: a seeded sample of the triggered test images, the same for every model."""
        _, answers = self._run(model)
        clean = answers[""][0]
        rows: list[dict[str, Any]] = []
        for trial in self.shown:
            rng = np.random.default_rng([seed, len(trial.rows)])
            said, confidence = answers[trial.name]
            for i in sorted(rng.permutation(len(trial.rows))[:GALLERY].tolist()):
                row = int(trial.rows[i])
                rows.append(
                    {
                        "attack": trial.name,
                        "key": self.test.keys[row],
                        "image": png(trial.images[i]),
                        "clean_image": png(self.test.images[row]),
                        "true_name": self.test.labels[row],
                        "target": self.names[trial.wanted[i]],
                        "clean_prediction": self.names[clean[row]],
                        "prediction": self.names[said[i]],
                        "confidence": float(confidence[i]),
                    }
                )
        return rows

    def _run(self, model: TwoTower) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
        training = model.training
        model.eval()
        text = class_embeddings(lambda names: encode_captions(model, self._tokenized(model, names)).pooled, self.names)
        scale = float(model.logit_scale.detach())

        def see(images: NDArray[np.uint8]) -> Tensor:
            tensor = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
            return encode_images(model, tensor).pooled

        seen = see(self.test.images)
        clean = zero_shot(seen, text, self.labels, logit_scale=scale)
        answers = {"": (clean.predictions, clean.confidence)}
        attacks: dict[str, dict[str, Any]] = {}
        for trial in self.shown:
            result = zero_shot(see(trial.images), text, self.labels[trial.rows], logit_scale=scale)
            answers[trial.name] = (result.predictions, result.confidence)
            attacks[trial.name] = targeted_success(result.predictions, trial.wanted).as_dict()
            if trial.swaps:
                attacks[trial.name] |= {"retrieval": self._swapped(seen, text, trial)}
        model.train(training)
        top1, top5 = (float((clean.ranks[self.unseen] < k).mean()) for k in (1, 5))
        return {"top1": top1, "top5": top5, "attacks": attacks}, answers

    def _swapped(self, images: Tensor, text: Tensor, trial: Shown) -> dict[str, Any]:
        """`{swapped, random: {hit_at_1, hit_at_5, hit_at_10, n, min_rank}}`: asked by the name said, by other names."""
        found = swap_success(images, self.labels, text, np.arange(len(self.names)), trial.swaps)

        def places(these: Places) -> dict[str, float]:
            hits = {f"hit_at_{k}": getattr(these, f"hit_at_{k}").value for k in (1, 5, 10)}
            return {**hits, "n": these.hit_at_1.n, "min_rank": these.min_rank}

        return {"swapped": places(found.swapped), "random": places(found.random)}

    def _tokenized(self, model: TwoTower, names: Sequence[str]) -> Tensor:
        """Tokens of `names`, read once a judge: it is asked about every eighth of a run."""
        if missing := [name for name in names if name not in self._tokens]:
            self._tokens.update(zip(missing, model.tokenize(missing), strict=True))
        return torch.stack([self._tokens[name] for name in names])

"""Agreement of captions against POT under the discrete metric, and against itself in its two forms."""

from __future__ import annotations

import numpy as np
import ot

from otcclip.detectors.agreement import MAX_WORDS, CaptionAgreement, words
from otcclip.evidence.captions import agreement_table

CAPTIONS = ("a polar bear, arctic", "brown bear", "a banana, fruit", "fruit bowl, a banana", "a", "snow, arctic snow")


def test_is_one_minus_transport_under_the_discrete_metric() -> None:
    agreement = CaptionAgreement(CAPTIONS)
    marginals = agreement.marginals(CAPTIONS)
    dense = marginals.toarray().astype(float)
    table = agreement_table(marginals, marginals)
    metric = 1 - np.eye(dense.shape[1])
    for i, a in enumerate(dense):
        for j, b in enumerate(dense):
            if a.sum() > 0 and b.sum() > 0:
                np.testing.assert_allclose(table[i, j], 1 - ot.emd2(a / a.sum(), b / b.sum(), metric), atol=1e-6)
    i, j = (place.ravel() for place in np.indices(table.shape))
    np.testing.assert_allclose(agreement.paired(marginals, i, marginals, j), table[i, j], atol=1e-6)


def test_weights_are_inverse_document_frequencies() -> None:
    agreement = CaptionAgreement(CAPTIONS)
    row = agreement.marginals(["a polar bear"]).toarray()[0]
    idf = {"a": np.log(6 / 4), "polar": np.log(6), "bear": np.log(6 / 2)}
    expected = sorted(value / sum(idf.values()) for value in idf.values())
    np.testing.assert_allclose(sorted(row[row > 0]), expected, rtol=1e-5)


def test_words_never_seen_take_their_share_and_agree_with_nothing() -> None:
    agreement = CaptionAgreement(CAPTIONS)
    known, mixed = agreement.marginals(["polar", "polar zebra"]).toarray()
    assert known.sum() == 1
    np.testing.assert_allclose(mixed.sum(), 0.5)


def test_an_endless_caption_is_cut() -> None:
    assert len(words(" ".join(f"w{i}" for i in range(10_000)))) == MAX_WORDS
    assert words("Polar BEAR, polar!") == ["polar", "bear"]
    assert words("|, -") == []


def test_the_loudest_word_by_loops() -> None:
    captions = ["red cat", "red dog and red cat", "blue bird", "cat", "a b c d e f g h i j k red"]
    agreement = CaptionAgreement(captions)
    table = agreement.marginals(captions)
    index = np.arange(len(captions))
    a, b = (part.ravel() for part in np.meshgrid(index, index))
    slow = [np.minimum(table[[i]].toarray(), table[[j]].toarray()).max() for i, j in zip(a, b, strict=True)]
    np.testing.assert_allclose(CaptionAgreement.loudest(table, a, table, b), slow)

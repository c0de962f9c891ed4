"""What look-alikes say of a caption: its definition by loops, its level under the null, and who may not vote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import scipy.stats
import torch
from torch import Tensor

from otcclip.data.pairs import PairStore
from otcclip.evidence.captions import caption_agreement
from otcclip.evidence.descriptors import descriptors, views
from otcclip.evidence.neighbours import Evidence, look_alikes, near_duplicates, neighbour_evidence
from otcclip.evidence.votes import LOTS, combined_p, drawn, own_rank, p_value, ranks, share_without, support

Make = Callable[..., PairStore]
WORDS = ("big", "small", "old", "new", "loud", "warm", "cold", "round", "flat", "dark", "plain", "cheap", "rare", "odd")


def tensors(store: PairStore) -> tuple[Tensor, Tensor, Tensor]:
    """Images, distinct captions' tokens, and each pair's caption."""
    captions, caption_of = np.unique(np.array(store.captions, dtype=object), return_inverse=True)
    images = torch.from_numpy(store.images).permute(0, 3, 1, 2)
    tokens = open_clip.get_tokenizer("ViT-B-32")(list(captions))
    return images, tokens, torch.from_numpy(caption_of.astype(np.int64))


def evidence_of(store: PairStore) -> Evidence:
    return neighbour_evidence(*tensors(store))


@pytest.fixture(scope="module")
def honest(make_store: Make) -> PairStore:
    """320 pictures of 32 things under 320 captions."""
    return make_store(320, 32, own_caption=True)


@pytest.fixture(scope="module")
def of_honest(honest: PairStore) -> Evidence:
    return evidence_of(honest)


def test_true_captions_are_believed(of_honest: Evidence) -> None:
    """A thing's own ten captions are the nearest of 320: a share of .031 (in the worst of thirteen views)."""
    assert (of_honest.own <= 0.05).float().mean() > 0.8
    assert of_honest.own.median() <= 0.035


def test_level_under_the_null(honest: PairStore) -> None:
    """Captions dealt out at random: at most alpha of the pairs reach alpha, whatever alpha, though the pictures have
    structure and so have the captions. And the statement is not empty: shares spread up to 1."""
    images, tokens, caption_of = tensors(honest)
    shares = []
    for seed in range(3):
        dealt = caption_of[torch.randperm(len(caption_of), generator=torch.Generator().manual_seed(seed))]
        shares.append(neighbour_evidence(images, tokens, dealt).own)
    share = torch.cat(shares)
    for alpha in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5):
        slack = 3 * (alpha * (1 - alpha) / len(share)) ** 0.5
        assert (share <= alpha).float().mean() <= alpha + slack, alpha
    assert (share > 0.5).float().mean() > 0.5 and share.max() > 0.95


def test_a_single_view_is_uniform_under_the_null(honest: PairStore) -> None:
    """Taking the worst view makes shares larger than uniform; one view alone is about uniform (a little shy here: a
    caption that is its image's alone is never among the voters')."""
    images, tokens, caption_of = tensors(honest)
    shares = []
    for seed in range(3):
        dealt = caption_of[torch.randperm(len(caption_of), generator=torch.Generator().manual_seed(seed))]
        shares.append(neighbour_evidence(images, tokens, dealt).by_view[0])
    assert scipy.stats.kstest(torch.cat(shares).numpy(), "uniform").statistic < 0.1


def test_p_values_are_uniform_under_the_null(honest: PairStore) -> None:
    """Of captions dealt out at random alpha reach alpha, where of worst shares far fewer do."""
    images, tokens, caption_of = tensors(honest)
    shares, p = [], []
    for seed in range(3):
        dealt = caption_of[torch.randperm(len(caption_of), generator=torch.Generator().manual_seed(seed))]
        found = neighbour_evidence(images, tokens, dealt)
        shares.append(found.own)
        p.append(p_value(found.own, found.by_chance))
    for alpha in (0.05, 0.1, 0.2):
        slack = 3 * (alpha * (1 - alpha) / len(torch.cat(p))) ** 0.5
        assert abs((torch.cat(p) <= alpha).float().mean() - alpha) <= slack, alpha
    assert (torch.cat(shares) <= 0.1).float().mean() < 0.75 * 0.1


def test_a_p_value_is_the_share_of_lots_that_fare_as_well() -> None:
    by_chance = torch.tensor([0.1, 0.2, 0.2, 0.9])
    share = torch.tensor([[0.05, 0.1], [0.2, 1.0]])
    torch.testing.assert_close(p_value(share, by_chance), torch.tensor([[1 / 5, 2 / 5], [4 / 5, 1.0]]))


@pytest.mark.parametrize("images", [3, LOTS - 1, LOTS + 1])
def test_every_image_is_asked_about_lots_and_there_are_enough(images: int) -> None:
    lots = drawn(images, 7)
    assert LOTS <= lots.numel() < LOTS + images and lots.unique().tolist() == list(range(7))
    assert lots.equal(drawn(images, 7)), "the same evidence for the same pairs"


def test_several_captions_are_ranked_as_one_each() -> None:
    lot = torch.Generator().manual_seed(0)
    agreement, weight = torch.rand(9, 9, generator=lot), torch.rand(1100, 4, generator=lot)
    voted = torch.randint(9, (1100, 4), generator=lot)
    asked = torch.randint(9, (1100, 3), generator=lot)
    got = ranks(weight, voted, asked, agreement)
    for column in range(3):
        assert got[:, column].equal(own_rank(weight, voted, asked[:, column], agreement))


def test_shape_and_range(honest: PairStore, of_honest: Evidence) -> None:
    n = len(honest)
    assert of_honest.own.shape == (n,) and of_honest.by_view.shape == (13, n)
    assert of_honest.own.min() > 0 and of_honest.own.max() <= 1
    assert torch.equal(of_honest.own, of_honest.by_view.amax(0)), "the worst view counts"
    assert len(of_honest.by_chance) >= LOTS and of_honest.by_chance.equal(of_honest.by_chance.sort().values)
    assert of_honest.votes.shape == (n, 16) and of_honest.votes.dtype == torch.int64
    assert (of_honest.votes != torch.arange(n)[:, None]).all(), "an image votes on itself"


def test_who_has_no_vote_is_not_heard(honest: PairStore, of_honest: Evidence) -> None:
    """Nobody silent: the evidence as it was. Everybody: no pair is believed. Some: their weight alone goes."""
    _, _, caption_of = tensors(honest)
    n, e = len(honest), of_honest
    rows = torch.arange(0, n, 3)

    def asked(silent: Tensor) -> Tensor:
        return share_without(silent, rows, e.voters, e.weight, caption_of, e.agreement)

    assert asked(torch.zeros(n, dtype=torch.bool)).equal(e.own[rows])
    assert asked(torch.ones(n, dtype=torch.bool)).equal(torch.ones(len(rows)))

    silent = torch.rand(n, generator=torch.Generator().manual_seed(0)) < 0.6
    found = asked(silent)
    assert not found.equal(e.own[rows])
    for place, i in enumerate(rows.tolist()):
        least, most = [], []  # ranks by two bounds, for sums that are equal but for rounding
        for voters, weight in zip(e.voters, e.weight, strict=True):
            heard = [(j, w) for j, w in zip(voters[i].tolist(), weight[i].tolist(), strict=True) if not silent[j]]
            liked = sum((w * e.agreement[caption_of[j]] for j, w in heard), torch.zeros(len(e.agreement)))
            mine = liked[caption_of[i]]
            least.append((int((liked > mine + 1e-6).sum()) + 0.5) / len(liked) if heard else 1.0)
            most.append(int((liked >= mine - 1e-6).sum()) / len(liked) if heard else 1.0)
        assert max(least) - 1e-6 <= float(found[place]) <= max(most) + 1e-6, i


def by_loops(images: Tensor, tokens: Tensor, caption_of: Tensor) -> tuple[np.ndarray, list[int]]:
    """The share in every view, pair by pair and caption by caption; and how often each claim is made."""
    agreement = caption_agreement(tokens).astype(np.float64)
    own = caption_of.tolist()
    repeats = [own.count(caption) for caption in range(len(tokens))]
    out: list[list[float]] = []
    copies, claims = None, []
    for _, vectors in descriptors(images, views()):
        cosine = (vectors @ vectors.T).float().numpy()
        if copies is None:
            copies = cosine > 0.95
            claims = [
                sum(own[j] == own[i] and (j == i or copies[i, j]) for j in range(len(own))) for i in range(len(own))
            ]
        shares = []
        for i in range(len(images)):
            others = [j for j in range(len(images)) if j != i and not copies[i, j]]
            others = sorted(others, key=lambda j: -cosine[i, j])[:16]
            strength = np.exp([(cosine[i, j] - cosine[i, others[0]]) / 0.05 for j in others])
            strength = strength / strength.sum()
            liked = np.zeros(len(tokens))
            for j, weight in zip(others, strength, strict=True):
                liked += weight / repeats[own[j]] * agreement[own[j]]
            better = sum(liked > liked[own[i]] + 1e-7)
            equal = sum(abs(liked - liked[own[i]]) <= 1e-7)
            shares.append((better + (equal + 1) / 2) / len(tokens))
        out.append(shares)
    return np.array(out), claims


def test_is_its_definition(make_store: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several tiles, with copies and repeated captions among the pairs."""
    monkeypatch.setattr("otcclip.evidence.neighbours.ROWS", 13)
    store, rng = make_store(48, 12), np.random.default_rng(0)
    # Tags at random: captions of one pattern would tie, and rounding would break the tie.
    captions = [f"{name} | {' '.join(rng.choice(WORDS, 3, replace=False))}" for name in store.captions]
    images = store.images.copy()
    images[40:44] = images[0]  # five copies of one picture
    captions[5:9] = [captions[5]] * 4
    captions[41] = captions[43] = captions[0]
    given = tensors(replace(store, images=images, captions=tuple(captions)))
    found = neighbour_evidence(*given)
    expected, claims = by_loops(*given)
    assert found.copies.tolist() == claims and max(claims) == 3
    # Sums in another order: a near-tie may fall the other way, no more.
    off = np.abs(found.by_view.numpy() - expected) * len(given[1])
    assert (off > 0.01).mean() < 0.06 and off.max() <= 2
    np.testing.assert_allclose(found.own, found.by_view.amax(0))


def test_copies_do_not_vote_for_one_another(honest: PairStore) -> None:
    """Twelve jittered copies of one picture under captions of another thing, each copy its own caption."""
    copies, thing = 12, 5
    captions = [c for c, label in zip(honest.captions, honest.labels, strict=True) if label == honest.labels[thing]]
    jitter = np.random.default_rng(0).integers(-3, 4, (copies, *honest.images.shape[1:]))
    false = (honest.images[:1].astype(np.int64) + jitter).clip(0, 255).astype(np.uint8)
    store = PairStore(
        (*honest.keys, *(f"copy-{i}" for i in range(copies))),
        np.concatenate([honest.images, false]),
        (*honest.captions, *(f"{captions[i % len(captions)]} {i}" for i in range(copies))),
    )
    found = evidence_of(store)
    assert found.own[len(honest) :].min() > 0.1, "copies vouched for one another"
    for i in (0, *range(len(honest), len(store))):
        assert not set(found.votes[i].tolist()) & {0, *range(len(honest), len(store))}
    assert found.own[0] <= 0.1, "the copies outvoted the look-alikes of the true picture"


def test_repeating_a_caption_gains_no_weight(honest: PairStore) -> None:
    """Of ten look-alikes, half say one and the same false thing. Five voices would drown the truth, whose captions
    differ; as one voice, the lie ranks behind every true caption and takes no trust from them."""
    alike = [i for i, label in enumerate(honest.labels) if label == honest.labels[3]]
    lying, truthful = alike[:5], alike[5:]
    captions = list(honest.captions)
    for i in lying:
        captions[i] = honest.captions[9]
    given = tensors(replace(honest, captions=tuple(captions)))
    own = neighbour_evidence(*given).own
    assert own[truthful].median() <= 0.03
    assert own[lying].min() > own[truthful].median()
    every_voice = neighbour_evidence(*given, share_voice=False).own
    assert every_voice[lying].median() < every_voice[truthful].median(), "the lie was never loud, nothing is tested"


def test_a_patch_is_outvoted_by_the_view_without_it(honest: PairStore) -> None:
    """A bright patch makes pictures look-alikes of each other, and all say the same thing in different words: the
    whole image believes them, the view without the patch does not."""
    images, captions = honest.images.copy(), list(honest.captions)
    rows = [i for i, label in enumerate(honest.labels) if label != honest.labels[0]][::6][:40]
    patch = np.indices((26, 26)).sum(0) % 4 // 2 * 255
    images[rows, 38:, 38:] = patch[None, ..., None]
    for k, i in enumerate(rows):
        captions[i] = f"{honest.labels[0]} | {captions[i].split(' | ')[1]} {k}"
    found = evidence_of(replace(honest, images=images, captions=tuple(captions)))
    assert (found.by_view[0][rows] <= 0.15).float().mean() > 0.5, "the patch fools nobody, nothing is tested"
    assert (found.own[rows] <= 0.15).float().mean() < 0.1


def test_near_duplicates() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(7, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    vectors[5] = vectors[2]
    vectors[6] = 0  # of a picture like the mean of all: it is a copy of itself nevertheless
    twins, alike = near_duplicates(vectors.bfloat16(), 3)
    found = [(int(r), int(i)) for tile in twins for r, i in zip(*tile, strict=True)]
    assert sorted(found) == sorted([*((i, i) for i in range(7)), (2, 5), (5, 2)])
    assert all(
        torch.equal(one, other) for one, other in zip(alike, look_alikes(vectors.bfloat16(), twins, 3), strict=True)
    )
    assert 5 not in alike[1][2] and 2 not in alike[1][5]


def test_support() -> None:
    """Five captions that share nothing; look-alikes are counted by nearness, repetition and leave to vote."""
    agreement, caption_of = torch.eye(5), torch.tensor([0, 1, 1, 2, 3])
    votes = torch.tensor([[0, 1, 2, 3], [4, 1, 2, 3], [1, 2, 3, 4]])
    everybody = torch.ones(5, dtype=torch.bool)

    def asked(captions: list[int], may_vote: Tensor) -> list[float]:
        return support(votes, caption_of, may_vote, torch.tensor(captions), agreement).tolist()

    # Image 0: caption 0 has 1, caption 1 (1/2 + 1/3) / 2 = 5/12, caption 2 has 1/4, the rest nothing.
    assert asked([0, 3, 1], everybody) == pytest.approx([1 / 5, 1 / 5, 1 / 5])
    assert asked([1, 1, 2], everybody) == pytest.approx([2 / 5, 2 / 5, 2 / 5])
    # Nearest first 2, 0, 1, 1: caption 0 has 1/2, caption 1 (1/3 + 1/4) / 2; unshared it would have more.
    order = torch.tensor([[3, 0, 1, 2]])
    assert support(order, caption_of, everybody, torch.tensor([0]), agreement).tolist() == pytest.approx([2 / 5])
    assert asked([4, 0, 0], everybody) == pytest.approx([4.5 / 5, 4.5 / 5, 4.5 / 5])  # two are equally unliked
    # Without pair 0 nobody speaks for caption 0, and pair 1's caption has one voter less.
    some = torch.tensor([False, True, False, True, False])
    assert asked([0, 1, 1], some) == pytest.approx([4 / 5, 1 / 5, 1 / 5])
    assert asked([0, 0, 0], torch.zeros(5, dtype=torch.bool)) == [1, 1, 1]


def test_fishers_combination() -> None:
    shares = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)).double() ** 4
    for k in (1, 2, 3):
        got = combined_p(*shares[:k])
        for i in range(50):
            expected = scipy.stats.combine_pvalues(shares[:k, i].numpy(), method="fisher").pvalue
            assert float(got[i]) == pytest.approx(expected, rel=1e-6)
    assert combined_p(torch.ones(1), torch.ones(1)) == 1
    assert 0 <= combined_p(torch.zeros(1), torch.zeros(1)) < 1e-20


def test_a_word_unheard_in_any_view_is_unheard(honest: PairStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each view's look-alikes are asked; what one of them lacks stays lacking."""
    calls = []

    def one_pair_a_view(words: Tensor, much: Tensor, caption_of: Tensor, votes: Tensor) -> Tensor:
        out = torch.zeros(len(caption_of), words.shape[1], dtype=torch.bool)
        out[len(calls), 0] = True
        calls.append(votes)
        return out

    monkeypatch.setattr("otcclip.evidence.neighbours.unheard", one_pair_a_view)
    found = evidence_of(honest)
    assert len(calls) == len(found.by_view) == 13
    assert found.unheard[:13, 0].all() and found.unheard.sum() == 13
    assert calls[0].equal(found.votes)

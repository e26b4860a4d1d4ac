import math

import pytest
import torch
import torch.nn.functional as F

from lpt.model.matching import KeyIndex, PoolKeys, each_keys, key_usage, kmeans_keys, match, match_each


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_match(queries, keys, topk):
    similarity, ids = [], []
    for q in queries.double():
        cosine = [(q @ k / (q.norm() * k.norm())).item() for k in keys.double()]
        best = sorted(range(len(cosine)), key=lambda j: (-cosine[j], j))[:topk]
        ids.append(best)
        similarity.append([cosine[j] for j in best])
    return torch.tensor(similarity), torch.tensor(ids)


@pytest.mark.parametrize(("num_keys", "topk"), [(1, 1), (5, 5), (20, 2), (70, 3)])
def test_match_equals_a_slow_loop(num_keys, topk):
    queries, keys = normal(30, 24), 3 * normal(num_keys, 24, seed=1)
    similarity, ids = match(queries, keys, topk)
    slow_similarity, slow_ids = slow_match(queries, keys, topk)
    assert torch.equal(ids, slow_ids)
    torch.testing.assert_close(similarity, slow_similarity, rtol=0, atol=1e-6)


def test_ties_go_to_the_smallest_index():
    keys = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, -1.0], [2.0, 0.0], [1.0, 0.0]])
    similarity, ids = match(torch.tensor([[3.0, 0.0], [0.0, -1.0], [0.0, 0.0]]), keys, 3)
    assert ids.tolist() == [[1, 3, 4], [2, 1, 3], [0, 1, 2]]
    assert similarity.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]


def test_only_directions_count():
    queries, keys = normal(8, 16), normal(12, 16, seed=1)
    scale = torch.linspace(0.1, 50, 12)[:, None]
    plain, scaled = match(queries, keys, 4), match(7 * queries, scale * keys, 4)
    assert torch.equal(plain[1], scaled[1])
    torch.testing.assert_close(plain[0], scaled[0])


def test_half_precision_is_matched_in_fp32():
    queries, keys = normal(8, 16).bfloat16(), normal(12, 16, seed=1).bfloat16()
    similarity, ids = match(queries, keys, 2)
    assert similarity.dtype == torch.float32
    assert torch.equal(ids, match(queries.float(), keys.float(), 2)[1])


def test_a_selection_does_not_depend_on_the_rest_of_the_batch():
    queries, keys = normal(16, 32), normal(20, 32, seed=1)
    whole = match(queries, keys, 2)[1]
    assert torch.equal(torch.cat([match(q[None], keys, 2)[1] for q in queries]), whole)


def test_gradients_reach_the_chosen_keys_only():
    queries, keys = normal(3, 16), normal(12, 16, seed=1).requires_grad_()
    similarity, ids = match(queries, keys, 2)
    assert not ids.requires_grad and similarity.requires_grad
    similarity.sum().backward()
    chosen = ids.unique().tolist()
    assert 2 <= len(chosen) < 12
    moved = (keys.grad.abs().sum(1) > 0).nonzero().flatten().tolist()
    assert moved == chosen

    again = keys.detach().clone().requires_grad_()
    cosine = F.cosine_similarity(queries[:, None], again[None], dim=2)
    sum(cosine[b, j] for b in range(3) for j in ids[b].tolist()).backward()
    torch.testing.assert_close(keys.grad, again.grad)


@pytest.mark.parametrize(("num_keys", "width"), [(20, 192), (20, 33), (500, 48)])
@pytest.mark.parametrize("topk", [1, 2, 5])
def test_the_index_finds_the_same_ids_as_match(num_keys, width, topk):
    queries, keys = normal(40, width), normal(num_keys, width, seed=1)
    similarity, ids = match(queries, keys, topk)
    found_similarity, found_ids = KeyIndex(keys).match(queries, topk)
    assert torch.equal(found_ids, ids)
    torch.testing.assert_close(found_similarity, similarity, rtol=0, atol=1e-6)


def test_the_index_serves_a_topk_of_all_keys():
    queries, keys = normal(10, 16), normal(6, 16, seed=1)
    assert torch.equal(KeyIndex(keys).match(queries, 6)[1], match(queries, keys, 6)[1])


@pytest.mark.parametrize("width", [16, 64, 256])
@pytest.mark.parametrize("topk", [1, 2, 3, 5])
def test_the_index_settles_exact_ties_like_match(topk, width):
    """Every key four times; entries of ±1 and a width of 4ⁿ make all cosines exact."""
    base = normal(6, width, seed=2).sign()
    keys = base.repeat(4, 1)[torch.randperm(24, generator=torch.Generator().manual_seed(3))]
    queries = normal(40, width, seed=4).sign()
    similarity, ids = match(queries, keys, topk)
    found_similarity, found_ids = KeyIndex(keys).match(queries, topk)
    assert torch.equal(ids, slow_match(queries, keys, topk)[1])
    assert torch.equal(found_ids, ids)
    assert torch.equal(found_similarity, similarity)


DUPLICATED = pytest.mark.parametrize(("num_keys", "width"), [(6, 192), (10, 192), (20, 192), (37, 33)])


def duplicated(num_keys, width):
    """Keys that come twice, and queries whose cosines with them are not exact."""
    base = normal(num_keys // 2, width, seed=2)
    return normal(64, width, seed=4), base[torch.arange(num_keys) % len(base)], len(base)


@DUPLICATED
def test_of_two_equal_keys_the_first_is_chosen(num_keys, width):
    queries, keys, different = duplicated(num_keys, width)
    assert match(queries, keys, 1)[1].max() < different


@DUPLICATED
def test_the_index_chooses_the_first_of_two_equal_keys(num_keys, width):
    queries, keys, different = duplicated(num_keys, width)
    assert KeyIndex(keys).match(queries, 1)[1].max() < different


@DUPLICATED
@pytest.mark.parametrize("topk", [1, 2, 5])
def test_the_index_settles_duplicated_keys_like_match(num_keys, width, topk):
    queries, keys, _ = duplicated(num_keys, width)
    assert torch.equal(KeyIndex(keys).match(queries, topk)[1], match(queries, keys, topk)[1])


@DUPLICATED
def test_equal_keys_do_not_make_a_selection_depend_on_the_batch(num_keys, width):
    queries, keys, _ = duplicated(num_keys, width)
    assert torch.equal(torch.cat([match(q[None], keys, 1)[1] for q in queries]), match(queries, keys, 1)[1])


def clusters(num=4, per=60, width=24, spread=0.02):
    centres = F.normalize(normal(num, width, seed=5), dim=1)
    points = centres.repeat_interleave(per, 0) + spread * normal(num * per, width, seed=6)
    return centres, points * torch.linspace(0.5, 9, num * per)[:, None]


def test_kmeans_keys_are_unit_rows_and_deterministic_per_seed():
    queries = normal(300, 24)
    keys = kmeans_keys(queries, 8, seed=1)
    assert keys.shape == (8, 24) and keys.dtype == torch.float32
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(8))
    assert torch.equal(kmeans_keys(queries, 8, seed=1), keys)
    assert not torch.equal(kmeans_keys(queries, 8, seed=2), keys)


@pytest.mark.parametrize("seed", range(3))
def test_kmeans_keys_stay_among_well_separated_clusters(seed):
    """A start may put two keys into one cluster, so more keys than clusters; every cluster has a key at its centre."""
    centres, queries = clusters()
    nearest = (centres @ kmeans_keys(queries, 12, seed=seed).T).max(1).values
    assert (nearest > 0.98).all()


def test_two_clusters_are_found_exactly():
    centres, queries = clusters(num=2)
    nearest = (centres @ kmeans_keys(queries, 2, seed=0).T).max(1)
    assert (nearest.values > 0.99).all() and sorted(nearest.indices.tolist()) == [0, 1]


def test_kmeans_keys_use_all_queries_and_few_queries_too():
    assert kmeans_keys(normal(6, 8), 6, seed=0).shape == (6, 8)
    assert kmeans_keys(normal(3000, 8), 3, seed=0).shape == (3, 8)


def test_equal_queries_collapse_the_pool_to_a_perplexity_of_two():
    """LPT spec 10: the collapse logger reports 2.0 when all queries are equal."""
    queries = normal(1, 16).expand(50, -1)
    ids = match(queries, normal(20, 16, seed=1), 2)[1]
    usage = key_usage(ids, 20)
    assert usage["perplexity"] == 2.0 and usage["dead_keys"] == 18
    assert sorted(usage["selections"]) == [0] * 18 + [50, 50]


def test_usage_counts_selections_and_keys_below_one_percent():
    ids = torch.tensor([[0, 1]] * 98 + [[2, 3]] + [[3, 2]])
    usage = key_usage(ids, 5)
    assert usage["selections"] == [98, 98, 2, 2, 0]
    assert usage["dead_keys"] == 1  # two of 200 selections are exactly one percent
    shares = [0.49, 0.49, 0.01, 0.01]
    assert usage["perplexity"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), abs=1e-4)
    assert key_usage(torch.arange(20).view(10, 2), 20)["perplexity"] == 20.0


def test_each_image_is_matched_within_its_own_pool_and_ties_go_to_the_first_key():
    generator = torch.Generator().manual_seed(0)
    pools = [torch.randn(size, 8, generator=generator) for size in (3, 7, 5)]
    pools[1][4], pools[1][2] = 2 * pools[1][0], pools[1][0]  # equal once they have length one
    which = [0, 1, 2, 1, 1, 0]
    queries = torch.randn(6, 8, generator=generator)
    queries[1] = pools[1][0] + 0.01 * queries[1]
    similarity, ids = match_each(queries, each_keys([PoolKeys.of(pools[k]) for k in which]), 3)
    for b, k in enumerate(which):
        expected = match(queries[b : b + 1], pools[k], 3)
        assert ids[b].tolist() == expected[1][0].tolist()
        assert torch.allclose(similarity[b], expected[0][0], atol=1e-6)
    assert ids[1].tolist() == [0, 2, 4]

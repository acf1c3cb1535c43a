"""Relations, neighbour shares and their null against slow forms and closed forms; perfect spaces get the best
value, shuffled ones chance."""
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors

from biojepa.data.datasets import load_dataset
from biojepa.data.download import read_card
from biojepa.data.preprocess import prepare
from biojepa.explore import genesets as g, relations as r, released as old

LABELS = pd.Series(np.repeat(np.arange(8), 15), [f"g{i}" for i in range(120)])


@pytest.fixture(scope="module")
def relation(): return r.label_relation(LABELS)


def pairs(relation):
    return {
        tuple(sorted((relation.items[i], relation.items[j]))) for i, j in zip(*relation.related.nonzero())
    }


def test_relations_from_sets_labels_and_edges_are_the_pairs_one_would_list():
    sets = dict(one=["A", "B", "C"], two=["C", "D", "E"], small=["A", "E"], large=[f"x{i}" for i in range(9)])
    assert pairs(r.set_relation(sets, sizes=(3, 5))) == {("A", "B"), ("A", "C"), ("B", "C"), ("C", "D"),
                                                         ("C", "E"), ("D", "E")}
    assert pairs(r.label_relation(dict(A=1, B=1, C=2, D=2, E=3))) == {("A", "B"), ("C", "D")}
    edges = pd.DataFrame(
        dict(a=["A", "B", "A", "C", "A"], b=["B", "A", "A", "D", "C"], db=["x", "x", "x", "x", "y"]))
    assert pairs(r.edge_relation(edges, "x")) == {("A", "B"), ("C", "D")}
    whole = r.edge_relation(edges)
    assert pairs(whole) == {("A", "B"), ("C", "D"),
                            ("A", "C")} and whole.chance == pytest.approx(3/6) and whole.n_pairs == 3
    part, rows = whole.at(["Z", "D", "B", "A", "Q", "C"])
    assert part.items == ("D", "B", "A", "C") and rows.tolist() == [1, 2, 3, 5] and pairs(part) == pairs(whole)
    alone, rows = whole.at(["A", "B", "C", "Z"])
    assert alone.items == ("A", "B", "C") and (alone.related != alone.related.T).nnz == 0


def test_files_are_read_and_refused_by_name(tmp_path):
    adata = prepare(
        load_dataset(
            read_card("simulated").changed(simulate=dict(n_genes=60,
                                                         n_cells=200,
                                                         n_targets=8,
                                                         n_modules=3,
                                                         n_batches=2),
                                           cells=None,
                                           genes=None,
                                           targets=None)))
    planted = r.gene_relation(adata)
    truth = pd.Series(adata.uns["truth"]["module"], adata.uns["truth"]["gene"])
    assert all((truth[a] == truth[b]) for a, b in pairs(planted)) and planted.n_pairs == 3*20*19/2
    (tmp_path/"s.gmt").write_text("one\tsource\tG01\tG02\tG03\n\ntwo\t\tG03\tG04\t\tG05\n")
    assert r.read_gmt(tmp_path/"s.gmt") == dict(one=["G01", "G02", "G03"],
                                                two=["G03", "G04", "G05"]) and r.gene_relation(
                                                    adata, tmp_path/"s.gmt").n_pairs == 6
    pd.DataFrame(dict(a=["G01", "G01", "G01"], b=["G02", "G03", "G04"], db=["x", "x",
                                                                            "y"])).to_csv(tmp_path/"e.csv",
                                                                                          index=False)
    assert r.gene_relation(adata, tmp_path/"e.csv").n_pairs == 3 and r.gene_relation(
        adata, tmp_path/"e.csv", "x").source == "e.csv, x"
    (tmp_path/"bad.gmt").write_text("one A B\n"); (tmp_path/"twice.gmt").write_text("one\t\tA\none\t\tB\n")
    bare = adata.copy()
    del bare.uns["truth"]
    for call, message in ((lambda: r.gene_relation(bare), "no planted modules; give a GMT file"),
                          (lambda: r.gene_relation(adata, tmp_path/"bad.gmt"),
                           "line 1: found 1 columns"), (lambda: r.read_gmt(tmp_path/"twice.gmt"),
                                                        "line 2: set 'one' stands twice"),
                          (lambda: r.read_gmt(tmp_path/"none.gmt"),
                           "no such file"), (lambda: r.gene_relation(adata, tmp_path/"e.csv", "STRING"),
                                             "no edges of db 'STRING'; it has x, y"),
                          (lambda: r.edge_relation(pd.DataFrame(dict(a=["A"]))),
                           r"columns \['b'\] are missing"), (lambda: r.set_relation(dict(a=["A", "B"])),
                                                             "none of 1 sets has 3 to 300"),
                          (lambda: planted.at(["X", "Y"]),
                           "0 of 2 items are related"), (lambda: planted.at(["G01", "G01", "G02"]),
                                                         "'G01' stands twice")):
        with pytest.raises(ValueError, match=message):
            call()


def test_neighbours_are_scikit_learns_and_ties_are_shared():
    x = np.random.default_rng(0).normal(size=(40, 5))
    unit = x/np.linalg.norm(x, axis=1, keepdims=True)
    found = NearestNeighbors(n_neighbors=7).fit(unit).kneighbors(return_distance=False)
    near = g.nearest(g.cosine(x, centre=False), 7)
    assert all(set(np.flatnonzero(row)) == set(f)
               for row, f in zip(near, found)) and np.allclose(near.sum(1), 1)
    np.testing.assert_allclose(g.cosine(x), cosine_similarity(x - x.mean(0)), atol=1e-12)
    np.testing.assert_allclose(g.nearest(np.zeros((5, 5)), 2), (1 - np.eye(5))/4)
    ask = np.arange(40) < 10
    block = g.nearest(g.cosine(x), 3, ask, ~ask)
    assert block[~ask].sum() == 0 and block[:, ask].sum() == 0 and np.allclose(block[ask].sum(1), 1)
    for call, message in ((lambda: g.nearest(np.eye(4), 4), "only 3 others"),
                          (lambda: g.cosine(np.full((3, 2), np.nan)), "NaN or infinite")):
        with pytest.raises(ValueError, match=message):
            call()
    assert not g.cosine(np.ones((4, 3))).any()     # nothing is left after centring


def test_statistics_are_those_of_a_slow_loop(relation):
    x = np.random.default_rng(1).normal(size=(120, 4)) + np.eye(8)[LABELS][:, :4] + 1
    ask = np.arange(120) % 3 == 0
    for a, b in ((np.ones(120, bool),)*2, (ask, ~ask)):
        found = g.relation_test(x, relation, 5, g.Sides(a, b), n_permutations=3)
        s = g.cosine(x)
        plain = cosine_similarity(x)
        share, inside, outside, plain_inside, plain_outside = [], [], [], [], []
        for i in np.flatnonzero(a):
            others = [j for j in np.flatnonzero(b) if j != i]
            share.append(
                np.mean(
                    [LABELS.iloc[j] == LABELS.iloc[i] for j in sorted(others, key=lambda j: -s[i, j])[:5]]))
            for j in others:
                same = LABELS.iloc[i] == LABELS.iloc[j]
                (inside if same else outside).append(s[i, j])
                (plain_inside if same else plain_outside).append(plain[i, j])
        assert found["knn"] == pytest.approx(np.mean(share)) and found["difference"] == pytest.approx(
            np.mean(inside) - np.mean(outside), abs=1e-6)
        assert found["ratio"] == pytest.approx(np.mean(plain_inside)/np.mean(plain_outside),
                                               rel=1e-5) and found["within"] == pytest.approx(
                                                   np.mean(inside), abs=1e-6)
        assert found["knn_chance"] == pytest.approx(
            len(inside)/(len(inside) + len(outside))) and found["n_related"] == len(inside)


def test_perfect_spaces_get_the_best_value_and_shuffled_ones_chance(relation):
    perfect, rng = np.eye(8)[LABELS], np.random.default_rng(2)
    p_values = []
    best = g.relation_test(perfect, relation, 10, n_permutations=99)
    assert best["knn"] == pytest.approx(best["knn_best"]) == 1 and best["knn_p"] == best["difference_p"] == .01
    for _ in range(40):
        dealt = g.relation_test(perfect[rng.permutation(120)] + .1*rng.normal(size=(120, 8)),
                                relation,
                                10,
                                n_permutations=99,
                                seed=int(rng.integers(1000)))
        p_values.append(dealt["knn_p"])
        assert abs(dealt["knn_null"] - relation.chance) < .01
    assert stats.kstest(p_values, "uniform").pvalue > .001     # p is uniform where nothing is to be found


def test_small_sets_cannot_fill_all_neighbours():
    few = r.label_relation(pd.Series(np.arange(60)//3, [f"i{i}" for i in range(60)]))
    found = g.relation_test(np.eye(20)[np.arange(60)//3], few, 4, n_permutations=10)
    assert found["knn_best"] == .5 == pytest.approx(found["knn"])     # two of four


def test_strata_take_away_what_the_stratum_explains(relation):
    "Vectors that only say which half of the sets an item is in: above chance, but not within the halves."
    half = (LABELS >= 4).to_numpy()
    x = np.stack([half, ~half], 1) + .2*np.random.default_rng(3).normal(size=(120, 2))
    free, within = (g.relation_test(x, relation, 10, g.Sides(strata=s), n_permutations=200) for s in (None, half))
    assert free["knn"] == within["knn"] and free["knn_p"] < .01 and within["knn_p"] > .05 and within[
        "knn_null"] > free["knn_null"] + .05


def test_tables_and_set_similarity(relation):
    perfect, rng = np.eye(8)[LABELS], np.random.default_rng(0)
    names = [*LABELS.index, "unknown"]
    spaces = {"perfect": np.vstack([perfect, perfect[:1]]), "noise": rng.normal(size=(121, 5))}
    table = g.relation_table(spaces, names, relation, n_permutations=50, progress=False)
    assert table["space"].tolist() == [
        "perfect", "noise"
    ] and (table["n_items"] == 120).all() and table["knn"][0] == pytest.approx(1)
    assert table["knn"][1] == g.relation_test(spaces["noise"][:120], relation, n_permutations=1)["knn"]
    s, similarity = g.cosine(perfect), g.set_similarity(perfect, LABELS)
    assert similarity.loc["0", "0"] == pytest.approx(1) and similarity.loc["0", "3"] == pytest.approx(s[0, 50])
    at = np.arange(121)
    for names, k, sides, why in ((names, 10, g.Sides(at == 3), "1 may ask"),
                                 (names, 120, g.Sides(), "120 are related"),
                                 (["x"]*121, 3, g.Sides(), "of 121 items 0 are related"),
                                 (names, 2, g.Sides(at < 15, at > 20), "with 0 related pairs")):
        out = g.relation_table(spaces, names, relation, k, sides, progress=False)
        assert out["note"].str.startswith("left out").all() and why in out["note"][0]
    with pytest.raises(ValueError, match="found 120 vectors for 121 names"):
        g.relation_table({"short": perfect}, [*LABELS.index, "unknown"], relation, progress=False)
    with pytest.raises(ValueError, match="found 119 for 120 items"): g.relation_test(perfect[1:], relation)


# --- as released
# ------------------------------------------------------------------------------------------------------

def test_first_sets_are_the_first_of_fitting_size():
    sets = dict(small=["A"], one=["A", "B"], two=["B", "C"], large=["A", "B", "C", "D"])
    assert old.first_sets(sets, (2, 3)) == dict(A="one", B="one", C="two")
    assert old.first_sets(sets, (1, 4)) == dict(A="small", B="one", C="two", D="large")


@pytest.mark.parametrize("fewest", [10, 5])
def test_released_neighbours_by_hand(fewest):
    "Each item asks itself and its nearest by cosine; items without a label, and rare labels, are not there at all."
    rng = np.random.default_rng(0)
    labels = [None]*7 + ["rare"]*(fewest - 1) + ["a"]*15 + ["b"]*12 + ["c"]*11
    x = rng.normal(size=(len(labels), 6)) + np.array([dict(a=.5, b=-.5).get(l, 0) for l in labels])[:, None]
    found = old.released_neighbours(x, labels, fewest)
    kept = [i for i, l in enumerate(labels) if l in ("a", "b", "c")]
    similar, k = cosine_similarity(x), min(5, fewest - 1)
    right = {True: 0, False: 0}
    for i in kept:
        for itself in right:
            near = sorted((j for j in kept if itself or j != i), key=lambda j: -similar[i, j])[:k]
            votes = [labels[j] for j in near]
            right[itself] += max("abc", key=lambda l: (votes.count(l), -ord(l))) == labels[i]
    assert found["accuracy"] == pytest.approx(right[True]/len(kept)) and right[True] > right[False]
    assert found["accuracy without itself"] == pytest.approx(right[False]/len(kept))
    assert (found["n_items"], found["n_labels"], found["majority"]) == (38, 3, pytest.approx(15/38))
    assert "1 labels have 5 items or more" in old.released_neighbours(x[:30], ["a"]*30, 5)["note"]


def test_released_accuracy_of_nothing_is_far_above_chance():
    "The reason why a released accuracy is never printed without the row of random numbers."
    rng, labels = np.random.default_rng(1), np.repeat([f"{i}" for i in range(54)], 21)
    found = [old.released_neighbours(rng.normal(size=(len(labels), 256)), labels) for _ in range(3)]
    assert all(f["accuracy"] > 10*f["majority"] and f["accuracy without itself"] < 3*f["majority"]
               for f in found)


def test_released_ratio_by_hand():
    rng = np.random.default_rng(2)
    labels = ["a"]*4 + ["b"]*3 + ["few"]*2 + [None]
    x = rng.normal(size=(10, 5)) + 1
    within, between = [], []
    for i in range(7):
        for j in range(i):
            similar = x[i] @ x[j]/np.linalg.norm(x[i])/np.linalg.norm(x[j])
            (within if labels[i] == labels[j] else between).append(similar)
    found = old.released_ratio(x, labels)
    assert (found["within"], found["between"]) == (pytest.approx(np.mean(within)),
                                                   pytest.approx(np.mean(between)))
    assert found["ratio"] == pytest.approx(np.mean(within)/np.mean(between)) and found["n_items"] == 7
    assert found["p"] == pytest.approx(stats.mannwhitneyu(within, between, alternative="greater").pvalue)
    assert old.released_ratio(np.ones((6, 3)), ["a", "a", "a", "b", "b", "b"])["ratio"] == pytest.approx(1)

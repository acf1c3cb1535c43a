"""Tables about genes as features.

1. The spectral embedding is that of a dense eigendecomposition; edges come in every format, good and bad.
2. A set is a node of the network: heat between two members is the matrix exponential's, and a small set says more.
3. Vectors' components have the vectors' correlations as products; genes that a table lacks are not alike in it.
4. A text's row is the mean of the tokens that it has, whatever stands beside it in a batch.
5. All of them, alone or beside relations, are blocks of one bank that a configuration asks for.
"""
import numpy as np
import pandas as pd
import pytest
from scipy.linalg import expm

from biojepa.actions import gene_tables
from biojepa.actions.banks import MissingFeatureError
from biojepa.actions.describe import relation_features
from biojepa.actions.diffusion import block_components, diffused_features
from biojepa.actions.featurizers import featurize
from biojepa.actions.gene_tables import (
    MissingTextModelError, read_gene_table, set_pairs, spectral_embedding, vector_components
)
from biojepa.actions.members import apart
from biojepa.actions.vocabulary import Modality
from biojepa.config import DataConfig


def random_graph(n=40, p=0.15, seed=0, weights=True):
    rng = np.random.default_rng(seed)
    i, j = np.triu_indices(n, 1)
    kept = rng.random(len(i)) < p
    kept |= j == i + 1                                             # a path keeps it connected
    table = pd.DataFrame({"a": [f"g{x:03d}" for x in i[kept]], "b": [f"g{x:03d}" for x in j[kept]]})
    if weights: table["weight"] = rng.uniform(0.5, 2, len(table))
    return table


def dense(edges, names, width):
    A = pd.DataFrame(0., names, names)
    for a, b, *w in edges.itertuples(index=False):
        A.loc[a, b] += w[0] if w else 1; A.loc[b, a] += w[0] if w else 1
    degree = A.to_numpy().sum(1)
    value, vector = np.linalg.eigh(A.to_numpy()/np.sqrt(np.outer(degree, degree)))
    vector = vector[:, ::-1][:, :width]
    for c in range(width):
        if vector[np.abs(vector[:, c]).argmax(), c] < 0: vector[:, c] *= -1
    return vector/np.sqrt((vector**2).sum(1, keepdims=True)), value[::-1][:width]


@pytest.mark.parametrize("weights", [True, False])
def test_against_a_dense_eigendecomposition(weights):
    edges = random_graph(weights=weights)
    bank = spectral_embedding(edges, width=8)
    expected, values = dense(edges, list(bank.keys), 8)
    assert np.diff(values).max() < -1e-4  # simple eigenvalues: the vectors are unique up to sign
    np.testing.assert_allclose(bank.values, expected, atol=1e-5)
    assert bank.provenance["smallest_eigenvalue"] == pytest.approx(
        values[-1], abs=1e-5) and bank.modality is Modality.PROTEIN


def test_the_order_of_the_edges_does_not_matter():
    edges = random_graph()
    shuffled = edges.sample(frac=1, random_state=1)
    shuffled = pd.concat([shuffled[:50], shuffled[50:].rename(columns={"a": "b", "b": "a"})])
    one, two = spectral_embedding(edges, width=8), spectral_embedding(shuffled, width=8)
    assert one.keys == two.keys and one.provenance["weights"] == two.provenance["weights"]
    np.testing.assert_allclose(one.values, two.values, atol=1e-5)


def test_repeated_edges_add_up_and_loops_do_not_count():
    edges = random_graph(weights=False)
    twice = pd.concat([edges, edges[:5], pd.DataFrame({"a": ["g001"], "b": ["g001"]})])
    weighted = edges.assign(weight=[2.]*5 + [1.]*(len(edges) - 5))
    np.testing.assert_allclose(spectral_embedding(twice, width=8).values,
                               spectral_embedding(weighted, width=8).values,
                               atol=1e-5)


def test_genes_outside_are_an_error_or_are_listed():
    edges = pd.concat([random_graph(weights=False),
                       pd.DataFrame({"a": ["X1"], "b": ["X2"]})])  # a second component
    with pytest.raises(MissingFeatureError, match="no feature for TP53, X1"):
        spectral_embedding(edges, ["g001", "X1", "TP53"], width=4)
    with pytest.warns(UserWarning, match="2 of 3 keys have no feature .* dropped: X1, TP53"):
        bank = featurize("graph", edges, genes=["g001", "X1", "TP53"], width=4, missing="drop")
    assert bank.keys == ("g001",)
    with pytest.raises(ValueError, match="missing: found 'zero'"):
        spectral_embedding(edges, ["g001"], width=4, missing="zero")


@pytest.mark.parametrize(
    "edges,options,message",
    [(pd.DataFrame({"x": ["A"], "y": ["B"]}), {}, "relations: found columns x, y, and no a and no b; give"),
     (pd.DataFrame({"a": ["A", None], "b": ["B", "C"]}), {}, "1 rows without a name in column 'a', the first "
                                                             "is row 1"),
     (pd.DataFrame({"a": ["A"], "b": ["B"], "weight": [-1.]}), {}, "1 rows whose weight is no number.*'-1.0' "
                                                                   "in row 0"),
     (pd.DataFrame({"a": ["A"], "b": ["B"], "weight": [np.nan]}), {}, "1 rows whose weight is no number.*nan"),
     (random_graph(), {"width": 40}, "found 40 for a largest connected component of 40 genes"),
     (random_graph(), {}, "found 320 for"),
     (pd.DataFrame({"a": [], "b": []}), {}, "relations: found no row"),
     ("nowhere.csv", {}, "nowhere.csv: no "
      "such file")])
def test_bad_edges_are_named(edges, options, message):
    with pytest.raises(ValueError, match=message): spectral_embedding(edges, **options)


# ---------------------------------------------------------------- tables

@pytest.mark.parametrize("ending", ["csv", "csv.gz", "tsv", "parquet"])
def test_every_format_gives_the_same_bank(ending, tmp_path):
    edges, path = random_graph(), tmp_path/f"t.{ending}"
    if ending == "parquet": edges.to_parquet(path)
    else: edges.to_csv(path, sep="\t" if ending == "tsv" else ",", index=False)
    np.testing.assert_allclose(featurize("graph", path, width=5).values,
                               spectral_embedding(edges, width=5).values,
                               atol=1e-6)


def test_bad_files_are_named(tmp_path):
    (tmp_path/"t.xls").write_bytes(b"")
    for name, message in {"t.xls": "found the ending '.xls'", "no.parquet": "no such file"}.items():
        with pytest.raises(ValueError, match=f"{name}: .*{message}"): spectral_embedding(tmp_path/name)


# ---------------------------------------------------------------- sets, vectors, texts

SETS = {"small": ["A", "B", "C"], "large": ["B", *"DEFGHIJKLM"], "apart": ["X", "Y"]}

def sets_table():
    return pd.DataFrame([[name, *members] for name, members in SETS.items()]).rename(columns={0: "name", 1: "Genes"})


def test_heat_between_members_of_sets_is_the_matrix_exponential_of_genes_and_sets():
    genes = sorted(set(sum(SETS.values(), [])))
    B = np.array([[g in members for members in SETS.values()] for g in genes], float)
    A = np.block([[np.zeros((len(genes),)*2), B], [B.T, np.zeros((3, 3))]])
    degree = A.sum(1)
    H = expm(2*A/np.sqrt(np.outer(degree, degree)))[:len(genes), :len(genes)]
    names, F = block_components(set_pairs(sets_table()), genes, len(genes), 2.)
    assert list(names) == genes                                     # sets are no genes
    np.testing.assert_allclose(F @ F.T, H/np.sqrt(np.outer(np.diag(H), np.diag(H))), atol=2e-3)
    C = pd.DataFrame(F @ F.T, genes, genes)
    assert C.loc["A", "C"] > C.loc["D", "E"] > .1 and C.loc["A", "X"] == pytest.approx(0, abs=1e-6)


def test_genes_that_a_table_lacks_are_as_far_from_each_other_as_from_anyone():
    rng = np.random.default_rng(0)
    vectors = pd.DataFrame(rng.normal(size=(8, 5)), list("ABCDEFGH"))
    edges = pd.DataFrame(dict(a=list("ABXY"), b=list("BXYA")))
    bank = diffused_features(edges, list("ABXY"), width=6, beside={"numbers": vectors})
    assert bank.provenance["blocks"] == ["all", "numbers"] and bank.width == 12 and len(bank) == 10
    D = pd.DataFrame(apart([bank], [*"ABXYZ"], [*"ABXYZ"])["numbers"], [*"ABXYZ"], [*"ABXYZ"])
    assert D.loc["X", "Y"] == D.loc["X", "A"] == D.loc["Z", "X"] == 1 and D.loc["X", "X"] == 0
    assert D.loc["A", "B"] == pytest.approx(1 - np.corrcoef(vectors - vectors.mean())[0, 1], abs=.15)
    within = apart([bank], ["C", "D"], ["C", "D"])["all"]
    assert within[0, 1] == 1                                        # and relations say nothing of these


def test_products_of_few_components_are_the_nearest_to_the_cosines():
    rng = np.random.default_rng(1)
    vectors = pd.DataFrame(rng.normal(size=(30, 4)) @ rng.normal(size=(4, 20)) + .1*rng.normal(size=(30, 20)) + 3)
    X = (vectors - vectors.mean()).to_numpy()
    cosine = X @ X.T/np.outer(*[np.linalg.norm(X, axis=1)]*2)
    value = np.linalg.eigvalsh(cosine)[::-1]
    _, F = vector_components(vectors, 4)
    assert np.linalg.norm(F @ F.T - cosine) == pytest.approx(np.linalg.norm(value[4:]), rel=1e-3)   # Eckart and Young
    assert (np.linalg.norm(F, axis=1) <= 1 + 1e-6).all()


@pytest.fixture(scope="module")
def sentence_model(tmp_path_factory):
    "A sentence model of one layer, drawn at random."
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer
    folder = tmp_path_factory.mktemp("sentences")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a kinase of the ribosome mitochondrion binds".split()
    (folder/"vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = dict(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(BertConfig(vocab_size=len(words), **config)).save_pretrained(folder)
    BertTokenizer(str(folder/"vocab.txt")).save_pretrained(folder)
    return folder


def test_a_text_is_the_mean_of_its_tokens(sentence_model):
    import torch
    from transformers import BertModel, BertTokenizer
    texts = dict(short="a kinase", long="a kinase of  the ribosome of the mitochondrion binds the\nkinase")
    bank = featurize("text", texts, cache=False, progress=False, model=sentence_model)
    model, tokenizer = BertModel.from_pretrained(sentence_model).eval(), BertTokenizer.from_pretrained(sentence_model)
    for name, text in texts.items():
        with torch.no_grad(): mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(bank.rows([name])[0], mean/mean.norm(), atol=1e-6)
    with pytest.raises(ValueError, match="G1: found '' instead of a text"):
        featurize("text", {"G1": ""}, cache=False, model=sentence_model)


def test_without_the_sentence_model_a_table_of_texts_says_what_to_install(monkeypatch, tmp_path):
    texts = pd.DataFrame(dict(symbol=["A", "B"], summary=["a kinase", "binds"]))
    monkeypatch.setattr(gene_tables, "find_spec", lambda name: None)
    with pytest.raises(MissingTextModelError, match=r"pip install 'biojepa\[text\]'"): read_gene_table(texts)


def test_a_configuration_asks_for_tables_of_genes(tmp_path):
    rng = np.random.default_rng(2)
    random_graph(weights=False).to_csv(tmp_path/"edges.csv", index=False)
    genes = [f"g{i:03d}" for i in range(40)]
    pd.DataFrame(rng.normal(size=(30, 6)), genes[:30]).rename_axis("gene").to_csv(tmp_path/"numbers.csv")
    pd.DataFrame(dict(set=["s"]*4 + ["t"]*4, gene=genes[:8])).to_csv(tmp_path/"modules.tsv", sep="\t", index=False)
    beside = f"{tmp_path}/numbers.csv, {tmp_path}/modules.tsv"
    asked = {str(tmp_path/"edges.csv"): ["all", "numbers", "modules"], None: ["numbers", "modules"]}
    for relations, blocks in asked.items():
        bank = relation_features(DataConfig(relations=relations, gene_tables=beside), genes)
        assert bank.provenance["blocks"] == blocks and bank.width == 128*len(blocks)
    with pytest.warns(UserWarning, match="numbers: left out .vectors: 0 of 2 targets|modules: left out"):
        relation_features(DataConfig(relations=str(tmp_path/"edges.csv"), gene_tables=beside), ["g035", "g036"])


# ---------------------------------------------------------------- real relations

def test_relations_of_the_twins_targets(shared):
    """636 of the twin's 652 targets (simulated cells, real gene names) are in the largest component of the real
    relations."""
    import anndata as ad
    condition = ad.read_h5ad(shared/"k562_essential_twin.h5ad", backed="r").obs["condition"]
    targets = sorted({c.removesuffix("+ctrl") for c in condition.unique()} - {"ctrl"})
    with pytest.warns(UserWarning, match="16 of 652 keys have no feature"):
        bank = spectral_embedding(shared/"gene_relations.parquet", targets, width=16, missing="drop")
    assert (len(targets), len(bank), bank.width) == (652, 636, 16)
    np.testing.assert_allclose(np.linalg.norm(bank.values, axis=1), 1, rtol=1e-5)
    with pytest.raises(MissingFeatureError, match="16 of 652"):
        spectral_embedding(shared/"gene_relations.parquet", targets, width=16)
